"""Exact 5 nearest of 200,000 index vectors for 5,000 queries, 64-d float32, against faiss and scikit-learn.

    python benchmarks/neighbours.py

Vectors are L2-normalised, of a decaying spectrum. The bound is the matrix product alone (the best tiling found, result
thrown away). Ours multiplies in float64, all others in float32. Checked: for 100 queries the result is that of float64
sorted by (distance, index), and everywhere the distances are those of faiss and scikit-learn.
"""
import sys
from pathlib import Path

import faiss
import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

from utilities import l2_normalise, nearest_neighbours  # noqa: E402


def by_faiss(query, index):
    flat = faiss.IndexFlatL2(index.shape[1])
    flat.add(index)
    squares, indices = flat.search(query, 5)
    return np.sqrt(squares), indices


def by_scikit_learn(query, index):
    return NearestNeighbors(n_neighbors=5, algorithm='brute').fit(index).kneighbors(query)


def product_alone(query, index):
    buffer = torch.empty(2048 * 512)
    for q in torch.from_numpy(query).split(512):
        for x in torch.from_numpy(index).split(2048):
            torch.mm(x, q.T, out=buffer[:len(x) * len(q)].view(len(x), len(q)))


def by_float64(query, index):
    distances = cdist(query.astype(np.float64), index.astype(np.float64))
    order = np.argsort(distances, axis=1, kind='stable')[:, :5]
    return np.take_along_axis(distances, order, 1), order


def check(found, query, index):
    distances, indices = found['ours']
    if (indices[:100] != by_float64(query[:100], index)[1]).any():
        raise SystemExit('Neighbours are not those of float64 sorted by (distance, index).')
    for name in ('faiss', 'scikit-learn'):
        timing.close(found[name][0], distances, 1e-4, f'Distances of {name}')
        if (found[name][1] == indices).mean() < .999:
            raise SystemExit(f'{name} finds other neighbours.')


def main():
    options = timing.arguments(__doc__, repeats=1, rows=(int, 200_000, 'vectors in the index'))
    n, queries = (2000, 50) if options.quick else (options.rows, 5000)
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 65, dtype=np.float32) ** -.5
    query, index = (l2_normalise(rng.standard_normal((rows, 64), dtype=np.float32) * spectrum) for rows in (queries, n))
    faiss.omp_set_num_threads(options.threads)
    works = {'ours': lambda: nearest_neighbours(query, index, 5), 'faiss': lambda: by_faiss(query, index),
             'scikit-learn': lambda: by_scikit_learn(query, index), 'product': lambda: product_alone(query, index)}
    seconds, found = timing.interleaved(works, options.repeats)
    check(found, query, index)
    work = f'5 of {n:,} for {queries:,}, against'
    rows = [timing.Row(f'{work} {name}', seconds['ours'], seconds[name], 's', '',
                       f'product alone: {seconds["product"] / seconds[name]:.2f}') for name in ('faiss', 'scikit-learn')]
    rows.append(timing.Row(f'{work} a minute', seconds['ours'], 60, 's', '≤ 1.0'))
    timing.print_table(f'Exact 5-NN, {queries:,} × {n:,} × 64, {options.threads} threads, median of {options.repeats} '
                       f'interleaved runs', rows)


if __name__ == '__main__':
    main()
