"""Test sets: what their files say is right, in each layout that people have; and one sentence where files do not fit."""
import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from scipy.io import savemat

from guie import testsets
from guie.errors import InputError, MissingError
from guie.testsets import TEST_SETS, read_test_set
from tests import miniatures
from tests.miniatures import BUILDERS, paint, write
from tests.runs import is_one_sentence


def found(name, root):
    """{setting: {query's path below root: (relevant, ignored) as sets of paths}} of a set."""
    benchmark = read_test_set(name, root)
    index, queries = (frame['path'].map(lambda path: os.path.relpath(path, root)).tolist()
                      for frame in (benchmark.index, benchmark.queries))
    return {setting: {query: tuple({index[row] for row in rows if row >= 0} for rows in pair)
                      for query, pair in zip(queries, pairs, strict=True)} for setting, pairs in benchmark.truth.items()}


def test_online_products_take_the_test_split_alone_and_no_image_as_its_own_neighbour(tmp_path):
    miniatures.online_products(tmp_path)
    truth = found('stanford-online-products', tmp_path)['']
    assert len(truth) == 12
    assert truth['chair_final/1111320_1.JPG'] == ({'chair_final/1111320_0.JPG', 'chair_final/1111320_2.JPG'}, set())


def test_in_shop_has_queries_and_a_gallery(tmp_path):
    miniatures.in_shop(tmp_path)
    truth = found('deepfashion-in-shop', tmp_path)['']
    below = 'Img/img/WOMEN/Dresses/id_00000003/0'
    assert len(truth) == 8 and len(read_test_set('deepfashion-in-shop', tmp_path).index) == 8
    assert truth[f'{below}0_1_front.jpg'] == truth[f'{below}3_1_front.jpg'] == (
        {f'{below}1_1_front.jpg', f'{below}2_1_front.jpg'}, set())


def test_birds_are_those_of_the_classes_101_to_200(tmp_path):
    miniatures.birds(tmp_path)
    labels = read_test_set('cub-200', tmp_path).index['label'].value_counts()
    assert labels.to_dict() == {'101': 3, '102': 3, '103': 3, '200': 3}
    below = 'CUB_200_2011/images/200.Bird_200/Bird_000'
    assert found('cub-200', tmp_path)[''][f'{below}1_2001.jpg'] == ({f'{below}0_2000.jpg', f'{below}2_2002.jpg'}, set())


def test_cars_are_those_of_the_classes_99_to_196(tmp_path):
    miniatures.cars(tmp_path)
    frame = read_test_set('cars-196', tmp_path).index
    assert frame['label'].tolist() == ['99'] * 3 + ['100'] * 3 + ['196'] * 3
    assert frame['path'].tolist() == [str(tmp_path / f'car_ims/{number:06d}.jpg') for number in range(7, 16)]


def test_class_folders_of_cars_are_taken_by_the_order_of_their_names(tmp_path, capsys):
    miniatures.car_folders(tmp_path)
    frame = read_test_set('cars-196', tmp_path).index
    counts = frame['label'].value_counts()
    assert len(counts) == 98 and counts['FIAT 500 Abarth 2012'] == 4 and not counts.index.str.startswith('Dodge').any()
    assert '107 queries and 107 index images instead of 8,131' in capsys.readouterr().out
    missing = tmp_path / 'car_data/car_data/train/Dodge 03'
    next(missing.iterdir()).unlink()
    with pytest.raises(InputError, match='195 class folders instead of 196') as error:
        read_test_set('cars-196', tmp_path)
    assert is_one_sentence(error)


def test_products_are_searched_among_the_training_images(tmp_path):
    miniatures.products(tmp_path)
    truth = found('products-10k', tmp_path)['']
    assert len(truth) == 6 and truth['test/5.jpg'] == ({'train/101.jpg', 'train/105.jpg', 'train/109.jpg'}, set())


@pytest.mark.parametrize('below', [True, False])
def test_landmarks_are_private_or_public_and_ignored_ones_are_left_out(tmp_path, below):
    right = miniatures.landmarks(tmp_path, below)
    truth = found('google-landmarks-v2', tmp_path)

    def image(part, name):
        return f'{part}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg'

    expected = {image('test', query): {image('index', name) for name in names if name != 'f' * 16}
                for query, names in right.items()}
    assert set(truth) == {'private', 'public'} and set(truth['private']) == set(expected)
    public = [image('test', query) for place, query in enumerate(right) if place in (0, 3)]
    for query, names in expected.items():
        assert truth['public'][query] == (names if query in public else set(), set())
        assert truth['private'][query] == (set() if query in public else names, set())
    benchmark = read_test_set('google-landmarks-v2', tmp_path)
    lengths = dict(zip(benchmark.query['path'], (len(rows) for rows, _ in benchmark.truth['private'])))
    assert lengths[str(tmp_path / image('test', [*right][2]))] == 2, 'an image that the index lacks counts as not found'


