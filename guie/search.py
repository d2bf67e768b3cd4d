"""Search: one's own images found by image or text.
`accelerate launch -m guie.search RUN FOLDER` embeds the images of a folder before, on any number of GPUs and machines;
images in tar files are another room's, guie.shards."""
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from guie.cells import Cell, draw_cells, name_of
from guie.checkpoints import load_run
from guie.collection import (
    SubmissionFile,
    cache_folders,
    collect,
    embed_share,
    find_images,
    missing,
    state_of,
    vectors_of,
)
from guie.distributed import best_device, end_with_notebook, launch, processes_here, report_error, take_place
from guie.embedding import WORTH_LAUNCHING
from guie.errors import FileError, InputError, MissingError
from guie.files import printable, user_path
from guie.images import read_pixels, to_rgb
from guie.model import Embedder, Ensemble
from guie.pictures import with_header
from guie.projection import l2_normalise
from guie.retrieval import nearest_neighbours
from guie.submission import load_submission
from guie.text import load_text_tower, text_vectors

NAMES = 200       # labels that the recall of texts is measured on, at most
FLAT = 1_000_000  # vectors up to which faiss compares all
DRAWN = 50        # images of a figure, at most


class Search:
    """The images of a folder, found by image (`like`) or text (`text`).
    run: the folder of a run, a soup or the ensemble, a submission.zip, or a loaded Embedder or Ensemble. folder: a folder of
    images, arranged in any way, or a table with a column path (and perhaps label). Vectors are kept in the run's folder
    (search/<folder>-<hash of its path>), or in runs/search where that cannot be written, or in `cache`; only new and changed
    images are embedded, and a stopped session loses 2,000 at most (20,000 with a GPU). Several GPUs share 20,000 or more; so
    do several machines that see the same folders, by `accelerate launch` before. Images that cannot be read are named and
    left out. faiss: whether to build an index of faiss in memory; None: for more than a million images, if faiss is
    installed. It then looks at a part of the images, takes a minute or more to build, answers in milliseconds and prints its
    recall. For fewer it compares all, which is no faster than without.
    files: DataFrame path, size, mtime and, where the images lie in several folders, label (the folder's name). vectors:
    float32 (n, dim), unit rows in the order of files, mapped from disk. unreadable: paths."""

    def __init__(self, run, folder, *, cache=None, faiss=None):
        self.images, self.root = find_images(folder)
        self.model, home, self.name = open_model(run)
        self.folders = cache_folders(self.root, home, name_of_home(home, self.name), cache)
        if isinstance(run, (str, Path)) and isinstance(folder, (str, Path)):
            embed_on_all_gpus(user_path(run), self.root, self.images, self.model, self.folders, cache)
        self.collection = collect(self.images, self.root, self.model, self.folders)
        self.files, self.vectors = self.collection.files, self.collection.vectors
        self.unreadable = self.collection.unreadable
        faiss = len(self.vectors) > FLAT and find_spec('faiss') is not None if faiss is None else faiss
        self.faiss = faiss_index(self.vectors) if faiss else None
        self.texts = None  # (encode, the Embedder whose vectors texts are compared with, its Collection), once asked for

    def __repr__(self):
        left_out = f' ({len(self.unreadable):,} cannot be read)' if self.unreadable else ''
        return printable(f'Search: {len(self.files):,} images{left_out} of {self.root}, {self.vectors.shape[1]} numbers '
                         f'each by {self.name}, kept in {self.folders[-1]}')

    def like(self, image, k=5, *, draw=True):
        """The k images most like one: DataFrame path, distance and, where there are several, label, the nearest first.
        image: a path, a Pillow image, or an array uint8 (H, W, 3). A path that is among the images is not found itself.
        draw: shows the image and what was found. ValueError: no such k or image; OSError: one that cannot be read."""
        k = whole_number(k)
        with as_file(image) as path:
            own = self.place_of(path)
            if own is not None and state_of(path) == tuple(self.files.loc[own, ['size', 'mtime']]):
                vector = self.vectors[own]
            else:
                vector = self.embed(path)
            found = self.nearest(vector, k, leave_out=own)
            if draw:
                name = os.path.basename(path) if isinstance(image, (str, Path)) else ''
                draw_found(found, Cell(0, path, name, colour='black'))
        return found

    def text(self, words, k=5, *, draw=True):
        """The k images that a text describes best, as `like` returns and shows them; for the run of an open_clip model.
        Texts are compared with the vectors of the tower alone where a head was trained; the first text embeds these. It also
        prints for how many labels a text finds an image of theirs. ValueError: a model without a text half."""
        k = whole_number(k)
        if not isinstance(words, str) or not words.strip():
            raise InputError(f'The text to search for is {words!r}: give some words, such as \'a red bag\'.')
        if self.texts is None:
            self.texts = self.open_texts()
            print(text_recall(self.texts))
        found = found_in(self.texts[2], encoded(self.texts, [words])[0], k)
        if draw:
            draw_found(found, title=words)
        return found

    def nearest(self, vector, k=5, *, leave_out=None):
        """The k images nearest to a vector of `dim` numbers, which is scaled to length 1: DataFrame as of `like`, without a
        figure. Distances are Euclidean and exact; equally near images are in the order of `files`. leave_out: the position
        in `files` of an image that is not to be found. ValueError: another vector."""
        return found_in(self.collection, vector, whole_number(k), leave_out, self.faiss)

    def place_of(self, path):
        """The position of a file among the images, or None. Links in the way to it, or to the
        folder, are followed; those below the folder are not."""
        path, real = os.path.abspath(path), os.path.join(os.path.realpath(self.root), '')
        ways = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), os.path.realpath(path)
        ways = [os.path.join(self.root, way.removeprefix(real)) for way in ways if way.startswith(real)]
        for way in dict.fromkeys([path, *ways]):
            if len(places := np.flatnonzero(self.files['path'] == way)):
                return int(places[0])

    def embed(self, path):
        """The unit vector of an image file: float32 (dim,)."""
        vectors, _ = vectors_of(self.model, [path], 'embedding', workers=0)
        if not len(vectors):
            why = f'The image {path} cannot be read'
            try:
                read_pixels(str(path), 64)
            except FileError as error:
                why = str(error).rstrip('.')
            raise FileError(printable(f'{why}: check the file, or give another one.'))
        return vectors[0]

    def open_texts(self):
        """(encode, Embedder, Collection) for texts; ValueError where the model has no text half that fits."""
        model = self.model
        if not isinstance(model, Embedder) or model.spec.model_name.startswith('timm:'):
            kind = ('a submission.zip holds' if isinstance(model, SubmissionFile) else 'the towers of an ensemble share'
                    if isinstance(model, Ensemble) else f'{model.spec.model_name} has')
            raise InputError(f'{self.name} cannot be searched by text, since {kind} no text half: search by the run of one '
                             f'open_clip model, such as that of zero_shot_pca.ipynb.')
        encode = load_text_tower(model.spec.model_name, model.spec.pretrained)
        if model.head is None:
            return encode, model, self.collection
        print('The head was trained without texts, so these are compared with what the tower alone sees.')
        tower = Embedder(model.tower, spec=model.spec).eval()
        return encode, tower, collect(self.images, self.root, tower, self.folders, 'text')


