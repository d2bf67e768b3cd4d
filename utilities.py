"""Image embeddings for open-world retrieval: everything the four notebooks share, in the order the data flows.

settings -> samples -> pixels and batches -> tower and head -> losses -> training -> checkpoints and soups
-> projection to 64 dimensions -> neighbours and mP@5 -> submission -> pictures
"""
import bisect
import copy
import difflib
import hashlib
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from glob import escape as glob_escape
from glob import glob
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pandas as pd
import psutil
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import gather, gather_object, is_cuda_available
from matplotlib import pyplot as plt
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import PILToTensor, v2
from tqdm import tqdm

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: what a notebook's configuration cell says · out: one frozen Config, written beside every result

@dataclass(frozen=True)
class Config:
    """Everything that decides a training run. The defaults are the 4th-place recipe for ViT-H/14 (arXiv 2210.11141)."""
    model_name: str = 'ViT-H-14'              # open_clip name, 'local-dir:folder', 'hf-hub:org/name' or 'timm:name'
    pretrained: str = 'laion2b_s32b_b79k'     # tag, weights file, 'tag@file', or 'random' in so many words
    image_size: int = 224                     # side of the square the photographs are squashed to, pixels
    overlap: float = 0.0                      # share of its side that a patch has in common with the next one
    bands: tuple = ((10, 1.25e-6), (20, 2.5e-6), (26, 5e-6), (32, 1e-5))  # (blocks below, lr): early layers move less
    n_classes: int | None = 9691              # class folders drawn from each domain; None: all of them
    min_images: int = 4                       # classes with fewer teach ArcFace little and are left out
    max_images: int = 50                      # a class gives at most so many, so that none dominates
    domains: tuple = ()                       # trained on; () is all that the data has
    sampling: str = 'photographs'             # 'classes' or 'domains': each drawn equally often, however many it has
    augmentation: str = 'none'                # the one thing in which a soup's ingredients differ
    embedding_dim: int = 512                  # width that the classes are separated in; PCA brings it to 64 later
    head_norm: bool = False                   # batch normalisation, without weights, of what enters the head
    subcenters: int = 3                       # centres a class: several looks of one object, and label noise
    scale: float = 30.0                       # s of ArcFace: softmax temperature 1/s
    margin_min: float = 0.05                  # radians, for the most frequent class
    margin_width: float = 0.45                # added for the rarest one
    margin_growth: float = 0.0                # radians that every margin grows by each epoch
    partial_centers: float = 1.0              # share of the classes that a batch is compared with, its own among them
    distil: float = 0.0                       # weight of keeping a teacher's distances and angles within a batch_size
    teacher: str = ''                         # the teacher: another run's folder; '' is the untrained tower
    trains: str = 'all'                       # or 'head', 'tower', 'last N': N blocks, what follows them, and the head
    stages: tuple = ()                        # {field: value} of each stage of training, one after the other; () is one
    head_lr: float = 3e-4                     # the head starts from nothing, the tower does not
    head_decay: float = 1e-5
    tower_decay: float = 1e-3
    batch_size: int = 8                       # photographs on one device at a time: what fits a 16 GB T4
    effective_batch: int = 32                 # photographs an optimiser step; the rest is accumulated
    epochs: int = 1
    warmup_steps: int = 1000                  # optimiser steps of linear warm-up, then cosine to 0
    clip_norm: float = 1.0                    # an early ArcFace gradient can be huge; the published code did not clip
    precision: str = 'auto'                   # 'bf16' or 'fp16' where the device has it, else 'no'
    checkpoint_activations: bool | None = None  # a third more time for a fraction of the memory; None: on a GPU
    shard: bool = False                       # parts of the tower on each GPU (FSDP), where a whole one does not fit
    data_seed: int = 5                        # which classes are drawn and held out: alike for all ingredients of a soup
    seed: int = 5                             # data order, augmentation, dropout
    head_seed: int = 5                        # initial head apart: only ingredients that share it can be averaged
    pca_images: int = 20_000                  # training photographs that the projection to 64 is fitted on
    workers: int | None = None                # data-loading processes; None: chosen by cores and device
    validate_every: int | None = None         # optimiser steps between selection scores; the best state is kept
    save_minutes: float = 20                  # between resumable states
    max_hours: float | None = None            # stop cleanly, everything saved, before the session does
    max_unreadable: int = 100                 # photographs that may be broken before the run stops
    max_skipped: int = 10                     # steps whose loss or gradient may be NaN or infinite before it stops

    LIMITS = {'image_size': (1, 4096), 'n_classes': (1, 10**8), 'min_images': (1, 10**6), 'max_images': (1, 10**9),
              'embedding_dim': (1, 65536), 'subcenters': (1, 100), 'scale': (1e-3, 1e4), 'margin_min': (0, math.pi),
              'margin_width': (0, math.pi), 'head_lr': (0, 1e3), 'head_decay': (0, 1e3), 'tower_decay': (0, 1e3),
              'batch_size': (1, 10**6), 'effective_batch': (1, 10**7), 'epochs': (0, 10**5),
              'warmup_steps': (0, 10**9), 'clip_norm': (1e-9, 1e9), 'validate_every': (1, 10**9), 'workers': (0, 512),
              'save_minutes': (0, 10**5), 'max_hours': (0, 10**5), 'max_unreadable': (0, 10**9), 'pca_images': (2, 10**9),
              'max_skipped': (0, 10**9), 'overlap': (0, .9), 'margin_growth': (0, math.pi), 'distil': (0, 1e6),
              'partial_centers': (1e-6, 1),
              'data_seed': (0, 2**32 - 1), 'seed': (0, 2**32 - 1), 'head_seed': (0, 2**32 - 1)}

    OF_ALL_STAGES = ('stages', 'model_name', 'pretrained', 'embedding_dim', 'head_norm', 'subcenters', 'head_seed',
                     'data_seed', 'n_classes', 'min_images', 'max_images', 'pca_images', 'teacher', 'precision', 'max_hours')

    def __post_init__(self):
        for field in fields(self):
            self._check(field.name, field.type, getattr(self, field.name))
        try:
            object.__setattr__(self, 'bands', tuple((int(end), float(lr)) for end, lr in self.bands))
            ends, rates = zip(*self.bands)
            rising = list(ends) == sorted(set(ends)) and ends[0] > 0 and all(0 <= rate < math.inf for rate in rates)
        except (TypeError, ValueError):
            rising = False
        if not rising:
            raise ValueError(f'Config.bands is {self.bands}; give (blocks below, lr) pairs with rising block numbers.')
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f'Config.augmentation is {self.augmentation!r}; choose {", ".join(AUGMENTATIONS)}.')
        if self.effective_batch % self.batch_size:
            raise ValueError(f'Config.effective_batch is {self.effective_batch}; it must be a multiple of batch_size '
                             f'{self.batch_size}, since whole batches are accumulated.')
        if (self.head_norm or self.distil) and self.batch_size < 2:
            raise ValueError('Config.batch_size is 1; head_norm and distil compare the photographs of a batch: give more.')
        if self.sampling not in ('photographs', 'classes', 'domains'):
            raise ValueError(f'Config.sampling is {self.sampling!r}; choose photographs, classes or domains.')
        if self.precision not in ('auto', 'no', 'fp16', 'bf16'):
            raise ValueError(f'Config.precision is {self.precision!r}; choose auto, no, fp16 or bf16.')
        if not re.fullmatch(r'all|head|tower|last [1-9]\d*', self.trains):
            raise ValueError(f"Config.trains is {self.trains!r}; choose 'all', 'head', 'tower' or, for example, 'last 4'.")
        for name, kind, words in (('domains', str, 'a list of names'), ('stages', dict, 'a list of {field: value}')):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(isinstance(item, kind) for item in given):
                raise ValueError(f'Config.{name} is {given!r}; give {words}.')
        object.__setattr__(self, 'domains', tuple(self.domains))
        object.__setattr__(self, 'stages', self._whole_stages())

    def _whole_stages(self):
        """The stages, each with all the fields in which any of them differs: then the last one's Config, as it is saved,
        names the same stages again."""
        names, configs = {name: None for stage in self.stages for name in stage}, []
        for number, stage in enumerate(self.stages, start=1):
            try:
                if wrong := [name for name in stage if name in self.OF_ALL_STAGES or name not in vars(self)]:
                    raise ValueError(f'it cannot set {wrong[0]!r}.')
                configs.append(replace(self, stages=(), **stage))
            except ValueError as error:
                raise ValueError(f'Stage {number} of Config.stages: {error}') from None
        return tuple({name: getattr(config, name) for name in names} for config in configs)

    def each_stage(self):
        """The Config of every stage in turn; without stages that is this one."""
        return [replace(self, **stage) for stage in self.stages] or [self]

    def _check(self, name, kind, value):
        if name in self.LIMITS:
            low, high = self.LIMITS[name]
            whole = not isinstance(1., kind)  # a float may be given as an int, and never an int as a float
            right = value is None and isinstance(None, kind) or not isinstance(value, bool) and isinstance(
                value, int if whole else (int, float)) and low <= value <= high
            if not right:
                raise ValueError(f'Config.{name} is {value!r}; it must be a {"whole " * whole}number from {low} to {high}.')
        elif kind is not tuple and not isinstance(value, kind) or name == 'model_name' and not value:
            right = 'True or False' if isinstance(True, kind) else 'a text'
            raise ValueError(f'Config.{name} is {value!r}; it must be {right}.')

    def follow(self, recipe):
        """The same, changed as one of RECIPES says; None changes nothing."""
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f'There is no recipe {recipe!r}; choose {", ".join(RECIPES)}.')
        return self if recipe is None else replace(self, **RECIPES[recipe](self))

    def override(self, **choices):
        """The same with other values; None keeps the value that is there. An unknown name is an error."""
        return self._with({name: value for name, value in choices.items() if value is not None or name not in vars(self)})

    def _with(self, values):
        if unknown := sorted(set(values) - set(vars(self))):
            raise ValueError(f'Config has no field {unknown[0]!r}; its fields are {", ".join(vars(self))}.')
        return replace(self, **values)

    def save(self, path):
        write_text(path, json.dumps(asdict(self), indent=1) + '\n')

    @classmethod
    def read(cls, text):
        """The Config that `save`, or a checkpoint's metadata, wrote as JSON."""
        return cls()._with(dict(json.loads(text)))

    @classmethod
    def load(cls, path):
        try:
            return cls.read(Path(path).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f'There is no configuration {path}: check the path, or make this run first.') from None
        except (ValueError, TypeError) as error:
            raise ValueError(f'{path} is not a configuration: {error}') from None


def config_table(config, blocks=3):
    """A configuration to look at: DataFrame of (field, value), `blocks` times side by side."""
    rows = pd.DataFrame([(name, str(value)) for name, value in asdict(config).items()], columns=['field', 'value'])
    height = -(-len(rows) // blocks)
    parts = [rows[start:start + height].reset_index(drop=True) for start in range(0, len(rows), height)]
    return pd.concat(parts, axis=1).fillna('')


PUBLISHED = {'place4': {  # the towers of the nine published runs; LAION-2B for ViT-L/14 is a choice of the notebook here
    'vit_h_224': {'model_name': 'ViT-H-14', 'pretrained': 'laion2b_s32b_b79k', 'image_size': 224},
    'vit_l_336': {'model_name': 'ViT-L-14-336', 'pretrained': 'openai', 'image_size': 336}}}


def published_tower(solution, name):
    """Config's fields for the tower of a published solution, for Config.override: 'place4'; None changes nothing."""
    if solution is None:
        return {}
    if solution not in PUBLISHED:
        raise ValueError(f'REPRODUCE is {solution!r}; choose {", ".join(PUBLISHED)} or None.')
    return PUBLISHED[solution][name]


def _halves(config, first, second):
    """Two stages that share the epochs of a configuration, at least one each."""
    half = max(1, config.epochs // 2)
    return {'stages': (first | {'epochs': half}, second | {'epochs': max(1, config.epochs - half)})}


RECIPES = {  # what each changes in a configuration; places are those of the challenge
    'place4': lambda config: {},
    # Kumar 2022, arXiv 2202.10054: the head alone first, so that a random one does not distort the tower
    'lp-ft': lambda config: _halves(config, {'trains': 'head'}, {'trains': 'all', 'head_lr': config.head_lr / 10}),
    # 1st: a 64-d head first, which then stays while the tower trains
    'locked-head': lambda config: {'embedding_dim': 64} | _halves(config, {'trains': 'head'}, {'trains': 'tower'}),
    # 2nd: the tower a thousand times slower than the head, then not at all; wider margins every epoch
    'slow-tower': lambda config: {'bands': ((config.bands[-1][0], config.head_lr / 1000),), 'margin_growth': .1}
    | _halves(config, {'trains': 'all'}, {'trains': 'head'}),
    # 5th (with head_norm, which it had before its linear map): no PCA
    'direct-64': lambda config: {'embedding_dim': 64},
    # 1st: everything once more at 5/4 of the side, 224 to 280
    'hi-res': lambda config: _halves(config, {}, {'image_size': config.image_size * 5 // 4}),
    # 1st: overlapping patches at the end
    'overlap': lambda config: _halves(config, {}, {'overlap': .5}),
    # MDFE 2024: the tower as it is, a projection trained
    'frozen': lambda config: {'embedding_dim': 64, 'trains': 'head'},
    # 13th: the 64-d head also keeps the distances and angles of the tower's full width
    'distil': lambda config: {'embedding_dim': 64, 'distil': 10.0},
}


def write_text(path, text):
    """Writes beside, then renames: a reader never sees half a file. Of launched processes the first one writes."""
    if own_share()[0]:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + '.part')
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def progress_bar(iterable=None, desc=None, **options):
    """tqdm on stdout: a notebook then keeps one plain line of it instead of a red block or an empty widget."""
    return tqdm(iterable, desc, file=sys.stdout, mininterval=.5, **options)


# ── Samples ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: the name of a known data set, a folder of class folders, or a CSV
# out: a DataFrame path, label, domain, and the selection of classes that a run trains on

PHOTO_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff')


@dataclass(frozen=True)
class ClassFolders:
    """A data set whose paths say the class."""
    domain: str
    telltale: str  # glob that nothing but this set's root satisfies
    pattern: str   # regex over the whole path below the root, with a group `label` (and perhaps `domain`)
    example: str   # one photo, for people


@dataclass(frozen=True)
class Listing:
    """A data set whose label file lists its photos."""
    domain: str
    telltale: str           # the label file, CSV-like or JSON
    photos: tuple           # columns that name photos
    label: str              # column of the class
    folders: tuple = ('',)  # where the listed paths may start, relative to the label file
    path: str = ''          # what a listed name becomes; \g<0> is the name, \1 \2 \3 its first characters
    sep: str = ','
    skiprows: int = 0
    packed: bool = False    # one row lists all photos of a class, separated by spaces


_CLASS, _HEX = r'(?P<label>[^/]+)/.+', r'\1/\2/\3/\g<0>.jpg'
_LANDMARKS = Listing('landmark', 'train.csv', ('id',), 'landmark_id', ('train', ''), _HEX)
_SHOP = {'folders': ('../Img', '..', 'Img', ''), 'sep': r'\s+', 'skiprows': 1}

DATASETS = {  # domains are named as the GUIE 130k set names its eleven folders
    'products-10k': Listing('packaged', 'train.csv', ('name',), 'class', ('train', 'train/train')),
    'google-landmarks-v2': _LANDMARKS,
    'google-landmarks-v2-clean': Listing(
        'landmark', 'train_clean.csv', ('images',), 'landmark_id', ('train', ''), _HEX, packed=True),
    'landmark-recognition-2020': _LANDMARKS,  # Kaggle's copy; it has no column url
    'stanford-online-products': Listing('furniture', 'Ebay_info.txt', ('path',), 'class_id', sep=' '),
    'shopee': Listing('packaged', 'train.csv', ('image',), 'label_group', ('train_images',)),
    'met': Listing('artwork', 'MET_database.json', ('path',), 'id', ('', 'images', '../images', '..')),
    'deepfashion-in-shop': Listing('apparel', 'list_eval_partition.txt', ('image_name',), 'item_id', **_SHOP),
    'deepfashion-consumer-to-shop': Listing(
        'apparel', 'list_eval_partition.txt', ('image_pair_name_1', 'image_pair_name_2'), 'item_id', **_SHOP),
    'food-101': ClassFolders('dishes', 'meta/classes.txt', f'images/{_CLASS}', 'images/apple_pie/1.jpg'),
    'rp2k': ClassFolders('packaged', 'all/train', f'all/(?:train|test)/{_CLASS}', 'all/train/<class>/1.jpg'),
    'gpr1200': ClassFolders(
        'general', 'images/[0-9]*_*.jpg', r'images/(?P<label>\d+)_[^/]+', 'images/7_<name>.jpg'),
    'inaturalist': ClassFolders(
        'nature', 'train_val*', f'train_val[^/]*/[^/]+/{_CLASS}', 'train_val2018/Aves/3174/<id>.jpg'),
    'inaturalist-2021': ClassFolders(
        'nature', 'train*/[0-9]*_*_*_*', f'(?:train|train_mini|val)/{_CLASS}', 'train/00000_<name>/<id>.jpg'),
    'stanford-cars': ClassFolders(
        'cars', 'train/Acura*', f'(?:train|test)/{_CLASS}', 'train/Acura RL Sedan 2012/00249.jpg'),
    'objectnet': ClassFolders(
        'household', 'mappings/folder_to_objectnet_label.json', f'images/{_CLASS}', 'images/bench/<id>.png'),
    'h-and-m': ClassFolders(  # seven digits of product, three of colour
        'apparel', 'articles.csv', r'images/\d+/(?P<label>\d{7})\d{3}\.jpg', 'images/010/0108775015.jpg'),
    'guie-130k': ClassFolders('', 'storefronts', '(?P<label>(?P<domain>[^/]+))/.+', 'toys/<photo>.jpg'),
    'grocery-store': ClassFolders(
        'packaged', 'train/Fruit', '(?:train|val|test)/(?:[^/]+/)+(?P<label>[^/]+)/[^/]+',
        'train/Fruit/Avocado/Avocado_001.jpg'),
}


def read_dataset(name_or_path, root=None, *, search=('/kaggle/input',)):
    """Every labelled photo of a data set: DataFrame of str columns `path` (absolute), `label`, `domain`.

    `name_or_path` is a folder of class folders (sorted by path), a CSV `path,label[,domain]` (in its own
    order, paths relative to `root` or to the CSV's folder), or a key of DATASETS, looked for below `root`,
    else below `search`. Labels of known sets carry the set's name ('products-10k/17'), so that frames can be
    concatenated. Without a column `domain` it is the data folder's name. Raises FileNotFoundError for a data
    root laid out otherwise, ValueError for a label file that cannot be used."""
    name, path = str(name_or_path).lower().replace(' ', '-').replace('_', '-'), os.path.abspath(name_or_path)
    if name in DATASETS:
        layout = DATASETS[name]
        root = _find_root(name, layout, [os.path.abspath(place) for place in ([root] if root else search)])
        frame = (_from_folders if isinstance(layout, ClassFolders) else _from_listing)(root, layout)
        frame['label'] = name + '/' + frame['label']
    elif os.path.isdir(path):
        frame = _from_folders(path, ClassFolders(os.path.basename(path), '', _CLASS, '<class>/<photo>.jpg'))
    elif os.path.isfile(path):
        root = os.path.abspath(root or os.path.dirname(path))
        frame = _from_listing(root, Listing(os.path.basename(root), path, ('path',), 'label'))
    else:
        raise FileNotFoundError(f'{name_or_path} is no folder, no CSV file and none of the known data sets '
                                f'{", ".join(DATASETS)}.')
    if frame['path'].duplicated().any():
        _one_each(frame, 'path', 'label', name_or_path)
        print(f'{name_or_path}: {frame["path"].duplicated().sum():,} rows repeat a photo and were dropped')
        frame = frame.drop_duplicates('path')
    _one_each(frame, 'label', 'domain', name_or_path)
    return frame.reset_index(drop=True)


def _find_root(name, layout, places):
    """The first folder, at most four levels below `places`, that holds what gives the data set away."""
    level = places
    for _ in range(5):
        for folder in level:
            marks = glob(os.path.join(glob_escape(folder), layout.telltale))
            if marks and (isinstance(layout, ClassFolders) or
                          {*layout.photos, layout.label} <= {*_read_table(marks[0], layout, nrows=0)}):
                return folder
        level = [entry.path for folder in level[:2000] if os.path.isdir(folder)
                 for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if entry.is_dir()]
    expected = f'photos like {layout.example}' if isinstance(layout, ClassFolders) else (
        f'the columns {", ".join((*layout.photos, layout.label))}')
    found = ' and '.join(map(_contents, places))
    raise FileNotFoundError(f'{name}: expected {layout.telltale} with {expected}, found {found}; '
                            'give the folder of the data set as ROOT or root.')


def _contents(folder):
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ['no such folder']
    return f'{folder} ({", ".join(names[:8]) or "empty"})'


def _from_folders(root, layout):
    below = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        start = folder[len(root):].replace(os.sep, '/') + '/'
        below += [start + name for name in files if name.lower().endswith(PHOTO_SUFFIXES) and name[0] != '.']
    below = pd.Series(sorted(below), dtype=str)
    found = below.str.extract(f'^/{layout.pattern}$').assign(path=root + below)
    frame = found.assign(domain=found.get('domain', layout.domain)).dropna()[['path', 'label', 'domain']]
    if frame.empty:
        raise FileNotFoundError(f'Expected photos like {layout.example}, found {_contents(root)}.')
    return frame


def _from_listing(root, layout):
    file = os.path.join(root, layout.telltale)
    table = _read_table(file, layout)
    if missing := sorted({*layout.photos, layout.label} - {*table}):
        raise ValueError(f'{file} lacks the column {" and ".join(missing)}; it has {", ".join(table)}.')
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f'{file} has rows with more fields than columns; quote texts that hold commas.')
    table['domain'] = table.get('domain', layout.domain)
    frame = pd.concat([table[[photo, layout.label, 'domain']].set_axis(['path', 'label', 'domain'], axis=1)
                       for photo in layout.photos], ignore_index=True)
    empty = frame.isna().any(axis=1)
    if empty.any():
        raise ValueError(f'{file}: {empty.sum():,} of {len(frame):,} rows lack a path, label or domain, the '
                         f'first is row {empty.argmax() + 1} below the header; fill or delete them.')
    if frame.empty:
        raise ValueError(f'{file} lists no photo: there is no row below the header.')
    if layout.packed:
        frame = frame.assign(path=frame['path'].str.split()).explode('path', ignore_index=True)
    if layout.path:
        frame['path'] = frame['path'].str.replace(r'^(.?)(.?)(.?).*$', layout.path, regex=True)
    return frame.assign(path=_locate(root, frame['path'], layout.folders, file))


def _read_table(file, layout, nrows=None):
    """A label file with str columns. Empty cells are missing; 'NA' and '007' stay what they are."""
    if file.endswith('.json'):
        return pd.read_json(file, dtype=False).astype(str)
    with open(file, 'rb') as stream:
        utf16 = stream.read(2) in (b'\xff\xfe', b'\xfe\xff')
    read = partial(pd.read_csv, file, sep=layout.sep, skiprows=layout.skiprows, nrows=nrows, dtype=str,
                   keep_default_na=False, na_values=[''], skipinitialspace=True)
    try:
        try:
            return read(encoding='utf-16' if utf16 else 'utf-8-sig')
        except UnicodeDecodeError:
            return read(encoding='latin-1')  # what spreadsheets in Western Europe write
    except ValueError as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f'{file} cannot be read as a table: {" ".join(str(error).split())}') from error


def _locate(root, paths, folders, file):
    """Absolute paths, in the first of `folders` where a sample of them exists. None may leave that folder."""
    text = '\n' + '\n'.join(paths)  # one search in C: ten million rows take seconds
    odd = any(mark in text for mark in ('\\', './', '..', '//', '\n/'))
    paths = paths.str.replace('\\', '/', regex=False) if odd else paths
    sample = paths.iloc[np.linspace(0, len(paths) - 1, min(len(paths), 64)).astype(int)]
    for start in folders:
        base = os.path.normpath(os.path.join(root, start)).rstrip('/')
        lost = [path for path in sample if not os.path.exists(os.path.join(base + '/', path))]
        if len(lost) < len(sample):
            break
    full = base + '/' + paths
    if odd:
        full = paths.map(lambda path: os.path.normpath(os.path.join(base + '/', path)))
        if len(outside := full[~full.str.startswith(base + '/')]):
            raise ValueError(f'{file}: {outside.iloc[0]} leaves the data root {base}; give the folder '
                             'that holds all photos as ROOT or root.')
    if len(lost) == len(sample):
        raise FileNotFoundError(f'{file}: expected {full.iloc[0]}, found {_contents(root)}; give the folder '
                                'that the paths start from as ROOT or root.')
    if lost:
        print(f'{file}: {len(lost)} of {len(sample)} photos looked at do not exist, the first is {lost[0]}')
    return full


def _one_each(frame, column, other, source):
    pairs = frame[[column, other]].drop_duplicates()
    twice = pairs[pairs.duplicated(column, keep=False)].sort_values([column, other])
    if len(twice):
        raise ValueError(f'{source}: the {column} {twice[column].iloc[0]} has two {other}s, '
                         f'{twice[other].iloc[0]} and {twice[other].iloc[1]}; it can have one.')


def select_classes(frame, min_images=4, max_images=50, n_classes=None, seed=5):
    """The photos of one run, sorted by domain, label and path; the same whatever the order of the rows.

    As the 4th place did: of each domain `n_classes` classes are drawn first (None: all), then those with
    fewer than `min_images` dropped, then at most `max_images` a class sampled. Prints what came out.
    Raises ValueError when nothing is left or when one label stands in two domains."""
    _one_each(frame, 'label', 'domain', 'select_classes')
    chosen = []
    for domain, part in frame.groupby('domain', sort=True):
        rng, counts = np.random.default_rng(seed), part['label'].value_counts().sort_index()
        if n_classes is not None and n_classes > len(counts):
            print(f'{domain}: {n_classes:,} classes asked for, all {len(counts):,} taken')
        counts = counts.iloc[rng.permutation(len(counts))[:n_classes]]
        part = part[part['label'].isin(counts.index[counts >= min_images])].sort_values('path', kind='stable')
        part = part.sort_values('label', kind='stable', key=lambda labels: pd.factorize(labels, sort=True)[0],
                                ignore_index=True)  # by number: ten times as fast as by text
        chosen.append(part.iloc[rng.permutation(len(part))].groupby('label').head(max_images).sort_index())
    selection = pd.concat(chosen or [frame], ignore_index=True)
    if selection.empty:
        raise ValueError(f'No class has {min_images} photos; lower min_images or draw more classes.')
    classes = selection.groupby('domain')['label'].nunique()
    parts = ', '.join(f'{count:,} {domain}' for domain, count in classes.items())
    print(f'{len(selection):,} photos of {classes.sum():,} classes ({parts}), digest {digest(selection)}')
    return selection


def split_by_class(frame, fraction, seed=5):
    """Two frames without a common label: (the rest, about `fraction` of the labels), neither empty."""
    labels = np.sort(frame['label'].unique())
    if len(labels) < 2 or not 0 < fraction < 1:
        raise ValueError(f'A split needs 2 labels and a fraction in 0…1, got {len(labels)} and {fraction}.')
    count = min(max(round(len(labels) * fraction), 1), len(labels) - 1)
    held = frame['label'].isin(labels[np.random.default_rng(seed).permutation(len(labels))[:count]])
    return frame[~held].reset_index(drop=True), frame[held].reset_index(drop=True)


def digest(frame):
    """12 hex digits of SHA-256 over the sorted (label, file name) pairs: the same wherever the data lies."""
    pairs = sorted(f'{row.label}\n{os.path.basename(row.path)}' for row in frame.itertuples())
    return hashlib.sha256('\n'.join(pairs).encode()).hexdigest()[:12]


SELECTION = ('selection_query', 'selection_index')  # of the frames of a run: objects to make choices on


def load_data(train, query=None, index=None, selection=None, *, config, root=None, held_out=0.1, most_held_out=500):
    """The frames of a run: dict train, pca (a sample of train), query, index, selection_query, selection_index.

    train: what read_dataset takes, or a list of such. query, index: never-seen objects to report on; selection: a pair
    (query, index) to make choices on. What is not given is made of classes held out of the training data (`held_out` of
    them each, at most `most_held_out`): their photographs are dealt out in turn, one to the query, two to the index. A
    class that is both trained and searched is named aloud: it is no never-seen object. root: as in read_dataset, for all.
    """
    given = [train] if isinstance(train, (str, os.PathLike)) else train
    frame = pd.concat([read_dataset(source, root) for source in given], ignore_index=True)
    frames = {}
    for names, pair in ((('query', 'index'), (query, index)),
                        (('selection_query', 'selection_index'), selection or (None, None))):
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f'{names[0]} and {names[1]} belong together: give both, or neither to hold classes out.')
        if pair[0] is None:
            share = min(held_out, most_held_out / max(1, frame['label'].nunique()))
            frame, held = split_by_class(frame, share, seed=config.data_seed)
            turn = held.groupby('label').cumcount() % 3
            frames |= {names[0]: held[turn == 0].reset_index(drop=True), names[1]: held[turn > 0].reset_index(drop=True)}
        else:
            frames |= dict(zip(names, (read_dataset(source, root) for source in pair), strict=True))
    frames['train'] = select_classes(frame, config.min_images, config.max_images, config.n_classes, config.data_seed)
    frames['pca'] = frames['train'].sample(min(len(frames['train']), config.pca_images), random_state=config.data_seed)
    for name in ('query', 'selection_query'):
        seen = set(frames[name]['label']) & set(frames['train']['label'])
        if seen:
            print(f'{len(seen)} of the classes in {name} are trained on too, so its score is not one of never-seen '
                  f'objects; first {min(seen)}')
    return frames


