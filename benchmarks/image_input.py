"""Images to batches: JPEGs of 1600×1200 to augmented squares of 224, against the plain way, and by several workers.

    python benchmarks/image_input.py [--threads 1]

The plain way is the published recipe's order: decode whole, augment at full size, resize (Pillow, bicubic, antialiased).
The augmentations are the same functions, and both run in one process. The bound is Pillow's decoding alone, at the scale
that read_image decodes at. Workers read an epoch of training with autoaugment, each image thirty times; starting them is
part of it. Two, or four, are measured where there are as many cores. Checked: the image without augmentation is within
2/255 (mean) of full decoding. What the augmentations do is checked in tests/.
"""
import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import large_images  # noqa: E402
import timing  # noqa: E402

from guie.images import AUGMENTATIONS, ImageDataset, loader  # noqa: E402

SIZE = 224
WORKERS = {2: '≥ 1.8', 4: '≥ 3.4'}  # the aims, against one worker


def decode(path):
    """Only the decoding, at the scale that a square of SIZE needs."""
    with Image.open(path) as image:
        image.draft(None, (2 * SIZE, 2 * SIZE))
        image.load()


def plainly(path, transforms):
    with Image.open(path) as image:
        image = image.convert('RGB')
    augmented = v2.Compose([*transforms, v2.Identity()])(image)
    if isinstance(augmented, torch.Tensor):  # cutout ends as one
        augmented = v2.functional.to_pil_image(augmented)
    return v2.functional.pil_to_tensor(augmented.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def works_for(name, frame):
    """{what: function} that bring all images of the table to one batch."""
    ours, transforms, epochs = ImageDataset(frame, SIZE, name), AUGMENTATIONS[name](), itertools.count()

    def next_epoch():  # other random draws every time, as for the plain way
        epoch = next(epochs)
        return torch.stack([ours[epoch, i]['image'] for i in range(len(frame))])

    return {f'{name}, ours': next_epoch,
            f'{name}, plain': lambda: torch.stack([plainly(path, transforms) for path in frame['path']])}


def epoch_by(workers, frame, times):
    """A function that reads all images `times` times, as training does in one epoch; returns how many it read."""
    dataset = ImageDataset(frame.loc[frame.index.repeat(times)], SIZE, 'autoaugment')
    return lambda: sum(len(batch['image']) for batch in loader(dataset, len(frame), train=True, workers=workers))


def main():
    options = timing.arguments(__doc__, repeats=3)
    counts = [count for count in WORKERS if count <= (os.cpu_count() or 1)]
    with tempfile.TemporaryDirectory() as folder:
        frame, words = large_images.large_images(folder, 2 if options.quick else 12)
        works = {'decoding alone': lambda: [decode(path) for path in frame['path']]}
        for name in AUGMENTATIONS:
            works |= works_for(name, frame)
        works |= {count: epoch_by(count, frame, 2 if options.quick else 30) for count in (1, *counts)}
        seconds, results = timing.interleaved(works, options.repeats)
    error = np.abs(results['none, ours'].numpy().astype(int) - results['none, plain'].numpy()).mean()
    timing.close(error, 0, 2, 'Reduced decoding against full decoding, mean of 255 levels')
    rates = {name: (results[name] if isinstance(name, int) else len(frame)) / seconds[name] for name in works}
    rows = [timing.Row(f'{name}, against the plain way', rates[f'{name}, ours'], rates[f'{name}, plain'], 'images/s',
                       '≥ 3.5', f'decoding alone: {rates["decoding alone"] / rates[f"{name}, plain"]:.2f}')
            for name in AUGMENTATIONS]
    rows += [timing.Row(f'autoaugment, {count} workers, against one', rates[count], rates[1], 'images/s', WORKERS[count])
             for count in counts]
    timing.print_table(f'Input: {words}; {options.threads} threads, median of {options.repeats} interleaved runs; mean '
                       f'difference from full decoding {error:.2f}/255', rows)


if __name__ == '__main__':
    main()
