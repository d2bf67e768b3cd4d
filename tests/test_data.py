import codecs
import inspect
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

import utilities

PHOTO = b'not decoded by any of these tests'


def make(root, files):
    """Files below root: a list of photo paths, or a dict path -> text."""
    for path in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(files[path].encode() if isinstance(files, dict) else PHOTO)


def rows(frame, root):
    """{path below root: label}"""
    return dict(zip((os.path.relpath(path, root) for path in frame['path']), frame['label'], strict=True))


SHIRT = 'img/TOPS/T_Shirt/id_00003186'
WORM = '00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris'
LAYOUTS = [  # name, label files, photos with the label each must get, domain, files that are no samples
    (
        'products-10k',
        {'train.csv': 'name,class,group\n0.jpg,0,3\n1.jpg,17,3\n'},
        {'train/0.jpg': '0', 'train/1.jpg': '17'},
        'packaged',
        ['test/7.jpg'],
    ),
    (
        'products-10k',
        {'train.csv': 'name,class,group\n0.jpg,0,3\n'},
        {'train/train/0.jpg': '0'},
        'packaged',
        [],
    ),
    (
        'google-landmarks-v2',
        {'train.csv': 'id,url,landmark_id\n0123456789abcdef,http://a/b.jpg,7\nff0,http://c,9\n'},
        {'train/0/1/2/0123456789abcdef.jpg': '7', 'train/f/f/0/ff0.jpg': '9'},
        'landmark',
        ['test/0/1/2/012a.jpg'],
    ),
    (
        'google-landmarks-v2',
        {'train.csv': '"id","url","landmark_id"\n"0123456789abcdef","http://a/b,c.jpg","7"\n'},
        {'0/1/2/0123456789abcdef.jpg': '7'},
        'landmark',
        [],
    ),
    (
        'google-landmarks-v2-clean',
        {'train_clean.csv': 'landmark_id,images\n1,17660ef415d37059 92b6290d571448f6\n2,cd0\n'},
        {
            'train/1/7/6/17660ef415d37059.jpg': '1',
            'train/9/2/b/92b6290d571448f6.jpg': '1',
            'train/c/d/0/cd0.jpg': '2',
        },
        'landmark',
        [],
    ),
    (
        'landmark-recognition-2020',
        {'train.csv': 'id,landmark_id\n17660ef415d37059,1\n'},
        {'train/1/7/6/17660ef415d37059.jpg': '1'},
        'landmark',
        ['test/0/0/0/0000.jpg', 'index/0/0/0/0001.jpg'],
    ),
    (
        'stanford-online-products',
        {
            'Ebay_info.txt': 'image_id class_id super_class_id path\n1 1 1 bicycle_final/111085122871_0.JPG\n'
            '2 2 12 toaster_final/7_0.JPG\n',
            'Ebay_train.txt': 'image_id class_id super_class_id path\n',
        },
        {'bicycle_final/111085122871_0.JPG': '1', 'toaster_final/7_0.JPG': '2'},
        'furniture',
        [],
    ),
    (
        'shopee',
        {
            'train.csv': 'posting_id,image,image_phash,title,label_group\n'
            'train_129225211,0000a68812bc7e98.jpg,94974f937d4c2433,"Paper, Bag",249114794\n'
        },
        {'train_images/0000a68812bc7e98.jpg': '249114794'},
        'packaged',
        ['test_images/0006c8e5462ae52167402.jpg'],
    ),
    (
        'met',
        {
            'ground_truth/MET_database.json': json.dumps(
                [{'id': 12, 'path': 'MET/12/0.jpg'}, {'id': 7, 'path': 'MET/7/0.jpg'}]
            )
        },
        {'images/MET/12/0.jpg': '12', 'images/MET/7/0.jpg': '7'},
        'artwork',
        ['images/test_met/a.jpg'],
    ),
    (
        'met',
        {'MET_database.json': json.dumps([{'id': 12, 'path': 'MET/12/0.jpg'}])},
        {'MET/12/0.jpg': '12'},
        'artwork',
        ['test_noart/a.jpg'],
    ),
    (
        'deepfashion-consumer-to-shop',
        {
            'Eval/list_eval_partition.txt': '2\n'
            'image_pair_name_1 image_pair_name_2 item_id evaluation_status\n'
            f'{SHIRT}/comsumer_01.jpg    {SHIRT}/shop_01.jpg    id_00003186    train\n'
            f'{SHIRT}/comsumer_02.jpg    {SHIRT}/shop_01.jpg    id_00003186    train\n',
            'Anno/list_bbox_consumer2shop.txt': '0\nimage_name clothes_type\n',
        },
        {f'Img/{SHIRT}/{name}.jpg': 'id_00003186' for name in ('comsumer_01', 'comsumer_02', 'shop_01')},
        'apparel',
        [],
    ),
    (
        'deepfashion-in-shop',
        {
            'Eval/list_eval_partition.txt': '2\nimage_name item_id evaluation_status\n'
            'img/WOMEN/Dresses/id_00000002/02_1_front.jpg                        id_00000002 train\n'
            'img/MEN/Denim/id_00000080/01_1_front.jpg                            id_00000080 query\n'
        },
        {
            'img/WOMEN/Dresses/id_00000002/02_1_front.jpg': 'id_00000002',
            'img/MEN/Denim/id_00000080/01_1_front.jpg': 'id_00000080',
        },
        'apparel',
        [],
    ),
    (
        'food-101',
        {'meta/classes.txt': 'apple_pie\n', 'meta/train.txt': 'apple_pie/1005649\n'},
        {'images/apple_pie/1005649.jpg': 'apple_pie', 'images/waffles/1.jpg': 'waffles'},
        'dishes',
        [],
    ),
    (
        'rp2k',
        {},
        {
            'all/train/可口可乐/1.jpg': '可口可乐',
            'all/test/可口可乐/1.jpg': '可口可乐',
            'all/train/b c/2.jpg': 'b c',
        },
        'packaged',
        ['readme/x.jpg'],
    ),
    ('gpr1200', {}, {'images/0_a_b.jpg': '0', 'images/1199_001.jpg': '1199'}, 'general', []),
    (
        'inaturalist',
        {'train2018.json': '{}'},
        {
            'train_val2018/Aves/3174/014a31153ac74bf87f1f730480e4a27a.jpg': '3174',
            'train_val2018/Plantae/7477/3b60c9486db1d2ee875f11a669fbde4a.jpg': '7477',
        },
        'nature',
        ['test2018/a.jpg'],
    ),
    (
        'inaturalist-2021',
        {},
        {f'train/{WORM}/a.jpg': WORM, f'val/{WORM}/b.jpg': WORM},
        'nature',
        ['public_test/b.jpg'],
    ),
    (
        'stanford-cars',
        {'names.csv': 'AM General Hummer SUV 2000\n'},
        {
            'car_data/car_data/train/Acura RL Sedan 2012/00249.jpg': 'Acura RL Sedan 2012',
            'car_data/car_data/test/Acura RL Sedan 2012/00128.jpg': 'Acura RL Sedan 2012',
        },
        'cars',
        [],
    ),
    (
        'objectnet',
        {'objectnet-1.0/mappings/folder_to_objectnet_label.json': '{}'},
        {
            'objectnet-1.0/images/alarm_clock/0a.png': 'alarm_clock',
            'objectnet-1.0/images/backpack/1b.png': 'backpack',
        },
        'household',
        [],
    ),
    (
        'h-and-m',
        {'articles.csv': 'article_id,product_code\n0108775015,0108775\n'},
        {
            'images/010/0108775015.jpg': '0108775',
            'images/010/0108775044.jpg': '0108775',
            'images/095/0953763001.jpg': '0953763',
        },
        'apparel',
        [],
    ),
    ('guie-130k', {}, {'toys/1.jpg': 'toys', 'storefronts/2.jpg': 'storefronts'}, None, []),
    (
        'grocery-store',
        {'classes.csv': 'Class Name\n', 'train.txt': 'train/Fruit/Avocado/Avocado_001.jpg, 5, 3\n'},
        {
            'train/Fruit/Avocado/Avocado_001.jpg': 'Avocado',
            'test/Fruit/Avocado/Avocado_001.jpg': 'Avocado',
            'train/Packages/Milk/Arla-Milk/Arla-Milk_001.jpg': 'Arla-Milk',
        },
        'packaged',
        ['iconic-images-and-descriptions/Fruit/Avocado/Avocado_Iconic.jpg'],
    ),
]
LAYOUT_IDS = [f'{layout[0]}-{number}' for number, layout in enumerate(LAYOUTS)]


