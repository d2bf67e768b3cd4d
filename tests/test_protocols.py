"""Protocols: metrics by hand, and whole benchmarks against a slow search through the colours of their miniatures."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_scores import slow_interval

from guie import protocols
from guie.checkpoints import save_run
from guie.errors import InputError, MissingError
from guie.model import Ensemble
from guie.protocols import (
    PROTOCOLS,
    average_precision_at_k,
    evaluate_benchmark,
    neighbours,
    precision_at_k,
    recall_at_k,
    trapezoid_precision,
)
from guie.testsets import TEST_SETS, read_test_set
from tests import miniatures
from tests.miniatures import BUILDERS, colour, colour_model
from tests.runs import CONFIG, is_one_sentence, new_model, small_model


def test_a_query_counts_for_recall_if_one_of_the_k_nearest_is_right():
    ranks = np.array([3, 7])
    assert [recall_at_k(ranks, 2, k) for k in (1, 3, 4, 8)] == [0, 0, 1, 1]
    assert recall_at_k(np.array([], int), 2, 1000) == 0


def test_precision_at_5_judges_as_many_as_there_are():
    assert precision_at_k(np.array([0, 2, 4]), 3, 5) == pytest.approx(2 / 3)
    assert precision_at_k(np.array([0, 2, 4]), 9, 5) == pytest.approx(3 / 5)
    assert precision_at_k(np.array([], int), 1, 5) == 0


def test_average_precision_at_100_ends_at_100_and_divides_by_at_most_100():
    assert average_precision_at_k(np.array([0, 2]), 3, 100) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision_at_k(np.array([99, 100]), 2, 100) == pytest.approx(1 / 100 / 2)
    assert average_precision_at_k(np.arange(100), 250, 100) == pytest.approx(1)


def test_trapezoids_lie_between_the_precisions_before_and_at_each_relevant_image():
    assert trapezoid_precision(np.array([0]), 1) == 1
    assert trapezoid_precision(np.array([1]), 1) == pytest.approx((0 + 1 / 2) / 2)
    assert trapezoid_precision(np.array([0, 2]), 2) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert trapezoid_precision(np.array([0, 1, 2]), 3) == pytest.approx(1)


def order_of(query, index, itself=None):
    """Rows of the index by the angle between colours, without the query's own."""
    return sorted((row for row in range(len(index)) if row != itself), key=lambda row: -float(query @ index[row]))


def slow_score(metric, order, relevant, ignored):
    """A query's score from the whole order, in plain Python."""
    order = [row for row in order if row not in ignored]
    right = [row in relevant for row in order]
    kind, _, k = metric.partition('@')
    if kind == 'Recall':
        return float(any(right[:int(k)]))
    if kind == 'mP':
        judged = min(len(relevant), int(k))
        return sum(right[:judged]) / judged
    total, hits = 0, 0
    for place, is_right in enumerate(right[:int(k)] if k else right):
        if is_right:
            before = hits / place if place else 1
            hits += 1
            total += hits / (place + 1) if k else (before + hits / (place + 1)) / 2
    return total / (min(len(relevant), int(k)) if k else len(relevant))


@pytest.mark.parametrize('name', PROTOCOLS)
def test_each_benchmark_agrees_with_a_slow_search(tmp_path, name, capsys):
    BUILDERS[name](tmp_path)
    result = evaluate_benchmark(name, colour_model(), tmp_path)
    benchmark = read_test_set(name, tmp_path)
    index = [colour(path) for path in benchmark.index['path']]
    boxes = benchmark.boxes or [None] * len(benchmark.queries)
    orders = [order_of(colour(path, box), index, place if benchmark.query is None else None)
              for place, (path, box) in enumerate(zip(benchmark.queries['path'], boxes))]
    labels, expected = benchmark.queries['label'].tolist(), []
    for setting, pairs in benchmark.truth.items():
        for metric in PROTOCOLS[name][0]:
            scores = [slow_score(metric, order, [*relevant], {*ignored}) if len(relevant) else math.nan
                      for order, (relevant, ignored) in zip(orders, pairs)]
            judged = np.array(scores)[~np.isnan(scores)]
            expected.append((f'{metric} {setting}'.strip(), judged.mean(), *slow_interval(scores, labels), len(judged)))
    assert result['metric'].tolist() == [row[0] for row in expected]
    assert np.allclose(result[['value', 'low', 'high', 'queries']], np.array([row[1:] for row in expected], float),
                       equal_nan=True)
    assert (result['protocol'] == name).all() and (result['index_images'] == len(index)).all()
    assert result['value'].between(0, 1).all() and result['value'].between(0, 1, 'neither').any()
    assert 'black square' not in capsys.readouterr().out


def test_the_metrics_of_each_benchmark_are_its_own(tmp_path):
    assert [*PROTOCOLS] == [*TEST_SETS] == [*BUILDERS]
    for name, metrics in {'stanford-online-products': ['Recall@1', 'Recall@10', 'Recall@100', 'Recall@1000'],
                          'google-landmarks-v2': ['mAP@100 private', 'mAP@100 public'],
                          'roxford5k': ['mAP medium', 'mAP hard']}.items():
        BUILDERS[name](tmp_path / name)
        assert evaluate_benchmark(name, colour_model(), tmp_path / name)['metric'].tolist() == metrics


