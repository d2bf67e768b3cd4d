"""Explore: one page, which needs no server, on which people compare what several runs find for each query."""
import base64
import html
import io
import json
import math
import os
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import SafetensorError, safe_open

from guie.cells import name_of
from guie.errors import InputError, MissingError
from guie.files import literal, printable, progress_bar, user_path, write_text
from guie.images import ImageDataset, loader
from guie.maps import PARTS, check_finite, enough_for_tsne, on_plane, sample_images
from guie.results import read_queries, read_vectors
from guie.scores import intervals

TEMPLATE = Path(__file__).with_name('explore.html')
THUMBNAIL, QUALITY = 64, 60  # pixels; of WebP: 0.8 kB each
THUMBNAILS, MAP_POINTS = 2000, 2000
TSNE_POINTS = 4000  # of all maps together: a map of 2,000 takes about 7 seconds
RANKS = [f'_{rank}' for rank in range(1, 6)]  # ends of the columns of queries.csv
SEED = 5
OF_A_RUN = ('model.safetensors', 'config.json', 'scores.csv')
FACTS = ('method', 'alpha', 'ingredients', 'members', 'data')  # of a run's metadata


def explore(out_dir, path='explore.html'):
    """Writes one page, which needs no server or network, to compare runs query by query -> Page, which a notebook shows.
    out_dir: a folder with runs up to two levels below, or a list of runs' folders; a run needs queries.csv, and vectors.npz
    for its map. path: the page; a relative one is below out_dir, or the current folder for a list. Runs are compared on the
    queries that they share: the same path and label or, where two runs share none, the same label and file name. At most
    2,000 thumbnails and 2,000 places on a map, and t-SNE for the first maps alone, keep it small. Images that cannot be read
    are printed and marked. FileNotFoundError without a run that has queries.csv; OSError if the page cannot be written."""
    folders, root = folders_of(out_dir)
    runs = [read_run(name, folder) for name, folder in folders.items()]
    runs.sort(key=lambda run: -np.nan_to_num(mean(run.precision), nan=-1))
    images = Images()
    for run in runs:
        images.add(run)
    scores = score_matrix(runs, images)
    pairs = compare_pairs(scores, images.labels)
    chosen = choose_pair(len(runs), pairs)
    maps = draw_maps(runs, images, sorted(range(len(runs)), key=lambda place: place not in chosen))
    pictures = draw_thumbnails(images, choose_thumbnails(runs, images, scores))
    data = {'title': printable(root.absolute().name), 'choice': chosen,
            'runs': [run_table(run, images) | {'map': maps[place]} for place, run in enumerate(runs)],
            'pairs': {f'{a} {b}': pair for (a, b), pair in pairs.items()},
            'images': images.table() | {'picture': pictures}}
    page = root / user_path(path)
    text = TEMPLATE.read_text('utf-8').replace('>DATA<', f'>{as_data(data)}<')
    write_text(page, text)
    print(printable(f'{page}: {len(runs)} run{"s" * (len(runs) > 1)}, {len(pictures):,} images, {len(text) / 1e6:.1f} MB; '
                    f'open it in a browser, which needs no network'))
    return Page(page)


