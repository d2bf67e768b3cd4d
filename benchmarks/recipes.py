"""Recipes against each other: the same photographs seen, several seeds, never-seen objects.

    python benchmarks/recipes.py                                    # the emoji world, about 2 minutes a run on a quiet core
    python benchmarks/recipes.py --photos FOLDER                    # and photographs, with both towers
    python benchmarks/recipes.py --recipes place4 hi-res --seeds 5 --epochs 1

FOLDER holds train.csv, query.csv and index.csv (path,label). Every run is one line of <out>/results.csv, added when it
is done; a run that has its line is not made again, so the bench may be stopped at any time. Prints markdown tables of mP@5,
mean ± standard deviation over the seeds: at the head's full width, at 64 dimensions (d64), and d64 less that of place4,
seed by seed. What is done after training is for any recipe, and has columns of its own, to be compared within them only:
overlapping patches (half of the side) where they do not overlap yet, and test-time augmentation, the mean of photograph and
mirror image at 1 and 1.5 times the side.
"""
import argparse
import copy
import json
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import photographs  # noqa: E402

import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402

SIZES = {'miniature': 64, 'efficientnet': 160}
SETTING = ['world', 'tower', 'image_size', 'epochs', 'max_images']
SCORES = [f'{width}{after}' for after in ('', ', overlap', ', test-time') for width in ('full', 'd64')]


def configuration(tower, out, arguments):
    """The Config of place4 for one of the towers."""
    if tower == 'miniature':
        fields = demo.settings({})
    else:
        fields = photographs.TOWERS[tower][0] | {'pretrained': str(out / 'efficientnet_lite0.safetensors')}
        if not Path(fields['pretrained']).exists():
            photographs.imagenet_weights(Path(fields['pretrained']))
    sizes = {'image_size': arguments.image_size or SIZES[tower], 'max_images': arguments.max_images}
    return utilities.Config(**fields).override(epochs=arguments.epochs, pca_images=1000, **sizes)


def evaluate(model, frames, test_time):
    """{name of SCORES: mP@5 on never-seen objects}."""
    models = {'': model}
    if test_time:
        models[', test-time'] = utilities.Submission([model], flip=True, sizes=(1, 1.5))
        models[', test-time'].spec = replace(model.spec, image_size=model.spec.image_size * 3 // 2)
    scores, tower = {}, model.tower
    if isinstance(tower, utilities.VisionTransformer) and tower.conv1.stride == tower.conv1.kernel_size:
        models[', overlap'] = copy.deepcopy(model)
        utilities.resize(models[', overlap'], model.spec.image_size, .5)
    for suffix, one in models.items():
        vectors = utilities.embed_all(one, frames)
        width, narrow = utilities.score_table('', '', vectors, frames)['mp5']
        scores |= {f'full{suffix}': width, f'd64{suffix}': narrow}
    return {name: scores.get(name) for name in SCORES}


def run(config, recipe, seed, frames, folder, test_time):
    """One run: its scores, photographs seen, and seconds of training."""
    started = time.time()
    if recipe == 'untrained':
        model, seen = utilities.Embedder(utilities.new_model(config, 1).tower), 0
    else:
        name, *changes = recipe.split(',')
        changes = {field: json.loads(value) for field, value in (change.split('=') for change in changes)}
        config = config.override(seed=seed, head_seed=seed).follow(name).override(**changes)
        model = utilities.new_model(config, frames['train']['label'].nunique())
        shutil.rmtree(folder, ignore_errors=True)
        utilities.fit_stages(config, model, frames['train'], folder)
        shutil.rmtree(folder / 'state')
        seen = sum(stage.epochs for stage in config.each_stage()) * len(frames['train'])
    seconds = time.time() - started
    return evaluate(model, frames, test_time) | {'photographs': seen, 'seconds': round(seconds)}


def once(line, file, make):
    """Adds line | make() to a CSV, unless it has this line already; what is untrained has no seed."""
    names = [name for name in line if name != 'seed' or line['recipe'] != 'untrained']
    before = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=list(line))
    if not (before[names] == pd.Series(line)[names]).all(axis=1).any():
        made = pd.DataFrame([line | make()])
        utilities.write_text(file, (pd.concat([before, made]) if len(before) else made).to_csv(index=False))


def table(results):
    """Markdown lines for every world, tower and setting."""
    for key, group in results.groupby(SETTING, sort=False):
        reference = group[group['recipe'] == 'place4'].set_index('seed')['d64']
        yield f'\n{", ".join(f"{name} {value}" for name, value in zip(SETTING, key))}: '
        yield f'{group["photographs"].max():,} photographs seen\n'
        yield f'| recipe | {" | ".join(SCORES)} | d64 less place4, paired | seeds | s |'
        yield '| --- ' * (len(SCORES) + 4) + '|'
        for recipe, rows in group.groupby('recipe', sort=False):
            scores = [spread(rows[name]) for name in SCORES]
            apart = spread((rows.set_index('seed')['d64'] - reference).dropna(), '+') if recipe != 'place4' else '–'
            cells = [recipe, *scores, apart, str(len(rows)), f'{rows["seconds"].mean():.0f}']
            yield f'| {" | ".join(cells)} |'


def spread(values, sign=''):
    """'mean ± standard deviation', without the latter for one value."""
    if values.isna().all():
        return '–'
    return f'{values.mean():{sign}.3f}' + (f' ± {values.std():.3f}' if len(values) > 1 else '')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipes', nargs='+', default=['untrained', *utilities.RECIPES], metavar='RECIPE',
                        help=f"{', '.join(['untrained', *utilities.RECIPES])}; also with other values of a Config's fields "
                             "as JSON, like 'place4,sampling=\"classes\"'")
    parser.add_argument('--seeds', type=int, nargs='+', default=[5, 6, 7])
    parser.add_argument('--photos', type=Path)
    parser.add_argument('--worlds', nargs='+', default=['emoji', *SIZES], choices=['emoji', *SIZES],
                        help='the emoji world, or the tower on photographs')
    parser.add_argument('--epochs', type=int, default=2, help='even, so that two stages share them')
    parser.add_argument('--image-size', type=int, help=f'instead of {SIZES}')
    parser.add_argument('--max-images', type=int, default=50, help='photographs of a class')
    parser.add_argument('--no-test-time', action='store_true', help='leave out the columns with test-time augmentation')
    parser.add_argument('--out', type=Path, default=Path('runs/recipes'))
    arguments = parser.parse_args()
    worlds = [('emoji', 'miniature', demo.sources())] if 'emoji' in arguments.worlds else []
    if arguments.photos:
        sources = {name: str(arguments.photos / f'{name}.csv') for name in ('train', 'query', 'index')}
        worlds += [('photographs', tower, sources) for tower in SIZES if tower in arguments.worlds]
    file = arguments.out / 'results.csv'
    for seed in arguments.seeds:  # all recipes of one seed first
        for world, tower, sources in worlds:
            config = configuration(tower, arguments.out, arguments)
            frames = utilities.load_data(**sources, config=config)
            for recipe in arguments.recipes:
                setting = [world, tower, config.image_size, config.epochs, config.max_images]
                line = dict(zip(SETTING, setting)) | {'recipe': recipe, 'seed': seed}
                if tower == 'efficientnet' and recipe == 'overlap':
                    print('efficientnet: a convolution has no patches that could overlap')
                else:
                    folder = arguments.out / '_'.join(map(str, line.values()))
                    once(line, file, partial(run, config, recipe, seed, frames, folder, not arguments.no_test_time))
    print(*table(pd.read_csv(file)), sep='\n')
