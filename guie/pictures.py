"""Pictures: augmented images, what is searched, and queries beside their nearest images."""
import os
from dataclasses import dataclass, replace

import numpy as np
from matplotlib import pyplot as plt

from guie.cells import Cell, draw_cells, name_of, note_unreadable, show_image
from guie.errors import InputError
from guie.images import ImageDataset
from guie.projection import l2_normalise
from guie.retrieval import nearest_neighbours

RIGHT, WRONG, NO_MORE = 'tab:green', 'tab:red', 'tab:grey'
MEANING = {RIGHT: 'the same object', WRONG: 'another object', NO_MORE: 'another: the index has no more'}


def show_augmentation(frame, size, name, *, count=8, seed=5):
    """`count` images above and three augmented versions of each below."""
    plain, changed = ImageDataset(frame, size), ImageDataset(frame, size, name, seed=seed)
    chosen = np.random.default_rng(seed).choice(len(frame), min(count, len(frame)), replace=False)
    rows = [('as read', [plain[i] for i in chosen])] + [(f'epoch {e}', [changed[e, i] for i in chosen]) for e in range(3)]
    bad = note_unreadable(plain, chosen)
    figure, axes = plt.subplots(len(rows), len(chosen), figsize=(1.2 * len(chosen), 1.25 * len(rows)), squeeze=False)
    for row, (title, items) in zip(axes, rows):
        for axis, item in zip(row, items):
            show_image(axis, item['image'], plain.paths[item['index']] not in bad)
        row[0].set_ylabel(title)
    figure.suptitle(f'augmentation: {name}')
    figure.tight_layout()


def show_objects(splits, *, count=8, size=96, seed=5):
    """What is searched: query images of `count` objects, in rows of four. Below each are an index image of the same object,
    or 'none', and the object's name. splits: 'query' and 'index', tables path, label. The seed chooses objects and images.
    An unreadable image is black with a cross, and printed."""
    rng = np.random.default_rng(seed)
    queries, index = (splits[part].iloc[rng.permutation(len(splits[part]))] for part in ('query', 'index'))
    chosen, rows = queries.drop_duplicates('label').head(count), []
    for place, (path, label) in enumerate(zip(chosen['path'], chosen['label'])):
        others = index['path'][(index['label'] == label) & (index['path'] != path)].tolist()
        column = place % 4
        rows += [[], []] if column == 0 else []
        rows[-2].append(Cell(column, path, left='query' * (column == 0)))
        rows[-1].append(Cell(column, *others[:1] or [None], name_of(label), left='index' * (column == 0)))
    draw_cells(rows, size, MEANING, together=2)


