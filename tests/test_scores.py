"""Scores: intervals against what statistics says, tables against scores computed apart."""
import time

import numpy as np
import pandas as pd
import pytest

from guie.projection import fit_pca, l2_normalise, random_projection
from guie.retrieval import mean_precision_at_5, precision_at_5
from guie.scores import gain_table, intervals, paired_bootstrap, save_scores, score_table, scores_by_domain


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_bootstrap_interval_of_single_queries_is_the_normal_one():
    rng = np.random.default_rng(0)
    first, second = rng.random(900), rng.random(900) + 0.05
    difference, low, high = paired_bootstrap(first, second, np.arange(900))
    error = 1.96 * np.std(second - first) / 30
    assert difference == pytest.approx(np.mean(second - first))
    assert (low, high) == pytest.approx((difference - error, difference + error), abs=0.004)
    assert paired_bootstrap(first, second, np.arange(900)) == (difference, low, high)


def test_the_bootstrap_draws_whole_groups():
    """Twenty copies of each query say no more than one."""
    gain, groups = np.repeat(normal(0, 60), 20), np.repeat([f'object {i}' for i in range(60)], 20)
    _, low, high = paired_bootstrap(np.zeros(1200), gain, groups)
    _, low_once, high_once = paired_bootstrap(np.zeros(60), gain[::20], groups[::20])
    assert high - low == pytest.approx(high_once - low_once, rel=1e-6)


def slow_interval(precisions, labels, n=2000):
    """The bootstrap in plain Python: as many objects as there are, each with all of its queries, their mean; 2000 times."""
    objects = {}
    for precision, label in zip(precisions, labels):
        if not np.isnan(precision):
            objects.setdefault(label, []).append(precision)
    objects, rng = list(objects.values()), np.random.default_rng(0)
    means = []
    for _ in range(n):
        drawn = [precision for i in rng.integers(len(objects), size=len(objects)) for precision in objects[i]]
        means.append(sum(drawn) / len(drawn))
    return np.quantile(means, .025), np.quantile(means, .975)


def test_intervals_are_the_bootstrap_in_plain_python_and_rows_share_its_draws():
    scores = np.random.default_rng(1).random((3, 80))
    scores[:, [7, 30]] = np.nan
    labels = np.random.default_rng(2).integers(13, size=80)
    labels[30] = 99  # an object of which no query is judged
    assert np.allclose(intervals(scores, labels), [slow_interval(row, labels) for row in scores])
    assert np.allclose(intervals(scores[1:2], labels), intervals(scores, labels)[1:2], atol=1e-12)


def test_a_single_object_has_no_interval():
    assert np.isnan(intervals([[.1, .9, .4]], ['a', 'a', 'a'])).all()
    assert np.isnan(intervals([[.1, np.nan]], ['a', 'b'])).all()
    gain, *ends = paired_bootstrap([.1, .2], [.3, .6], ['a', 'a'])
    assert gain == pytest.approx(.3) and np.isnan(ends).all()


def test_intervals_of_thousands_of_objects_take_a_moment():
    scores, started = np.random.default_rng(0).random((10, 20_000)), time.process_time()
    ends = intervals(scores, np.arange(20_000) // 4)
    assert time.process_time() - started < 2
    error = 1.96 * scores.reshape(10, 5000, 4).mean(2).std(1) / 5000 ** .5
    assert np.allclose(np.transpose(ends), [scores.mean(1) - error, scores.mean(1) + error], atol=.0006)


def test_the_bootstrap_is_paired_and_leaves_out_unjudged_queries():
    first = np.append(np.random.default_rng(0).random(50), [np.nan, 0.3])
    second = first + 0.1
    second[-1] = np.nan
    assert paired_bootstrap(first, second, ['a', 'b'] * 26) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match='52 queries but 3 groups'):
        paired_bootstrap(first, second, ['a', 'b', 'c'])


@pytest.fixture
def scored():
    """(vectors, splits) of 12 noisy objects in two domains; the query's last image has no object in the index."""
    rng = np.random.default_rng(0)
    centres, labels = rng.standard_normal((12, 80)), np.arange(120) % 12
    every = (centres[labels] + rng.standard_normal((120, 80))).astype(np.float32)
    table = pd.DataFrame({'label': labels, 'domain': np.where(labels < 4, 'few', 'many')})
    parts = {'query': slice(0, 25), 'index': slice(25, None), 'selection_query': slice(24, 48),
             'selection_index': slice(0, 24)}
    vectors = {'pca': every} | {name: every[part] for name, part in parts.items()}
    splits = {name: table[part].reset_index(drop=True) for name, part in parts.items()}
    splits['query'].loc[24, 'label'] = 99
    return vectors, splits


