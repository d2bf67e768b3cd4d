"""Maps: how alike vectors of the same and of different objects are, and vectors laid out on a plane as their images."""
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from guie.cells import read_images, shortened, write
from guie.errors import InputError
from guie.pictures import points_of
from guie.projection import l2_normalise
from guie.retrieval import codes

THUMBNAIL = 64  # pixels
PARTS, COLOURS = ('query', 'index'), ('tab:orange', 'tab:blue')


def plot_similarities(splits, models, *, pairs=200_000, seed=5):
    """Histograms, one a model, of cosine similarities between queries and index images of the same object and of different
    ones. The title says how often, in percent, a pair of the same object is more alike than one of different objects (the
    area under the ROC curve). models: {title: vectors} or {title: (vectors, projection)}, as for compare_neighbours. The
    seed draws at most `pairs` pairs, half of them of the same object, which are the same for all models. Without pairs of
    both kinds it prints a sentence instead."""
    kinds = [sample_pairs(splits, same, pairs // 2, np.random.default_rng(seed)) for same in (True, False)]
    for words, (queries, _) in zip(('the same object', 'different objects'), kinds):
        if not len(queries):
            return print(f'No query and index image show {words}: there are no similarities to compare.')
    found = {title: similarities(points_of(splits, model), kinds) for title, model in models.items()}
    lowest = min(values.min() for both in found.values() for values in both)
    bins = np.linspace(min(lowest, .9), 1.0001, 41)  # float32 cosines exceed 1
    figure, axes = plt.subplots(len(found), figsize=(6.9, 2.1 * len(found) + .5), sharex=True, squeeze=False)
    for axis, (title, (same, different)) in zip(axes[:, 0], found.items()):
        for values, words, colour in ((different, 'different objects', 'tab:red'), (same, 'the same object', 'tab:green')):
            axis.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colour, alpha=.55, label=words)
        write(axis, .5, 1.04, f'{shortened(title, 32)}: a pair of the same object is more alike than another '
                              f'{area_under_curve(same, different):.1%} of the time', va='bottom', fontsize=9)
        axis.set(ylabel='share of pairs', yticks=[])
    axes[0, 0].legend(frameon=False)
    axes[-1, 0].set_xlabel('cosine similarity')
    figure.tight_layout()


def sample_pairs(splits, same, most, rng):
    """(queries, index images): positions of at most `most` different pairs, of the same object or of different ones; an
    image is never paired with itself."""
    query, index = np.split(codes(splits['query']['label'], splits['index']['label']), [len(splits['query'])])
    order = np.argsort(index, kind='stable')
    first, last = (np.searchsorted(index[order], query, side) for side in ('left', 'right'))
    counts = last - first if same else len(index) - (last - first)
    ends = np.cumsum(counts)
    drawn = rng.choice(ends[-1], min(ends[-1], most), replace=False)
    queries = np.searchsorted(ends, drawn, 'right')
    places = drawn - (ends - counts)[queries]  # among the index images that are of the query's object, or that are not
    places += first[queries] if same else (last - first)[queries] * (places >= first[queries])
    others = splits['query']['path'].to_numpy()[queries] != splits['index']['path'].to_numpy()[order[places]]
    return queries[others], order[places][others]


def similarities(points, kinds):
    """Cosines of pairs [(queries, index images), …] of points (query, index) -> a list of arrays float32 (pairs,)."""
    def cosines(queries, others):
        return np.einsum('nd,nd->n', l2_normalise(points[0][queries]), l2_normalise(points[1][others]))

    return [check_finite(np.concatenate([cosines(*part) for part in zip(*(
        np.array_split(rows, len(rows) // 10_000 + 1) for rows in pairs))])) for pairs in kinds]


def check_finite(numbers):
    """The numbers; ValueError if any is NaN or infinite."""
    if not np.isfinite(numbers).all():
        raise InputError('Vectors of this figure hold NaN or infinite values: leave their images out or embed them again.')
    return numbers


def area_under_curve(high, low):
    """How often one of `high` exceeds one of `low`, 0…1; ties count half."""
    low = np.sort(low)
    below = [np.searchsorted(low, high, side).astype(float) for side in ('left', 'right')]
    return np.mean(below) / len(low)


def show_map(splits, vectors, projection=None, *, images=200, seed=5):
    """Up to 1,000 query and index vectors on a plane, near ones near each other (t-SNE; a PCA for fewer than ten different
    vectors). At most `images` are drawn as images, framed by whether they are queries, with lines between those of the same
    object; the others are dots. splits, vectors, projection: as for show_neighbours. Five images of each object come before
    more of any, and queried objects before others; the seed chooses. Index images that are queries too are shown once. An
    unreadable image is black with a cross, and printed. ValueError: vectors that do not fit the images."""
    points, table = points_of(splits, (vectors, projection)), sample_images(splits, 1000, np.random.default_rng(seed))
    places = on_plane(check_finite(np.stack([points[part][row] for part, row in zip(table['part'], table['row'])])), seed)
    shown, centres, side = thin_out(places, images)
    pixels = read_images(table['path'].iloc[shown].tolist(), THUMBNAIL)
    figure = plt.figure(figsize=(9, 9.3))
    axis = figure.add_axes((.01, .01, .98, .945))
    colours = np.array(COLOURS)[table['part']]
    for (left, low), path in zip(centres - side / 2, table['path'].iloc[shown]):
        image, readable = pixels[path]
        axis.imshow(image.permute(1, 2, 0).numpy(), extent=(left, left + side, low, low + side), zorder=2)
        write(axis, left + side / 2, low + side / 2, '' if readable else '×', color='white', fontsize=16, zorder=3)
    axis.add_collection(PatchCollection([Rectangle(corner, side, side) for corner in centres - side / 2], zorder=3,
                                        facecolors='none', edgecolors=colours[shown], linewidths=2))
    axis.add_collection(LineCollection(links(centres, table['object'].to_numpy()[shown]), colors='black', linewidths=.8,
                                       alpha=.6, zorder=4))
    axis.scatter(*np.delete(places, shown, 0).T, s=12, c=np.delete(colours, shown), linewidths=0, zorder=1,
                 clip_on=False)
    axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect='auto')
    legend = [*(Patch(color=colour, label=part) for colour, part in zip(COLOURS, PARTS)),
              Line2D([], [], color='black', linewidth=.8, label='the same object'),
              Line2D([], [], color='grey', marker='.', linestyle='', label='more images')]
    figure.legend(handles=legend, ncols=4, loc='upper left', frameon=False, handlelength=1.2, fontsize=12, borderaxespad=.2)


def sample_images(splits, most, rng):
    """At most `most` of all images: DataFrame path, object (a number), part (0 query, 1 index), row (in its part)."""
    table = pd.concat([pd.DataFrame({'path': splits[part]['path'].to_numpy(object), 'part': number, 'row': np.arange(
        len(splits[part]))}) for number, part in enumerate(PARTS)], ignore_index=True)
    table['object'] = codes(*(splits[part]['label'] for part in PARTS))
    table = table[(table['part'] == 0) | ~table['path'].isin(splits['query']['path'])]
    table = table.iloc[rng.permutation(len(table))]
    rank, queried = rng.permutation(table['object'].max() + 1), table['object'].isin(table['object'][table['part'] == 0])
    return table.iloc[np.lexsort([rank[table['object']], ~queried, table.groupby('object').cumcount() // 5])[:most]]


def enough_for_tsne(points):
    """Whether points (n, d) are enough for a t-SNE: ten different ones, of two columns."""
    return len(np.unique(points, axis=0)) >= 10 and points.shape[1] >= 2


def on_plane(points, seed, tsne=True):
    """float (n, d) -> (n, 2), both columns from 0 to 1; by PCA without `tsne`, or where the points are too few for it."""
    from sklearn.manifold import TSNE  # takes a second to import
    from threadpoolctl import threadpool_limits

    points = points - points[0]  # equal rows become 0
    points = points - points.mean(0)
    if not tsne or not enough_for_tsne(points):
        left, scale, _ = np.linalg.svd(points, full_matrices=False)
        plane = np.pad(left * scale, ((0, 0), (0, 2)))[:, :2]
    else:
        tsne = TSNE(perplexity=min(30, len(points) / 4), init='pca', max_iter=500, random_state=seed)
        with threadpool_limits(1):  # several take three times as long on busy cores
            plane = tsne.fit_transform(points)
    plane = plane - plane.min(0)
    spread = plane.max(0)
    return np.where(spread > 0, plane / np.where(spread > 0, spread, 1), .5)


def thin_out(places, most):
    """Which of the points (n, 2) in 0…1 can be images that do not cover each other: the first in each cell of a grid, as
    many as possible up to `most`. Returns their positions, the centres (m, 2) of their cells and a side that leaves gaps."""
    finest = max(8, round((1.5 * min(most, len(places))) ** .5))
    grids = [(across, *np.unique((places * across).clip(max=across - 1).astype(int), axis=0, return_index=True))
             for across in range(1, finest + 1)]
    across, cells, shown = max((grid for grid in grids if len(grid[2]) <= most), key=lambda grid: len(grid[2]))
    return shown, (cells + .5) / across, min(.86 / across, .2)


def links(places, objects):
    """Lines (m, 2, 2) from the first place of each object to its others."""
    _, first, of = np.unique(objects, return_index=True, return_inverse=True)
    lines = np.stack([places[first[of]], places], 1)
    return lines[first[of] != np.arange(len(places))]
