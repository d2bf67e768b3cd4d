"""Begin: turns a notebook's parameters into settings, data and folders, and prints the plan before it starts."""
import os
from dataclasses import replace
from pathlib import Path

from guie.checkpoints import find_ingredients
from guie.config import Config, read_overrides
from guie.datasets import list_images
from guie.distributed import processes_here
from guie.errors import InputError
from guie.estimate import device_in_words, forward_cost, in_words, matmul_rate, training_cost
from guie.files import KAGGLE, check_writable, did_you_mean, printable, scratch_folder, user_path
from guie.recipes import follow_recipe, stage_folders
from guie.resume import refuse_other_config
from guie.soups import data_of, refuse_differences
from guie.sources import data_sources, named
from guie.splits import load_data
from guie.trackers import chosen_trackers

SHARE = .5  # towers reach this share of a large matrix product's rate, on two CPU cores as on an H200
KAGGLE_HOURS = 8.5  # a session lasts 9 (older notices say 12)


def data_in_words(splits):
    """The training data and the data to report on, in one sentence."""
    train, query, index = (splits[name] for name in ('train', 'query', 'index'))
    domains = printable(named(sorted(train['domain'].unique())))
    return (f'{len(train):,} images of {train["label"].nunique():,} classes ({domains}); to report on, '
            f'{len(query):,} queries of {query["label"].nunique():,} objects among {len(index):,} images')


def say_plan(splits, configs, folder, *, training=False, passes=1):
    """Prints data, towers, device, expected time and the results' folder. configs: {tower's name: Config}. training: the
    runs are trained too. passes: how often each tower embeds all splits but the training images."""
    lines = [f'data:   {data_in_words(splits)}']
    searched, work = sum(len(frame) for name, frame in splits.items() if name != 'train'), 0
    train = splits['train']
    for name, config in configs.items():
        cost, parameters = forward_cost(config)
        lines.append(f'tower:  {name}: {config.model_name} / {config.pretrained}, {config.image_size} px, '
                     f'{parameters / 1e6:.0f} million parameters')
        work += passes * searched * cost + (training_cost(config, len(train), train['label'].nunique()) if training else 0)
    rate = SHARE * processes_here() * matmul_rate(next(iter(configs.values())).precision)
    lines += [f'device: {device_in_words()}', f'time:   {in_words(work / rate)} for the towers', f'result: {folder}']
    print(*lines, sep='\n')


def kaggle_limits(config, working=KAGGLE):
    """The configuration; on Kaggle with max_hours 8.5 if it has none, to end before the session does. Prints that."""
    if config.max_hours is not None or not Path(working).is_dir():
        return config
    print(f'Kaggle ends a session after 9 hours: the run stops {KAGGLE_HOURS} hours after this notebook began, everything '
          f'saved (max_hours).')
    return replace(config, max_hours=KAGGLE_HOURS)


def begin_run(config, tower, data, out_dir, *, run=None, recipe=None, overrides=None, **choices):
    """(configuration, splits, run folder) of a training notebook.
    overrides, choices: other values of the configuration, as Config.override takes them; then the recipe changes it.
    data: as data_sources takes it. The folder's name is `run`, or else the tower's, the augmentation, the recipe and the
    name of your own data. ValueError, before weights are loaded, if it holds a run of another configuration or other
    images, or a tracker that is not installed; OSError, before data are read, if out_dir cannot be written."""
    config, sources = config.override(overrides, **choices), data_sources(data)
    config = kaggle_limits(follow_recipe(config, recipe, given=read_overrides(overrides)))
    if run and (os.path.basename(str(run)) != str(run) or str(run) in ('.', '..')):
        raise InputError(f'RUN is {run!r}; give a name without folders: OUT_DIR is where runs are written.')
    run_dir = user_path(out_dir) / str(run or '_'.join(filter(None, [tower, config.augmentation, recipe, sources['name']])))
    chosen_trackers(config.tracker)
    for folder, stage in stage_folders(config, run_dir):
        refuse_other_config(folder, stage)
    check_writable(user_path(out_dir))
    splits = load_data(**sources, config=config, download=True, run_dir=run_dir)
    say_plan(splits, {tower: config}, run_dir, training=True, passes=2)
    return config, splits, run_dir


def begin_soups(data, out_dir, towers, files=None, architectures=None, *, home='runs'):
    """(ingredients, splits, soup folder, scratch folder) of the soup notebook.
    out_dir: the folder of the runs; None is `home`, where soups of your own data get a subfolder with its name. Other
    arguments: as in find_ingredients. What is only compared belongs into the scratch folder: see scratch_folder."""
    sources, runs = data_sources(data), user_path(out_dir or home)
    ingredients, splits = data_of(find_ingredients(runs, towers, files, architectures), sources)
    for found in ingredients.values():
        refuse_differences(found)
    folder = runs if out_dir else runs / splits.name
    check_writable(folder)
    say_plan(splits, {tower: found[0].config for tower, found in ingredients.items()}, folder,
             passes=3 + max(map(len, ingredients.values())))
    return ingredients, splits, folder, scratch_folder(folder)


def begin_zero_shot(values, data, out_dir, *, photos=None, overrides=None, home='runs', **choices):
    """(settings, splits, images to search, folder) of the zero-shot notebook.
    values: its settings {name: value}; overrides, and choices that are not None, replace them. photos: a folder of your own
    images; None: at most 1,000 of the queries. out_dir: None is `home`, where scores on your own data get a subfolder."""
    choices = {name: value for name, value in choices.items() if value is not None}
    if choices.get('model_name', values['model_name']) != values['model_name']:
        values = {**values, 'pretrained': ''}  # which are another tower's
    values = {**values, **choices}
    more = read_overrides(overrides)
    if unknown := [name for name in more if name not in values]:
        raise InputError(f'OVERRIDES has {unknown[0]!r}.{did_you_mean(unknown[0], values)} The settings are '
                         f'{", ".join(values)}.')
    values |= more
    config = Config().override(**{name: values[name] for name in ('model_name', 'pretrained', 'image_size')})
    mine, sources = list_images(photos) if photos else None, data_sources(data)
    folder = user_path(out_dir or home) / 'zero_shot'
    check_writable(folder)
    splits = load_data(**sources, config=config)
    folder = folder if out_dir else folder / splits.name
    say_plan(splits, {'zero-shot': config}, folder)
    return values, splits, splits['query'].head(1000) if mine is None else mine, folder
