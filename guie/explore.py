"""Explore: one page, which needs no server, on which people compare what several runs find for each query."""
import html
import json
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from guie.errors import InputError, MissingError
from guie.files import printable, user_path, write_text
from guie.maps import PARTS, check_finite, enough_for_tsne, on_plane, sample_images
from guie.results import read_queries, read_vectors, settings_of
from guie.scores import intervals
from guie.thumbnails import Images, choose_thumbnails, draw_thumbnails

TEMPLATE = Path(__file__).with_name('explore.html')
MAP_POINTS = 2000
TSNE_POINTS = 4000  # of all maps together: a map of 2,000 takes about 7 seconds
RANKS = [f'_{rank}' for rank in range(1, 6)]  # ends of the columns of queries.csv
SEED = 5
OF_A_RUN = ('model.safetensors', 'config.json', 'scores.csv')
ORIGIN = ('method', 'ingredients')  # settings that do not come from a Config


def explore(out_dir, path='explore.html'):
    """Writes one page, which needs no server or network, to compare runs query by query -> Page, which a notebook shows.
    out_dir: a folder with runs up to four levels below, or a list of such folders or of runs; a run needs queries.csv, and
    vectors.npz for its map. path: the page; a relative one is below out_dir, or the current folder for a list. Runs are
    compared on the queries that they share: the same path and label or, where two runs share none, the same label and file
    name. At most 2,000 thumbnails and 2,000 places on a map, and t-SNE for the first maps alone, keep it small. Images that
    cannot be read are printed and marked. FileNotFoundError without a run that has queries.csv; OSError if the page cannot
    be written."""
    folders, root = folders_of(out_dir)
    runs = sound_runs(folders)
    runs.sort(key=lambda run: -np.nan_to_num(mean(run.precision), nan=-1))
    samples, images = [*map(sample_of, runs)], Images()
    for run, sample in zip(runs, samples):
        images.add([*run.found(), *(pair for rank in RANKS for pair in run.found(rank)), *(pair for *_, pair in sample)])
    found = [(images.of(run.found()), np.stack([images.of(run.found(rank)) for rank in RANKS], 1)) for run in runs]
    scores = np.full((len(runs), len(images.paths)), np.nan)
    for row, run, (queries, _) in zip(scores, runs, found):
        row[queries] = run.precision
    pairs = compare_pairs(scores, images.labels)
    chosen = choose_pair(len(runs), pairs)
    maps = draw_maps(runs, samples, images, sorted(range(len(runs)), key=lambda place: place not in chosen))
    pictures = draw_thumbnails(images, choose_thumbnails(found, scores))
    page = root / user_path(path)
    data = {'title': printable(page.absolute().parent.name), 'choice': chosen,
            'runs': [run_table(run, *found[place]) | {'map': maps[place]} for place, run in enumerate(runs)],
            'pairs': {f'{a} {b}': pair for (a, b), pair in pairs.items()},
            'images': images.table() | {'picture': pictures}}
    text = TEMPLATE.read_text('utf-8').replace('>DATA<', f'>{as_data(data)}<')
    write_text(page, text)
    print(printable(f'{page}: {len(runs)} run{"s" * (len(runs) > 1)}, {len(pictures):,} images, {len(text) / 1e6:.1f} MB; '
                    f'open it in a browser; it needs no network'))
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
    several = isinstance(out_dir, (list, tuple))
    roots = [user_path(root) for root in (out_dir if several else [out_dir])]
    folders = {folder.absolute(): folder for root in roots for folder in runs_below(root) or [root]}.values()
    root = Path() if several else roots[0]
    above = None if several else root.absolute()
    with_queries = [folder for folder in folders if (folder / 'queries.csv').is_file()]
    without = [named(folder, above) for folder in folders if folder not in with_queries]
    if not with_queries:
        raise MissingError(printable(f'{out_dir} holds no run with queries.csv: run the notebooks, which write it, or '
                                     f'utilities.save_results.'))
    if without:
        print(printable(f'Left out, since they hold no queries.csv: {", ".join(without)}; run their notebooks again, or '
                        f'utilities.save_results.'))
    names = [named(folder, above) for folder in with_queries]
    return {name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, with_queries)}, root


def runs_below(root):
    """The folders of runs in a folder, up to four levels below, sorted; without stages and states."""
    found = {file.parent for name in ('queries.csv', *OF_A_RUN) for depth in range(5)
             for file in root.glob('*/' * depth + name)}
    return sorted(folder for folder in found if 'state' not in folder.relative_to(root).parts
                  and not folder.name.startswith(f'{folder.parent.name}-stage-'))


def named(folder, root):
    """A run's name: its folder's, with those below root (None: none) that it lies in."""
    folder = folder.absolute()
    inside = root and folder != root and folder.is_relative_to(root)
    return folder.relative_to(root).as_posix() if inside else folder.name


