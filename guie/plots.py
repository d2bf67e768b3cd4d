"""Plots: images, tables and neighbours as matplotlib figures."""
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from guie.checkpoints import Checkpoint
from guie.errors import FileError
from guie.files import user_path
from guie.images import ImageDataset
from guie.losses import adaptive_margins
from guie.projection import l2_normalise
from guie.retrieval import nearest_neighbours
from guie.soups import interpolation_scores, task_vector_cosines

STAGE_COLOURS = {'untrained': 'tab:grey', 'zero-shot': 'tab:olive', 'ingredient': 'tab:blue', 'soup': 'tab:orange',
                 'ensemble': 'tab:green'}


def show_augmentation(frame, size, name, *, count=8, seed=5):
    """`count` images above and three augmented versions of each below."""
    plain, changed = ImageDataset(frame, size), ImageDataset(frame, size, name, seed=seed)
    chosen = np.random.default_rng(seed).choice(len(frame), min(count, len(frame)), replace=False)
    rows = [('as read', [plain[i] for i in chosen])] + [(f'epoch {e}', [changed[e, i] for i in chosen]) for e in range(3)]
    bad = note_unreadable(plain, chosen)
    figure, axes = plt.subplots(len(rows), len(chosen), figsize=(1.2 * len(chosen), 1.25 * len(rows)), squeeze=False)
    for row, (title, items) in zip(axes, rows):
        for axis, item in zip(row, items):
            show_image(axis, item['image'], readable=plain.paths[item['index']] not in bad)
        row[0].set_ylabel(title)
    figure.suptitle(f'augmentation: {name}')
    figure.tight_layout()


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


def show_neighbours(splits, vectors, projection=None, *, exclude_self=False, size=96, rows=6, seed=5):
    """Queries (left) and their five nearest images, framed green where the object is the same, else red.
    splits, vectors: 'query' and 'index' of each. projection: a map (n, d) -> (n, dim) that the vectors are brought through
    first. exclude_self: query i is index i. Half of the rows show queries that found everything, half others, as far as
    there are both. An image that cannot be read is a marked black one, and named."""
    queries, index = splits['query'], splits['index']
    points = [vectors[part] for part in ('query', 'index')]
    points = points if projection is None else [l2_normalise(projection(part)) for part in points]
    itself = np.arange(len(queries)) if exclude_self else None
    _, neighbours = nearest_neighbours(*points, min(5, len(index) - exclude_self), exclude=itself)
    right = index['label'].to_numpy()[neighbours] == queries['label'].to_numpy()[:, None]
    order = np.random.default_rng(seed).permutation(len(queries))
    good, bad = [order[mask[order]] for mask in (right.all(1), ~right.all(1))]
    chosen = np.concatenate([good[:rows // 2], bad[:rows - min(len(good), rows // 2)], good[rows // 2:]])[:rows]
    columns = ['query', *map(str, range(1, neighbours.shape[1] + 1))]
    images = ImageDataset(pd.concat([part for query in chosen for part in (
        queries.iloc[[query]], index.iloc[neighbours[query]])]), size)
    pictures = [images[i]['image'] for i in range(len(images))]
    bad = note_unreadable(images, range(len(images)))
    figure, axes = plt.subplots(len(chosen), len(columns), figsize=(1.2 * len(columns), 1.2 * len(chosen)), squeeze=False)
    colours = [colour for found in right[chosen] for colour in ('black', *np.where(found, 'tab:green', 'tab:red'))]
    for axis, picture, path, colour in zip(axes.flat, pictures, images.paths, colours):
        show_image(axis, picture, colour, readable=path not in bad)
    for axis, title in zip(axes[0], columns):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()


def note_unreadable(images, shown):
    """Paths of an ImageDataset that could not be read, their number and the first printed; OSError if none could."""
    bad, paths = {*images.unreadable}, {images.paths[i] for i in shown}
    if bad >= paths:
        raise FileError(f'None of the {len(paths)} images of this figure can be read, first {min(paths)}: check the data '
                        f'folder.')
    if bad:
        print(f'{len(bad)} images of this figure could not be read, first {min(bad)}; they are shown black, with a cross.')
    return bad


def show_image(axis, image, colour=None, readable=True):
    """An image (3, s, s) without ticks, in a coloured frame if given; one that could not be read has a cross."""
    axis.imshow(image.permute(1, 2, 0))
    if not readable:
        axis.text(.5, .5, '×', color='white', fontsize=24, ha='center', va='center', transform=axis.transAxes)
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values() if colour else ():
        side.set(color=colour, linewidth=3)


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