def list_photos(folder):
    """Every photograph below a folder, however it is arranged: DataFrame path, label (its folder's name), domain."""
    paths = sorted(str(path) for path in Path(folder).rglob('*') if path.suffix.lower() in PHOTO_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f'{folder} holds no photographs ({", ".join(PHOTO_SUFFIXES)}).')
    return pd.DataFrame({'path': paths, 'label': [Path(path).parent.name for path in paths], 'domain': ''})


def describe(frames):
    """DataFrame part, photographs, classes, domains, digest of the frames of a run."""
    return pd.DataFrame([{'part': name, 'photographs': len(frame), 'classes': frame['label'].nunique(),
                          'domains': ', '.join(sorted(frame['domain'].unique())), 'digest': digest(frame)}
                         for name, frame in frames.items()]).set_index('part')


# ── Pixels and batches ───────────────────────────────────────────────────────────────────────────────────────────────
# in: a DataFrame path, label
# out: batches of uint8 images (b, 3, size, size), the same for a seed whatever the workers

PHOTO_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')  # Pillow knows more, some run other programs
_UPRIGHT = dict(zip(range(2, 9), (  # EXIF orientation -> what undoes it
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), strict=True))


def read_photo(path, size, max_pixels=89_000_000):
    """A photo as RGB image, upright, squashed to (size, size) by antialiased bicubic; alpha on white. See read_pixels."""
    return Image.fromarray(read_pixels(path, size, max_pixels).numpy())


def read_pixels(path, size, max_pixels=89_000_000):
    """What read_photo shows, as uint8 (size, size, 3).

    JPEGs are decoded at the smallest of 1, 1/2, 1/4, 1/8 that leaves twice `size`: at most 2/255 mean
    absolute error against full decoding (with 1.4 times `size` 3.5/255 was measured). Raises OSError, naming
    the photo, when it cannot be decoded whole or has more than `max_pixels` (Pillow warns just above)."""
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise OSError(f'{image.width} × {image.height} pixels are more than {max_pixels:,}')
            _, box = image.draft(None, (2 * size, 2 * size)) or (None, (0, 0, *image.size))
            small = _squash(_to_rgb(image), size, box)
            turn = _UPRIGHT.get(_orientation(image))  # on the small square: the same, and cheaper
            return small if turn is None else torch.from_numpy(np.array(Image.fromarray(small.numpy()).transpose(turn)))
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise OSError(f'The photo {path} cannot be read: {error}') from error


def _to_rgb(image):
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy


def _squash(image, size, box):
    """uint8 (size, size, 3) by torch's kernel: Pillow's bicubic within 2 levels, in less than half of its time. `box` is
    the exact extent: 427 rows decoded at half scale are 214, of which 213.5 are picture."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that bytes cannot be written to: nobody does, and another copy takes .3 ms
        pixels = torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(1, *image.size[::-1], 3).permute(0, 3, 1, 2)
    scale = [size / side * (1 + 1e-9) for side in (box[3], box[2])]  # the output's side is rounded down
    return F.interpolate(pixels, scale_factor=scale, mode='bicubic', antialias=True)[0].permute(1, 2, 0)


def _orientation(image):
    with suppress(Exception):  # a broken EXIF block does not make a photo unreadable
        return image.getexif().get(0x0112)


def _uniform(low, high):
    return torch.empty(1).uniform_(low, high).item()


def _shift_scale_rotate(image, shift, scale, angle, border):
    """One random similarity about the centre; `border` says, as cv2 does, what comes in."""
    centre = [(side - 1) / 2 for side in image.size]
    matrix = cv2.getRotationMatrix2D(centre, _uniform(-angle, angle), 1 + _uniform(-scale, scale))
    matrix[:, 2] += [side * _uniform(-shift, shift) for side in image.size]
    border = getattr(cv2, f'BORDER_{border}')
    return Image.fromarray(cv2.warpAffine(np.asarray(image), matrix, image.size, borderMode=border))


def _sharpen(image):
    """albumentations' Sharpen of lightness 1: each pixel moves away from its eight neighbours."""
    kernel = np.full((3, 3), -_uniform(.2, .5))
    kernel[1, 1] = 1 - kernel[0, 0] * 8
    return Image.fromarray(cv2.filter2D(np.asarray(image), -1, kernel))


def _clahe(image):
    lab = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(_uniform(1, 4), (8, 8)).apply(lab[..., 0])
    return Image.fromarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def _turn_hue(image, part):  # eight times as fast as torchvision's
    hsv = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * _uniform(-part, part)) % 256)
    return Image.fromarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


AUGMENTATIONS = {
    'none': lambda: [],
    'flip': lambda: [v2.RandomHorizontalFlip()],
    'autoaugment': lambda: [v2.AutoAugment()],
    'cutout': lambda: [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.JPEG((99, 100))], .5),
        v2.RandomApply([partial(_shift_scale_rotate, shift=.2, scale=.2, angle=10, border='CONSTANT')], .7),
        v2.PILToTensor(),
        v2.RandomErasing(.5, scale=(.16, .16), ratio=(1, 1))],  # one square, 40 % of the side
    'happywhale': lambda: [
        v2.RandomApply([partial(_shift_scale_rotate, shift=.0625, scale=.1, angle=15, border='REFLECT')], .5),
        v2.RandomApply([v2.RandomChoice([_sharpen, v2.Grayscale(3), _clahe])], .5),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(.1, .1, .1), partial(_turn_hue, part=.2)], .5)],
}


def augmentation(name):
    """One of AUGMENTATIONS: RGB image (s, s) -> uint8 tensor (3, s, s), random by torch's generator alone.

    The 4th place's augmentations with two differences: they run at the tower's size (theirs ran before the
    resize, at several times the cost), and cutout's hole lies inside the image (theirs could stick out)."""
    if name not in AUGMENTATIONS:
        raise ValueError(f'Unknown augmentation {name!r}; there are {", ".join(AUGMENTATIONS)}.')
    return v2.Compose([*AUGMENTATIONS[name](), v2.PILToTensor()])


class Photos(Dataset):
    """The photos of a frame: photos[epoch, i], or photos[i] for epoch 0.

    An item is {'image': uint8 (3, size, size), 'target': int, 'index': i, 'unreadable': bool}; the
    augmentation depends on (seed, epoch, i) alone. Targets default to the rank of the label. With `replace`
    (training) an unreadable photo gives way to the next readable one of its class, or else of any class;
    without it (evaluation) its image is black. More than `max_unreadable` (None: 100, or one in a hundred) raise
    OSError. `sampling`: what a training order draws equally often; a photo's second turn in an epoch is
    photos[epoch, i, 1]."""

    def __init__(self, frame, size, augment='none', *, seed=5, targets=None, replace=False,
                 max_unreadable=None, sampling='photographs'):
        self.paths = frame['path'].tolist()
        ranks, _ = pd.factorize(frame['label'], sort=True)
        self.targets = ranks if targets is None else np.asarray(targets)
        column = {'photographs': None, 'classes': 'label', 'domains': 'domain'}[sampling]
        self.groups = frame[column].to_numpy() if column else None
        transform = augmentation(augment)
        self.transform = None if augment == 'none' else transform  # which would only make an image of pixels and back
        self.size, self.seed, self.replace = size, seed, replace
        self.max_unreadable = max(100, len(frame) // 100) if max_unreadable is None else max_unreadable
        self._bad = torch.zeros(len(frame), dtype=torch.bool).share_memory_()  # workers write too

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index, *turn = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        pixels, source = self._readable(index)
        image = pixels.permute(2, 0, 1)
        if self.transform:
            with _seeded(self.seed, epoch, index, *turn):
                image = self.transform(Image.fromarray(pixels.numpy()))
        return {'image': image, 'target': int(self.targets[source]), 'index': index,
                'unreadable': bool(self._bad[index])}

    @property
    def unreadable(self):
        """Paths of the photos that could not be read so far, by whichever worker."""
        bad = self._bad.clone()  # nonzero counts, then looks again, and fails where a worker wrote between
        return [self.paths[index] for index in bad.nonzero().flatten().tolist()]

    def _readable(self, index):
        for source in self._candidates(index):
            try:
                return read_pixels(self.paths[source], self.size), source
            except OSError as error:
                self._bad[source] = True
                if self._bad.sum() > self.max_unreadable:
                    raise OSError(f'More than {self.max_unreadable} photos (max_unreadable) cannot be read; '
                                  f'the last: {error}') from None
        if self.replace:
            raise OSError(f'None of the {len(self):,} photos can be read; the first is {self.paths[0]}.')
        return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), index

    def _candidates(self, index):
        yield index
        if self.replace:
            others = np.arange(index + 1, index + len(self)) % len(self)
            same = self.targets[others] == self.targets[index]
            yield from others[same]
            yield from others[~same]


class KeptPhotos(Photos):
    """Photos for evaluation that read each photo once and keep its pixels, in memory that forked processes share."""

    def __init__(self, frame, size):
        super().__init__(frame, size)
        shape = len(frame), 3, size, size
        pixels = mmap.mmap(-1, max(1, math.prod(shape)))  # not share_memory_, as /dev/shm may be small
        self._pixels = torch.frombuffer(pixels, dtype=torch.uint8)[:math.prod(shape)].view(shape)
        self._read = torch.zeros(len(frame), dtype=torch.bool).share_memory_()

    def __getitem__(self, index):
        index = range(len(self))[index]
        if not self._read[index]:
            self._pixels[index] = super().__getitem__(index)['image']
            self._read[index] = True
        return {'image': self._pixels[index], 'target': int(self.targets[index]), 'index': index,
                'unreadable': bool(self._bad[index])}


def keep_pixels(frames, size):
    """{name: Photos} of frames that many models will look at, each photo read once for all of them; read anew each time
    where all of them together would take more than a quarter of the memory that is free now."""
    needed = sum(map(len, frames.values())) * 3 * size * size
    kind = KeptPhotos if needed < psutil.virtual_memory().available / 4 else Photos
    return {name: kind(frame, size) for name, frame in frames.items()}


