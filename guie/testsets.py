"""Test sets: public benchmarks as their authors split them, read from the files in which people have them."""
import json
import os
import pickle
from dataclasses import dataclass, replace
from functools import partial
from glob import escape, glob
from pathlib import Path

import numpy as np
import pandas as pd

from guie.datasets import DATASETS, HEX_FOLDERS, Listing, any_names, locate, read_folders, read_listing
from guie.errors import InputError, MissingError
from guie.files import attached_folders, reason_of, user_path
from guie.inputs import way_to
from guie.listing import contents_of

NONE = np.empty(0, dtype=int)


@dataclass
class Benchmark:
    """The images of a test set and what is right; tables have the columns path, label, domain."""
    index: pd.DataFrame
    truth: dict                 # {setting: (relevant, ignored) of each query, arrays of rows of the index}
    query: pd.DataFrame = None  # None: each index image is searched among the others
    boxes: list = None          # (left, top, right, bottom): what of each query's image counts

    @property
    def queries(self):
        """The table of what is searched; its labels say which queries belong together."""
        return self.index if self.query is None else self.query


@dataclass(frozen=True)
class PublicSet:
    """Where a benchmark is found."""
    layouts: tuple     # (a file or folder that is in its root alone, function of the root -> Benchmark)
    sizes: tuple = ()  # (queries, index images) of the whole set
    kaggle: str = ''   # as in datasets.ClassFolders


@any_names
def read_test_set(name, root):
    """The Benchmark of a key of TEST_SETS, from the first folder at or below root that has one of its layouts.
    Prints whether it is incomplete. MissingError: it is not there; InputError: a file that cannot be used."""
    known, root, faults = TEST_SETS[name], os.path.abspath(user_path(root)), []
    for folder in attached_folders([root]):
        for telltale, read in known.layouts:
            if not glob(os.path.join(escape(folder), telltale)):
                continue
            try:
                benchmark = read(folder)
            except (InputError, MissingError) as error:  # perhaps another set's file of the same name
                faults.append(error)
                continue
            sizes = len(benchmark.queries), len(benchmark.index)
            if known.sizes and sizes != known.sizes:
                print('{}: {:,} queries and {:,} index images instead of {:,} and {:,}, so no published score compares'
                      .format(name, *sizes, *known.sizes))
            return benchmark
    if faults:
        raise faults[0]
    telltales = ' or '.join(telltale for telltale, _ in known.layouts)
    raise MissingError(f'{name}: expected {telltales}, found {contents_of(root)}; {way_to(known.kaggle, "root")}.')


def by_label(index, query=None):
    """The Benchmark in which images of one label are relevant to each other, and none to itself."""
    rows, benchmark = index.groupby('label').indices, Benchmark(index, {}, query)
    relevant = [rows.get(label, NONE) for label in benchmark.queries['label']]
    if query is None:
        relevant = [found[found != place] for place, found in enumerate(relevant)]
    benchmark.truth[''] = [(found, NONE) for found in relevant]
    return benchmark


def needed(folder, name):
    """A file that must be in a folder. MissingError without it."""
    file = os.path.join(folder, name)
    if not os.path.isfile(file):
        raise MissingError(f'{file} is missing; there is {contents_of(folder)}.')
    return file


def listed(folder, layout, where=None):
    """read_listing of a file that must exist."""
    needed(folder, layout.telltale)
    return read_listing(folder, layout, where)


def frame_of(folder, file, rows, folders=('',)):
    """DataFrame path, label, domain of pairs (path, label) from a file, below the first of the folders that holds them."""
    if not rows:
        raise InputError(f'{file} lists no image of the test split.')
    paths, labels = zip(*rows)
    paths = locate(folder, pd.Series(paths, dtype=str), folders, file)
    return pd.DataFrame({'path': paths, 'label': [*map(str, labels)], 'domain': ''})


def read_online_products(folder):
    """Stanford Online Products: its test split."""
    return by_label(listed(folder, replace(DATASETS['stanford-online-products'], telltale='Ebay_test.txt')))


def read_in_shop(folder):
    """DeepFashion In-shop: its queries and its gallery."""
    query, index = (listed(folder, DATASETS['deepfashion-in-shop'], ('evaluation_status', part))
                    for part in ('query', 'gallery'))
    return by_label(index, query)