@dataclass(frozen=True)
class Run:
    """A run: its name, {setting: text}, queries.csv, and vectors.npz or None."""
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
        known = self.vectors or {'index_paths': np.array([]), 'index_labels': np.array([])}
        return [*zip(known['index_paths'].tolist(), known['index_labels'].tolist())]

    def found(self, rank=''):
        """The (path, label) of its queries or, with a rank, of the neighbour that each has there; '' where there is none."""
        return [*zip(*(self.queries[name + rank].tolist() for name in ('path', 'label')))]


def sound_runs(folders):
    """[Run] of folders {name: folder}. One with damaged files is printed and left out; if none is left, ValueError."""
    runs, problems = [], []
    for name, folder in folders.items():
        try:
            runs.append(read_run(name, folder))
        except InputError as error:
            problems.append(error)
    if not runs:
        raise problems[0]
    for problem in problems:
        print(f'Left out: {problem}')
    return runs


def read_run(name, folder):
    """The Run of a folder; ValueError if its files do not fit each other."""
    queries, vectors = read_queries(folder), read_vectors(folder)
    if vectors is not None and len(vectors['query']) != len(queries):
        raise InputError(printable(f'{folder} has {len(queries):,} queries but {len(vectors["query"]):,} query vectors: '
                                   f'save both again by utilities.save_results.'))
    return Run(name, told_by(folder), queries, vectors)


def told_by(folder):
    """{setting: text} of a run: what its weights say (settings_of) or, without them, its config.json."""
    told = {}
    with suppress(OSError, ValueError, LookupError):
        told = settings_of(folder)
    if {*told} <= {*ORIGIN}:
        with suppress(OSError, ValueError, TypeError):
            told = told | dict(json.loads((folder / 'config.json').read_text('utf-8')))
    return {printable(str(name)): printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for name, value in told.items()}


# Comparisons

def compare_pairs(scores, labels):
    """{(a, b): (gain, low, high)} of all pairs of runs: mean of b - a on the queries that count in both, with its 95 %
    interval as of paired_bootstrap. Pairs with the same queries share the draws. scores: precision, float (runs, images),
    NaN where there is none; labels: of the images."""
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


# The page

def sample_of(run):
    """[(part, row in it, (path, label))] of at most MAP_POINTS of a run's images; part: 0 query, 1 index. [] if its vectors
    are unknown."""
    if run.vectors is None:
        return []
    parts = run.found(), run.index
    sample = sample_images({part: pd.DataFrame(pairs, columns=['path', 'label']) for part, pairs in zip(PARTS, parts)},
                           MAP_POINTS, np.random.default_rng(SEED))
    return [(part, row, parts[part][row]) for part, row in zip(sample['part'].tolist(), sample['row'].tolist())]


def draw_maps(runs, samples, images, order):
    """{run: its map, or None without vectors}: images and their places, 0…999; t-SNE for the first of `order`, as many as
    TSNE_POINTS allow, and PCA for the others."""
    from threadpoolctl import threadpool_limits
    maps, given, left = dict.fromkeys(order), {}, TSNE_POINTS
    for place in order:
        if samples[place]:
            vectors = runs[place].vectors
            points = check_finite(np.stack([vectors[PARTS[part]][row] for part, row, _ in samples[place]]))
            tsne = len(points) <= left and enough_for_tsne(points)
            left -= len(points) * tsne
            given[place] = points, SEED, tsne
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread a map
        planes = pool.map(lambda arguments: on_plane(*arguments), given.values())
        for (place, (*_, tsne)), plane in zip(given.items(), planes):
            x, y = (999 * plane).round().astype(int).T.tolist()
            maps[place] = {'method': 't-SNE' if tsne else 'PCA', 'x': x, 'y': y,
                           'all': len({*runs[place].found(), *runs[place].index}),
                           'image': images.of(pair for *_, pair in samples[place]).tolist()}
    return maps


def run_table(run, queries, near):
    """What the page says of a run; numbers of its queries (q,) and of their neighbours (q, 5)."""
    (low, high), = intervals([run.precision], run.queries['label'])
    far = run.queries[[f'distance{rank}' for rank in RANKS]].to_numpy(float)
    return {'name': printable(run.name), 'mp5': mean(run.precision), 'low': low, 'high': high,
            'origin': {name: text for name, text in run.settings.items() if name in ORIGIN},
            'config': {name: text for name, text in run.settings.items() if name not in ORIGIN},
            'query': queries.tolist(), 'precision': run.precision.tolist(),
            'counted': run.queries['relevant'].clip(upper=len(RANKS)).astype(int).tolist(),
            'near': near.ravel().tolist(), 'far': (100 * np.nan_to_num(far)).round().astype(int).ravel().tolist()}


def rounded(value):
    """Data as JSON can hold them: floats with six digits, NaN as None."""
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [*map(rounded, value)] if isinstance(value, (list, tuple)) else value


def as_data(value):
    """Data as JSON that is only text to HTML, whatever names it holds."""
    text = json.dumps(rounded(value), allow_nan=False, separators=(',', ':'))  # ASCII: also U+2028 is escaped
    return text.replace('<', r'\u003c').replace('>', r'\u003e').replace('&', r'\u0026')
