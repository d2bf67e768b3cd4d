"""Retrieval: the k nearest index rows of each query, and the competition's mP@5."""
import math

import numpy as np
import pandas as pd
import torch

from guie.errors import InputError


@torch.no_grad()
def nearest_neighbours(query, index, k, *, exclude=None, chunk=8192, device=None):
    """Exact Euclidean neighbours -> numpy (distances float32 (q, k), indices int64 (q, k)).
    Ordered by (distance, index), also across the k-th place. Distances are compared in float64, where equal index rows are
    equally far. query (q, d), index (n, d): arrays, memory maps or tensors. exclude: (q,) index row that each query must not
    find (its own image); negative: none. chunk: index rows read at a time. device: of the matrix products; None: that of
    `query`. ValueError: shapes that do not fit, k out of range, NaN or infinite rows (the first is named)."""
    query, index = (x if isinstance(x, torch.Tensor) else np.asarray(x) for x in (query, index))
    if query.ndim != 2 or index.ndim != 2 or query.shape[1] != index.shape[1] or 0 in query.shape:
        raise InputError(f'query {tuple(query.shape)} and index {tuple(index.shape)} must be (q > 0, d) and '
                         '(n, d): embed both with the same model')
    most = len(index) - (exclude is not None)
    if not 1 <= k <= most:
        raise InputError(f'k is {k}, but each query has {most} index rows to find: ask for 1 to {most}')
    exclude = torch.full((len(query),), -1) if exclude is None else torch.as_tensor(exclude).cpu().long()
    if exclude.shape != (len(query),):
        raise InputError(f'exclude has shape {tuple(exclude.shape)}: give one index row for each query')
    query = rows_of(query, slice(0, None), 'query')
    device = torch.device(device or query.device)
    found = [search(queries.to(device).double(), index, k, excluded.to(device), chunk)
             for queries, excluded in zip(query.split(1024), exclude.split(1024))]
    distances, indices = (torch.cat(parts).cpu().numpy() for parts in zip(*found))
    return distances.astype(np.float32), indices


def search(query, index, k, exclude, chunk):
    """(distances, indices), both (q, k): a shortlist by matrix products, ordered by true distances."""
    scores, at, largest = shortlist(query, index, min(k + 4, len(index)), exclude, chunk)
    vectors = rows_of(index, at.flatten().cpu().numpy()).to(query).view(*at.shape, -1)
    distances = euclidean(query[:, None], vectors)[:, 0]
    distances[scores == torch.inf] = torch.inf  # excluded
    distances, indices = first(k, distances, at)
    if at.shape[1] < len(index):  # near-ties at the end of the shortlist: rounded products may have decided there
        slack = (query.norm(dim=1) + largest).square() * (query.shape[1] + 16) * torch.finfo(query.dtype).eps
        for some in (scores[:, -1] - scores[:, k - 1] <= slack).nonzero()[:, 0].split(64):
            if len(some):
                distances[some], indices[some] = scan(query[some], index, k, exclude[some], chunk)
    return distances, indices


def shortlist(query, index, width, exclude, chunk):
    """(scores, indices) of the `width` best index rows, both (q, width), and the longest index row's length.
    A row's score |x|²/2 - q·x rises with its distance; an excluded row's is infinite."""
    scores, at, largest = query.new_empty(len(query), 0), exclude.new_empty(len(query), 0), 0.0
    for start in range(0, len(index), chunk):
        rows = rows_of(index, slice(start, start + chunk), 'index').to(query)
        half = rows.square().sum(1) / 2
        largest = max(largest, math.sqrt(2 * float(half.max())))
        here = torch.addmm(half, query, rows.T, alpha=-1)
        inside = ((exclude >= start) & (exclude < start + len(rows))).nonzero()[:, 0]
        here[inside, exclude[inside] - start] = torch.inf
        best, places = here.topk(min(width, len(rows)), largest=False)
        scores, order = torch.cat([scores, best], 1).topk(min(width, scores.shape[1] + best.shape[1]), largest=False)
        at = torch.cat([at, places + start], 1).gather(1, order)
    return scores, at, largest


