"""Exact 5 nearest of 200,000 index vectors for 5,000 queries, 64-d float32, against faiss and scikit-learn.

    python benchmarks/neighbours.py [index rows] [threads]

Vectors are L2-normalised, of a decaying spectrum. Runs are interleaved; the table gives medians and each time as a
multiple of the matrix product alone (the best tiling found, result thrown away). Checked: for 100 queries the result
is that of float64 sorted by (distance, index), and everywhere the distances are those of faiss and scikit-learn.
"""
import sys
import time
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utilities import l2_normalise, nearest_neighbours  # noqa: E402

REPEATS = 5


def by_faiss(query, index):
    flat = faiss.IndexFlatL2(index.shape[1])
    flat.add(index)
    squares, indices = flat.search(query, 5)
    return np.sqrt(squares), indices


def by_scikit_learn(query, index):
    return NearestNeighbors(n_neighbors=5, algorithm='brute').fit(index).kneighbors(query)


def product_alone(query, index):
    buffer = torch.empty(2048 * 256)
    for q in torch.from_numpy(query).split(256):
        for x in torch.from_numpy(index).split(2048):
            torch.mm(x, q.T, out=buffer[:len(x) * len(q)].view(len(x), len(q)))


def by_float64(query, index):
    distances = np.stack([np.linalg.norm(index.astype(np.float64) - q, axis=1) for q in query.astype(np.float64)])
    order = np.argsort(distances, axis=1, kind='stable')[:, :5]
    return np.take_along_axis(distances, order, 1), order


def check(found, query, index):
    distances, indices = found['utilities.nearest_neighbours']
    np.testing.assert_array_equal(indices[:100], by_float64(query[:100], index)[1])
    for name in ('faiss IndexFlatL2', 'scikit-learn brute force'):
        np.testing.assert_allclose(found[name][0], distances, atol=1e-4)
        assert (found[name][1] == indices).mean() > 0.999, f'{name} finds other neighbours'


def main(n=200_000, threads=2):
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 65, dtype=np.float32) ** -0.5
    query, index = (l2_normalise(rng.standard_normal((rows, 64), dtype=np.float32) * spectrum) for rows in (5000, n))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    works = {'utilities.nearest_neighbours': lambda q, x: nearest_neighbours(q, x, 5), 'faiss IndexFlatL2': by_faiss,
             'scikit-learn brute force': by_scikit_learn, 'the matrix product alone': product_alone}
    runs, found = {name: [] for name in works}, {}
    with threadpool_limits(threads):
        for _ in range(REPEATS):
            for name, work in works.items():
                start = time.perf_counter()
                found[name] = work(query, index)
                runs[name].append(time.perf_counter() - start)
    check(found, query, index)
    seconds = {name: median(times) for name, times in runs.items()}
    rival = min(seconds['faiss IndexFlatL2'], seconds['scikit-learn brute force'])
    print(f'5-NN, 5,000 x {n:,} x 64, {threads} threads, median of {REPEATS} interleaved runs\n')
    print('| | seconds | of the faster rival | of the product |')
    print('| --- | --- | --- | --- |')
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / rival:.2f} | {value / seconds['the matrix product alone']:.2f} |")


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
