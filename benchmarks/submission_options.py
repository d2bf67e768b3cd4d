"""What the submission's options cost and bring: flip, and two resolutions. Run after `make demo`.

    python benchmarks/submission_options.py [--runs runs/demo]

Prints mP@5 of the ensemble at 64 dimensions on the demo's never-seen objects, images one by one as on the host, with the
same PCA (of training images, without options) throughout.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402

OPTIONS = {'none': {}, 'flip': {'flip': True}, 'sizes 1, 1.25': {'sizes': (1, 1.25)},
           'flip, sizes 1, 1.25': {'flip': True, 'sizes': (1, 1.25)}}


@torch.inference_mode()
def vectors_of(model, frame):
    """The submission's vectors of a table's images, one by one: float32 (n, dim)."""
    images = (np.array(Image.open(path).convert('RGB')) for path in frame['path'])
    return np.concatenate([model(torch.from_numpy(pixels).permute(2, 0, 1)[None]) for pixels in images])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=Path, default=Path('runs/demo'))
    arguments = parser.parse_args()
    soups = [arguments.runs / f'soup_{tower}' for tower in ('vit_h_224', 'vit_l_336')]
    splits = utilities.load_data(**demo.sources(), config=utilities.Config.load(soups[0] / 'config.json'))
    training = [utilities.embed(utilities.load_run(run), splits['pca']) for run in soups]
    projection = utilities.fit_pca(utilities.concatenate(training)).linear()
    print('\n| option | mP@5 | images/s |\n| --- | --- | --- |')
    for name, options in OPTIONS.items():
        model, started = utilities.Submission(soups, projection, **options).eval(), time.perf_counter()
        query, index = vectors_of(model, splits['query']), vectors_of(model, splits['index'])
        speed = (len(query) + len(index)) / (time.perf_counter() - started)
        score = utilities.mean_precision_at_5(query, splits['query']['label'], index, splits['index']['label'])
        print(f'| {name} | {score:.4f} | {speed:.0f} |', flush=True)