@pytest.mark.parametrize('name, tables, photos, domain, others', LAYOUTS, ids=LAYOUT_IDS)
def test_each_known_set_is_read_from_its_true_layout(tmp_path, name, tables, photos, domain, others):
    make(tmp_path, tables)
    make(tmp_path, [*photos, *others])
    frame = utilities.read_dataset(name, tmp_path)
    assert list(frame.columns) == ['path', 'label', 'domain']
    assert rows(frame, tmp_path) == {path: f'{name}/{label}' for path, label in photos.items()}
    assert all(os.path.isfile(path) and os.path.isabs(path) for path in frame['path'])
    if domain is None:
        assert [f'guie-130k/{kind}' for kind in frame['domain']] == list(frame['label'])
    else:
        assert set(frame['domain']) == {domain}


def test_every_known_set_has_a_layout_test():
    assert {layout[0] for layout in LAYOUTS} == set(utilities.DATASETS)


@pytest.mark.parametrize('name, tables, photos, domain, others', LAYOUTS, ids=LAYOUT_IDS)
def test_a_known_set_is_found_among_all_others_on_kaggle(tmp_path, name, tables, photos, domain, others):
    for other, *parts in LAYOUTS:
        if {other, name} not in ({'google-landmarks-v2', 'landmark-recognition-2020'},):  # the same layout
            home = (
                tmp_path / 'input' / ('zz-target' if parts[1] is photos else f'a-{other}-{len(str(parts))}')
            )
            make(home, parts[0])
            make(home, parts[1])
    frame = utilities.read_dataset(name.replace('-', ' ').title(), search=[tmp_path / 'input'])
    homes = {os.path.relpath(path, tmp_path / 'input').split(os.sep)[0] for path in frame['path']}
    assert len(homes) == 1 and (homes == {'zz-target'} or name in homes.pop())


