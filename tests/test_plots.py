"""Every figure shows what it is given."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from guie import plots
from guie.checkpoints import Checkpoint, open_checkpoint, save_state
from guie.config import Config
from guie.losses import adaptive_margins


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


def points(line):
    return line.get_xydata()


def intervals(axis):
    """Ends of the lines that are drawn from low to high."""
    return [segment.tolist() for lines in axis.collections for segment in lines.get_segments()]


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def box(artist):
    return artist.get_window_extent()


NAMES = [f'vit_h_224_{number}_' + 'products-10k_landmark-recognition-2020_' * 2 for number in range(9)]
FORMULA = r'_$\frac$_100'  # as a formula it could not be drawn


def assert_legend_below_all(names):
    """The legend tells all names, inside the figure and under all axes with their labels."""
    figure = plt.gcf()
    figure.draw_without_rendering()
    legend, = figure.legends
    assert [text.replace('\n', '').replace('\\$', '$').strip() for text in texts(legend)] == names
    assert box(legend).y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes)
    assert box(legend).y0 >= 0 and 0 <= box(legend).x0 < box(legend).x1 <= figure.bbox.x1
    assert min(box(axis).height for axis in figure.axes) > 120  # points of 100 to the inch


def test_margins_stand_against_the_images_of_their_class():
    labels = ['a'] * 4 + ['b'] * 9 + ['c'] * 4 + ['d'] * 25
    plots.plot_margins(Config(margin_min=.1, margin_width=.2), labels)
    left, right = plt.gcf().axes
    counts = np.array([4, 4, 9, 25])
    assert np.allclose(points(left.lines[0]), np.stack([counts, adaptive_margins(counts, low=.1, width=.2)], 1))
    assert [bar.get_height() for bar in right.patches if bar.get_height()] == [2, 1, 1]


def test_classes_of_one_size_have_the_middle_margin_and_one_bar_at_their_size():
    plots.plot_margins(Config(), np.repeat(np.arange(50), 7))
    left, right = plt.gcf().axes
    assert np.allclose(points(left.lines[0]), [[7, .275]] * 50) and left.get_ylim()[1] > .28
    bar, = right.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (6.5, 1, 50)
    assert all(tick == int(tick) for axis in (left, right) for tick in axis.get_xticks())


@pytest.mark.parametrize('counts', [[4, 1000], [4, 4], np.random.default_rng(0).integers(4, 500, 2000)])
def test_every_class_is_in_one_bar_of_as_many_whole_numbers_as_the_next(counts):
    plots.plot_margins(Config(), np.repeat(np.arange(len(counts)), counts))
    bars = plt.gcf().axes[1].patches
    assert sum(bar.get_height() for bar in bars) == len(counts) and len(bars) <= 31
    for bar in bars:
        first, last = bar.get_x() + .5, bar.get_x() + bar.get_width() - .5
        assert first == int(first) and bar.get_width() == bars[0].get_width()
        assert bar.get_height() == np.sum((np.array(counts) >= first) & (np.array(counts) <= last))


def test_logs_are_overlaid_and_a_run_without_one_is_left_out(tmp_path, capsys):
    for name in ('first', 'second', 'bare'):
        (tmp_path / name).mkdir()
    for name, loss in (('first', 2), ('second', 3)):
        pd.DataFrame({'step': [1, 2], 'loss': [loss, loss], 'lr': [.1, .2]}).to_csv(tmp_path / name / 'log.csv')
    second = Checkpoint({}, {}, tmp_path / 'second' / 'model.safetensors')
    plots.plot_logs([tmp_path / 'first', str(tmp_path / 'bare'), second])
    losses, rates = plt.gcf().axes
    assert [line.get_ydata().tolist() for line in losses.lines] == [[2, 2], [3, 3]]
    assert texts(plt.gcf().legends[0]) == ['first', 'second'] and losses.get_xscale() == 'linear'
    assert [line.get_ydata().tolist() for line in rates.lines] == [[.1, .2]] * 2
    plots.plot_logs([tmp_path / 'bare'])
    assert 'no run has a log to draw' in capsys.readouterr().out and len(plt.get_fignums()) == 1


def write_log(folder, steps, scored=()):
    folder.mkdir(parents=True)
    log = pd.DataFrame({'step': np.arange(1, steps + 1), 'loss': 2., 'lr': .1})
    if scored:
        log['selection'] = log['step'].map(dict(scored))
    log.to_csv(folder / 'log.csv', index=False)
    return folder


def test_selection_scores_have_a_panel_where_a_run_has_them(tmp_path):
    runs = [write_log(tmp_path / 'a/run', 9, [(4, .3), (8, .5)]), write_log(tmp_path / 'b/run', 9)]  # of one name
    plots.plot_logs(runs)
    losses, rates, selection = plt.gcf().axes
    assert [points(line).tolist() for line in selection.lines] == [[[4, .3], [8, .5]], []]
    assert selection.lines[0].get_color() == losses.lines[0].get_color() and len(losses.lines) == len(rates.lines) == 2
    assert texts(plt.gcf().legends[0]) == ['run', 'run']
    pd.read_csv(runs[1] / 'log.csv').assign(selection=np.nan).to_csv(runs[1] / 'log.csv', index=False)  # never scored
    plots.plot_logs(runs[1:])
    assert len(plt.gcf().axes) == 2


def test_runs_of_very_different_lengths_are_all_seen(tmp_path):
    plots.plot_logs([write_log(tmp_path / 'stage', 8, [(8, .3)]), write_log(tmp_path / 'run', 5000)])
    plt.gcf().draw_without_rendering()
    for axis in plt.gcf().axes[:2]:
        short, long = (axis.transData.transform(points(line))[:, 0] for line in axis.lines)
        assert np.ptp(short) > .2 * np.ptp(long)
    assert plt.gcf().axes[0].lines[0].get_marker() == '.'  # or one step would be no line


def test_nine_runs_with_long_names_and_dollars_have_a_legend_below(tmp_path):
    names = [FORMULA, *NAMES]
    plots.plot_logs([write_log(tmp_path / name, 3, [(3, .5)]) for name in names])
    assert_legend_below_all(names)
    frame = pd.DataFrame({'dim': [2, 64], 'mp5': [.1, .4]})
    plots.plot_dimensions({name: frame for name in names})
    assert_legend_below_all(names)


def test_dimensions_are_the_ticks_of_their_curves():
    curves = {'one': pd.DataFrame({'dim': [2, 8], 'mp5': [.1, .4]}), 'other': pd.DataFrame({'dim': [4, 8], 'mp5': [.2, .3]})}
    plots.plot_dimensions(curves)
    axis = plt.gca()
    assert [label.get_text() for label in axis.get_xticklabels()] == ['2', '4', '8']
    assert [points(line).tolist() for line in axis.lines] == [[[2, .1], [8, .4]], [[4, .2], [8, .3]]]
    assert texts(plt.gcf().legends[0]) == ['one', 'other'] and not axis.collections
    plots.plot_dimensions({'one': curves['one'].assign(low=[.05, .3], high=[.2, .6]), 'other': curves['other']})
    band, = plt.gca().collections
    assert {(2, .05), (2, .2), (8, .3), (8, .6)} <= {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert '95 % interval' in plt.gca().get_ylabel() and '95 %' not in axis.get_ylabel()


def test_scores_are_bars_coloured_by_stage():
    scores = pd.DataFrame({'model': ['a', 'b'], 'stage': ['ingredient', 'soup'], 'mp5': [.25, .5]})
    plots.plot_scores(scores)
    bars = plt.gca().patches
    assert [bar.get_width() for bar in bars] == [.25, .5]
    assert [bar.get_facecolor() for bar in bars] == [to_rgba('tab:blue'), to_rgba('tab:orange')]
    assert [text.get_text() for text in plt.gca().texts] == ['0.250', '0.500'] and not intervals(plt.gca())


def test_scores_stand_behind_the_line_from_low_to_high():
    scores = pd.DataFrame({'model': ['a', 'b', 'c'], 'stage': ['ingredient', 'soup', 'my own'], 'mp5': [.25, .5, .1],
                           'low': [.2, .45, np.nan], 'high': [.4, .55, np.nan]})
    plots.plot_scores(scores)
    axis = plt.gca()
    plt.gcf().draw_without_rendering()
    assert intervals(axis)[:2] == [[[.2, 0], [.4, 0]], [[.45, 1], [.55, 1]]]
    assert [text.xy for text in axis.texts] == [(.4, 0), (.55, 1), (.1, 2)]
    for text, end in zip(axis.texts, [.4, .55, .1]):
        assert box(text).x0 > axis.transData.transform((end, 0))[0] and box(text).x1 < box(axis).x1
    assert axis.get_ylim()[0] > axis.get_ylim()[1] and '95 % interval' in axis.get_xlabel()


def test_every_row_of_scores_has_a_bar_of_its_own_whatever_it_is_called():
    names = ['twice', 'twice', FORMULA, *NAMES]
    scores = pd.DataFrame({'model': names, 'stage': 'soup', 'dim': [64, 1024] + [64] * 10, 'mp5': np.arange(1, 13) / 20})
    plots.plot_scores(scores)
    axis = plt.gca()
    plt.gcf().draw_without_rendering()
    assert [bar.get_width() for bar in axis.patches] == scores['mp5'].tolist()
    labels = axis.get_yticklabels()
    assert [label.get_text() for label in labels[:2]] == ['twice, 64', 'twice, 1024']
    assert labels[3].get_text().replace('\n', '') == f'{NAMES[0]}, 64'
    assert all(box(above).y0 >= box(below).y1 for above, below in zip(labels, labels[1:]))
    assert box(axis).width > 200 and all(box(text).x1 < box(axis).x1 for text in axis.texts)


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
    assert [(curve.get_label(), curve.get_ydata().tolist()) for curve in line.lines] == [
        ('h: none to flip', [0, .25, .5, .75, 1])]


@pytest.mark.parametrize('names', [[f'h_{name}' for name in ('autoaugment', 'happywhale', *'abcdef', FORMULA)], NAMES])
def test_the_cosines_of_nine_ingredients_can_be_read(names, tmp_path):
    draws = np.random.default_rng(0).standard_normal((9, 4))
    for name, change in zip(names, draws):
        save_state({'tower.weight': torch.tensor(change)}, tmp_path / name / 'model.safetensors')
    runs = [open_checkpoint(tmp_path / name) for name in names]

    class Embedder:
        def score(self, state):
            return .5

    plots.plot_basin({'h': runs}, {'h': {'tower.weight': torch.zeros(4, dtype=torch.float64)}}, {'h': Embedder()})
    plt.gcf().draw_without_rendering()
    axis = plt.gcf().axes[0]
    cell = box(axis).width / 9
    assert len(axis.texts) == 81 and all(box(text).width < cell and box(text).height < cell for text in axis.texts)
    lengths = np.linalg.norm(draws, axis=1)
    cosines = draws @ draws.T / np.outer(lengths, lengths)
    assert [text.get_text() for text in axis.texts] == [f'{value:.2f}' for value in cosines.flat]
    beside, below = axis.get_yticklabels(), axis.get_xticklabels()
    assert all(box(one).y0 >= box(other).y1 for one, other in zip(beside, beside[1:]))
    assert all(box(one).x1 <= box(other).x0 for one, other in zip(below, below[1:]))
    assert max(box(label).x1 for label in beside) <= box(axis).x0 and min(box(label).x0 for label in beside) >= 0
    shown = [label.get_text().replace('\n', '').replace('\\$', '$').strip() for label in beside]
    if names == NAMES:
        assert shown == [f'{name}  ({number})' for number, name in enumerate(names, start=1)]
        assert [label.get_text() for label in below] == list('123456789')
    else:
        assert shown == [name.removeprefix('h_') for name in names]


def test_a_basin_has_no_empty_panel(tmp_path, capsys):
    save_state({'tower.weight': torch.ones(2)}, tmp_path / 'h_none/model.safetensors')
    runs = {'h': [open_checkpoint(tmp_path / 'h_none')]}
    plots.plot_basin(runs, {'h': {'tower.weight': torch.zeros(2)}}, {})
    assert [axis.get_title() for axis in plt.gcf().axes] == ['h: cosines']
    save_state({'tower.weight': torch.zeros(2)}, tmp_path / 'h_flip/model.safetensors')
    two = [*runs['h'], open_checkpoint(tmp_path / 'h_flip')]
    plots.plot_basin({FORMULA: two}, {}, {FORMULA: SimpleNamespace(score=lambda state: state['tower.weight'][0])})
    plt.gcf().draw_without_rendering()
    axis, = plt.gcf().axes
    assert axis.lines[0].get_ydata().tolist() == [1, .75, .5, .25, 0]
    assert texts(axis.get_legend()) == [f' {FORMULA}: h_none to h_flip'.replace('$', r'\$')]
    plots.plot_basin(runs, {}, {})
    assert 'neither two ingredients nor a pretrained tower' in capsys.readouterr().out and len(plt.get_fignums()) == 2


def test_wise_ft_has_a_star_where_the_selection_objects_choose(capsys):
    curve = pd.DataFrame({'alpha': [0, .5, 1], 'selection': [.2, .9, .3], 'seen': [.1, .6, .7], 'never seen': [.4, .5, .3]})
    plots.plot_wise({'h': curve})
    axis = plt.gca()
    assert points(axis.lines[0]).tolist() == [[.1, .4], [.6, .5], [.7, .3]] and points(axis.lines[1]).tolist() == [[.6, .5]]
    assert axis.get_legend().get_texts()[0].get_text() == 'chosen: alpha 0.5'
    assert [text.get_text() for text in axis.texts] == ['0', '0.5', '1'] and not intervals(axis)
    plots.plot_wise({FORMULA: curve.assign(low=[.3, .45, .2], high=[.5, .6, .4])})
    axis = plt.gca()
    plt.gcf().draw_without_rendering()
    assert intervals(axis) == [[[.1, .3], [.1, .5]], [[.6, .45], [.6, .6]], [[.7, .2], [.7, .4]]]
    assert points(axis.lines[0]).tolist() == [[.1, .4], [.6, .5], [.7, .3]]
    assert [text.xy for text in axis.texts] == [(.1, .4), (.6, .5), (.7, .3)]
    assert texts(axis.get_legend()) == ['95 % interval', 'chosen: alpha 0.5'] and box(axis.get_legend()).y1 < box(axis).y0
    plots.plot_wise({})
    assert 'no pretrained tower' in capsys.readouterr().out and len(plt.get_fignums()) == 2