def open_model(run):
    """(Embedder, Ensemble or SubmissionFile; the run's folder, or None; a name) of what Search takes as run."""
    if isinstance(run, (Embedder, Ensemble)):
        name = 'ensemble' if isinstance(run, Ensemble) else run.spec.model_name
        return run.eval(), None, name
    if isinstance(run, nn.Module) or not isinstance(run, (str, Path)):
        raise InputError(f'A {type(run).__name__} cannot search: give the folder of a run, a submission.zip, an Embedder '
                         f'or an Ensemble.')
    path = user_path(run)
    home = path if path.is_dir() else path.parent
    if path.suffix.lower() == '.zip':
        return SubmissionFile(load_submission(path), path), home, str(path)
    return load_run(path).to(best_device()), home, str(path)


def name_of_home(home, name):
    """What the folder of a model's vectors is called where its own folder cannot be written."""
    return os.path.basename(home.absolute() if home else name)


@contextmanager
def as_file(image):
    """Yields the path of an image; a Pillow image or an array uint8 (H, W, 3) is a file within the block."""
    if isinstance(image, (str, Path)):
        path = user_path(image)
        if not path.is_file():
            raise MissingError(printable(f'There is no image {path}: check the path.'))
        yield str(path)
        return
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(f'An array {image.dtype} {image.shape} is no image: give uint8 (H, W, 3), red first.')
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(f'A {type(image).__name__} is no image: give a path, a Pillow image or an array uint8 (H, W, 3).')
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'query.bmp')  # the fastest to write
        to_rgb(ImageOps.exif_transpose(image)).save(path)
        yield path


