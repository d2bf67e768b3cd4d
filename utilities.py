"""Image embeddings for open-world retrieval: everything the four notebooks share, in the order the data flows.

settings -> samples -> pixels and batches -> tower and head -> losses -> training -> checkpoints and soups
-> projection to 64 dimensions -> neighbours and mP@5 -> submission -> pictures
"""
import bisect
import copy
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from glob import escape as glob_escape
from glob import glob
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import open_clip
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib import pyplot as plt
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import PILToTensor, v2
from tqdm import tqdm


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: what a notebook's configuration cell says · out: one frozen Config, written beside every result

@dataclass(frozen=True)
class Config:
    """Everything that decides a training run. The defaults are the 4th-place recipe for ViT-H/14 (arXiv 2210.11141)."""
    model_name: str = 'ViT-H-14'              # open_clip name, 'local-dir:folder', 'hf-hub:org/name' or 'timm:name'
    pretrained: str = 'laion2b_s32b_b79k'     # tag, weights file, 'tag@file', or 'random' in so many words
    image_size: int = 224                     # side of the square the photographs are squashed to, pixels
    bands: tuple = ((10, 1.25e-6), (20, 2.5e-6), (26, 5e-6), (32, 1e-5))  # (blocks below, lr): early layers move less
    n_classes: int | None = 9691              # class folders drawn from each domain; None: all of them
    min_images: int = 4                       # classes with fewer teach ArcFace little and are left out
    max_images: int = 50                      # a class gives at most so many, so that none dominates
    augmentation: str = 'none'                # the one thing in which a soup's ingredients differ
    embedding_dim: int = 512                  # width that the classes are separated in; PCA brings it to 64 later
    subcenters: int = 3                       # centres a class: several looks of one object, and label noise
    scale: float = 30.0                       # s of ArcFace: softmax temperature 1/s
    margin_min: float = 0.05                  # radians, for the most frequent class
    margin_width: float = 0.45                # added for the rarest one
    head_lr: float = 3e-4                     # the head starts from nothing, the tower does not
    head_decay: float = 1e-5
    tower_decay: float = 1e-3
    batch_size: int = 8                       # photographs on one device at a time: what fits a 16 GB T4
    effective_batch: int = 32                 # photographs an optimiser step; the rest is accumulated
    epochs: int = 1
    warmup_steps: int = 1000                  # optimiser steps of linear warm-up, then cosine to 0
    clip_norm: float = 1.0                    # an early ArcFace gradient can be huge; the published code did not clip
    precision: str = 'auto'                   # 'bf16' or 'fp16' where the device has it, else 'no'
    checkpoint_activations: bool = True       # a third more time for a fraction of the memory, GPU only
    seed: int = 5                             # data order, augmentation, dropout
    head_seed: int = 5                        # initial head apart: only ingredients that share it can be averaged
    workers: int | None = None                # data-loading processes; None: chosen by cores and device
    validate_every: int | None = None         # optimiser steps between selection scores; the best state is kept
    save_minutes: float = 20                  # between resumable states
    max_hours: float | None = None            # stop cleanly, everything saved, before the session does
    max_unreadable: int = 100                 # photographs that may be broken before the run stops

    LIMITS = {'image_size': (1, 4096), 'n_classes': (1, 10**8), 'min_images': (1, 10**6), 'max_images': (1, 10**9),
              'embedding_dim': (1, 65536), 'subcenters': (1, 100), 'scale': (1e-3, 1e4), 'margin_min': (0, math.pi),
              'margin_width': (0, math.pi), 'head_lr': (0, 1e3), 'head_decay': (0, 1e3), 'tower_decay': (0, 1e3),
              'batch_size': (1, 10**6), 'effective_batch': (1, 10**7), 'epochs': (0, 10**5),
              'warmup_steps': (0, 10**9), 'clip_norm': (1e-9, 1e9), 'validate_every': (1, 10**9), 'workers': (0, 512),
              'save_minutes': (0, 10**5), 'max_hours': (0, 10**5), 'max_unreadable': (0, 10**9)}

    def __post_init__(self):
        object.__setattr__(self, 'bands', tuple((int(end), float(lr)) for end, lr in self.bands))
        for name, (low, high) in self.LIMITS.items():
            value = getattr(self, name)
            if value is None and name in ('n_classes', 'validate_every', 'workers', 'max_hours'):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f'Config.{name} is {value!r}; it must be a number from {low} to {high}.')
        ends = [end for end, _ in self.bands]
        if not ends or ends != sorted(set(ends)) or min(lr for _, lr in self.bands) < 0:
            raise ValueError(f'Config.bands is {self.bands}; give (blocks below, lr) pairs with rising block numbers.')
        if self.effective_batch % self.batch_size:
            raise ValueError(f'Config.effective_batch is {self.effective_batch}; it must be a multiple of batch_size '
                             f'{self.batch_size}, since whole batches are accumulated.')
        if self.precision not in ('auto', 'no', 'fp16', 'bf16'):
            raise ValueError(f'Config.precision is {self.precision!r}; choose auto, no, fp16 or bf16.')

    def override(self, **choices):
        """The same with other values; None keeps the value that is there. An unknown name is an error."""
        unknown = sorted(set(choices) - set(asdict(self)))
        if unknown:
            raise ValueError(f'Config has no field {unknown[0]!r}; its fields are {", ".join(asdict(self))}.')
        return replace(self, **{name: value for name, value in choices.items() if value is not None})

    def save(self, path):
        write_text(path, json.dumps(asdict(self), indent=1) + '\n')

    @classmethod
    def load(cls, path):
        try:
            return cls().override(**json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f'{path} is not a configuration: {error}.') from None


def write_text(path, text):
    """Writes beside, then renames: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + '.part')
    beside.write_text(text)
    os.replace(beside, path)


def progress_bar(iterable=None, desc=None, **options):
    """tqdm on stdout: a notebook then keeps one plain line of it instead of a red block or an empty widget."""
    return tqdm(iterable, desc, file=sys.stdout, mininterval=.5, **options)


# ── Samples ───────────────────────────────────────────────────────────────────────────────────────────
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
                            'pass the folder of the data set as root.')


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
            raise ValueError(f'{file}: {outside.iloc[0]} leaves the data root {base}; pass the folder that '
                             'holds all photos as root.')
    if len(lost) == len(sample):
        raise FileNotFoundError(f'{file}: expected {full.iloc[0]}, found {_contents(root)}; pass the folder '
                                'that the paths start from as root.')
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


def load_data(train, query=None, index=None, selection=None, *, config, held_out=0.1):
    """The frames of a run: dict train, query, index, selection_query, selection_index.

    train: what read_dataset takes, or a list of such. query, index: never-seen objects to report on; selection: a pair
    (query, index) to make choices on. What is not given is made of classes held out of the training data (`held_out` of
    them each): their photographs are dealt out in turn, one to the query, two to the index. A class that is both
    trained and searched is named aloud: it is no never-seen object.
    """
    given = [train] if isinstance(train, (str, os.PathLike)) else train
    frame = pd.concat([read_dataset(source) for source in given], ignore_index=True)
    frames = {}
    for names, pair in ((('query', 'index'), (query, index)),
                        (('selection_query', 'selection_index'), selection or (None, None))):
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f'{names[0]} and {names[1]} belong together: give both, or neither to hold classes out.')
        if pair[0] is None:
            frame, held = split_by_class(frame, held_out, seed=config.seed)
            turn = held.groupby('label').cumcount() % 3
            frames |= {names[0]: held[turn == 0].reset_index(drop=True), names[1]: held[turn > 0].reset_index(drop=True)}
        else:
            frames |= dict(zip(names, map(read_dataset, pair), strict=True))
    frames['train'] = select_classes(frame, config.min_images, config.max_images, config.n_classes, config.seed)
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


# ── Pixels and batches ────────────────────────────────────────────────────────────────────────────────
# in: a DataFrame path, label
# out: batches of uint8 images (b, 3, size, size), the same for a seed whatever the workers

PHOTO_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')  # Pillow knows more, some run other programs
_UPRIGHT = dict(zip(range(2, 9), (  # EXIF orientation -> what undoes it
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), strict=True))


def read_photo(path, size, max_pixels=89_000_000):
    """A photo as RGB image, upright, squashed to (size, size) by antialiased bicubic; alpha on white.

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
            return small if turn is None else small.transpose(turn)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise OSError(f'The photo {path} cannot be read: {error}') from error