@pytest.mark.parametrize('name', utilities.DATASETS)
def test_another_layout_gives_a_sentence_with_what_was_expected_and_found(tmp_path, name):
    make(tmp_path, ['elsewhere/photo.jpg', 'notes.txt'])
    with pytest.raises(FileNotFoundError) as error:
        utilities.read_dataset(name, tmp_path)
    message = str(error.value)
    assert (
        message.startswith(f'{name}: expected ') and 'found' in message and 'elsewhere, notes.txt' in message
    )
    assert '\n' not in message and message.endswith('root.')


def test_an_absent_search_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere \\(no such folder\\)'):
        utilities.read_dataset('food-101', search=[tmp_path / 'nowhere'])


def test_listed_photos_that_are_not_there_are_an_error_with_one_of_them(tmp_path):
    make(tmp_path, {'train.csv': 'name,class,group\n0.jpg,0,3\n'})
    with pytest.raises(FileNotFoundError, match=r'expected .*0\.jpg, found .*\(train\.csv\)'):
        utilities.read_dataset('products-10k', tmp_path)


# Class folders


def test_class_folders_give_labels_in_a_fixed_order_whatever_lies_beside(tmp_path):
    make(
        tmp_path / 'pets',
        [
            'dog/b.JPG',
            'dog/deep/a.png',
            'cat/z.webp',
            'cat/a.jpeg',
            'dog/notes.txt',
            'loose.jpg',
            '.cache/x/y.jpg',
            'cat/.hidden.jpg',
            'cat/Thumbs.db',
            '007/b.gif',
        ],
    )
    frame = utilities.read_dataset(tmp_path / 'pets')
    assert list(rows(frame, tmp_path / 'pets').items()) == [
        ('007/b.gif', '007'),
        ('cat/a.jpeg', 'cat'),
        ('cat/z.webp', 'cat'),
        ('dog/b.JPG', 'dog'),
        ('dog/deep/a.png', 'dog'),
    ]
    assert set(frame['domain']) == {'pets'}
    assert utilities.read_dataset(str(tmp_path / 'pets') + '/').equals(frame)