def whole_number(k):
    """k as an int; ValueError unless it is 1 or more."""
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise InputError(f'k is {k!r}, but it counts the images to find: give 1 or more.')
    return int(k)


# Neighbours

def found_in(collection, vector, k, leave_out=None, faiss=None):
    """DataFrame path, distance and perhaps label of the k images of a Collection that are nearest to a vector."""
    vector, dim = np.asarray(vector), collection.vectors.shape[1]
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise InputError(f'A vector of shape {vector.shape} cannot be searched with: give {dim} finite numbers.')
    most = len(collection.files) - (leave_out is not None)
    if k > most:
        print(f'There are only {most:,} images to find, so k={k} finds {most:,}.')
    rows, distances = np.zeros(0, int), np.zeros(0, np.float32)
    if k := min(k, most):
        rows, distances = nearest_rows(collection.vectors, l2_normalise(vector), k, leave_out, faiss)
    labels = ['label'] if 'label' in collection.files else []
    found = collection.files.iloc[rows][['path', *labels]].reset_index(drop=True)
    found.insert(1, 'distance', distances)
    return found


def nearest_rows(vectors, query, k, leave_out=None, faiss=None):
    """(positions, distances float32) of the k unit rows nearest to a unit vector, by (distance, position).
    float32 products choose those that can be among them, and nearest_neighbours orders these."""
    if faiss is not None:
        _, near = faiss.search(query[None], k + 10)
        near = np.setdiff1d(near[0], [-1, -1 if leave_out is None else leave_out])
    if faiss is None or len(near) < k:
        cosines = vectors @ query
        if leave_out is not None:
            cosines[leave_out] = -np.inf
        slack = 2 * vectors.shape[1] * np.finfo(np.float32).eps  # twice what rounding can take from one
        near = np.flatnonzero(cosines >= np.partition(cosines, -k)[-k] - slack)
    distances, order = nearest_neighbours(query[None], vectors[near], k)
    return near[order[0]], distances[0]


