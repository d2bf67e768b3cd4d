"""Data sets: a known set's name, a folder of class folders or a CSV becomes a table of path, label, domain."""
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from glob import escape as glob_escape
from glob import glob

import numpy as np
import pandas as pd

from guie.errors import InputError, MissingError
from guie.files import ATTACHED, attached_folders, did_you_mean, printable, user_path
from guie.images import image_suffixes
from guie.inputs import download as fetch
from guie.inputs import way_to
from guie.listing import contents_of, holds, only_images, say_passed, walk_images

any_names = pd.option_context('mode.string_storage', 'python')  # pyarrow refuses names that are not UTF-8


@dataclass(frozen=True)
class ClassFolders:
    """A data set whose paths name the class."""
    domain: str
    telltale: str  # glob that matches in the root of this set alone
    pattern: str   # regex over the whole path below the root, with a group `label` (and perhaps `domain`)
    example: str   # path of one image, for messages
    unique_names: bool = False  # equal file names are one image: parts of the set are copies of others
    kaggle: str = ''  # Kaggle's dataset 'owner/name' or competition 'name' that holds it


@dataclass(frozen=True)
class Listing:
    """A data set whose label file lists its images."""
    domain: str
    telltale: str           # the label file, CSV-like or JSON
    images: tuple           # columns that name images
    label: str              # column of the class
    folders: tuple = ('',)  # where the listed paths may start, relative to the label file
    path: str = ''          # what a listed name becomes; \g<0> is the name, \1 \2 \3 its first characters
    sep: str = ','
    skiprows: int = 0
    packed: bool = False    # one row lists all images of a class, separated by spaces
    kaggle: str = ''        # as in ClassFolders


CLASS_FOLDER, HEX_FOLDERS = r'(?P<label>[^/]+)/.+', r'\1/\2/\3/\g<0>.jpg'
LANDMARKS = Listing('landmark', 'train.csv', ('id',), 'landmark_id', ('train', ''), HEX_FOLDERS)
DEEPFASHION = {'folders': ('../Img', '..', 'Img', ''), 'sep': r'\s+', 'skiprows': 1}

DATASETS = {  # domains are named as the GUIE 130k set names its eleven folders
    'products-10k': Listing('packaged', 'train.csv', ('name',), 'class', ('train', 'train/train'), kaggle='products-10k'),
    'google-landmarks-v2': LANDMARKS,
    'google-landmarks-v2-clean': Listing(
        'landmark', 'train_clean.csv', ('images',), 'landmark_id', ('train', ''), HEX_FOLDERS, packed=True),
    'landmark-recognition-2020': replace(LANDMARKS, kaggle='landmark-recognition-2020'),  # it has no column url
    'stanford-online-products': Listing('furniture', 'Ebay_info.txt', ('path',), 'class_id', sep=' '),
    'shopee': Listing('packaged', 'train.csv', ('image',), 'label_group', ('train_images',),
                      kaggle='shopee-product-matching'),
    'met': Listing('artwork', 'MET_database.json', ('path',), 'id', ('', 'images', '../images', '..')),
    'deepfashion-in-shop': Listing('apparel', 'list_eval_partition.txt', ('image_name',), 'item_id', **DEEPFASHION),
    'deepfashion-consumer-to-shop': Listing(
        'apparel', 'list_eval_partition.txt', ('image_pair_name_1', 'image_pair_name_2'), 'item_id', **DEEPFASHION),
    'food-101': ClassFolders('dishes', 'meta/classes.txt', f'images/{CLASS_FOLDER}', 'images/apple_pie/1.jpg',
                             kaggle='dansbecker/food-101'),
    'rp2k': ClassFolders('packaged', 'all/train', f'all/(?:train|test)/{CLASS_FOLDER}', 'all/train/<class>/1.jpg'),
    'gpr1200': ClassFolders(
        'general', 'images/[0-9]*_*.jpg', r'images/(?P<label>\d+)_[^/]+', 'images/7_<name>.jpg'),
    'inaturalist': ClassFolders(
        'nature', 'train_val*', f'train_val[^/]*/[^/]+/{CLASS_FOLDER}', 'train_val2018/Aves/3174/<id>.jpg'),
    'inaturalist-2021': ClassFolders(
        'nature', 'train*/[0-9]*_*_*_*', f'(?:train|train_mini|val)/{CLASS_FOLDER}', 'train/00000_<name>/<id>.jpg',
        unique_names=True),  # train_mini is a part of train
    'stanford-cars': ClassFolders(
        'cars', 'train/Acura*', f'(?:train|test)/{CLASS_FOLDER}', 'train/Acura RL Sedan 2012/00249.jpg',
        kaggle='jutrera/stanford-car-dataset-by-classes-folder'),
    'objectnet': ClassFolders(
        'household', 'mappings/folder_to_objectnet_label.json', f'images/{CLASS_FOLDER}', 'images/bench/<id>.png'),
    'h-and-m': ClassFolders(  # seven digits of product, three of colour
        'apparel', 'articles.csv', r'images/\d+/(?P<label>\d{7})\d{3}\.jpg', 'images/010/0108775015.jpg',
        kaggle='h-and-m-personalized-fashion-recommendations'),
    'guie-130k': ClassFolders('', 'storefronts', '(?P<label>(?P<domain>[^/]+))/.+', 'toys/<image>.jpg',
                              kaggle='rhtsingh/130k-images-512x512-universal-image-embeddings'),
    'grocery-store': ClassFolders(
        'packaged', 'train/Fruit', '(?:train|val|test)/(?:[^/]+/)+(?P<label>[^/]+)/[^/]+',
        'train/Fruit/Avocado/Avocado_001.jpg'),
}