def test_linked_class_folders_are_followed(tmp_path):
    make(tmp_path, ['store/dog/a.jpg'])
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'dog').symlink_to(tmp_path / 'store' / 'dog')
    assert rows(utilities.read_dataset(tmp_path / 'data'), tmp_path / 'data') == {'dog/a.jpg': 'dog'}


@pytest.mark.parametrize('files, found', [([], 'empty'), (['a.jpg'], 'a.jpg'), (['dog/a.txt'], 'dog')])
def test_a_folder_without_class_folders_says_what_it_holds(tmp_path, files, found):
    make(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=f'<class>/<photo>.jpg, found .*\\({found}\\)'):
        utilities.read_dataset(tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        FileNotFoundError, match='imagenet is no folder, no CSV file and none of .*products-10k'
    ):
        utilities.read_dataset('imagenet')


# CSVs: bytes of the file, then either the rows that come out or the error

GOOD = {'images/a.jpg': 'cat', 'images/b.jpg': 'dog'}
TEXT = 'path,label\nimages/a.jpg,cat\nimages/b.jpg,dog\n'
CSVS = [
    ('plain', TEXT, GOOD),
    ('no newline at the end', TEXT[:-1], GOOD),
    ('windows newlines', TEXT.replace('\n', '\r\n'), GOOD),
    ('blank lines', TEXT.replace('\n', '\n\n'), GOOD),
    ('utf-8 with BOM', codecs.BOM_UTF8 + TEXT.encode(), GOOD),
    ('utf-16', TEXT.encode('utf-16'), GOOD),
    ('utf-16 big endian', codecs.BOM_UTF16_BE + TEXT.encode('utf-16-be'), GOOD),
    ('latin-1', TEXT.replace('cat', 'café').encode('latin-1'), {**GOOD, 'images/a.jpg': 'café'}),
    ('utf-8', TEXT.replace('cat', 'café').encode(), {**GOOD, 'images/a.jpg': 'café'}),
    ('other columns and order', 'x,label,path\n1,cat,images/a.jpg\n2,dog,images/b.jpg\n', GOOD),
    (
        'quoted',
        '"path","label"\n"images/a.jpg","cat, big"\n"images/b.jpg","dog"\n',
        {**GOOD, 'images/a.jpg': 'cat, big'},
    ),
    ('spaces after commas', TEXT.replace(',', ', '), GOOD),
    (
        'numbers as labels',
        TEXT.replace('cat', '007').replace('dog', '7'),
        {'images/a.jpg': '007', 'images/b.jpg': '7'},
    ),
    (
        'labels that look missing',
        TEXT.replace('cat', 'NA').replace('dog', 'null'),
        {'images/a.jpg': 'NA', 'images/b.jpg': 'null'},
    ),
    ('windows paths', TEXT.replace('/', '\\'), GOOD),
    ('dotted paths', TEXT.replace('images/a', './images/../images//a'), GOOD),
    ('a row twice', TEXT + 'images/a.jpg,cat\n', GOOD),
    ('a photo twice in two spellings', TEXT + './images/a.jpg,cat\n', GOOD),
    ('a path inside, absolute', TEXT + '{root}/images/c.jpg,cat\n', {**GOOD, 'images/c.jpg': 'cat'}),
    ('some photos missing', TEXT + 'images/lost.jpg,cat\n', {**GOOD, 'images/lost.jpg': 'cat'}),
    ('no label column', 'path,class\nimages/a.jpg,cat\n', 'lacks the column label; it has path, class'),
    ('no columns', 'images/a.jpg,cat\n', 'lacks the column label and path; it has images/a.jpg, cat'),
    ('semicolons', TEXT.replace(',', ';'), 'lacks the column label and path; it has path;label'),
    ('utf-16 without BOM', TEXT.encode('utf-16-le'), 'lacks the column|cannot be read as a table'),
    ('zero bytes', b'', 'cannot be read as a table: No columns'),
    ('0 rows', 'path,label\n', 'no row below the header'),
    (
        'a label missing',
        TEXT + 'images/c.jpg,\n',
        '1 of 3 rows lack a path, label or domain, the first is row 3',
    ),
    ('a path missing', TEXT + ',cat\n', '1 of 3 rows lack a path'),
    ('a short row', TEXT + 'images/c.jpg\n', '1 of 3 rows lack a path'),
    ('a long row', TEXT + 'images/c.jpg,cat,3\n', 'cannot be read as a table'),
    (
        'long rows from the first on',
        'path,label\nimages/a.jpg,cat,1\nimages/b.jpg,dog,2\n',
        'more fields than columns',
    ),
    ('an open quote', TEXT + '"images/c.jpg,cat\n', 'cannot be read as a table|rows lack'),
    ('one photo, two labels', TEXT + 'images/a.jpg,dog\n', 'path .*images/a.jpg has two labels, cat and dog'),
    (
        'one label, two domains',
        'path,label,domain\nimages/a.jpg,cat,x\nimages/b.jpg,cat,y\n',
        'label cat has two domains, x and y',
    ),
    ('a domain missing', 'path,label,domain\nimages/a.jpg,cat,x\nimages/b.jpg,dog,\n', '1 of 2 rows lack'),
    ('absolute path', TEXT + '/etc/hostname,cat\n', '/etc/hostname leaves the data root'),
    ('path out by ..', TEXT + '../secret.jpg,cat\n', 'secret.jpg leaves the data root'),
    ('path out by .. inside', TEXT + 'images/../../secret.jpg,cat\n', 'secret.jpg leaves the data root'),
    ('path out by backslashes', TEXT + '..\\secret.jpg,cat\n', 'secret.jpg leaves the data root'),
    ('sibling with the same beginning', TEXT + '{root}-other/a.jpg,cat\n', 'leaves the data root'),
    (
        'no photo exists',
        'path,label\npictures/a.jpg,cat\n',
        'expected .*pictures/a.jpg, found .*images, set.csv',
    ),
    (
        'a photo named set.csv',
        b'\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01' + bytes(range(256)),
        'lacks the column|cannot be',
    ),
]


