"""How cost grows with the work: seconds and memory of each part at sizes ten times apart, the competition's and beyond.

    python benchmarks/growth.py [--only listing,PCA] [--picture media/growth.png]

Sizes are images, or what a part counts instead. Inputs are random vectors, empty files and one small JPEG, and the miniature
tower. The exponent is that of the last step of ten: 1 is linear. Memory is the largest RssAnon beyond what was there before
(mapped files do not count). Prints a markdown table; --picture draws it.
"""
import math
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import timing  # noqa: E402
from listing import write_set  # noqa: E402

import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402
from guie.checkpoints import save_state  # noqa: E402
from guie.collection import Collection, cache_folders, find_images, hash_of, state_of, write_part  # noqa: E402
from guie.search import found_in  # noqa: E402
from guie.splits import Splits  # noqa: E402

MINIATURE = ('local-dir:media/miniature', 'miniature', 64)
REPEATED = .2  # seconds: what takes less is measured five times, and the median counts


def unit_rows(count, width, seed=0):
    """Random unit vectors float32 (count, width)."""
    return utilities.l2_normalise(np.random.default_rng(seed).standard_normal((count, width), np.float32))


def names(count, each=10):
    """DataFrame path, label, domain of images that need not exist, `each` a class."""
    paths, labels = [f'/images/{row}.jpg' for row in range(count)], (np.arange(count) // each).astype(str)
    return pd.DataFrame({'path': paths, 'label': labels, 'domain': 'all'})


def photographs(count, folder):
    """names() of as many JPEGs of 320 × 240, which are there: links to one file in folders of 1,000."""
    file = folder / 'one.jpg'
    demo.Image.fromarray(demo.draw_view('1F41D', np.random.default_rng(0), 96, .8)).resize((320, 240)).save(file)
    frame = names(count)
    for row in range(count):
        place = folder / f'{row // 1000:03}' / f'{row}.jpg'
        place.parent.mkdir(exist_ok=True)
        place.hardlink_to(file)
        frame.loc[row, 'path'] = str(place)
    return frame


# Each part: (size, empty folder) -> the work to measure, a function without arguments

def listing(size, folder):
    write_set(folder, size, 1)
    return partial(utilities.read_dataset, folder)


def reading(size, folder):
    (folder / '0.jpg').touch()  # the others need not exist
    with open(folder / 'set.csv', 'w') as file:
        file.write('path,label\n')
        file.writelines(f'{row}.jpg,{row // 100}\n' for row in range(size))
    return partial(utilities.read_dataset, folder / 'set.csv')


def selection(size, folder):
    return partial(utilities.select_classes, names(size), n_classes=35_000)


def embedding(size, folder):
    frame, model = photographs(size, folder), utilities.Embedder(utilities.load_image_tower(*MINIATURE))
    utilities.embed(model, frame.head(10))
    return partial(utilities.embed, model, frame)


def head(size, folder):
    vectors, labels = unit_rows(size, 512), np.arange(size) % (size // 10)
    return partial(utilities.fit_head, vectors, labels, epochs=1)


def pca(size, folder):
    return partial(utilities.fit_pca, unit_rows(size, 512))


def soup(size, folder):
    paths = [folder / f'{number}.safetensors' for number in range(3)]
    for path in paths:
        save_state({str(part): torch.randn(1000, size // 10_000) for part in range(10)}, path)
    return partial(utilities.average_states, paths)


def neighbours(size, folder):
    return partial(utilities.nearest_neighbours, unit_rows(min(5000, size), 64), unit_rows(size, 64, 1), 5)


def scores(size, folder):
    splits = {'query': names(min(5000, size)), 'index': names(size)}
    vectors = {name: unit_rows(len(frame), 64, seed) for seed, (name, frame) in enumerate(splits.items())}
    return partial(utilities.score_table, 'growth', 'random', vectors | {'pca': vectors['index'][:1000]}, splits, dims=[64])


def explore(size, folder):
    frame = photographs(size, folder)
    splits = Splits(query=frame[::2].reset_index(drop=True), index=frame[1::2].reset_index(drop=True))
    for run in ('first', 'second'):
        model = utilities.Embedder(utilities.load_image_tower(*MINIATURE))
        utilities.save_run(folder / 'runs' / run, model)
        points = {name: unit_rows(len(splits[name]), 64, len(run)) for name in ('query', 'index')}
        points['pca'] = unit_rows(100, 64)
        utilities.save_results(folder / 'runs' / run, utilities.score_table('growth', run, points, splits, dims=[8]), points,
                               splits, utilities.fit_pca(points['pca'], 8))
    return partial(utilities.explore, folder / 'runs')


def opening(size, folder):
    images, model = folder / 'images', utilities.Embedder(utilities.load_image_tower(*MINIATURE))
    images.mkdir()
    write_set(images, size, 1)
    frame, root = find_images(images)
    size_and_time = [state_of(path) for path in frame['path']]
    table = pd.DataFrame({'file': frame['file'], 'size': [one for one, _ in size_and_time],
                          'mtime': [one for _, one in size_and_time], 'readable': True})
    place = cache_folders(root, None, '', folder / 'cache')[-1] / f'vectors-{hash_of(model)}'
    write_part(place, table, [unit_rows(size, model.spec.width)], model.spec.width)
    return partial(utilities.Search, model, images, cache=folder / 'cache')


def search(size, folder):
    vectors = np.lib.format.open_memmap(folder / 'vectors.npy', 'w+', np.float32, (size, 64))
    for start in range(0, size, 100_000):
        vectors[start:start + 100_000] = unit_rows(min(100_000, size - start), 64, start)
    images = Collection(pd.DataFrame({'path': np.arange(size)}), np.load(folder / 'vectors.npy', mmap_mode='r'), [])
    return partial(found_in, images, vectors[7] + vectors[11], 5)


PARTS = {  # name: (what is counted, sizes, function)
    'listing class folders': ('files', (1_000, 10_000, 100_000, 1_000_000), listing),
    'reading a CSV': ('rows', (4_000, 40_000, 400_000, 4_000_000), reading),
    'selecting classes': ('rows', (4_000, 40_000, 400_000, 4_000_000), selection),
    'embedding, miniature tower': ('images', (100, 1_000, 10_000), embedding),
    'an epoch of a head, a class ten images': ('images', (300, 3_000, 30_000), head),
    'PCA of 512 numbers to 64': ('images', (2_000, 20_000, 200_000), pca),
    'soup of three': ('weights', (1_000_000, 10_000_000, 100_000_000), soup),
    '5 neighbours of 5,000 queries': ('index images', (2_000, 20_000, 200_000), neighbours),
    'a score with its interval, 5,000 queries': ('index images', (2_000, 20_000, 200_000), scores),
    'explore, two runs': ('images', (40, 400, 4_000), explore),
    'Search: opening a known folder': ('images', (1_000, 10_000, 100_000), opening),
    'Search: one query': ('images', (10_000, 100_000, 1_000_000, 10_000_000), search)}


def measure(name, size):
    """{'part', 'size', 'seconds', 'bytes'} of a part at one size."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        work = PARTS[name][2](size, Path(folder))
        before = timing.anonymous_memory()
        facts, _ = timing.measured(work)
        if facts['seconds'] < REPEATED:
            facts['seconds'] = float(np.median([timing.measured(work)[0]['seconds'] for _ in range(5)]))
        del work
        shutil.rmtree(folder, ignore_errors=True)
    return {'part': name, 'size': size, 'seconds': facts['seconds'], 'bytes': max(0, facts['bytes'] - before)}


def exponent(rows):
    """Of the last step of ten in a part's rows."""
    first, second = rows[-2:]
    return math.log(second['seconds'] / first['seconds']) / math.log(second['size'] / first['size'])


def draw(rows, path):
    """Seconds against size, both logarithmic, a line a part."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(9, 5.5), layout='constrained')
    markers = iter('osv^<>DpPX*h')
    for name, (what, *_) in PARTS.items():
        if some := [row for row in rows if row['part'] == name]:
            axes.loglog(*([row[column] for row in some] for column in ('size', 'seconds')), marker=next(markers),
                        label=f'{name} ({what})')
    low, high = axes.get_xlim()
    axes.loglog((low, high), (1e-6 * low, 1e-6 * high), ':', color='grey', label='linear')
    axes.set(xlabel='size', ylabel='seconds', title='How cost grows')
    axes.grid(alpha=.3)
    figure.legend(loc='outside right upper', fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main():
    options = timing.arguments(__doc__, repeats=1, only=(str, '', 'parts whose names contain one of these words'),
                               picture=(Path, None, 'where the picture goes'))
    started, rows = time.time(), []
    words = options.only.split(',')
    for name, (_, sizes, _) in PARTS.items():
        if any(word in name for word in words):
            measure(name, sizes[0])  # imports what it needs
            rows += [measure(name, size) for size in ([size // 50 for size in sizes[1:3]] if options.quick else sizes)]
            print(f'{name}: {time.time() - started:.0f} s', file=sys.stderr, flush=True)
    print(f'\n{options.threads} threads; {time.time() - started:.0f} s in all\n\n| part | size: seconds, MB | exponent |\n'
          f'| --- | --- | --- |')
    for name, (what, *_) in PARTS.items():
        if some := [row for row in rows if row['part'] == name]:
            cells = '; '.join(f'{row["size"]:,}: {row["seconds"]:.3g} s, {row["bytes"] / 1e6:.0f} MB' for row in some)
            print(f'| {name} ({what}) | {cells} | {exponent(some):.2f} |')
    if options.picture:
        draw(rows, options.picture)


if __name__ == '__main__':
    main()
