"""Plots: losses, margins, scores and soups as matplotlib figures."""
import math
import re

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from guie.checkpoints import Checkpoint
from guie.files import user_path
from guie.losses import adaptive_margins
from guie.soups import interpolation_scores, task_vector_cosines
from guie.tables import one_line

STAGE_COLOURS = {'untrained': 'tab:grey', 'zero-shot': 'tab:olive', 'ingredient': 'tab:blue', 'soup': 'tab:orange',
                 'ensemble': 'tab:green'}
NEVER_SEEN = 'mP@5 on never-seen objects'
SELECTION = 'mP@5 on selection objects'
SMALL = 8  # points of a legend's text


def in_figure(name, width=200):
    """A name as matplotlib can show it: lines of at most `width` characters, $ as a letter, and a blank before a leading _,
    which would keep it out of legends."""
    lines, ends = [''], '-_ ./'
    for part in re.findall(f'[^{ends}]{{1,{width - 1}}}[{ends}]?|[{ends}]', one_line(str(name))):
        if len(lines[-1]) + len(part) > width:
            lines.append('')
        lines[-1] += part
    text = '\n'.join(lines).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def longest_line(names):
    """Characters of the longest line of several names."""
    return max(len(line) for name in names for line in name.split('\n'))


def legend_below(figure, lines, names):
    """A legend under all axes of a figure, which grows by its height; the layout must be constrained."""
    letters = figure.get_figwidth() * 72 / (.55 * SMALL)  # that fit into a line
    labels = [in_figure(name, int(letters) - 8) for name in names]
    columns = max(1, min(len(labels), int(letters / (longest_line(labels) + 8))))
    rows = math.ceil(sum(1 + label.count('\n') for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + .19 * rows)
    figure.legend(lines, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize=SMALL)


def has_intervals(table):
    """Whether a table has the ends of intervals."""
    return {'low', 'high'} <= set(table.columns)


def plot_margins(config, labels):
    """The margin against a class's number of images, and how many classes have it. labels: of the training images."""
    counts = np.sort(np.unique(labels, return_counts=True)[1])
    margins = adaptive_margins(counts, low=config.margin_min, width=config.margin_width)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout='constrained')
    left.plot(counts, margins, '.')
    left.set(xlabel='images of the class', ylabel='margin (radians)', ylim=(0, 1.1 * float(margins.max())))
    step = math.ceil((np.ptp(counts) + 1) / 30)  # whole numbers a bar, the same for all
    right.hist(counts, bins=np.arange(counts[0], counts[-1] + step + 1, step) - .5)
    right.set(xlabel='images of the class', ylabel='classes')
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if counts[0] == counts[-1]:
        for axis in (left, right):
            axis.set_xlim(counts[0] - 3, counts[0] + 3)


