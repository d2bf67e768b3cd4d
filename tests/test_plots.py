"""Every figure shows what it is given."""

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