def _to_rgb(image):
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def _squash(image, size, box):
    """torch's uint8 kernel: Pillow's bicubic within 2 levels, in less than half of its time. `box` is the
    exact extent: 427 rows decoded at half scale are 214, of which 213.5 are picture."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scale = [size / side * (1 + 1e-9) for side in (box[3], box[2])]  # the output's side is rounded down
    return Image.fromarray(F.interpolate(pixels, scale_factor=scale, mode='bicubic', antialias=True)[0]
                           .permute(1, 2, 0).numpy())


def _orientation(image):
    with suppress(Exception):  # a broken EXIF block does not make a photo unreadable
        return image.getexif().get(0x0112)


def _uniform(low, high):
    return torch.empty(1).uniform_(low, high).item()


def _shift_scale_rotate(image, shift, scale, angle, border):
    """One random similarity about the centre; `border` says, as cv2 does, what comes in."""
    import cv2
    centre = [(side - 1) / 2 for side in image.size]
    matrix = cv2.getRotationMatrix2D(centre, _uniform(-angle, angle), 1 + _uniform(-scale, scale))
    matrix[:, 2] += [side * _uniform(-shift, shift) for side in image.size]
    border = getattr(cv2, f'BORDER_{border}')
    return Image.fromarray(cv2.warpAffine(np.asarray(image), matrix, image.size, borderMode=border))


def _sharpen(image):  # the kernel of albumentations' Sharpen, whose alpha is .2….5; torchvision divides by 13
    return v2.functional.adjust_sharpness(image, 1 + 13 * _uniform(.2, .5))


def _clahe(image):
    import cv2
    lab = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(_uniform(1, 4), (8, 8)).apply(lab[..., 0])
    return Image.fromarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def _turn_hue(image, part):  # eight times as fast as torchvision's
    import cv2
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
    without it (evaluation) its image is black. More than `max_unreadable` raise OSError."""

    def __init__(self, frame, size, augment='none', *, seed=5, targets=None, replace=False,
                 max_unreadable=100):
        self.paths = frame['path'].tolist()
        ranks, _ = pd.factorize(frame['label'], sort=True)
        self.targets = ranks if targets is None else np.asarray(targets)
        self.transform = augmentation(augment)
        self.size, self.seed, self.replace, self.max_unreadable = size, seed, replace, max_unreadable
        self._bad = torch.zeros(len(frame), dtype=torch.bool).share_memory_()  # workers write too

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        image, source = self._readable(index)
        with _seeded(self.seed, epoch, index):
            image = self.transform(image)
        return {'image': image, 'target': int(self.targets[source]), 'index': index,
                'unreadable': bool(self._bad[index])}

    @property
    def unreadable(self):
        """Paths of the photos that could not be read so far, by whichever worker."""
        return [self.paths[index] for index in self._bad.nonzero().flatten().tolist()]

    def _readable(self, index):
        for source in self._candidates(index):
            try:
                return read_photo(self.paths[source], self.size), source
            except OSError as error:
                self._bad[source] = True
                if self._bad.sum() > self.max_unreadable:
                    raise OSError(f'More than {self.max_unreadable} photos (max_unreadable) cannot be read; '
                                  f'the last: {error}') from None
        if self.replace:
            raise OSError(f'None of the {len(self):,} photos can be read; the first is {self.paths[0]}.')
        return Image.new('RGB', (self.size, self.size)), index

    def _candidates(self, index):
        yield index
        if self.replace:
            others = np.arange(index + 1, index + len(self)) % len(self)
            same = self.targets[others] == self.targets[index]
            yield from others[same]
            yield from others[~same]


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


def loader(photos, batch_size, *, train=False, epoch=0, start=0, rank=0, processes=1, workers=None):
    """DataLoader over Photos, for one pass. Evaluation: every photo in order.

    Training: full batches in an order that depends on (photos.seed, epoch) alone, from position `start` on
    (the number of samples already used in this epoch, by all processes). Neither making nor using a loader
    draws from torch's global generator. `workers` None: up to 8 where there is a GPU or 8 cores, else 0,
    since the tower then needs the cores itself."""
    if train and len(photos) < batch_size:
        raise ValueError(f'{len(photos)} photos do not fill a batch of {batch_size}; lower the batch size.')
    cuda, cores = torch.cuda.is_available(), os.cpu_count() or 1
    if workers is None:
        workers = min(cores, 8) if cuda or cores >= 8 else 0
    order = np.random.default_rng([photos.seed, epoch]).permutation(len(photos))[start:]
    turns = len(order) // (batch_size * processes)  # every process takes its part of the same global batch
    order = order[:turns * batch_size * processes].reshape(turns, processes, batch_size)[:, rank].ravel().tolist()
    return DataLoader(photos, batch_size, sampler=[(epoch, index) for index in order] if train else None,
                      drop_last=train, num_workers=workers, pin_memory=cuda, worker_init_fn=_one_thread,
                      generator=torch.Generator().manual_seed(photos.seed))


def _one_thread(_):
    import cv2
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# ── Tower and head ────────────────────────────────────────────────────────────────────────────────────────────────────
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
    tag's preprocessing and activation, as on Kaggle without internet)."""
    if model_name not in open_clip.list_models():
        raise ValueError(f'open_clip has no model {model_name!r}.{closest(model_name, open_clip.list_models())}')
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    tag, _, file = pretrained.partition('@') if '@' in pretrained else (pretrained, '', '')
    if pretrained == 'random':
        return None, {}
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


def load_open_clip(model_name, pretrained, image_size=None):
    """open_clip's whole CLIP with weights, never silently random."""
    random = pretrained == 'random'
    if model_name.startswith(('local-dir:', 'hf-hub:')):
        source, facts = None, {}
    else:
        source, facts = weights_source(model_name, pretrained)
    facts = {name: facts[name] for name in ('mean', 'std') if facts.get(name)}, facts.get('quick_gelu', False)
    try:
        return open_clip.create_model(model_name, pretrained=source, force_image_size=image_size,
                                      load_weights=not random, require_pretrained=not random,
                                      force_quick_gelu=facts[1], force_preprocess_cfg=facts[0])
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f'The weights {pretrained or model_name!r} do not load into {model_name}: '
                         f'{str(error).strip().splitlines()[0]}') from error


def load_image_tower(model_name, pretrained='', image_size=None):
    """The image half of a pretrained model, with what belongs to its weights as `tower.spec`.

    model_name: an open_clip name, 'local-dir:folder', 'hf-hub:org/name', or 'timm:name'. pretrained: a tag, a file,
    'tag@file', or 'random'. image_size: pixels; another one than the weights' own resizes the position embedding.
    Returns a module: normalised float (n, 3, s, s) -> (n, spec.width). ValueError: unknown name, tag or file, or
    weights that do not fit.
    """
    if model_name.startswith('timm:'):
        return load_timm_tower(model_name, pretrained, image_size)
    tower = load_open_clip(model_name, pretrained, image_size).visual
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
    if image_size and 'img_size' in inspect.signature(timm.create_model).parameters | \
            inspect.signature(timm.model_entrypoint(name)).parameters:
        options['img_size'] = image_size
    tower = timm.create_model(name, pretrained=not pretrained, **options)
    facts = timm.data.resolve_model_data_config(tower)
    size = image_size or facts['input_size'][-1]
    if file:
        classifier = tower.pretrained_cfg.get('classifier') or '-'
        state = {key: open_checkpoint(file)[key] for key in open_checkpoint(file).keys()
                 if not key.startswith(f'{classifier}.')}
        load_strictly(tower, state, file)
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


def build_tower(spec):
    """The tower of a TowerSpec without its weights (random ones), for weights of our own."""
    plan = spec.architecture
    if plan.get('library') == 'timm':
        tower = timm.create_model(plan['name'], pretrained=False, **plan['options'])
    elif plan.get('library') == 'open_clip':
        tower = _build_vision_tower(plan['embed_dim'], CLIPVisionCfg(**plan['vision_cfg']), plan['quick_gelu'])
    else:
        raise ValueError(f'{spec.model_name} cannot be rebuilt from its checkpoint alone; pass its tower along.')
    tower.spec = spec
    return tower


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
        vectors = [model.encode_text(batch.to(best_device())).float().cpu() for batch in progress_bar(batches, 'texts')]
        if getattr(tokenizer, 'unknown', None):
            print(f'{len(tokenizer.unknown)} words are unknown to {model_name}: '
                  f'{", ".join(word for word, _ in tokenizer.unknown.most_common(8))}, …')
            tokenizer.unknown.clear()
        return torch.cat(vectors).numpy()

    return encode


def best_device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