@pytest.mark.parametrize('content, expected', [case[1:] for case in CSVS], ids=[case[0] for case in CSVS])
def test_a_csv_gives_its_rows_or_one_sentence(tmp_path, content, expected):
    root = tmp_path / 'data'
    make(root, ['images/a.jpg', 'images/b.jpg', 'images/c.jpg'])
    (tmp_path / 'secret.jpg').write_bytes(PHOTO)
    content = content.replace('{root}', str(root)).encode() if isinstance(content, str) else content
    (root / 'set.csv').write_bytes(content)
    if isinstance(expected, dict):
        frame = utilities.read_dataset(root / 'set.csv')
        assert list(rows(frame, root).items()) == list(expected.items())
        assert set(frame['domain']) == {'data'} and frame['label'].map(type).eq(str).all()
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
            utilities.read_dataset(root / 'set.csv')
        assert 'set.csv' in str(error.value) and '\n' not in str(error.value)
    assert (root / 'set.csv').read_bytes() == content and sorted(os.listdir(root)) == ['images', 'set.csv']


def test_dropped_repetitions_and_missing_photos_are_told(tmp_path, capsys):
    make(tmp_path, ['a.jpg'])
    (tmp_path / 'set.csv').write_text('path,label\na.jpg,x\na.jpg,x\nb.jpg,x\n')
    assert [os.path.basename(path) for path in utilities.read_dataset(tmp_path / 'set.csv')['path']] == ['a.jpg', 'b.jpg']
    said = capsys.readouterr().out
    assert '1 rows repeat a photo and were dropped' in said and '1 of 3 photos looked at do not exist' in said


def test_a_root_stands_in_for_the_folder_of_the_csv_and_domains_are_kept(tmp_path):
    make(tmp_path, ['photos/a.jpg', 'photos/b.jpg'])
    make(tmp_path, {'lists/set.csv': 'path,label,domain\na.jpg,cat,pets\nb.jpg,cup,things\n'})
    frame = utilities.read_dataset(tmp_path / 'lists/set.csv', tmp_path / 'photos')
    assert rows(frame, tmp_path / 'photos') == {'a.jpg': 'cat', 'b.jpg': 'cup'}
    assert list(frame['domain']) == ['pets', 'things']


def test_the_whole_disk_can_be_the_root(tmp_path):
    make(tmp_path, ['a.jpg'])
    (tmp_path / 'set.csv').write_text(f'path,label\n{tmp_path}/a.jpg,cat\n')
    assert list(utilities.read_dataset(tmp_path / 'set.csv', '/')['path']) == [str(tmp_path / 'a.jpg')]