def read_birds(folder):
    """CUB-200-2011: classes 101 to 200."""
    file = needed(folder, 'images.txt')
    images, labels = numbered(file), numbered(needed(folder, 'image_class_labels.txt'))
    try:
        rows = [(path, labels[number]) for number, path in images.items() if int(labels[number]) > 100]
    except (KeyError, ValueError) as error:
        raise InputError(f'{folder}: image_class_labels.txt does not give each image of images.txt the number of its class '
                         f'({error}).') from error
    return by_label(frame_of(folder, file, rows, ('images',)))


def numbered(file):
    """{number: text} of a file whose lines hold both."""
    try:
        return dict(line.split() for line in Path(file).read_text('utf-8').splitlines() if line.strip())
    except ValueError as error:
        raise InputError(f'{file} must have a number and a word in each line ({error}).') from error


def read_cars(folder):
    """Cars-196 with the original file of annotations: classes 99 to 196."""
    file = needed(folder, 'cars_annos.mat')
    try:
        rows = [(row['relative_im_path'], row['class']) for row in np.atleast_1d(matlab_file(file)['annotations'])
                if int(row['class']) > 98]
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise InputError(f'{file} lacks annotations with relative_im_path and class ({reason_of(error)}).') from error
    return by_label(frame_of(folder, file, rows))


def read_car_folders(folder):
    """Cars-196 as class folders: the last 98 by name, from FIAT to smart, are the classes 99 to 196."""
    frame = read_folders(folder, DATASETS['stanford-cars'])
    names = sorted(frame['label'].unique())
    if len(names) != 196:
        raise InputError(f'{folder} has {len(names)} class folders instead of 196, so that the test classes, the last 98 by '
                         'name, are not known: get the whole set.')
    return by_label(frame[frame['label'].isin(names[98:])].reset_index(drop=True))


def matlab_file(file):
    """What a MATLAB file holds, as dicts, arrays and texts."""
    from scipy.io import loadmat  # scikit-learn needs scipy
    return loadmat(file, simplify_cells=True)


def read_products(folder):
    """Products-10K: its test images, searched among its training images."""
    layout = DATASETS['products-10k']
    test = replace(layout, telltale='test_kaggletest.csv', folders=('test', 'test/test'))
    return by_label(listed(folder, layout), listed(folder, test))


def read_landmarks(folder, solution, index):
    """Google Landmarks v2, retrieval: its private and public queries, each with a list of what is relevant.
    solution, index: where the two files are."""
    test = Listing('landmark', solution, ('id',), 'images', ('test', ''), HEX_FOLDERS)
    parts = {usage: listed(folder, test, ('Usage', usage)) for usage in ('Private', 'Public')}
    index = listed(folder, Listing('landmark', index, ('id',), 'id', ('index', ''), HEX_FOLDERS))
    query = pd.concat(parts.values(), ignore_index=True)
    rows = dict(zip(index['label'], range(len(index))))
    usages = [usage for usage, part in parts.items() for _ in range(len(part))]
    relevant = [np.array([rows.get(name, -1) for name in names.split()], dtype=int) for names in query['label']]
    truth = {wanted.lower(): [(found if usage == wanted else NONE, NONE) for found, usage in zip(relevant, usages)]
             for wanted in parts}
    return Benchmark(index, truth, query)


def read_met(folder):
    """The Met: its test photographs of exhibits, searched in its database; those that show no exhibit are left out."""
    layout, file = DATASETS['met'], needed(folder, 'testset.json')
    try:
        rows = [(row['path'], int(row['MET_id'])) for row in json.loads(Path(file).read_bytes()) if 'MET_id' in row]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f'{file} must be a list of images with path and MET_id ({error!r}).') from error
    return by_label(listed(folder, layout), frame_of(folder, file, rows, layout.folders))


HARMLESS = {('_codecs', 'encode'), ('__builtin__', 'bytes'), ('numpy', 'ndarray'), ('numpy', 'dtype')} | {
    (f'numpy.{core}.{room}', name) for core in ('core', '_core') for room, name in (
        ('multiarray', '_reconstruct'), ('multiarray', 'scalar'), ('numeric', '_frombuffer'))}


