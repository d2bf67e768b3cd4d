"""Every figure shows what it is given."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from guie import plots
from guie.checkpoints import Checkpoint, open_checkpoint, save_state
from guie.config import Config
from guie.images import ImageDataset, read_image
from guie.losses import adaptive_margins


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


def shown(axis):
    """The image that an axis shows."""
    return np.asarray(axis.get_images()[0].get_array())


def is_shown(axis, paths):
    return any(np.array_equal(shown(axis), read_image(path, 32)) for path in paths)


def frames_of(axes):
    """The colours that images are framed in."""
    return [axis.spines['top'].get_edgecolor() for axis in axes]


def points(line):
    return line.get_xydata()


def test_augmentations_are_those_of_training_below_the_images_as_read(train):
    plots.show_augmentation(train, 32, 'autoaugment', count=3, seed=7)
    rows = np.array(plt.gcf().axes).reshape(4, 3)
    plain, augmented = ImageDataset(train, 32), ImageDataset(train, 32, 'autoaugment', seed=7)
    picked = np.random.default_rng(7).choice(len(train), 3, replace=False)
    for column, i in enumerate(picked):
        for axis, item in zip(rows[:, column], [plain[i], *(augmented[epoch, i] for epoch in range(3))]):
            assert np.array_equal(shown(axis), item['image'].permute(1, 2, 0))
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ['as read', 'epoch 0', 'epoch 1', 'epoch 2']


def test_margins_stand_against_the_images_of_their_class():
    labels = ['a'] * 4 + ['b'] * 9 + ['c'] * 4 + ['d'] * 25
    plots.plot_margins(Config(margin_min=.1, margin_width=.2), labels)
    left, right = plt.gcf().axes
    counts = np.array([4, 4, 9, 25])
    assert np.allclose(points(left.lines[0]), np.stack([counts, adaptive_margins(counts, low=.1, width=.2)], 1))
    assert [bar.get_height() for bar in right.patches if bar.get_height()] == [2, 1, 1]


def test_logs_are_overlaid_and_a_run_without_one_is_left_out(tmp_path, capsys):
    for name in ('first', 'second', 'bare'):
        (tmp_path / name).mkdir()
    for name, loss in (('first', 2), ('second', 3)):
        pd.DataFrame({'step': [1, 2], 'loss': [loss, loss], 'lr': [.1, .2]}).to_csv(tmp_path / name / 'log.csv')
    second = Checkpoint({}, {}, tmp_path / 'second' / 'model.safetensors')
    plots.plot_logs([tmp_path / 'first', str(tmp_path / 'bare'), second])
    losses, rates = plt.gcf().axes
    assert {line.get_label(): line.get_ydata().tolist() for line in losses.lines} == {'first': [2, 2], 'second': [3, 3]}
    assert [line.get_ydata().tolist() for line in rates.lines] == [[.1, .2]] * 2
    plots.plot_logs([tmp_path / 'bare'])
    assert 'no run has a log to draw' in capsys.readouterr().out and len(plt.get_fignums()) == 1


@pytest.fixture
def circle(train):
    """12 images of 12 objects as queries and 4 others of each as index; vectors on a circle, objects side by side, but the
    images of the last object among those of the first."""
    place = {label: number for number, label in enumerate(train['label'].unique())}
    query = train.groupby('label', sort=False).head(1).reset_index(drop=True)
    index = train.groupby('label', sort=False).tail(5).reset_index(drop=True)

    def vectors(frame):
        angle = frame['label'].map(place) % (len(place) - 1) / 2 + frame.groupby('label').cumcount() / 100
        return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)

    return {'query': query, 'index': index}, {'query': vectors(query), 'index': vectors(index)}


def test_neighbours_are_framed_by_whether_they_show_the_object_half_of_them_rows_with_an_error(circle):
    splits, vectors = circle
    plots.show_neighbours(splits, vectors, size=32, rows=3)
    rows = np.array(plt.gcf().axes).reshape(3, 6)
    assert [axis.get_title() for axis in rows[0]] == ['query', *'12345']
    right, wrong = to_rgba('tab:green'), to_rgba('tab:red')
    found = [{right, wrong} & set(frames_of(row[1:])) for row in rows]
    assert found[0] == {right} and all(wrong in colours for colours in found[1:])
    for row in rows:
        label, = (query.label for query in splits['query'].itertuples() if is_shown(row[0], [query.path]))
        own = splits['index']['path'][splits['index']['label'] == label]
        assert [colour == right for colour in frames_of(row[1:])] == [is_shown(axis, own) for axis in row[1:]]


@pytest.mark.parametrize('content', [None, b'', b'\xff\xd8\xff', b'no image'], ids=['absent', 'empty', 'torn', 'text'])
def test_an_unreadable_image_is_a_marked_black_one_and_named_once(circle, tmp_path, content, capsys):
    splits, vectors = circle
    bad = str(tmp_path / 'bad.jpg')
    if content is not None:
        Path(bad).write_bytes(content)
    first = splits['index']['label'] == splits['query']['label'].iloc[0]
    splits['index'] = splits['index'].assign(path=splits['index']['path'].mask(first, bad))
    splits['query'] = splits['query'].assign(path=[bad, *splits['query']['path'].iloc[1:]])
    plots.show_neighbours(splits, vectors, size=32, rows=12)
    marked = [axis for axis in plt.gcf().axes if axis.texts]
    assert len(marked) >= 6 and all(not shown(axis).any() for axis in marked)
    assert all(shown(axis).any() for axis in plt.gcf().axes if not axis.texts)
    said = f'1 images of this figure could not be read, first {bad}; they are shown black, with a cross.\n'
    assert capsys.readouterr().out == said
    plots.show_augmentation(splits['query'], 32, 'flip', count=12)
    assert [bool(axis.texts) for axis in plt.gcf().axes].count(True) == 4 and capsys.readouterr().out == said


def test_a_figure_of_unreadable_images_alone_is_one_sentence(circle):
    splits, vectors = circle
    gone = {part: frame.assign(path=[f'/none/{part}{i}.jpg' for i in range(len(frame))]) for part, frame in splits.items()}
    for draw in (lambda: plots.show_neighbours(gone, vectors, size=32),
                 lambda: plots.show_augmentation(gone['query'], 32, 'flip')):
        with pytest.raises(OSError, match='^None of the .* images of this figure can be read, first /none/') as error:
            draw()
        assert '\n' not in str(error.value) and not plt.get_fignums()


def test_with_fewer_than_five_index_images_all_of_them_are_shown(circle):
    splits, vectors = circle
    few = splits | {'index': splits['index'].head(3)}, vectors | {'index': vectors['index'][:3]}
    plots.show_neighbours(*few, size=32, rows=2)
    assert [axis.get_title() for axis in plt.gcf().axes] == ['query', '1', '2', '3'] + [''] * 4
    itself = {part: splits['index'].head(3) for part in splits}, {part: vectors['index'][:3] for part in splits}
    plots.show_neighbours(*itself, exclude_self=True, size=32, rows=3)
    for query, *others in np.array(plt.gcf().axes).reshape(3, 3):
        assert not any(np.array_equal(shown(axis), shown(query)) for axis in others)


def test_neighbours_are_those_of_projected_vectors(circle):
    splits, vectors = circle
    wide = {part: np.pad(rows, ((0, 0), (0, 1)), constant_values=9) for part, rows in vectors.items()}
    wide['index'][::2, 2] = 1
    plots.show_neighbours(splits, vectors, size=32)
    plots.show_neighbours(splits, wide, lambda rows: rows[:, :2] * rows[:, 2:], size=32)  # brought to length 1 afterwards
    first, second = (plt.figure(number).axes for number in (1, 2))
    assert all(np.array_equal(shown(a), shown(b)) for a, b in zip(first, second, strict=True))


def test_dimensions_are_the_ticks_of_their_curves():
    curves = {'one': pd.DataFrame({'dim': [2, 8], 'mp5': [.1, .4]}), 'other': pd.DataFrame({'dim': [4, 8], 'mp5': [.2, .3]})}
    plots.plot_dimensions(curves)
    axis = plt.gca()
    assert [label.get_text() for label in axis.get_xticklabels()] == ['2', '4', '8']
    assert [points(line).tolist() for line in axis.lines] == [[[2, .1], [8, .4]], [[4, .2], [8, .3]]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ['one', 'other']


def test_the_variance_of_some_dimensions_is_named():
    rows = np.array([[3., 0, 0], [-3, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]]) + 7
    plots.plot_variance(rows, 2)
    assert np.allclose(plt.gca().lines[0].get_ydata(), [9 / 14, 13 / 14, 1])
    assert plt.gca().get_title() == '2 dimensions hold 93%'


def test_scores_are_bars_coloured_by_stage():
    scores = pd.DataFrame({'model': ['a', 'b'], 'stage': ['ingredient', 'soup'], 'mp5': [.25, .5]})
    plots.plot_scores(scores)
    bars = plt.gca().patches
    assert [bar.get_width() for bar in bars] == [.25, .5]
    assert [bar.get_facecolor() for bar in bars] == [to_rgba('tab:blue'), to_rgba('tab:orange')]
    assert [text.get_text() for text in plt.gca().texts] == ['0.250', '0.500']


def test_a_basin_shows_the_cosines_of_each_tower_and_a_line_where_two_ingredients_are(tmp_path):
    base, changes = {'tower.weight': torch.zeros(2)}, {'h_none': [1., 0.], 'h_flip': [1., 1.], 'l_none': [0., 2.]}
    for name, change in changes.items():
        save_state({'tower.weight': torch.tensor(change)}, tmp_path / name / 'model.safetensors')
    ingredients = {tower: [open_checkpoint(tmp_path / name) for name in changes if name.startswith(tower)] for tower in 'hl'}

    class Embedder:
        def score(self, state):
            return state['tower.weight'][1]

    plots.plot_basin(ingredients, {'h': base, 'l': base}, {'h': Embedder(), 'l': Embedder()})
    h, l_only, line = plt.gcf().axes
    assert [text.get_text() for text in h.texts] == ['1.00', '0.71', '0.71', '1.00'] and len(l_only.texts) == 1
    assert [label.get_text() for label in h.get_xticklabels()] == ['none', 'flip'] and h.get_title() == 'h: cosines'
    assert [(curve.get_label(), curve.get_ydata().tolist()) for curve in line.lines] == [('h', [0, .25, .5, .75, 1])]


def test_wise_ft_has_a_star_where_the_selection_objects_choose(capsys):
    curve = pd.DataFrame({'alpha': [0, .5, 1], 'selection': [.2, .9, .3], 'seen': [.1, .6, .7], 'never seen': [.4, .5, .3]})
    plots.plot_wise({'h': curve})
    axis = plt.gca()
    assert points(axis.lines[0]).tolist() == [[.1, .4], [.6, .5], [.7, .3]] and points(axis.lines[1]).tolist() == [[.6, .5]]
    assert axis.get_legend().get_texts()[0].get_text() == 'chosen: alpha 0.5'
    assert [text.get_text() for text in axis.texts] == ['0', '0.5', '1']
    plots.plot_wise({})
    assert 'no pretrained tower' in capsys.readouterr().out and len(plt.get_fignums()) == 1