class SubcenterHead(nn.Module):
    """Linear map to the embedding and several centres a class (Deng 2020, sub-centre ArcFace).

    `seed` alone decides the initial weights: ingredients of one soup must share them bit for bit.
    """
    DROPOUTS = (.1, .2, .3, .4, .5)  # the five parallel masks of the published head, after one of .1

    def __init__(self, width, n_classes, *, dim=512, subcenters=3, seed=5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.subcenters = subcenters
        self.embedding = nn.Linear(width, dim, bias=False)
        self.centers = nn.Parameter(torch.empty(n_classes * subcenters, dim))  # row = class · subcenters + centre
        nn.init.kaiming_uniform_(self.embedding.weight, a=math.sqrt(5), generator=generator)
        nn.init.xavier_uniform_(self.centers, generator=generator)

    def forward(self, features):
        """(n, width) -> embedding (n, dim), not normalised; dropout while training.

        The mean of five dropped-out copies through one bias-free map is that map of the mean copy: one pass, not five.
        """
        if self.training:
            mask = sum(F.dropout(torch.ones_like(features), p) for p in self.DROPOUTS) / len(self.DROPOUTS)
            features = F.dropout(features, .1) * mask
        return self.embedding(features)

    def cosine(self, embedding):
        """(n, dim) -> cosine to the nearest centre of every class, float32 (n, n_classes)."""
        with torch.autocast(embedding.device.type, enabled=False):  # a cosine near 1 has no digits left in fp16
            cosine = F.normalize(embedding.float()) @ F.normalize(self.centers.float()).T
        return cosine.unflatten(1, (-1, self.subcenters)).amax(2)


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

    def forward(self, images, classify=False):
        """uint8 or float 0..255 (n, 3, s, s) -> float32 (n, dim) of length 1; classify: cosines (n, n_classes)."""
        features = self.tower((images.float() - self.mean) / self.std)
        if classify:
            return self.head.cosine(self.head(features))
        return self.project(features.float())

    def project(self, features):
        """What follows the tower: (n, width) -> (n, dim) of length 1."""
        vectors = F.normalize(self.head.embedding(features) if self.head is not None else features)
        return vectors if self.projection is None else F.normalize(self.projection(vectors))


BLOCK = re.compile(r'(?:resblocks|blocks|layers|stages)\.(\d+)\.')
STEM = re.compile(r'(^|\.)(conv1|class_embedding|positional_embedding|ln_pre|patch_embed|pos_embed|cls_token|reg_token'
                  r'|norm_pre|conv_stem|stem)(\.|$)')


def param_groups(model, config):
    """AdamW's groups for an Embedder: every trainable parameter in exactly one.

    The tower's blocks take the learning rates of config.bands (stretched, if the bands count other blocks than the
    tower has); what lies before the blocks takes the first band's, what follows them (final norm, projection) the last
    one's. Biases, norms, class token and position embedding are not decayed. Returns a list of dicts: name, params,
    names, lr, weight_decay.
    """
    tower = dict(model.tower.named_parameters())
    blocks = {name: int(found[1]) for name in tower if (found := BLOCK.search(name))}
    depth, ends = 1 + max(blocks.values(), default=0), [end for end, _ in config.bands]
    groups = {}

    def add(group, name, parameter, lr, decay):
        kept = parameter.ndim < 2 or re.search(r'embedding$|pos_embed$|_token$', name)
        group, decay = (f'{group}, no decay', 0.0) if kept else (group, decay)
        entry = groups.setdefault(group, {'name': group, 'params': [], 'names': [], 'lr': lr, 'weight_decay': decay})
        entry['params'].append(parameter)
        entry['names'].append(name)

    for name, parameter in tower.items():
        block = blocks.get(name, 0 if STEM.search(name) else depth - 1)
        band = bisect.bisect_right(ends, block * ends[-1] // depth)
        if parameter.requires_grad:
            add(f'tower, blocks below {-(-ends[band] * depth // ends[-1])}', f'tower.{name}', parameter,
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


# ── Losses ────────────────────────────────────────────────────────────────────────────────────────────────────────────
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


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────
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

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        self.__dict__.update(state)


def launch(function, *arguments):
    """Calls the function once on every GPU (accelerate's notebook_launcher), or just calls it where there is one or none.

    Results come back by files. With several GPUs nothing may have touched CUDA before.
    """
    from accelerate.utils import is_cuda_available
    if is_cuda_available() and torch.cuda.device_count() > 1:
        from accelerate import notebook_launcher
        notebook_launcher(function, arguments, num_processes=torch.cuda.device_count())
    else:
        function(*arguments)


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


def fit(config, model, train, run_dir, validate=None):
    """Fine-tunes the Embedder on the labelled photographs by ArcFace and writes the run.

    config: Config. model: Embedder with a SubcenterHead of as many classes as `train` has labels; trained in place.
    train: DataFrame path, label. run_dir: goes on by itself from the state found there. validate: model -> mP@5 on
    selection data, called every config.validate_every steps; the best state is what the run keeps, the last one
    without. Writes model.safetensors, config.json, log.csv, state/. Raises Stopped when config.max_hours is over,
    ValueError for data and head that disagree, FloatingPointError for a loss that stays NaN.
    """
    run_dir, started = Path(run_dir), time.time()
    labels, targets, counts = np.unique(train['label'], return_inverse=True, return_counts=True)
    if model.head is None or len(model.head.centers) != len(labels) * model.head.subcenters:
        raise ValueError(f'The head must have {len(labels)} classes, as many as the photographs have labels.')
    accelerator = Accelerator(mixed_precision=mixed_precision(config.precision), cpu=not torch.cuda.is_available(),
                              step_scheduler_with_optimizer=False)
    together = config.batch_size * accelerator.num_processes
    accumulate = max(1, config.effective_batch // together)
    steps = config.epochs * (len(train) // (together * accumulate))
    if config.epochs and not steps:
        raise ValueError(f'{len(train)} photographs do not fill one step of {together * accumulate}; lower '
                         f'effective_batch or take more photographs.')
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout; initial weights are made before, elsewhere
    if config.checkpoint_activations and accelerator.device.type == 'cuda':
        checkpoint_activations(model.tower)
    groups = [{name: group[name] for name in ('params', 'lr', 'weight_decay')} for group in param_groups(model, config)]
    optimiser = torch.optim.AdamW(groups, fused=accelerator.device.type == 'cuda')
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, partial(learning_rate_share, steps=steps, warmup=min(config.warmup_steps, steps // 2)))
    photos = Photos(train, model.spec.image_size, config.augmentation, seed=config.seed, targets=targets,
                    replace=True, max_unreadable=config.max_unreadable)
    wrapped, optimiser = accelerator.prepare(model.train(), optimiser)
    margins = adaptive_margins(counts, low=config.margin_min, width=config.margin_width).to(accelerator.device)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, schedule)
    main = accelerator.is_main_process
    with run_lock(run_dir) if main else nullcontext():
        log = RunLog(run_dir, accelerator, progress, restore_state(accelerator, run_dir / 'state', config))
        if main:
            config.save(run_dir / 'config.json')
        bar = progress_bar(total=steps, initial=progress.step, desc=run_dir.name, disable=not main)
        saved = time.time()
        while progress.step < steps:
            batches = loader(photos, config.batch_size, train=True, epoch=progress.epoch, start=progress.used,
                             rank=accelerator.process_index, processes=accelerator.num_processes,
                             workers=config.workers)
            for batches_of_step in grouped(batches, accumulate):
                loss = optimiser_step(accelerator, wrapped, optimiser, batches_of_step, margins, config)
                if not accelerator.optimizer_step_was_skipped:  # fp16's scaler skips a step that overflowed
                    schedule.step()
                progress.step += 1
                progress.used += together * accumulate
                log.add(loss, schedule.get_last_lr()[-1], together * accumulate)
                bar.update()
                bar.set_postfix(loss=f'{loss:.3f}')
                if validate and config.validate_every and progress.step % config.validate_every == 0:
                    keep_if_best(accelerator, model, validate, run_dir, progress, config)
                late = config.max_hours is not None and time.time() - started > config.max_hours * 3600
                if late or time.time() - saved > config.save_minutes * 60:
                    save_state(accelerator, run_dir / 'state', progress)
                    saved = time.time()
                if late:
                    raise Stopped(f'{run_dir.name}: {config.max_hours} hours are over after {progress.step} of {steps} '
                                  f'steps; run it again to go on.')
            progress.epoch, progress.used = progress.epoch + 1, 0
        bar.close()
        finish(accelerator, model, validate, run_dir, progress, config, photos.unreadable)


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


def optimiser_step(accelerator, model, optimiser, batches, margins, config):
    """One optimiser step over several batches; returns their mean loss. NaN stops the run, naming what to do."""
    total = 0.0
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                cosine = model(batch['image'].to(accelerator.device, non_blocking=True), classify=True)
            loss = arcface_loss(cosine, batch['target'].to(accelerator.device), margins, config.scale)
            accelerator.backward(loss / len(batches))
        total += loss.detach() / len(batches)
    total = accelerator.reduce(total, 'mean').item()
    if not math.isfinite(total):
        raise FloatingPointError('The loss is not a number: lower head_lr or the bands, or set precision="no"; the '
                                 'last saved state is untouched.')
    accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimiser.step()
    optimiser.zero_grad()
    return total


class RunLog:
    """log.csv: step, loss, lr, images/s, one row an optimiser step; rows after the restored step are dropped."""

    def __init__(self, run_dir, accelerator, progress, restored):
        self.path, self.progress, self.writes = run_dir / 'log.csv', progress, accelerator.is_main_process
        self.last = time.time()
        if self.writes:
            kept = pd.read_csv(self.path).query(f'step <= {progress.step}').to_csv(index=False) if restored else ''
            write_text(self.path, kept or 'step,loss,lr,images/s\n')

    def add(self, loss, lr, images):
        now = time.time()
        if self.writes:
            with self.path.open('a') as file:
                file.write(f'{self.progress.step},{loss:.6f},{lr:.4g},{images / (now - self.last):.1f}\n')
        self.last = now


@contextmanager
def run_lock(run_dir):
    """Refuses a second run in the same folder; the system frees the lock however the process ends."""
    import fcntl
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / '.lock').open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f'Another run is writing into {run_dir}: wait for it, or give this one another '
                               f'name.') from None
        yield


def save_state(accelerator, folder, progress, keep=2):
    """Everything needed to go on, as folder/step-<n>: complete before older ones go. By accelerate."""
    target = folder / f'step-{progress.step:08d}'
    beside = folder / 'unfinished'
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(beside)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
        for old in sorted(folder.glob('step-*'))[:-keep]:
            shutil.rmtree(old)


def restore_state(accelerator, folder, config):
    """Loads the newest state that loads; True if there was one. A state of another configuration is an error."""
    saved = folder.parent / 'config.json'
    states = sorted(folder.glob('step-*'), reverse=True)
    if states and saved.exists() and (difference := different_fields(Config.load(saved), config)):
        raise ValueError(f'{folder.parent} holds a run with another configuration ({", ".join(difference)}): give this '
                         f'run another name, or delete that folder.')
    for state in states:
        try:
            accelerator.load_state(state)
            accelerator.print(f'{folder.parent.name}: going on from {state.name}')
            return True
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
            accelerator.print(f'{state} cannot be read ({str(error).splitlines()[0]}); trying the one before.')
    return False


def different_fields(first, second):
    """'field: a, now b' for what two configurations train differently."""
    free = {'workers', 'save_minutes', 'max_hours', 'max_unreadable', 'batch_size', 'precision'}
    return [f'{name}: {value}, now {asdict(second)[name]}' for name, value in asdict(first).items()
            if name not in free and value != asdict(second)[name]]


def keep_if_best(accelerator, model, validate, run_dir, progress, config):
    """Scores the model on selection data and writes it if it is the best so far."""
    accelerator.wait_for_everyone()
    score = torch.zeros((), device=accelerator.device)
    if accelerator.is_main_process:
        model.eval()
        score += validate(model)
        model.train()
        if score > progress.best:
            save_run(run_dir, model, config, score=float(score), step=progress.step)
    score = float(accelerator.reduce(score, 'sum'))
    accelerator.print(f'step {progress.step}: selection mP@5 {score:.3f}')
    progress.best = max(progress.best, score)


def finish(accelerator, model, validate, run_dir, progress, config, unreadable):
    """The end of a run: its weights if none better are kept, what could not be read, and the last state."""
    if validate and config.validate_every:
        keep_if_best(accelerator, model, validate, run_dir, progress, config)
    elif accelerator.is_main_process:
        save_run(run_dir, model, config, step=progress.step)
    save_state(accelerator, run_dir / 'state', progress)
    if accelerator.is_main_process and unreadable:
        write_text(run_dir / 'unreadable.txt', '\n'.join(unreadable) + '\n')
        print(f'{len(unreadable)} photographs could not be read and were replaced by others of their class: '
              f'{run_dir / "unreadable.txt"}, first {unreadable[0]}')
    model.eval()


@torch.inference_mode()
def embed(model, frame, *, batch_size=64, workers=None, cache=None, desc='embedding', max_unreadable=100):
    """Vectors of photographs: float32 (n, dim), rows as in the frame.

    cache: an .npz file that keeps vectors, paths and a digest of the weights; it is used again when both agree. An
    unreadable photograph is named and becomes a black one.
    """
    key = state_digest({**dict(model.named_parameters()), 'size': torch.tensor(model.spec.image_size)})
    if cache and Path(cache).exists():
        with np.load(cache) as kept:
            if str(kept['digest']) == key and np.array_equal(kept['paths'], frame['path'].to_numpy(str)):
                return kept['vectors']
    photos = Photos(frame, model.spec.image_size, max_unreadable=max_unreadable)
    model.to(best_device()).eval()
    half = torch.autocast('cuda', enabled=best_device().type == 'cuda', dtype=torch.float16)
    with half:
        vectors = [model(batch['image'].to(best_device())).float().cpu()
                   for batch in progress_bar(loader(photos, batch_size, workers=workers), desc, leave=False)]
    if photos.unreadable:
        print(f'{len(photos.unreadable)} photographs could not be read, first {photos.unreadable[0]}; their vectors '
              f'are those of a black square.')
    vectors = torch.cat(vectors).numpy() if vectors else np.zeros((0, model.spec.width), np.float32)
    if cache:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        beside = Path(cache).with_suffix('.part.npz')
        np.savez(beside, vectors=vectors, paths=frame['path'].to_numpy(str), digest=key)
        os.replace(beside, cache)
    return vectors


class _Ck:
    def __init__(self, path):
        from safetensors import safe_open
        self.f = safe_open(str(path), 'pt'); self.metadata = self.f.metadata() or {}
    def keys(self): return list(self.f.keys())
    def __getitem__(self, k): return self.f.get_tensor(k)
def open_checkpoint(path): return _Ck(path)
def save_tensors(state, path, metadata, overwrite=False):
    from safetensors.torch import save_file
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, str(path), metadata)
def file_digest(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()
def state_digest(t): 
    h = hashlib.sha256()
    for k in sorted(t): h.update(k.encode()); h.update(t[k].detach().cpu().numpy().tobytes())
    return h.hexdigest()[:12]
def _st(p):
    if isinstance(p, dict): return p
    p = Path(p)/'model.safetensors' if Path(p).is_dir() else p
    c = open_checkpoint(p); return {k: c[k] for k in c.keys()}
def average_states(paths, weights=None):
    s = [_st(p) for p in paths]; return {k: sum(x[k].double() for x in s).div(len(s)).float() for k in s[0]}
def interpolate_states(a, b, alpha):
    a, b = _st(a), _st(b); return {k: b[k] if k not in a else torch.lerp(a[k], b[k], alpha) for k in b}
def greedy_soup(paths, score):
    alone = {p: score(_st(p)) for p in paths}; order = sorted(paths, key=lambda p: -alone[p]); kept=[]; rows=[]; best=-1
    for p in order:
        v = score(average_states(kept+[p])); ok = v >= best
        if ok: kept.append(p); best = v
        rows.append({'path': p, 'alone': alone[p], 'with_it': v, 'kept': ok}); print(p, v, ok)
    return average_states(kept), pd.DataFrame(rows)
def soup_metadata(paths, method, **extra):
    m = open_checkpoint(paths[0]).metadata
    return {'format': 'pt', 'spec': m['spec'], 'config': m['config'], 'method': method, **{k: json.dumps(v) for k, v in extra.items()}}
def weight_cosines(paths, base):
    b = _st(base); v = [torch.cat([(s[k]-b[k]).flatten() for k in b]) for s in map(_st, paths)]
    return pd.DataFrame([[float(F.cosine_similarity(x, y, dim=0)) for y in v] for x in v], index=[Path(p).name for p in paths], columns=[Path(p).name for p in paths])
def path_scores(a, b, score, points=5):
    return pd.DataFrame([{'alpha': t, 'score': score(interpolate_states(a, b, t))} for t in np.linspace(0, 1, points)])


def save_run(run_dir, model, config, **facts):
    """Writes run_dir/model.safetensors: tower, head and projection with all that is needed to load them again."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {'format': 'pt', 'spec': json.dumps(asdict(model.spec)), 'config': json.dumps(asdict(config)),
                **{name: json.dumps(value) for name, value in facts.items()}}
    save_tensors(state, Path(run_dir) / 'model.safetensors', metadata, overwrite=True)


def load_run(path, tower=None):
    """The Embedder of a run's folder or checkpoint file, in evaluation mode.

    tower: needed for checkpoints that do not say how they are built (the original authors', or a tower of your own
    making); only its architecture and spec are used, on a copy.
    """
    file = Path(path) / 'model.safetensors' if Path(path).is_dir() else Path(path)
    checkpoint = open_checkpoint(file)
    state = {name: checkpoint[name] for name in checkpoint.keys()}
    if tower is None and 'spec' not in checkpoint.metadata:
        raise ValueError(f'{file} does not say which tower it belongs to; pass tower=load_image_tower(…).')
    tower = copy.deepcopy(tower) if tower is not None else build_tower(spec_of(checkpoint.metadata))
    head = projection = None
    if 'head.embedding.weight' in state:
        dim, width = state['head.embedding.weight'].shape
        config = json.loads(checkpoint.metadata.get('config', '{}'))
        subcenters = config.get('subcenters', 3)
        head = SubcenterHead(width, len(state['head.centers']) // subcenters, dim=dim, subcenters=subcenters)
    if 'projection.weight' in state:
        projection = nn.Linear(*reversed(state['projection.weight'].shape))
    model = Embedder(tower, head, projection)
    load_strictly(model, state, file)
    return model.eval()


def spec_of(metadata):
    """The TowerSpec in a checkpoint's metadata."""
    spec = json.loads(metadata['spec'])
    return TowerSpec(**spec | {'mean': tuple(spec['mean']), 'std': tuple(spec['std'])})


def list_runs(root):
    """Every run below a folder: DataFrame run, model, augmentation, seed, epochs, mp5 (at dim 64, if scored), digest."""
    rows = []
    for file in sorted(Path(root).glob('**/model.safetensors')):
        if file.parent.parent.name == 'state':
            continue
        metadata = open_checkpoint(file).metadata
        config, scores = json.loads(metadata.get('config', '{}')), file.with_name('scores.csv')
        score = pd.read_csv(scores).query('dim == 64')['mp5'] if scores.exists() else []
        rows.append({'run': str(file.parent), **{name: config.get(name) for name in (
            'model_name', 'image_size', 'augmentation', 'seed', 'epochs')}, 'method': metadata.get('method', 'training'),
            'mp5': score.iloc[-1] if len(score) else np.nan, 'digest': file_digest(file)[:12]})
    return pd.DataFrame(rows)


def find_ingredients(root, towers):
    """{tower: [run folders]} of the finished runs below `root` whose names begin with the tower's."""
    found = {tower: sorted(file.parent for file in Path(root).glob(f'{tower}_*/model.safetensors')) for tower in towers}
    found = {tower: runs for tower, runs in found.items() if runs}
    if not found:
        raise FileNotFoundError(f'{root} holds no finished run of {" or ".join(towers)}: run train_{towers[0]}.ipynb '
                                f'first, once for every ingredient.')
    for tower in towers:
        print(f'{tower}: {len(found.get(tower, []))} ingredients')
    return found


def scorer(run, frames):
    """state -> mP@5 on the selection objects, for states of this run's architecture."""
    model = load_run(run)

    def score(state):
        load_strictly(model, state, 'the state')
        return selection_score(model, frames)

    return score


def base_state(run):
    """The pretrained tower that a run started from, as tensors named 'tower.…'."""
    spec = spec_of(open_checkpoint(Path(run) / 'model.safetensors').metadata)
    tower = load_image_tower(spec.model_name, spec.pretrained, spec.image_size)
    return {f'tower.{name}': tensor for name, tensor in tower.state_dict().items()}


def save_soup(state, run_dir, ingredients, method, **facts):
    """Writes averaged weights as a run of its own: model.safetensors with its ingredients' digests, and config.json."""
    files = [Path(run) / 'model.safetensors' for run in ingredients]
    save_tensors(state, Path(run_dir) / 'model.safetensors', soup_metadata(files, method, **facts), overwrite=True)
    Config.load(files[0].with_name('config.json')).save(Path(run_dir) / 'config.json')


def sweep_alpha(base, soup, alphas, score, frames):
    """WiSE-FT's curve: DataFrame alpha, selection, seen, never seen: mP@5 at the head's full width.

    seen: photographs of trained classes, each searched among the others.
    """
    file, rows = Path(soup) / 'model.safetensors', []
    seen = frames['train'].groupby('label').head(5).head(1000)
    model = load_run(soup)
    for alpha in alphas:
        load_strictly(model, interpolate_states(base, file, alpha), file)
        vectors = embed_all(model, frames | {'seen': seen}, None, ('seen', 'query', 'index'))
        rows.append({'alpha': alpha, 'selection': selection_score(model, frames), 'seen': mean_precision_at_5(
            vectors['seen'], seen['label'], vectors['seen'], seen['label'], exclude_self=True),
            'never seen': score_table('', '', vectors, frames, dims=(None,))['mp5'].iloc[0]})
    return pd.DataFrame(rows)


# ── Projection to 64 dimensions ──────────────────────────────────────────────────────────────────
# in: embeddings of one or several models, float32 (n, d)
# out: a Projection (n, d) -> (n, dim <= 64) that folds into one linear layer

MAX_DIM = 64  # the competition takes vectors of at most 64 dimensions


@dataclass(frozen=True)
class Projection:
    """The map x -> components · (x - mean). After `fit_pca` the first j columns are the PCA to j dimensions."""

    mean: np.ndarray                      # float64 (d,)
    components: np.ndarray                # float64 (dim, d), one direction a row, whitening multiplied in
    explained_variance_ratio: np.ndarray  # float64 (dim,), shares of the whole variance; NaN if random

    def __call__(self, embeddings):
        """float (n, d) -> float32 (n, dim), in float32 as `linear` computes it."""
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
    """Scale the last axis to length 1; rows of zeros stay zero. Arrays become float32, tensors keep their dtype."""
    if isinstance(x, torch.Tensor):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.where(length > 0, length, 1)
    x = np.asarray(x, dtype=np.float32)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def concatenate(embeddings_list):
    """Several models' embeddings (n, d_i) of the same images, each L2-normalised first -> float32 (n, Σ d_i)."""
    counts = [len(embeddings) for embeddings in embeddings_list]
    if len(set(counts)) != 1:
        raise ValueError(f'the models\' embeddings have {counts} rows: embed the same images with each model')
    return np.concatenate([l2_normalise(embeddings) for embeddings in embeddings_list], axis=1)


def fit_pca(embeddings, dim=MAX_DIM, *, whiten=0.0, weights=None):
    """Principal component analysis of float (n, d) embeddings, or of a memory map of them -> Projection.

    whiten: direction j is multiplied by variance_j ** (-whiten / 2): 0 plain, 1 unit variance everywhere.
    weights: (n,) importance of each row, of which only the ratios matter (to even out kinds of object).
    The largest absolute entry of each direction is positive. Extra memory: two d² of float64 and one chunk.
    ValueError: dim out of range, a NaN or infinite row, unfit weights, too few directions with variance.
    """
    from scipy.linalg import eigh

    embeddings = np.asarray(embeddings)
    n, d = embeddings.shape if embeddings.ndim == 2 else (0, 0)
    _check_dim(dim, d, n)
    mean, scatter = _moments(embeddings, _mean_one(weights, n))
    total = np.trace(scatter)
    variance, directions = eigh(scatter, subset_by_index=[d - dim, d - 1])
    variance, directions = variance[::-1].clip(min=0), directions.T[::-1]
    varied = int((variance > 1e-7 * total).sum())
    if varied < (dim if whiten else 1):
        raise ValueError(f'the embeddings vary in {varied} directions only: '
                         + (f'ask for dim <= {varied} or whiten=0' if varied else 'look at how they were made'))
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    scale = np.sign(largest) * (variance[:, None] / (n - 1)) ** (-whiten / 2)
    return Projection(mean, directions * scale, variance / total)


def random_projection(d, dim=MAX_DIM, seed=0):
    """Project onto `dim` random orthonormal directions: what a PCA must beat."""
    _check_dim(dim, d)
    directions, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, dim)))
    return Projection(np.zeros(d), directions.T, np.full(dim, np.nan))


def _check_dim(dim, d, n=None):
    if d == 0:
        raise ValueError('a projection is fitted on a table (n, d) of embeddings with d >= 1: stack them')
    if not 1 <= dim <= MAX_DIM:
        raise ValueError(f'dim is {dim}: the competition takes 1 to {MAX_DIM} dimensions')
    if dim > d:
        raise ValueError(f'dim is {dim} but the embeddings have {d} columns: ask for dim <= {d}')
    if n is not None and dim > n - 1:
        raise ValueError(f'{n} embeddings span at most {n - 1} directions: ask for dim <= {n - 1} or give more')


def _mean_one(weights, n):
    """Row weights scaled to a mean of 1."""
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (n,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f'weights must be {n} finite numbers >= 0, one a row, and not all zero')
    return weights / weights.mean()


def _moments(embeddings, weights, chunk=8192):
    """Weighted mean (d,) and scatter Σ w (x - mean)(x - mean)ᵀ (d, d), both float64.

    A chunk's product is taken in the embeddings' own precision, around a rough mean so that nothing cancels.
    """
    n, d = embeddings.shape
    total, scatter, shift = np.zeros(d), np.zeros((d, d)), None
    for start in range(0, n, chunk):
        rows = np.asarray(embeddings[start:start + chunk])
        rows = rows.astype(np.result_type(rows, np.float32), copy=False)
        shift = rows.mean(0, dtype=np.float64).astype(rows.dtype) if shift is None else shift
        centred, w = rows - shift, weights[start:start + chunk].astype(rows.dtype)
        part = w @ centred
        if not np.isfinite(part).all():
            bad = start + int((~np.isfinite(rows)).any(1).argmax())
            raise ValueError(f'embedding {bad} holds NaN or infinite values: leave it out or embed its image again')
        total += part
        centred *= np.sqrt(w)[:, None]
        scatter += centred.T @ centred
    offset = total / n
    return shift + offset, scatter - n * np.outer(offset, offset)


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


def text_vectors(encode, names, templates=TEMPLATES):
    """Mean over the templates of each name's unit text vector, again of length 1: float32 (n, d)."""
    names = list(names)
    return l2_normalise(sum(l2_normalise(encode([template.format(name) for name in names])) for template in templates))


# ── Neighbours and mP@5 ──────────────────────────────────────────────────────────────────────────
# in: query and index vectors (q, d), (n, d) and their labels
# out: the k nearest index rows of each query, and the competition's score of them

GROUP = 32   # index rows that the first pass of the search judges by the best of them
QUERIES = 8192  # queries searched together


@torch.no_grad()
def nearest_neighbours(query, index, k, *, exclude=None, chunk=32_768, device=None):
    """Exact Euclidean neighbours -> (distances float32 (q, k), indices int64 (q, k)), numpy arrays.

    Ordered by (distance, index), across the k-th place too. Distances are compared in float64, where equal index
    rows are equally far. query (q, d), index (n, d): arrays, memory maps or tensors of real numbers.
    exclude: (q,) index row that each query leaves out (its own photograph); a negative number leaves out none.
    device: of the matrix products, by default where `query` lies. chunk: index rows read at a time.
    Memory beside the inputs, whatever n: a float32 copy of the queries, and for small k about
    chunk · (12 d + 2,048) bytes + 20 MB (on a GPU everything twice, and 0.5 GB).
    ValueError: shapes that do not fit, k out of range, NaN or infinite rows (the first is named).
    """
    query, index = (x if isinstance(x, torch.Tensor) else np.asarray(x) for x in (query, index))
    if query.ndim != 2 or index.ndim != 2 or query.shape[1] != index.shape[1] or 0 in query.shape:
        raise ValueError(f'query {tuple(query.shape)} and index {tuple(index.shape)} must be (q, d) and (n, d) '
                         'with one d, neither empty: embed both with the same model')
    most = len(index) - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f'k is {k}: the index has rows enough for k from 1 to {most}')
    exclude = torch.full((len(query),), -1) if exclude is None else torch.as_tensor(exclude).cpu()
    if exclude.shape != (len(query),):
        raise ValueError(f'exclude has shape {tuple(exclude.shape)}: give one index row for each of {len(query)} queries')
    device = torch.device(device or (query.device if isinstance(query, torch.Tensor) else 'cpu'))
    blocks = [slice(start, start + QUERIES) for start in range(0, len(query), QUERIES)]
    for block in blocks:
        _finite_rows(query, block, 'query')
    found = [_search(_rows(query, block), index, k, exclude[block], -(-chunk // GROUP) * GROUP, device)
             for block in blocks]
    distances, indices = (torch.cat(parts).numpy() for parts in zip(*found))
    return distances.astype(np.float32), indices


def _rows(vectors, which):
    """Rows of an array or tensor as a tensor, copied only where memory cannot be shared."""
    rows = vectors[which]
    return rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.require(rows, requirements='CW'))


def _finite_rows(vectors, block, side):
    rows = _rows(vectors, block)
    bad = ~(rows.abs().amax(1) < 1e18)  # also values whose squares would overflow
    if bad.any():
        raise ValueError(f'{side} vector {block.start + int(bad.nonzero()[0])} holds NaN or infinite values: '
                         'leave it out or embed its image again')
    return rows


def _search(query, index, k, exclude, chunk, device):
    """Neighbours of one block of queries: a shortlist from matrix products, then true distances in float64."""
    groups, settled = _shortlist(query, index, k + int((exclude >= 0).any()), chunk, device)
    query, rows = query.cpu().double(), (groups[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    distances, indices = query.new_empty(len(query), k), rows.new_empty(len(query), k)
    step = max(1, 2**20 // (rows.shape[1] * query.shape[1]))
    for some in torch.where(settled)[0].split(step):
        at = rows[some]
        vectors = _rows(index, at.clamp(max=len(index) - 1).flatten().numpy()).cpu().double()
        apart = _euclidean(query[some, None], vectors.view(*at.shape, -1))[:, 0]
        apart[(at >= len(index)) | (at == exclude[some, None])] = torch.inf
        distances[some], indices[some] = _first(k, apart, at)
    for some in torch.where(~settled)[0].split(64):
        distances[some], indices[some] = _scan(query[some], index, k, exclude[some], chunk)
    return distances, indices


def _shortlist(query, index, wanted, chunk, device):
    """`wanted` + 3 groups of index rows for each query, ascending, and whether they surely hold the nearest rows.

    A row's score q·x - |x|²/2 grows as its distance falls; a group has the score of its best row. Rounding moves a
    score by at most `error`. The `wanted` best groups hold as many rows with true scores of at least the last of
    these groups' score - error; a group that is 2 · error behind it cannot hold a nearer row.
    """
    dtype = torch.float64 if device.type == 'cuda' else torch.float32  # float64 is out of TF32's reach
    center = query.to(device, dtype).mean(0)  # moving all vectors keeps distances and makes rounding errors smaller
    query, width = (query.to(device) - center).to(dtype), wanted + 3
    best, groups = query.new_full((len(query), width), -torch.inf), torch.full((len(query), width), len(index))
    groups, largest = groups.to(device), 0.0
    for start in range(0, len(index), chunk):
        x = (_finite_rows(index, slice(start, start + chunk), 'index').to(device) - center).to(dtype)
        half = x.square().sum(1) / 2
        largest = max(largest, float(half.max()))
        leaders = _group_scores(query, F.pad(x, (0, 0, 0, -len(x) % GROUP)),
                                F.pad(half, (0, -len(x) % GROUP), value=torch.inf))
        best, place = torch.cat([best, leaders], 1).topk(width)
        known = groups.gather(1, place.clamp(max=width - 1))
        groups = torch.where(place < width, known, place - width + start // GROUP)
    error = (query.norm(dim=1) * (2 * largest) ** 0.5 + 2 * largest) * (query.shape[1] + 16) * torch.finfo(dtype).eps
    settled = (best[:, wanted - 1] - best[:, -1] > error) | (best[:, -1] == -torch.inf)
    return groups.sort(1).values.cpu(), settled.cpu()


def _group_scores(query, x, half):
    """max over each group of q·x - half -> (q, n / GROUP), in tiles that a cache holds."""
    tile_q, tile_x = (256, 2048) if x.device.type == 'cpu' else (4096, 16_384)
    buffer, leaders = x.new_empty(tile_q * tile_x), x.new_empty(len(query), len(x) // GROUP)
    for q, into in zip(query.split(tile_q), leaders.split(tile_q)):
        for rows, halves, part in zip(x.split(tile_x), half.split(tile_x), into.split(tile_x // GROUP, 1)):
            scores = buffer[:len(rows) * len(q)].view(len(rows), len(q))
            torch.addmm(-halves[:, None], rows, q.T, out=scores)
            part.copy_(scores.view(-1, GROUP, len(q)).amax(1).T)
    return leaders


def _scan(query, index, k, exclude, chunk):
    """Neighbours by true distances alone: slow, for queries with more near-ties than a shortlist holds."""
    distances, indices = query.new_empty(len(query), 0), exclude.new_empty(len(query), 0)
    for start in range(0, len(index), chunk):
        apart = _euclidean(query, _rows(index, slice(start, start + chunk)).cpu().double())
        at = torch.arange(start, start + apart.shape[1]).expand_as(apart)
        apart[at == exclude[:, None]] = torch.inf
        distances, indices = _first(k, torch.cat([distances, apart], 1), torch.cat([indices, at], 1))
    return distances, indices


def _euclidean(a, b):
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')  # equal rows, equal distances


def _first(k, distances, indices):
    """The k first by (distance, index); indices ascend along the rows, so a stable sort settles ties."""
    order = distances.sort(1, stable=True).indices[:, :k]
    return distances.gather(1, order), indices.gather(1, order)


def precision_at_5(query, query_labels, index, index_labels, exclude_self=False):
    """The competition's score of each query -> float64 (q,), NaN where the index shows no image of its object.

    With n_q index images of the query's object and k_q = min(n_q, 5): the share of the k_q nearest that show it.
    query (q, d), index (n, d); labels: sequences of hashable values, compared with ==.
    exclude_self: query i is index i, which is left out of its neighbours and of n_q.
    ValueError: numbers of rows that do not fit, no query with a relevant index image.
    """
    if len(query_labels) != len(query) or len(index_labels) != len(index):
        raise ValueError(f'{len(query)} queries with {len(query_labels)} labels and {len(index)} index vectors with '
                         f'{len(index_labels)} labels: give one label a vector')
    if exclude_self and len(query) != len(index):
        raise ValueError(f'exclude_self wants query and index to be the same images, not {len(query)} and {len(index)}')
    codes = _codes([*_plain(query_labels), *_plain(index_labels)])
    query_codes, index_codes = codes[:len(query)], codes[len(query):]
    relevant = np.bincount(index_codes, minlength=len(codes))[query_codes]
    if exclude_self:
        relevant = relevant - (query_codes == index_codes)
    if not relevant.any():
        raise ValueError('no query has an image of its object in the index: do both use the same labels?')
    judged = np.minimum(relevant, 5)
    _, neighbours = nearest_neighbours(query, index, judged.max(), exclude=np.arange(len(query)) if exclude_self else None)
    hits = (index_codes[neighbours] == query_codes[:, None]) & (np.arange(judged.max()) < judged[:, None])
    return hits.sum(1) / np.where(judged, judged, np.nan)


def mean_precision_at_5(query, query_labels, index, index_labels, exclude_self=False):
    """mP@5 as the competition defines it: the mean of `precision_at_5` over the queries that have one -> float."""
    precisions = precision_at_5(query, query_labels, index, index_labels, exclude_self)
    left_out = int(np.isnan(precisions).sum())
    if left_out:
        print(f'{left_out} of {len(precisions)} queries have no image of their object in the index: left out')
    return float(np.nanmean(precisions))


def scores_by_domain(precisions, domains):
    """mP@5 of each kind of object -> DataFrame domain, mp5, queries (those judged), left_out."""
    frame = pd.DataFrame({'domain': _plain(domains), 'precision': precisions})
    by_domain = frame.groupby('domain')['precision']
    table = by_domain.agg(mp5='mean', queries='count', left_out=lambda column: column.isna().sum())
    return table.reset_index()


def paired_bootstrap(first, second, groups, n=2000, seed=0):
    """Is `second` better than `first`? -> (difference of means, low, high), a 95 % interval of the difference.

    first, second: `precision_at_5` of two models on the same queries; groups: the queries' labels. Whole groups are
    drawn with replacement, as views of one object succeed or fail together. NaN in either is left out.
    """
    gain = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if len(gain) != len(groups):
        raise ValueError(f'{len(gain)} queries but {len(groups)} groups: give one group a query')
    judged = ~np.isnan(gain)
    codes = _codes(np.array(...))


def embed_all(model, frames, folder, names=('pca', 'query', 'index')):
    """Vectors of several frames by name, kept under `folder`; 'pca' is a sample of the training photographs."""
    sample = frames['train'].sample(min(len(frames['train']), 20_000), random_state=0)
    return {name: embed(model, sample if name == 'pca' else frames[name], cache=Path(folder) / f'{name}.npz', desc=name)
            for name in names}


def score_table(stage, name, vectors, frames, *, dims=(None, 64), projections=None, seconds=math.nan):
    """mP@5 on never-seen objects: DataFrame stage, model, dim, mp5, seconds, a row for each entry of dims.

    vectors: dict of embed_all. dims: None is the full width; a number goes through a PCA fitted on vectors['pca']
    unless projections[dim] is given.
    """
    rows = []
    for dim in dims:
        query, index = vectors['query'], vectors['index']
        if dim is not None:
            projection = (projections or {}).get(dim) or fit_pca(vectors['pca'], dim)
            query, index = l2_normalise(projection(query)), l2_normalise(projection(index))
        score = mean_precision_at_5(query, frames['query']['label'], index, frames['index']['label'])
        rows.append({'stage': stage, 'model': name, 'dim': query.shape[1], 'mp5': score, 'seconds': seconds})
    return pd.DataFrame(rows)


def selection_score(model, frames):
    """mP@5 of a model at its own width on the selection split."""
    vectors = [embed(model, frames[name], desc=name) for name in ('selection_query', 'selection_index')]
    return mean_precision_at_5(vectors[0], frames['selection_query']['label'],
                               vectors[1], frames['selection_index']['label'])


# ── Submission ──────────────────────────────────────────────────────────────────────────────────────────
# in: Embedders and a projection to at most 64-d
# out: submission.zip, which PyTorch 1.11 reads and runs, and its mP@5 and speed as the host sees them

HOST_DIM = 64                         # most columns a vector may have
HOST_HOURS, HOST_IMAGES = 9, 205_000  # the limit, for 5,000 queries and 200,000 index photographs one by one
HOST_ARCHIVE = 9                      # newest file version that PyTorch 1.11 reads
# Operators of vision towers that PyTorch 1.11 has under the same name and with the same arguments.
HOST_OPERATORS = frozenset('''
    abs adaptive_avg_pool2d add add_ addcmul amax arange avg_pool1d avg_pool2d baddbmm batch_norm
    bitwise_not bmm cat ceil chunk clamp clamp_ clamp_min col2im constant_pad_nd contiguous _convolution
    cos cumsum detach div dropout einsum elu eq erf exp expand expand_as flatten flip floor floor_divide
    floordiv group_norm gt hardsigmoid hardswish_ hardswish hardtanh_ hardtanh im2col index Int layer_norm
    leaky_relu leaky_relu_ linalg_vector_norm linear log lt masked_fill matmul max max_pool2d mean
    meshgrid min mish mm mul_ mul narrow ne neg ones ones_like permute pixel_shuffle pow prelu relu relu_
    remainder repeat repeat_interleave reshape reshape_as roll rsqrt rsub ScalarImplicit select sigmoid
    silu_ silu sin size slice softmax softplus split_with_sizes sqrt square squeeze.dim stack sub sum tanh
    to transpose type_as unbind unflatten unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa
    upsample_bilinear2d upsample_nearest2d view where zeros zeros_like'''.split())


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """softmax(q·kᵀ / √d)·v: F.scaled_dot_product_attention without dropout. attn_mask: float, added, or None."""
    scores = (query * (scale or int(query.shape[-1]) ** -.5)) @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def plain_gelu(x, approximate='none'):
    """x·Φ(x) through erf, or its tanh approximation (arXiv 1606.08415, sec. 2)."""
    if approximate == 'tanh':
        return x * .5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + .044715 * x ** 3)))
    return x * .5 * (1 + torch.erf(x * math.sqrt(.5)))


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
    """While active, half-precision weights enter every operator in the dtype (and on the device) of `like`."""

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
    """A tower with fp16 weights, float32 in and out. It computes in fp16 on CUDA and if `emulate`, else in fp32."""

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
    """A copy of the module in eval mode around change(tensor) of each parameter and buffer: often shared ones."""
    memo = {id(tensor): change(tensor) for tensor in itertools.chain(module.parameters(), module.buffers())}
    for parameter in module.parameters():
        if memo[id(parameter)] is not parameter:
            memo[id(parameter)] = nn.Parameter(memo[id(parameter)].detach(), requires_grad=False)
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
    """The Embedder for inputs `factor` times as large, in whole patches; all but position embeddings is shared."""
    stem = next(part for part in embedder.tower.modules() if isinstance(part, nn.Conv2d))
    (kernel, _), (stride, _) = stem.kernel_size, stem.stride
    steps = round((embedder.spec.image_size * factor - kernel) / stride)
    side = kernel + steps * stride
    if factor == 1 or side == embedder.spec.image_size:
        return embedder
    embedder = _twin(embedder, lambda tensor: tensor)
    embedder.spec = replace(embedder.spec, image_size=side)
    tower = embedder.tower
    if hasattr(tower, 'positional_embedding'):  # open_clip's own transformer
        positions = resample_abs_pos_embed(tower.positional_embedding[None], [steps + 1] * 2)[0]
        tower.positional_embedding = nn.Parameter(positions.detach(), requires_grad=False)
    elif hasattr(tower, 'set_input_size'):  # timm's transformers; convolutions take any size
        tower.set_input_size((side, side))
    return embedder


@torch.jit.script_if_tracing
def _letterbox(pixels: torch.Tensor, side: int, border: torch.Tensor) -> torch.Tensor:
    # Scripted, since a trace would keep its example's sizes, and in operators of which 1.11 has scripted forms.
    height, width = pixels.size(2), pixels.size(3)
    longer = max(height, width)
    h = max(1, (height * side + longer // 2) // longer)
    w = max(1, (width * side + longer // 2) // longer)
    top, left = (side - h) // 2, (side - w) // 2
    resized = torch.ops.aten._upsample_bicubic2d_aa(pixels, [h, w], False, None, None).clamp(0, 255)
    return torch.constant_pad_nd(resized - border, [left, side - w - left, top, side - h - top], 0) + border


class Submission(nn.Module):
    """What the host runs: a photograph of any size -> one unit vector of at most 64 numbers.

    members: Embedders, each fed at its own spec.image_size; their unit vectors are concatenated. projection:
    nn.Linear to at most 64 columns, or None. Test-time options: pad puts a border of the tower's mean colour
    around the photograph instead of squashing it to a square; flip averages over it and its mirror image, sizes
    over several multiples of the input size, e.g. (1, 1.25), with position embeddings resized.
    """

    def __init__(self, members, projection=None, *, flip=False, pad=False, sizes=(1,)):
        super().__init__()
        self.members = nn.ModuleList(nn.ModuleList(_at_size(m, factor) for factor in sizes) for m in members)
        self.projection, self.flip, self.pad = projection, flip, pad

    def forward(self, photograph):
        """uint8 (1, 3, H, W) -> float32 (1, dim) of length 1; a batch of photographs of one size works too."""
        vector = torch.cat([self._look(photograph, scales) for scales in self.members], 1)
        return F.normalize(vector if self.projection is None else self.projection(vector))

    def _look(self, photograph, scales):
        vectors = []
        for embedder in scales:
            pixels = self._square(photograph.type_as(embedder.mean), embedder)  # float32, where the weights are
            vectors += [embedder(pixels), embedder(pixels.flip(3))] if self.flip else [embedder(pixels)]
        return F.normalize(sum(vectors))

    def _square(self, pixels, embedder):
        # Bicubic curves leave 0..255 and are clipped, as in Pillow. They are not rounded: the last digit, which
        # differs between versions of torch, would now and then decide on a step of a whole grey level.
        side = embedder.spec.image_size
        if self.pad:
            return _letterbox(pixels, side, embedder.mean)
        return F.interpolate(pixels, (side, side), mode='bicubic', antialias=True).clamp(0, 255)


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
            raise ValueError(f'PyTorch 1.11 has no operator {name or space}, which {layer} uses: build that layer '
                             'from plain operators, or choose another tower.')
        for inner in node.blocks():
            _check_operators(inner)


def _compare(model, file, tolerance):
    """Largest difference of the file from the model over photographs of odd sizes; above tolerance a ValueError."""
    loaded, generator, worst = torch.jit.load(file).eval(), torch.Generator().manual_seed(0), 0
    for size in ((1, 1), (1, 300), (200, 3), (333, 517)):
        photograph = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator)
        worst = max(worst, (loaded(photograph) - model(photograph)).abs().max().item())
    if not worst <= tolerance:
        raise ValueError(f'The exported file differs from the model by {worst:.1g}, more than {tolerance:g}: its '
                         'forward decides by values or sizes, which a trace freezes.')
    return worst


def _save_traced(model, variant, file, tolerance):
    """Write the checked trace of `variant`, a form of `model`; returns (dimensions, difference from `model`)."""
    example = torch.randint(256, (1, 3, 37, 53), dtype=torch.uint8)
    vector = model(example)
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
        raise ValueError(f'The file has version {version} and PyTorch 1.11 reads up to {HOST_ARCHIVE}: an operator '
                         'of the model has changed since.')
    return vector.shape[1], _compare(model, file, tolerance)


def export_submission(model, path, *, half=False):
    """Write submission.zip for the host: `model` as saved_model.pt, TorchScript that PyTorch 1.11 runs.

    model: Submission, Embedder, or any module uint8 (1, 3, H, W) -> float32 (1, dim <= 64) of length 1. It is
    traced under PlainOperators; operators and file version are checked against 1.11's, and the reloaded file
    against the model (1e-5; half: 1e-2). half: see half_precision; a file half as large, with fp16 arithmetic on
    a host that moves the loaded module to CUDA. On the CPU the weights become fp32 again for every photograph:
    right, but slower. ValueError: a model the host cannot use. OSError: nowhere to write. What stood at `path`
    stays until the new file is whole.
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
        raise OSError(f'{path} cannot be written ({error.strerror or error}): choose a writable folder with room '
                      'for the weights twice.') from error
    print(f'{path}: {path.stat().st_size / 2**20:.1f} MB, {dim} dimensions, within {worst:.1g} of the model.')


def _load_submission(zip_path):
    try:
        with zipfile.ZipFile(zip_path) as archive, tempfile.TemporaryDirectory() as folder:
            return torch.jit.load(archive.extract('saved_model.pt', folder)).eval()
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ValueError(f'{zip_path} is not a submission: it must be a zip with a TorchScript saved_model.pt at '
                         'its root, as export_submission writes it.') from error


def _read_as_host(path):
    try:
        return PILToTensor()(Image.open(path).convert('RGB'))
    except OSError as error:
        raise OSError(f'{path} is not a readable photograph ({error}): leave it out of the frame.') from error


def _batches_of_one_size(paths, most=32):
    """Lists of at most `most` positions in `paths` whose photographs have the same width and height."""
    sizes = {}
    for position, path in enumerate(paths):
        with Image.open(path) as photograph:
            sizes.setdefault(photograph.size, []).append(position)
    return [group[i:i + most] for group in sizes.values() for i in range(0, len(group), most)]


def evaluate_submission(zip_path, query_frame, index_frame, *, quick=False, limit=None):
    """Replay the host: every photograph through the file one by one, neighbours by Euclidean distance, mP@5.

    Frames: columns path (absolute) and label. quick: photographs of one size in batches, with the same result
    (the file must take batches, as export_submission's do). limit: only so many first rows of each frame. Prints
    photographs a second, reading included, and the hours that the host's 205,000 would take here, of its 9.
    Returns a dict: mp5, images_per_second, hours, dim, and the vectors `query` and `index`, float32 (n, dim).
    """
    model, frames = _load_submission(zip_path), [query_frame.iloc[:limit], index_frame.iloc[:limit]]
    paths = [path for frame in frames for path in frame['path']]
    vectors, start = [None] * len(paths), time.perf_counter()
    batches = _batches_of_one_size(paths) if quick else [[position] for position in range(len(paths))]
    with torch.no_grad(), progress_bar(total=len(paths), desc='photographs', unit='') as progress:
        for batch in batches:
            outputs = model(torch.stack([_read_as_host(paths[position]) for position in batch]))
            for position, output in zip(batch, outputs, strict=False):  # the host takes the first of many
                vectors[position] = output.flatten().numpy()
            progress.update(len(batch))
    rate, vectors = len(paths) / (time.perf_counter() - start), np.stack(vectors)
    hours, dim = HOST_IMAGES / rate / 3600, vectors.shape[1]
    if dim > HOST_DIM:
        raise ValueError(f'{zip_path} gives {dim} dimensions and the host takes at most {HOST_DIM}.')
    print(f'{rate:.1f} photographs/s {"in batches" if quick else "one by one"} on this machine: {hours:.1f} h for '
          f'the host\'s {HOST_IMAGES:,}, of the {HOST_HOURS} h allowed.')
    query, index = np.split(vectors, [len(frames[0])])
    mp5 = mean_precision_at_5(query, frames[0]['label'].to_numpy(), index, frames[1]['label'].to_numpy())
    return {'mp5': mp5, 'images_per_second': rate, 'hours': hours, 'dim': dim, 'query': query, 'index': index}


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: photographs, tables, neighbours · out: matplotlib figures

def show_augmentation(frame, size, name, *, count=8, seed=5):
    """`count` photographs above and four augmented versions of each below."""
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
    """Loss and learning rate against the step, runs overlaid."""
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
        axis.set(xticks=range(len(short)), yticks=range(len(short)), xticklabels=short, yticklabels=short, title=tower)
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            axis.text(column, row, f'{value:.2f}', ha='center', va='center', color='white' if value < .6 else 'black')
    for tower, line in lines.items():
        axes[0, -1].plot(line['alpha'], line['score'], '.-', label=tower)
    axes[0, -1].set(xlabel='from the first ingredient to the second', ylabel='mP@5 on selection objects')
    axes[0, -1].legend(frameon=False)
    figure.tight_layout()


def plot_wise(curves):
    """mP@5 of seen against never-seen objects as alpha goes from the pretrained tower to the soup; star: the alpha that the
    selection objects choose."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.2), squeeze=False)
    for axis, (tower, curve) in zip(axes[0], curves.items()):
        axis.plot(curve['seen'], curve['never seen'], 'o-')
        best = curve.loc[curve['selection'].idxmax()]
        axis.plot(best['seen'], best['never seen'], '*', markersize=15, color='tab:orange', label=f'chosen {best["alpha"]:g}')
        for row in curve.itertuples():
            axis.annotate(f'{row.alpha:g}', (row.seen, row[4]), textcoords='offset points', xytext=(6, -10), fontsize=8)
        axis.set(xlabel='mP@5 on trained classes', ylabel='mP@5 on never-seen objects', title=tower)
        axis.legend(frameon=False)
    figure.tight_layout()
