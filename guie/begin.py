"""Begin: a notebook's parameters become settings, data and folders; what will be done is printed before it starts."""
from dataclasses import replace
from pathlib import Path

from guie.checkpoints import find_ingredients
from guie.config import Config, read_overrides
from guie.datasets import list_images
from guie.distributed import processes_here
from guie.errors import InputError
from guie.estimate import device_in_words, forward_cost, in_words, matmul_rate, training_cost
from guie.files import did_you_mean, printable, user_path
from guie.recipes import follow_recipe, stage_folders
from guie.resume import refuse_other_config
from guie.soups import data_of
from guie.sources import data_sources
from guie.splits import load_data

SHARE = .5  # of a large matrix product's rate, which towers reached on two CPU cores and on an H200 alike
KAGGLE_HOURS = 8.5  # of a session's 9; older notices say 12


def data_in_words(splits):
    """What is trained on and what is searched, each in a sentence."""
    train, query, index = (splits[name] for name in ('train', 'query', 'index'))
    domains = ', '.join(sorted(train['domain'].unique())[:4])
    return (f'{len(train):,} images of {train["label"].nunique():,} classes ({printable(domains)}); to report on, '
            f'{len(query):,} queries of {query["label"].nunique():,} objects among {len(index):,} images')


def say_plan(splits, configs, folder, *, training=False, passes=1):
    """Prints data, towers, device, the time expected and the folder of the results. configs: {tower's name: Config}.
    training: the runs are trained. passes: how often each tower embeds all images that are not trained on, and the PCA's
    sample."""
    lines = [f'data:   {data_in_words(splits)}']
    searched, work = sum(len(frame) for name, frame in splits.items() if name != 'train'), 0
    for name, config in configs.items():
        cost, parameters = forward_cost(config)
        lines.append(f'tower:  {name}: {config.model_name} / {config.pretrained}, {config.image_size} px, '
                     f'{parameters / 1e6:.0f} million parameters')
        work += passes * searched * cost + (training_cost(config, len(splits['train'])) if training else 0)
    rate = SHARE * processes_here() * matmul_rate(next(iter(configs.values())).precision)
    lines += [f'device: {device_in_words()}', f'time:   {in_words(work / rate)} for the towers', f'result: {folder}']
    print(*lines, sep='\n')


def kaggle_limits(config, working='/kaggle/working'):
    """The configuration; on Kaggle, where it has no max_hours, with 8.5, which end before the session does; prints that."""
    if config.max_hours is not None or not Path(working).is_dir():
        return config
    print(f'Kaggle ends a session after 9 hours: the run stops after {KAGGLE_HOURS}, everything saved (max_hours).')
    return replace(config, max_hours=KAGGLE_HOURS)


def begin_run(config, tower, data, out_dir, *, run=None, recipe=None):
    """(configuration as the recipe says, splits, folder of the run) of a training notebook.
    data: as data_sources takes it. The folder's name is `run`, or the tower's, the augmentation, the recipe and the name of
    the data, if they are one's own. ValueError, before anything is loaded, if it holds a run with another configuration or
    of other images."""
    config, sources = kaggle_limits(follow_recipe(config, recipe)), data_sources(data)
    run_dir = user_path(out_dir) / (run or '_'.join(filter(None, [tower, config.augmentation, recipe, sources['name']])))
    for folder, stage in stage_folders(config, run_dir):
        refuse_other_config(folder, stage)
    splits = load_data(**sources, config=config, download=True, run_dir=run_dir)
    say_plan(splits, {tower: config}, run_dir, training=True, passes=2)
    return config, splits, run_dir


def begin_soups(data, out_dir, towers, files=None, architectures=None, *, home='runs'):
    """(ingredients, splits, folder of the soups) of the soup notebook.
    out_dir: where the runs are; None: home, and soups of one's own data get a folder of their name there. The others: as
    find_ingredients takes them."""
    sources, runs = data_sources(data), user_path(out_dir or home)
    ingredients, splits = data_of(find_ingredients(runs, towers, files, architectures), sources)
    folder = runs if out_dir else runs / splits.name
    say_plan(splits, {tower: found[0].config for tower, found in ingredients.items()}, folder,
             passes=3 + max(map(len, ingredients.values())))
    return ingredients, splits, folder


def begin_zero_shot(values, data, out_dir, *, photos=None, overrides=None, home='runs', **choices):
    """(settings, splits, images to search, folder) of the zero-shot notebook.
    values: its settings {name: value}; choices that are not None, and overrides, win. photos: a folder of one's own images;
    None: at most 1,000 of the queries. out_dir: None is home, where scores on one's own data get a folder of their name."""
    values = {**values, **{name: value for name, value in choices.items() if value is not None}}
    more = read_overrides(overrides)
    if unknown := [name for name in more if name not in values]:
        raise InputError(f'OVERRIDES has {unknown[0]!r}.{did_you_mean(unknown[0], values)} The settings are '
                         f'{", ".join(values)}.')
    values |= more
    config = Config().override(**{name: values[name] for name in ('model_name', 'pretrained', 'image_size')})
    mine, sources = list_images(photos) if photos else None, data_sources(data)
    splits = load_data(**sources, config=config)
    folder = user_path(out_dir or home) / 'zero_shot'
    folder = folder if out_dir else folder / splits.name
    say_plan(splits, {'zero-shot': config}, folder)
    return values, splits, splits['query'].head(1000) if mine is None else mine, folder
