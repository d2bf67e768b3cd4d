"""Where faiss's approximate search takes over from exact search: recall, time and memory for 2,000,000 × 64 numbers.

    python benchmarks/approximate.py [--rows 2000000]

The vectors are as uneven as real ones: objects lie between two objects of the emoji world, 20 views of each, and a view
differs from its object as views of the world do (the miniature tower, 64 numbers). Queries are further views. Candidates of
an index are compared exactly by the vectors on disk. Memory is what faiss's formats take. recall@5: the share of the exact
five that are found.
"""
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import demo  # noqa: E402
import utilities  # noqa: E402
from guie.search import nearest_rows  # noqa: E402

QUERIES, VIEWS, CANDIDATES = 200, 20, 100


def world(small):
    """(means of the objects, float32 (objects, 64); differences of views from their mean) in the emoji world."""
    frame = utilities.read_dataset(demo.make_world(demo.RUNS / 'world') / 'index.csv').head(400 if small else None)
    model = utilities.Embedder(utilities.load_image_tower('local-dir:media/miniature', 'miniature', 64))
    vectors = utilities.embed(model, frame)
    projected = utilities.l2_normalise(vectors @ utilities.fit_pca(vectors, 64).components.T)
    labels = np.unique(frame['label'], return_inverse=True)[1]
    means = np.stack([projected[labels == label].mean(0) for label in range(labels.max() + 1)])
    return means, projected - means[labels]


def grow(means, differences, rows, seed):
    """Yields unit vectors float32 (part, 64), so many rows in all. The objects are drawn by one seed, views by `seed`."""
    objects, views = np.random.default_rng(0), np.random.default_rng(seed)
    for start in range(0, rows, 100_000):
        count = min(100_000, rows - start)
        some = -(-count // VIEWS)
        share = objects.random((some, 1), np.float32)
        first, second = objects.integers(len(means), size=(2, some))
        centres = share * means[first] + (1 - share) * means[second]
        several = np.repeat(centres, VIEWS, axis=0)[:count]
        yield utilities.l2_normalise(several + differences[views.integers(len(differences), size=count)])


def index_of(words, vectors, groups):
    """(a trained faiss index of so many groups, seconds to build it)."""
    start = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], words, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(vectors[::max(1, len(vectors) // (50 * groups))]))
    for part in range(0, len(vectors), 100_000):
        index.add(np.ascontiguousarray(vectors[part:part + 100_000]))
    return index, time.perf_counter() - start


def searched(vectors, queries, index=None):
    """(positions (n, 5), median seconds a query) of an exact search, or of one among an index's candidates."""
    found, seconds = [], []
    for query in queries:
        start = time.perf_counter()
        if index is None:
            rows = nearest_rows(vectors, query, 5)[0]
        else:
            near = np.sort(index.search(query[None], CANDIDATES)[1][0])
            near = near[near >= 0]
            order = utilities.nearest_neighbours(query[None], vectors[near], min(5, len(near)))[1][0]
            rows = np.pad(near[order], (0, 5 - len(order)), constant_values=-1)
        seconds.append(time.perf_counter() - start)
        found.append(rows)
    return np.stack(found), float(np.median(seconds))


def main():
    options = timing.arguments(__doc__, repeats=1, rows=(int, 2_000_000, 'vectors'))
    started, rows = time.time(), 4_000 if options.quick else options.rows
    faiss.omp_set_num_threads(options.threads)
    groups = int(rows ** .5)
    means, differences = world(options.quick)
    queries = np.concatenate([*grow(means, differences, rows, 2)])[::max(1, rows // QUERIES)][:QUERIES]
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.lib.format.open_memmap(Path(folder, 'vectors.npy'), 'w+', np.float32, (rows, 64))
        place = 0
        for part in grow(means, differences, rows, 1):
            vectors[place:place + len(part)] = part
            place += len(part)
        vectors.flush()
        exact, seconds = searched(vectors, queries)
        lines = [('all, exactly', 1, seconds, 0, 0)]
        kinds = {'Flat': 264, 'PQ16x4': 16} if options.quick else {'Flat': 264, 'PQ32': 40, 'PQ16': 24}  # bytes a vector
        for kind, each in kinds.items():
            words = f'IVF{groups},{kind}'
            index, built = index_of(words, vectors, groups)
            for share in (32, 8):
                faiss.ParameterSpace().set_index_parameter(index, 'nprobe', max(1, groups // share))
                found, seconds = searched(vectors, queries, index)
                recall = np.mean([np.isin(*pair).mean() for pair in zip(exact, found)])
                lines.append((f'{words}, 1 of {share} groups', recall, seconds, built, each * rows))
    print(f'\n{rows:,} × 64, {len(queries)} queries one by one, {options.threads} threads; {time.time() - started:.0f} s\n')
    print('| search | recall@5 | ms a query | s to build | GB in memory |\n| --- | --- | --- | --- | --- |')
    for words, recall, seconds, built, size in lines:
        print(f'| {words} | {recall:.3f} | {1000 * seconds:.3g} | {built:.0f} | {size / 1e9:.3g} |')


if __name__ == '__main__':
    main()
