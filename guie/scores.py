"""Scores: how sure an mP@5 is, tables of scores, and the file of them."""
import math

import numpy as np
import pandas as pd

from guie.errors import InputError
from guie.files import user_path, write_text
from guie.projection import dims_of, fit_pca, project
from guie.retrieval import codes, precision_at_5


def paired_bootstrap(first, second, groups, n=2000, seed=0):
    """Is `second` better? -> (mean of second - first, low, high), with the ends of its 95 % interval.
    first, second: `precision_at_5` of two models on the same queries, NaN left out; groups: their labels, drawn whole with
    replacement, since images of one object succeed or fail together."""
    gain = np.asarray(second) - np.asarray(first)
    if gain.shape != (len(groups),):
        raise InputError(f'{len(gain)} queries but {len(groups)} groups: give one group a query')
    judged = ~np.isnan(gain)
    groups = codes(codes(groups)[judged])
    sums, counts = np.bincount(groups, gain[judged]), np.bincount(groups)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(n))
    means = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    return float(gain[judged].mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def precisions_of(vectors, splits, dim=64, projection=None, split=''):
    """precision_at_5 of a model's queries at `dim` columns (None: its full width). vectors: of embed_all; see project."""
    names = [f'{split}{part}' for part in ('query', 'index')]
    query, index = (vectors[name] for name in names) if dim is None else project(vectors, dim, projection, split)
    return precision_at_5(query, splits[names[0]]['label'], index, splits[names[1]]['label'])


def score_table(stage, name, vectors, splits, *, dims=(None, 64), projection=None, seconds=math.nan, split=''):
    """mP@5 on never-seen objects: DataFrame stage, model, dim, mp5, seconds, a row for each entry of dims.
    vectors: dict of embed_all. dims: None is the full width; a number is projected with this projection, by default one PCA
    for all, and to no more columns than that has or the images allow. split: 'selection_' scores the objects for choices
    instead."""
    query, rows = vectors[f'{split}query'], []
    if any(dims):
        projection = projection or fit_pca(vectors['pca'], dims_of(vectors['pca'], max(filter(None, dims))))
        most = projection(query[:1]).shape[1]
        dims = dict.fromkeys(dim and min(dim, most) for dim in dims)
    for dim in dims:
        precisions = precisions_of(vectors, splits, dim, projection, split)
        if left_out := int(np.isnan(precisions).sum()):
            print(f'{left_out} of {len(precisions)} queries have no image of their object in the index: left out')
        rows.append({'stage': stage, 'model': name, 'dim': dim or query.shape[1], 'mp5': float(np.nanmean(precisions)),
                     'seconds': seconds})
    return pd.DataFrame(rows)


def scores_by_domain(vectors, splits, dim=64, projection=None):
    """mP@5 of each kind of object -> DataFrame domain, mp5, queries (judged), left_out."""
    table = pd.DataFrame({'domain': splits['query']['domain'], 'mp5': precisions_of(vectors, splits, dim, projection)})
    return table.groupby('domain', as_index=False).agg(
        mp5=('mp5', 'mean'), queries=('mp5', 'count'), left_out=('mp5', lambda scores: scores.isna().sum()))


def gain_table(pairs, vectors, splits, dim, projections):
    """How sure is each difference? DataFrame model, against, gain, low, high: see paired_bootstrap.
    pairs: (against, model) names of vectors {name: of embed_all} and projections {name: map to dim columns}."""
    known = {name: precisions_of(vectors[name], splits, dim, projections[name]) for pair in pairs for name in pair}
    return pd.DataFrame([(model, against, *paired_bootstrap(known[against], known[model], splits['query']['label']))
                         for against, model in pairs], columns=['model', 'against', 'gain', 'low', 'high'])


def save_scores(table, path):
    """Writes a score_table as CSV (a folder: as its scores.csv)."""
    path = user_path(path)
    write_text(path / 'scores.csv' if path.is_dir() else path, table.to_csv(index=False))