def test_a_long_csv_is_not_checked_file_by_file(tmp_path, monkeypatch):
    make(tmp_path, ['0.jpg'])
    lines = ['path,label', *(f'{number}.jpg,{number % 999}' for number in range(200_000))]
    (tmp_path / 'set.csv').write_text('\n'.join(lines))
    asked = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, 'exists', lambda path: asked.append(path) or exists(path))
    assert len(utilities.read_dataset(tmp_path / 'set.csv')) == 200_000
    assert len(asked) <= 64


# Selection


def frame_of(counts, domain='things'):
    return pd.DataFrame(
        [
            (f'/{domain}/{label}/{number:03d}.jpg', label, domain)
            for label, count in counts.items()
            for number in range(count)
        ],
        columns=['path', 'label', 'domain'],
    )


def test_classes_are_drawn_before_the_small_ones_are_dropped():
    frame = frame_of({f'{number:02d}': 2 if number % 2 else 9 for number in range(40)})
    sizes = [
        utilities.select_classes(frame, n_classes=20, seed=seed)['label'].nunique() for seed in range(20)
    ]
    assert min(sizes) < 10 < max(sizes) and max(sizes) < 20  # dropping first would always leave 20
    assert np.mean(sizes) == pytest.approx(10, abs=1)


def test_the_draw_is_made_in_each_domain():
    frame = pd.concat(
        [frame_of({f'a{n}': 5 for n in range(30)}, 'a'), frame_of({f'b{n}': 5 for n in range(9)}, 'b')]
    )
    counts = utilities.select_classes(frame, n_classes=7).groupby('domain')['label'].nunique()
    assert dict(counts) == {'a': 7, 'b': 7}


def test_every_class_keeps_between_min_and_max_images():
    frame = frame_of({'one': 1, 'three': 3, 'four': 4, 'fifty': 50, 'many': 120})
    selection = utilities.select_classes(frame)
    assert dict(selection['label'].value_counts()) == {'fifty': 50, 'many': 50, 'four': 4}
    assert set(selection['path']) <= set(frame['path']) and selection['path'].is_unique


def test_images_of_a_large_class_are_sampled_evenly():
    frame = frame_of({'many': 40})
    taken = sum(
        frame['path'].isin(utilities.select_classes(frame, max_images=10, seed=seed)['path']).astype(int)
        for seed in range(100)
    )
    assert 5 < taken.min() and taken.max() < 52  # 25 each on average, 4.5 standard deviations


def test_the_selection_depends_on_the_seed_and_not_on_the_order_of_rows():
    frame = pd.concat(
        [frame_of({f'a{n}': n for n in range(30)}, 'a'), frame_of({f'b{n}': n for n in range(30)}, 'b')]
    )
    first = utilities.select_classes(frame, max_images=8, n_classes=20, seed=5)
    again = utilities.select_classes(frame.sample(frac=1, random_state=1), max_images=8, n_classes=20, seed=5)
    other = utilities.select_classes(frame, max_images=8, n_classes=20, seed=6)
    assert first.equals(again) and not first.equals(other)
    assert first.equals(first.sort_values(['domain', 'label', 'path'], ignore_index=True))


def test_more_classes_than_there_are_takes_all_and_says_so(capsys):
    selection = utilities.select_classes(frame_of({'a': 4, 'b': 5}), n_classes=9691)
    assert selection['label'].nunique() == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0] == 'things: 9,691 classes asked for, all 2 taken'
    assert (
        said[1] == f'9 photos of 2 classes (2 things), digest {utilities.digest(selection)}'
        and len(said) == 2
    )


@pytest.mark.parametrize('frame', [frame_of({'a': 3}), frame_of({})], ids=['small classes', 'no rows'])
def test_nothing_left_is_an_error(frame):
    with pytest.raises(ValueError, match='No class has 4 photos'):
        utilities.select_classes(frame)


def test_one_label_in_two_concatenated_domains_is_refused():
    with pytest.raises(ValueError, match='label 1 has two domains, cars and toys'):
        utilities.select_classes(pd.concat([frame_of({'1': 5}, 'cars'), frame_of({'1': 5}, 'toys')]))


