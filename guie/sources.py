"""Sources: what your own folder, CSV or list means as data, before and while it is read."""
import os
import re

import pandas as pd

from guie.datasets import DATASETS, check_one_each, known_name, read_dataset
from guie.errors import InputError
from guie.files import did_you_mean, literal, user_path
from guie.images import image_suffixes
from guie.listing import hidden, is_image

PLACE4 = ['products-10k', 'landmark-recognition-2020']  # what the 4th place trained on
OF_DATA = ('train', 'query', 'index', 'selection', 'root', 'name')
PARTS = 'train training trainval val valid validation dev test testing eval'.split()  # usual names for parts of one set


def as_list(sources):
    """One or several sources, or their text, as a list."""
    sources = literal(sources, list, tuple)
    if not isinstance(sources, (str, os.PathLike, list, tuple)):
        raise InputError(f'DATA is {sources!r}; give a folder of class folders, a CSV path,label, the name of a known set, '
                         f'or a list of these.')
    return [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)


def data_sources(data=None):
    """load_data's arguments {name: source} from a notebook's DATA: a folder of class folders, a CSV, the name of a known set
    or a list of these to train on; or a dict of train, query, index, selection, root and name (of the data, in names of
    runs). None: the data of the 4th place, without a name."""
    data = literal(data, dict, list, tuple)
    given = data if isinstance(data, dict) else {'train': data}
    if unknown := [part for part in given if part not in OF_DATA]:
        raise InputError(f'DATA has no part {unknown[0]!r}; give {", ".join(OF_DATA)}.{did_you_mean(unknown[0], OF_DATA)}')
    train = given.get('train')
    if not train or isinstance(train, str) and not train.strip():
        return {'name': '', **given, 'train': PLACE4}
    return {'name': data_name(train), **given}


def set_name(source):
    """A data set's name: its file or folder without 'train', 'val' and the like, or else the folder around it."""
    path = os.path.abspath(user_path(source))
    while os.path.basename(path):
        name = re.sub(r'(?i)\.(csv|tsv|txt|json)$', '', os.path.basename(path))
        if name := re.sub(rf'(?i)(^|[-_ ])({"|".join(PARTS)})(?=$|[-_ ])', '', name).strip('-_ '):
            return name
        path = os.path.dirname(path)
    return 'data'


def data_name(train):
    """The name of a run's data: the names of its sets, joined by +."""
    return '+'.join(dict.fromkeys(re.sub(r'[^\w.-]+', '-', set_name(source)) for source in as_list(train)))[:80]


def named(names, most=4):
    """The first of some names, for a sentence."""
    names = [*map(str, names)]
    return ', '.join(names[:most]) + (f' and {len(names) - most:,} more' if names[most:] else '')


def images_in(folder):
    """How many images lie directly in a folder."""
    suffixes = image_suffixes()
    return sum(is_image(file, suffixes) for file in next(os.walk(folder), ((), (), ()))[2])


def image_folders(folder):
    """Names of the visible folders in a folder that hold an image at any depth, sorted."""
    names = sorted(next(os.walk(folder), ((), ()))[1])
    suffixes = image_suffixes()
    return [name for name in names if not hidden(name) and holds_images(os.path.join(folder, name), suffixes, set())]


def holds_images(folder, suffixes, seen):
    """Whether a folder holds an image at any depth; seen: folders already searched."""
    place = os.path.realpath(folder)
    if place in seen:
        return False
    seen.add(place)
    _, folders, files = next(os.walk(folder), ((), (), ()))
    return any(is_image(file, suffixes) for file in files) or any(
        holds_images(os.path.join(folder, name), suffixes, seen) for name in folders if not hidden(name))