def known_name(name):
    """The name of a known data set or benchmark as tables have it: 'Products 10K' is 'products-10k'."""
    return str(name).lower().replace(' ', '-').replace('_', '-')


@any_names
def read_dataset(name_or_path, root=None, *, search=ATTACHED, download=False):
    """Every labelled image of a data set: DataFrame of str columns `path` (absolute), `label`, `domain`.
    name_or_path: a folder of class folders (sorted by path), a CSV `path,label[,domain]` (in its own order, paths relative
    to `root` or to its folder), or a key of DATASETS. A known set is looked for below `root`, or else below `search`;
    without a root, `download` fetches it if it is missing (see inputs.download). Its labels begin with its name
    ('products-10k/17'), so that splits can be concatenated. Without a column `domain`, the domain is the data folder's name.
    Files that walk_images does not list are skipped, and counted in a printed line. FileNotFoundError: another layout.
    ValueError: a label file that cannot be used."""
    name_or_path, root = user_path(name_or_path), root and user_path(root)
    name, path = known_name(name_or_path), os.path.abspath(name_or_path)
    if name in DATASETS:
        layout = DATASETS[name]
        places = [os.path.abspath(place) for place in ([root] if root else search)]
        frame = read_known(name, layout, places, download and not root)
        frame = frame.assign(label=name + '/' + frame['label'])
    elif os.path.isdir(path):
        frame = read_folders(path, ClassFolders(os.path.basename(path), '', CLASS_FOLDER, '<class>/<image>.jpg'))
    elif os.path.isfile(path):
        root = os.path.abspath(root or os.path.dirname(path))
        frame = read_listing(root, Listing(os.path.basename(root), path, ('path',), 'label'))
    else:
        raise MissingError(f'{name_or_path} is no folder, no CSV file and none of the known data sets: check the path, or '
                           f'choose {", ".join(DATASETS)}.{did_you_mean(name, DATASETS)}')
    if frame['path'].duplicated().any():
        if name in DATASETS:  # Shopee has images in two label groups, and users cannot correct a known set
            pairs = frame[['path', 'label']].drop_duplicates()
            unclear = frame['path'].isin(pairs['path'][pairs['path'].duplicated()])
            frame = dropped(frame, unclear, name_or_path, 'rows have another label in another row and were dropped')
        check_one_each(frame, 'path', 'label', name_or_path)
        frame = dropped(frame, frame['path'].duplicated(), name_or_path, 'rows repeat an image and were dropped')
    check_one_each(frame, 'label', 'domain', name_or_path)
    return frame.reset_index(drop=True)


def dropped(frame, mask, source, what):
    """The rows outside the mask; prints how many are inside."""
    if mask.any():
        print(printable(f'{source}: {mask.sum():,} {what}'))
    return frame[~mask]


