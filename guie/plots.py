"""Plots: losses, margins, scores and soups as matplotlib figures."""
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from guie.checkpoints import Checkpoint
from guie.files import user_path
from guie.losses import adaptive_margins
from guie.soups import interpolation_scores, task_vector_cosines

STAGE_COLOURS = {'untrained': 'tab:grey', 'zero-shot': 'tab:olive', 'ingredient': 'tab:blue', 'soup': 'tab:orange',
                 'ensemble': 'tab:green'}


def plot_margins(config, labels):
    """Margin against the images a class has, and how many classes have so many. labels: of the training images."""
    counts = np.sort(np.unique(labels, return_counts=True)[1])
    margins = adaptive_margins(counts, low=config.margin_min, width=config.margin_width)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    left.plot(counts, margins, '.')
    left.set(xlabel='images of the class', ylabel='margin (radians)', ylim=(0, None))
    right.hist(counts, bins=min(30, int(np.ptp(counts)) + 1))
    right.set(xlabel='images of the class', ylabel='classes')
    figure.tight_layout()


def plot_logs(runs):
    """Loss and learning rate against the step, runs overlaid: their folders, or Checkpoints in them. A run without a log, as
    a bare checkpoint, is left out."""
    folders = [run.path.parent if isinstance(run, Checkpoint) else user_path(run) for run in runs]
    logs = {folder.name: pd.read_csv(folder / 'log.csv') for folder in folders if (folder / 'log.csv').exists()}
    if not logs:
        return print('no run has a log to draw')
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    for name, log in logs.items():
        left.plot(log['step'], log['loss'].rolling(max(1, len(log) // 20), min_periods=1).mean(), label=name)
        right.plot(log['step'], log['lr'], label=name)
    left.set(xlabel='optimiser step', ylabel='ArcFace loss (moving mean)')
    right.set(xlabel='optimiser step', ylabel="the head's learning rate")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()


def plot_dimensions(curves):
    """mP@5 against the number of dimensions. curves: {name: DataFrame dim, mp5}."""
    figure, axis = plt.subplots(figsize=(5.5, 3))
    for name, curve in curves.items():
        axis.plot(curve['dim'], curve['mp5'], '.-', label=name)
    axis.set(xlabel='dimensions', ylabel='mP@5 on never-seen objects', ylim=(0, None), xscale='log',
             xticks=(dims := sorted({d for curve in curves.values() for d in curve['dim']})))
    axis.set_xticklabels(dims)
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.tight_layout()


def plot_variance(vectors, dim):
    """Share of the variance that the first dimensions hold, with a line at `dim`."""
    spectrum = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    share = np.cumsum(spectrum) / spectrum.sum()
    figure, axis = plt.subplots(figsize=(5.5, 2.8))
    axis.plot(np.arange(1, len(share) + 1), share)
    axis.axvline(dim, color='grey', linestyle=':')
    axis.set(xlabel='dimensions', ylabel='explained variance', ylim=(0, 1.02),
             title=f'{dim} dimensions hold {share[min(dim, len(share)) - 1]:.0%}')
    figure.tight_layout()


def plot_scores(scores):
    """A bar a model, coloured by stage."""
    figure, axis = plt.subplots(figsize=(7, .35 * len(scores) + .9))
    bars = axis.barh(scores['model'], scores['mp5'], color=scores['stage'].map(STAGE_COLOURS))
    axis.bar_label(bars, fmt='%.3f', padding=3)
    axis.invert_yaxis()
    axis.set(xlabel='mP@5 on never-seen objects', xlim=(0, 1.12 * (scores['mp5'].max() or 1)))
    figure.tight_layout()


def plot_basin(ingredients, bases, embedders):
    """Cosines between the ingredients' ways from the pretrained weights, and the score along the line between two.
    ingredients: of find_ingredients; bases: of base_states; embedders: {tower: StateEmbedder}."""
    figure, axes = plt.subplots(1, len(bases) + 1, figsize=(4 * (len(bases) + 1), 3.4), squeeze=False)
    for axis, (tower, base) in zip(axes[0], bases.items()):
        table = task_vector_cosines(ingredients[tower], base)
        short = [name.removeprefix(f'{tower}_') for name in table.columns]
        axis.imshow(table, vmin=0, vmax=1, cmap='viridis')
        axis.set(xticks=range(len(short)), yticks=range(len(short)), xticklabels=short, yticklabels=short,
                 title=f'{tower}: cosines')
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            axis.text(column, row, f'{value:.2f}', ha='center', va='center', color='white' if value < .6 else 'black')
    for tower, runs in ingredients.items():
        if len(runs) > 1:
            line = interpolation_scores(*runs[:2], embedders[tower].score)
            axes[0, -1].plot(line['alpha'], line['score'], '.-', label=tower)
            axes[0, -1].legend(frameon=False)
    axes[0, -1].set(xlabel='from the first ingredient (0) to the second (1)', ylabel='mP@5 on selection objects')
    figure.tight_layout()


def plot_wise(curves):
    """mP@5 of seen against never-seen objects as alpha goes from the pretrained tower to the soup; star: the alpha that the
    selection objects choose."""
    if not curves:
        return print('no pretrained tower to begin from')
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.2), squeeze=False)
    for axis, (tower, curve) in zip(axes[0], curves.items()):
        axis.plot(curve['seen'], curve['never seen'], 'o-')
        best = curve.loc[curve['selection'].idxmax()]
        axis.plot(best['seen'], best['never seen'], '*', markersize=15, color='tab:orange',
                  label=f'chosen: alpha {best["alpha"]:g}')
        for row in curve.itertuples():
            axis.annotate(f'{row.alpha:g}', (row.seen, row[-1]), textcoords='offset points', xytext=(6, -10), fontsize=8)
        axis.set(xlabel='mP@5 on trained classes', ylabel='mP@5 on never-seen objects', title=tower)
        axis.margins(.12)  # room for the alphas beside the points
        axis.legend(frameon=False)
    figure.tight_layout()
