"""Pictures: augmented images, and queries beside their nearest images."""
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from guie.errors import FileError
from guie.images import ImageDataset
from guie.projection import l2_normalise
from guie.retrieval import nearest_neighbours


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