@pytest.mark.parametrize('fraction, held', [(0.25, 2), (0.01, 1), (0.99, 7)])
def test_a_split_by_class_shares_no_label_and_loses_no_photo(fraction, held):
    frame = frame_of({f'{n}': n + 1 for n in range(8)})
    rest, out = utilities.split_by_class(frame, fraction, seed=1)
    assert not set(rest['label']) & set(out['label']) and out['label'].nunique() == held
    assert sorted([*rest['path'], *out['path']]) == sorted(frame['path'])
    shuffled = utilities.split_by_class(frame.sample(frac=1, random_state=0), fraction, seed=1)[1]
    assert set(shuffled['label']) == set(out['label'])


@pytest.mark.parametrize('labels, fraction', [({'a': 3}, 0.5), ({'a': 1, 'b': 1}, 0), ({'a': 1, 'b': 1}, 1)])
def test_a_split_that_would_leave_nothing_is_refused(labels, fraction):
    with pytest.raises(ValueError, match='A split needs 2 labels and a fraction in 0…1'):
        utilities.split_by_class(frame_of(labels), fraction)


def test_the_digest_tells_selections_apart_but_not_machines():
    frame = frame_of({'a': 3, 'b': 4})
    elsewhere = frame.assign(path='/kaggle/input' + frame['path']).sample(frac=1, random_state=0)
    assert utilities.digest(frame) == utilities.digest(elsewhere) and len(utilities.digest(frame)) == 12
    changed = [
        frame.iloc[1:],
        frame.assign(label=frame['label'].replace('a', 'c')),
        frame.assign(path=frame['path'].str.replace('000', '009')),
    ]
    assert len({utilities.digest(other) for other in [frame, *changed]}) == 4


def test_at_full_size_a_limited_number_of_classes_is_held_out_of_training(tmp_path):
    rows = [(f'{label}/{number}.jpg', f'{label:03d}') for label in range(200) for number in range(6)]
    pd.DataFrame(rows, columns=['path', 'label']).to_csv(tmp_path / 'all.csv', index=False)
    make(tmp_path, [path for path, _ in rows])
    for limits, count in (({}, 20), ({'most_held_out': 5}, 5)):
        frames = utilities.load_data(str(tmp_path / 'all.csv'), config=utilities.Config(), **limits)
        held = [set(frames[name]['label']) for name in ('query', 'selection_query')]
        trained = set(frames['train']['label'])
        assert len(held[0]) == count and held[0].isdisjoint(held[1]) and len(trained) == 200 - len(held[0] | held[1])
        assert abs(len(held[1]) - count) <= 2 and trained.isdisjoint(held[0] | held[1])
        assert set(frames['index']['label']) == held[0] and len(frames['index']) == 2 * len(frames['query'])


def test_kaggles_folder_of_inputs_is_searched_unless_another_is_given():
    assert inspect.signature(utilities.read_dataset).parameters['search'].default == ('/kaggle/input',)


# The frames of a run


def write_set(folder, name, counts):
    make(folder, [f'photos/{label}/{number}.jpg' for label, count in counts.items() for number in range(count)])
    lines = [f'photos/{label}/{number}.jpg,{label}' for label, count in counts.items() for number in range(count)]
    (folder / f'{name}.csv').write_text('\n'.join(['path,label', *lines]) + '\n')
    return str(folder / f'{name}.csv')


def small(**changes):
    return utilities.Config().override(**{'n_classes': 100, 'max_images': 6, 'pca_images': 20, **changes})


def test_what_is_not_given_is_held_out_of_the_training_classes_and_no_photograph_stands_in_two_frames(tmp_path):
    source = write_set(tmp_path, 'train', {f'c{n:02d}': 6 for n in range(30)})
    frames = utilities.load_data(source, config=small())
    labels = {name: set(frame['label']) for name, frame in frames.items()}
    assert labels['query'] == labels['index'] and labels['selection_query'] == labels['selection_index']
    apart = [labels['train'], labels['query'], labels['selection_query']]
    assert [len(part) for part in apart] == [24, 3, 3] and len(set.union(*apart)) == 30
    paths = pd.concat([frames[name] for name in frames if name != 'pca'])['path']
    assert paths.is_unique and len(paths) == 180
    assert len(frames['query']) == 6 and len(frames['index']) == 12  # of each class's six one in three is a query
    assert len(frames['pca']) == 20 and set(frames['pca']['path']) <= set(frames['train']['path'])
    again, other = (utilities.load_data(source, config=small(**seeds)) for seeds in ({'seed': 6}, {'data_seed': 6}))
    assert all(again[name].equals(frames[name]) for name in frames)  # ingredients share classes and held-out objects
    assert not other['query'].equals(frames['query'])


