"""Thumbnails: the images of a page, each once whatever folder a run saw it in, and small pictures of those most needed."""
import base64
import io
import os
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
from PIL import Image

from guie.cells import name_of
from guie.files import printable, progress_bar
from guie.images import ImageDataset, loader

THUMBNAILS = 2000
THUMBNAIL, QUALITY = 64, 60  # pixels; of WebP: about 0.7 kB each


class Images:
    """All images of the page, each once: paths (several of one image that lies in several data folders) and labels."""

    def __init__(self):
        self.paths, self.labels, self.known = [], [], {}  # known: {(path, label): number}

    def add(self, pairs):
        """Numbers a run's images, (path, label). If it shares none with those before, the same label and file name is the
        same image, unless several have it."""
        pairs, same = {pair: pair for pair in pairs if pair[0]}, {}
        if not any(pair in self.known for pair in pairs):
            ours, theirs = by_file(self.known), by_file(pairs)
            same = {pair: ours[file] for file, pair in theirs.items() if file in ours}
        for path, label in pairs:
            number = self.known.get((path, label), same.get((path, label)))
            if number is None:
                number = len(self.paths)
                self.paths.append([])
                self.labels.append(label)
            if path not in self.paths[number]:
                self.paths[number].append(path)
            self.known[path, label] = number

    def of(self, pairs):
        """int (n,): numbers of (path, label), -1 where the path is empty."""
        return np.array([self.known[pair] if pair[0] else -1 for pair in pairs], int)

    def table(self):
        """What the page says of them: the folder above that all share, folders below it and labels, each once, and for each
        image its file and the places of both."""
        paths = [printable(paths[0]) for paths in self.paths]
        above = shared_folder(paths)
        paths = [path[len(above):].rpartition('/') for path in paths]
        folders, labels = ({text: place for place, text in enumerate(dict.fromkeys(texts))} for texts in (
            [folder + slash for folder, slash, _ in paths], self.labels))
        return {'above': above, 'folders': [*folders], 'labels': [printable(name_of(label)) for label in labels],
                'file': [file for _, _, file in paths], 'folder': [folders[folder + slash] for folder, slash, _ in paths],
                'label': [labels[label] for label in self.labels]}


def shared_folder(paths):
    """The folder above the lowest one that all paths share, with a slash at its end; '' for relative paths."""
    folders = {os.path.dirname(path) for path in paths}
    above = os.path.dirname(os.path.commonpath(folders)) if all(map(os.path.isabs, folders)) else ''
    return above.rstrip('/') + '/' * bool(above)


def by_file(numbered):
    """{(label, file name): number} of {(path, label): number}, without what several have."""
    found = defaultdict(set)
    for (path, label), number in numbered.items():
        found[label, os.path.basename(path)].add(number)
    return {file: numbers.pop() for file, numbers in found.items() if len(numbers) == 1}


def choose_thumbnails(found, scores):
    """Numbers of at most THUMBNAILS images, the most needed first: the queries that runs differ in most, at most half of
    all; then their neighbours, the most shown first; then the other queries, and the other images.
    found: of each run the numbers of its queries (q,) and of their neighbours (q, 5), -1 for none. scores: precision, float
    (runs, images), NaN where there is none."""
    apart = np.ptp(np.where(np.isnan(scores), -1, scores), axis=0)
    queries = np.fromiter(dict.fromkeys(query for queries, _ in found for query in queries.tolist()), int)
    queries = queries[np.argsort(-apart[queries], kind='stable')]
    first = queries[:THUMBNAILS // 2]
    near = np.concatenate([near[np.isin(queries, first)].ravel() for queries, near in found])
    shown = Counter(near[near >= 0].tolist())
    order = dict.fromkeys([*first.tolist(), *(image for image, _ in shown.most_common()), *queries.tolist(),
                           *range(scores.shape[1])])
    return [*order][:THUMBNAILS]


def draw_thumbnails(images, chosen):
    """The pictures of all images: base64 of WebP, '' for those that are not chosen, 0 for those that cannot be read, whose
    number is printed."""
    files = [next(filter(os.path.exists, images.paths[image]), images.paths[image][0]) for image in chosen]
    dataset = ImageDataset(pd.DataFrame({'path': files, 'label': ''}, dtype=object), THUMBNAIL, max_unreadable=len(files))
    pictures = [''] * len(images.paths)
    for batch in progress_bar(loader(dataset, 64), 'thumbnails', leave=False):
        for place, pixels in zip(batch['index'].tolist(), batch['image']):
            pictures[chosen[place]] = 0 if dataset.bad[place] else as_webp(pixels)
    if bad := dataset.unreadable:
        moved = ' Were they moved? Run the notebooks again with the present DATA.' * (not any(map(os.path.exists, files)))
        print(printable(f'{len(bad):,} of {len(files):,} images could not be read, first {bad[0]}; the page shows a cross.'
                        f'{moved}'))
    return pictures


def as_webp(image):
    """uint8 (3, s, s) -> base64 of a WebP file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, 'WEBP', quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()
