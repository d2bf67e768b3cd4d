"""Config: the frozen settings of a run, checked when they are made and saved with every result."""
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import pandas as pd

from guie.errors import InputError, MissingError
from guie.files import did_you_mean, literal, user_path, write_text
from guie.images import AUGMENTATIONS
from guie.tables import table

FORMER_NAMES = {'bands': 'layer_lrs', 'head_decay': 'head_weight_decay', 'tower_decay': 'tower_weight_decay',
                'clip_norm': 'max_grad_norm'}  # names of fields in earlier versions
FORMER_FIELDS = {'sampling': 'photographs', 'partial_centers': 1., 'distil': 0., 'teacher': '', 'domains': []}
LIMITS = {'image_size': (1, 4096), 'overlap': (0, .9), 'n_classes': (1, 10**8), 'min_images': (1, 10**6),
          'max_images': (1, 10**9), 'embedding_dim': (1, 65536), 'subcenters': (1, 100), 'scale': (1e-3, 1e4),
          'margin_min': (0, math.pi / 2), 'margin_width': (0, math.pi / 2), 'margin_growth': (0, math.pi / 2),
          'head_lr': (0, 1e3), 'class_lr': (0, 1e3),
          'head_weight_decay': (0, 1e3), 'tower_weight_decay': (0, 1e3), 'batch_size': (1, 10**6),
          'effective_batch': (1, 10**7), 'epochs': (0, 10**5), 'warmup_steps': (0, 10**9), 'max_grad_norm': (1e-9, 1e9),
          'data_seed': (0, 2**32 - 1), 'seed': (0, 2**32 - 1), 'head_seed': (0, 2**32 - 1), 'pca_images': (2, 10**9),
          'workers': (0, 512), 'validate_every': (1, 10**9), 'save_minutes': (0, 10**5), 'max_hours': (0, 10**5),
          'max_unreadable': (0, 10**9), 'max_skipped': (0, 10**9)}
OF_ALL_STAGES = ('stages', 'model_name', 'pretrained', 'embedding_dim', 'head_norm', 'subcenters', 'head_seed',
                 'data_seed', 'n_classes', 'min_images', 'max_images', 'pca_images', 'precision', 'max_hours')
NOT_TRAINED = {'workers', 'save_minutes', 'max_hours', 'max_unreadable', 'max_skipped', 'batch_size', 'precision',
               'checkpoint_activations', 'stages', 'tracker'}  # may differ between the sessions of one run
PUBLISHED = {'place4': {  # the towers of the nine published runs; the notebook here takes ViT-L/14 of LAION-2B
    'vit_h_224': {'model_name': 'ViT-H-14', 'pretrained': 'laion2b_s32b_b79k', 'image_size': 224},
    'vit_l_336': {'model_name': 'ViT-L-14-336', 'pretrained': 'openai', 'image_size': 336}}}


def setting(default, meaning):
    """A field of Config: its default, and its meaning for readers of a notebook."""
    return field(default=default, metadata={'meaning': meaning})