@contextmanager
def _seeded(*entropy):
    """torch's CPU generator seeded from `entropy` for a while; then its stream goes on where it was."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        generator.set_state(state)


def sampling_order(n, groups, seed, epoch):
    """[(epoch, index)] or, from the second turn of a sample on, [(epoch, index, turn)]: the n samples of an epoch.

    groups (n,): each of its values is drawn equally often, and each sample of one as often as another, up to one time
    (balanced sampling; Ypsilantis 2023, "Towards Universal Image Embeddings", https://arxiv.org/abs/2309.01858). None: every
    sample once.
    """
    rng = np.random.default_rng([seed, epoch])
    if groups is None:
        return [(epoch, index) for index in rng.permutation(n).tolist()]
    codes, names = pd.factorize(np.asarray(groups))
    members = np.split(np.argsort(codes, kind='stable'), np.bincount(codes).cumsum()[:-1])
    each = n // len(names) + (rng.permutation(len(names)) < n % len(names))
    order = rng.permutation(np.concatenate([np.resize(rng.permutation(own), k) for own, k in zip(members, each)]))
    turns = pd.Series(order).groupby(order).cumcount()
    return [(epoch, index, turn) if turn else (epoch, index) for index, turn in zip(order.tolist(), turns)]


def loader(photos, batch_size, *, train=False, epoch=0, start=0, rank=0, processes=1, workers=None):
    """DataLoader over Photos, for one pass. Evaluation: every photo in order; of several processes each takes every
    `processes`-th, as many as the others, so that the last may repeat some.

    Training: full batches in an order that depends on (photos.seed, epoch) alone, from position `start` on
    (the number of samples already used in this epoch, by all processes). Neither making nor using a loader
    draws from torch's global generator. `workers` None: up to 8 where there is a GPU or 8 cores, else 0,
    since the tower then needs the cores itself."""
    if train and len(photos) < batch_size:
        raise ValueError(f'{len(photos)} photos do not fill a batch of {batch_size}; lower the batch size.')
    cuda, cores = torch.cuda.is_available(), os.cpu_count() or 1
    if workers is None:
        workers = min(cores, 8) if cuda or cores >= 8 else 0
    if train:
        order, together = sampling_order(len(photos), photos.groups, photos.seed, epoch)[start:], batch_size * processes
        order = [key for place, key in enumerate(order[:len(order) // together * together])
                 if place % together // batch_size == rank]  # every process takes its part of the same global batch
    else:
        order = [place % len(photos) for place in range(rank, -(-len(photos) // processes) * processes, processes)]
    return DataLoader(photos, batch_size, sampler=order, drop_last=train, num_workers=workers, pin_memory=cuda,
                      worker_init_fn=_one_thread, generator=torch.Generator().manual_seed(photos.seed))


def _one_thread(_):
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# ── Tower and head ───────────────────────────────────────────────────────────────────────────────────────────────────
# in: a model's name and its weights · out: an Embedder, uint8 photographs -> unit vectors

@dataclass(frozen=True)
class TowerSpec:
    """What belongs to an image tower's weights and is lost when only the weights are kept."""
    model_name: str     # as given to load_image_tower
    pretrained: str     # tag or file of the weights it started from
    image_size: int     # pixels
    mean: tuple         # of the red, green and blue values in 0..1 that the weights were trained with
    std: tuple
    activation: str     # 'gelu', 'quick_gelu', or '' for what is not open_clip's own transformer
    width: int          # columns of the tower's output
    architecture: dict  # rebuilds the module without weights; see build_tower


def closest(name, names):
    """' Did you mean …?' for an error sentence, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=3)
    return f' Did you mean {" or ".join(near)}?' if near else ''


def weights_source(model_name, pretrained):
    """(what open_clip is to load, tag's facts) for a built-in name: a tag, a file, or 'tag@file' (a file that keeps the
    tag's preprocessing and activation, as on Kaggle without internet); 'random' and 'tag@random' load nothing."""
    if model_name not in open_clip.list_models():
        raise ValueError(f'open_clip has no model {model_name!r}.{closest(model_name, open_clip.list_models())}')
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    tag, _, file = pretrained.partition('@') if '@' in pretrained else (pretrained, '', '')
    if pretrained == 'random':
        return None, {}
    if tag in tags and file == 'random':
        return None, open_clip.get_pretrained_cfg(model_name, tag)
    if tag in tags and not file:
        return tag, open_clip.get_pretrained_cfg(model_name, tag)
    path = file or pretrained
    if not Path(path).is_file() or (file and tag not in tags):
        raise ValueError(f'{pretrained!r} is neither a weights file nor a tag of {model_name}; its tags are '
                         f'{", ".join(tags)} (or "tag@file" for a file downloaded earlier).')
    facts = [open_clip.get_pretrained_cfg(model_name, known) for known in ([tag] if file else tags)]
    if any((f.get('mean'), f.get('std'), f.get('quick_gelu')) !=
           (facts[0].get('mean'), facts[0].get('std'), facts[0].get('quick_gelu')) for f in facts):
        raise ValueError(f'{path} does not say how its photographs were normalised, and the weights of {model_name} '
                         f'differ in that: write "tag@{path}" with one of {", ".join(tags)}.')
    return path, facts[0] if facts else {}


@contextmanager
def _no_warnings_logged():
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def load_open_clip(model_name, pretrained, image_size=None):
    """open_clip's whole CLIP with weights, never silently random."""
    random = pretrained == 'random' or pretrained.endswith('@random')
    if model_name.startswith(('local-dir:', 'hf-hub:')):
        source, facts = None, {}
    else:
        source, facts = weights_source(model_name, pretrained)
    facts = {name: facts[name] for name in ('mean', 'std') if facts.get(name)}, facts.get('quick_gelu', False)
    try:
        with _no_warnings_logged() if random else nullcontext():  # of weights that are random, as they shall be
            return open_clip.create_model(model_name, pretrained=source, force_image_size=image_size,
                                          load_weights=not random, require_pretrained=not random,
                                          device=torch.get_default_device(),
                                          force_quick_gelu=facts[1], force_preprocess_cfg=facts[0])
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f'The weights {pretrained or model_name!r} do not load into {model_name}: '
                         f'{str(error).strip().splitlines()[0]}') from error


def load_image_tower(model_name, pretrained='', image_size=None):
    """The image half of a pretrained model, with what belongs to its weights as `tower.spec`.

    model_name: an open_clip name, 'local-dir:folder', 'hf-hub:org/name', or 'timm:name'. pretrained: a tag, a file,
    'tag@file', 'random' or 'tag@random'. image_size: pixels; another than the weights' own resizes the position embedding.
    Returns a module: normalised float (n, 3, s, s) -> (n, spec.width). ValueError: unknown name, tag or file, or
    weights that do not fit.
    """
    if model_name.startswith('timm:'):
        return load_timm_tower(model_name, pretrained, image_size)
    tower = quicken(load_open_clip(model_name, pretrained, image_size).visual)
    config = open_clip.get_model_config(model_name)
    quick = any(isinstance(module, QuickGELU) for module in tower.modules())
    own = isinstance(tower, VisionTransformer)
    size, facts = tower.image_size, tower.preprocess_cfg
    size = size[0] if isinstance(size, (tuple, list)) else size
    vision = config['vision_cfg'] | {'image_size': size, 'timm_model_pretrained': False}
    tower.spec = TowerSpec(model_name, pretrained, size, tuple(facts['mean']), tuple(facts['std']),
                           ('quick_gelu' if quick else 'gelu') if own else '', config['embed_dim'],
                           {'library': 'open_clip', 'embed_dim': config['embed_dim'], 'vision_cfg': vision,
                            'quick_gelu': quick})
    return tower


def load_timm_tower(model_name, pretrained, image_size=None):
    """A plain timm model without its classifier; see load_image_tower."""
    name = model_name.removeprefix('timm:')
    if name.split('.')[0] not in timm.list_models():
        raise ValueError(f'timm has no model {name!r}.{closest(name, timm.list_models())}')
    file = Path(pretrained) if pretrained and pretrained != 'random' else None
    if file and not file.is_file():
        raise ValueError(f'The weights file {pretrained} does not exist; pretrained="" asks timm for its own.')
    options = {'num_classes': 0}
    try:
        tower = timm.create_model(name, pretrained=not pretrained, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f'The weights of timm:{name} could not be had ({str(error).splitlines()[0]}): turn the internet '
                         f'on, or give a weights file as pretrained.') from None
    facts = timm.data.resolve_model_data_config(tower)
    size = image_size or facts['input_size'][-1]
    if file:
        classifier = tower.pretrained_cfg.get('classifier') or '-'
        state = {name: tensor for name, tensor in open_checkpoint(file).items()
                 if not name.startswith(f'{classifier}.')}
        load_strictly(tower, state, file)
    resize_tower(tower, size)
    with torch.inference_mode():
        width = tower.eval()(torch.zeros(1, 3, size, size)).shape[1]
    tower.spec = TowerSpec(model_name, pretrained, size, tuple(facts['mean']), tuple(facts['std']), '', width,
                           {'library': 'timm', 'name': name, 'options': options})
    return tower


def load_strictly(module, state, source):
    """module.load_state_dict with every missing, unexpected or misshapen tensor an error of one sentence."""
    own = module.state_dict()
    wrong = [f'{name} {"is missing" if name not in state else "is not in the model" if name not in own else "has shape"}'
             for name in sorted(set(own) | set(state))
             if name not in own or name not in state or own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(f'{source} does not fit the model in {len(wrong)} of {len(own)} tensors, first '
                         f'{"; ".join(wrong[:3])}: it belongs to another architecture, image size or class list.')
    module.load_state_dict(state)


def unloaded_tower(config):
    """The tower of a configuration with random weights, for a checkpoint that holds its own; nothing is downloaded."""
    tag = config.pretrained.partition('@')[0]
    known = tag in open_clip.list_pretrained_tags_by_model(config.model_name)
    tower = load_image_tower(config.model_name, f'{tag}@random' if known else 'random', config.image_size)
    tower.spec = replace(tower.spec, pretrained=config.pretrained)
    return tower


def build_tower(spec):
    """The tower of a TowerSpec without its weights (random ones), for weights of our own."""
    plan = spec.architecture
    if plan.get('library') == 'timm':
        tower = timm.create_model(plan['name'], pretrained=False, **plan['options'])
    elif plan.get('library') == 'open_clip':
        tower = quicken(
            _build_vision_tower(plan['embed_dim'], CLIPVisionCfg(**plan['vision_cfg']), plan['quick_gelu']))
    else:
        raise ValueError(f'{spec.model_name} cannot be rebuilt from its checkpoint alone; pass its tower along.')
    resize_tower(tower, spec.image_size, plan.get('stride'))
    tower.spec = spec
    return tower


class ClassTokenBlock(ResidualAttentionBlock):
    """A transformer's last block where only its class token is read: no other token's output is computed."""

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        x = self.ln_1(q_x)
        x = q_x[:, :1] + self.ls_1(self.attention(x[:, :1], x, x, attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class PackedAttention(nn.MultiheadAttention):
    """Self-attention with the same weights and result, cheaper: query, key and value are parts of one projection.

    torch's own copies them apart, and takes them out one by one, for each of which its backward pass fills a tensor of all
    three with zeros and adds it to the rest. An exported file has torch's own, whose operators its reader knows.
    """

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        if torch.jit.is_tracing() or attn_mask is not None:
            return super().forward(query, key, value, need_weights=need_weights, attn_mask=attn_mask)
        if query is key:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, 2)
        else:  # the class token alone asks
            parts = [self.embed_dim, 2 * self.embed_dim]
            (q_weight, weight), (q_bias, bias) = self.in_proj_weight.split(parts), self.in_proj_bias.split(parts)
            q, (k, v) = F.linear(query, q_weight, q_bias), F.linear(key, weight, bias).chunk(2, 2)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def quicken(tower):
    """open_clip's own transformer with the same weights and output and less work: PackedAttention in its blocks, and the
    last one ClassTokenBlock where that is what it pools, which saves five sixths of the block's arithmetic (3 % of ViT-H/14,
    7 % of ViT-B/16, 14 % of the miniature)."""
    blocks = tower.transformer.resblocks if isinstance(tower, VisionTransformer) and tower.transformer.batch_first else []
    for block in blocks:
        if type(block.attn) is nn.MultiheadAttention and block.attn.in_proj_bias is not None and not block.attn.dropout:
            block.attn.__class__ = PackedAttention
    if blocks and type(blocks[-1]) is ResidualAttentionBlock and tower.attn_pool is None and tower.pool_type == 'tok' \
            and not tower.output_tokens:
        blocks[-1].__class__ = ClassTokenBlock
    return tower


def resize_tower(tower, side, stride=None):
    """Makes a tower take squares of `side` pixels, its patches `stride` pixels apart (None: as they are), in place.

    Position embeddings are interpolated to the new grid, as when weights are loaded at another size; convolutions take any
    size. A stride is for open_clip's own transformer.
    """
    if isinstance(tower, VisionTransformer):
        conv, old = tower.conv1, tower.positional_embedding
        conv.stride = (stride, stride) if stride else conv.stride
        tower.image_size, tower.grid_size = (side, side), ((side - conv.kernel_size[0]) // conv.stride[0] + 1,) * 2
        positions = resample_abs_pos_embed(old.detach()[None], list(tower.grid_size))[0]
        tower.positional_embedding = nn.Parameter(positions, requires_grad=old.requires_grad)
    elif hasattr(tower, 'set_input_size'):  # timm's transformers
        tower.set_input_size((side, side))


def resize(model, side, overlap=0.0):
    """The Embedder for photographs of another side or patches that overlap by a share of theirs, in place; its spec says so.
    ValueError: an overlap for what is not open_clip's own transformer."""
    plan, stride = copy.deepcopy(model.spec.architecture), None
    if isinstance(model.tower, VisionTransformer):
        patch = model.tower.conv1.kernel_size[0]
        stride = max(1, round(patch * (1 - overlap)))
        same = stride == plan.get('stride', patch) and side == model.spec.image_size
        plan['stride'] = stride
    elif overlap:
        raise ValueError(f"Config.overlap is {overlap}, but only patches of open_clip's own transformers can overlap, and "
                         f'{model.spec.model_name} is none of them: set it to 0.')
    else:
        same = side == model.spec.image_size
    if same:
        return
    resize_tower(model.tower, side, stride)
    if plan.get('library') == 'open_clip':
        plan['vision_cfg']['image_size'] = side
    model.spec = model.tower.spec = replace(model.spec, image_size=side, architecture=plan)


def words_of(name):
    return re.findall(r'[a-z0-9]+', name.lower())


class WordTokenizer:
    """Whole words to numbers, for a text tower with a small vocabulary (the miniature CLIP). Words it does not know are
    left out, counted in `unknown`."""

    def __init__(self, words, context_length):
        self.numbers = {word: number for number, word in enumerate(words, start=2)}  # 0 pads, 1 begins
        self.context_length = context_length
        self.unknown = Counter()

    def __call__(self, texts):
        """list of str -> int64 (n, context_length)."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        end = len(self.numbers) + 2  # the highest number: open_clip pools a text where the number is highest
        for row, text in zip(tokens, texts):
            self.unknown.update(word for word in words_of(text) if word not in self.numbers)
            known = [self.numbers[word] for word in words_of(text) if word in self.numbers]
            numbers = [1, *known[:self.context_length - 2], end]
            row[:len(numbers)] = torch.tensor(numbers)
        return tokens


def load_text_tower(model_name, pretrained=''):
    """encode(texts, batch_size=256) -> float32 (n, d), the text half of the model that load_image_tower would load.

    Not normalised. Unknown words of a small vocabulary are reported once a call.
    """
    model = load_open_clip(model_name, pretrained).eval()
    config = Path(model_name.removeprefix('local-dir:'), 'open_clip_config.json')
    words = json.loads(config.read_text()).get('words') if model_name.startswith('local-dir:') else None
    tokenizer = WordTokenizer(words, model.context_length) if words else open_clip.get_tokenizer(model_name)

    @torch.inference_mode()
    def encode(texts, batch_size=256):
        model.to(best_device())
        batches = [tokenizer(texts[i:i + batch_size]) for i in range(0, len(texts), batch_size)]
        bar = progress_bar(batches, 'texts', disable=own_share()[0] > 0)
        vectors = [model.encode_text(batch.to(best_device())).float().cpu() for batch in bar]
        if getattr(tokenizer, 'unknown', None):
            print(f'{len(tokenizer.unknown)} words are unknown to {model_name}: '
                  f'{", ".join(word for word, _ in tokenizer.unknown.most_common(8))}, …')
            tokenizer.unknown.clear()
        return torch.cat(vectors).numpy()

    return encode


def best_device():
    """This process's GPU, or the CPU. RuntimeError for a GPU that this PyTorch was not built for."""
    if not torch.cuda.is_available():
        return torch.device('cpu')
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not has_kernels(capability, built_for):
        raise RuntimeError(f'PyTorch {torch.__version__} has no kernels for the {torch.cuda.get_device_name()} (sm_'
                           f'{capability[0]}{capability[1]}; it is built for {", ".join(built_for)}): choose another '
                           f'accelerator, on Kaggle "GPU T4 x2" instead of "GPU P100".')
    return torch.device('cuda')


def has_kernels(capability, built_for):
    """Whether a PyTorch with these architectures ('sm_75', 'compute_90') runs on a GPU of this (major, minor): machine
    code does within a major number, compute_ code on all that is newer."""
    for name in built_for:
        if not (parts := re.fullmatch(r'(sm|compute)_(\d+)\w*', name)):
            return True  # AMD's names, whose numbers say nothing of what runs where
        kind, digits = parts.groups()
        version = int(digits[:-1]), int(digits[-1])
        if version <= capability and (kind == 'compute' or version[0] == capability[0]):
            return True
    return False


class NearestCenter(torch.autograd.Function):
    """Cosine of unit vectors (n, d) to the nearest of every class's `subcenters` centres: (n, classes).

    Its gradient is written out since the centres are the head's largest tensor by far: autograd passes over it ten times,
    this three times.
    """

    @staticmethod
    def forward(ctx, vectors, centers, subcenters):
        length = torch.linalg.vector_norm(centers, dim=1).clamp_min(1e-12)
        cosine, nearest = (vectors @ centers.T).div_(length).unflatten(1, (-1, subcenters)).max(2)
        ctx.save_for_backward(vectors, centers, length, cosine, nearest)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        vectors, centers, length, cosine, nearest = ctx.saved_tensors
        slope, along = gradient.new_zeros(2, *cosine.shape, len(centers) // cosine.shape[1])  # of all centres
        slope = slope.scatter_(2, nearest[..., None], gradient[..., None]).flatten(1).div_(length)
        along = along.scatter_(2, nearest[..., None], (gradient * cosine)[..., None]).flatten(1).sum(0).div_(length ** 2)
        return slope @ centers, torch.addmm(centers * -along[:, None], slope.T, vectors), None


class SubcenterHead(nn.Module):
    """Linear map to the embedding and several centres a class (Deng 2020, sub-centre ArcFace).

    `seed` alone decides the initial weights: ingredients of one soup must share them bit for bit. norm: every feature is
    brought to mean 0 and variance 1 first, over the photographs of a step while training (5th place).
    """
    DROPOUTS = (.1, .2, .3, .4, .5)  # the five parallel masks of the published head, after one of .1

    def __init__(self, width, n_classes, *, dim=512, subcenters=3, norm=False, seed=5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.subcenters = subcenters
        self.norm = nn.BatchNorm1d(width, affine=False) if norm else nn.Identity()
        self.embedding = nn.Linear(width, dim, bias=False)
        self.centers = nn.Parameter(torch.empty(n_classes * subcenters, dim))  # row = class · subcenters + centre
        nn.init.kaiming_uniform_(self.embedding.weight, a=math.sqrt(5), generator=generator)
        nn.init.xavier_uniform_(self.centers, generator=generator)

    def forward(self, features):
        """(n, width) -> embedding (n, dim), not normalised; dropout while training.

        The mean of five dropped-out copies through one bias-free map is that map of the mean copy: one pass, not five.
        """
        features = self.norm(features)
        if self.training:
            mask = sum(F.dropout(torch.ones_like(features), p) for p in self.DROPOUTS) / len(self.DROPOUTS)
            features = F.dropout(features, .1) * mask
        return self.embedding(features)

    def cosine(self, embedding, classes=None):
        """(n, dim) -> cosine to the nearest centre of every class, float32 (n, n_classes), or of `classes` (k,): (n, k)."""
        centers = self.centers
        if classes is not None:
            centers = centers.unflatten(0, (-1, self.subcenters))[classes].flatten(0, 1)
        with torch.autocast(embedding.device.type, enabled=False):  # a cosine near 1 has no digits left in fp16
            return NearestCenter.apply(F.normalize(embedding.float()), centers.float(), self.subcenters)


class Embedder(nn.Module):
    """Photographs to unit vectors: normalise, tower, head's linear map, L2, projection, L2.

    tower: any module that maps float (n, 3, s, s) to (n, width); `spec` if it has none of its own as tower.spec.
    head: SubcenterHead or None. projection: nn.Linear or None.
    """

    def __init__(self, tower, head=None, projection=None, spec=None):
        super().__init__()
        spec = spec or getattr(tower, 'spec', None)
        if spec is None:
            raise ValueError('The tower does not say its image size, mean and std: pass spec=TowerSpec(…).')
        self.tower, self.head, self.projection, self.spec = tower, head, projection, spec
        self.register_buffer('mean', torch.tensor(spec.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer('std', torch.tensor(spec.std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images, classify=False, relate=False, classes=None):
        """uint8 or float 0..255 (n, 3, s, s) -> float32 (n, dim) of length 1; classify: cosines (n, n_classes), or of some
        `classes` (k,) alone (n, k); relate: these and the head's embedding (n, dim) that they are of."""
        features = self.tower((images.float() - self.mean) / self.std)
        if classify or relate:
            embedding = self.head(features)
            cosine = self.head.cosine(embedding, classes)
            return (cosine, embedding) if relate else cosine
        return self.project(features.float())

    def train(self, mode=True):
        """As nn.Module's, but a tower's BatchNorm keeps the statistics it was pretrained with: those of a few photographs
        at a time are noise, and ruin the tower."""
        super().train(mode)
        for module in self.tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def project(self, features):
        """What follows the tower: (n, width) -> (n, dim) of length 1."""
        vectors = F.normalize(self.head.embedding(self.head.norm(features)) if self.head is not None else features)
        return vectors if self.projection is None else F.normalize(self.projection(vectors))


BLOCK = re.compile(r'(?:(?:resblocks|blocks|layers|stages)\.|\blayer)(\d+)\.')
STEM = re.compile(r'(^|\.)(conv1|class_embedding|positional_embedding|ln_pre|patch_embed|pos_embed|cls_token|reg_token|bn1'
                  r'|norm_pre|conv_stem|stem)(\.|$)')


def tower_blocks(tower):
    """({name: block of each parameter}, number of blocks); -1 lies before the blocks, their number follows them."""
    found = {name: BLOCK.search(name) for name, _ in tower.named_parameters()}
    depth = 1 + max((int(match[1]) for match in found.values() if match), default=0)
    return {name: int(match[1]) if match else -1 if STEM.search(name) else depth for name, match in found.items()}, depth


def freeze(model, trains):
    """Takes the gradients from what Config.trains leaves out; 'all' leaves everything as it is."""
    blocks, depth = tower_blocks(model.tower)
    firsts = {'all': -1, 'tower': -1, 'head': depth + 1} | {f'last {n}': depth - n for n in range(1, depth + 1)}
    if trains not in firsts:
        raise ValueError(f'Config.trains is {trains!r}, but the tower has {depth} blocks.')
    for name, parameter in model.tower.named_parameters():
        if blocks[name] < firsts[trains]:
            parameter.requires_grad_(False)
    if trains == 'tower':
        model.head.requires_grad_(False)


def param_groups(model, config):
    """AdamW's groups for an Embedder: every trainable parameter in exactly one.

    The tower's blocks take the learning rates of config.bands (stretched, if the bands count other blocks than the
    tower has); what lies before the blocks takes the first band's, what follows them (final norm, projection) the last
    one's. Biases, norms, class token, pooling query and position embedding are not decayed. Returns a list of dicts:
    name, params, names, lr, weight_decay.
    """
    (blocks, depth), ends = tower_blocks(model.tower), [end for end, _ in config.bands]
    groups = {}

    def add(group, name, parameter, lr, decay):
        kept = parameter.ndim < 2 or re.search(r'embedding$|pos_embed$|_token$|latent$', name)
        group, decay = (f'{group}, no decay', 0.0) if kept else (group, decay)
        entry = groups.setdefault(group, {'name': group, 'params': [], 'names': [], 'lr': lr, 'weight_decay': decay})
        entry['params'].append(parameter)
        entry['names'].append(name)

    for name, parameter in model.tower.named_parameters():
        middle = (max(blocks[name], 0) + .5) * ends[-1] / depth  # of the block, among those that the bands count
        band = min(bisect.bisect_right(ends, middle), len(ends) - 1)  # what follows the blocks lies beyond the last
        if parameter.requires_grad:
            add(f'tower, blocks below {math.ceil(ends[band] * depth / ends[-1] - .5)}', f'tower.{name}', parameter,
                config.bands[band][1], config.tower_decay)
    for name, parameter in ([] if model.head is None else model.head.named_parameters()):
        if parameter.requires_grad:
            add('head', f'head.{name}', parameter, config.head_lr, config.head_decay)
    return list(groups.values())


def group_table(groups):
    """DataFrame a group: tensors, parameters (millions), learning rate, decay, first and last name."""
    return pd.DataFrame([{'group': g['name'], 'tensors': len(g['params']), 'lr': g['lr'],
                          'parameters (M)': sum(p.numel() for p in g['params']) / 1e6, 'decay': g['weight_decay'],
                          'from': g['names'][0], 'to': g['names'][-1]} for g in groups]).set_index('group')


# ── Losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: cosines, labels, class counts · out: one number to minimise

def adaptive_margins(counts, *, low=0.05, width=0.45, power=0.25):
    """A margin a class, wider for rare ones: n^-power, scaled from its least to its greatest value onto low … low+width.

    counts: photographs a class (C,), all > 0. Returns float32 (C,), radians. Equal counts leave nothing to tell the
    classes apart: all take the middle (the published code divides 0 by 0 there). Source: arXiv 2210.11141, sec. 3.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if len(counts) == 0 or counts.min() < 1:
        raise ValueError('Every class needs at least one photograph to have a margin; drop the empty classes first.')
    rarity = counts ** -power
    spread = rarity.max() - rarity.min()
    share = (rarity - rarity.min()) / spread if spread > 0 else torch.full_like(rarity, .5)
    return (low + width * share).float()


def arcface_loss(cosine, labels, margins, scale=30.0):
    """Additive angular margin (Deng 2019, eq. 3): cross-entropy of scale · cos(θ + m) at the label, scale · cos θ elsewhere.

    cosine: float (n, C); labels: int64 (n,); margins: float (C,), radians. Where θ + m would pass π the logit goes on
    falling as cos θ - m·sin m. Finite gradients at cos θ = ±1. Returns the mean over the batch, a float32 scalar.
    """
    margin = margins.to(cosine.device, torch.float32)[labels]
    cosine = cosine.float()
    target = cosine.gather(1, labels[:, None]).squeeze(1)
    sine = (1 - target * target).clamp_min(1e-7).sqrt()  # √0 has an infinite slope; below the clamp the slope is 0
    shifted = target * margin.cos() - sine * margin.sin()
    shifted = torch.where(target > -margin.cos(), shifted, target - margin * margin.sin())
    return F.cross_entropy(scale * cosine.scatter(1, labels[:, None], shifted[:, None]), labels)


def some_classes(labels, n_classes, share):
    """(classes (k,) ascending, labels (n,) among them): those of a batch and others at random, `share` of all; all: (None,
    labels). A step then costs that share of the head's products (An 2022, "Killing two birds with one stone: Partial FC",
    https://arxiv.org/abs/2203.15565)."""
    if share == 1:
        return None, labels
    rank = torch.rand(n_classes).index_fill_(0, labels.cpu(), 2.)
    classes = rank.topk(max(round(share * n_classes), len(labels.unique()))).indices.sort().values.to(labels.device)
    return classes, torch.searchsorted(classes, labels)


def relation_loss(embedding, teacher):
    """Relational knowledge distillation: what differs between the photographs' distances, and twice their angles.

    embedding (n, d), teacher (n, D): of the same photographs, any length. Distances are relative to their mean; an angle is
    the cosine at the second of three photographs. Huber loss of the differences; a float32 scalar. Source: Park 2019,
    "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068, eq. 4-9.
    """
    (near, angle), (near_to_be, angle_to_be) = map(_relations, (embedding, teacher))
    return F.huber_loss(near, near_to_be) + 2 * F.huber_loss(angle, angle_to_be)


def _relations(vectors):
    """(relative distances (n, n), cosines of all angles (n, n, n)) between the rows, brought to length 1."""
    vectors = F.normalize(vectors.float())
    apart = vectors[None] - vectors[:, None]
    distance = apart.square().sum(2).clamp_min(1e-12).sqrt()  # the slope of √0 is infinite
    towards = apart / distance[:, :, None]
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return distance / distance[others].mean(), towards @ towards.transpose(1, 2)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: an Embedder with a head, a selection of photographs, a Config · out: a run's folder: weights, log, state

class Stopped(Exception):
    """A run ended before its last step, everything saved: call fit again and it goes on."""


@dataclass
class Progress:
    """Where a run is, saved with its state."""
    step: int = 0     # optimiser steps made
    epoch: int = 0
    used: int = 0     # photographs of this epoch that all processes together have used
    best: float = -1.0  # best selection mP@5 so far
    data: str = ''    # digest of the photographs
    skipped: int = 0    # steps left out because loss or gradient was not finite
    processes: int = 1  # that shared the work


def launch(function, *arguments, processes=None):
    """Calls the function in one process a GPU (accelerate's notebook_launcher), or just calls it where there is one or none.

    Results come back by files; an exception comes back as itself, and the stop button reaches every process. processes:
    None is as many as there are GPUs. Where this process uses CUDA already none can be forked: one GPU then does the
    work, and a warning says so. Within a launched process, as by `accelerate launch`, it is an ordinary call.
    """
    count = processes or (torch.cuda.device_count() if is_cuda_available() else 1)
    if count == 1 or int(os.environ.get('WORLD_SIZE', 1)) > 1:
        return function(*arguments)
    if torch.cuda.is_initialized():
        warnings.warn(f'CUDA is in use in this kernel: 1 of {count} GPUs works. For all of them restart the kernel and run '
                      f'this cell before any that uses a GPU itself.', stacklevel=2)
        return function(*arguments)
    from accelerate import notebook_launcher
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
        free.close()
        refused, call = [], (folder, function, *arguments)
        # A thread of its own: OpenMP's threads do not survive a fork, and this one has started none.
        thread = threading.Thread(target=_quietly, args=(refused, notebook_launcher, _reporting, call),
                                  kwargs={'num_processes': count, 'use_port': port}, daemon=True)
        with stop_signal() as pressed:
            thread.start()
            while thread.is_alive():
                thread.join(.2)
                for child in multiprocessing.active_children() if pressed else ():
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGINT)
                pressed.clear()
        reports = [json.loads(file.read_text()) for file in sorted(Path(folder).glob('error*'))]
        errors = [REPORTED.get(name, RuntimeError)(*words) for name, words in reports if not LOST.search(words[0])]
        whole = len(list(Path(folder).glob('done*'))) == count
    if errors or refused:
        raise next((error for error in errors if isinstance(error, Stopped)), (errors + refused)[0])
    if not whole:
        raise RuntimeError(f'One of {count} processes was killed, most likely for want of memory: lower workers or '
                           f'batch_size and run this cell again; a run goes on from its last state.')


def launch_arrays(make):
    """launch of a function that returns {name: array}, which every process computes whole: returns the first one's."""
    with tempfile.TemporaryDirectory() as folder:
        def keep():
            arrays = make()
            if own_share()[0] == 0:
                np.savez(Path(folder) / 'arrays.npz', **arrays)
            return arrays

        arrays = launch(keep)
        if arrays is None:  # they were made in launched processes
            with np.load(Path(folder) / 'arrays.npz') as kept:
                arrays = dict(kept)
        return arrays


def _quietly(refused, launcher, *arguments, **options):
    """Runs the launcher; what its processes raised is in their reports, what it refuses itself is added to `refused`."""
    loggers = [logging.getLogger(name) for name in ('torch.distributed.elastic', 'torch.multiprocessing')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        launcher(*arguments, **options)
    except ValueError as error:
        refused.append(error)
    except Exception as error:
        loggers[0].debug('%s', error)
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


REPORTED = {kind.__name__: kind for kind in (Stopped, ValueError, FileNotFoundError, OSError, MemoryError,
                                             FloatingPointError, KeyboardInterrupt)}
LOST = re.compile('Connection (reset|closed) by peer|remote process exited')  # what a process says when another is gone


def _reporting(folder, function, *arguments):
    """In a launched process: calls the function and leaves a file that says how it ended."""
    rank = os.environ.get('RANK', '0')
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function(*arguments)
    except (Exception, KeyboardInterrupt) as error:
        name = type(error).__name__
        words = [str(error)] if name in REPORTED else [f'{name}: {error}']
        # The first to fail says why; the others fail because it is gone.
        Path(folder, f'error{time.time_ns()}_{rank}').write_text(json.dumps([name, words]))
        raise SystemExit(1) from None
    Path(folder, f'done{rank}').touch()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == 'nccl':
        torch.distributed.destroy_process_group()  # else it warns; gloo, of the CPU, may hang in it (PyTorch 2.6)


def own_share():
    """(rank, processes) of a launched process; (0, 1) of any other."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return 0, 1
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def mixed_precision(choice):
    """'bf16', 'fp16' or 'no': 'auto' asks the device."""
    if choice != 'auto':
        return choice
    if not torch.cuda.is_available():
        return 'no'
    return 'bf16' if torch.cuda.get_device_capability() >= (8, 0) else 'fp16'


def learning_rate_share(step, steps, warmup):
    """Share of the learning rate at an optimiser step: linear from 0 over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return .5 + .5 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))


def new_model(config, n_classes):
    """The Embedder that a run starts from: the pretrained tower and a head of its own for so many classes."""
    tower = load_image_tower(config.model_name, config.pretrained, config.image_size)
    head = SubcenterHead(tower.spec.width, n_classes, dim=config.embedding_dim, subcenters=config.subcenters,
                         norm=config.head_norm, seed=config.head_seed)
    model = Embedder(tower, head)
    resize(model, config.image_size, config.overlap)
    return model


def fit_stages(config, model, train, run_dir, validate=None, *, search=('/kaggle/input',)):
    """fit for every stage of the configuration, each from the weights that the one before kept; without stages it is fit.

    All but the last train in <run_dir>/<its name>-stage-<number>; the weights they end with stay there as stage.safetensors,
    and where this file is found (below a folder of `search` too) the stage is not trained again. The model is trained in
    place. Arguments, what is written and errors as in fit.
    """
    run_dir, stages, epoch, started = Path(run_dir), config.each_stage(), 0, time.time()
    teacher = teach(config, model, train, run_dir) if any(stage.distil for stage in stages) else None
    for number, stage in enumerate(stages, start=1):
        resize(model, stage.image_size, stage.overlap)
        folder = run_dir if number == len(stages) else run_dir / f'{run_dir.name}-stage-{number}'
        done = finished_stage(folder, stage, search)
        if done is None:
            each = model if len(stages) == 1 else copy.deepcopy(model)  # fit wraps, shards and freezes what it trains
            fit(stage, each, train, folder, validate, search=search, epoch=epoch, teacher=teacher, started=started)
            done = keep_stage(folder) if folder != run_dir else folder / 'model.safetensors'
        if len(stages) > 1:
            load_strictly(model, open_checkpoint(done), done)
        epoch += stage.epochs


def finished_stage(folder, config, search):
    """The weights of a stage that is done, in its folder or in an attached output of the same run, or None."""
    for file in [folder / 'stage.safetensors', *attached(folder.parent, f'{folder.name}/stage.safetensors', search)]:
        if file.exists():
            before = Config.read(open_checkpoint(file).metadata['config'])
            if difference := different_fields(before, config):
                raise ValueError(f'{file} is of a run with another configuration ({", ".join(difference)}): give this run '
                                 f'another name, or delete that folder.')
            print(f'{folder.name}: done, in {file}')
            return file


def keep_stage(folder):
    """Marks a stage as done: its weights get their lasting name, and the state to go on from makes room. By one process."""
    done = folder / 'stage.safetensors'
    if own_share()[0] == 0:
        os.replace(folder / 'model.safetensors', done)
        shutil.rmtree(folder / 'state', ignore_errors=True)
    if own_share()[1] > 1:
        PartialState().wait_for_everyone()
    return done


def teach(config, model, train, run_dir):
    """The teacher's vectors of the training photographs, float32 (n, d), kept in the run's folder."""
    teacher = load_run(config.teacher) if config.teacher else Embedder(copy.deepcopy(model.tower), spec=model.spec)
    return torch.from_numpy(embed(teacher, train, desc='teacher', cache=Path(run_dir) / 'teacher.npz',
                                  max_unreadable=config.max_unreadable))


def fit(config, model, train, run_dir, validate=None, *, search=('/kaggle/input',), epoch=0, teacher=None,
        started=None):
    """Fine-tunes the Embedder on the labelled photographs by ArcFace and writes the run.

    config: Config. model: Embedder with a SubcenterHead of as many classes as `train` has labels; trained in place.
    train: DataFrame path, label. run_dir: goes on by itself from the state found there, or from the one that a run of
    the same name and configuration left below a folder of `search`. validate: model -> mP@5 on selection data, called
    every config.validate_every steps; the best state is what the run keeps, the last one without. epoch: number of the
    first, which orders, augments and grows margins. teacher: float (n, d), vectors of `train` for config.distil. started:
    the time that config.max_hours count from; None is now. What config.stages say is for fit_stages. Writes
    model.safetensors, config.json, log.csv, state/, and where there is need unreadable.txt and not_finite.txt. Raises
    Stopped when config.max_hours is over or it is interrupted, ValueError for data and head that disagree,
    FloatingPointError for a loss that stays NaN, OSError for too many broken photographs or a disk that does not write.
    """
    run_dir, started = Path(run_dir), started or time.time()
    labels, targets, counts = np.unique(train['label'], return_inverse=True, return_counts=True)
    if model.head is None or len(model.head.centers) != len(labels) * model.head.subcenters:
        raise ValueError(f'The head must have {len(labels)} classes, as many as the photographs have labels.')
    if config.domains:
        chosen = train['domain'].isin(config.domains).to_numpy()
        if not chosen.any():
            raise ValueError(f'The photographs are of none of the domains {", ".join(map(repr, config.domains))}; theirs '
                             f'are {", ".join(sorted(train["domain"].unique()))}.')
        train, targets, teacher = train[chosen], targets[chosen], None if teacher is None else teacher[chosen]
    if own_share()[1] == 1:
        AcceleratorState._reset_state()  # else the first run's precision is that of all runs in this kernel
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision), cpu=best_device().type == 'cpu',
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])  # else gradients lie there twice
    together = config.batch_size * accelerator.num_processes
    accumulate = max(1, config.effective_batch // together)
    images = together * accumulate  # of one step
    steps = config.epochs * (len(train) // images)
    if config.epochs and not steps:
        raise ValueError(f'{len(train)} photographs do not fill one step of {images}; lower effective_batch or take '
                         f'more photographs.')
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout; initial weights are made before, elsewhere
    photos = Photos(train, model.spec.image_size, config.augmentation, seed=config.seed, targets=targets,
                    replace=True, max_unreadable=config.max_unreadable, sampling=config.sampling)
    wrapped, optimiser, schedule = prepare_training(accelerator, model, config, steps)
    margins = adaptive_margins(counts, low=config.margin_min, width=config.margin_width).to(accelerator.device)
    progress = Progress(epoch=epoch, data=digest(train))
    main = accelerator.is_main_process
    with run_lock(run_dir) if main else nullcontext(), stop_signal() as interrupts, \
            plain_failures(config, run_dir, photos, main):
        if main:
            copy_attached_state(run_dir, config, search)
        accelerator.wait_for_everyone()
        restored = restore_state(accelerator, run_dir / 'state', config, progress, schedule)
        log, saved_step = RunLog(run_dir, accelerator, progress, restored), progress.step
        if main:
            config.save(run_dir / 'config.json')
        saved = time.time()
        with progress_bar(total=steps, initial=progress.step, desc=run_dir.name, disable=not main) as bar:
            while progress.step < steps:
                batches = loader(photos, config.batch_size, train=True, epoch=progress.epoch, start=progress.used,
                                 rank=accelerator.process_index, processes=accelerator.num_processes,
                                 workers=config.workers)
                for batches_of_step in grouped(batches, accumulate):
                    loss, moved = optimiser_step(accelerator, wrapped, optimiser, batches_of_step,
                                                 margins + config.margin_growth * progress.epoch, config, teacher)
                    if moved:
                        schedule.step()
                    elif math.isnan(loss):
                        note_skipped(accelerator, run_dir, batches_of_step, photos, progress, config)
                    progress.step, progress.used = progress.step + 1, progress.used + images
                    if len(train) - progress.used < images:
                        progress.epoch, progress.used = progress.epoch + 1, 0
                    log.add(loss, schedule.get_last_lr()[-1], images)
                    bar.update()
                    bar.set_postfix(loss=f'{loss:.3f}')
                    if validate and config.validate_every and progress.step % config.validate_every == 0:
                        keep_if_best(accelerator, model, validate, run_dir, progress, config)
                    late = config.max_hours is not None and time.time() - started > config.max_hours * 3600
                    stop, due = agreed(accelerator, late or len(interrupts) > 0,
                                       time.time() - saved > config.save_minutes * 60)
                    if stop or due or not progress.used:
                        list_unreadable(accelerator, run_dir, photos)
                        if keep_state(accelerator, run_dir / 'state', progress, schedule, required=stop):
                            saved_step = progress.step
                        saved = time.time()
                    if stop:
                        reason = f'{config.max_hours} hours are over' if late else 'it was interrupted'
                        raise Stopped(f'{run_dir.name}: {reason} after {progress.step} of {steps} steps; everything is '
                                      f'saved, run it again to go on.')
        finish(accelerator, model, validate, run_dir, progress, config, list_unreadable(accelerator, run_dir, photos))
        if saved_step < progress.step:
            keep_state(accelerator, run_dir / 'state', progress, schedule)


def prepare_training(accelerator, model, config, steps):
    """(what is called, optimiser, schedule) for a model: a copy of it on each GPU, or with config.shard a part of it."""
    if config.checkpoint_activations or (config.checkpoint_activations is None and accelerator.device.type == 'cuda'):
        checkpoint_activations(model.tower)
    freeze(model, config.trains)
    if config.shard:
        shard(model.to(accelerator.device))
    groups = [{name: group[name] for name in ('params', 'lr', 'weight_decay')} for group in param_groups(model, config)]
    optimiser = torch.optim.AdamW(groups, fused=True)  # one pass over weights and state; three times as fast on a CPU
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, partial(learning_rate_share, steps=steps, warmup=min(config.warmup_steps, steps // 2)))
    model.train()
    if not config.shard:
        return *accelerator.prepare(model, optimiser), schedule
    state = ShardedState(model, optimiser)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: state.save(folder))
    accelerator.register_load_state_pre_hook(lambda models, folder: state.load(folder))
    return model, AcceleratedOptimizer(optimiser, device_placement=False, scaler=accelerator.scaler), schedule


def shard(model):
    """Spreads parameters, gradients and optimiser state over the processes (FSDP2, in place): a block is whole only
    while it computes. Does nothing in a process that was launched alone."""
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard
    for name, module in model.tower.named_modules():
        if BLOCK.fullmatch(f'{name}.'.rpartition('transformer.')[2]):
            fully_shard(module)
    fully_shard(model)


def is_sharded(model):
    return any(hasattr(parameter, 'full_tensor') for parameter in model.parameters())


class ShardedState:
    """Weights and optimiser in torch's distributed checkpoints: each process writes its part, any number reads them."""

    def __init__(self, model, optimiser):
        self.model, self.optimiser = model, optimiser

    def state_dict(self):
        from torch.distributed.checkpoint.state_dict import get_state_dict
        weights, optimiser = get_state_dict(self.model, self.optimiser)
        return {'model': weights, 'optimiser': optimiser}

    def save(self, folder):
        self._do('save', folder)

    def load(self, folder):
        from torch.distributed.checkpoint.state_dict import set_state_dict
        state = self._do('load', folder)
        set_state_dict(self.model, self.optimiser, model_state_dict=state['model'], optim_state_dict=state['optimiser'])

    def _do(self, what, folder):
        from torch.distributed import checkpoint
        state = self.state_dict()
        try:
            getattr(checkpoint, what)(state, checkpoint_id=str(folder))
        except checkpoint.CheckpointException as error:  # no Exception in torch
            raise OSError(str(error).strip().splitlines()[-1]) from error
        return state


RESERVE = 2**30  # bytes of a GPU that no tensor gets: CUDA itself, cuBLAS' workspace, gaps between blocks


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors alive under this mode, fake ones included: `now`, and `most` at any moment."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive = set()

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now, self.most = self.now + storage.nbytes(), max(self.most, self.now + storage.nbytes())
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, made)
        return made


def memory_plan(model, config, *, processes=1, half=None):
    """Bytes that one training process needs at most: dict parameters, gradients, optimiser, activations.

    The model runs through one step on fake tensors, which have shapes and no memory, with gradients and optimiser state
    of an earlier step in place. half: dtype of the activations on the device, None for float32. Attention counts as the
    fused one. A sharded model's parts are divided by the number of processes, but for what is gathered at a time.
    """
    first = next(model.parameters())
    mode = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(model)
    with mode:
        resize(model, config.image_size, config.overlap)
    freeze(model, config.trains)
    if config.checkpoint_activations is not False:
        checkpoint_activations(model.tower)
    n_classes, device = len(model.head.centers) // model.head.subcenters, first.device
    static = {'parameters': list(model.parameters()) + list(model.buffers())}
    with mode, torch.device(device):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        static['gradients'] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        optimiser = torch.optim.AdamW(param_groups(model, config), fused=True)
        optimiser.step()
        static['optimiser'] = [value for state in optimiser.state.values() for value in state.values()]
        sizes = {name: sum(tensor.untyped_storage().nbytes() for tensor in tensors) for name, tensors in static.items()}
        with PeakMemory() as peak:
            for tensor in itertools.chain(*static.values()):
                peak.count(tensor)
            images = torch.zeros(config.batch_size, 3, model.spec.image_size, model.spec.image_size, dtype=torch.uint8)
            with torch.autocast(device.type, dtype=half, enabled=half is not None):
                some = max(1, round(n_classes * config.partial_centers))
                cosine = model.train()(images, classify=True, classes=None if some == n_classes else torch.arange(some))
            targets = torch.zeros(config.batch_size, dtype=torch.long)
            arcface_loss(cosine, targets, torch.full((some,), .3), config.scale).backward()
            del cosine
            optimiser.step()
    sizes['activations'] = peak.most - sum(sizes.values())
    if config.shard and processes > 1:
        blocks = Counter()
        for name, parameter in model.named_parameters():
            blocks[found[0] if (found := BLOCK.search(name)) else ''] += parameter.numel() * parameter.element_size()
        whole = blocks.pop('', 0) + 2 * max(blocks.values(), default=0)  # one computes while the next one is fetched
        sizes = {name: size if name == 'activations' else size // processes for name, size in sizes.items()}
        sizes['parameters'] += whole
    return sizes


def available_memory():
    """(bytes, words for it) of the smallest GPU, or of this machine where there is none. CUDA is not touched."""
    if is_cuda_available():
        query = ['nvidia-smi', '--query-gpu=memory.total,name', '--format=csv,noheader,nounits']
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
        lines = [line.split(', ', 1) for line in answer.stdout.splitlines()]
        size, name = min((int(mebibytes) * 2**20, name) for mebibytes, name in lines)
        return size - RESERVE, f'of one {name}, less {RESERVE / 2**30:.0f} GiB for CUDA itself'
    return psutil.virtual_memory().available, 'free on this machine'


def training_plan(config, model, run_dir, *, memory=None, disk=None, processes=None):
    """What a run will need at most, in its heaviest stage, against what there is: DataFrame need, GB. Says what to change,
    before it starts, if that is too much.

    memory, disk: bytes there are; processes: GPUs. None: those of this machine.
    """
    processes = processes or (torch.cuda.device_count() if is_cuda_available() else 1)
    gpu = is_cuda_available()
    capacity, words = (memory, 'given') if memory else available_memory()
    half = torch.float16 if gpu and config.precision != 'no' else None
    config = config if config.checkpoint_activations is not None else config.override(checkpoint_activations=gpu)

    def heaviest_stage(config):
        plans = [memory_plan(model, stage, processes=processes, half=half) for stage in config.each_stage()]
        return max(plans, key=lambda plan: sum(plan.values()))

    needs = heaviest_stage(config)
    total = sum(needs.values())
    if total > capacity:
        fits = (change for change in smaller_plans(config, processes)
                if sum(heaviest_stage(config.override(**change)).values()) <= capacity)
        change = next(fits, None)
        print(f'{total / 1e9:.1f} GB do not fit into {capacity / 1e9:.1f} GB ({words}): '
              + (f'set OVERRIDES = {change}.' if change else 'take a smaller tower or image size, or more GPUs.'))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    state, place = 3 * weights, Path(run_dir).absolute()  # AdamW keeps two values beside each weight
    place = next(folder for folder in (place, *place.parents) if folder.exists())
    disk = disk or shutil.disk_usage(place).free
    if 2 * state + weights > disk:  # a state is whole before the one before it goes
        print(f'{(2 * state + weights) / 1e9:.1f} GB do not fit on the disk of {run_dir}, which has {disk / 1e9:.1f}: '
              f'choose another OUT_DIR' + ('; only the weights and one state fit, so a run that is killed while it saves '
                                           'loses its state.' if state + weights <= disk else '.'))
    rows = [(f'{name}, batch of {config.batch_size}' if name == 'activations' else name, size)
            for name, size in needs.items()]
    rows += [('memory in all', total), (f'memory {words}', capacity), ('two states to go on from, and the weights', 2 * state
             + weights), ('disk free', disk)]
    return pd.DataFrame([(name, size / 1e9) for name, size in rows], columns=['need', 'GB'])


def smaller_plans(config, processes):
    """Changes of a configuration that need less memory, the least change first; the result stays the same."""
    less = {} if config.checkpoint_activations else {'checkpoint_activations': True}
    yield less
    alike = not (config.head_norm or config.distil)  # these compare the photographs of a batch
    batches = [size for size in range(config.batch_size // 2, 0, -1) if alike and config.effective_batch % size == 0]
    for size in batches:
        yield less | {'batch_size': size}
    if processes > 1:
        yield less | {'shard': True}
        if alike:
            yield less | {'shard': True, 'batch_size': 1}


def agreed(accelerator, *flags):
    """The flags, each true if it is in any process: clocks differ, and all must save or stop at the same step."""
    if accelerator.num_processes == 1:
        return flags
    total = accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=accelerator.device), 'sum')
    return tuple(value > 0 for value in total.tolist())


@contextmanager
def stop_signal():
    """A list that Ctrl-C or a notebook's stop button fills, so that the step under way can end; the second time acts."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():  # only there Python takes signals
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_):
        if pressed and time.time() - pressed[0] > 1:  # one press may arrive twice: from the terminal, and from `launch`
            raise KeyboardInterrupt
        pressed.append(time.time())

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def plain_failures(config, run_dir, photos, main):
    """What data loading and a full GPU raise, as one sentence; broken photographs are listed however the run ends.

    A killed process is noticed at any moment, also in the middle of a step, so no state is saved then."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(
                f'{run_dir.name}: the GPU ran out of memory at batch_size {config.batch_size}: halve it (the step stays the '
                f'same, more batches are accumulated) and run it again; it goes on from its last state.') from error
        if 'DataLoader worker' not in str(error):
            raise
        raise Stopped(f'{run_dir.name}: a data-loading process was killed, most likely for want of memory; set workers '
                      f'lower (0 loads in the notebook itself) and run it again: it goes on from its last state.') from None
    except OSError as error:  # a worker's comes with its traceback inside
        if main:
            write_unreadable(run_dir, photos.unreadable)
        raise OSError(str(error).strip().splitlines()[-1].removeprefix('OSError: ')) from error


def list_unreadable(accelerator, run_dir, photos):
    """All photographs that no process could read so far, kept in unreadable.txt."""
    found = gather_object(photos.unreadable)
    return write_unreadable(run_dir, found) if accelerator.is_main_process else found


def write_unreadable(run_dir, found):
    """Adds paths to unreadable.txt, which holds those of the run's earlier sessions too; returns all of them."""
    file = run_dir / 'unreadable.txt'
    before = file.read_text().splitlines() if file.exists() else []
    paths = sorted({*before, *found})
    try:
        if paths != before:
            write_text(file, '\n'.join(paths) + '\n')
    except OSError as error:  # they are kept in memory for the next time
        print(f'{file} cannot be written ({error.strerror}): free some space.')
    return paths


def note_skipped(accelerator, run_dir, batches, photos, progress, config):
    """Keeps the file names of a step that was left out, and stops the run after more than config.max_skipped of them."""
    progress.skipped += 1
    indices = accelerator.gather(torch.cat([batch['index'] for batch in batches]).to(accelerator.device)).tolist()
    file = run_dir / 'not_finite.txt'
    if accelerator.is_main_process:
        with file.open('a') as lines:
            lines.writelines(f'step {progress.step + 1}\t{photos.paths[index]}\n' for index in indices)
    if progress.skipped > config.max_skipped:
        raise FloatingPointError(
            f'The loss or its gradient was not finite in {progress.skipped} steps (max_skipped is {config.max_skipped}): '
            f'look at the photographs named in {file}, lower head_lr or the bands, or set precision="no"; the last saved '
            f'state is untouched.')
    accelerator.print(f'step {progress.step + 1}: loss or gradient not finite, left out; its photographs are in {file}')


def checkpoint_activations(tower):
    """Recompute activations in the backward pass instead of keeping them, where the tower can."""
    switch = getattr(tower, 'set_grad_checkpointing', None)
    if switch is None:
        print(f'{type(tower).__name__} cannot recompute activations; if memory runs out, lower batch_size.')
    else:
        switch(True)


def grouped(batches, size):
    """Lists of `size` batches; what is left over at the end is dropped."""
    batches = iter(batches)
    while len(group := list(islice(batches, size))) == size:
        yield group


def optimiser_step(accelerator, model, optimiser, batches, margins, config, teacher=None):
    """One optimiser step over several batches: (mean loss, whether the weights moved).

    They stay where loss or gradient are not finite; the loss is then NaN, but for what fp16's scaler mends by itself: a
    gradient too large for the present scale, which it halves.
    """
    total = 0.0
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        classes, labels = some_classes(batch['target'].to(accelerator.device), len(margins), config.partial_centers)
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                cosine, embedding = model(batch['image'].to(accelerator.device, non_blocking=True), relate=True,
                                          classes=classes)
            loss = arcface_loss(cosine, labels, margins if classes is None else margins[classes], config.scale)
            if config.distil:
                loss = loss + config.distil * relation_loss(embedding, teacher[batch['index']].to(accelerator.device))
            accelerator.backward(loss / len(batches))
        total += loss.detach() / len(batches)
    total, scaler = accelerator.reduce(total, 'mean').item(), accelerator.scaler
    moved = rescaled = False
    if math.isfinite(total):
        accelerator.unscale_gradients(optimiser)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        moved = math.isfinite(norm.full_tensor() if hasattr(norm, 'full_tensor') else norm)  # the former: of a sharded model
        rescaled = not moved and scaler is not None and scaler.get_scale() > 1
        if moved or scaler is not None:  # which leaves the weights where it found such a gradient, and lowers its scale
            optimiser.step()
    optimiser.zero_grad()
    return total if moved or rescaled else math.nan, moved


class RunLog:
    """log.csv: step, loss, lr, images/s, one row an optimiser step; rows after the restored step are dropped.

    Rows that a full disk refuses wait for the next step: a log is no reason to stop a run."""

    def __init__(self, run_dir, accelerator, progress, restored):
        self.path, self.progress, self.writes = run_dir / 'log.csv', progress, accelerator.is_main_process
        self.last, self.waiting = time.time(), ''
        if self.writes:
            there = restored and self.path.exists()
            kept = pd.read_csv(self.path).query(f'step <= {progress.step}').to_csv(index=False) if there else ''
            write_text(self.path, kept or 'step,loss,lr,images/s\n')

    def add(self, loss, lr, images):
        now = time.time()
        if self.writes:
            self.waiting += f'{self.progress.step},{loss:.6f},{lr:.4g},{images / (now - self.last):.1f}\n'
            size = self.path.stat().st_size
            try:
                with self.path.open('a') as file:
                    file.write(self.waiting)
                self.waiting = ''
            except OSError:
                os.truncate(self.path, size)  # no half row
        self.last = now


@contextmanager
def run_lock(run_dir):
    """Refuses a second run in the same folder; the system frees the lock however the process ends."""
    import fcntl
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run_dir / '.lock').open('w'))
        except OSError as error:
            raise OSError(f'{run_dir} cannot be written ({error.strerror}): choose another OUT_DIR.') from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f'Another run is writing into {run_dir}: wait for it, or give this one another '
                               f'name.') from None
        yield


def keep_state(accelerator, folder, progress, schedule, required=False):
    """Everything needed to go on, as folder/step-<n>; True if it could be written.

    The new state is complete before an older one goes. A disk that refuses is said aloud, and the run goes on with the
    older state in place: space may be there the next time. With `required` it is an OSError.
    """
    beside, main = folder / 'unfinished', accelerator.is_main_process
    progress.processes = accelerator.num_processes
    stages = ((main, partial(_make_room, beside)), (True, partial(accelerator.save_state, beside)),
              (main, partial(_complete_state, beside, progress, schedule)))
    for mine, act in stages:
        problem = None
        try:
            if mine:
                act()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
            problem = error
        if agreed(accelerator, problem is not None)[0]:
            if main:
                shutil.rmtree(beside, ignore_errors=True)
            said = (f'{folder}: the state after step {progress.step} could not be saved '
                    f'({str(problem).splitlines()[0] if problem else "in another process"}); the one before is unchanged. '
                    f'Free some space or choose another OUT_DIR.')
            if required:
                raise OSError(said) from problem
            accelerator.print(said)
            return False
    return True


def saved_states(folder):
    """The states in a folder, newest first."""
    return sorted(folder.glob('step-*'), reverse=True)


def read_position(state):
    """A state's position.json: progress, schedule, files. OSError when a file lacks or is shorter than it was."""
    position = json.loads((state / 'position.json').read_text())
    for name, size in position['files'].items():
        if (state / name).stat().st_size != size:
            raise OSError(f'{name} is truncated')
    return position


def _is_whole(state):
    with suppress(OSError, ValueError, KeyError):
        return bool(read_position(state))
    return False


def _make_room(beside):
    """Removes what a killed save left and, where another state would not fit, all whole states but the newest."""
    shutil.rmtree(beside, ignore_errors=True)
    whole = [state for state in saved_states(beside.parent) if _is_whole(state)]
    if whole and shutil.disk_usage(beside.parent).free < sum(read_position(whole[0])['files'].values()):
        for old in saved_states(beside.parent):
            if old != whole[0]:
                shutil.rmtree(old)


def _complete_state(beside, progress, schedule):
    """Gives a written state its position and its name; then older ones go: two stay where a third fits, else one."""
    sizes = {file.name: file.stat().st_size for file in sorted(beside.iterdir())}
    position = {'progress': asdict(progress), 'schedule': schedule.state_dict(), 'files': sizes}
    write_text(beside / 'position.json', json.dumps(position, indent=1))
    target = beside.with_name(f'step-{progress.step:08d}')
    while target.exists():  # damaged, or the run would not be here again; + sorts behind it
        target = target.with_name(target.name + '+')
    os.replace(beside, target)
    fits = shutil.disk_usage(beside.parent).free >= sum(sizes.values())
    for old in saved_states(beside.parent)[2 if fits else 1:]:
        shutil.rmtree(old)


def restore_state(accelerator, folder, config, progress, schedule):
    """Loads the newest state that loads; True if there was one. A state of another configuration is an error."""
    saved, states = folder.parent / 'config.json', saved_states(folder)
    if states and saved.exists() and (difference := different_fields(Config.load(saved), config)):
        raise ValueError(f'{folder.parent} holds a run with another configuration ({", ".join(difference)}): give this '
                         f'run another name, or delete that folder.')
    data = progress.data
    for state in states:
        problem = None
        try:
            position = read_position(state)
            accelerator.load_state(state)
            schedule.load_state_dict(position['schedule'])
        except Exception as error:  # a damaged file makes the readers raise almost anything
            problem = error
        if not agreed(accelerator, problem is not None)[0]:
            progress.__dict__.update(position['progress'])
            if progress.data != data:
                raise ValueError(f'{folder.parent} holds a run on other photographs (digest {progress.data}, now {data}): '
                                 f'give this run another name, or delete that folder.')
            accelerator.print(f'{folder.parent.name}: going on from {state.name}, epoch {progress.epoch + 1}, '
                              f'{progress.used} of its photographs used')
            if progress.processes != accelerator.num_processes:
                accelerator.print(f'The state was saved by {progress.processes} processes and {accelerator.num_processes} '
                                  f'go on: order and augmentation of the photographs stay the same; dropout and the order '
                                  f'in which gradients are summed do not, so weights will differ slightly.')
            return True
        accelerator.print(f'{state} cannot be read ({str(problem).splitlines()[0]}); trying the one before.')
    if states:  # parts of them may be in the model already
        raise ValueError(f'None of the states in {folder} can be read: delete this folder to start anew.')
    return False


def copy_attached_state(run_dir, config, search):
    """Copies the newest whole state of this run out of an earlier output, as Kaggle attaches it, where there is none.

    Looked for as <up to four folders>/<name of the run>/state below each folder of `search`; the log, the weights kept so
    far and the lists of photographs come along.
    """
    folder = run_dir / 'state'
    if saved_states(folder):
        return
    states = sorted(attached(run_dir, 'state/step-*', search), key=lambda state: state.name, reverse=True)
    for state in filter(_is_whole, states):
        run = state.parent.parent
        try:
            difference = different_fields(Config.load(run / 'config.json'), config)
        except (OSError, ValueError) as error:
            difference = [str(error)]
        if difference:
            print(f'{run} has another configuration ({", ".join(difference)}) and is left alone.')
            continue
        try:
            for name in ('config.json', 'log.csv', BEST, 'model.safetensors', 'unreadable.txt', 'not_finite.txt'):
                if (run / name).exists():
                    shutil.copyfile(run / name, run_dir / name)
            shutil.rmtree(folder / 'unfinished', ignore_errors=True)
            shutil.copytree(state, folder / 'unfinished', copy_function=shutil.copyfile)
            os.replace(folder / 'unfinished', folder / state.name)
        except OSError as error:
            raise OSError(f'{state} could not be copied into {folder} ({error}): free some space or choose another '
                          f'OUT_DIR.') from error
        print(f'{run_dir.name}: {state} was copied here')
        return


def attached(run_dir, pattern, search):
    """Paths that fit a pattern in folders of this run's name, up to four folders below those of `search`."""
    places = (os.path.join(glob_escape(str(root)), *['*'] * depth, glob_escape(run_dir.name), pattern)
              for root in search for depth in range(5))
    return [Path(found) for place in places for found in glob(place)]


def different_fields(first, second):
    """'field: a, now b' for what two configurations train differently."""
    free = {'workers', 'save_minutes', 'max_hours', 'max_unreadable', 'max_skipped', 'batch_size', 'precision',
            'checkpoint_activations'}
    return [f'{name}: {value}, now {asdict(second)[name]}' for name, value in asdict(first).items()
            if name not in free and value != asdict(second)[name]]


BEST = 'best.safetensors'  # of a run under way: model.safetensors is there when it is finished


def keep_if_best(accelerator, model, validate, run_dir, progress, config):
    """Scores the model on selection data, all processes together, and writes it if it is the best so far."""
    model.eval()
    score = torch.tensor(float(validate(model)), device=accelerator.device)
    model.train()
    score = float(accelerator.reduce(score, 'mean'))
    if score > progress.best:
        keep_weights(accelerator, model, run_dir, config, file=BEST, score=score, step=progress.step)
    accelerator.print(f'step {progress.step}: selection mP@5 {score:.3f}')
    progress.best = max(progress.best, score)


def keep_weights(accelerator, model, run_dir, config, *, file='model.safetensors', **facts):
    """Writes the run's weights, by one process; the parts of a sharded model are collected, for which all must call."""
    state = None
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        save_run(run_dir, model, config, state=state, file=file, **facts)
    accelerator.wait_for_everyone()


def finish(accelerator, model, validate, run_dir, progress, config, unreadable):
    """The end of a run: its weights if none better are kept, their digest, and what could not be read."""
    scored = bool(validate and config.validate_every)
    if scored and (not progress.step or progress.step % config.validate_every):
        keep_if_best(accelerator, model, validate, run_dir, progress, config)
    if scored and accelerator.is_main_process and (run_dir / BEST).exists():
        os.replace(run_dir / BEST, run_dir / 'model.safetensors')
    accelerator.wait_for_everyone()
    if not scored or not (run_dir / 'model.safetensors').exists():
        keep_weights(accelerator, model, run_dir, config, step=progress.step)
    if accelerator.is_main_process:
        print(f'{run_dir.name}: digest of the weights {state_digest(open_checkpoint(run_dir))}')
        if unreadable:
            print(f'{len(unreadable)} photographs could not be read and were replaced by others of their class: '
                  f'{run_dir / "unreadable.txt"}, first {unreadable[0]}')
    model.eval()


@torch.inference_mode()
def embed(model, frame, *, batch_size=64, workers=None, cache=None, desc='embedding', max_unreadable=None):
    """Vectors of photographs: float32 (n, dim), rows as in the frame (columns path, label), or Photos at the model's size.

    Launched processes each embed a part and all return the whole. cache: an .npz file that keeps vectors, paths and a
    digest of weights and normalisation; it is used again when all agree. An unreadable photograph is named and becomes
    a black one; more than max_unreadable (as in Photos) raise OSError.
    """
    rank, processes = own_share()
    photos = frame if isinstance(frame, Photos) else Photos(frame, model.spec.image_size, max_unreadable=max_unreadable)
    if photos.size != model.spec.image_size:
        raise ValueError(f'The photographs are read at {photos.size} pixels, and the model takes {model.spec.image_size}: '
                         f'give it a frame, or Photos of that size.')
    paths = np.array(photos.paths, str)
    if cache:
        key = vectors_digest(model)
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(cache) as kept:
            if str(kept['digest']) == key and np.array_equal(kept['paths'], paths):
                return kept['vectors']
    if not len(photos):
        return np.zeros((0, model.spec.width), np.float32)
    device = best_device()
    model.to(device).eval()
    batches = loader(photos, batch_size, rank=rank, processes=processes, workers=workers)
    with torch.autocast('cuda', enabled=device.type == 'cuda', dtype=torch.float16):
        vectors = torch.cat([model(batch['image'].to(device)).float()
                             for batch in progress_bar(batches, desc, leave=False, disable=rank > 0)])
    unreadable = photos.unreadable
    if processes > 1:  # (processes · each, dim) by rank -> by row
        vectors = gather(vectors).unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[:len(photos)]
        unreadable = sorted(set(gather_object(unreadable)))
    vectors = vectors.cpu().numpy()
    if unreadable and rank == 0:
        print(f'{len(unreadable)} photographs could not be read, first {unreadable[0]}; their vectors are those of a '
              f'black square.')
    if cache and rank == 0:
        keep_vectors(cache, vectors, paths, key)
    if processes > 1:
        PartialState().wait_for_everyone()
    return vectors


def vectors_digest(model):
    """SHA-256 of all of an Embedder that its vectors depend on."""
    numbers = dict(model.named_parameters()) | dict(model.named_buffers())  # with mean and std
    spec = json.dumps({name: value for name, value in asdict(model.spec).items() if name != 'pretrained'}).encode()
    return state_digest(numbers | {'spec': torch.frombuffer(bytearray(spec), dtype=torch.uint8)})


def keep_vectors(path, vectors, paths, digest):
    """Writes an .npz beside its place, then renames it. A disk that refuses costs only the time to embed again."""
    path = Path(path)
    beside = path.with_suffix('.part.npz')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, vectors=vectors, paths=paths, digest=digest)
        os.replace(beside, path)
    except OSError as error:
        print(f'{path} could not be written ({error.strerror}): these vectors will be computed again the next time.')


# ── Checkpoints and soups ────────────────────────────────────────────────────────────────────────────────────────────
# in:  checkpoint files: safetensors or a pickled state dict, with our names or the original authors'
# out: one state {name: tensor} made of them (average, greedy soup, WiSE-FT), and how well they mix

SPEC_FIELDS = ('model_name', 'image_size', 'mean', 'std', 'activation')  # what a soup's ingredients share
CHUNK = 1 << 17  # values summed at a time: they stay in the cache, and threads seldom wait for each other


def checkpoint_file(path):
    """The checkpoint of a run's folder; any other path as it is."""
    return Path(path) / 'model.safetensors' if Path(path).is_dir() else Path(path)


class Checkpoint(dict):
    """{name: memory-mapped tensor}, read when used; `metadata` is {str: str}, `path` the file's."""

    def __init__(self, tensors, metadata, path):
        super().__init__(tensors)
        self.metadata, self.path = metadata, path


def open_checkpoint(path):
    """Open a file of weights, its tensors mapped and not yet read -> Checkpoint, with our names.

    The content decides, whatever the file's name: safetensors, or torch.save of a state dict, also one nested
    under 'state_dict' or 'model' or prefixed with 'module.'. Left out: what is not a tensor, and the text
    tower of the original authors' files. A file without metadata takes those of a metadata.json beside it.
    Nothing in a file is executed. FileNotFoundError; ValueError for a file that is truncated, of another kind,
    or holds Python objects.
    """
    path = checkpoint_file(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}: check the path, or make this file first.')
    tensors, metadata = _read_file(path)
    for nest in ('state_dict', 'model'):
        if isinstance(tensors, dict) and isinstance(tensors.get(nest), dict):
            tensors = tensors[nest]
    named = tensors.items() if isinstance(tensors, dict) else ()
    ours = {_our_name(name): value.detach() for name, value in named if isinstance(value, torch.Tensor)}
    ours.pop(None, None)  # the text tower
    if not ours:
        raise ValueError(f'{path} holds no tensors of a tower or head: save model.state_dict() into it.')
    beside = path.with_name('metadata.json')
    if 'spec' not in metadata and beside.is_file():
        metadata = json.loads(beside.read_text())
    return Checkpoint(ours, metadata, path)


def _read_file(path):
    path = path.resolve()  # the name of what a link leads to
    with open(path, 'rb') as file:
        start = file.read(9)
    try:
        if start[8:] == b'{':  # safetensors: 8 bytes of length, then JSON
            with safe_open(path, framework='pt') as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        mapped = zipfile.is_zipfile(path) and path.suffix != '.safetensors'  # torch.load would trust the name
        with open(path, 'rb') as file:
            source = path if mapped else file
            return torch.load(source, map_location='cpu', mmap=mapped, weights_only=True), {}
    except Exception as error:  # a damaged file makes the readers raise almost anything
        if isinstance(error, pickle.UnpicklingError) and 'GLOBAL' in str(error):
            raise ValueError(f'{path} holds Python objects, which could run code when loaded: '
                             'ask for its state dict alone, or for safetensors.') from error
        raise ValueError(f'{path} is truncated, or neither safetensors nor a PyTorch state dict: '
                         'copy or download it again.') from error


def _our_name(name):
    """Our name for the original authors'; None for their text tower."""
    name = str(name).removeprefix('module.')
    if name.startswith('vit_backbone.'):
        _, image_tower, rest = name.partition('vit_backbone.visual.')
        return f'tower.{rest}' if image_tower else None
    return {'head.emb.weight': 'head.embedding.weight', 'head.arc.weight': 'head.centers'}.get(name, name)


def save_state(tensors, path, metadata=None, *, overwrite=False):
    """Write {name: tensor} with metadata {str: str} as safetensors, beside its place and then renamed.

    FileExistsError unless `overwrite`; OSError if it cannot be written, and what was there stays as it was.
    """
    path, metadata = Path(path), {'format': 'pt', **(metadata or {})}
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f'Metadata is text, unlike {", ".join(wrong)}: pass json.dumps(value).')
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} exists: choose another name, or pass overwrite=True.')
    part = path.with_name(path.name + '.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # safetensors leaves a file that nobody but its owner can read
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, part, metadata)
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f'{path} could not be written ({error}): free some space or choose another folder; '
                      'what was there is unchanged.') from error


