"""Protocols: a model's scores on public benchmarks, by their own metrics, to be held beside published ones."""
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from guie.checkpoints import load_run
from guie.datasets import known_name
from guie.embedding import embed_all
from guie.errors import InputError
from guie.files import did_you_mean, user_path, whole_file
from guie.retrieval import nearest_neighbours
from guie.scores import intervals
from guie.testsets import read_test_set


# Metrics of one query. ranks: those of the relevant index images that were found, ascending from 0, without what is ignored;
# relevant: how many there are in all.
def recall_at_k(ranks, relevant, k):
    """1 if one of the k nearest is relevant, else 0: https://github.com/rksltnl/Deep-Metric-Learning-CVPR16."""
    return float((ranks < k).any())


def precision_at_k(ranks, relevant, k):
    """Share of the min(relevant, k) nearest that are relevant: mP@5 of https://arxiv.org/abs/2309.01858 and of GUIE."""
    judged = min(relevant, k)
    return float((ranks < judged).sum() / judged)


def average_precision_at_k(ranks, relevant, k):
    """Sum of the precisions at the relevant ones of the k nearest, over min(relevant, k):
    https://www.kaggle.com/c/landmark-retrieval-2020/overview/evaluation."""
    found = ranks[ranks < k]
    return float(((np.arange(len(found)) + 1) / (found + 1)).sum() / min(relevant, k))


def trapezoid_precision(ranks, relevant):
    """Area below the curve of precision over recall: compute_ap of https://github.com/filipradenovic/revisitop."""
    count = np.arange(len(ranks))
    before = np.where(ranks == 0, 1., count / np.maximum(ranks, 1))
    return float((before + (count + 1) / (ranks + 1)).sum() / (2 * relevant))


def recalls(*ks):
    """(metrics, k) of several Recall@k."""
    return {f'Recall@{k}': partial(recall_at_k, k=k) for k in ks}, max(ks)


UNED = {'Recall@1': partial(recall_at_k, k=1), 'mP@5': partial(precision_at_k, k=5)}, 5
PROTOCOLS = {  # name: ({metric: function of ranks and relevant}, neighbours that they look at; None: all)
    'stanford-online-products': recalls(1, 10, 100, 1000),
    'deepfashion-in-shop': recalls(1, 10, 20, 30),
    'cub-200': recalls(1, 2, 4, 8),
    'cars-196': recalls(1, 2, 4, 8),
    'products-10k': UNED,  # its authors classify; Recall@1 is the accuracy of the nearest training image's class
    'google-landmarks-v2': ({'mAP@100': partial(average_precision_at_k, k=100)}, 100),
    'met': UNED,
    'roxford5k': ({'mAP': trapezoid_precision}, None),
    'rparis6k': ({'mAP': trapezoid_precision}, None),
}


def evaluate_benchmark(name, model, root, *, folder=None):
    """Scores of a model on a public benchmark, by its own split and metrics: DataFrame protocol, metric, value, low, high,
    queries (those judged), index_images, a row a metric.
    name: a key of PROTOCOLS. model: an Embedder, an Ensemble, or the path of a run. root: the set's folder, or one above it.
    folder: keeps the vectors in <folder>/<name>; the same model uses them again. value: in 0…1; low, high: ends of its 95 %
    interval over the queries' classes (see scores.intervals). Neighbours are exact. Unreadable images count as black ones,
    as in embed; an incomplete copy of the set is printed. MissingError: the set is not there, or has another layout.
    InputError: an unknown name, or a file that cannot be used."""
    key = known_name(name)
    if key not in PROTOCOLS:
        raise InputError(f'{name} is no known benchmark; there are {", ".join(PROTOCOLS)}.{did_you_mean(key, PROTOCOLS)}')
    benchmark = read_test_set(key, root)
    model = load_run(model) if isinstance(model, (str, os.PathLike)) else model
    with tempfile.TemporaryDirectory() as scratch:
        home = folder and Path(user_path(folder), key)
        images = {'index': benchmark.index}
        if benchmark.query is not None:
            images['query'] = cropped(benchmark, Path(home or scratch, 'queries'))
        vectors = embed_all(model, images, home, names=tuple(images))
    return result_table(key, benchmark, judge(vectors.get('query'), vectors['index'], benchmark.truth, *PROTOCOLS[key]))


def cropped(benchmark, folder):
    """The table of queries; where these have boxes, with paths of what each box cuts out, saved without loss in a folder."""
    paths = []
    for number, (path, box) in enumerate(zip(benchmark.query['path'], benchmark.boxes or ())):
        try:
            with Image.open(path, formats=('JPEG', 'PNG')) as image:
                part = image.convert('RGB').crop(box)
        except Exception:  # decoders raise anything; embed names the image and counts it
            paths.append(path)
            continue
        paths.append(str(folder / f'{number}.png'))
        with whole_file(paths[-1]) as beside:
            part.save(beside, 'PNG')
    return benchmark.query.assign(path=paths) if benchmark.boxes else benchmark.query


def judge(query, index, truth, metrics, k):
    """{setting: {metric: float64 (q,)}}, NaN for queries without a relevant image. query, truth: as in Benchmark."""
    alone = query is None
    query = index if alone else query
    values = {setting: np.full((len(metrics), len(query)), math.nan) for setting in truth}
    for place, near in enumerate(neighbours(query, index, k, alone)):
        for setting, pairs in truth.items():
            relevant, ignored = pairs[place]
            if len(relevant):
                ranks = np.flatnonzero(np.isin(near[~np.isin(near, ignored)], relevant))
                values[setting][:, place] = [metric(ranks, len(relevant)) for metric in metrics.values()]
    return {setting: dict(zip(metrics, rows)) for setting, rows in values.items()}


def neighbours(query, index, k, alone, most=2**25):
    """Yields each query's k nearest index rows, int64 (k,); fewer if there are fewer, all for None.
    alone: query i is index i and does not find itself. most: numbers of vectors that are held at a time."""
    k = min(k or len(index), len(index) - alone)
    step = max(1, most // (k * query.shape[1]))
    for start in range(0, len(query), step):
        part = query[start:start + step]
        yield from nearest_neighbours(part, index, k, exclude=np.arange(start, start + len(part)) if alone else None)[1]


def result_table(name, benchmark, values):
    """evaluate_benchmark's table of what judge gives."""
    groups, rows = benchmark.queries['label'], []
    for setting, scores in values.items():
        judged = int((~np.isnan([*scores.values()][0])).sum())
        if not judged:
            raise InputError(f'{name}: no query has an image of its object in the index: get the whole set.')
        if not setting and judged < len(groups):
            print(f'{len(groups) - judged} of {len(groups)} queries have no image of their object in the index: left out')
        rows += [{'protocol': name, 'metric': f'{metric} {setting}'.strip(), 'value': float(np.nanmean(row)), 'low': low,
                  'high': high, 'queries': judged, 'index_images': len(benchmark.index)}
                 for (metric, row), (low, high) in zip(scores.items(), intervals([*scores.values()], groups))]
    return pd.DataFrame(rows)
