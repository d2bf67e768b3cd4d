"""The README's pictures of results, from what `make demo` left under runs/demo: media/queries.png, media/scores.png and
media/explore.png, which needs playwright and Chromium.

    python tools/pictures.py
"""
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402
from guie.pictures import find_five  # noqa: E402
from guie.projection import project  # noqa: E402
from guie.results import read_vectors  # noqa: E402

PARTS = ('pca', 'query', 'index')


def kept_vectors(folder):
    """{part: (n, d)} that a notebook saved."""
    return {part: np.load(folder / f'{part}.npz')['vectors'] for part in PARTS}


def models(runs=demo.RUNS):
    """{(stage, name): (query, index) at 64 dimensions} of the demo's models."""
    found = {}
    for tower in ('vit_h_224', 'vit_l_336'):
        found['untrained', tower] = kept_vectors(runs / 'vectors' / f'untrained_{tower}')
        for run in sorted(runs.glob(f'{tower}_*')):
            found['ingredient', run.name] = kept_vectors(run / 'vectors')
        found['soup', f'soup of {tower}'] = kept_vectors(runs / f'soup_{tower}' / 'vectors')
    soups = [vectors for (stage, _), vectors in found.items() if stage == 'soup']
    found['ensemble', 'both soups'] = {part: utilities.concatenate([soup[part] for soup in soups]) for part in PARTS}
    points = {key: project(vectors) for key, vectors in found.items()}
    kept = read_vectors(runs / 'zero_shot')  # by the PCA of texts
    points['zero-shot', 'PCA of names'] = kept['query'], kept['index']
    return {key: points[key] for key in sorted(points, key=lambda key: demo.STAGES.index(key[0]))}


def save(figure, path):
    """Writes a figure as a PNG of at most 256 colours."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    save_small(picture, path)


def save_small(file, path):
    """Writes a picture as a PNG of at most 256 colours."""
    with Image.open(file) as picture:
        small = picture.convert('RGB').quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def draw_queries(splits, projected, path, seed=5):
    """The same five random queries and their five nearest images by three models; green: the same object, red: another,
    grey: another where the index has no more."""
    shown = {'before training': ('untrained', 'vit_h_224'), 'one ingredient': ('ingredient', 'vit_h_224_none'),
             'the ensemble': ('ensemble', 'both soups')}
    chosen = np.random.default_rng(seed).choice(len(splits['query']), 5, replace=False)
    figure = plt.figure(figsize=(13, 4))
    panels = figure.subfigures(1, 1 + len(shown), width_ratios=[1.15, 5, 5, 5], wspace=0)
    paths = splits['index']['path'].to_numpy()

    def fill(panel, title, rows):
        panel.suptitle(title, fontsize=11)
        axes = panel.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw={'wspace': .08, 'hspace': .08})
        panel.subplots_adjust(left=.03, right=.97, bottom=.01, top=.9)
        for axis, (file, colour) in zip(axes.flat, sum(rows, [])):
            axis.imshow(utilities.read_image(file, 96))
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(color=colour, linewidth=2.5)

    fill(panels[0], 'query', [[(splits['query']['path'].iloc[query], 'black')] for query in chosen])
    for panel, (title, key) in zip(panels[1:], shown.items()):
        five = find_five(splits, dict(zip(('query', 'index'), projected[key])), chosen)
        fill(panel, title, [list(zip(*row)) for row in zip(paths[five.places], five.colours)])
    save(figure, path)


def draw_scores(splits, projected, path):
    """mP@5 of every model, with the 95 % interval over the kinds of object."""
    rows = [utilities.score_table(stage, f'{stage}: {name}', {'query': query, 'index': index}, splits, dims=(None,))
            for (stage, name), (query, index) in projected.items()]
    utilities.plot_scores(pd.concat(rows))
    save(plt.gcf(), path)


def draw_page(page, path):
    """What a browser shows first of the page of explore."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        tab = browser.new_page(viewport={'width': 1100, 'height': 700})
        tab.goto(page.absolute().as_uri())
        tab.wait_for_selector('img')
        save_small(io.BytesIO(tab.screenshot()), path)


def main():
    world = demo.make_world(demo.RUNS / 'world')
    splits = {part: utilities.read_dataset(world / f'{part}.csv') for part in ('query', 'index')}
    projected = models()
    draw_queries(splits, projected, demo.MEDIA / 'queries.png')
    draw_scores(splits, projected, demo.MEDIA / 'scores.png')
    draw_page(demo.RUNS / 'explore.html', demo.MEDIA / 'explore.png')


if __name__ == '__main__':
    main()