class Page:
    """A page that was written: `path`. A notebook shows it in a frame that runs its scripts and nothing else."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)

    def __repr__(self):
        return printable(str(self.path))

    def _repr_html_(self):
        return (f'<iframe sandbox="allow-scripts" title="compare runs" style="width: 100%; height: 700px; border: 0" '
                f'srcdoc="{html.escape(self.path.read_text("utf-8"))}"></iframe>')


# Runs

def folders_of(out_dir):
    """({name: run's folder}, folder that a relative path is below); prints which runs are left out, since they have no
    queries.csv."""
    if isinstance(out_dir, (list, tuple)):
        folders, root = [user_path(folder) for folder in out_dir], Path()
    else:
        root = user_path(out_dir)
        found = {file.parent for name in ('queries.csv', *OF_A_RUN) for start in ('', '*/', '*/*/')
                 for file in root.glob(start + name)}
        folders = sorted(folder for folder in found if 'state' not in folder.relative_to(root).parts)  # states to resume from
    with_queries = [folder for folder in folders if (folder / 'queries.csv').is_file()]
    without = [named(folder, root) for folder in folders if folder not in with_queries]
    if not with_queries:
        raise MissingError(printable(f'{out_dir} holds no run with queries.csv: run the notebooks, which write it, or '
                                     f'utilities.save_results.'))
    if without:
        print(printable(f'Left out, since they hold no queries.csv: {", ".join(without)}; run their notebooks again, or '
                        f'utilities.save_results.'))
    names = Counter(folder.name for folder in with_queries)
    return {str(folder) if root == Path() and names[folder.name] > 1 else named(folder, root): folder
            for folder in with_queries}, root


def named(folder, root):
    """A run's name: its folder's, with those below root that it lies in."""
    inside = root != Path() and folder != root and folder.is_relative_to(root)
    return folder.relative_to(root).as_posix() if inside else folder.absolute().name


@dataclass(frozen=True)
class Run:
    """A run's files: its name, {setting: text}, queries.csv and vectors.npz (or None)."""
    name: str
    settings: dict
    queries: pd.DataFrame
    vectors: dict | None

    @property
    def precision(self):
        """float (q,), NaN where it does not count."""
        return self.queries['precision'].to_numpy(float)

    @property
    def index(self):
        """The (path, label) of its index images, as far as they are known."""
        return [] if self.vectors is None else [*zip(*(self.vectors[f'index_{part}'].tolist() for part in ('paths', 'labels')))]

    def found(self, rank=''):
        """The (path, label) of its queries or, with a rank, of the neighbour that each has there; '' where there is none."""
        return [*zip(*(self.queries[name + rank].tolist() for name in ('path', 'label')))]

    def counted(self):
        """How many of the five neighbours count for each query; None if the index is unknown."""
        shown = Counter(label for _, label in self.index)
        return None if self.vectors is None else [min(5, shown[label]) for label in self.queries['label']]


def read_run(name, folder):
    """The Run of a folder; ValueError if its files do not fit each other."""
    queries, vectors = read_queries(folder), read_vectors(folder)
    if vectors is not None and len(vectors['query']) != len(queries):
        raise InputError(printable(f'{folder} has {len(queries):,} queries but {len(vectors["query"]):,} query vectors: save '
                                   f'both again by utilities.save_results.'))
    return Run(name, settings_of(folder), queries, vectors)


def settings_of(folder):
    """{setting: text} of a run: what its weights say of their origin, and its config.json."""
    config, facts = {}, {}
    with suppress(OSError, ValueError):
        config = json.loads((folder / 'config.json').read_text('utf-8'))
    with suppress(OSError, SafetensorError), safe_open(folder / 'model.safetensors', 'np') as file:
        facts = {name: literal(text, list, str, float) for name, text in (file.metadata() or {}).items() if name in FACTS}
    return {printable(str(name)): setting_text(value) for name, value in (facts | config).items()}


def setting_text(value):
    """A setting as text; a list of runs by their names."""
    if isinstance(value, list) and value and all(isinstance(run, dict) and 'run' in run for run in value):
        value = ', '.join(str(run['run']) for run in value)
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# Comparisons

def score_matrix(runs, images):
    """float (runs, images): each run's precision of its queries, NaN elsewhere."""
    scores = np.full((len(runs), len(images.paths)), np.nan)
    for row, run in zip(scores, runs):
        row[images.of(run.found())] = run.precision
    return scores


def compare_pairs(scores, labels):
    """{(a, b): (gain, low, high)} of all pairs of runs: mean of b - a on the queries that count in both, with its 95 %
    interval as of paired_bootstrap. Pairs with the same queries share the draws."""
    together, found = defaultdict(list), {}
    for pair in combinations(range(len(scores)), 2):
        together[np.flatnonzero(~np.isnan(scores[list(pair)]).any(0)).tobytes()].append(pair)
    for shared, pairs in together.items():
        shared = np.frombuffer(shared, int)
        gains = np.stack([scores[b, shared] - scores[a, shared] for a, b in pairs])
        for pair, gain, ends in zip(pairs, gains, intervals(gains, [labels[image] for image in shared])):
            found[pair] = mean(gain), *ends
    return found


def choose_pair(count, pairs):
    """(A, B) to begin with, of runs from best to worst: B is the best, A the best of those that B clearly improves (the
    interval excludes 0), else the second best; None if there is one run only."""
    clear = [b for (a, b), (_, _, high) in pairs.items() if a == 0 and high < 0]
    return min(clear, default=1 if count > 1 else None), 0


def mean(numbers):
    """The mean of the numbers that are not NaN; NaN without any."""
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if len(numbers) else math.nan


# Images

class Images:
    """All images of the page, each once: paths (several of one image that lies in several data folders) and labels."""

    def __init__(self):
        self.paths, self.labels, self.known = [], [], {}  # known: {(path, label): number}

    def add(self, run):
        """Numbers a run's images. If it shares none with those before, the same label and file name is the same image, unless
        several have it."""
        pairs = dict.fromkeys([*run.found(), *(pair for rank in RANKS for pair in run.found(rank) if pair[0]), *run.index])
        same = {}
        if not any(pair in self.known for pair in pairs):
            ours, theirs = by_file(self.known), by_file({pair: pair for pair in pairs})
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
        """What the page says of them: texts, each once, and the place of its text for each image."""
        paths = [printable(paths[0]).rpartition('/') for paths in self.paths]
        folders, labels = ({text: place for place, text in enumerate(dict.fromkeys(texts))} for texts in (
            [folder + slash for folder, slash, _ in paths], map(printable, map(name_of, self.labels))))
        return {'folders': [*folders], 'labels': [*labels], 'file': [file for _, _, file in paths],
                'folder': [folders[folder + slash] for folder, slash, _ in paths],
                'label': [labels[printable(name_of(label))] for label in self.labels]}


def by_file(numbered):
    """{(label, file name): number} of {(path, label): number}, without what several have."""
    found = defaultdict(set)
    for (path, label), number in numbered.items():
        found[label, os.path.basename(path)].add(number)
    return {file: numbers.pop() for file, numbers in found.items() if len(numbers) == 1}


def choose_thumbnails(runs, images, scores):
    """Numbers of at most THUMBNAILS images, the most needed first: the queries that runs differ in most, at most half of
    all; then their neighbours, the most shown first; then the other queries, and the other images."""
    present = np.where(np.isnan(scores), -1, scores)
    queries = images.of(dict.fromkeys(pair for run in runs for pair in run.found()))
    queries = dict.fromkeys(queries[np.argsort(-np.ptp(present[:, queries], axis=0), kind='stable')].tolist())
    first = [*queries][:THUMBNAILS // 2]
    shown = Counter(near for run in runs for rank in RANKS for query, near in zip(
        images.of(run.found()).tolist(), images.of(run.found(rank)).tolist()) if near >= 0 and query in {*first})
    order = dict.fromkeys([*first, *(image for image, _ in shown.most_common()), *queries, *range(len(images.paths))])
    return [*order][:THUMBNAILS]


def draw_thumbnails(images, chosen):
    """The pictures of all images: base64 of WebP, '' for those that are not chosen, 0 for those that cannot be read, whose
    number is printed."""
    files = [next(filter(os.path.exists, images.paths[image]), images.paths[image][0]) for image in chosen]
    dataset = ImageDataset(pd.DataFrame({'path': files, 'label': ''}, dtype=object), THUMBNAIL, max_unreadable=len(files))
    pictures, drawn = [''] * len(images.paths), []
    for batch in progress_bar(loader(dataset, 64), 'thumbnails', leave=False):
        drawn += map(as_webp, batch['image'])
    for image, picture, bad in zip(chosen, drawn, dataset.bad.tolist()):
        pictures[image] = 0 if bad else picture
    if bad := dataset.unreadable:
        print(printable(f'{len(bad):,} of {len(files):,} images could not be read, first {bad[0]}; the page shows a cross.'))
    return pictures


def as_webp(image):
    """uint8 (3, s, s) -> base64 of a WebP file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, 'WEBP', quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()


# The page

def draw_maps(runs, images, order):
    """{run: its map, or None without vectors}: images and their places, 0…999; t-SNE for the first of `order`, as many as
    TSNE_POINTS allow, and PCA for the others."""
    maps, left = {}, TSNE_POINTS
    for place in order:
        run = runs[place]
        if run.vectors is None:
            maps[place] = None
            continue
        parts = run.found(), run.index
        splits = {part: pd.DataFrame(pairs, columns=['path', 'label']) for part, pairs in zip(PARTS, parts)}
        sample = sample_images(splits, MAP_POINTS, np.random.default_rng(SEED))
        rows = [*zip(sample['part'], sample['row'])]
        points = check_finite(np.stack([run.vectors[PARTS[part]][row] for part, row in rows]).astype(np.float32))
        tsne = len(points) <= left and enough_for_tsne(points)
        left -= len(points) * tsne
        x, y = (999 * on_plane(points, SEED, tsne)).round().astype(int).T.tolist()
        maps[place] = {'method': 't-SNE' if tsne else 'PCA', 'x': x, 'y': y,
                       'image': images.of(parts[part][row] for part, row in rows).tolist(),
                       'all': len({*parts[0], *parts[1]})}
    return maps


def run_table(run, images):
    """What the page says of a run."""
    (low, high), = intervals([run.precision], run.queries['label'])
    near = np.stack([images.of(run.found(rank)) for rank in RANKS], 1)
    far = run.queries[[f'distance{rank}' for rank in RANKS]].to_numpy(float)
    return {'name': printable(run.name), 'settings': run.settings, 'mp5': mean(run.precision), 'low': low, 'high': high,
            'query': images.of(run.found()).tolist(), 'precision': run.precision.tolist(), 'counted': run.counted(),
            'near': near.ravel().tolist(), 'far': (100 * np.nan_to_num(far)).round().astype(int).ravel().tolist()}


def rounded(value):
    """Data as JSON can hold them: floats with four digits, NaN as None."""
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [*map(rounded, value)] if isinstance(value, (list, tuple)) else value


def as_data(value):
    """Data as JSON that is only text to HTML, whatever names it holds."""
    text = json.dumps(rounded(value), allow_nan=False, separators=(',', ':'))  # ASCII: also U+2028 is escaped
    return text.replace('<', r'\u003c').replace('>', r'\u003e').replace('&', r'\u0026')