def file_digest(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_digest(tensors):
    """16 hexadecimal digits that stand for {name: tensor}: names, dtypes, shapes and bytes, in any order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)};'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def average_states(paths, weights=None):
    """Average of checkpoint files -> {name: tensor}; uniform, or by non-negative `weights` of any sum.

    Memory holds the result alone, however many the files: they are mapped and streamed. Summed in float64 and
    rounded once to the first file's dtype (float16 and bfloat16 to float32). Integer buffers must be equal;
    of BatchNorm, statistics are averaged and the largest step counter is taken. ValueError names the first
    differences of each kind: tensors, shapes, integer buffers, SPEC_FIELDS where metadata tells them.
    Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
    """
    ingredients = _open_ingredients(paths)
    weights = np.ones(len(ingredients)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(ingredients),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f'{len(ingredients)} checkpoints need as many weights, none negative and not all 0, '
                         f'unlike {weights.tolist()}.')
    return _average(ingredients, weights)


def _open_ingredients(paths):
    """Checkpoints that can be averaged, or the error that says why not."""
    ingredients = [open_checkpoint(path) for path in paths]
    if not ingredients:
        raise ValueError('A soup needs ingredients: give the path of at least one checkpoint.')
    first = ingredients[0]
    for other in ingredients[1:]:
        if differences := _differences(first, other):
            raise ValueError(f'{other.path} cannot be averaged with {first.path}: {differences}. Ingredients '
                             'share one architecture, classes and preprocessing: leave it out.')
    if len({ingredient.path.resolve() for ingredient in ingredients}) < len(ingredients):
        print('One checkpoint is given more than once and counts as often.')
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in first.values()):
        print(f'{first.path} is in half precision: the average comes out in float32.')
    return ingredients


def _differences(first, other):
    """What forbids averaging, with the first three of each kind by name; '' if nothing does."""
    shared = [name for name in first if name in other]
    shapes = {name: (tuple(first[name].shape), tuple(other[name].shape)) for name in shared}
    specs = [json.loads(state.metadata.get('spec', '{}')) for state in (first, other)]
    settings = {field: [spec.get(field) for spec in specs] for field in SPEC_FIELDS if all(specs)}
    found = {
        'tensors missing': [name for name in first if name not in other],
        'tensors too many': [name for name in other if name not in first],
        'shapes': [f'{name} {b} against {a}' for name, (a, b) in shapes.items() if a != b],
        'number types or integer buffers': [name for name, (a, b) in shapes.items()
                                            if a == b and not _same_numbers(name, first[name], other[name])],
        'settings': [f'{field} {b} against {a}' for field, (a, b) in settings.items() if a != b],
    }
    return '; '.join(f'{kind}: {", ".join(names[:3])}' + (f' and {len(names) - 3} more' if names[3:] else '')
                     for kind, names in found.items() if names)


def _same_numbers(name, one, other):
    if one.is_floating_point() or other.is_floating_point():
        return one.is_floating_point() and other.is_floating_point()
    return name.endswith('num_batches_tracked') or torch.equal(one, other)


def _average(states, weights):
    """Weighted average of states that agree -> {name: tensor}; a state of weight 0 is not read."""
    terms = [(state, weight) for state, weight in zip(states, weights, strict=True) if weight]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(states[0], pool.map(lambda name: _mean(name, terms), states[0]), strict=True))


def _mean(name, terms):
    """Weighted mean of one tensor, terms [(state, weight)], rounded once; of integers the largest."""
    tensors, weights = [state[name] for state, _ in terms], [weight for _, weight in terms]
    if not tensors[0].is_floating_point():
        return torch.stack(tensors).amax(0)
    mean = torch.empty(tensors[0].shape, dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    flat, buffers, whole = mean.view(-1).numpy(), np.empty((2, CHUNK)), sum(weights)
    for window, values in _windows(tensors):
        total, term = buffers[:, :len(values[0])]
        np.multiply(values[0], weights[0], out=total, dtype=np.float64)  # not added to 0., which would lose the sign of -0.
        for value, weight in zip(values[1:], weights[1:], strict=True):
            if weight == 1:
                cv2.accumulate(value[None], total[None])  # widens and adds in one pass, which numpy does in two
            else:
                total += np.multiply(value, weight, out=term, dtype=np.float64)
        total /= whole
        np.copyto(flat[window], total, casting='same_kind')
        if not np.isfinite(total.sum()):
            sick = [str(state.path) for state, _ in terms if not torch.isfinite(state[name]).all()]
            raise ValueError(f'{name} is not finite in {", ".join(sick)}: training diverged, leave it out.')
    return mean


def _windows(tensors):
    """CHUNK values at a time -> their place, and an array (float32 or wider) for each tensor."""
    flats = [tensor.detach().reshape(-1) for tensor in tensors]
    flats = [flat.numpy() if flat.device.type == 'cpu' and flat.dtype in (torch.float32, torch.float64) else flat
             for flat in flats]
    for start in range(0, len(flats[0]), CHUNK):
        window = slice(start, start + CHUNK)
        yield window, [flat[window] if isinstance(flat, np.ndarray) else
                       flat[window].to('cpu', torch.promote_types(flat.dtype, torch.float32)).numpy() for flat in flats]


def interpolate_states(zero_shot, fine_tuned, alpha):
    """WiSE-FT: (1 - alpha)·zero_shot + alpha·fine_tuned -> {name: tensor}; alpha 0 and 1 give them exactly.

    Each is a file or {name: tensor}. What fine_tuned alone has (the head) is taken from it. ValueError for
    alpha outside 0..1, and where fine_tuned lacks or contradicts what zero_shot has.
    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f'alpha goes from 0 (zero-shot) to 1 (fine-tuned): {alpha} is outside.')
    zero_shot, fine_tuned = _as_state(zero_shot), _as_state(fine_tuned)
    tower = _part_like(zero_shot, fine_tuned)
    head = {name: tensor for name, tensor in fine_tuned.items() if name not in tower}
    mixed = _average([zero_shot, tower], [1 - alpha, alpha]) | _average([head], [1])
    return {name: mixed[name] for name in fine_tuned}


