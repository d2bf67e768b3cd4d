"""Embedding a folder of 5,000 images with the miniature tower, against a DataLoader with torchvision's transforms.

    python benchmarks/embedding.py

The reference is what one would write: a Dataset that opens, converts and resizes (Pillow, antialiased bicubic) to the
tower's 64 pixels; ToTensor, Normalize; a DataLoader with default settings, but the same batches of 64; the open_clip tower
with its default blocks. The folder has 50 JPEGs of 800×600, each a hundred times, in the page cache. Both embed 250 at a
time, in turn. Checked: cosines between the vectors of both (JPEGs decoded at a reduced scale differ by up to 2/255).
"""
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import large_images  # noqa: E402
import timing  # noqa: E402

import utilities  # noqa: E402


class PlainImages(Dataset):
    def __init__(self, paths, size, mean, std):
        self.paths = paths
        self.transform = transforms.Compose([
            transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
            transforms.Normalize(mean, std)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert('RGB'))


@torch.inference_mode()
def plainly(clip, spec, paths):
    batches = DataLoader(PlainImages(paths, spec.image_size, spec.mean, spec.std), batch_size=64)
    return torch.cat([F.normalize(clip.encode_image(images)) for images in batches]).numpy()


def quietly(model, frame):
    with redirect_stdout(StringIO()):  # the progress bar's line
        return utilities.embed(model, frame)


def main():
    options = timing.arguments(__doc__, repeats=3, size=(int, 64, 'pixels of the tower'))
    part = 8 if options.quick else 250
    clip = open_clip.create_model('local-dir:media/miniature', force_image_size=options.size).eval()
    tower = utilities.load_image_tower('local-dir:media/miniature', '', options.size)
    model = utilities.Embedder(tower).eval()
    with tempfile.TemporaryDirectory() as folder:
        images, words = large_images.large_images(folder, 2 if options.quick else 50, sides=(800, 600))
        frame = pd.concat([images] * 100, ignore_index=True)
        turns = {'ours': [], 'plain': []}  # parts of the folder that each has embedded

        def next_part(kind):
            start = len(turns[kind]) * part % len(frame)
            turns[kind].append(start)
            return frame.iloc[start:start + part]

        works = {'ours': lambda: quietly(model, next_part('ours')),
                 'plain': lambda: plainly(clip, tower.spec, next_part('plain')['path'].tolist())}
        seconds, vectors = timing.interleaved(works, options.repeats)
    cosines = (vectors['ours'] * vectors['plain']).sum(1)
    timing.close(cosines.mean(), 1, 2e-3, 'Mean cosine between the vectors of both')
    timing.close(cosines.min(), 1, 5e-2, 'Least cosine between the vectors of both')
    timing.print_table(f'Embedding a folder, miniature tower at {options.size} pixels: {words}; {options.threads} threads, '
                       f'median of {options.repeats} interleaved parts of {part}; mean cosine {cosines.mean():.5f}, least '
                       f'{cosines.min():.4f}',
                       [timing.Row('a folder, against DataLoader and torchvision', part / seconds['ours'],
                                   part / seconds['plain'], 'images/s', '≥ 2.0')])


if __name__ == '__main__':
    main()
