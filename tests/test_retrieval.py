"""Neighbours and mP@5, against slow references that share nothing with them."""
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch

from guie import retrieval
from guie.projection import l2_normalise
from guie.retrieval import mean_precision_at_5, nearest_neighbours, precision_at_5
from tests.runs import is_one_sentence


def brute_force(query, index, k, exclude=None):
    """All distances in float64, sorted by (distance, index)."""
    distances = np.sqrt(((query[:, None].astype(float) - index[None].astype(float)) ** 2).sum(-1))
    if exclude is not None:
        distances[np.arange(len(query)), exclude] = np.inf
    order = np.array([np.lexsort((np.arange(len(index)), row))[:k] for row in distances])
    return np.take_along_axis(distances, order, 1), order


def assert_neighbours(query, index, k, **options):
    distances, indices = nearest_neighbours(query, index, k, **options)
    expected, order = brute_force(np.asarray(query), np.asarray(index), k, options.get('exclude'))
    assert distances.dtype == np.float32 and indices.dtype == np.int64
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-6, atol=1e-7)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('near', [6, 9, 10, 300])  # rows: more than k, as many as a shortlist holds, and more
def test_distances_that_float32_cannot_tell_apart_are_sorted_as_float64_does(near):
    query = normal(3, 1, 64)
    query = np.concatenate([query, -query])
    for seed in range(20):
        index = normal(seed, near * 3, 64) * 5
        index[::3] = query[0] + l2_normalise(normal(seed + 100, near, 64))
        assert_neighbours(query, index, 5)


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (7, 40, 3, 40), (300, 2500, 64, 5), (5, 700, 63, 33)])
def test_neighbours_are_those_of_float64_brute_force(shape):
    q, n, d, k = shape
    assert_neighbours(normal(0, q, d), normal(1, n, d), k)


@pytest.mark.parametrize('seed', range(12))
def test_ties_go_to_the_smaller_index_across_chunks_and_the_kth_place(seed):
    rng = np.random.default_rng(seed)
    n, d, k = rng.integers(50, 900), rng.integers(1, 70), rng.integers(1, 40)
    index = normal(seed, rng.integers(1, 30), d)
    index = index[rng.integers(len(index), size=n)]  # each row many times, far apart
    query = np.concatenate([index[:20], normal(seed + 1, 20, d)])
    assert_neighbours(query, index, k, chunk=int(rng.integers(1, 400)))


def test_an_index_of_one_repeated_vector_gives_the_first_rows():
    index = np.tile(normal(0, 1, 64), (5000, 1))
    distances, indices = nearest_neighbours(normal(1, 70, 64), index, 9, chunk=1024)
    np.testing.assert_array_equal(indices, np.tile(np.arange(9), (70, 1)))
    assert (distances == distances[:, :1]).all()


@pytest.fixture
def scanned(monkeypatch):
    """How many queries each full scan was for."""
    counts, scan = [], retrieval.scan
    monkeypatch.setattr(retrieval, 'scan', lambda query, *rest: counts.append(len(query)) or scan(query, *rest))
    return counts


def test_the_full_scan_is_only_for_queries_with_too_many_near_ties(scanned):
    index = normal(0, 3000, 64)
    assert_neighbours(normal(1, 50, 64), index, 5)
    index[[7, 800, 1500, 2999]] = index[0]  # five equal rows, which end at the fifth place
    assert_neighbours(np.concatenate([index[:1], normal(1, 50, 64)]), index, 5)
    assert scanned == []
    index[::40] = index[0]  # 75 of them
    assert_neighbours(np.concatenate([index[:1], normal(1, 50, 64)]), index, 5)
    assert scanned == [1]