def test_photographs_of_a_table_may_lie_elsewhere(tmp_path):
    write_set(tmp_path / 'photographs', 'train', {'x': 5, 'y': 5, 'z': 5})
    absolute = utilities.read_dataset(tmp_path / 'photographs/train.csv').drop(columns='domain')
    (tmp_path / 'tables').mkdir()
    shutil.copy(tmp_path / 'photographs/train.csv', tmp_path / 'tables/relative.csv')
    absolute.to_csv(tmp_path / 'tables/absolute.csv', index=False)
    for name, root in (('relative', tmp_path / 'photographs'), ('absolute', '/')):
        source = str(tmp_path / f'tables/{name}.csv')
        with pytest.raises((ValueError, FileNotFoundError), match='ROOT'):
            utilities.load_data(source, source, source, (source, source), config=small())
        frames = utilities.load_data(source, source, source, (source, source), config=small(), root=root)
        assert set(frames['query']['path']) == set(absolute['path'])


def test_frames_that_are_given_are_taken_as_they_are_and_shared_classes_are_named(tmp_path, capsys):
    train = write_set(tmp_path / 'a', 'train', {'x': 5, 'y': 5, 'seen': 5})
    other = write_set(tmp_path / 'b', 'query', {'seen': 1, 'z': 2})
    frames = utilities.load_data([train, write_set(tmp_path / 'c', 'more', {'w': 9})], other, other, (other, other),
                                 config=small())
    assert set(frames['train']['label']) == {'x', 'y', 'seen', 'w'} and len(frames['train']) == 21  # at most 6 of w
    assert len(frames['query']) == len(frames['selection_index']) == 3
    said = capsys.readouterr().out
    assert '1 of the classes in query are trained on too' in said and 'first seen' in said
    described = utilities.describe(frames)
    assert described.loc['train', 'photographs'] == 21 and described.loc['query', 'classes'] == 2
    assert described.loc['train', 'digest'] == utilities.digest(frames['train'])


def test_a_query_without_an_index_is_one_sentence(tmp_path):
    train = write_set(tmp_path, 'train', {'x': 5, 'y': 5})
    with pytest.raises(ValueError, match='query and index belong together: give both, or neither'):
        utilities.load_data(train, train, config=small())
    with pytest.raises(ValueError, match='selection_query and selection_index belong together'):
        utilities.load_data(train, train, train, (train, None), config=small())


def test_a_label_seen_once_is_not_trained_on_and_as_a_query_left_out_aloud(tmp_path, capsys):
    train = write_set(tmp_path / 'a', 'train', {'x': 5, 'once': 1})
    query = write_set(tmp_path / 'b', 'query', {'seen': 2, 'once': 1})
    index = write_set(tmp_path / 'c', 'index', {'seen': 3})
    frames = utilities.load_data(train, query, index, (query, index), config=small())
    assert set(frames['train']['label']) == {'x'}
    vectors = {name: np.ones((len(frames[name]), 4), np.float32) for name in ('query', 'index')}
    assert utilities.score_table('s', 'm', vectors, frames, dims=(None,))['mp5'].tolist() == [1]
    assert '1 of 3 queries have no image of their object in the index: left out' in capsys.readouterr().out


def test_every_photograph_below_a_folder_is_listed_however_it_is_arranged(tmp_path):
    make(tmp_path, ['b.JPG', 'deep/er/a.png', 'notes.txt', 'deep/c.webp'])
    frame = utilities.list_photos(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in frame['path']] == ['b.JPG', 'deep/c.webp', 'deep/er/a.png']
    assert frame['label'].tolist() == [tmp_path.name, 'deep', 'er']
    for folder in (tmp_path / 'none', tmp_path / 'deep/er/a.png'):
        with pytest.raises(FileNotFoundError, match=f'{folder} holds no photographs'):
            utilities.list_photos(folder)