def show_neighbours(splits, vectors, projection=None, *, exclude_self=False, size=96, rows=6, seed=5):
    """Queries (left) and their five nearest images, each with its name and Euclidean distance. A frame is green for the same
    object, red for another, grey where the index has no more images of the object; there is none if all labels are equal.
    Half of the rows show queries that found everything, half others, as far as there are both.
    splits, vectors: 'query' and 'index' of each, tables path, label and arrays (n, d). projection: a map (n, d) -> (n, dim)
    that is applied first. exclude_self: query i is index i, and names are those of files, not labels. An unreadable image is
    black with a cross, and printed. ValueError: vectors that do not fit the images."""
    found = find_five(splits, (vectors, projection), np.arange(len(splits['query'])), exclude_self)
    order = np.random.default_rng(seed).permutation(len(splits['query']))
    everything = (found.colours == RIGHT).any(1) & ~(found.colours == WRONG).any(1)
    good, bad = [order[mask[order]] for mask in (everything, ~everything)]
    chosen = np.concatenate([good[:rows // 2], bad[:rows - min(len(good), rows // 2)], good[rows // 2:]])[:rows]
    draw_cells(with_header([[query_cell(splits, query, exclude_self), *found.cells(splits, query, 1, exclude_self)]
                            for query in chosen]), size, MEANING)


def compare_neighbours(splits, models, *, size=96, queries=4, seed=5):
    """The same queries (left) in several models: for each query one row a model of its five nearest images, with names,
    distances and frames as in show_neighbours. models: {title: vectors} or {title: (vectors, projection)}, each as for
    show_neighbours; their widths may differ. The seed chooses among the queries whose object is in the index, if there are
    any, since only they count in mP@5."""
    known = np.flatnonzero(splits['query']['label'].isin(splits['index']['label']))
    chosen = np.random.default_rng(seed).permutation(known if len(known) else len(splits['query']))[:queries]
    found = {title: find_five(splits, model, chosen) for title, model in models.items()}
    rows = []
    for place, query in enumerate(chosen):
        several = [five.cells(splits, place, 1.3, left=title) for title, five in found.items()]
        rows += [[query_cell(splits, query), *several[0]], *several[1:]]
    draw_cells(with_header(rows), size, MEANING, together=len(models))


@dataclass(frozen=True)
class Five:
    """The nearest index images of some queries, each array (queries, at most 5): distances, positions in the index, and the
    colours of their frames."""
    distances: np.ndarray
    places: np.ndarray
    colours: np.ndarray

    def cells(self, splits, query, column, by_file=False, left=''):
        """The row of Cells of the images nearest to one query, from `column` on; left: its title."""
        images = splits['index'].iloc[self.places[query]]
        return [Cell(column + rank, path, name, f'{distance:.2f}', colour, left * (rank == 0))
                for rank, (path, name, distance, colour) in enumerate(zip(
                    images['path'], names_of(images, by_file), self.distances[query], self.colours[query]))]


def query_cell(splits, query, by_file=False):
    """The Cell of a query, left of its neighbours."""
    image = splits['query'].iloc[[query]]
    return Cell(0, image['path'].iloc[0], names_of(image, by_file)[0], colour='black')


def with_header(rows):
    """Rows of Cells with 'query', 1, 2, … above the first."""
    titles = ['query', *map(str, range(1, len(rows[0])))]
    return [[replace(cell, above=title) for cell, title in zip(rows[0], titles)], *rows[1:]]


def names_of(frame, by_file=False):
    """What the images of a table are called: their labels or, by_file, their file names."""
    return [os.path.basename(path) for path in frame['path']] if by_file else [*map(name_of, frame['label'])]


def find_five(splits, model, queries, exclude_self=False):
    """Five of the queries at these positions. model: vectors, or (vectors, projection)."""
    (query, index), labels = points_of(splits, model), splits['query']['label'].iloc[queries]
    near = min(5, len(index) - exclude_self)
    distances, places = nearest_neighbours(query[queries], index, near, exclude=queries if exclude_self else None)
    if len({*splits['query']['label'], *splits['index']['label']}) == 1:
        return Five(distances, places, np.full(places.shape, ''))
    right = splits['index']['label'].to_numpy()[places] == labels.to_numpy()[:, None]
    there = labels.map(splits['index']['label'].value_counts()).fillna(0).to_numpy() - exclude_self
    return Five(distances, places, np.select([right, np.arange(near) < there[:, None]], [RIGHT, WRONG], NO_MORE))


def points_of(splits, model):
    """(query, index) vectors of a model, projected and L2-normalised where it has a projection.
    model: vectors {'query', 'index'}, or (vectors, projection). ValueError unless each image has its vector."""
    vectors, projection = model if isinstance(model, tuple) else (model, None)
    for part in ('query', 'index'):
        if len(vectors[part]) != len(splits[part]):
            raise InputError(f'{part} has {len(splits[part]):,} images but {len(vectors[part]):,} vectors: embed these '
                             f'images.')
    points = [vectors[part] for part in ('query', 'index')]
    return points if projection is None else [l2_normalise(projection(part)) for part in points]