def _as_state(state):
    if not isinstance(state, dict):
        return open_checkpoint(state)
    return state if isinstance(state, Checkpoint) else Checkpoint(state, {}, 'the given state')


def _part_like(base, state):
    """Those tensors of a fine-tuned state that its base has too; all of the base must be there."""
    part = Checkpoint({name: state[name] for name in base if name in state}, state.metadata, state.path)
    if differences := _differences(base, part):
        raise ValueError(f'{state.path} was not fine-tuned from {base.path}: {differences}. '
                         "Give the pretrained tower of this run, with 'tower.' before its names.")
    return part


def greedy_soup(paths, score, *, tolerance=0.):
    """Greedy soup -> ({name: tensor}, DataFrame path, alone, with_it, kept), the best ingredient first.

    `score({name: tensor})` -> float, the higher the better, on data for SELECTION: report on other data. From
    the best ingredient down, each is kept if the average with it scores no less (within `tolerance`) than the
    soup without it. Memory holds one average at a time. ValueError for a score of NaN.
    Wortsman et al. 2022, "Model soups", Recipe 1, https://arxiv.org/abs/2203.05482
    """
    ingredients = _open_ingredients(paths)
    alone = [_score(score, [ingredient], [1]) for ingredient in ingredients]
    kept, best, rows = [], -np.inf, []
    for i in sorted(range(len(alone)), key=lambda i: -alone[i]):
        soup, path = [*kept, ingredients[i]], ingredients[i].path
        with_it = _score(score, soup, [1] * len(soup)) if kept else alone[i]
        accepted = with_it >= best - tolerance
        print(f'{"kept" if accepted else "left out"}: {_run_name(path)}, alone {alone[i]:.4f}, '
              f'soup with it {with_it:.4f}' + (f', without it {best:.4f}' if kept else ''))
        rows.append((str(path), alone[i], with_it, accepted))
        kept, best = (soup, with_it) if accepted else (kept, best)
    return _average(kept, [1] * len(kept)), pd.DataFrame(rows, columns=['path', 'alone', 'with_it', 'kept'])