def scan(query, index, k, exclude, chunk):
    """As search, by true distances to every index row."""
    distances, indices = query.new_empty(len(query), 0), exclude.new_empty(len(query), 0)
    for start in range(0, len(index), chunk):
        apart = euclidean(query, rows_of(index, slice(start, start + chunk)).to(query))
        at = torch.arange(start, start + apart.shape[1], device=query.device).expand_as(apart)
        apart[at == exclude[:, None]] = torch.inf
        distances, indices = first(k, torch.cat([distances, apart], 1), torch.cat([indices, at], 1))
    return distances, indices


def first(k, distances, indices):
    """The k first columns of each row by (distance, index)."""
    indices, order = indices.sort(1)
    distances, nearest = distances.gather(1, order).sort(dim=1, stable=True)
    return distances[:, :k], indices.gather(1, nearest)[:, :k]


def euclidean(a, b):
    """Distances of all rows of a to all of b, by differences: equal rows are equally far."""
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')


def rows_of(vectors, which, side=None):
    """Rows as a tensor, without a copy where possible; with a `side` to name, NaN and infinity are errors."""
    rows = vectors[which]
    if not isinstance(rows, torch.Tensor):
        rows = rows.copy() if min(rows.strides, default=0) < 0 else rows  # a single reversed row counts as contiguous
        rows = torch.from_numpy(np.require(rows, requirements='CW'))
    if side and (bad := ~(rows.abs().amax(1).double() < 1e150)).any():  # larger squares overflow
        raise InputError(f'{side} vector {which.start + int(bad.nonzero()[0])} holds NaN or infinite values: '
                         'leave it out or embed it again')
    return rows


def precision_at_5(query, query_labels, index, index_labels, exclude_self=False):
    """The competition's score of each query -> float64 (q,), NaN where the index shows none of its object.
    With n_q index images of the query's object and k_q = min(n_q, 5): the share of its k_q nearest that show it. query (q,
    d), index (n, d); labels: q and n hashable values that compare by ==, in any sequence. exclude_self: query i is index i,
    which counts neither among its neighbours nor in n_q. ValueError: labels that do not fit, no query that can score."""
    sizes = len(query), len(query_labels), len(index), len(index_labels)
    if sizes[0] != sizes[1] or sizes[2] != sizes[3] or (exclude_self and sizes[0] != sizes[2]):
        raise InputError('{} queries with {} labels, {} index vectors with {} labels: give one label a vector'
                         ' and, with exclude_self, the same images twice'.format(*sizes))
    query_codes, index_codes = np.split(codes(query_labels, index_labels), sizes[:1])
    relevant = np.bincount(index_codes, minlength=query_codes.max(initial=0) + 1)[query_codes]
    itself = np.arange(len(query)) if exclude_self else None
    relevant = relevant - (query_codes == index_codes) if exclude_self else relevant
    if not relevant.any():
        raise InputError('no query has an image of its object in the index: do both use the same labels?')
    judged = np.minimum(relevant, 5)
    _, neighbours = nearest_neighbours(query, index, int(judged.max()), exclude=itself)
    hits = (index_codes[neighbours] == query_codes[:, None]) & (np.arange(judged.max()) < judged[:, None])
    return hits.sum(1) / np.where(judged, judged, np.nan)


def mean_precision_at_5(query, query_labels, index, index_labels, exclude_self=False):
    """The competition's mP@5 as a float: the mean of `precision_at_5` over the queries that have one."""
    precisions = precision_at_5(query, query_labels, index, index_labels, exclude_self)
    if left_out := int(np.isnan(precisions).sum()):
        print(f'{left_out} of {len(precisions)} queries have no image of their object in the index: left out')
    return float(np.nanmean(precisions))


def codes(*labels):
    """Equal labels -> equal integers 0, 1, …, all sequences in one array. InputError for a label that is missing."""
    known = {}
    lists = [part.tolist() if hasattr(part, 'tolist') else part for part in labels]
    numbers = np.array([known.setdefault(label, len(known)) for part in lists for label in part], dtype=int)
    if pd.Series([*known], dtype=object).isna().any():
        raise InputError('Labels are missing (None or NaN): leave these images out, or label them.')
    return numbers
