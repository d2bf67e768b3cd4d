"""Miniatures of public benchmarks, in their true layouts: images of one colour each, and a model that sees the colour."""
import json
import pickle
from itertools import count

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from guie.model import Embedder
from guie.towers import TowerSpec

HEX = '0123456789abcdef'


def colour_model():
    """An Embedder whose vector is the direction of an image's mean colour."""
    tower = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3, bias=False))
    torch.nn.init.eye_(tower[2].weight)
    return Embedder(tower, None, spec=TowerSpec('colour', '', 16, (0.,) * 3, (1.,) * 3, '', 3, {})).eval()


def colour(path, box=None):
    """Unit vector of the mean colour of an image, or of a part of it, float64 (3,)."""
    with Image.open(path) as image:
        vector = np.asarray((image.crop(box) if box else image).convert('RGB'), float).mean((0, 1))
    return vector / np.linalg.norm(vector)


def paint(root, paths, seed=0):
    """Writes an image of one random colour for each path below root."""
    rng = np.random.default_rng(seed)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), tuple(rng.integers(20, 256, 3).tolist())).save(root / path)


def write(root, path, text):
    """A text file below root."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def online_products(root):
    rows = [(f'chair_final/11{label}_{number}.JPG', label) for label in range(11319, 11323) for number in range(3)]
    lines = [f'{number} {label} 3 {path}' for number, (path, label) in enumerate(rows, 59552)]
    write(root, 'Ebay_test.txt', '\n'.join(['image_id class_id super_class_id path', *lines]))
    write(root, 'Ebay_info.txt', 'image_id class_id super_class_id path\n1 1 1 bicycle_final/1_0.JPG\n')
    paint(root, [path for path, _ in rows])


def in_shop(root):
    rows = [(f'img/WOMEN/Dresses/id_{label:08d}/0{number}_1_front.jpg', f'id_{label:08d}', part)
            for label in range(2, 6) for number, part in enumerate(['query', 'gallery', 'gallery', 'query'])]
    rows.insert(1, ('img/MEN/Denim/id_00000080/01_1_front.jpg', 'id_00000080', 'train'))
    lines = [f'{path}      {label} {part}' for path, label, part in rows]
    write(root, 'Eval/list_eval_partition.txt',
          '\n'.join([str(len(rows)), 'image_name item_id evaluation_status', *lines]))
    paint(root / 'Img', [path for path, _, _ in rows], seed=1)


def birds(root):
    rows = [(f'{label:03d}.Bird_{label}/Bird_{number:04d}_{label}{number}.jpg', label)
            for label in (1, 100, 101, 102, 103, 200) for number in range(3)]
    write(root, 'CUB_200_2011/images.txt', ''.join(f'{n} {path}\n' for n, (path, _) in enumerate(rows, 1)))
    write(root, 'CUB_200_2011/image_class_labels.txt', ''.join(f'{n} {label}\n' for n, (_, label) in enumerate(rows, 1)))
    paint(root / 'CUB_200_2011/images', [path for path, _ in rows], seed=2)


def struct(rows):
    """What MATLAB calls a struct array: (1, n)."""
    table = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for place, row in enumerate(rows):
        table[0, place] = tuple(row.values())
    return table


def cars(root):
    rows = [{'relative_im_path': f'car_ims/{number:06d}.jpg', 'bbox_x1': 1, 'bbox_y1': 1, 'bbox_x2': 9, 'bbox_y2': 9,
             'class': label, 'test': number % 2}
            for number, label in enumerate([label for label in (1, 98, 99, 100, 196) for _ in range(3)], 1)]
    root.mkdir(parents=True, exist_ok=True)
    savemat(root / 'cars_annos.mat', {'annotations': struct(rows)})
    paint(root, [row['relative_im_path'] for row in rows], seed=3)


def car_folders(root):
    """The first 98 classes have one image each, the next three four, the others one."""
    names = ['Acura RL Sedan 2012', *(f'Dodge {n:02d}' for n in range(97)), 'FIAT 500 Abarth 2012',
             *(f'Ford {n:02d}' for n in range(97))]
    numbers = count(1)
    paths = [f'{part}/{name}/{next(numbers):05d}.jpg' for place, name in enumerate(names)
             for part in (['train', 'test'] * 2 if 98 <= place < 101 else ['train'])]
    paint(root / 'car_data/car_data', paths, seed=4)


def products(root):
    train = [(f'{100 + n}.jpg', n % 4) for n in range(12)]
    test = [(f'{n}.jpg', n % 4) for n in range(6)]
    write(root, 'train.csv', 'name,class,group\n' + ''.join(f'{name},{label},1\n' for name, label in train))
    write(root, 'test_kaggletest.csv', 'name,class,Usage\n' + ''.join(f'{name},{label},Public\n' for name, label in test))
    paint(root / 'train', [name for name, _ in train], seed=5)
    paint(root / 'test', [name for name, _ in test], seed=6)


def landmarks(root, below=True):
    """5 queries and 12 index images; a listed image that the index lacks counts as never found."""
    def name(number):
        return (f'{HEX[number]}{HEX[number + 1]}{HEX[number + 2]}' + f'{number:013d}')

    index, test = [name(n) for n in range(12)], [name(n) + 't' for n in range(7)]
    gone = 'f' * 16
    relevant = [index[:3], index[2:4], [index[5], gone], index[6:11], index[11:]]
    lines = [f'{query},{" ".join(found)},{usage}' for query, found, usage in zip(
        test[1:], relevant, ['Public', 'Private', 'Private', 'Public', 'Private'])]
    places = ('test/', 'index/') if below else ('', '')
    write(root, f'{places[0]}retrieval_solution_v2.1.csv',
          '\n'.join(['id,images,Usage', f'{test[0]},None,Ignored', *lines, f'{test[6]},,Ignored']))
    write(root, f'{places[1]}index.csv', '\n'.join(['id', *index]))
    paint(root / 'test', ['/'.join([*query[:3], query + '.jpg']) for query in test], seed=7)
    paint(root / 'index', ['/'.join([*image[:3], image + '.jpg']) for image in index], seed=8)
    return dict(zip(test[1:], relevant))


def met(root):
    index = [(f'MET/{label}/{number}.jpg', label) for label in (33, 4567, 89) for number in range(3)]
    write(root, 'ground_truth/MET_database.json', json.dumps([{'id': label, 'path': path} for path, label in index]))
    test = [{'path': f'test_met/{n}.jpg', 'MET_id': label} for n, label in enumerate([4567, 33, 89, 89])]
    test.insert(1, {'path': 'test_other/9.jpg'})
    write(root, 'ground_truth/testset.json', json.dumps(test))
    paint(root / 'images', [path for path, _ in index], seed=9)
    paint(root / 'images', [row['path'] for row in test], seed=10)


def oxford(root, kind='pkl', name='roxford5k'):
    """Three queries of two landmarks; each is half of an image of two colours. -> the ground truth, numbered from 0."""
    images = [f'all_souls_{n:06d}' for n in range(7)] + [f'magdalen_{n:06d}' for n in range(5)]
    queries = ['all_souls_000013', 'all_souls_000026', 'magdalen_000058']
    gnd = [{'easy': [0, 3], 'hard': [1, 9], 'junk': [2, 4]}, {'easy': [5, 6, 0], 'hard': [], 'junk': [11]},
           {'easy': [], 'hard': [8], 'junk': []}]
    boxes = [[16., 0., 32., 16.], [0., 0., 16., 16.], [16., 0., 32., 16.]]
    folder = root / name
    paint(folder / 'jpg', [f'{image}.jpg' for image in images], seed=11)
    rng = np.random.default_rng(12)
    for query in queries:
        halves = rng.integers(20, 256, (1, 2, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
        Image.fromarray(halves).save(folder / f'jpg/{query}.jpg', quality=95, subsampling=0)
    if kind == 'pkl':
        entries = [{'bbx': box, **{part: np.array(rows, dtype=np.int64) for part, rows in entry.items()}}
                   for entry, box in zip(gnd, boxes)]
        (folder / f'gnd_{name}.pkl').write_bytes(pickle.dumps({'imlist': images, 'qimlist': queries, 'gnd': entries}))
    else:
        entries = [{'bbx': np.array([box]), **{part: np.array([rows], dtype=float) + 1 for part, rows in entry.items()}}
                   for entry, box in zip(gnd, boxes)]
        cells = {part: np.array(names, dtype=object)[:, None] for part, names in (('imlist', images), ('qimlist', queries))}
        savemat(folder / f'gnd_{name}.mat', {**cells, 'gnd': struct(entries)})
    return gnd, boxes


BUILDERS = {'stanford-online-products': online_products, 'deepfashion-in-shop': in_shop, 'cub-200': birds, 'cars-196': cars,
            'products-10k': products, 'google-landmarks-v2': landmarks, 'met': met, 'roxford5k': oxford,
            'rparis6k': lambda root: oxford(root, name='rparis6k')}