@dataclass(frozen=True, repr=False)
class Config:
    """Everything that decides a training run. The defaults are the 4th-place recipe for ViT-H/14 (arXiv 2210.11141)."""
    model_name: str = setting('ViT-H-14', "open_clip name, 'local-dir:folder', 'hf-hub:org/name' or 'timm:name'")
    pretrained: str = setting('laion2b_s32b_b79k', "tag, weights file, 'tag@file', or 'random'")
    image_size: int = setting(224, 'side of the square the images are squashed to, pixels')
    overlap: float = setting(0.0, 'share of its side that a patch has in common with the next one')
    layer_lrs: tuple = setting(
        ((10, 1.25e-6), (20, 2.5e-6), (26, 5e-6), (32, 1e-5)), '(blocks below, lr): early layers move less')
    n_classes: int | None = setting(9691, 'class folders drawn from each domain; None: all of them')
    min_images: int = setting(4, 'classes with fewer teach ArcFace little and are left out')
    max_images: int = setting(50, 'a class gives at most so many, so that none dominates')
    augmentation: str = setting('none', "what a soup's ingredients differ in, besides seed")
    embedding_dim: int = setting(512, 'width that the classes are separated in; PCA brings it to 64 later')
    head_norm: bool = setting(False, 'batch normalisation, without weights, of what enters the head')
    subcenters: int = setting(3, 'centres a class: several looks of one object, and label noise')
    scale: float = setting(30.0, 's of ArcFace: softmax temperature 1/s')
    margin_min: float = setting(0.05, 'radians, for the most frequent class')
    margin_width: float = setting(0.45, 'added for the rarest one')
    margin_growth: float = setting(0.0, 'radians that every margin grows by each epoch')
    trains: str = setting(
        'all', "or 'head', 'cached head' (on vectors computed once), 'tower', 'last N': N blocks, what follows, the head")
    stages: tuple = setting((), '{field: value} of each stage of training, one after the other; () is one')
    head_lr: float = setting(3e-4, 'the head starts from nothing, the tower does not')
    class_lr: float | None = setting(None, 'learning rate of the classes; None: head_lr')
    head_weight_decay: float = setting(1e-5, "of the head's linear map and centres")
    tower_weight_decay: float = setting(1e-3, "of the tower's matrices; biases, norms and tokens have none")
    batch_size: int | None = setting(None, 'images on one device at a time; None: as many as fit, 8 on a CPU')
    effective_batch: int = setting(32, 'images an optimiser step; the rest is accumulated')
    epochs: int = setting(1, 'passes over the training images')
    warmup_steps: int = setting(1000, 'optimiser steps of linear warm-up, then cosine to 0')
    max_grad_norm: float = setting(1.0, 'an early ArcFace gradient can be huge; the published code did not clip')
    precision: str = setting('auto', "'bf16' or 'fp16' where the device has it, else 'no'")
    checkpoint_activations: bool | None = setting(None, 'a third more time for a fraction of the memory; None: at need')
    shard: bool = setting(False, 'parts of the tower on each GPU (FSDP), where a whole one does not fit')
    data_seed: int = setting(5, 'which classes are drawn and held out: alike for all ingredients of a soup')
    seed: int = setting(5, 'data order, augmentation, dropout')
    head_seed: int = setting(5, 'initial head apart: only ingredients that share it can be averaged')
    pca_images: int = setting(20_000, 'training images that the projection to 64 is fitted on')
    workers: int | None = setting(None, 'data-loading processes; None: chosen by cores and device')
    validate_every: int | None = setting(None, 'optimiser steps between selection scores; the best weights are kept')
    save_minutes: float = setting(20, 'between checkpoints to resume from')
    max_hours: float | None = setting(None, 'stop cleanly, everything saved, before the session does')
    tracker: str = setting('', "beside log.csv: 'tensorboard', 'wandb', … of accelerate; several with commas")
    max_unreadable: int = setting(100, 'images that may be broken before the run stops')
    max_skipped: int = setting(10, 'steps whose loss or gradient may be NaN or infinite before it stops')

    def __post_init__(self):
        for one in fields(self):
            value = plain(getattr(self, one.name))
            object.__setattr__(self, one.name, literal(value, list, tuple) if one.type is tuple else value)
            check_field(one.name, one.type, getattr(self, one.name))
        object.__setattr__(self, 'layer_lrs', checked_layer_lrs(self.layer_lrs))
        for name, names in (('augmentation', AUGMENTATIONS), ('precision', ('auto', 'no', 'fp16', 'bf16'))):
            if (value := getattr(self, name)) not in names:
                raise InputError(f'Config.{name} is {value!r}; choose {", ".join(names)}.{did_you_mean(value, names)}')
        if self.batch_size and self.effective_batch % self.batch_size:
            raise InputError(f'Config.effective_batch is {self.effective_batch}; it must be a multiple of batch_size '
                             f'{self.batch_size}, since whole batches are accumulated.')
        if self.head_norm and self.batch_size == 1:
            raise InputError('Config.batch_size is 1; head_norm compares the images of a batch: give more.')
        if not re.fullmatch(r'all|head|cached head|tower|last [1-9]\d*', self.trains):
            raise InputError(f"Config.trains is {self.trains!r}; choose 'all', 'head', 'cached head', 'tower' or, for "
                             f"example, 'last 4'.")
        if self.trains == 'cached head' and self.augmentation not in ('none', 'flip'):
            raise InputError(f"Config.augmentation is {self.augmentation!r}, but a cached head sees each image once: choose "
                             f"none, or flip, which adds the mirrored images.")
        if not isinstance(self.stages, (list, tuple)) or not all(isinstance(stage, dict) for stage in self.stages):
            raise InputError(f'Config.stages is {self.stages!r}; give a list of {{field: value}}.')
        object.__setattr__(self, 'stages', tuple(self.stages))
        self.each_stage()

    def each_stage(self):
        """The Config of each stage in turn, without stages of its own; this one alone if there are none."""
        configs = []
        for number, stage in enumerate(self.stages, start=1):
            try:
                if wrong := [name for name in stage if name in OF_ALL_STAGES]:
                    raise InputError(f'it cannot set {wrong[0]!r}, which all stages share.')
                configs.append(self.replace(stage | {'stages': ()}))
            except ValueError as error:
                raise InputError(f'Stage {number} of Config.stages: {error}') from None
        return configs or [self]

    def override(self, overrides=None, /, **choices):
        """The same with other values; None keeps the current value. An unknown name is an error.
        overrides: more values, as a dict or its text (JSON or Python); there None is a value like any other."""
        choices = {name: value for name, value in choices.items() if value is not None or name not in vars(self)}
        more = read_overrides(overrides)
        if twice := [name for name in more if name in choices and choices[name] != more[name]]:
            raise InputError(f'{twice[0]} is given twice, as {choices[twice[0]]!r} and in OVERRIDES as {more[twice[0]]!r}: '
                             f'give it once.')
        return self.replace(choices | more)

    def replace(self, values):
        """The same with other values {field: value}; None is a value too. An unknown name is an error."""
        if unknown := [name for name in values if name not in vars(self)]:
            raise InputError(f'Config has no field {unknown[0]!r}.{did_you_mean(unknown[0], vars(self))} Its fields are '
                             f'{", ".join(vars(self))}.')
        return replace(self, **values)

    def reproduce(self, solution, tower):
        """The same with the tower ('vit_h_224' or 'vit_l_336') of a published solution ('place4'); None changes nothing."""
        if solution is None:
            return self
        if solution not in PUBLISHED:
            raise InputError(f'There is no published solution {solution!r}; choose {", ".join(PUBLISHED)} or None.'
                             f'{did_you_mean(solution, PUBLISHED)}')
        return replace(self, **PUBLISHED[solution][tower])

    def save(self, path):
        """Writes all fields as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + '\n')

    @classmethod
    def read(cls, text):
        """The Config in JSON that `save` or a file of weights holds, of this version or an earlier one."""
        return cls().replace(present_names(dict(json.loads(text))))

    @classmethod
    def load(cls, path):
        """The Config in a file. FileNotFoundError; ValueError for another file."""
        try:
            return cls.read(user_path(path).read_text())
        except FileNotFoundError:
            raise MissingError(f'There is no configuration {path}: check the path, or make this run first.') from None
        except (ValueError, TypeError) as error:
            raise InputError(f'{path} is not a configuration: {error}') from error

    def table(self):
        """The settings that differ from the defaults (the recipe): DataFrame setting, value, default, meaning."""
        rows = [(one.name, str(getattr(self, one.name)), str(one.default), one.metadata['meaning']) for one in fields(self)
                if getattr(self, one.name) != one.default]
        return pd.DataFrame(rows, columns=['setting', 'value', 'default', 'meaning'])

    def __repr__(self):
        return f'Config({", ".join(f"{row.setting}={getattr(self, row.setting)!r}" for row in self.table().itertuples())})'

    def _repr_html_(self):
        return table(self.table(), longest=None)._repr_html_()


def read_overrides(value):
    """{field: value} of OVERRIDES: a dict, or the text that papermill makes of one; {} for None or ''."""
    read = {} if value is None or value == '' else literal(value, dict)
    if not isinstance(read, dict):
        raise InputError(f"OVERRIDES is {value!r}; give {{field: value}}, for example {{'epochs': 2}}.")
    return read


def plain(value):
    """A value with Python's numbers instead of numpy's, also inside lists and dicts: JSON takes no others."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def check_field(name, kind, value):
    """ValueError unless the value is of the field's type and within its LIMITS."""
    if name in LIMITS:
        low, high = LIMITS[name]
        whole = not isinstance(1., kind)  # an int may be given for a float, but not a float for an int
        right = value is None and isinstance(None, kind) or not isinstance(value, bool) and isinstance(
            value, int if whole else (int, float)) and low <= value <= high
        if not right:
            raise InputError(f'Config.{name} is {value!r}; it must be a {"whole " * whole}number from {low} to {high}.')
    elif kind is not tuple and not isinstance(value, kind) or name == 'model_name' and not value:
        right = 'True or False' if isinstance(True, kind) else 'a text'
        raise InputError(f'Config.{name} is {value!r}; it must be {right}.')