def _score(score, states, weights):
    value = float(score(_average(states, weights)))
    if np.isnan(value):
        raise ValueError(f'The score of {" + ".join(str(state.path) for state in states)} is NaN: '
                         'evaluate each by itself to see whether it or the data is broken.')
    return value


def _run_name(path):
    """'none' for `runs/none/model.safetensors`; any other file goes by its own name."""
    path = Path(os.path.abspath(path))
    return path.parent.name if path.name == 'model.safetensors' else path.name


def path_scores(first, second, score, points=5):
    """Score along the line from one file (alpha 0) to another (alpha 1) -> DataFrame alpha, score.

    A dip between the ends is a barrier: the two do not share a basin and average badly; the usual cause is a
    different initial head. Errors as in average_states and greedy_soup.
    """
    if points < 2:
        raise ValueError(f'A line has two ends: ask for 2 points or more, not {points}.')
    states, alphas = _open_ingredients([first, second]), np.linspace(0, 1, points)
    scores = [_score(score, states, [1 - alpha, alpha]) for alpha in alphas]
    return pd.DataFrame({'alpha': alphas, 'score': scores})


def weight_cosines(paths, base):
    """Cosine between the changes (ingredient - base) of each two ingredients -> square DataFrame by run.

    `base` is the pretrained tower, a file or {name: tensor} with names 'tower.…'; the head, which it lacks,
    does not count. NaN for an ingredient that equals it. ValueError where base and ingredients do not fit.
    """
    ingredients, base = _open_ingredients(paths), _as_state(base)
    towers = [_part_like(base, ingredient) for ingredient in ingredients]
    products = np.zeros((len(towers), len(towers)))
    for name in (name for name in base if base[name].is_floating_point()):
        for _, (origin, *values) in _windows([base[name]] + [tower[name] for tower in towers]):
            changes = np.array(values, dtype=np.float64) - origin
            products += changes @ changes.T
    lengths, runs = np.sqrt(products.diagonal()), [_run_name(tower.path) for tower in towers]
    with np.errstate(invalid='ignore'):
        return pd.DataFrame(products / np.outer(lengths, lengths), index=runs, columns=runs)


def soup_metadata(paths, method, *, scores=None, **extra):
    """Metadata for save_state -> {str: str}: method, ingredients (run, SHA-256, score), their spec.

    `scores` in the order of the paths, or else recorded_score's. `extra` (alpha, weights, config, …) is stored
    as JSON unless it is text.
    """
    checkpoints = [open_checkpoint(path) for path in paths]
    if scores is None:
        scores = [recorded_score(checkpoint.path) for checkpoint in checkpoints]
    ingredients = [{'run': _run_name(checkpoint.path), 'sha256': file_digest(checkpoint.path), 'score': score}
                   for checkpoint, score in zip(checkpoints, scores, strict=True)]
    fields = {'method': method, 'ingredients': ingredients, **extra}
    if specs := [checkpoint.metadata['spec'] for checkpoint in checkpoints if 'spec' in checkpoint.metadata]:
        fields['spec'] = specs[0]  # the original authors' files have none
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}


def recorded_score(file):
    """mP@5 at 64 dimensions that a run left in scores.csv beside its checkpoint file; None without."""
    scores = Path(file).with_name('scores.csv')
    found = pd.read_csv(scores).query('dim == 64')['mp5'] if scores.exists() else ()
    return float(found.iloc[-1]) if len(found) else None


def save_run(run_dir, model, config, *, state=None, file='model.safetensors', **facts):
    """Writes run_dir/file: tower, head and projection with all that is needed to load them again.

    state: the model's tensors by name, where its own are not whole."""
    state = model.state_dict() if state is None else state
    metadata = {'format': 'pt', 'spec': json.dumps(asdict(model.spec)), 'config': json.dumps(asdict(config)),
                **{name: json.dumps(value) for name, value in facts.items()}}
    save_state(state, Path(run_dir) / file, metadata, overwrite=True)


def load_run(path, tower=None):
    """The Embedder of a run's folder or checkpoint file, in evaluation mode.

    tower: needed for checkpoints that do not say how they are built (the original authors', or a tower of your own
    making); only its architecture and spec are used, on a copy.
    """
    checkpoint = open_checkpoint(path)
    if tower is None and 'spec' not in checkpoint.metadata:
        raise ValueError(f'{path} does not say which tower it belongs to; pass tower=load_image_tower(…).')
    try:
        model = _unloaded(checkpoint, tower)
    except Exception as error:  # strangers' metadata may hold anything
        raise ValueError(f'{path} cannot be built from what it says of itself (metadata spec and config, the shapes of head '
                         f'and projection; {type(error).__name__}: {str(error).splitlines()[0]}): save this run again, or '
                         f'pass tower=load_image_tower(…).') from error
    load_strictly(model, checkpoint, path)
    return model.eval()


def _unloaded(checkpoint, tower):
    """An Embedder that a checkpoint's tensors fit in, with weights of its own."""
    tower = copy.deepcopy(tower) if tower is not None else build_tower(spec_of(checkpoint.metadata))
    head = projection = None
    if 'head.embedding.weight' in checkpoint:
        dim, width = checkpoint['head.embedding.weight'].shape
        subcenters = json.loads(checkpoint.metadata.get('config', '{}')).get('subcenters', 3)
        head = SubcenterHead(width, len(checkpoint['head.centers']) // subcenters, dim=dim, subcenters=subcenters,
                             norm='head.norm.running_mean' in checkpoint)
    if 'projection.weight' in checkpoint:
        dim, width = checkpoint['projection.weight'].shape
        projection = nn.Linear(width, dim)
    return Embedder(tower, head, projection)


def spec_of(metadata):
    """The TowerSpec in a checkpoint's metadata."""
    spec = json.loads(metadata['spec'])
    return TowerSpec(**spec | {'mean': tuple(spec['mean']), 'std': tuple(spec['std'])})


def list_runs(root):
    """Every run below a folder, or a list of folders: DataFrame run, model_name, image_size, augmentation, seed, epochs,
    method, mp5 (at dim 64, if scored), digest of the weights."""
    rows, roots = [], [root] if isinstance(root, (str, os.PathLike)) else root
    for file in (file for folder in roots for file in sorted(Path(folder).glob('**/model.safetensors'))):
        if file.parent.parent.name == 'state':
            continue
        checkpoint = open_checkpoint(file)
        metadata, score = checkpoint.metadata, recorded_score(file)
        config = json.loads(metadata.get('config', '{}'))
        rows.append({'run': str(file.parent), **{name: config.get(name) for name in (
            'model_name', 'image_size', 'augmentation', 'seed', 'epochs')}, 'method': metadata.get('method', 'training'),
            'mp5': np.nan if score is None else score, 'digest': state_digest(checkpoint)})
    return pd.DataFrame(rows)


def find_ingredients(root, towers, files=None, architectures=None, *, search=('/kaggle/input',)):
    """{tower: [run folders]} of what is to be averaged: the finished runs whose names begin with the tower's, below `root`
    and in attached outputs (up to four folders below those of `search`); or, where given, `files` instead.

    files: {tower: [checkpoint files, or folders of them]} that say nothing of themselves, as the original authors'.
    architectures: {tower: Config's fields for its files}; None: those of the 4th place. What lies elsewhere than in
    `root` is linked into a temporary folder, so that each is a run's folder that can be written.
    """
    if files:
        found = {tower: link_files(tower, paths, (architectures or PUBLISHED['place4']).get(tower))
                 for tower, paths in files.items()}
    else:
        found = {tower: sorted(file.parent for file in Path(root).glob(f'{tower}_*/model.safetensors'))
                 for tower in towers}
        for tower, runs in found.items():
            runs += link_runs(attached_runs(tower, search), {run.name for run in runs})
    found = {tower: runs for tower, runs in found.items() if runs}
    if not found:
        raise FileNotFoundError(f'{root} holds no finished run of {" or ".join(towers)}, nor does an attached output: run '
                                f'train_{towers[0]}.ipynb first, once for every ingredient, or give checkpoints as '
                                f'INGREDIENTS.')
    for tower in {**dict.fromkeys(towers), **found}:
        print(f'{tower}: {len(found.get(tower, []))} ingredients')
    return found


def attached_runs(tower, search):
    """The finished runs of a tower in attached outputs, the least deep first; the stages within a run are none."""
    places = (os.path.join(glob_escape(str(root)), *['*'] * depth, f'{tower}_*', 'model.safetensors')
              for root in search for depth in range(5))
    runs = [Path(file).parent for place in places for file in sorted(glob(place))]
    return [run for run in runs if not run.parent.name.startswith(f'{tower}_')]


def link_runs(runs, names=()):
    """Folders of links to all files of runs but their states and stages; a run whose name was there before is left out."""
    linked, names = [], set(names)
    for run in runs:
        if run.name not in names:
            files = [file for file in [*run.glob('*'), *run.glob('vectors/*')] if file.is_file()]
            linked.append(_linked_folder(run.name, {file.relative_to(run): file for file in files}))
            names.add(run.name)
            print(f'{run.name}: taken from {run}')
    return linked


def link_files(tower, paths, architecture):
    """Run folders for checkpoints that do not say how they are built, each with the configuration that they lack.

    architecture: Config's fields for their tower; nothing is downloaded, since the files hold all of the tower's weights.
    """
    if architecture is None:
        raise ValueError(f'INGREDIENTS names {tower}, of which neither architecture nor weights are known: give its '
                         f'model_name, pretrained and image_size in ARCHITECTURES.')
    config = Config().override(**architecture)
    metadata = {'spec': json.dumps(asdict(unloaded_tower(config).spec)), 'config': json.dumps(asdict(config))}
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    files = [file for path in paths for file in (_checkpoints_in(path) if path.is_dir() else [path])]
    folders = []
    for number, file in enumerate(files, start=1):
        open_checkpoint(file)  # a wrong one is an error before anything is computed
        folder = _linked_folder(f'{tower}_{number}_{file.name}', {'model.safetensors': checkpoint_file(file)})
        write_text(folder / 'metadata.json', json.dumps(metadata))
        config.save(folder / 'config.json')
        folders.append(folder)
    return folders


def _checkpoints_in(folder):
    """A run's checkpoint, or every file of a folder that is no text."""
    if (folder / 'model.safetensors').exists():
        return [folder / 'model.safetensors']
    texts = {'.json', '.csv', '.txt', '.md', '.ipynb', '.py'}
    return [file for file in sorted(folder.iterdir())
            if file.is_dir() or file.suffix.lower() not in texts and not file.name.startswith('.')]


def _linked_folder(name, files):
    """A new temporary folder of this name with links {name: file}."""
    folder = Path(tempfile.mkdtemp(prefix='ingredient-'), name)
    for link, file in files.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(file.resolve())
    return folder


class StateEmbedder:
    """Vectors and selection scores of states {name: tensor} of a run's architecture. Each photograph is read once for all of
    them, and equal states are embedded once, as WiSE-FT's ends and a greedy soup of one ingredient often are."""

    def __init__(self, run, frames):
        self.model, self.frames, self.known, self.scores = load_run(run), frames, {}, {}
        self.photos = keep_pixels({name: frame for name, frame in frames.items() if name != 'train'},
                                  self.model.spec.image_size)

    def vectors(self, state, names, folder=None):
        """embed_all of a state: {name: float32 (n, dim)}, kept under `folder` if given."""
        load_strictly(self.model, state, getattr(state, 'path', 'the state'))
        known = self.known.setdefault(state_digest(state), {})
        if folder:
            for name in set(names) & set(known):
                keep_vectors(Path(folder) / f'{name}.npz', known[name], self.photos[name].paths, vectors_digest(self.model))
        if missing := [name for name in names if name not in known]:
            known |= embed_all(self.model, self.photos, folder, missing)
        return {name: known[name] for name in names}

    def score(self, state):
        """mP@5 at the state's own width on the selection objects."""
        key = state_digest(state)
        if key not in self.scores:
            load_strictly(self.model, state, getattr(state, 'path', 'the state'))
            self.scores[key] = selection_score(self.model, self.frames, self.photos)
        return self.scores[key]


def base_state(run):
    """The pretrained tower that a run started from, as tensors named 'tower.…'."""
    spec = spec_of(open_checkpoint(run).metadata)
    tower = load_image_tower(spec.model_name, spec.pretrained, spec.image_size)
    resize_tower(tower, spec.image_size, spec.architecture.get('stride'))
    return {f'tower.{name}': tensor for name, tensor in tower.state_dict().items()}


def base_states(ingredients):
    """{tower: base_state} of find_ingredients' runs; a pretrained tower that cannot be had here is named and left out."""
    bases = {}
    for tower, runs in ingredients.items():
        try:
            bases[tower] = base_state(runs[0])
        except ValueError as error:
            print(f'{tower}: its pretrained weights are not here, so what compares with them is left out ({error})')
    return bases


def save_soup(state, run_dir, ingredients, method, **facts):
    """Writes averaged weights as a run of its own: model.safetensors with its ingredients' digests, and config.json."""
    files = [checkpoint_file(run) for run in ingredients]
    config = Config.load(files[0].with_name('config.json'))
    metadata = soup_metadata(files, method, config=asdict(config), **facts)
    save_state(state, Path(run_dir) / 'model.safetensors', metadata, overwrite=True)
    config.save(Path(run_dir) / 'config.json')


def some_trained(train, classes=200, each=5):
    """Some photographs of some trained classes, of all domains alike: what is to be found again among the others."""
    some = pd.Series(train['label'].unique()).sample(frac=1, random_state=5).head(classes)
    return train[train['label'].isin(some)].groupby('label').head(each)


def sweep_alpha(base, soup, alphas, embedder):
    """WiSE-FT's curve: DataFrame alpha, selection, seen, never seen: mP@5 at the head's full width.

    base: tensors of the pretrained tower (base_state). soup: a run's folder. embedder: StateEmbedder of its architecture,
    whose frames['seen'] are of trained classes (some_trained), each searched among the others.
    """
    frames, rows = embedder.frames, []
    for alpha in alphas:
        state = interpolate_states(base, checkpoint_file(soup), alpha)
        vectors, seen = embedder.vectors(state, ('seen', 'query', 'index')), frames['seen']['label']
        among_others = mean_precision_at_5(vectors['seen'], seen, vectors['seen'], seen, exclude_self=True)
        rows.append({'alpha': alpha, 'selection': embedder.score(state), 'seen': among_others,
                     'never seen': score_table('', '', vectors, frames, dims=(None,))['mp5'].iloc[0]})
    return pd.DataFrame(rows)


def hand_in(path, folder='/kaggle/working'):
    """On Kaggle, a submission also as <folder>/submission.zip, where the competition looks for it; elsewhere nothing."""
    target = Path(folder, 'submission.zip')
    if not target.parent.is_dir() or target.exists() and target.samefile(path):
        return
    beside = target.with_name('submission.zip.part')
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # another file system
        shutil.copyfile(path, beside)
    os.replace(beside, target)
    print(f'{target}: the same file')


def save_reference(submission, frame, path, *, count=16, side=96):
    """A few inputs and the eager model's outputs beside a submission: .npz images uint8 (n, 3, side, side), vectors."""
    images = np.stack([np.asarray(read_photo(photo, side)).transpose(2, 0, 1) for photo in frame['path'].head(count)])
    with torch.inference_mode():
        vectors = np.concatenate([submission.cpu().eval()(torch.from_numpy(image)[None]) for image in images])
    beside = Path(path).with_suffix('.part.npz')
    np.savez(beside, images=images, vectors=vectors)
    os.replace(beside, path)


# ── Projection to 64 dimensions ──────────────────────────────────────────────────────────────────────────────────────
# in: embeddings of one or several models, (n, d)
# out: a Projection (n, d) -> (n, dim <= 64) that folds into one linear layer

MAX_DIM = 64  # the competition's limit


