"""Sources: what a folder, a CSV or a list of one's own means, and what is said of one that can hardly be meant."""
import pandas as pd
import pytest

from guie.sources import PLACE4, data_name, data_sources, read_sources, set_name
from tests.runs import is_one_sentence
from tests.worlds import write_files


def write_images(folder, counts):
    """Files that pass for images: counts {folder below: number}. Their names differ, as those of parts of one set do."""
    write_files(folder, [f'{name}/of-{name.replace("/", "-")}-{number}.jpg' for name, count in counts.items()
                         for number in range(count)])
    return folder


def classes(frame):
    return frame['label'].value_counts().sort_index().to_dict()


@pytest.mark.parametrize('counts, most', [
    ({'cat': 2, 'dog': 2}, {'cat': 2, 'dog': 2}),
    ({'cat': 2, 'dog/young': 1, 'dog/old': 2}, {'cat': 2, 'dog': 3}),
    ({'train': 2, 'bus': 2}, {'bus': 2, 'train': 2}),  # railway
    ({'train/cat': 2, 'train/dog': 1, 'val/cat': 1, 'val/dog': 1}, {'cat': 3, 'dog': 2}),
    ({'Train/cat': 2, 'Validation/cat': 1, 'Test/dog': 1}, {'cat': 3, 'dog': 1}),
    ({'train/cat': 2, 'train/dog': 1, 'valid/cow': 1}, {'cat': 2, 'cow': 1, 'dog': 1}),
    ({'train/cat': 2, 'train/dog': 1, 'test': 5}, {'cat': 2, 'dog': 1}),  # a test set without labels
    ({'train/cat': 2, 'train/dog': 1}, {'cat': 2, 'dog': 1}),
])
def test_a_folder_of_class_folders_or_of_the_parts_of_a_set_is_understood(tmp_path, counts, most):
    frame = read_sources(str(write_images(tmp_path / 'pets', counts)))
    assert classes(frame) == most and frame['domain'].nunique() == 1 and frame['path'].is_unique


def test_what_is_joined_and_what_is_left_out_is_printed(tmp_path, capsys):
    read_sources(write_images(tmp_path / 'pets', {'train/cat': 2, 'train/dog': 1, 'val/cat': 2, 'test': 5}))
    said = capsys.readouterr().out
    assert f'1 of 2 classes are in several of {tmp_path}/pets/train, {tmp_path}/pets/val; their images are joined.' in said
    assert f'{tmp_path}/pets: 5 images in test are in no class folder and left out.' in said
    read_sources(write_images(tmp_path / 'views', {'bag/front': 2, 'bag/back': 2, 'cup/front': 2, 'cup/back': 2}))
    assert 'the classes are bag, cup; the 4 folders in them are not told apart.' in capsys.readouterr().out


@pytest.mark.parametrize('counts, sentence', [
    ({'pets/cat': 2, 'pets/dog': 3}, '{}/data holds one class folder, pets, and in that are no images but folders of them: '
                                     'give {}/data/pets instead, which holds 2 folders (cat, dog).'),
    ({'a/b/cat': 2, 'a/b/dog': 3}, 'give {}/data/a/b instead, which holds 2 folders (cat, dog).'),
    ({'pets/train/cat': 2, 'pets/val/cat': 3}, 'give {}/data/pets instead, which holds 2 folders (train, val).'),
    ({'pets/cat': 1, 'pets/dog': 1, 'cars/audi': 1, 'cars/bmw': 1, 'cars/kia': 1},
     '{}/data holds 2 folders (cars, pets) that have hardly an image but 5 folders of them (audi, bmw, kia, cat and 1 '
     'more): if these are the classes, give as DATA a list of the 2 folders; if they are not, a CSV with path,label.'),
    ({'pets/cat': 1, 'pets/dog': 1, 'cars/audi': 1, 'cars/bmw': 1, 'food/pie': 1, 'food': 1},
     'hardly an image but 5 folders'),
    ({'train/cat': 2, 'val/cat': 2, 'cow': 1},
     '{}/data holds train, val with class folders in them beside cow: give as DATA a list of the folders that are meant, '
     "as ['{}/data/train', '{}/data/val']."),
    ({'train': 2, 'val': 3}, '{}/data holds 5 images in train, val and no class folders: put the images of each class into '
                             'a folder of its own, or give a CSV with path,label.'),
    ({'.': 3}, '{}/data holds 3 images and no class folders: put the images of each class into a folder'),
    ({'.': 3, '../cow': 2}, '{}/data holds 3 images and no class folders: give {} if its 2 folders (cow, data) are the '
                            'classes, else put'),
])
def test_a_folder_that_can_hardly_be_meant_is_one_sentence_with_the_likely_right_one(tmp_path, counts, sentence):
    with pytest.raises(ValueError) as error:
        read_sources(write_images(tmp_path / 'data', counts))
    assert sentence.replace('{}', str(tmp_path)) in str(error.value) and is_one_sentence(error)


