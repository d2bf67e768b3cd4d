"""Comparison: differences are those of the files, paired and counted; what cannot be compared is one sentence."""
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from runs import CONFIG, is_one_sentence, new_model

from guie import comparison
from guie.checkpoints import save_run
from guie.comparison import compare, most_changed
from guie.scores import intervals, paired_bootstrap

LABELS = ['cat', 'cat', 'dog', 'dog', 'owl', 'owl']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for number in range(12):
        Image.new('RGB', (40, 40), (20 * number, 90, 90)).save(folder / f'{number}.png')
    return folder


def write_run(folder, images, right, *, config=CONFIG, queries=range(6), image_root=None):
    """A run whose query i has right[i] right images first, of two in the index; its other neighbours are of 'other'."""
    save_run(folder, new_model(config), config)
    rows = []
    for i in queries:
        row = {'path': f'{image_root or images}/{i}.png', 'label': LABELS[i], 'domain': 'pets',
               'precision': '' if right[i] is None else right[i] / 2, 'relevant': 0 if right[i] is None else 2}
        for rank in range(1, 6):
            hit = right[i] is not None and rank <= right[i]
            row |= {f'path_{rank}': f'{images}/{6 + rank}.png', f'label_{rank}': LABELS[i] if hit else 'other',
                    f'distance_{rank}': rank / 10}
        rows.append(row)
    pd.DataFrame(rows).to_csv(folder / 'queries.csv', index=False)
    return folder


@pytest.fixture
def pair(tmp_path, images):
    """Runs a and b: query 0 improves most, 3 gets worse, the last is not judged."""
    first = write_run(tmp_path / 'a', images, [0, 1, 1, 2, 0, None])
    second = write_run(tmp_path / 'b', images, [2, 2, 1, 1, 0, None], config=CONFIG.override(seed=9, augmentation='flip'))
    return first, second


@pytest.fixture
def texts(monkeypatch):
    """Figures stay open, as the list of their texts."""
    plt.close('all')
    yield lambda: [text.get_text() for axis in plt.gcf().axes for text in [*axis.artists, *axis.texts]]
    plt.close('all')


def test_scores_and_their_difference_are_those_of_the_queries(pair):
    found = compare(*pair)
    first, second = np.array([0, .5, .5, 1, 0, np.nan]), np.array([1, 1, .5, .5, 0, np.nan])
    assert found.scores['run'].tolist() == ['a', 'b', 'difference over 5 queries']
    assert found.scores['mp5'].tolist() == pytest.approx([.4, .6, .2])
    ends = found.scores[['low', 'high']].to_numpy()
    assert np.allclose(ends[:2], intervals([first, second], LABELS))
    assert tuple(ends[2]) == pytest.approx(paired_bootstrap(first, second, LABELS)[1:])
    assert found.counts() == '2 queries better, 1 worse, 2 the same; 1 are not judged'
    assert found.queries['change'].tolist()[:5] == [1, .5, 0, 0, -.5] and np.isnan(found.queries['change'].iloc[5])
    assert found.queries.columns.tolist() == ['path', 'label', 'domain', 'a', 'b', 'change']


def test_only_settings_that_differ_are_listed(pair):
    assert compare(*pair).settings.values.tolist() == [['augmentation', 'none', 'flip'], ['seed', '5', '9']]


def test_it_reads_as_text_and_as_html(pair):
    found = compare(*pair)
    for shown in (repr(found), found._repr_html_()):
        assert '+0.200' in shown and '0.400' in shown and '2 queries better' in shown and 'augmentation' in shown