def test_scores_at_full_width_and_through_a_projection_have_a_row_each(scored, capsys):
    vectors, splits = scored
    query, index, labels = vectors['query'], vectors['index'], [splits[name]['label'] for name in ('query', 'index')]
    table = score_table('soup', 'mine', vectors, splits, dims=(None, 64, 3), seconds=7)
    assert '1 of 25 queries have no image of their object in the index' in capsys.readouterr().out
    assert list(table.columns) == ['stage', 'model', 'dim', 'mp5', 'low', 'high', 'seconds']
    assert table['dim'].tolist() == [80, 64, 3]
    small = [l2_normalise(fit_pca(vectors['pca'], 3)(part)) for part in (query, index)]
    assert table['mp5'].tolist()[::2] == [mean_precision_at_5(query, labels[0], index, labels[1]),
                                          mean_precision_at_5(small[0], labels[0], small[1], labels[1])]
    random_ways = score_table('', '', vectors, splits, dims=(3,), projection=random_projection(80, 3))
    assert random_ways['mp5'].iloc[0] < table['mp5'].iloc[2]
    narrow = {name: part[:, :3] for name, part in vectors.items()}
    assert score_table('', '', narrow, splits)['dim'].tolist() == [3, 3]  # no 64 to be had of 3
    chosen = score_table('', '', vectors, splits, dims=(None,), split='selection_')
    assert chosen['mp5'].iloc[0] == mean_precision_at_5(
        vectors['selection_query'], splits['selection_query']['label'],
        vectors['selection_index'], splits['selection_index']['label'])


def test_each_score_has_the_interval_of_its_own_precisions(scored):
    vectors, splits = scored
    table = score_table('', '', vectors, splits, dims=(None, 3))
    labels = [splits[name]['label'] for name in ('query', 'index')]
    narrow = fit_pca(vectors['pca'], 3)
    for row, points in zip(table.itertuples(), (lambda part: part, lambda part: l2_normalise(narrow(part)))):
        precisions = precision_at_5(points(vectors['query']), labels[0], points(vectors['index']), labels[1])
        assert (row.low, row.high) == pytest.approx(slow_interval(precisions, labels[0]))
    assert row.low < row.mp5 < row.high
    chosen = score_table('', '', vectors, splits, dims=(3,), split='selection_')
    labels = [splits[f'selection_{name}']['label'] for name in ('query', 'index')]
    precisions = precision_at_5(points(vectors['selection_query']), labels[0], points(vectors['selection_index']), labels[1])
    assert (chosen['low'][0], chosen['high'][0]) == pytest.approx(slow_interval(precisions, labels[0]))


def test_scores_of_few_images_are_at_as_many_dimensions_as_their_pca_has(scored):
    vectors, splits = scored
    few = vectors | {'pca': vectors['pca'][:4]}
    assert score_table('', '', few, splits)['dim'].tolist() == [80, 3]
    assert score_table('', '', few, splits, dims=(2, 4, 8, 64))['dim'].tolist() == [2, 3]
    assert score_table('', '', vectors, splits, dims=(64,), projection=fit_pca(few['pca'], 3))['dim'].tolist() == [3]
    assert scores_by_domain(few, splits)['mp5'].between(0, 1).all()


def test_scores_by_domain_average_what_was_judged(scored):
    vectors, splits = scored
    query, index = (l2_normalise(fit_pca(vectors['pca'], 8)(vectors[name])) for name in ('query', 'index'))
    precisions = precision_at_5(query, splits['query']['label'], index, splits['index']['label'])
    domains = splits['query']['domain']
    table = scores_by_domain(vectors, splits, 8)
    assert table.columns.tolist() == ['domain', 'mp5', 'low', 'high', 'queries', 'left_out']
    assert table['domain'].tolist() == ['few', 'many'] and table['left_out'].sum() == 1
    for row in table.itertuples():
        judged = precisions[(domains == row.domain) & ~np.isnan(precisions)]
        assert row.mp5 == pytest.approx(judged.mean()) and row.queries == len(judged)
        here = domains == row.domain
        assert (row.low, row.high) == pytest.approx(slow_interval(precisions[here], splits['query']['label'][here]))
    splits['query']['domain'] = splits['query']['label'].astype(str)  # a domain of one object
    assert scores_by_domain(vectors, splits, 8)[['low', 'high']].isna().all(axis=None)


def test_gains_are_paired_bootstraps_of_two_models_at_a_width(scored):
    vectors, splits = scored
    projections = {'pca': fit_pca(vectors['pca'], 4), 'random': random_projection(80, 4)}
    table = gain_table([('random', 'pca')], dict.fromkeys(projections, vectors), splits, 4, projections)
    assert table.columns.tolist() == ['model', 'against', 'gain', 'low', 'high']
    scores = {name: score_table('', '', vectors, splits, dims=(4,), projection=one)['mp5'].iloc[0]
              for name, one in projections.items()}
    (model, against, gain, low, high), = table.itertuples(index=False, name=None)
    assert (model, against) == ('pca', 'random') and gain == pytest.approx(scores['pca'] - scores['random'])
    assert low <= gain <= high


def test_scores_are_saved_as_a_csv_or_as_scores_csv_of_a_folder(tmp_path):
    table = pd.DataFrame({'stage': ['soup'], 'mp5': [.5]})
    for path, file in ((tmp_path / 'mine.csv', 'mine.csv'), (tmp_path, 'scores.csv')):
        save_scores(table, path)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / file), table)


def test_the_file_of_scores_has_the_same_columns_whatever_the_table_shows(scored, tmp_path):
    table = score_table('soup', 'mine', *scored, dims=(None, 3), seconds=2.)
    save_scores(table[['low', 'seconds', 'mp5', 'high', 'dim', 'model', 'stage']], tmp_path)
    assert (tmp_path / 'scores.csv').read_text().splitlines()[0] == 'stage,model,dim,mp5,seconds'
    assert pd.read_csv(tmp_path / 'scores.csv').to_dict('records') == [
        {'stage': 'soup', 'model': 'mine', 'dim': row.dim, 'mp5': row.mp5, 'seconds': 2} for row in table.itertuples()]
