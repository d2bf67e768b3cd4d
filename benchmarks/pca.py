"""PCA of 200,000 × 1,024 float32 embeddings to 64 dimensions: fit_pca against scikit-learn in float64.

    python benchmarks/pca.py

The spectrum decays (standard deviation of direction j: j ** -0.7) in a random rotation, around a mean as long as the
spread, as CLIP embeddings have. The solver is the exact one, covariance_eigh (the default is randomised).
Checked: the directions agree with those of scikit-learn (signs aligned) to 1e-4. Memory is the peak of RssAnon less that
before the call.
"""
import sys
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

from utilities import fit_pca  # noqa: E402


def embeddings(n, d, seed=0):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    mixing = (np.arange(1, d + 1)[:, None] ** -.7 * rotation.T).astype(np.float32)
    mean = rng.standard_normal(d).astype(np.float32) * np.linalg.norm(mixing) / d ** .5
    return np.concatenate([rng.standard_normal((2000, d), dtype=np.float32) @ mixing + mean for _ in range(n // 2000)])


def main():
    options = timing.arguments(__doc__, repeats=1, rows=(int, 200_000, 'embeddings'))
    n, d = (2000, 128) if options.quick else (options.rows, 1024)
    data = embeddings(n, d)
    exact = PCA(64, svd_solver='covariance_eigh')
    works = {'ours': lambda: timing.measured(lambda: fit_pca(data).components),
             'float64': lambda: timing.measured(lambda: exact.fit(data.astype(np.float64)).components_)}
    before = timing.anonymous_memory()
    seconds, results = timing.interleaved(works, options.repeats)
    found, expected = results['ours'][1], results['float64'][1]
    error = timing.close(found * np.sign((found * expected).sum(1))[:, None], expected, 1e-4, 'Directions')
    size = {name: (results[name][0]['bytes'] - before) / 1e9 for name in works}
    timing.print_table(
        f'PCA, {n:,} × {d:,} float32 to 64, {options.threads} threads, median of {options.repeats} interleaved runs; '
        f'directions equal to {error:.0e}',
        [timing.Row(f'{n:,} × {d:,}, time, against scikit-learn in float64', seconds['ours'], seconds['float64'], 's',
                    '≤ 1.5'),
         timing.Row('extra memory, against scikit-learn in float64', size['ours'], size['float64'], 'GB', '≤ 1.2')])


if __name__ == '__main__':
    main()