@dataclass(frozen=True)
class Projection:
    """The map x -> components · (x - mean). The first j columns of a PCA's output are the PCA to j."""

    mean: np.ndarray                      # float64 (d,)
    components: np.ndarray                # float64 (dim, d), one direction a row, times its whitening factor
    explained_variance_ratio: np.ndarray  # float64 (dim,), shares of the variance in all d; NaN if random

    def __call__(self, embeddings):
        """(n, d) -> float32 (n, dim), the arithmetic of `linear`."""
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(f'this projection takes (n, {len(self.mean)}) vectors, not {embeddings.shape}: '
                             'give it embeddings of the model it was fitted on')
        bias = (self.components @ self.mean).astype(np.float32)
        return embeddings @ self.components.T.astype(np.float32) - bias

    def linear(self):
        """The same map as one frozen float32 nn.Linear(d, dim), the mean folded into its bias."""
        layer = nn.utils.skip_init(nn.Linear, *self.components.shape[::-1]).requires_grad_(False)
        layer.weight.copy_(torch.from_numpy(self.components))
        layer.bias.copy_(torch.from_numpy(-self.components @ self.mean))
        return layer


def l2_normalise(x):
    """Bring the last axis to length 1; zeros stay zero. Arrays become float32, tensors keep their dtype."""
    if isinstance(x, torch.Tensor):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.where(length > 0, length, 1)
    x = np.asarray(x, dtype=np.float32)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def concatenate(embeddings_list):
    """Models' embeddings (n, d_i) of the same images, L2-normalised and then side by side: (n, Σ d_i)."""
    counts = [len(embeddings) for embeddings in embeddings_list]
    if len(set(counts)) != 1:
        raise ValueError(f'the models embedded {counts} images: give embeddings of the same images')
    return np.concatenate([l2_normalise(embeddings) for embeddings in embeddings_list], axis=1)


def fit_pca(embeddings, dim=MAX_DIM, *, whiten=0.0, weights=None):
    """Principal components of (n, d) embeddings, an array or a memory map -> Projection.

    whiten: direction j is multiplied by variance_j ** (-whiten / 2): 0 is plain, 1 makes each variance 1.
    weights: (n,) importance of the rows, e.g. to even out kinds of object; only their ratios matter.
    Signs: each direction's largest absolute entry is positive. Memory: a few d² float64 and 32,768 rows.
    ValueError: dim out of range, unfit weights, a NaN or infinite row, embeddings that hardly vary.
    """
    from scipy.linalg import eigh

    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f'PCA takes a table (n, d) of embeddings, not {embeddings.shape}: stack them')
    n, d = embeddings.shape
    _check_dim(dim, d, n)
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (n,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f'weights must be {n} finite numbers >= 0, one a row, and not all zero')
    mean, covariance = _moments(embeddings, weights / weights.mean())
    variance, directions = eigh(covariance, subset_by_index=[d - dim, d - 1])
    variance, directions, total = variance[::-1].clip(min=0), directions.T[::-1], np.trace(covariance)
    varied = int((variance > 1e-7 * total).sum())  # float32 embeddings leave about 1e-8 of noise
    if varied < (dim if whiten else 1):
        raise ValueError(f'the embeddings vary in {varied} directions only: ask for no more, '
                         'or do not whiten')
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    scale = np.sign(largest) * variance[:, None] ** (-whiten / 2)
    return Projection(mean, directions * scale, variance / total)


def random_projection(d, dim=MAX_DIM, seed=0):
    """Onto `dim` random orthonormal directions: what a PCA must beat."""
    _check_dim(dim, d)
    directions, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, dim)))
    return Projection(np.zeros(d), directions.T, np.full(dim, np.nan))


def _check_dim(dim, d, n=np.inf):
    for most, reason in ((MAX_DIM, f'the competition takes at most {MAX_DIM} dimensions'),
                         (d, f'the embeddings have {d} columns'),
                         (n - 1, f'{n} embeddings span at most {n - 1} directions')):
        if not 1 <= dim <= most:
            raise ValueError(f'dim is {dim}, but {reason}: ask for 1 to {most}')


@np.errstate(invalid='ignore')  # an infinite row is named below
def _moments(embeddings, weights, chunk=32_768):
    """Mean (d,) and covariance (d, d), float64, for weights of mean 1.

    Products are float64 where that takes a second, else of the embeddings' precision: errors average out. A mean far larger
    than the spread is taken off first, roughly, as terms would cancel; else that costs more than it mends.
    """
    n, d = embeddings.shape
    dtype = np.float64 if n * d * d < 2e10 else np.result_type(embeddings, np.float32)
    first = embeddings[:512].astype(np.float64)
    rough = first.mean(0)
    shift = rough.astype(dtype) if rough @ rough > 10 * first.var(0).sum() else np.zeros(d, dtype)
    total, scatter = np.zeros(d), np.zeros((d, d))
    for start in range(0, n, chunk):
        rows, weight = embeddings[start:start + chunk].astype(dtype, copy=False), weights[start:start + chunk].astype(dtype)
        centred = rows - shift if shift.any() else rows
        moved = weight @ centred
        if not np.isfinite(moved).all():
            bad = start + int((~np.isfinite(rows)).any(1).argmax())
            raise ValueError(f'embedding {bad} holds NaN or infinite values: leave it out or embed it again')
        total += moved
        centred = centred if (weight == 1).all() else centred * np.sqrt(weight)[:, None]
        scatter += centred.T @ centred
    offset = total / n
    return shift + offset, (scatter - n * np.outer(offset, offset)) / (n - 1)


TEMPLATES = ('a photo of a {}.', 'a close-up photo of a {}.', 'a cropped photo of the {}.', 'a picture of a {}.')


def read_vocabulary(source):
    """Names of things: DataFrame kind, name. source: a JSON file {kind: [names]}, or such a dict.

    Blank names and names that were there before (in any kind, whatever their case) are dropped and counted aloud.
    """
    try:
        kinds = source if isinstance(source, dict) else json.loads(Path(source).read_text(encoding='utf-8'))
        frame = pd.DataFrame([(kind, ' '.join(name.split())) for kind, names in kinds.items() for name in names],
                             columns=['kind', 'name'])
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f'{source} is not a vocabulary, a JSON object of kinds with lists of names: {error}.') from None
    blank, again = frame['name'] == '', frame['name'].str.lower().duplicated()
    if blank.any() or again.any():
        print(f'{source}: dropped {blank.sum()} blank names and {(again & ~blank).sum()} that were there before')
    return frame[~blank & ~again].reset_index(drop=True)


def kind_weights(kinds, weights):
    """How much each name counts by its kind: float64 (n,), 1 for kinds that `weights` {kind: number} does not name."""
    if unknown := sorted(set(weights) - set(kinds)):
        raise ValueError(f'The vocabulary has no kind {unknown[0]!r} to weigh; its kinds are {", ".join(pd.unique(kinds))}.')
    return kinds.map(weights).fillna(1).to_numpy(np.float64)


def text_vectors(encode, names, templates=TEMPLATES):
    """Mean over the templates of each name's unit text vector, again of length 1: float32 (n, d)."""
    names = list(names)
    if wrong := [template for template in templates if '{}' not in template]:
        raise ValueError(f'The template {wrong[0]!r} has no {{}} for the name.')
    texts = [[template.format(name) for name in names] for template in templates]
    return launch_arrays(lambda: {'texts': l2_normalise(sum(l2_normalise(encode(one)) for one in texts))})['texts']


# ── Neighbours and mP@5 ──────────────────────────────────────────────────────────────────────────────────────────────
# in: query and index vectors (q, d), (n, d) and their labels
# out: the k nearest index rows of each query, and the competition's score of them

def group_size(n, d):
    """Rows of an index (n, d) that the first pass of a search judges by the best of them. Large groups make that pass fast,
    small ones the second, which computes the true distances to all rows of the best groups: measured."""
    return 2 ** int(np.clip(round(math.log2(n / (2 * d)) / 2), 2, 5))