def test_met_leaves_out_what_shows_no_exhibit(tmp_path):
    miniatures.met(tmp_path)
    truth = found('met', tmp_path)['']
    assert {query: sorted(relevant)[0] for query, (relevant, _) in truth.items()} == {
        'images/test_met/0.jpg': 'images/MET/4567/0.jpg', 'images/test_met/1.jpg': 'images/MET/33/0.jpg',
        'images/test_met/2.jpg': 'images/MET/89/0.jpg', 'images/test_met/3.jpg': 'images/MET/89/0.jpg'}
    assert all(len(relevant) == 3 for relevant, _ in truth.values())


@pytest.mark.parametrize('kind', ['pkl', 'mat'])
def test_easy_images_are_right_or_ignored_and_both_files_say_the_same(tmp_path, kind):
    gnd, boxes = miniatures.oxford(tmp_path, kind)
    benchmark = read_test_set('roxford5k', tmp_path)
    assert [list(box) for box in benchmark.boxes] == boxes
    assert benchmark.query['label'].tolist() == ['all_souls', 'all_souls', 'magdalen']
    assert benchmark.index['path'].iloc[3] == str(tmp_path / 'roxford5k/jpg/all_souls_000003.jpg')
    for place, entry in enumerate(gnd):
        easy, hard, junk = map(set, entry.values())
        assert tuple(map(set, benchmark.truth['medium'][place])) == (easy | hard, junk)
        assert tuple(map(set, benchmark.truth['hard'][place])) == (hard, easy | junk)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ('harm',)


@pytest.mark.parametrize('protocol', [0, 2, 5])
@pytest.mark.parametrize('what', [Harmful(), {'imlist': Harmful()}, np.array([Harmful()], dtype=object)])
def test_a_ground_truth_that_asks_for_anything_but_arrays_is_refused_and_runs_nothing(tmp_path, monkeypatch, what, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'gnd_roxford5k.pkl').write_bytes(pickle.dumps(what, protocol))
    with pytest.raises(InputError, match='it asks for posix.mkdir') as error:
        read_test_set('roxford5k', tmp_path)
    assert is_one_sentence(error) and not (tmp_path / 'harm').exists()


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_any_pickle_protocol_are_read(tmp_path, protocol):
    held = {'imlist': ['a'], 'gnd': [{'easy': np.arange(3), 'hard': np.zeros(0), 'bbx': [np.float64(.5), 2, 3, 4]}]}
    file = tmp_path / 'gnd.pkl'
    file.write_bytes(pickle.dumps(held, protocol))
    read, first = testsets.ground_truth(str(file))
    assert first == 0 and read['imlist'] == ['a'] and read['gnd'][0]['bbx'] == [.5, 2, 3, 4]
    assert read['gnd'][0]['easy'].tolist() == [0, 1, 2] and read['gnd'][0]['hard'].shape == (0,)


def changed(**changes):
    """Writes a ground truth of ROxford with other values."""
    def change(root):
        file = root / 'roxford5k/gnd_roxford5k.pkl'
        file.write_bytes(pickle.dumps({**pickle.loads(file.read_bytes()), **changes}))
    return change


