"""PCA of 200,000 x 1,024 float32 embeddings to 64 dimensions: utilities.fit_pca against scikit-learn.

    python benchmarks/pca.py [rows] [threads]

The spectrum decays (standard deviation of direction j: j ** -0.7) in a random rotation, around a mean as long
as the spread, as CLIP embeddings have. Runs are interleaved; the table gives medians. Checked: the directions
agree with scikit-learn's on the same data in float64 (signs aligned) to 1e-4.
"""
import sys
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utilities import fit_pca  # noqa: E402

REPEATS = 3


def embeddings(n, d, seed=0):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    mixing = (np.arange(1, d + 1)[:, None] ** -0.7 * rotation.T).astype(np.float32)
    mean = rng.standard_normal(d).astype(np.float32) * np.linalg.norm(mixing) / d ** 0.5
    return np.concatenate([rng.standard_normal((4000, d), dtype=np.float32) @ mixing + mean
                           for _ in range(n // 4000)])


def anonymous_mb():
    """Resident memory of this process without mapped files."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('RssAnon:')[1].split()[0]) / 1024


def measured(work):
    """(result, seconds, MB of memory above the start)."""
    start_mb, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return result, seconds, max(0.0, peak[0] - start_mb)


def main(n=200_000, threads=2):
    data = embeddings(n, 1024)
    works = {'utilities.fit_pca': lambda: fit_pca(data),
             'scikit-learn PCA(64, covariance_eigh)': lambda: PCA(64, svd_solver='covariance_eigh').fit(data)}
    runs = {name: [] for name in works}
    with threadpool_limits(threads):
        for _ in range(REPEATS):
            for name, work in works.items():
                result, seconds, megabytes = measured(work)
                runs[name].append((result, seconds, megabytes))
        exact = PCA(64, svd_solver='covariance_eigh').fit(data.astype(np.float64)).components_
    seconds = {name: median(run[1] for run in of_one) for name, of_one in runs.items()}
    baseline = seconds['scikit-learn PCA(64, covariance_eigh)']
    print(f'PCA, {n:,} x 1,024 float32 to 64, {threads} threads, median of {REPEATS} interleaved runs\n')
    print('| | seconds | ratio | extra memory | largest error of a direction |')
    print('| --- | --- | --- | --- | --- |')
    for name, of_one in runs.items():
        found = getattr(of_one[0][0], 'components', None)
        found = of_one[0][0].components_ if found is None else found
        error = np.abs(found * np.sign((found * exact).sum(1))[:, None] - exact).max()
        print(f'| {name} | {seconds[name]:.2f} | {seconds[name] / baseline:.2f} '
              f'| {max(run[2] for run in of_one):.0f} MB | {error:.1e} |')
        if 'fit_pca' in name:
            assert error < 1e-4, f'directions differ from the float64 reference by {error}'


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