def read_known(name, layout, places, download=False):
    """A known set's table, from the first of the places or folders below them that holds it; download: else fetched."""
    faults, listed = [], isinstance(layout, Listing)
    for folder in attached_folders(places):
        marks = glob(os.path.join(glob_escape(folder), layout.telltale))
        try:
            if marks and not listed:
                return read_folders(folder, layout)
            if marks and {*layout.images, layout.label} <= {*read_table(marks[0], layout, nrows=0)}:
                return read_listing(folder, layout)
        except (OSError, InputError) as error:  # another set's file of the same name, or a damaged copy
            faults.append(error)
    if download and layout.kaggle and (fetched := fetch(layout.kaggle)):
        return read_known(name, layout, [fetched])
    expected = f'the columns {", ".join((*layout.images, layout.label))}' if listed else f'images like {layout.example}'
    found = ' and '.join(map(contents_of, places)) + ''.join(f'; {str(fault).rstrip(".")}' for fault in faults[:1])
    raise MissingError(f'{name}: expected {layout.telltale} with {expected}, found {found}; '
                       f'{way_to(layout.kaggle)}.') from (faults or [None])[0]


def read_folders(root, layout):
    """DataFrame path, label, domain of a set whose paths name the class, sorted by path."""
    below, passed = walk_images(root)
    below = pd.Series(below, dtype=str)
    found = below.str.extract(f'(?s)^/{layout.pattern}$').assign(path=root + below)
    frame = found.assign(domain=found.get('domain', layout.domain)).dropna()[['path', 'label', 'domain']]
    if frame.empty:
        raise MissingError(f'Expected images like {layout.example}, found {contents_of(root, passed)}: check the folder, or '
                           f'put the images there.')
    say_passed(root, passed + Counter({f'images unlike {layout.example}': len(found) - len(frame)}))
    if layout.unique_names:
        copies = frame['path'].map(os.path.basename).duplicated()
        frame = dropped(frame, copies, root, 'rows repeat an image in another folder and were dropped')
    return frame


def read_listing(root, layout, where=None):
    """DataFrame path, label, domain of a set with a label file, in its order.
    where: (column, value) of the rows that count; None: all."""
    file = os.path.join(root, layout.telltale)
    table = read_table(file, layout)
    if missing := sorted({*layout.images, layout.label, *(where or ())[:1]} - {*table}):
        raise InputError(f'{file} lacks the column {" and ".join(missing)}; it has {", ".join(table)}.')
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(f'{file} has rows with more fields than columns; quote texts that hold commas.')
    if where:
        table = table[table[where[0]] == where[1]].reset_index(drop=True)
    table['domain'] = table.get('domain', layout.domain)
    frame = pd.concat([table[[image, layout.label, 'domain']].set_axis(['path', 'label', 'domain'], axis=1)
                       for image in layout.images], ignore_index=True)
    empty = frame.isna().any(axis=1)
    if empty.any():
        raise InputError(f'{file}: {empty.sum():,} of {len(frame):,} rows lack a path, label or domain, the '
                         f'first is row {empty.argmax() + 1} below the header; fill or delete them.')
    if frame.empty:
        kind = f'with {where[1]!r} in the column {where[0]}' if where else 'below the header'
        raise InputError(f'{file} lists no image: there is no row {kind}.')
    if layout.packed:
        frame = frame.assign(path=frame['path'].str.split()).explode('path', ignore_index=True)
    if layout.path:
        frame['path'] = frame['path'].str.replace(r'^(.?)(.?)(.?).*$', layout.path, regex=True)
    if holds(frame['path'], '\\'):
        frame['path'] = frame['path'].str.replace('\\', '/', regex=False)
    return only_images(frame.assign(path=locate(root, frame['path'], layout.folders, file)), file)