def plot_logs(runs):
    """Loss, learning rate and, where there is one, selection score against the step, all runs together. runs: their folders,
    or Checkpoints in them. A run without a log, such as a bare checkpoint, is left out. The axis of steps is logarithmic if
    one run has 20 times as many as another."""
    folders = [run.path.parent if isinstance(run, Checkpoint) else user_path(run) for run in runs]
    logs = [(folder.name, pd.read_csv(folder / 'log.csv')) for folder in folders if (folder / 'log.csv').exists()]
    if not logs:
        return print('no run has a log to draw')
    scores = [log.dropna(subset='selection') if 'selection' in log else log[:0] for _, log in logs]
    panels = 2 + any(map(len, scores))
    figure, axes = plt.subplots(1, panels, figsize=(3.2 * panels, 2.8), layout='constrained')
    lines = []
    for (_, log), scored in zip(logs, scores):
        style = '.-' if len(log) < 10 else '-'
        lines += axes[0].plot(log['step'], log['loss'].rolling(max(1, len(log) // 20), min_periods=1).mean(), style)
        axes[1].plot(log['step'], log['lr'], style)
        if panels == 3:
            axes[2].plot(scored['step'], scored.get('selection', []), '.-')
    for axis, label in zip(axes, ('ArcFace loss (moving mean)', "the head's learning rate", SELECTION)):
        axis.set(xlabel='optimiser step', ylabel=label)
    lengths = [len(log) for _, log in logs if len(log)]
    if lengths and max(lengths) >= 20 * min(lengths):
        for axis in axes:
            axis.set_xscale('log')
    legend_below(figure, lines, [name for name, _ in logs])


def plot_dimensions(curves):
    """mP@5 against the number of dimensions. curves: {name: DataFrame dim, mp5, and low, high for a band}."""
    figure, axis = plt.subplots(figsize=(5.5, 3), layout='constrained')
    lines = []
    for curve in curves.values():
        lines += axis.plot(curve['dim'], curve['mp5'], '.-')
        if has_intervals(curve):
            axis.fill_between(curve['dim'], curve['low'], curve['high'], alpha=.15, color=lines[-1].get_color(), linewidth=0)
    dims = sorted({dim for curve in curves.values() for dim in curve['dim']})
    axis.set(xlabel='dimensions', ylim=(0, None), xscale='log',
             ylabel=NEVER_SEEN + '\n(band: 95 % interval)' * any(map(has_intervals, curves.values())))
    axis.set_xticks(dims, dims)
    axis.minorticks_off()
    legend_below(figure, lines, curves)


def plot_scores(scores):
    """A bar for each row of a score_table, coloured by stage, with a line from low to high if it has them."""
    names, places, ends = scores['model'].astype(str), np.arange(len(scores)), scores['mp5'].to_numpy()
    if names.duplicated().any() and 'dim' in scores:
        names += ', ' + scores['dim'].astype(str)
    names = [in_figure(name, 44) for name in names]
    inches = .2 + .15 * max(1 + name.count('\n') for name in names)  # of a bar
    figure, axis = plt.subplots(figsize=(7, inches * len(names) + .9), layout='constrained')
    axis.barh(places, scores['mp5'], color=[STAGE_COLOURS.get(stage, 'tab:purple') for stage in scores['stage']])
    if has_intervals(scores):
        axis.hlines(places, scores['low'], scores['high'], color='black', linewidth=1)
        ends = np.fmax(ends, scores['high'])
    for place, score, end in zip(places, scores['mp5'], ends):
        axis.annotate(f'{score:.3f}', (end, place), textcoords='offset points', xytext=(4, 0), va='center')
    axis.set_yticks(places, names, fontsize=9)
    axis.set(xlabel=NEVER_SEEN + ' (line: 95 % interval)' * has_intervals(scores), xlim=(0, 1.2 * (max(ends) or 1)),
             ylim=(len(names) - .4, -.6))


def plot_basin(ingredients, bases, embedders):
    """Cosines between the ingredients' changes of the pretrained weights, and the score along the line between two of them.
    ingredients: from find_ingredients; bases: {tower: StateEmbedder.base}; embedders: {tower: StateEmbedder}."""
    pairs = {tower: runs[:2] for tower, runs in ingredients.items() if len(runs) > 1}
    if not bases and not pairs:
        return print('neither two ingredients nor a pretrained tower to compare with')
    tables = {tower: task_vector_cosines(ingredients[tower], base) for tower, base in bases.items()}
    sides = [max(2.6, .45 * len(table)) for table in tables.values()] + [3.4] * bool(pairs)
    figure, axes = plt.subplots(1, len(sides), figsize=(sum(sides) + 1.5 * len(sides), max(sides) + 1.2), squeeze=False,
                                width_ratios=sides, layout='constrained')
    for axis, (tower, table) in zip(axes[0], tables.items()):
        draw_cosines(axis, table, tower)
    for tower, runs in pairs.items():
        line = interpolation_scores(*runs, embedders[tower].score)
        first, second = (run.name.removeprefix(f'{tower}_') for run in runs)
        axes[0, -1].plot(line['alpha'], line['score'], '.-', label=in_figure(f'{tower}: {first} to {second}', 30))
        axes[0, -1].legend(frameon=False)
        axes[0, -1].set(xlabel='between two ingredients', ylabel=SELECTION)


def draw_cosines(axis, table, tower):
    """A square table of cosines as an image with its numbers. Names lose their tower's; long ones are beside it only, with
    the numbers of their columns."""
    names = [in_figure(name.removeprefix(f'{tower}_'), 44) for name in table.columns]
    places, below, turned = range(len(names)), names, 90 if longest_line(names) > 6 else 0
    if longest_line(names) > 16:
        below, turned = [place + 1 for place in places], 0
        names = [f'{name}  ({place + 1})' for place, name in enumerate(names)]
    axis.imshow(table, vmin=0, vmax=1, cmap='viridis')
    axis.set_xticks(places, below, fontsize=SMALL, rotation=turned)
    axis.set_yticks(places, names, fontsize=SMALL)
    axis.set_title(f'{in_figure(tower)}: cosines')
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        axis.text(column, row, f'{value:.2f}', ha='center', va='center', color='white' if value < .6 else 'black',
                  fontsize=SMALL)


def plot_wise(curves):
    """mP@5 of seen against never-seen objects as alpha goes from the pretrained tower to the soup, with lines from low to
    high if there are intervals; star: the alpha that the selection objects choose. curves: {tower: table of sweep_alpha}."""
    if not curves:
        return print('no pretrained tower to begin from')
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.6), squeeze=False, layout='constrained')
    for axis, (tower, curve) in zip(axes[0], curves.items()):
        axis.plot(curve['seen'], curve['never seen'], 'o-')
        if has_intervals(curve):
            axis.vlines(curve['seen'], curve['low'], curve['high'], color='tab:blue', alpha=.4, label='95 % interval')
        best = curve.loc[curve['selection'].idxmax()]
        axis.plot(best['seen'], best['never seen'], '*', markersize=15, color='tab:orange',
                  label=f'chosen: alpha {best["alpha"]:g}')
        for alpha, seen, never_seen in zip(curve['alpha'], curve['seen'], curve['never seen']):
            axis.annotate(f'{alpha:g}', (seen, never_seen), textcoords='offset points', xytext=(6, -10), fontsize=8)
        axis.set(xlabel='mP@5 on trained classes', ylabel=NEVER_SEEN, title=in_figure(tower))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.margins(.12)  # space for the alphas beside the points
        axis.legend(loc='upper center', bbox_to_anchor=(.5, -.2), ncols=2, frameon=False, fontsize=SMALL)