def parts_of(source):
    """[source]; for a folder of train/ and val/, those of them that hold class folders.
    ValueError, with the likely right folder, for one that can hardly be meant: images without class folders, train/ and val/
    among other folders, or one level too high."""
    folder = os.path.abspath(user_path(source))
    if not os.path.isdir(folder) or known_name(source) in DATASETS:
        return [source]
    inside = image_folders(folder)
    parts = [name for name in inside if name.lower() in PARTS]
    whole = [name for name in parts if image_folders(os.path.join(folder, name))]
    flat, others = ([name for name in names if name not in rest] for names, rest in ((parts, whole), (inside, parts)))
    if whole and others:
        raise InputError(f'{source} holds {named(whole)} with class folders in them beside {named(others)}: give as DATA a '
                         f'list of the folders that are meant, as {[os.path.join(folder, name) for name in whole]}.')
    if not others and (flat or images_in(folder)):
        count = sum(images_in(os.path.join(folder, name)) for name in flat or ['.'])
        if not whole:
            raise InputError(f'{source} holds {count:,} images{f" in {named(flat)}" * bool(flat)} and no class folders: '
                             f'{where_classes_are(folder)}.')
        print(f'{source}: {count:,} images in {named(flat) or "it"} are in no class folder and left out.')
    if not whole:
        check_level(source, folder, inside)
    return [os.path.join(folder, name) for name in whole] or [source]


def where_classes_are(folder):
    """Advice on a folder without class folders: the folder above if its folders look like classes, or how to make some."""
    above = os.path.dirname(folder)
    classes = [name for name in image_folders(above) if images_in(os.path.join(above, name))]
    likely = f'give {above} if its {len(classes):,} folders ({named(classes)}) are the classes, else ' * (len(classes) > 1)
    return f'{likely}put the images of each class into a folder of its own, or give a CSV with path,label'


def check_level(source, folder, inside):
    """ValueError for a folder of class folders whose classes are likely one level below, or deeper."""
    deeper, level = folder, inside
    while len(level) == 1 and not images_in(deeper):
        deeper = os.path.join(deeper, level[0])
        level = image_folders(deeper)
    if len(inside) == 1 and level and not images_in(deeper):
        raise InputError(f'{source} holds one class folder, {inside[0]}, and in that are no images but folders of '
                         f'them: give {deeper} instead, which holds {len(level):,} folders ({named(level)}).')
    direct = sum(images_in(os.path.join(folder, name)) > 0 for name in inside)
    if 2 * direct >= len(inside):  # a stray image makes no class folder
        return
    below = [name for top in inside for name in image_folders(os.path.join(folder, top))]
    if len(set(below)) > len(inside):
        raise InputError(f'{source} holds {len(inside):,} folders ({named(inside)}) that have hardly an image but '
                         f'{len(below):,} folders of them ({named(below)}): if these are the classes, give as DATA a list '
                         f'of the {len(inside):,} folders; if they are not, a CSV with path,label.')
    if below:
        print(f'{source}: the classes are {named(inside)}; the {len(below):,} folders in them are not told apart.')


def read_sources(sources, root=None, download=False):
    """One or several sources as one table, by read_dataset. Parts of one set, such as pets/train and pets/val, share a
    domain. Images of a class that several parts have are joined; sets that share a class by chance are an error. root,
    download: as in read_dataset."""
    sources = [part for source in as_list(sources) for part in parts_of(source)]
    frames = [read_dataset(source, root, download=download) for source in sources]
    sets = [(os.path.dirname(os.path.abspath(source)), set_name(source)) for source in sources]
    for frame, source, one in zip(frames, sources, sets):
        if sets.count(one) > 1 and set(frame['domain']) == {os.path.basename(os.path.abspath(source))}:
            frame['domain'] = one[1]
    frame = pd.concat(frames, ignore_index=True)
    if len(frames) > 1:
        check_shared(pd.concat([part.drop_duplicates('label').assign(source=str(source))
                                for part, source in zip(frames, sources)]), len(frame['label'].unique()))
        check_one_each(frame, 'path', 'label', named(sources))
        if again := frame['path'].duplicated().sum():
            print(f'{again:,} images are given more than once and count once.')
    return frame.drop_duplicates('path', ignore_index=True)


def check_shared(classes, count):
    """Prints how many classes are in several sources; ValueError for one in two domains. classes: DataFrame label, domain,
    source; count: number of all classes."""
    shared = classes[classes.duplicated('label', keep=False)].sort_values('label', kind='stable')
    twice = shared[shared.groupby('label')['domain'].transform('nunique') > 1]
    if len(twice):
        label = twice['label'].iloc[0]
        raise InputError(f'{" and ".join(twice["source"][twice["label"] == label])} have a class {label} each: if they are '
                         f'one, give a CSV with path,label of both, else rename one of them.')
    if len(shared):
        print(f'{shared["label"].nunique():,} of {count:,} classes are in several of '
              f'{named(dict.fromkeys(shared["source"]))}; their images are joined.')