def read_table(file, layout, nrows=None):
    """A label file with str columns, no spaces around names and cells. Empty cells are missing; 'NA' and '007' are texts."""
    try:
        if file.endswith('.json'):
            table = pd.read_json(file, dtype=False)
            table = table.astype(str).where(table.notna())
        else:
            table = read_csv(file, layout, nrows)
    except (ValueError, TypeError, AttributeError) as error:  # pandas' parser errors are ValueErrors
        reason = ' '.join(str(error).rstrip('.').split())
        raise InputError(f'{file} cannot be read as a table: {reason}. Give a whole one, or a folder of images.') from error
    table.columns = [str(name).strip() for name in table]
    for name in {*layout.images, layout.label, 'domain'} & {*table}:
        if [*table].count(name) > 1:
            raise InputError(f'{file} has two columns {name}; delete or rename one.')
        cells = table[name].dropna().tolist()
        if cells != [*map(str.strip, cells)]:  # ten times as fast as stripping all
            table[name] = table[name].str.strip().mask(lambda cells: cells == '')
    return table


def read_csv(file, layout, nrows):
    """read_table of a file other than JSON, in its own encoding. Where commas are expected, but the first line has none, its
    semicolons or tabs separate the columns."""
    with open(file, 'rb') as stream:
        first = stream.readline(4096)
    utf16 = first[:2] in (b'\xff\xfe', b'\xfe\xff')
    sep = layout.sep
    if sep == ',' and b',' not in first:
        sep = next((mark for mark in ';\t' if mark.encode() in first), sep)
    read = partial(pd.read_csv, file, sep=sep, skiprows=layout.skiprows, nrows=nrows, dtype=str,
                   keep_default_na=False, na_values=[''], skipinitialspace=True)
    try:
        return read(encoding='utf-16' if utf16 else 'utf-8-sig')
    except UnicodeDecodeError:
        return read(encoding='latin-1')  # what spreadsheets in Western Europe write


def locate(root, paths, folders, file):
    """Absolute paths, in the first of `folders` with some of a sample of them. ValueError if one leaves that folder."""
    odd = holds(paths, './', '..', '//', '\n/')
    sample = paths.iloc[np.linspace(0, len(paths) - 1, min(len(paths), 64)).astype(int)]
    for start in folders:
        base = os.path.normpath(os.path.join(root, start)).rstrip('/')
        lost = absent(base, sample)
        if lost and len(again := absent(base, sample.map(latin_bytes))) < len(lost):
            paths, lost = paths.map(latin_bytes), again
        if len(lost) < len(sample):
            break
    full = base + '/' + paths
    if odd:
        full = paths.map(lambda path: os.path.normpath(os.path.join(base + '/', path)))
        if len(outside := full[~full.str.startswith(base + '/')]):
            raise InputError(f'{file}: {outside.iloc[0]} leaves the data root {base}; give the folder '
                             'that holds all images as the root of DATA.')
    if len(lost) == len(sample):
        raise MissingError(f'{file}: expected {full.iloc[0]}, found {contents_of(root)}; give the folder '
                           'that the paths start from as the root of DATA.')
    if lost:
        print(printable(f'{file}: {len(lost)} of {len(sample)} images looked at do not exist, the first is {lost[0]}'))
    return full


def absent(base, paths):
    """The paths below a folder that are not files."""
    return [path for path in paths if not os.path.isfile(os.path.join(base + '/', path))]


def latin_bytes(path):
    """A path that was read as latin-1, with its original bytes: so the disk has names of other code pages."""
    return os.fsdecode(path.encode('latin-1', 'replace'))


def check_one_each(frame, column, other, source):
    """ValueError that names the first value of `column` with two values of `other`."""
    pairs = frame[[column, other]].drop_duplicates()
    twice = pairs[pairs.duplicated(column, keep=False)].sort_values([column, other])
    if len(twice):
        raise InputError(f'{source}: the {column} {twice[column].iloc[0]} has two {other}s, '
                         f'{twice[other].iloc[0]} and {twice[other].iloc[1]}; it can have one.')


@any_names
def list_images(folder):
    """Every image below a folder, however it is arranged: DataFrame path, label (its folder's name), domain."""
    root = os.path.abspath(user_path(folder))
    if not os.path.isdir(root):
        raise MissingError(f'There is no folder {folder}: check the path.')
    below, passed = walk_images(root)
    if not below:
        raise MissingError(f'{folder} holds no images ({", ".join(sorted(image_suffixes()))}), '
                           f'found {contents_of(root, passed)}: check the folder, or put the images there.')
    say_passed(root, passed)
    paths = [root + name for name in below]
    return pd.DataFrame({'path': paths, 'label': [os.path.basename(os.path.dirname(path)) for path in paths], 'domain': ''})