def checked_layer_lrs(pairs):
    """((blocks below, lr), …) as ints and floats; ValueError unless the block numbers rise."""
    with suppress(TypeError, ValueError):
        checked = tuple((int(end), float(lr)) for end, lr in pairs)
        ends, rates = zip(*checked)
        rising = list(ends) == sorted({float(end) for end, _ in pairs})  # and whole numbers
        if rising and ends[0] > 0 and all(0 <= rate < math.inf for rate in rates):
            return checked
    raise InputError(f'Config.layer_lrs is {pairs!r}; give (blocks below, lr) pairs with rising block numbers.')


def present_names(values):
    """{field: value} of an earlier version under today's names. Fields that are gone are left out, and printed if used."""
    gone = [name for name in values if name in FORMER_FIELDS]
    if used := [name for name in gone if values[name] != FORMER_FIELDS[name]]:
        print(f'This configuration is of an earlier version and used {", ".join(used)}, which is gone.')
    named = {FORMER_NAMES.get(name, name): value for name, value in values.items() if name not in gone}
    if isinstance(stages := named.get('stages'), list):  # Config refuses anything else
        named['stages'] = [present_names(stage) if isinstance(stage, dict) else stage for stage in stages]
    return named


def different_fields(first, second):
    """'field: a, now b' for each difference that changes the training; another folder for the same weights does not."""
    return [f'{name}: {value}, now {asdict(second)[name]}' for name, value in asdict(first).items()
            if name not in NOT_TRAINED and without_folders(name, value) != without_folders(name, asdict(second)[name])]


def without_folders(name, value):
    """A field's value; of a path of weights only the last part, since data sets are mounted in different folders."""
    if name == 'pretrained' or name == 'model_name' and value.startswith('local-dir:'):
        return re.sub(r'^(local-dir:|[^/@]*@|).*/([^/]+)/*$', r'\1\2', value.strip())
    return value
