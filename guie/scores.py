"""Scores: mP@5 with its 95 % interval, tables of scores, and their file."""
import math

import numpy as np
import pandas as pd

from guie.errors import InputError
from guie.files import user_path, write_text
from guie.projection import dims_of, fit_pca, project
from guie.retrieval import codes, precision_at_5


def paired_bootstrap(first, second, groups, n=2000, seed=0):
    """Is `second` better? -> (mean of second - first, low, high), with the ends of its 95 % interval: see intervals.
    first, second: `precision_at_5` of two models on the same queries, NaN left out; groups: their labels."""
    gain = np.asarray(second) - np.asarray(first)
    if gain.shape != (len(groups),):
        raise InputError(f'{len(gain)} queries but {len(groups)} groups: give one group a query')
    return float(np.nanmean(gain)), *intervals([gain], groups, n, seed)[0]


def intervals(scores, groups, n=2000, seed=0):
    """95 % intervals of means, by a bootstrap -> [(low, high)] of floats, a pair for each row of scores (m, q).
    groups: q labels, drawn whole with replacement, since images of one object succeed or fail together; all rows share the
    draws. A query that is NaN in any row is left out. With a single group: NaN."""
    scores = np.asarray(scores, dtype=np.float64)
    judged = ~np.isnan(scores).any(0)
    groups = codes(codes(groups)[judged])
    counts = np.bincount(groups)
    if len(counts) < 2:
        return [(math.nan, math.nan)] * len(scores)
    sums = np.stack([*(np.bincount(groups, row) for row in scores[:, judged]), counts])
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(counts), size=len(counts)) for _ in range(n))
    totals = np.stack([sums @ np.bincount(draw, minlength=len(counts)) for draw in draws])  # (n, m + 1)
    return [tuple(ends) for ends in np.quantile(totals[:, :-1] / totals[:, -1:], [.025, .975], axis=0).T.tolist()]


def precisions_of(vectors, splits, dim=64, projection=None, split=''):
    """precision_at_5 of a model's queries at `dim` columns (None: its full width). vectors: from embed_all; see project."""
    names = [f'{split}{part}' for part in ('query', 'index')]
    query, index = (vectors[name] for name in names) if dim is None else project(vectors, dim, projection, split)
    return precision_at_5(query, splits[names[0]]['label'], index, splits[names[1]]['label'])


def score_table(stage, name, vectors, splits, *, dims=(None, 64), projection=None, seconds=math.nan, split=''):
    """mP@5 on never-seen objects: DataFrame stage, model, dim, mp5, low, high, seconds, a row for each entry of dims.
    low, high: ends of the 95 % interval of mp5 (see intervals). vectors: dict of embed_all. dims: None is the full width; a
    number is projected by `projection` (None: one PCA for all), to no more columns than that has or the images allow. split:
    'selection_' scores the objects to make choices on instead."""
    query = vectors[f'{split}query']
    if any(dims):
        projection = projection or fit_pca(vectors['pca'], dims_of(vectors['pca'], max(filter(None, dims))))
        most = projection(query[:1]).shape[1]
        dims = dict.fromkeys(dim and min(dim, most) for dim in dims)
    rows = [precisions_of(vectors, splits, dim, projection, split) for dim in dims]
    for precisions in rows:
        if left_out := int(np.isnan(precisions).sum()):
            print(f'{left_out} of {len(precisions)} queries have no image of their object in the index: left out')
    ends = intervals(rows, splits[f'{split}query']['label'])
    return pd.DataFrame([{'stage': stage, 'model': name, 'dim': dim or query.shape[1], 'mp5': float(np.nanmean(precisions)),
                          'low': low, 'high': high, 'seconds': seconds}
                         for dim, precisions, (low, high) in zip(dims, rows, ends)])


def selection_mp5(vectors, splits):
    """mP@5 of vectors (of embed_all) at their own width on the objects to make choices on."""
    return float(score_table('', '', vectors, splits, dims=(None,), split='selection_')['mp5'].iloc[0])


def scores_by_domain(vectors, splits, dim=64, projection=None):
    """mP@5 of each domain -> DataFrame domain, mp5, low, high (as in score_table), queries (judged), left_out."""
    table = splits['query'][['domain', 'label']].assign(mp5=precisions_of(vectors, splits, dim, projection))
    rows = []
    for domain, part in table.groupby('domain'):
        (low, high), = intervals([part['mp5']], part['label'])
        rows.append({'domain': domain, 'mp5': part['mp5'].mean(), 'low': low, 'high': high, 'queries': part['mp5'].count(),
                     'left_out': part['mp5'].isna().sum()})
    return pd.DataFrame(rows)


def gain_table(pairs, vectors, splits, dim, projections):
    """How sure is each difference? DataFrame model, against, gain, low, high: see paired_bootstrap.
    pairs: (against, model) names of vectors {name: of embed_all} and projections {name: map to dim columns}."""
    known = {name: precisions_of(vectors[name], splits, dim, projections[name]) for pair in pairs for name in pair}
    return pd.DataFrame([(model, against, *paired_bootstrap(known[against], known[model], splits['query']['label']))
                         for against, model in pairs], columns=['model', 'against', 'gain', 'low', 'high'])


def save_scores(table, path):
    """Writes a score_table's stage, model, dim, mp5 and seconds as CSV (a folder: as its scores.csv)."""
    path = user_path(path)
    kept = table.filter(items=['stage', 'model', 'dim', 'mp5', 'seconds'])
    write_text(path / 'scores.csv' if path.is_dir() else path, kept.to_csv(index=False))