def test_a_name_may_have_blanks_and_an_unknown_one_is_one_sentence(tmp_path):
    miniatures.met(tmp_path)
    assert evaluate_benchmark('Met', colour_model(), tmp_path)['protocol'].iloc[0] == 'met'
    with pytest.raises(InputError, match=r'Did you mean roxford5k') as error:
        evaluate_benchmark('roxford', colour_model(), tmp_path)
    assert 'cub-200' in str(error.value)
    with pytest.raises(MissingError) as error:
        evaluate_benchmark('CUB_200', colour_model(), tmp_path)
    assert is_one_sentence(error)


def test_vectors_are_kept_in_a_folder_and_used_again(tmp_path, monkeypatch):
    miniatures.oxford(tmp_path)
    first = evaluate_benchmark('roxford5k', colour_model(), tmp_path, folder=tmp_path / 'kept')
    kept = sorted(str(path.relative_to(tmp_path / 'kept')) for path in (tmp_path / 'kept').rglob('*.*'))
    assert kept == ['roxford5k/index.npz', *(f'roxford5k/queries/{n}.png' for n in range(3)), 'roxford5k/query.npz']
    monkeypatch.setattr('guie.embedding.loader', lambda *_, **__: pytest.fail('images were embedded'))
    assert evaluate_benchmark('roxford5k', colour_model(), tmp_path, folder=str(tmp_path / 'kept')).equals(first)


def test_nothing_is_left_behind_without_a_folder(tmp_path):
    miniatures.oxford(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    evaluate_benchmark('roxford5k', colour_model(), tmp_path)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_query_is_what_its_box_cuts_out(tmp_path):
    _, boxes = miniatures.oxford(tmp_path)
    benchmark = read_test_set('roxford5k', tmp_path)
    for path, whole, box in zip(protocols.cropped(benchmark, tmp_path / 'q')['path'], benchmark.query['path'], boxes):
        with Image.open(path) as part, Image.open(whole) as image:
            assert np.array_equal(part, np.asarray(image)[:, int(box[0]):int(box[2])])


def test_unreadable_images_are_counted_as_in_embed(tmp_path, capsys):
    miniatures.oxford(tmp_path)
    for name in ('all_souls_000013', 'all_souls_000001'):
        (tmp_path / f'roxford5k/jpg/{name}.jpg').write_bytes(b'damaged')
    model = small_model()  # a colour has no direction in a black image
    result = evaluate_benchmark('roxford5k', model, tmp_path)
    assert result['queries'].tolist() == [3, 2]
    printed = capsys.readouterr().out
    assert printed.count('1 images could not be read') == 2 and 'all_souls_000013.jpg' in printed


def test_a_query_without_an_image_of_its_class_is_left_out_and_printed(tmp_path, capsys):
    miniatures.products(tmp_path)
    file = tmp_path / 'test_kaggletest.csv'
    file.write_text(file.read_text().replace('5.jpg,1', '5.jpg,77'))
    result = evaluate_benchmark('products-10k', colour_model(), tmp_path)
    assert result['queries'].tolist() == [5, 5]
    assert '1 of 6 queries have no image of their object in the index: left out' in capsys.readouterr().out
    file.write_text('name,class,Usage\n0.jpg,78,Public\n')
    with pytest.raises(InputError, match='no query has an image of its object') as error:
        evaluate_benchmark('products-10k', colour_model(), tmp_path)
    assert is_one_sentence(error)


def test_a_run_is_named_by_its_path_and_an_ensemble_joins_its_members(tmp_path):
    miniatures.met(tmp_path / 'met')
    model = new_model().eval()
    save_run(tmp_path / 'run', model, CONFIG)
    expected = evaluate_benchmark('met', model, tmp_path / 'met')
    assert evaluate_benchmark('met', str(tmp_path / 'run'), tmp_path / 'met').equals(expected)
    pair = Ensemble([colour_model(), colour_model()]).eval()
    assert evaluate_benchmark('met', pair, tmp_path / 'met', folder=tmp_path / 'kept').equals(
        evaluate_benchmark('met', colour_model(), tmp_path / 'met'))
    assert (tmp_path / 'kept/met/member-2/query.npz').exists()


@pytest.mark.parametrize('alone', [False, True])
def test_neighbours_are_the_same_however_few_are_held_at_a_time(alone):
    vectors = torch.nn.functional.normalize(torch.randn(23, 4, generator=torch.Generator().manual_seed(0))).numpy()
    whole = np.stack([*neighbours(vectors, vectors, None, alone)])
    assert whole.shape == (23, 23 - alone) and (whole[:, 0] == np.arange(23)).all() != alone
    assert np.array_equal(np.stack([*neighbours(vectors, vectors, None, alone, most=1)]), whole)
    assert np.array_equal(np.stack([*neighbours(vectors, vectors, 7, alone, most=200)]), whole[:, :7])