@torch.no_grad()
def nearest_neighbours(query, index, k, *, exclude=None, chunk=32_768, device=None):
    """Exact Euclidean neighbours -> numpy (distances float32 (q, k), indices int64 (q, k)).

    Ordered by (distance, index), also across the k-th place. Distances are compared in float64, where equal
    index rows are equally far. query (q, d), index (n, d): arrays, memory maps or tensors.
    exclude: (q,) index row that each query must not find (its own photograph); negative: none.
    chunk: index rows read at a time. device: of the matrix products; by default where `query` lies.
    Memory beside the inputs, whatever n: twice the queries and, for small k, chunk · (12 d + 2,048) bytes
    + 20 MB (a GPU: twice that and 0.5 GB).
    ValueError: shapes that do not fit, k out of range, NaN or infinite rows (the first is named).
    """
    query, index = (x if isinstance(x, torch.Tensor) else np.asarray(x) for x in (query, index))
    if query.ndim != 2 or index.ndim != 2 or query.shape[1] != index.shape[1] or 0 in query.shape:
        raise ValueError(f'query {tuple(query.shape)} and index {tuple(index.shape)} must be (q > 0, d) and '
                         '(n, d): embed both with the same model')
    most = len(index) - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f'k is {k}, but each query has {most} index rows to find: ask for 1 to {most}')
    exclude = torch.full((len(query),), -1) if exclude is None else torch.as_tensor(exclude).cpu().long()
    if exclude.shape != (len(query),):
        raise ValueError(f'exclude has shape {tuple(exclude.shape)}: give one index row for each query')
    query = _rows(query, slice(0, None), 'query')
    group, device = group_size(*index.shape), torch.device(device or query.device)
    chunk, some = -(-chunk // group) * group, 256 * group  # as many queries as have scores of the same size for any group
    found = [_search(queries, index, k, excluded, chunk, group, device)
             for queries, excluded in zip(query.split(some), exclude.split(some))]
    distances, indices = (torch.cat(parts).numpy() for parts in zip(*found))
    return distances.astype(np.float32), indices


def _search(query, index, k, exclude, chunk, group, device):
    """A shortlist from matrix products, then true distances in float64 on the CPU, alike for all devices."""
    groups, needed = _shortlist(query, index, k + int((exclude >= 0).any()), chunk, group, device)
    query = query.cpu().double()
    distances, indices = query.new_empty(len(query), k), exclude.new_empty(len(query), k)
    enough = needed < groups.shape[1]
    for some in (~enough).nonzero()[:, 0].split(64):
        if len(some):
            distances[some], indices[some] = _scan(query[some], index, k, exclude[some], chunk)
    for many in needed[enough].unique().tolist():
        for some in (needed == many).nonzero()[:, 0].split(max(1, 2**20 // (many * group * query.shape[1]))):
            at = (groups[some, :many].sort(1).values[..., None] * group + torch.arange(group)).flatten(1)
            vectors = _rows(index, at.clamp(max=len(index) - 1).flatten().numpy()).cpu().double()
            apart = _euclidean(query[some, None], vectors.view(*at.shape, query.shape[1]))[:, 0]
            apart[(at >= len(index)) | (at == exclude[some, None])] = torch.inf
            distances[some], indices[some] = _first(k, apart, at)
    return distances, indices


def _shortlist(query, index, wanted, chunk, group, device):
    """The `wanted` + 3 best groups of index rows for each query, and how many of them are needed: all may not be enough.

    A row's score q·x - |x|²/2 grows as its distance falls; a group scores as its best row. Rounding moves a
    score by at most slack / 2. The `wanted` best groups hold that many rows whose true scores are no less
    than the last of these groups' less slack / 2: one more than `slack` behind it holds no nearer row.
    """
    dtype = torch.float64 if device.type == 'cuda' else torch.float32  # float32 may be lowered to TF32 there
    center = query.to(device, dtype).mean(0)  # a common shift keeps all distances and makes rounding smaller
    query, width, largest = (query.to(device) - center).to(dtype), wanted + 3, 0.0
    best = query.new_full((len(query), width), -torch.inf)
    groups = torch.full_like(best, len(index), dtype=torch.int64)  # beyond the last row: none yet
    scores = query.new_empty(len(query), width + -(-min(chunk, len(index)) // group))
    for start in range(0, len(index), chunk):
        x = (_rows(index, slice(start, start + chunk), 'index').to(device) - center).to(dtype)
        half = x.square().sum(1) / 2
        largest = max(largest, float(half.max()))
        scores = scores[:, :width + -(-len(x) // group)]
        scores[:, :width] = best
        _group_scores(query, x, half, group, out=scores[:, width:])
        best, place = scores.topk(width)
        known = groups.gather(1, place.clamp(max=width - 1))
        groups = torch.where(place < width, known, place - width + start // group)
    bound = query.norm(dim=1) * (2 * largest) ** 0.5 + 2 * largest  # of the terms in a score
    slack = bound * (query.shape[1] + 16) * torch.finfo(dtype).eps
    near = (best >= (best[:, wanted - 1] - slack)[:, None]) & (best > -torch.inf)
    return groups.cpu(), near.sum(1).cpu()


def _group_scores(query, x, half, group, out):
    """The best q·x - half in each group of rows of x, into out (q, n / group), in tiles that fit a cache."""
    missing = -len(x) % group
    x, half = F.pad(x, (0, 0, 0, missing)), F.pad(half, (0, missing), value=torch.inf)
    tile_q, tile_x = (512, 2048) if x.device.type == 'cpu' else (4096, 16_384)
    buffer = x.new_empty(tile_q * tile_x)
    for q, out_q in zip(query.split(tile_q), out.split(tile_q)):
        for rows, bias, best in zip(x.split(tile_x), half.split(tile_x), out_q.split(tile_x // group, 1)):
            scores = buffer[:len(rows) * len(q)].view(len(rows), len(q))
            torch.addmm(-bias[:, None], rows, q.T, out=scores)
            best.copy_(scores.view(-1, group, len(q)).amax(1).T.contiguous())  # torch transposes faster than it scatters


def _scan(query, index, k, exclude, chunk):
    """True distances to every index row: for queries with more near-ties than a shortlist holds."""
    distances, indices = query.new_empty(len(query), 0), exclude.new_empty(len(query), 0)
    for start in range(0, len(index), chunk):
        apart = _euclidean(query, _rows(index, slice(start, start + chunk)).cpu().double())
        at = torch.arange(start, start + apart.shape[1]).expand_as(apart)
        apart[at == exclude[:, None]] = torch.inf
        distances, indices = _first(k, torch.cat([distances, apart], 1), torch.cat([indices, at], 1))
    return distances, indices


def _first(k, distances, indices):
    """The k first by (distance, index); indices ascend among equals, so where there are ties a stable sort settles them."""
    nearest, order = distances.topk(min(k + 1, distances.shape[1]), largest=False)  # the next one too, as it may be a tie
    tied = (nearest[:, 1:] == nearest[:, :-1]).any(1)
    order[tied] = distances[tied].sort(dim=1, stable=True).indices[:, :order.shape[1]]
    order = order[:, :k]
    return distances.gather(1, order), indices.gather(1, order)


def _euclidean(a, b):
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')


def _rows(vectors, which, side=None):
    """Rows as a tensor, without a copy where possible; with a `side` to name, NaN and infinity are errors."""
    rows = vectors[which]
    if not isinstance(rows, torch.Tensor):
        rows = torch.from_numpy(np.require(rows, requirements='CW'))
    if side and (bad := ~(rows.abs().amax(1).float() < 1e18)).any():  # larger squares overflow
        raise ValueError(f'{side} vector {which.start + int(bad.nonzero()[0])} holds NaN or infinite values: '
                         'leave it out or embed it again')
    return rows


def precision_at_5(query, query_labels, index, index_labels, exclude_self=False):
    """The competition's score of each query -> float64 (q,), NaN where the index shows none of its object.

    With n_q index images of the query's object and k_q = min(n_q, 5): the share of its k_q nearest that show
    it. query (q, d), index (n, d); labels: q and n hashable values that compare by ==, in any sequence.
    exclude_self: query i is index i, which counts neither among its neighbours nor in n_q.
    ValueError: numbers that do not fit, no query with a relevant index image.
    """
    sizes = len(query), len(query_labels), len(index), len(index_labels)
    if sizes[0] != sizes[1] or sizes[2] != sizes[3] or (exclude_self and sizes[0] != sizes[2]):
        raise ValueError('{} queries with {} labels, {} index vectors with {} labels: give one label a vector'
                         ' and, with exclude_self, the same images twice'.format(*sizes))
    query_codes, index_codes = np.split(_codes(query_labels, index_labels), sizes[:1])
    relevant = np.bincount(index_codes, minlength=query_codes.max(initial=0) + 1)[query_codes]
    itself = np.arange(len(query)) if exclude_self else None
    relevant = relevant - (query_codes == index_codes) if exclude_self else relevant
    if not relevant.any():
        raise ValueError('no query has an image of its object in the index: do both use the same labels?')
    judged = np.minimum(relevant, 5)
    _, neighbours = nearest_neighbours(query, index, int(judged.max()), exclude=itself)
    hits = (index_codes[neighbours] == query_codes[:, None]) & (np.arange(judged.max()) < judged[:, None])
    return hits.sum(1) / np.where(judged, judged, np.nan)


def mean_precision_at_5(query, query_labels, index, index_labels, exclude_self=False):
    """The competition's mP@5 as a float: the mean of `precision_at_5` over the queries that have one."""
    precisions = precision_at_5(query, query_labels, index, index_labels, exclude_self)
    if left_out := int(np.isnan(precisions).sum()):
        print(f'{left_out} of {len(precisions)} queries have no image of their object in the index: left out')
    return float(np.nanmean(precisions))


def scores_by_domain(precisions, domains):
    """mP@5 of each kind of object -> DataFrame domain, mp5, queries (judged), left_out."""
    frame = pd.DataFrame({'domain': np.asarray(domains), 'mp5': precisions})
    return frame.groupby('domain', as_index=False).agg(
        mp5=('mp5', 'mean'), queries=('mp5', 'count'), left_out=('mp5', lambda scores: scores.isna().sum()))


def paired_bootstrap(first, second, groups, n=2000, seed=0):
    """Is `second` better? -> (mean of second - first, low, high), with the ends of its 95 % interval.

    first, second: `precision_at_5` of two models on the same queries, NaN left out; groups: their labels,
    drawn whole with replacement, since photographs of one object succeed or fail together.
    """
    gain = np.asarray(second) - np.asarray(first)
    if gain.shape != (len(groups),):
        raise ValueError(f'{len(gain)} queries but {len(groups)} groups: give one group a query')
    judged = ~np.isnan(gain)
    groups = _codes(_codes(groups)[judged])
    sums, counts = np.bincount(groups, gain[judged]), np.bincount(groups)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(n))
    means = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    return float(gain[judged].mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def _codes(*labels):
    """Equal labels -> equal integers 0, 1, …, all sequences in one array."""
    codes = {}
    lists = [part.tolist() if hasattr(part, 'tolist') else part for part in labels]
    return np.array([codes.setdefault(label, len(codes)) for part in lists for label in part], dtype=int)


def some_objects(frames, n):
    """{part: positions} of the photographs of the query's first n objects in query and index; n None: of all, the
    index's other objects too."""
    few = frames['query']['label'].drop_duplicates().head(n)
    return {part: np.arange(len(frames[part])) if n is None else np.flatnonzero(frames[part]['label'].isin(few))
            for part in ('query', 'index')}


def embed_all(model, frames, folder=None, names=('pca', 'query', 'index')):
    """Vectors of several frames (or Photos) by name, on all GPUs, kept under `folder` if given: dict name -> float32
    (n, dim)."""
    return launch_arrays(lambda: {name: embed(model, frames[name], desc=name, cache=folder and Path(folder) / f'{name}.npz')
                                  for name in names})


def to_dim(vectors, dim=64, projection=None, split=''):
    """(query, index) of embed_all's vectors, L2-normalised at `dim` columns.

    projection: any map (n, d) -> (n, dim or more columns, of which the first are taken); None: a PCA fitted on
    vectors['pca'], the training photographs. split: as in score_table.
    """
    projection = projection or fit_pca(vectors['pca'], dim)
    return tuple(l2_normalise(projection(vectors[split + part])[:, :dim]) for part in ('query', 'index'))


def score_table(stage, name, vectors, frames, *, dims=(None, 64), projection=None, seconds=math.nan, split=''):
    """mP@5 on never-seen objects: DataFrame stage, model, dim, mp5, seconds, a row for each entry of dims.

    vectors: dict of embed_all. dims: None is the full width; a number goes through to_dim with this projection, by default
    one PCA for all. split: 'selection_' scores the objects for choices instead.
    """
    width, rows = vectors[f'{split}query'].shape[1], []
    dims = [dim and min(dim, width) for dim in dims]
    if projection is None and any(dims):
        projection = fit_pca(vectors['pca'], max(filter(None, dims)))
    for dim in dims:
        query, index = (vectors[f'{split}query'], vectors[f'{split}index']) if dim is None else \
            to_dim(vectors, dim, projection, split)
        score = mean_precision_at_5(query, frames[f'{split}query']['label'], index, frames[f'{split}index']['label'])
        rows.append({'stage': stage, 'model': name, 'dim': query.shape[1], 'mp5': score, 'seconds': seconds})
    return pd.DataFrame(rows)


def selection_score(model, frames, photos=None):
    """mP@5 of a model at its own width on the selection split. photos: keep_pixels of it, for a score of many models."""
    vectors = embed_all(model, photos or frames, names=SELECTION)
    return float(score_table('', '', vectors, frames, dims=(None,), split='selection_')['mp5'].iloc[0])


# ── Submission ───────────────────────────────────────────────────────────────────────────────────────────────────────
# in: Embedders and a projection to at most 64-d
# out: submission.zip, which PyTorch 1.11 reads and runs, and its mP@5 and speed as the host sees them

HOST_DIM = 64                         # most columns a vector may have
HOST_HOURS, HOST_IMAGES = 9, 205_000  # the limit, for 5,000 queries and 200,000 index photographs one by one
HOST_ARCHIVE = 9                      # newest file version that PyTorch 1.11 reads
# Operators of vision towers that PyTorch 1.11 has under the same name and with the same arguments.
HOST_OPERATORS = frozenset('''
    abs adaptive_avg_pool2d add_ add addcmul amax arange avg_pool1d avg_pool2d baddbmm batch_norm
    bitwise_not bmm cat ceil chunk clamp clamp_ clamp_min col2im constant_pad_nd contiguous _convolution
    cos cumsum detach div dropout einsum elu eq erf exp expand expand_as flatten flip floor floor_divide
    floordiv group_norm gt hardsigmoid hardswish_ hardswish hardtanh hardtanh_ im2col index Int
    layer_norm leaky_relu leaky_relu_ linalg_vector_norm linear log lt masked_fill matmul max max_pool2d
    mean meshgrid min mish mm mul_ mul narrow ne neg ones ones_like permute pixel_shuffle pow prelu
    relu_ relu remainder repeat repeat_interleave reshape reshape_as roll rsqrt rsub ScalarImplicit
    select sigmoid silu_ silu sin size slice softmax softplus split_with_sizes sqrt square squeeze.dim
    stack sub sum tanh to transpose type_as unbind unflatten unsqueeze upsample_bicubic2d
    _upsample_bicubic2d_aa upsample_bilinear2d upsample_nearest2d view where zeros zeros_like'''.split())


def plain_attention(query, key, value, attn_mask=None, *, scale=None, **unused):
    """F.scaled_dot_product_attention in eval mode: softmax(q·kᵀ / √d + mask)·v, the mask float or None."""
    scores = (query * (scale or int(query.shape[-1]) ** -.5)) @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def plain_gelu(x, approximate='none'):
    """x·Φ(x) through erf, or its tanh approximation (arXiv 1606.08415, sec. 2)."""
    half = x * .5
    if approximate == 'tanh':
        return half * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + .044715 * x ** 3)))
    return torch.addcmul(half, half, torch.erf(x * math.sqrt(.5)))


class PlainOperators(TorchFunctionMode):
    """While active, fused operators run as ones that PyTorch 1.11 has too, whichever module calls them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # asked for its weights, it multiplies the matrices itself
            kwargs = kwargs | {'need_weights': True, 'average_attn_weights': False}
        if func is F.pad and kwargs['mode'] == 'constant':
            return torch.constant_pad_nd(*args, kwargs['value'] or 0)
        if func is torch.Tensor.to and args[0].dtype in args[1:]:  # a trace would freeze it to float32
            return args[0]
        plain = {F.scaled_dot_product_attention: plain_attention, F.gelu: plain_gelu}
        return plain.get(func, func)(*args, **kwargs)


class _WeightsFollow(TorchFunctionMode):
    """While active, half-precision weights enter every operator in the dtype of `like`."""

    def __init__(self, like):
        super().__init__()
        self.like = like

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def follow(value):
            weight = isinstance(value, torch.Tensor) and value.dtype == torch.half
            return value.type_as(self.like) if weight else value
        return func(*tree_map(follow, args), **tree_map(follow, kwargs or {}))


@torch.jit.script_if_tracing
def _half_on_cuda(x: torch.Tensor) -> torch.Tensor:
    return x.half() if x.is_cuda else x


class HalfTower(nn.Module):
    """A tower with fp16 weights, float32 in and out: in fp16 on CUDA or if `emulate`, else in fp32."""

    def __init__(self, tower, emulate):
        super().__init__()
        self.tower, self.emulate = tower, emulate

    def forward(self, x):
        if self.emulate:
            return self.tower(x.half()).float()
        x = _half_on_cuda(x)
        with _WeightsFollow(x):
            return self.tower(x).float()


def _twin(module, change):
    """A copy of the module, in eval mode, around change(tensor) of every parameter and buffer."""
    memo = {id(buffer): change(buffer) for buffer in module.buffers()}
    for parameter in module.parameters():
        changed = change(parameter)
        same = changed is parameter
        memo[id(parameter)] = parameter if same else nn.Parameter(changed.detach(), requires_grad=False)
    return copy.deepcopy(module, memo).eval()


def half_precision(model, *, emulate=False):
    """The Submission (or Embedder) with its towers in fp16; resizing, head, projection and L2 stay in fp32.

    emulate: fp16 arithmetic on the CPU too, which today's torch has and 1.11 lacks, to measure what it costs.
    """
    towers = nn.ModuleList(part.tower for part in model.modules() if isinstance(part, Embedder))
    if not len(towers):
        raise ValueError('half=True is for the towers of Embedders and this model has none: leave it out.')
    inside = {id(t) for t in itertools.chain(towers.parameters(), towers.buffers())}
    twin = _twin(model, lambda t: t.half() if id(t) in inside and t.is_floating_point() else t)
    for part in [part for part in twin.modules() if isinstance(part, Embedder)]:
        part.tower = HalfTower(part.tower, emulate)
    return twin


def _at_size(embedder, factor):
    """The Embedder for inputs `factor` times as large, in whole patches, sharing all other weights."""
    if factor == 1:
        return embedder
    embedder = _twin(embedder, lambda tensor: tensor)
    stem = next(part for part in embedder.tower.modules() if isinstance(part, nn.Conv2d))
    (kernel, _), (stride, _) = stem.kernel_size, stem.stride
    side = kernel + round((embedder.spec.image_size * factor - kernel) / stride) * stride
    resize_tower(embedder.tower, side)
    embedder.spec = replace(embedder.spec, image_size=side)
    return embedder


@torch.jit.script_if_tracing
def _letterbox(pixels: torch.Tensor, side: int, border: torch.Tensor) -> torch.Tensor:
    # Scripted, since a trace would keep its example's sizes, in operators whose scripted form 1.11 reads. Two pixels
    # at least: 1.11 reads the strides of an image one pixel wide wrongly.
    height, width = pixels.size(2), pixels.size(3)
    longer = max(height, width)
    h = max(2, (height * side + longer // 2) // longer)
    w = max(2, (width * side + longer // 2) // longer)
    top, left = (side - h) // 2, (side - w) // 2
    small = torch.ops.aten._upsample_bicubic2d_aa(pixels, [h, w], False, None, None).clamp(0, 255)
    return torch.constant_pad_nd(small - border, [left, side - w - left, top, side - h - top], 0) + border


class Submission(nn.Module):
    """What the host runs: a photograph of any size -> one unit vector of at most 64 numbers.

    members: Embedders, each fed at its own spec.image_size; their unit vectors are concatenated. projection:
    nn.Linear to at most 64 columns, or None. Test-time options: pad puts a border of the tower's mean colour
    around the photograph instead of squashing it to a square; flip averages over it and its mirror image,
    sizes over several multiples of the input size, e.g. (1, 1.25), with position embeddings resized.
    """

    def __init__(self, members, projection=None, *, flip=False, pad=False, sizes=(1,)):
        super().__init__()
        self.members = nn.ModuleList(nn.ModuleList(_at_size(m, factor) for factor in sizes) for m in members)
        self.projection, self.flip, self.pad = projection, flip, pad

    def forward(self, photograph):
        """uint8 (1, 3, H, W) -> float32 (1, dim) of length 1; also several photographs of one size."""
        vector = torch.cat([self._look(photograph, scales) for scales in self.members], 1)
        return F.normalize(vector if self.projection is None else self.projection(vector))

    def _look(self, photograph, scales):
        vectors = []
        for embedder in scales:
            pixels, side = photograph.type_as(embedder.mean), embedder.spec.image_size
            # Bicubic curves leave 0..255 and are clipped, as in Pillow, but not rounded: the last digit,
            # which differs between versions of torch, would now and then decide on a whole grey level.
            pixels = (_letterbox(pixels, side, embedder.mean) if self.pad else
                      F.interpolate(pixels, (side, side), mode='bicubic', antialias=True).clamp(0, 255))
            vectors += [embedder(pixels), embedder(pixels.flip(3))] if self.flip else [embedder(pixels)]
        return F.normalize(sum(vectors))


def _check_vector(vector):
    """ValueError unless the host can use what the model returned for one photograph."""
    shape = list(getattr(vector, 'shape', ()))
    if len(shape) != 2 or shape[0] != 1:
        wrong = f'has shape {shape}, not (1, dim)'
    elif shape[1] > HOST_DIM:
        wrong = f'has {shape[1]} dimensions, more than {HOST_DIM} (fit_pca makes a projection)'
    elif vector.dtype != torch.float32:
        wrong = f'is {vector.dtype}, not float32'
    elif not abs(vector.norm() - 1) < 1e-3:
        wrong = f'has length {vector.norm():.3g}, not 1'
    else:
        return
    raise ValueError(f'The host cannot use this model: its output for one random photograph {wrong}.')


def _check_operators(block):
    """ValueError that names the layer of the first operator which PyTorch 1.11 does not have."""
    for node in block.nodes():
        space, _, name = node.kind().partition('::')
        overload = node.schema().partition('(')[0].removeprefix('aten::')
        if space != 'prim' and not (space == 'aten' and {name, overload} & HOST_OPERATORS):
            layer = node.scopeName().rpartition('/')[2].removeprefix('__module.') or 'the model itself'
            raise ValueError(f'PyTorch 1.11 has no operator {name or space}, which {layer} uses: build that '
                             'layer from plain operators, or choose another tower.')
        for inner in node.blocks():
            _check_operators(inner)


def _compare(model, file, tolerance):
    """Largest difference of the file from the model over photographs of odd sizes, at most the tolerance."""
    loaded, generator, worst = torch.jit.load(file).eval(), torch.Generator().manual_seed(0), 0
    for size in ((1, 1), (1, 300), (200, 3), (333, 517)):
        photograph = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator)
        worst = max(worst, (loaded(photograph) - model(photograph)).abs().max().item())
    if not worst <= tolerance:
        raise ValueError(f'The exported file differs from the model by {worst:.1g}, more than {tolerance:g}: '
                         'its forward decides by values or sizes, which a trace freezes.')
    return worst


def _save_traced(model, variant, file, tolerance):
    """Write a checked trace of `variant`, a form of `model`; returns (dimensions, difference from `model`)."""
    example = torch.randint(256, (1, 3, 37, 53), dtype=torch.uint8)
    try:
        vector = model(example)
    except RuntimeError as error:
        raise ValueError(f'The host cannot use this model: a uint8 photograph {tuple(example.shape)} stops it with '
                         f'"{str(error).strip().splitlines()[-1]}".') from error
    _check_vector(vector)
    with PlainOperators():
        traced = torch.jit.trace(variant, example, check_trace=False)
    _check_operators(traced.inlined_graph)
    try:
        torch.jit.save(traced, file)
    except RuntimeError as error:  # how torch says that a disk is full
        raise OSError(str(error).splitlines()[0]) from error
    with zipfile.ZipFile(file) as archive:
        version = int(next(archive.read(name) for name in archive.namelist() if name.endswith('/version')))
    if version > HOST_ARCHIVE:
        raise ValueError(f'The file has version {version} and PyTorch 1.11 reads up to {HOST_ARCHIVE}: an '
                         'operator of the model has changed since.')
    return vector.shape[1], _compare(model, file, tolerance)


def export_submission(model, path, *, half=False):
    """Write submission.zip for the host: `model` as saved_model.pt, TorchScript that PyTorch 1.11 runs.

    model: Submission, Embedder, or any module uint8 (1, 3, H, W) -> float32 (1, dim <= 64) of length 1. It is
    traced under PlainOperators; operators and file version are checked against 1.11's, and the reloaded file
    against the model (1e-5; half: 1e-2). half: see half_precision; a file half as large, and fp16 arithmetic
    on a host that moves the loaded module to CUDA. On the CPU the weights become fp32 again for every
    photograph: right, but slower. ValueError: a model the host cannot use. OSError: nowhere to write. What
    stood at `path` stays until the new file is whole.
    """
    path = Path(path, 'submission.zip') if Path(path).is_dir() else Path(path)
    model = _twin(Submission([model]) if isinstance(model, Embedder) else model, torch.Tensor.cpu)
    variant, tolerance = (half_precision(model), 1e-2) if half else (model, 1e-5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.submission-', dir=path.parent) as folder, torch.no_grad(), \
                warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch.jit is deprecated, and the host knows nothing newer
            file = os.path.join(folder, 'saved_model.pt')
            dim, worst = _save_traced(model, variant, file, tolerance)
            with zipfile.ZipFile(file + '.zip', 'w', zipfile.ZIP_STORED) as archive:
                archive.write(file, 'saved_model.pt')
            os.replace(file + '.zip', path)
    except OSError as error:
        raise OSError(f'{path} cannot be written ({error.strerror or error}): choose a writable folder with '
                      'room for the weights twice.') from error
    print(f'{path}: {path.stat().st_size / 2**20:.1f} MB, {dim} dimensions, within {worst:.1g} of the model.')


def _load_submission(zip_path):
    if not Path(zip_path).is_file():
        raise FileNotFoundError(f'There is no submission {zip_path}: check the path, or write it with export_submission.')
    try:
        with zipfile.ZipFile(zip_path) as archive, tempfile.TemporaryDirectory() as folder, \
                warnings.catch_warnings():
            warnings.simplefilter('ignore')  # as in export_submission
            return torch.jit.load(archive.extract('saved_model.pt', folder)).eval()
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ValueError(f'{zip_path} is not a submission: it must be a zip with a TorchScript file '
                         'saved_model.pt at its root, as export_submission writes it.') from error


@contextmanager
def _open_as_host(path):
    try:
        with Image.open(path) as photograph:
            yield photograph
    except Exception as error:  # decoders raise anything
        raise OSError(f'{path} is not a readable photograph ({error}): leave it out of the frame.') from error


def _read_as_host(path):
    with _open_as_host(path) as photograph:
        return PILToTensor()(photograph.convert('RGB'))


def _batches_of_one_size(paths, most=32):
    """Lists of at most `most` positions in `paths` whose photographs have the same width and height."""
    sizes = {}
    for position, path in enumerate(paths):
        with _open_as_host(path) as photograph:
            sizes.setdefault(photograph.size, []).append(position)
    return [group[i:i + most] for group in sizes.values() for i in range(0, len(group), most)]


def _host_vectors(model, zip_path, paths):
    """What the host takes of the output for photographs of one size: a row for each, flattened; (n, dim)."""
    photographs = torch.stack([_read_as_host(path) for path in paths])
    output, wrong = None, ''
    try:
        output = model(photographs)
    except RuntimeError as error:
        wrong = f'stops with "{str(error).strip().splitlines()[-1]}"'
    shape = getattr(output, 'shape', ())
    if not wrong and (len(shape) < 2 or shape[0] != len(paths)):
        wrong = f'returns {f"the shape {list(shape)}" if shape else type(output).__name__}'
    elif not wrong and shape[1:].numel() > HOST_DIM:
        wrong = f'gives {shape[1:].numel()} dimensions'
    elif not wrong and not output.isfinite().all():
        wrong = 'returns NaN or infinite values'
    if wrong:
        raise ValueError(f'{zip_path} {wrong} for {len(paths)} photographs such as {paths[0]}; the host takes one row of at '
                         f'most {HOST_DIM} finite numbers for each: export the model again.')
    return output.flatten(1).numpy()


def evaluate_submission(zip_path, query_frame, index_frame, *, quick=False, limit=None):
    """Replay the host: every photograph through the file one by one, neighbours by Euclidean distance, mP@5.

    Frames: columns path (absolute) and label. quick: photographs of one size in batches, with the same result
    (the file must take batches, as export_submission's do). limit: only so many first rows of each frame.
    Prints photographs a second, reading included, and the hours that the host's 205,000 would take here.
    Returns a dict: mp5, images_per_second, hours, dim, and the vectors query and index, float32 (n, dim).
    """
    model, frames = _load_submission(zip_path), [query_frame.iloc[:limit], index_frame.iloc[:limit]]
    paths = [path for frame in frames for path in frame['path']]
    vectors, start = [None] * len(paths), time.perf_counter()
    batches = _batches_of_one_size(paths) if quick else [[position] for position in range(len(paths))]
    with torch.no_grad(), progress_bar(total=len(paths), unit=' photographs') as progress:
        for batch in batches:
            found = _host_vectors(model, zip_path, [paths[position] for position in batch])
            for position, vector in zip(batch, found, strict=True):
                vectors[position] = vector
            progress.update(len(batch))
    rate = len(paths) / (time.perf_counter() - start)
    if len({len(vector) for vector in vectors}) > 1:
        raise ValueError(f'{zip_path} gives vectors of different lengths for different photographs: export the model again.')
    hours, vectors = HOST_IMAGES / rate / 3600, np.stack(vectors)
    print(f'{rate:.1f} photographs/s {"in batches" if quick else "one by one"} on this machine: '
          f'{hours:.1f} h for the host\'s {HOST_IMAGES:,}, of the {HOST_HOURS} h allowed.')
    query, index = np.split(vectors, [len(frames[0])])
    mp5 = mean_precision_at_5(query, frames[0]['label'].to_numpy(), index, frames[1]['label'].to_numpy())
    return {'mp5': mp5, 'images_per_second': rate, 'hours': hours, 'dim': vectors.shape[1], 'query': query, 'index': index}


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: photographs, tables, neighbours · out: matplotlib figures

def show_augmentation(frame, size, name, *, count=8, seed=5):
    """`count` photographs above and three augmented versions of each below."""
    plain, changed = Photos(frame, size), Photos(frame, size, name, seed=seed)
    chosen = np.random.default_rng(seed).choice(len(frame), min(count, len(frame)), replace=False)
    rows = [('as read', [plain[i] for i in chosen])] + [(f'epoch {e}', [changed[e, i] for i in chosen]) for e in range(3)]
    figure, axes = plt.subplots(len(rows), len(chosen), figsize=(1.2 * len(chosen), 1.25 * len(rows)), squeeze=False)
    for row, (title, items) in zip(axes, rows):
        for axis, item in zip(row, items):
            axis.imshow(item['image'].permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    figure.suptitle(f'augmentation: {name}')
    figure.tight_layout()


def plot_margins(labels, margins):
    """Margin against the photographs a class has, and how many classes have so many."""
    counts = np.sort(np.unique(labels, return_counts=True)[1])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    left.plot(counts, np.sort(margins)[::-1], '.')
    left.set(xlabel='photographs of the class', ylabel='margin (radians)', ylim=(0, None))
    right.hist(counts, bins=min(30, int(np.ptp(counts)) + 1))
    right.set(xlabel='photographs of the class', ylabel='classes')
    figure.tight_layout()


def plot_logs(run_dirs):
    """Loss and learning rate against the step, runs overlaid; a run without a log, as a bare checkpoint, is left out."""
    run_dirs = [run_dir for run_dir in run_dirs if Path(run_dir, 'log.csv').exists()]
    if not run_dirs:
        return print('no run has a log to draw')
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    for run_dir in map(Path, run_dirs):
        log = pd.read_csv(run_dir / 'log.csv')
        left.plot(log['step'], log['loss'].rolling(max(1, len(log) // 20), min_periods=1).mean(), label=run_dir.name)
        right.plot(log['step'], log['lr'], label=run_dir.name)
    left.set(xlabel='optimiser step', ylabel='ArcFace loss (moving mean)')
    right.set(xlabel='optimiser step', ylabel="the head's learning rate")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()


def show_neighbours(queries, index, neighbours, *, size=96, rows=6, seed=5):
    """Queries (left) and their five nearest photographs, framed green where the object is the same, else red.

    queries, index: DataFrames path, label; neighbours: int (q, 5), positions in the index. Half of the rows show
    queries that found everything, half others, as far as there are both.
    """
    right = index['label'].to_numpy()[neighbours] == queries['label'].to_numpy()[:, None]
    order = np.random.default_rng(seed).permutation(len(queries))
    good, bad = [order[mask[order]] for mask in (right.all(1), ~right.all(1))]
    chosen = np.concatenate([good[:rows // 2], bad[:rows - min(len(good), rows // 2)], good[rows // 2:]])[:rows]
    figure, axes = plt.subplots(len(chosen), 6, figsize=(7.2, 1.2 * len(chosen)), squeeze=False)
    for row, query in zip(axes, chosen):
        paths = [queries['path'].iloc[query], *index['path'].iloc[neighbours[query]]]
        for axis, path, colour in zip(row, paths, ['black', *np.where(right[query], 'tab:green', 'tab:red')]):
            axis.imshow(read_photo(path, size))
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(color=colour, linewidth=3)
    for axis, title in zip(axes[0], ['query', *'12345']):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()


def plot_dimensions(curves):
    """mP@5 against the number of dimensions. curves: {name: DataFrame dim, mp5}."""
    figure, axis = plt.subplots(figsize=(5.5, 3))
    for name, curve in curves.items():
        axis.plot(curve['dim'], curve['mp5'], '.-', label=name)
    axis.set(xlabel='dimensions', ylabel='mP@5 on never-seen objects', ylim=(0, None), xscale='log',
             xticks=(dims := sorted({d for curve in curves.values() for d in curve['dim']})))
    axis.set_xticklabels(dims)
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.tight_layout()


def plot_variance(vectors, dim):
    """Share of the variance that the first dimensions hold, with a line at `dim`."""
    spectrum = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    share = np.cumsum(spectrum) / spectrum.sum()
    figure, axis = plt.subplots(figsize=(5.5, 2.8))
    axis.plot(np.arange(1, len(share) + 1), share)
    axis.axvline(dim, color='grey', linestyle=':')
    axis.set(xlabel='dimensions', ylabel='explained variance', ylim=(0, 1.02),
             title=f'{dim} dimensions hold {share[min(dim, len(share)) - 1]:.0%}')
    figure.tight_layout()


def plot_scores(scores):
    """A bar a model, coloured by stage."""
    colours = {'untrained': 'tab:grey', 'zero-shot': 'tab:olive', 'ingredient': 'tab:blue', 'soup': 'tab:orange',
               'ensemble': 'tab:green'}
    figure, axis = plt.subplots(figsize=(7, .35 * len(scores) + .9))
    bars = axis.barh(scores['model'], scores['mp5'], color=scores['stage'].map(colours))
    axis.bar_label(bars, fmt='%.3f', padding=3)
    axis.invert_yaxis()
    axis.set(xlabel='mP@5 on never-seen objects', xlim=(0, 1.12 * scores['mp5'].max()))
    figure.tight_layout()


def plot_basin(cosines, lines):
    """Cosines between the ingredients' ways from the pretrained weights, and the score along the line between two."""
    figure, axes = plt.subplots(1, len(cosines) + 1, figsize=(4 * (len(cosines) + 1), 3.4), squeeze=False)
    for axis, (tower, table) in zip(axes[0], cosines.items()):
        short = [str(name).removeprefix(f'{tower}_') for name in table.columns]
        axis.imshow(table, vmin=0, vmax=1, cmap='viridis')
        axis.set(xticks=range(len(short)), yticks=range(len(short)), xticklabels=short, yticklabels=short,
                 title=f'{tower}: cosines')
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            axis.text(column, row, f'{value:.2f}', ha='center', va='center', color='white' if value < .6 else 'black')
    for tower, line in lines.items():
        axes[0, -1].plot(line['alpha'], line['score'], '.-', label=tower)
    axes[0, -1].set(xlabel='from the first ingredient (0) to the second (1)', ylabel='mP@5 on selection objects')
    if lines:
        axes[0, -1].legend(frameon=False)
    figure.tight_layout()


def plot_wise(curves):
    """mP@5 of seen against never-seen objects as alpha goes from the pretrained tower to the soup; star: the alpha that the
    selection objects choose."""
    if not curves:
        return print('no pretrained tower to begin from')
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.2), squeeze=False)
    for axis, (tower, curve) in zip(axes[0], curves.items()):
        axis.plot(curve['seen'], curve['never seen'], 'o-')
        best = curve.loc[curve['selection'].idxmax()]
        axis.plot(best['seen'], best['never seen'], '*', markersize=15, color='tab:orange',
                  label=f'chosen: alpha {best["alpha"]:g}')
        for row in curve.itertuples():
            axis.annotate(f'{row.alpha:g}', (row.seen, row[-1]), textcoords='offset points', xytext=(6, -10), fontsize=8)
        axis.set(xlabel='mP@5 on trained classes', ylabel='mP@5 on never-seen objects', title=tower)
        axis.margins(.12)  # room for the alphas beside the points
        axis.legend(frameon=False)
    figure.tight_layout()