def test_a_folder_without_any_image_is_not_there_as_before(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='Expected images like'):
        read_sources(tmp_path / 'empty')


def write_tables(folder, tables):
    folder.mkdir(exist_ok=True)
    for name, labels in tables.items():
        rows = [(f'images/{label}/{number}.jpg', label) for label, *numbers in labels for number in numbers]
        write_files(folder, [path for path, _ in rows])
        pd.DataFrame(rows, columns=['path', 'label']).to_csv(folder / name, index=False)
    return [folder / name for name in tables]


@pytest.mark.parametrize('names', [('train', 'val'), ('train', 'valid', 'test'), ('pets_train', 'pets_val'),
                                   ('train.csv', 'val.csv'), ('pets-Train.csv', 'pets-Test.csv')])
def test_a_list_of_the_parts_of_a_set_is_one_set(tmp_path, capsys, names):
    if names[0].endswith('csv'):
        sources = write_tables(tmp_path / 'pets', {name: [('cat', number), ('dog', number, number + 9)]
                                                   for number, name in enumerate(names)})
    else:
        write_images(tmp_path / 'pets', {f'{name}/{label}': n for name in names for label, n in (('cat', 1), ('dog', 2))})
        sources = [str(tmp_path / 'pets' / name) for name in names]
    frame = read_sources(sources)
    assert classes(frame) == {'cat': len(names), 'dog': 2 * len(names)} and set(frame['domain']) == {'pets'}
    assert '2 of 2 classes are in several of' in capsys.readouterr().out and data_name(sources) == 'pets'


def test_an_image_that_is_listed_twice_counts_once_and_has_one_label(tmp_path, capsys):
    train, again = write_tables(tmp_path / 'pets', {'train.csv': [('cat', 1, 2), ('dog', 1)], 'val.csv': [('cat', 2, 3)]})
    assert classes(read_sources([train, again])) == {'cat': 3, 'dog': 1}
    assert '1 images are given more than once and count once.' in capsys.readouterr().out
    (tmp_path / 'pets/val.csv').write_text('path,label\nimages/cat/1.jpg,dog\n')
    with pytest.raises(ValueError, match='has two labels, cat and dog'):
        read_sources([train, again])


def test_sets_that_share_a_class_by_chance_are_not_mixed(tmp_path):
    write_images(tmp_path, {'shop/1': 2, 'shop/2': 2, 'zoo/2': 2})
    with pytest.raises(ValueError) as error:
        read_sources([tmp_path / 'shop', tmp_path / 'zoo'])
    assert f'{tmp_path}/shop and {tmp_path}/zoo have a class 2 each' in str(error.value) and is_one_sentence(error)


@pytest.mark.parametrize('source, name', [
    ('/data/pets', 'pets'), ('/data/pets/', 'pets'), ('/data/pets/train', 'pets'), ('/data/pets/train.csv', 'pets'),
    ('/data/pets_train.csv', 'pets'), ('~/pets', 'pets'), ('/data/my pets', 'my pets'), ('/data/training_v2', 'v2'),
    ('products-10k', 'products-10k'), ('/', 'data'), ('/train', 'data')])
def test_a_set_is_called_by_its_name_and_not_by_that_of_a_part(source, name):
    assert set_name(source) == name


def test_the_data_of_a_run_have_a_name_that_a_folder_can_have():
    assert data_name(['/data/my pets/train', '/data/my pets/val', '/data/täglich:1']) == 'my-pets+täglich-1'
    assert data_name('/data/pets') == 'pets' and len(data_name([f'/data/{number}' * 9 for number in range(99)])) <= 80


@pytest.mark.parametrize('data, expected', [
    (None, {'name': '', 'train': PLACE4}), (' ', {'name': '', 'train': PLACE4}),
    ({'root': '/r'}, {'name': '', 'train': PLACE4, 'root': '/r'}),
    ('/my/pets', {'name': 'pets', 'train': '/my/pets'}),
    ("['/a/cats', '/a/dogs']", {'name': 'cats+dogs', 'train': ['/a/cats', '/a/dogs']}),
    ('{"train": "/my/pets", "query": "q.csv"}', {'name': 'pets', 'train': '/my/pets', 'query': 'q.csv'}),
    ({'train': '/my/pets', 'name': ''}, {'name': '', 'train': '/my/pets'})])
def test_a_notebooks_data_are_load_datas_arguments(data, expected):
    assert data_sources(data) == expected


def test_an_unknown_part_of_data_is_one_sentence():
    with pytest.raises(ValueError, match=r"^DATA has no part 'quary'; give train, .*\. Did you mean query\?$"):
        data_sources({'train': '/my/pets', 'quary': 'q.csv'})


@pytest.mark.parametrize('data', [5, 1.5, True, b'pets'])
def test_what_names_no_data_is_one_sentence(data):
    with pytest.raises(ValueError, match='DATA is .*; give a folder of class folders') as error:
        data_sources(data)
    assert is_one_sentence(error)
