"""Recipes: what the other places and papers changed, as fields of Config; training stage by stage, on one GPU or several."""
import shutil
from dataclasses import replace
from pathlib import Path

from guie.checkpoints import load_run, open_checkpoint
from guie.distributed import launch, processes_here
from guie.errors import InputError
from guie.files import ATTACHED, attached_folders, did_you_mean, session_start, user_path
from guie.heads import train_head
from guie.model import whole_patches
from guie.resume import is_same_run, refuse_other_config, run_lock
from guie.splits import describe, refuse_other_data
from guie.towers import tower_without_values
from guie.training import run_job, write_job


def larger(config, factor):
    """A recipe's side, `factor` times the configuration's. Where patches cover the latter to its edges they cover this one
    too: otherwise the next whole number of them is taken, which is printed."""
    side, tower = int(config.image_size * factor), tower_without_values(config)
    whole = whole_patches(tower, side) if whole_patches(tower, config.image_size) == config.image_size else side
    if whole != side:
        print(f'{side} px are no whole number of patches of {config.model_name}: the recipe takes {whole}.')
    return whole


def halves(config, first, second):
    """Two stages that share the epochs of a configuration, at least one each."""
    half = max(1, config.epochs // 2)
    return {'stages': (first | {'epochs': half}, second | {'epochs': max(1, config.epochs - half)})}


COSINE = {'scale': 16., 'margin_min': 0., 'margin_width': 0.}  # softmax of cosines, without a margin
FROZEN_HEAD = COSINE | {'trains': 'cached head', 'head_lr': 2.5e-4, 'class_lr': 1e-2, 'head_weight_decay': 1e-6,
                        'effective_batch': 128, 'batch_size': None}

RECIPES = {  # what each changes in a configuration; places are those of the challenge
    'place4': lambda config: {},
    # benchmarks/recipes.py: most on photographs (.890, place4 .813); more pixels and tokens for training and search
    'best': lambda config: {'image_size': larger(config, 3 / 2)},
    # Kumar 2022, arXiv 2202.10054: the head alone first, so that a random one does not distort the tower
    'lp-ft': lambda config: {'subcenters': 1, 'stages': (
        FROZEN_HEAD | {'epochs': 20 * config.epochs, 'augmentation': 'none'}, COSINE | {'head_lr': 1e-4, 'class_lr': 1e-3})},
    # 1st: a 64-d head first, which is then frozen while the tower trains
    'locked-head': lambda config: {'embedding_dim': 64} | halves(config, {'trains': 'head'}, {'trains': 'tower'}),
    # 2nd: the tower a thousand times slower than the head, then not at all; wider margins every epoch
    'slow-tower': lambda config: {'layer_lrs': ((config.layer_lrs[-1][0], config.head_lr / 1000),), 'margin_growth': .1}
    | halves(config, {'trains': 'all'}, {'trains': 'head'}),
    # 5th (with head_norm, which it had before its linear map): no PCA
    'direct-64': lambda config: {'embedding_dim': 64},
    # 1st: all again at 5/4 of the side, 224 to 280
    'hi-res': lambda config: halves(config, {}, {'image_size': larger(config, 5 / 4)}),
    # 1st: overlapping patches at the end
    'overlap': lambda config: halves(config, {}, {'overlap': .5}),
    # Linear adaptation (ILIAS 2025): the tower as it is, a head on vectors that it gives once
    'frozen-head': lambda config: FROZEN_HEAD | {'subcenters': 1, 'epochs': 20 * config.epochs},
}

MULTIPLIED = ('epochs', 'image_size')


def follow_recipe(config, recipe, given=()):
    """The configuration with the changes of one of RECIPES; None changes nothing. given: names of fields that were set by
    hand. InputError if the recipe sets one of them itself, whatever it was; epochs and image_size it multiplies."""
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f'There is no recipe {recipe!r}; choose {", ".join(RECIPES)}.{did_you_mean(recipe, RECIPES)}')
    changes = RECIPES[recipe](config) if recipe else {}
    stages = changes.get('stages', ())
    for name in given:
        if name not in MULTIPLIED and (name in changes or stages and all(name in stage for stage in stages)):
            raise InputError(f'The recipe {recipe!r} sets {name} itself: leave it out of OVERRIDES, or take another RECIPE.')
    return replace(config, **changes)


def stage_folders(config, run_dir):
    """[(folder, Config)] of the stages of a run, the last one in the run's own folder."""
    *before, last = config.each_stage()
    return [*((run_dir / f'{run_dir.name}-stage-{number}', stage) for number, stage in enumerate(before, start=1)),
            (run_dir, last)]


def train(config, splits, run_dir, *, processes=None, search=ATTACHED):
    """Trains a run on its splits, stage by stage, and saves it as training.fit says -> its Embedder.
    Several GPUs share the work by `accelerate launch`; processes: None is one a GPU. All stages but the last train in
    <run_dir>/<its name>-stage-<number>, each from the weights of the one before. A finished stage leaves stage.safetensors
    there; where that file is found (below a folder of `search` too) the stage is not trained again. Run it again to resume.
    Errors as in training.fit; ValueError, before a stage begins, if one of the folders holds a run of another configuration
    or other images; RuntimeError for processes that could not start or were killed."""
    run_dir, data = user_path(run_dir), describe(splits['train'])
    options = {'started': session_start(), 'search': list(search), 'epoch': 0, 'weights': None}
    for folder, stage in stage_folders(config, run_dir):
        refuse_other_config(folder, stage)
    refuse_other_data(run_dir, data)
    for folder, stage in stage_folders(config, run_dir):
        done = finished_stage(folder, stage, data, search)
        if done is None:
            train_stage(stage, splits, folder, processes or processes_here(), options, last=folder == run_dir)
            done = keep_stage(folder) if folder != run_dir else None
        options |= {'weights': done and str(done), 'epoch': options['epoch'] + stage.epochs}
    return load_run(run_dir, dim=None)


def train_stage(config, splits, folder, processes, options, last):
    """One stage: here, or in several launched processes; of a cached head only the next stage needs the classes."""
    if config.trains == 'cached head':
        train_head(config, splits, folder, weights=options['weights'], keep_classes=not last)
    elif processes == 1:
        run_job(config, splits, folder, **options)
    else:
        with run_lock(folder):  # a run under way in this folder keeps its job
            write_job(config, splits, folder, **options)
        launch('guie.training', folder, processes)


def finished_stage(folder, config, data, search):
    """The weights of a finished stage, in its folder, which train has checked, or in an attached output of the same run,
    configuration and images (data: a line of describe); or None."""
    for place in [folder, *(place for place in map(Path, attached_folders(search)) if place.name == folder.name)]:
        file = place / 'stage.safetensors'
        if file.exists() and (place == folder or is_same_run(place, open_checkpoint(file).config, config, data)):
            print(f'{folder.name}: done, in {place}')
            return file


def keep_stage(folder):
    """Marks a stage as finished: renames its weights to stage.safetensors and deletes its states."""
    done = (folder / 'model.safetensors').replace(folder / 'stage.safetensors')
    shutil.rmtree(folder / 'state', ignore_errors=True)
    return done