def faiss_index(vectors, part=100_000):
    """An index of faiss of unit vectors (n, dim), a copy in memory. Beyond FLAT rows it searches a part of √n groups, and
    its recall@5 is printed. InputError without faiss."""
    try:
        import faiss
    except ImportError:
        raise InputError('faiss is not installed: pip install faiss-cpu, or leave out faiss=True.') from None
    index = faiss.IndexFlatIP(vectors.shape[1])
    if grouped := len(vectors) > FLAT:
        groups = int(len(vectors) ** .5)
        index = faiss.IndexIVFFlat(index, vectors.shape[1], groups, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, groups // 32)
        index.train(np.ascontiguousarray(vectors[::max(1, len(vectors) // (50 * groups))]))
    for start in range(0, len(vectors), part):
        index.add(np.ascontiguousarray(vectors[start:start + part]))
    if grouped:
        queries = np.linspace(0, len(vectors) - 1, 100).astype(int)
        exact, found = ([nearest_rows(vectors, vectors[query], 5, query, way)[0] for query in queries]
                        for way in (None, index))
        recall = np.mean([np.isin(*pair).mean() for pair in zip(exact, found)])
        print(f'faiss: recall@5 {recall:.3f} against exact search, for {len(queries)} of the images.')
    return index


# Texts

def encoded(texts, words):
    """Unit vectors float32 (n, dim) of texts, where the vectors of images are. texts: of Search.open_texts."""
    encode, model, _ = texts
    vectors = torch.from_numpy(text_vectors(encode, words, '{}')).to(next(model.parameters()).device)
    with torch.inference_mode():
        return model.project(vectors).cpu().numpy()


def text_recall(texts):
    """A sentence: how many labels, searched for as texts, one of the five nearest images has, and by chance."""
    files, vectors = texts[2].files, texts[2].vectors
    if 'label' not in files:
        return ('How well texts find these images is not known: they have no different labels, such as the names of their '
                'folders, to search for.')
    counts = files['label'].value_counts(sort=False)
    chosen = counts.iloc[np.unique(np.linspace(0, len(counts) - 1, min(NAMES, len(counts))).astype(int))]
    words = [name_of(label).replace('_', ' ').replace('-', ' ') for label in chosen.index]
    near = min(5, len(files))
    _, rows = nearest_neighbours(encoded(texts, words), vectors, near)
    recall = (files['label'].to_numpy()[rows] == chosen.index.to_numpy()[:, None]).any(1).mean()
    missed = np.prod([(len(files) - chosen - i).clip(lower=0) / (len(files) - i) for i in range(near)], axis=0)
    return (f'Search by text finds an image with the right label among its first five for {recall:.1%} of {len(chosen):,} '
            f'labels ({1 - missed.mean():.1%} by chance).')


# Figures

def draw_found(found, query=None, title='', columns=10, size=96):
    """Shows what was found with names and distances, in rows of `columns`, after a Cell of the query if there is one."""
    found, names = found.head(DRAWN), found['label'] if 'label' in found else [*map(os.path.basename, found['path'])]
    cells = [Cell(place % columns + (query is not None), path, name_of(name), f'{distance:.2f}')
             for place, (path, name, distance) in enumerate(zip(found['path'], names, found['distance']))]
    rows = [cells[start:start + columns] for start in range(0, max(1, len(cells)), columns)]
    if query is not None:
        rows = with_header([[query, *rows[0]]]) + rows[1:]
    elif title:
        rows[0][0] = replace(rows[0][0], left=title)
    draw_cells(rows, size, {})


# Several processes

def embed_on_all_gpus(run, root, images, model, folders, cache):
    """Launches a process a GPU where there are several, and many images without a vector; else collect does what is left."""
    if processes_here() > 1 and run.is_dir() and len(images) >= WORTH_LAUNCHING:
        if len(missing(images, model, folders)) >= WORTH_LAUNCHING:
            launch('guie.search', run, processes_here(), root, *([] if cache is None else [cache]), stops=False)


def main(run=None, folder=None, cache=None, *more):
    """One of several launched processes: embeds its share of the images that have no vectors yet, for a Search(run, folder)
    to find. Each works alone: none waits for another, what is written stays if one is killed, and the same command goes on
    from there, with as many processes as there are then."""
    if folder is None or more:
        raise InputError('Name a run and a folder of images, and perhaps one for the vectors: accelerate launch -m '
                         'guie.search RUN FOLDER [CACHE].')
    end_with_notebook()
    rank, processes = take_place()
    images, root = find_images(folder)
    model, home, name = open_model(run)
    embed_share(images, model, cache_folders(root, home, name_of_home(home, name), cache), rank, processes)


if __name__ == '__main__':
    report_error(next(iter(sys.argv[1:]), None), lambda: main(*sys.argv[1:]))
