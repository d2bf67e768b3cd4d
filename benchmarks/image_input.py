"""Images to batches: JPEGs of 1600×1200 to augmented squares of 224, one process, against the plain way.

    python benchmarks/image_input.py [--threads 1]

The plain way is the published recipe's order: decode whole, augment at full size, resize (Pillow, bicubic, antialiased).
The augmentations are the same functions. 'Decoding alone' is Pillow's, at the scale that read_image decodes at. The aim is
4, or 75 % of what decoding alone would reach (plain time / its time) if that is less. Checked: the evaluation image is
within 2/255 (mean) of full decoding. What the augmentations do is checked in tests/.
"""
import itertools
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

from guie.images import AUGMENTATIONS, ImageDataset  # noqa: E402

SIZE = 224


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


def main():
    options = timing.arguments(__doc__, repeats=4)
    names = ('autoaugment', 'cutout', 'happywhale', 'none')
    with tempfile.TemporaryDirectory() as folder:
        frame, words = large_images.large_images(folder, 2 if options.quick else 12)
        works = {'decoding alone': lambda: [decode(path) for path in frame['path']]}
        for name in names:
            works |= works_for(name, frame)
        seconds, results = timing.interleaved(works, options.repeats)
    error = np.abs(results['none, ours'].numpy().astype(int) - results['none, plain'].numpy()).mean()
    timing.close(error, 0, 2, 'Reduced decoding against full decoding, mean of 255 levels')
    rates, rows = {name: len(frame) / value for name, value in seconds.items()}, []
    for name in names:
        ours, plain = rates[f'{name}, ours'], rates[f'{name}, plain']
        ceiling = rates['decoding alone'] / plain
        rows += [timing.Row(f'training, {name}, against the plain way', ours, plain, 'images/s',
                            f'≥ {min(4, .75 * ceiling):.2f}', f'decoding alone: {ceiling:.2f}'),
                 timing.Row(f'training, {name}, against decoding alone', ours, rates['decoding alone'], 'images/s',
                            '≥ 0.60')]
    rows.append(timing.Row('evaluation (none), against the plain way', rates['none, ours'], rates['none, plain'],
                           'images/s', '≥ 2.5'))
    timing.print_table(f'Input: {words}; {options.threads} threads, median of {options.repeats} interleaved runs; mean '
                       f'difference from full decoding {error:.2f}/255', rows)


if __name__ == '__main__':
    main()