ENTRY = {'bbx': [0, 0, 5, 5], 'easy': [0], 'hard': [1], 'junk': [2]}
MALFORMED = [
    ('stanford-online-products', lambda root: (root / 'Ebay_test.txt').unlink(), MissingError, 'expected Ebay_test.txt'),
    ('stanford-online-products', lambda root: write(root, 'Ebay_test.txt', 'a b\n1 2\n'), InputError, 'lacks the column'),
    ('deepfashion-in-shop', lambda root: write(root, 'Eval/list_eval_partition.txt', '1\nimage_name item_id x\na b c'),
     InputError, 'lacks the column evaluation_status'),
    ('deepfashion-in-shop', lambda root: write(
        root, 'Eval/list_eval_partition.txt', '1\nimage_name item_id evaluation_status\na b train'),
     InputError, "no row with 'query' in the column evaluation_status"),
    ('cub-200', lambda root: (root / 'CUB_200_2011/images.txt').unlink(), MissingError, 'images.txt is missing'),
    ('cub-200', lambda root: write(root, 'CUB_200_2011/images.txt', '1 a b\n'), InputError, 'a number and a word'),
    ('cub-200', lambda root: write(root, 'CUB_200_2011/image_class_labels.txt', '1 101\n'), InputError, 'each image of'),
    ('cub-200', lambda root: write(root, 'CUB_200_2011/image_class_labels.txt',
                                   ''.join(f'{n} 3\n' for n in range(1, 19))), InputError, 'no image of the test split'),
    ('cars-196', lambda root: write(root, 'cars_annos.mat', 'not MATLAB'), InputError, 'lacks annotations'),
    ('cars-196', lambda root: savemat(root / 'cars_annos.mat', {'other': 1}), InputError, 'lacks annotations'),
    ('products-10k', lambda root: (root / 'train.csv').unlink(), MissingError, 'train.csv is missing'),
    ('products-10k', lambda root: (root / 'test_kaggletest.csv').unlink(), MissingError,
     'kaggle competitions download products-10k'),
    ('google-landmarks-v2', lambda root: (root / 'index/index.csv').unlink(), MissingError, 'index.csv is missing'),
    ('google-landmarks-v2', lambda root: write(root, 'test/retrieval_solution_v2.1.csv', 'id,images\na,b\n'), InputError,
     'lacks the column Usage'),
    ('met', lambda root: (root / 'ground_truth/testset.json').unlink(), MissingError, 'testset.json is missing'),
    ('met', lambda root: write(root, 'ground_truth/testset.json', json.dumps([{'MET_id': 3}])), InputError, 'path and MET'),
    ('met', lambda root: write(root, 'ground_truth/testset.json', '[{'), InputError, 'path and MET_id'),
    ('roxford5k', lambda root: os.rename(root / 'roxford5k/jpg', root / 'roxford5k/photos'), MissingError, 'expected'),
    ('roxford5k', changed(gnd=[ENTRY] * 2), InputError, 'do not fit'),
    ('roxford5k', changed(gnd=[{**ENTRY, 'junk': [12]}] * 3), InputError, 'do not fit'),
    ('roxford5k', changed(gnd=[{**ENTRY, 'bbx': [5, 0, 5, 5]}] * 3), InputError, 'do not fit'),
    ('roxford5k', changed(gnd=[{'easy': [0]}] * 3), InputError, "lacks what .*'bbx'"),
    ('roxford5k', lambda root: (root / 'roxford5k/gnd_roxford5k.pkl').write_bytes(b'cut off'), InputError, 'ground truth'),
]


@pytest.mark.parametrize('name, spoil, kind, words', MALFORMED)
def test_another_layout_is_one_sentence(tmp_path, name, spoil, kind, words):
    BUILDERS[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises(kind, match=words) as error:
        read_test_set(name, tmp_path)
    assert is_one_sentence(error)


@pytest.mark.parametrize('name', TEST_SETS)
def test_a_set_that_is_not_there_names_its_file_and_how_to_get_it(tmp_path, name):
    with pytest.raises(MissingError) as error:
        read_test_set(name, tmp_path / 'nowhere')
    assert is_one_sentence(error) and TEST_SETS[name].layouts[0][0] in str(error.value)
    assert TEST_SETS[name].kaggle in str(error.value) and str(error.value).endswith('give its folder as root.')


def test_another_sets_file_of_the_same_name_does_not_hide_the_right_one(tmp_path):
    miniatures.in_shop(tmp_path / 'later')
    write(tmp_path, 'earlier/Eval/list_eval_partition.txt',
          '1\nimage_pair_name_1 image_pair_name_2 item_id evaluation_status\na b c train\n')
    assert len(read_test_set('deepfashion-in-shop', tmp_path).queries) == 8


def test_only_an_incomplete_copy_is_printed(tmp_path, capsys, monkeypatch):
    miniatures.met(tmp_path)
    read_test_set('met', tmp_path)
    assert capsys.readouterr().out == ('met: 4 queries and 9 index images instead of 1,003 and 397,121, so no published '
                                       'score compares\n')
    monkeypatch.setitem(TEST_SETS, 'met', dataclasses.replace(TEST_SETS['met'], sizes=(4, 9)))
    read_test_set('met', tmp_path)
    assert capsys.readouterr().out == ''


def test_a_path_out_of_the_set_is_refused(tmp_path):
    miniatures.met(tmp_path)
    write(tmp_path, 'ground_truth/testset.json', json.dumps([{'path': '../../secret.jpg', 'MET_id': 33},
                                                             {'path': 'test_met/0.jpg', 'MET_id': 33}]))
    paint(tmp_path, ['secret.jpg'])
    with pytest.raises(InputError, match='leaves the data root') as error:
        read_test_set('met', tmp_path)
    assert is_one_sentence(error)