def test_the_queries_that_changed_most_are_drawn_with_the_neighbours_of_both(pair, texts):
    compare(*pair, queries=2)
    words = texts()
    assert words.count('a') == words.count('b') == 2  # a row a run for each query
    assert words.count('cat · 0.10') == 1 and words.count('cat · 0.20') == 1  # query 0, found by b alone
    frames = [axis.spines['top'].get_edgecolor() for axis in plt.gcf().axes if axis.images]
    colour = {name: plt.matplotlib.colors.to_rgba(name) for name in (comparison.RIGHT, comparison.WRONG, comparison.NO_MORE)}
    # query 0 in a: two wrong ones, three beyond what the index has; in b two right ones first
    assert frames[1:6] == [colour[comparison.WRONG]] * 2 + [colour[comparison.NO_MORE]] * 3
    assert frames[6:11] == [colour[comparison.RIGHT]] * 2 + [colour[comparison.NO_MORE]] * 3


@pytest.mark.parametrize('changes, most, expected', [
    ([3, 2, 1, 0, -1, -2], 4, [0, 1, 5, 4]), ([3, 2, 1, 0, 0, -2], 4, [0, 1, 2, 5]),
    ([0, -1, -2, -3, -4, -5], 4, [5, 4, 3, 2]),
    ([3, 2, 1, 0, 0, 0], 2, [0, 1]), ([0] * 6, 4, []), ([np.nan] * 6, 4, [])])
def test_half_of_the_queries_shown_got_better_and_half_worse(changes, most, expected):
    assert most_changed(pd.DataFrame({'change': changes}), most) == expected


def test_runs_of_different_queries_are_compared_on_what_they_share(tmp_path, images, capsys):
    first = write_run(tmp_path / 'a', images, [0, 0, 0, 2, 1, 1], queries=[0, 1, 2, 3])
    second = write_run(tmp_path / 'b', images, [2, 2, 2, 2, 2, 2], queries=[2, 3, 4, 5])
    found = compare(first, second)
    assert found.scores['mp5'].tolist() == [.5, 1, .5] and len(found.queries) == 2
    assert '2 of the 4 queries of a are not among those of the other run: left out' in capsys.readouterr().out


def test_runs_whose_data_lay_elsewhere_are_compared_by_label_and_file_name(tmp_path, images):
    first = write_run(tmp_path / 'a', images, [0] * 6)
    second = write_run(tmp_path / 'b', images, [2] * 6, image_root='/kaggle/input/elsewhere')
    assert compare(first, second).scores['mp5'].tolist() == [0, 1, 1]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path, images):
    runs = [write_run(tmp_path / parent / 'vit', images, [right] * 6) for parent, right in (('old', 0), ('new', 2))]
    assert compare(*runs).scores['run'].tolist()[:2] == ['old/vit', 'new/vit']
    runs = [write_run(tmp_path / parent / 'pets/vit', images, [right] * 6) for parent, right in (('old', 0), ('new', 2))]
    assert compare(*runs).queries.columns.tolist() == ['path', 'label', 'domain', 'old/pets/vit', 'new/pets/vit', 'change']
    assert compare(runs[0], runs[0]).scores['run'].tolist()[:2] == ['vit (a)', 'vit (b)']


def test_equal_runs_have_nothing_to_show(tmp_path, images, capsys):
    run = write_run(tmp_path / 'a', images, [1] * 6)
    found = compare(run, write_run(tmp_path / 'b', images, [1] * 6))
    assert 'No query changed' in capsys.readouterr().out and found.settings.empty and '0.000' in repr(found)


def test_what_cannot_be_compared_is_one_sentence(tmp_path, images, pair):
    other = write_run(tmp_path / 'c', images, [1] * 6, image_root='/elsewhere', queries=[0])
    table = pd.read_csv(other / 'queries.csv').assign(label='fox')
    table.to_csv(other / 'queries.csv', index=False)
    with pytest.raises(ValueError, match='a and c share no query') as error:
        compare(pair[0], other)
    assert is_one_sentence(error)
    (other / 'queries.csv').unlink()
    with pytest.raises(FileNotFoundError, match='has no queries.csv') as error:
        compare(pair[0], other)
    assert is_one_sentence(error)
