"""Recipes against each other: the same images seen, several seeds, never-seen objects.

    python benchmarks/recipes.py                                    # the emoji world, about a minute a run on a quiet core
    python benchmarks/recipes.py --images FOLDER                    # and your own images, with both towers, and both worlds
    python benchmarks/recipes.py --recipes place4 hi-res --seeds 5 --epochs 1

FOLDER holds train.csv, query.csv and index.csv (path,label). A finished run adds its lines to <out>/results.csv and is not
run again, so the benchmark may be stopped at any time. Prints markdown tables of mP@5, mean ± standard deviation over the
seeds: on the selection objects at 64 dimensions, to choose a recipe by; on never-seen objects, to report on, at the head's
full width and at 64 dimensions (d64); the gain in d64 over place4, seed by seed, with its 95 % interval over kinds of object
(paired bootstrap of the seeds' mean). Three things may follow training with any recipe, and have lines of their own: patches
that overlap by half of their side, if they do not overlap yet; 3/2 of the side, if the recipe trained at no other; and
test-time augmentation, the mean of an image and its mirror image at 1 and 1.5 times the side.
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

import numpy as np
import pandas as pd
from open_clip.transformer import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import own_images  # noqa: E402

import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402
from guie.files import write_text  # noqa: E402
from guie.model import resize  # noqa: E402
from guie.projection import project  # noqa: E402
from guie.recipes import follow_recipe  # noqa: E402
from guie.splits import Splits  # noqa: E402

WORLDS = {'emoji': ('emoji', 'miniature'), 'miniature': ('own images', 'miniature'),
          'efficientnet': ('own images', 'efficientnet'), 'both': ('emoji and own images', 'miniature')}
SIZES = {'miniature': 64, 'efficientnet': 160}
SETTING = ['world', 'tower', 'image_size', 'epochs', 'max_images']
SCORES = ['selection', 'full', 'd64']


def configuration(tower, out, arguments):
    """The Config of place4 for one of the towers."""
    if tower == 'miniature':
        fields = demo.settings({'layer_lrs': ((6, 1e-4),)})  # as large as two epochs bear
    else:
        fields = own_images.TOWERS[tower][0] | {'pretrained': str(out / 'efficientnet_lite0.safetensors')}
        if not Path(fields['pretrained']).exists():
            own_images.imagenet_weights(Path(fields['pretrained']))
    sizes = {'image_size': arguments.image_size or SIZES[tower], 'max_images': arguments.max_images}
    return utilities.Config(**fields).override(epochs=arguments.epochs, pca_images=1000, **sizes)


def load_world(world, folder, config):
    """The splits of a run; of two worlds together, each is a domain."""
    sources = {'emoji': demo.sources(), 'own images': folder and {
        name: str(folder / f'{name}.csv') for name in ('train', 'query', 'index')}}
    worlds = {name: utilities.load_data(**sources[name], config=config) for name in world.split(' and ')}
    return Splits({
        part: pd.concat([splits[part].assign(domain=name) for name, splits in worlds.items()], ignore_index=True)
        for part in worlds[world.split(' and ')[0]]})


def evaluate(model, splits, folder, test_time, side):
    """[{after, SCORES}]: mP@5 of a model, as it is and with what may follow training. Saves the score of every query at 64
    dimensions in folder/precisions.npz. side: what the recipe was told to train at."""
    tower, here, models = model.tower, model.spec.image_size, {}
    own = 1 - tower.conv1.stride[0] / tower.conv1.kernel_size[0] if isinstance(tower, VisionTransformer) else None
    for larger in (False, True) if here == side else (False,):
        for overlap in (0, .5) if own == 0 else (own or 0,):
            name = ', '.join(['3/2 side'] * larger + ['overlap'] * (own == 0 and overlap > 0))
            models[name] = copy.deepcopy(model)
            resize(models[name], side * 3 // 2 if larger else here, overlap)
    if test_time:
        models['test-time'] = utilities.Submission([model], flip=True, sizes=(1, 1.5))
        models['test-time'].spec = replace(model.spec, image_size=model.spec.image_size * 3 // 2)
    labels = [splits[name]['label'] for name in ('query', 'index')]
    scores, precisions = [], {}
    for after, one in models.items():
        vectors = utilities.embed_all(one, splits, names=('pca', *(
            split + part for split in ('selection_', '') for part in ('query', 'index'))))
        wide, narrow = utilities.score_table('', '', vectors, splits)['mp5']
        chosen = utilities.score_table('', '', vectors, splits, dims=(64,), split='selection_')['mp5'][0]
        scores.append({'after': after} | dict(zip(SCORES, (chosen, wide, narrow))))
        query, index = project(vectors)
        precisions[f'd64 {after}'] = utilities.precision_at_5(query, labels[0], index, labels[1])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / 'precisions.npz', label=np.array(list(map(str, labels[0]))), **precisions)
    return scores


def run(config, recipe, seed, splits, folder, test_time):
    """One run: its scores, images seen, and seconds of training."""
    started, side = time.time(), config.image_size
    if recipe == 'untrained':
        model, seen = utilities.Embedder(utilities.new_model(config, 1).tower), 0
    else:
        name, *changes = recipe.split(',')
        changes = {field: json.loads(value) for field, value in (change.split('=') for change in changes)}
        config = follow_recipe(config.override(seed=seed, head_seed=seed), name).override(**changes)
        shutil.rmtree(folder, ignore_errors=True)
        model = utilities.train(config, splits, folder)
        shutil.rmtree(folder / 'state', ignore_errors=True)
        passes = [(1 + (stage.augmentation == 'flip')) if stage.trains == 'cached head' else stage.epochs
                  for stage in config.each_stage()]  # of the tower over the images
        seen = sum(passes) * len(splits['train'])
    facts = {'images': seen, 'seconds': round(time.time() - started)}
    return [scores | facts for scores in evaluate(model, splits, folder, test_time, side)]


def once(line, file, make):
    """Adds line | row to a CSV for every row of make(), unless it has this line already; untrained models have no seed."""
    names = [name for name in line if name != 'seed' or line['recipe'] != 'untrained']
    before = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=list(line))
    if not (before[names] == pd.Series(line)[names]).all(axis=1).any():
        made = pd.DataFrame([line | row for row in make()])
        write_text(file, (pd.concat([before, made]) if len(before) else made).to_csv(index=False))


def run_folder(out, line):
    """Where a run is written."""
    return out / '_'.join(str(line[name]) for name in [*SETTING, 'recipe', 'seed'])


def against(reference, rows, after, out):
    """The gain over place4 in the seeds of both: mean ± standard deviation, and an interval over kinds of object."""
    seeds = reference.index.intersection(rows.index)
    if not len(seeds) or rows is reference:
        return '–', '–'
    base, ours = ([np.load(run_folder(out, line) / 'precisions.npz') for line in part.loc[seeds].to_dict('records')]
                  for part in (reference, rows))
    first, second = (np.mean([file[f'd64 {name}'] for file in files], 0) for name, files in (('', base), (after, ours)))
    _, low, high = utilities.paired_bootstrap(first, second, ours[0]['label'])
    return spread((rows['d64'] - reference['d64']).dropna(), '+'), f'{low:+.3f} to {high:+.3f}'


def table(results, out):
    """Markdown lines for every world, tower and setting."""
    results = results.fillna({'after': ''}).set_index('seed', drop=False)
    for key, group in results.groupby(SETTING, sort=False):
        runs = dict(list(group.groupby(['recipe', 'after'], sort=False)))
        reference = runs.get(('place4', ''), group.head(0))
        yield f'\n{", ".join(f"{name} {value}" for name, value in zip(SETTING, key))}: '
        yield f'{group["images"].max():,} images seen\n'
        yield f'| recipe | {" | ".join(SCORES)} | d64 less place4, paired | 95 % over kinds | seeds | s |'
        yield '| --- ' * (len(SCORES) + 5) + '|'
        for (recipe, after), rows in runs.items():
            cells = [recipe + (f', then {after}' if after else ''), *(spread(rows[name]) for name in SCORES),
                     *against(reference, rows, after, out), str(len(rows)), f'{rows["seconds"].mean():.0f}']
            yield f'| {" | ".join(cells)} |'


def spread(values, sign=''):
    """'mean ± standard deviation', without the latter for one value."""
    return f'{values.mean():{sign}.3f}' + (f' ± {values.std():.3f}' if len(values) > 1 else '')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipes', nargs='+', default=['untrained', *utilities.RECIPES], metavar='RECIPE',
                        help=f"{', '.join(['untrained', *utilities.RECIPES])}; also with other values of a Config's fields "
                             "as JSON, like 'place4,scale=20'")
    parser.add_argument('--seeds', type=int, nargs='+', default=[5, 6, 7])
    parser.add_argument('--images', type=Path, metavar='FOLDER')
    parser.add_argument('--worlds', nargs='+', default=list(WORLDS), choices=WORLDS,
                        help="emoji, a tower on one's own images, or the miniature on both together")
    parser.add_argument('--epochs', type=int, default=2, help='even, so that two stages share them')
    parser.add_argument('--image-size', type=int, help=f'instead of {SIZES}')
    parser.add_argument('--max-images', type=int, default=50, help='images of a class')
    parser.add_argument('--test-time', action='store_true', help='lines with test-time augmentation too')
    parser.add_argument('--out', type=Path, default=Path('runs/recipes'))
    arguments = parser.parse_args()
    file = arguments.out / 'results.csv'
    worlds = [WORLDS[name] for name in arguments.worlds if name == 'emoji' or arguments.images]
    for seed in arguments.seeds:  # all recipes of one seed first
        for world, tower in worlds:
            config = configuration(tower, arguments.out, arguments)
            splits = load_world(world, arguments.images, config)
            for recipe in arguments.recipes:
                setting = [world, tower, config.image_size, config.epochs, config.max_images]
                line = dict(zip(SETTING, setting)) | {'recipe': recipe, 'seed': seed}
                if tower == 'efficientnet' and recipe == 'overlap':
                    print('efficientnet: a convolution has no patches that could overlap')
                else:
                    once(line, file, partial(run, config, recipe, seed, splits, run_folder(arguments.out, line),
                                             arguments.test_time))
    print(*table(pd.read_csv(file), arguments.out), sep='\n')
