"""A head on the cached vectors of a frozen tower, as large as the competition: 330,000 × 1,152 numbers, 35,000 classes.

    python benchmarks/frozen_head.py [--images 330000]

Trains one epoch of utilities.fit_head on as many random vectors in a memory map, on the GPU if there is one, and says what
20 epochs of 330,000 would take (a step costs the same whichever rows it takes) and the largest memory of process and GPU.
"""
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import utilities  # noqa: E402
from guie.distributed import best_device  # noqa: E402

IMAGES, WIDTH, CLASSES, EPOCHS, BATCH = 330_000, 1152, 35_000, 20, 128


def train(images, width, classes):
    """{'seconds' of one epoch, 'bytes' of the process, 'on_gpu': bytes there}."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.lib.format.open_memmap(f'{folder}/vectors.npy', 'w+', np.float32, (images, width))
        generator = np.random.default_rng(0)
        for start in range(0, images, 8192):
            some = generator.standard_normal(vectors[start:start + 8192].shape, np.float32)
            vectors[start:start + 8192] = some / np.linalg.norm(some, axis=1, keepdims=True)
        labels = np.arange(images) % classes
        options = {'epochs': 1, 'batch_size': BATCH}
        utilities.fit_head(vectors[:2 * BATCH], labels[:2 * BATCH], **options)  # loads what a GPU needs
        facts, _ = timing.measured(lambda: utilities.fit_head(vectors, labels, **options))
    return facts | {'on_gpu': torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def row(images, width, classes):
    """{work, measured, against}: one line of a table."""
    facts = train(images, width, classes)
    whole = facts['seconds'] * EPOCHS * (IMAGES // BATCH) / (images // BATCH)
    return {'work': f'a head on {images:,} × {width:,} cached vectors, {classes:,} classes, one epoch',
            'measured': f'{facts["seconds"]:.1f} s, {1000 * facts["seconds"] / (images // BATCH):.2f} ms a step',
            'against': f'{EPOCHS} epochs of {IMAGES:,}: {whole / 60:.1f} minutes; {facts["bytes"] / 1e9:.1f} GB of memory'
                       f', {facts["on_gpu"] / 1e9:.1f} on the GPU'}


def main():
    options = timing.arguments(__doc__, repeats=1, images=(int, IMAGES, 'vectors to train on'))
    started = time.time()
    found = row(*((1_000, 32, 100) if options.quick else (options.images, WIDTH, CLASSES)))
    print(f'{best_device()}, {options.threads} threads; {time.time() - started:.0f} s in all\n')
    print('| work | measured | against |\n'
          f'| --- | --- | --- |\n| {" | ".join(found.values())} |')


if __name__ == '__main__':
    main()