class ArrayUnpickler(pickle.Unpickler):
    """Reads texts, numbers, containers and numpy's arrays, and refuses what else a file asks for, so that nothing runs."""

    def find_class(self, module, name):
        """One of HARMLESS. UnpicklingError for all others."""
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')
        return super().find_class(module, name)


def ground_truth(file):
    """What a ground truth file of revisitop holds -> (dict imlist, qimlist, gnd; number of the first image)."""
    try:
        if file.endswith('.mat'):
            return matlab_file(file), 1
        with open(file, 'rb') as stream:
            return ArrayUnpickler(stream, encoding='latin1').load(), 0
    except Exception as error:  # a stranger's file makes the readers raise anything
        raise InputError(f'{file} cannot be read as ground truth ({reason_of(error).rstrip(".")}): get it again from '
                         'http://cmp.felk.cvut.cz/revisitop.') from error


def read_revisited(folder, name):
    """ROxford or RParis: easy and hard images are right (medium), or hard ones alone, easy ones ignored (hard); junk is
    ignored. name: of the ground truth file."""
    file = needed(folder, name)
    truth, first = ground_truth(file)
    try:
        names = [[str(image) for image in np.atleast_1d(truth[part])] for part in ('imlist', 'qimlist')]
        entries = [truth['gnd']] if isinstance(truth['gnd'], dict) else [*truth['gnd']]
        boxes = [tuple(map(float, entry['bbx'])) for entry in entries]
        kinds = [[np.atleast_1d(entry[kind]).astype(int).ravel() - first for kind in ('easy', 'hard', 'junk')]
                 for entry in entries]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f'{file} lacks what a ground truth of revisitop has ({error!r}).') from error
    numbers = np.concatenate([NONE, *(part for parts in kinds for part in parts)])
    if len(entries) != len(names[1]) or not ((0 <= numbers) & (numbers < len(names[0]))).all() or not all(
            len(box) == 4 and box[0] < box[2] and box[1] < box[3] for box in boxes):
        raise InputError(f'{file}: its images, queries, boxes and numbers do not fit each other.')
    index, query = (frame_of(folder, file, [(f'{image}.jpg', image.rpartition('_')[0]) for image in part],
                             ('jpg', 'images', '')) for part in names)
    return Benchmark(index, {'medium': [(np.union1d(easy, hard), junk) for easy, hard, junk in kinds],
                             'hard': [(hard, np.union1d(junk, easy)) for easy, hard, junk in kinds]}, query, boxes)


def revisited(name, *sizes):
    """PublicSet of ROxford or RParis, with either of its ground truth files."""
    files = [f'gnd_{name}.pkl', f'gnd_{name}.mat']
    return PublicSet(tuple((file, partial(read_revisited, name=file)) for file in files), sizes)


def landmarks(test, index):
    """A layout of Google Landmarks v2; test, index: beginnings of the paths of its label files."""
    solution = f'{test}retrieval_solution_v2.1.csv'
    return solution, partial(read_landmarks, solution=solution, index=f'{index}index.csv')


TEST_SETS = {
    'stanford-online-products': PublicSet((('Ebay_test.txt', read_online_products),), (60_502, 60_502)),
    'deepfashion-in-shop': PublicSet((('list_eval_partition.txt', read_in_shop),), (14_218, 12_612)),
    'cub-200': PublicSet((('image_class_labels.txt', read_birds),), (5_924, 5_924), 'wenewone/cub2002011'),
    'cars-196': PublicSet((('cars_annos.mat', read_cars), ('train/Acura*', read_car_folders)), (8_131, 8_131),
                          'jutrera/stanford-car-dataset-by-classes-folder'),
    'products-10k': PublicSet((('test_kaggletest.csv', read_products),), kaggle='products-10k'),
    'google-landmarks-v2': PublicSet((landmarks('', ''), landmarks('test/', 'index/')), (1_129, 761_757)),
    'met': PublicSet((('MET_database.json', read_met),), (1_003, 397_121)),
    'roxford5k': revisited('roxford5k', 70, 4_993),
    'rparis6k': revisited('rparis6k', 70, 6_322),
}