def test_rows_nearer_to_each_other_than_the_products_can_tell_are_scanned_for(scanned):
    """All rows lie on a sphere about the query but for the last digits of their distances."""
    query, around = normal(0, 1, 16).astype(np.float64), normal(1, 900, 16).astype(np.float64)
    radius = 1 + np.random.default_rng(2).permutation(900)[:, None] * 3e-16
    index = query + radius * around / np.linalg.norm(around, axis=1, keepdims=True)
    distances, indices = nearest_neighbours(query, index, 5, chunk=128)
    every = torch.cdist(torch.from_numpy(query), torch.from_numpy(index), compute_mode='donot_use_mm_for_euclid_dist')[0]
    assert scanned == [1] and indices[0].tolist() == np.lexsort((np.arange(900), every.numpy()))[:5].tolist()


@pytest.mark.parametrize('k', [1, 5])
def test_a_query_far_away_from_a_small_index_finds_the_first_of_equal_distances(k):
    """Their distances are the same float64 number, their products are not."""
    query = np.array([[1e9, 0.]])
    index = np.column_stack([np.zeros(40), np.linspace(1, 0, 40)])  # the nearest rows last, by less than a last digit
    _, indices = nearest_neighbours(query, index, k)
    assert indices.tolist() == [list(range(k))]


def test_vectors_far_from_the_origin_and_close_together_are_told_apart():
    """In float32 all scores of such vectors are the same number."""
    offset = 1000 * normal(0, 1, 64)
    assert_neighbours(normal(1, 20, 64) / 50 + offset, normal(2, 2000, 64) / 50 + offset, 5)


def test_rows_of_very_different_length_do_not_hide_each_other():
    index = normal(0, 1500, 16) * np.float32(10) ** np.random.default_rng(1).integers(-4, 5, (1500, 1))
    assert_neighbours(normal(2, 40, 16), index, 6)


def test_excluded_rows_are_not_found_and_a_negative_number_excludes_nothing():
    vectors = np.repeat(normal(0, 60, 8), 3, axis=0)
    assert_neighbours(vectors, vectors, 4, exclude=np.arange(180))
    assert_neighbours(vectors, vectors, 179, exclude=np.arange(180))
    _, found = nearest_neighbours(vectors[:2], vectors, 1, exclude=[0, -1])
    assert found[:, 0].tolist() == [1, 0]


def test_ties_behind_an_excluded_row_go_to_the_smaller_index():
    """More rows than a shortlist holds are equally far."""
    query = normal(0, 1, 64)
    index = np.concatenate([query + 1, normal(1, 3000, 64) + 5, query])
    index[32:3000:33] = query + 1
    _, found = nearest_neighbours(query, index, 1, exclude=[3001])
    assert found.tolist() == [[0]]
    for k in (1, 2, 5):
        assert_neighbours(query, index, k, exclude=[3001])


def test_more_queries_than_are_searched_at_once_keep_their_own_rows():
    query, index = normal(0, 8200, 4), normal(1, 50, 4)
    exclude = np.arange(8200) % 50
    assert_neighbours(query, index, 2, exclude=exclude)


def test_tensors_arrays_and_memory_maps_of_any_float_type_are_searched_alike(tmp_path):
    query, index = normal(0, 30, 24).astype(np.float16), normal(1, 2000, 24).astype(np.float16)
    file = tmp_path / 'index.npy'
    np.save(file, index)
    expected = nearest_neighbours(query.astype(np.float32), index.astype(np.float32), 7)
    for q, x in [(query, index), (query.tolist(), np.load(file, mmap_mode='r')),
                 (torch.from_numpy(query), torch.from_numpy(index).double().requires_grad_())]:
        for found, wanted in zip(nearest_neighbours(q, x, 7, chunk=500), expected):
            np.testing.assert_array_equal(found, wanted)


