"""Images of 1600×1200 for the benchmarks: from the folder in PHOTOS, or made here."""
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image

import demo

SIDES = (1600, 1200)


def synthetic(rng, codepoints, width, height):
    """Uint8 (height, width, 3): drawings over a texture whose detail falls as in natural images (1/f), and sensor noise."""
    picture, octave = np.full((height, width, 3), 128, np.float32), 2
    while octave < width:
        shape = octave * height // width, octave, 3 if octave < 64 else 1  # fine detail is of brightness
        grain = rng.normal(0, 26 / octave ** .25, shape).astype(np.float32)
        picture += cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, -1)
        octave *= 2
    for codepoint in rng.choice(codepoints, 12):
        side = int(rng.integers(height // 8, height // 2))
        drawing = cv2.resize(demo.drawing(codepoint, 512), (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        top, left = rng.integers(0, height - side), rng.integers(0, width - side)
        place, alpha = picture[top:top + side, left:left + side], drawing[..., 3:] / 255
        place += (drawing[..., :3] - place) * alpha * .8  # the texture shines through as light and shade
    picture += rng.normal(0, 3, picture.shape).astype(np.float32)
    return picture.clip(0, 255).astype(np.uint8)


def large_images(folder, count, sides=SIDES, quality=88, seed=0):
    """Writes `count` JPEGs -> DataFrame path, label, and a description of them. Images found below the folder in PHOTOS are
    enlarged to these sides, with sensor noise added, since enlarging leaves none. Without them images are made."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    given = sorted(Path(os.environ['PHOTOS']).rglob('*.jpg')) if os.environ.get('PHOTOS') else []
    codepoints = demo.objects()['codepoint'].to_numpy()
    paths = [folder / f'{number}.jpg' for number in range(count)]
    for path in paths:
        if given:
            image = Image.open(given[rng.integers(len(given))]).convert('RGB').resize(sides, Image.Resampling.LANCZOS)
            pixels = np.asarray(image) + rng.normal(0, 3, (sides[1], sides[0], 3))
            picture = pixels.clip(0, 255).astype(np.uint8)
        else:
            picture = synthetic(rng, codepoints, *sides)
        Image.fromarray(picture).save(path, quality=quality)
    kilobytes = sorted(path.stat().st_size / 1e3 for path in paths)
    words = (f'{count} JPEGs of {sides[0]}×{sides[1]}, {"enlarged" if given else "made"}, quality {quality}, '
             f'{kilobytes[0]:.0f} to {kilobytes[-1]:.0f} kB, median {kilobytes[count // 2]:.0f} kB')
    return pd.DataFrame({'path': [str(path) for path in paths], 'label': 'image'}), words