def test_a_memory_map_is_never_read_whole(tmp_path, monkeypatch):
    np.save(tmp_path / 'index.npy', normal(0, 20_000, 8))
    read = []
    rows = retrieval.rows_of
    monkeypatch.setattr(retrieval, 'rows_of', lambda *a: (read.append(len(part := rows(*a))), part)[1])
    index = np.load(tmp_path / 'index.npy', mmap_mode='r')
    assert_neighbours(normal(1, 10, 8), index, 3, chunk=640)
    assert max(read) == 640  # a chunk, or the shortlists of all ten queries


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_the_first_bad_row_and_its_side_are_named(value):
    good, bad = normal(0, 3000, 5), normal(0, 3000, 5)
    bad[[1234, 2999], 2] = value
    with pytest.raises(ValueError, match='^index vector 1234 holds NaN or infinite'):
        nearest_neighbours(good, bad, 5, chunk=100)
    with pytest.raises(ValueError, match='^query vector 1234 holds NaN or infinite'):
        nearest_neighbours(bad, good, 5)


@pytest.mark.parametrize('query, index, k, options, sentence', [
    ((3, 4), (9, 5), 1, {}, r'query \(3, 4\) and index \(9, 5\) must be'),
    ((4,), (9, 4), 1, {}, r'query \(4,\)'),
    ((0, 4), (9, 4), 1, {}, r'query \(0, 4\)'),
    ((3, 4), (9, 4), 10, {}, 'k is 10, .* 9 index rows to find: ask for 1 to 9'),
    ((3, 4), (9, 4), 0, {}, 'k is 0'),
    ((3, 4), (9, 4), 9, {'exclude': [0, 1, 2]}, 'ask for 1 to 8'),
    ((3, 4), (9, 4), 1, {'exclude': [0, 1]}, r'exclude has shape \(2,\)'),
])
def test_what_does_not_fit_is_one_sentence(query, index, k, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        nearest_neighbours(np.zeros(query), np.zeros(index), k, **options)


BY_HAND = [  # labels of the index from the nearest on, where the query shows an 'a'; its score
    ('axxxxxx', 1 / 1), ('xaxxxxx', 0 / 1),                          # n_q = 1: judged on the nearest alone
    ('aaxxxxx', 2 / 2), ('axaxxxx', 1 / 2), ('xxaaxxx', 0 / 2),      # n_q = 2: on two
    ('aaaaaxx', 5 / 5), ('axaxaaa', 3 / 5), ('xxaxxaaaa', 1 / 5),    # n_q = 5: on five
    ('aaaaaaaaa', 5 / 5), ('xaaxaaaaaaa', 3 / 5), ('xxxxxaaaaaaaaa', 0 / 5),  # n_q = 9: on five
]


@pytest.mark.parametrize('labels, score', BY_HAND)
def test_a_query_is_judged_on_as_many_neighbours_as_it_has_relevant_images(labels, score):
    places = np.arange(1, len(labels) + 1, dtype=np.float32)[:, None]
    shuffled = np.random.default_rng(0).permutation(len(labels))
    args = np.zeros((1, 1)), ['a'], places[shuffled], np.array(list(labels))[shuffled]
    assert precision_at_5(*args).tolist() == [score]
    assert mean_precision_at_5(*args) == score


def test_of_equally_far_images_the_one_with_the_smaller_index_is_judged():
    place = np.array([[1.0], [-1.0]])
    assert mean_precision_at_5([[0.0]], 'a', place, 'ax') == 1
    assert mean_precision_at_5([[0.0]], 'a', place, 'xa') == 0


def test_a_query_in_its_own_index_counts_neither_as_neighbour_nor_as_relevant():
    """Two images are identical: dropping the first neighbour instead of oneself would be wrong for one."""
    vectors, labels = np.array([[0.0], [0.0], [1.0], [1.1], [1.2]]), ['a', 'b', 'a', 'b', 'b']
    precisions = precision_at_5(vectors, labels, vectors, labels, exclude_self=True)
    # a0: b1 | a2: b3 | b1: a0, a2 | b3: a2, b4 (as near, later) | b4: b3, a2
    assert precisions.tolist() == [0, 0, 0, 1 / 2, 1 / 2]


def slow_mean_precision(query, query_labels, index, index_labels, exclude_self):
    """The definition in plain Python."""
    scores = []
    for i, (q, label) in enumerate(zip(query, query_labels)):
        others = [j for j in range(len(index)) if not (exclude_self and i == j)]
        others.sort(key=lambda j: (math.dist(q, index[j]), j))
        relevant = [index_labels[j] == label for j in others]
        judged = min(sum(relevant), 5)
        if judged:
            scores.append(sum(relevant[:judged]) / judged)
    return sum(scores) / len(scores)


@pytest.mark.parametrize('exclude_self', [False, True])
@pytest.mark.parametrize('seed', range(10))
def test_mean_precision_is_the_definition_in_plain_python(seed, exclude_self):
    rng = random.Random(seed)
    n, kinds = rng.randint(20, 90), rng.choice([3, 12, 30])
    index = [[rng.randint(0, 4) for _ in range(3)] for _ in range(n)]  # whole numbers: many exact ties
    labels = [rng.randrange(kinds) for _ in range(n)]
    query, wanted = (index, labels) if exclude_self else (index[:15], labels[:13] + [0, 1])
    found = mean_precision_at_5(query, wanted, index, labels, exclude_self)
    assert isinstance(found, float)
    assert found == pytest.approx(slow_mean_precision(query, wanted, index, labels, exclude_self), abs=1e-12)


def test_queries_without_a_relevant_image_are_left_out_and_counted_aloud(capsys):
    args = np.zeros((3, 2)), ['a', 'nowhere', 'b'], np.array([[0.0, 0], [1, 1]]), ['a', 'b']
    assert mean_precision_at_5(*args) == 0.5
    assert capsys.readouterr().out.startswith('1 of 3 queries have no image of their object in the index')
    np.testing.assert_array_equal(precision_at_5(*args), [1, np.nan, 0])
    with pytest.raises(ValueError, match='no query has an image of its object'):
        mean_precision_at_5(np.zeros((2, 2)), [1, 2], np.zeros((2, 2)), ['1', '2'])
    with pytest.raises(ValueError, match='no query has an image of its object'):
        mean_precision_at_5(np.zeros((2, 2)), [1, 2], np.zeros((2, 2)), [1, 2], exclude_self=True)


@pytest.mark.parametrize('kind', [
    list, tuple, np.array, torch.tensor, lambda x: pd.Series(x, index=range(900, 900 - len(x), -1)),
    lambda x: [f'n{v}' for v in x], lambda x: pd.Series([f'n{v}' for v in x], dtype='category'),
    lambda x: [(v, 'part') for v in x],
])
def test_labels_of_any_kind_serve(kind):
    vectors, labels = normal(0, 60, 6), np.random.default_rng(1).integers(6, size=60).tolist()
    expected = slow_mean_precision(vectors[:20], labels[:20], vectors[20:], labels[20:], False)
    query, index = torch.from_numpy(vectors[:20]), vectors[20:]
    found = mean_precision_at_5(query, kind(labels[:20]), index, kind(labels[20:]))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('n_query, n_index, exclude_self', [(3, 9, False), (4, 8, False), (4, 9, True)])
def test_labels_that_do_not_fit_the_vectors_are_an_error(n_query, n_index, exclude_self):
    with pytest.raises(ValueError, match='give one label a vector'):
        mean_precision_at_5(np.zeros((4, 2)), [0] * n_query, np.zeros((9, 2)), [0] * n_index, exclude_self)


@pytest.mark.parametrize('missing', [None, np.nan, float('nan'), pd.NA, pd.NaT])
def test_a_missing_label_is_one_sentence(missing):
    vectors, labels = np.eye(4, dtype=np.float32), ['a', missing, missing, 'a']
    for given in (labels, pd.Series(labels, dtype=object)):
        with pytest.raises(ValueError, match='Labels are missing') as error:
            precision_at_5(vectors, given, vectors, given)
        assert is_one_sentence(error)


@pytest.mark.parametrize('rows', [1, 8193])  # one row of a chunk, which counts as contiguous
def test_reversed_vectors_are_searched_as_they_are(rows):
    vectors = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    _, places = nearest_neighbours(vectors[:1], vectors[::-1], 1)
    assert places.tolist() == [[rows - 1]]
