"""Known data sets, folders of class folders and CSVs become one table of path, label, domain, or one sentence."""
import codecs
import json
import os

import pytest

from guie.datasets import DATASETS, list_images, read_dataset
from tests.worlds import NO_IMAGE, write_files


def rows(frame, root):
    """{path below root: label}"""
    return dict(zip((os.path.relpath(path, root) for path in frame['path']), frame['label'], strict=True))


SHIRT = 'img/TOPS/T_Shirt/id_00003186'
WORM = '00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris'
LAYOUTS = [  # name, label files, images with the label each must get, domain, files that are no samples
    (
        'products-10k',
        {'train.csv': 'name,class,group\n0.jpg,0,3\n1.jpg,17,3\n'},
        {'train/0.jpg': '0', 'train/1.jpg': '17'},
        'packaged',
        ['test/7.jpg'],
    ),
    ('products-10k', {'train.csv': 'name,class,group\n0.jpg,0,3\n'}, {'train/train/0.jpg': '0'}, 'packaged', []),
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
        {'train/1/7/6/17660ef415d37059.jpg': '1', 'train/9/2/b/92b6290d571448f6.jpg': '1', 'train/c/d/0/cd0.jpg': '2'},
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
        {'all/train/可口可乐/1.jpg': '可口可乐', 'all/test/可口可乐/1.jpg': '可口可乐', 'all/train/b c/2.jpg': 'b c'},
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
    ('inaturalist-2021', {}, {f'train/{WORM}/a.jpg': WORM, f'val/{WORM}/b.jpg': WORM}, 'nature', ['public_test/b.jpg']),
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
        {'objectnet-1.0/images/alarm_clock/0a.png': 'alarm_clock', 'objectnet-1.0/images/backpack/1b.png': 'backpack'},
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


@pytest.mark.parametrize('name, tables, images, domain, others', LAYOUTS, ids=LAYOUT_IDS)
def test_each_known_set_is_read_from_its_true_layout(tmp_path, name, tables, images, domain, others):
    write_files(tmp_path, tables)
    write_files(tmp_path, [*images, *others])
    frame = read_dataset(name, tmp_path)
    assert list(frame.columns) == ['path', 'label', 'domain']
    assert rows(frame, tmp_path) == {path: f'{name}/{label}' for path, label in images.items()}
    assert all(os.path.isfile(path) and os.path.isabs(path) for path in frame['path'])
    if domain is None:
        assert [f'guie-130k/{kind}' for kind in frame['domain']] == list(frame['label'])
    else:
        assert set(frame['domain']) == {domain}


def test_every_known_set_has_a_layout_test():
    assert {layout[0] for layout in LAYOUTS} == set(DATASETS)


@pytest.mark.parametrize('name, tables, images, domain, others', LAYOUTS, ids=LAYOUT_IDS)
def test_a_known_set_is_found_among_all_others_on_kaggle(tmp_path, name, tables, images, domain, others):
    for other, *parts in LAYOUTS:
        if {other, name} not in ({'google-landmarks-v2', 'landmark-recognition-2020'},):  # the same layout
            home = tmp_path / 'input' / ('zz-target' if parts[1] is images else f'a-{other}-{len(str(parts))}')
            write_files(home, parts[0])
            write_files(home, parts[1])
    frame = read_dataset(name.replace('-', ' ').title(), search=[tmp_path / 'input'])
    homes = {os.path.relpath(path, tmp_path / 'input').split(os.sep)[0] for path in frame['path']}
    assert len(homes) == 1 and (homes == {'zz-target'} or name in homes.pop())


@pytest.mark.parametrize('name', DATASETS)
def test_another_layout_gives_a_sentence_with_what_was_expected_and_found(tmp_path, name):
    write_files(tmp_path, ['elsewhere/image.jpg', 'notes.txt'])
    with pytest.raises(FileNotFoundError) as error:
        read_dataset(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f'{name}: expected ') and 'found' in message and 'elsewhere, notes.txt' in message
    assert '\n' not in message and message.endswith('give its folder as the root of DATA.')


def test_an_absent_search_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere \\(no such folder\\)'):
        read_dataset('food-101', search=[tmp_path / 'nowhere'])


def test_listed_images_that_are_not_there_are_an_error_with_one_of_them(tmp_path):
    write_files(tmp_path, {'train.csv': 'name,class,group\n0.jpg,0,3\n'})
    with pytest.raises(FileNotFoundError, match=r'expected .*0\.jpg, found .*\(train\.csv\)'):
        read_dataset('products-10k', tmp_path)


SHOPEE = 'posting_id,image,image_phash,title,label_group\n'
MET = '[{"id": 12, "path": "MET/12/0.jpg"}]'
BESIDE = {  # what lies beside products-10k, and before it
    'an empty file': {'train.csv': ''},
    'a header alone': {'train.csv': 'name,class\n'},
    'a file of another set': {'train.csv': 'id,landmark_id\n1,2\n'},
    'no table': {'train.csv': '\0\1,\n"'},
    'a folder of that name': {'train.csv/train.csv': 'name,class\n'},
    'the list without its images': {'train.csv': 'name,class\n0.jpg,1\n'},
    'a list with an empty cell': {'train.csv': 'name,class\n0.jpg,\n'},
    'nothing': {},
}


@pytest.mark.parametrize('beside', BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_a_known_set_does_not_end_the_search(tmp_path, beside):
    write_files(tmp_path / 'in/a', beside)
    write_files(tmp_path / 'in/z', {'train.csv': 'name,class\n0.jpg,1\n', 'train/0.jpg': ''})
    frame = read_dataset('products-10k', search=[tmp_path / 'in'])
    assert rows(frame, tmp_path / 'in/z') == {'train/0.jpg': 'products-10k/1'}


@pytest.mark.parametrize('name, beside, image', [
    ('inaturalist', 'train_val2018.json', 'train_val2018/Aves/3174/1.jpg'),
    ('food-101', 'meta/classes.txt', 'images/apple_pie/1.jpg'),
    ('h-and-m', 'articles.csv', 'images/010/0108775015.jpg'),
    ('guie-130k', 'storefronts', 'storefronts/1.jpg'),
    ('met', 'MET_database.json', 'MET/12/0.jpg'),
    ('objectnet', 'mappings/folder_to_objectnet_label.json', 'images/bench/1.png')])
def test_a_file_of_another_set_that_is_named_alike_does_not_end_the_search(tmp_path, name, beside, image):
    write_files(tmp_path / 'in/a', [beside])
    write_files(tmp_path / 'in/z', {image: '', **({'MET_database.json': MET} if name == 'met' else
                                                  {beside: ''} if '.' in beside else {})})
    assert list(rows(read_dataset(name, search=[tmp_path / 'in']), tmp_path / 'in/z')) == [image]


@pytest.mark.parametrize('call', ['scandir', 'listdir'])
def test_an_unreadable_folder_beside_a_known_set_does_not_end_the_search(tmp_path, monkeypatch, call):
    write_files(tmp_path / 'in', ['locked/x.jpg', 'z/images/apple_pie/1.jpg', 'z/meta/classes.txt'])
    original = getattr(os, call)

    def refuse(path='.'):
        if str(path).endswith('locked'):
            raise PermissionError(13, 'Permission denied', path)
        return original(path)

    monkeypatch.setattr(os, call, refuse)
    assert len(read_dataset('food-101', search=[tmp_path / 'in'])) == 1
    with pytest.raises(FileNotFoundError, match='met: expected '):
        read_dataset('met', search=[tmp_path / 'in/locked'])


@pytest.mark.parametrize('files, said', [
    ({'train.csv': ''}, r'train\.csv cannot be read as a table: No columns'),
    ({'train.csv': SHOPEE}, r'train\.csv lists no image'),
    ({'train.csv': SHOPEE + '1,a.jpg,p,x,\n'}, r'1 of 1 rows lack a path'),
    ({'train.csv': SHOPEE + '1,a.jpg,p,x,2\n'}, r'expected .*train_images/a\.jpg, found .*')])
def test_a_known_set_that_is_damaged_says_how(tmp_path, files, said):
    write_files(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=said) as error:
        read_dataset('shopee', tmp_path)
    assert str(error.value).startswith('shopee: expected train.csv') and '\n' not in str(error.value)


def test_images_of_a_known_set_with_two_labels_are_dropped_and_counted(tmp_path, capsys):
    write_files(tmp_path, {'train.csv': SHOPEE + '1,a.jpg,p,x,11\n2,a.jpg,p,x,12\n3,b.jpg,q,y,12\n4,b.jpg,q,z,12\n'
                           '5,c.jpg,q,y,13\n', **{f'train_images/{name}.jpg': '' for name in 'abc'}})
    frame = read_dataset('shopee', tmp_path)
    assert rows(frame, tmp_path / 'train_images') == {'b.jpg': 'shopee/12', 'c.jpg': 'shopee/13'}
    said = capsys.readouterr().out
    assert 'shopee: 2 rows have another label in another row and were dropped\n' in said
    assert 'shopee: 1 rows repeat an image and were dropped\n' in said


@pytest.mark.parametrize('name, table, images', [
    ('products-10k', 'name,class\n0.jpg,1\n0.jpg,2\n1.jpg,2\n', ['train/0.jpg', 'train/1.jpg']),
    ('google-landmarks-v2-clean', 'landmark_id,images\n1,aaa\n2,aaa bbb\n',
     ['train/a/a/a/aaa.jpg', 'train/b/b/b/bbb.jpg']),
    ('stanford-online-products', 'image_id class_id super_class_id path\n1 1 1 a/0.JPG\n2 2 1 a/0.JPG\n3 2 1 a/1.JPG\n',
     ['a/0.JPG', 'a/1.JPG']),
    ('deepfashion-in-shop', '2\nimage_name item_id evaluation_status\nimg/0.jpg 1 train\nimg/0.jpg 2 query\n'
     'img/1.jpg 2 query\n', ['img/0.jpg', 'img/1.jpg'])])
def test_so_are_those_of_any_other_known_set(tmp_path, name, table, images):
    write_files(tmp_path, {DATASETS[name].telltale: table, **dict.fromkeys(images, '')})
    assert read_dataset(name, tmp_path)[['path', 'label']].to_numpy().tolist() == [[str(tmp_path / images[1]), f'{name}/2']]


def test_an_image_in_two_parts_of_inaturalist_2021_is_one(tmp_path, capsys):
    write_files(tmp_path, [f'train/{WORM}/a.jpg', f'train/{WORM}/b.jpg', f'train_mini/{WORM}/a.jpg', f'val/{WORM}/c.jpg'])
    frame = read_dataset('inaturalist-2021', tmp_path)
    assert list(rows(frame, tmp_path)) == [f'train/{WORM}/a.jpg', f'train/{WORM}/b.jpg', f'val/{WORM}/c.jpg']
    assert '1 rows repeat an image in another folder and were dropped' in capsys.readouterr().out


# Class folders


def test_class_folders_give_labels_in_a_fixed_order_whatever_lies_beside(tmp_path):
    write_files(tmp_path / 'pets', [
        'dog/b.JPG', 'dog/deep/a.png', 'cat/z.webp', 'cat/a.jpeg', 'dog/notes.txt', 'loose.jpg', '.cache/x/y.jpg',
        'cat/.hidden.jpg', 'cat/Thumbs.db', '007/b.gif'])
    frame = read_dataset(tmp_path / 'pets')
    assert list(rows(frame, tmp_path / 'pets').items()) == [
        ('007/b.gif', '007'), ('cat/a.jpeg', 'cat'), ('cat/z.webp', 'cat'), ('dog/b.JPG', 'dog'), ('dog/deep/a.png', 'dog')]
    assert set(frame['domain']) == {'pets'}
    assert read_dataset(str(tmp_path / 'pets') + '/').equals(frame)


def test_linked_class_folders_are_followed(tmp_path):
    write_files(tmp_path, ['store/dog/a.jpg'])
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'dog').symlink_to(tmp_path / 'store' / 'dog')
    assert rows(read_dataset(tmp_path / 'data'), tmp_path / 'data') == {'dog/a.jpg': 'dog'}


@pytest.mark.parametrize('files, found', [([], 'empty'), (['a.jpg'], 'a.jpg'), (['dog/a.txt'], 'dog')])
def test_a_folder_without_class_folders_says_what_it_holds(tmp_path, files, found):
    write_files(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=f'<class>/<image>.jpg, found .*\\({found}\\)'):
        read_dataset(tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match='imagenet is no folder, no CSV file and none of .*products-10k'):
        read_dataset('imagenet')
    with pytest.raises(FileNotFoundError, match='^products10k is no folder.* Did you mean products-10k[?]$'):
        read_dataset('products10k')


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
    ('quoted', '"path","label"\n"images/a.jpg","cat, big"\n"images/b.jpg","dog"\n', {**GOOD, 'images/a.jpg': 'cat, big'}),
    ('spaces after labels', TEXT.replace('cat', 'cat ') + 'images/c.jpg,cat\n', {**GOOD, 'images/c.jpg': 'cat'}),
    ('spaces of every kind', TEXT.replace('cat', '\t cat\u00a0') + 'images/c.jpg,\u3000cat\n', {
        **GOOD, 'images/c.jpg': 'cat'}),
    ('spaces in quotes', TEXT.replace('cat', '" cat "'), GOOD),
    ('spaces around paths', TEXT.replace('images/b.jpg', ' images/b.jpg '), GOOD),
    ('spaces in the header', TEXT.replace('path,label', ' path , label '), GOOD),
    ('quoted spaces in the header', TEXT.replace('path,label', '"path","label "'), GOOD),
    ('spaces in a domain', 'path,label,domain\nimages/a.jpg,cat,data \nimages/b.jpg,dog,data\n', GOOD),
    ('a label of spaces', TEXT + 'images/c.jpg,"  "\n', '1 of 3 rows lack a path, label or domain, the first is row 3'),
    ('a path of spaces', TEXT + '" ",cat\n', '1 of 3 rows lack a path'),
    ('a column twice but for a space', 'path,label,label \nimages/a.jpg,cat,dog\n', 'has two columns label; delete or'),
    ('spaces after commas', TEXT.replace(',', ', '), GOOD),
    ('numbers as labels', TEXT.replace('cat', '007').replace('dog', '7'), {'images/a.jpg': '007', 'images/b.jpg': '7'}),
    (
        'labels that look missing',
        TEXT.replace('cat', 'NA').replace('dog', 'null'),
        {'images/a.jpg': 'NA', 'images/b.jpg': 'null'},
    ),
    ('windows paths', TEXT.replace('/', '\\'), GOOD),
    ('dotted paths', TEXT.replace('images/a', './images/../images//a'), GOOD),
    ('a row twice', TEXT + 'images/a.jpg,cat\n', GOOD),
    ('an image twice in two spellings', TEXT + './images/a.jpg,cat\n', GOOD),
    ('a path inside, absolute', TEXT + '{root}/images/c.jpg,cat\n', {**GOOD, 'images/c.jpg': 'cat'}),
    ('some images missing', TEXT + 'images/lost.jpg,cat\n', {**GOOD, 'images/lost.jpg': 'cat'}),
    ('no label column', 'path,class\nimages/a.jpg,cat\n', 'lacks the column label; it has path, class'),
    ('no columns', 'images/a.jpg,cat\n', 'lacks the column label and path; it has images/a.jpg, cat'),
    ('semicolons', TEXT.replace(',', ';'), GOOD),
    ('tabs', TEXT.replace(',', '\t'), GOOD),
    ('a semicolon in a label', TEXT.replace('cat', 'cat; small'), {**GOOD, 'images/a.jpg': 'cat; small'}),
    ('utf-16 without BOM', TEXT.encode('utf-16-le'), 'lacks the column|cannot be read as a table'),
    ('zero bytes', b'', 'cannot be read as a table: No columns'),
    ('0 rows', 'path,label\n', 'no row below the header'),
    ('a label missing', TEXT + 'images/c.jpg,\n', '1 of 3 rows lack a path, label or domain, the first is row 3'),
    ('a path missing', TEXT + ',cat\n', '1 of 3 rows lack a path'),
    ('a short row', TEXT + 'images/c.jpg\n', '1 of 3 rows lack a path'),
    ('a long row', TEXT + 'images/c.jpg,cat,3\n', 'cannot be read as a table'),
    ('long rows from the first on', 'path,label\nimages/a.jpg,cat,1\nimages/b.jpg,dog,2\n', 'more fields than columns'),
    ('an open quote', TEXT + '"images/c.jpg,cat\n', 'cannot be read as a table|rows lack'),
    ('one image, two labels', TEXT + 'images/a.jpg,dog\n', 'path .*images/a.jpg has two labels, cat and dog'),
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
    ('no image exists', 'path,label\npictures/a.jpg,cat\n', 'expected .*pictures/a.jpg, found .*images, set.csv'),
    ('an image named set.csv', b'\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01' + bytes(range(256)), 'lacks the column|cannot be'),
]


@pytest.mark.parametrize('content, expected', [case[1:] for case in CSVS], ids=[case[0] for case in CSVS])
def test_a_csv_gives_its_rows_or_one_sentence(tmp_path, content, expected):
    root = tmp_path / 'data'
    write_files(root, ['images/a.jpg', 'images/b.jpg', 'images/c.jpg'])
    (tmp_path / 'secret.jpg').write_bytes(NO_IMAGE)
    content = content.replace('{root}', str(root)).encode() if isinstance(content, str) else content
    (root / 'set.csv').write_bytes(content)
    if isinstance(expected, dict):
        frame = read_dataset(root / 'set.csv')
        assert list(rows(frame, root).items()) == list(expected.items())
        assert set(frame['domain']) == {'data'} and frame['label'].map(type).eq(str).all()
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
            read_dataset(root / 'set.csv')
        assert 'set.csv' in str(error.value) and '\n' not in str(error.value)
    assert (root / 'set.csv').read_bytes() == content and sorted(os.listdir(root)) == ['images', 'set.csv']


def test_dropped_repetitions_and_missing_images_are_told(tmp_path, capsys):
    write_files(tmp_path, ['a.jpg'])
    (tmp_path / 'set.csv').write_text('path,label\na.jpg,x\na.jpg,x\nb.jpg,x\n')
    assert [os.path.basename(path) for path in read_dataset(tmp_path / 'set.csv')['path']] == ['a.jpg', 'b.jpg']
    said = capsys.readouterr().out
    assert '1 rows repeat an image and were dropped' in said and '1 of 3 images looked at do not exist' in said


def test_a_root_stands_in_for_the_folder_of_the_csv_and_domains_are_kept(tmp_path):
    write_files(tmp_path, ['images/a.jpg', 'images/b.jpg'])
    write_files(tmp_path, {'lists/set.csv': 'path,label,domain\na.jpg,cat,pets\nb.jpg,cup,things\n'})
    frame = read_dataset(tmp_path / 'lists/set.csv', tmp_path / 'images')
    assert rows(frame, tmp_path / 'images') == {'a.jpg': 'cat', 'b.jpg': 'cup'}
    assert list(frame['domain']) == ['pets', 'things']


@pytest.mark.parametrize('text', [
    '[{"path": "a.jpg", "label": "cat"}, {"path', '[1', '', '"text"', '3', 'null', '{"path": "a.jpg", "label": "cat"}', '[]',
    '[{"path": "a.jpg"}]', '[{"path": "a.jpg", "label": null}]', '[{"path": "a.jpg", "label": " "}]', '<html>'])
def test_a_json_that_cannot_be_used_is_one_sentence_with_its_name(tmp_path, text):
    write_files(tmp_path, {'a.jpg': '', 'set.json': text})
    with pytest.raises(ValueError, match=f'^{tmp_path}/set.json') as error:
        read_dataset(tmp_path / 'set.json')
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_a_json_may_be_a_label_file_too(tmp_path):
    text = '[{"path": "a.jpg", "label": "cat "}, {"path": "b.jpg", "label": 7}]'
    write_files(tmp_path, {'a.jpg': '', 'b.jpg': '', 'set.json': text})
    assert rows(read_dataset(tmp_path / 'set.json'), tmp_path) == {'a.jpg': 'cat', 'b.jpg': '7'}


@pytest.mark.parametrize('names', [('可乐', '茶', 'a'), ('бык', 'кот', 'a'), ('カ', '茶', 'a'), ('é', 'ü', 'a')])
@pytest.mark.parametrize('page', ['gbk', 'cp437', 'cp866', 'shift-jis', 'latin-1'])
def test_names_that_are_not_utf_8_are_read_from_folders_and_from_a_csv_in_their_code_page(tmp_path, names, page, capsys):
    try:
        names = [os.fsdecode(name.encode(page)) for name in names]
    except UnicodeEncodeError:
        return  # a code page without these letters
    write_files(tmp_path / 'set', [f'{name}/1.jpg' for name in names] + [f'{names[0]}/{names[1]}.jpg'])
    frame = read_dataset(tmp_path / 'set')
    assert len(frame) == 4 and all(map(os.path.isfile, frame['path'])) and set(frame['label']) == {*names}
    assert list_images(tmp_path / 'set')['path'].tolist() == frame['path'].tolist()
    (tmp_path / 'set.csv').write_bytes(b'path,label\n' + b''.join(os.fsencode(f'{name}/1.jpg,{name}\n') for name in names))
    listed = read_dataset(tmp_path / 'set.csv', tmp_path / 'set')
    assert {*listed['path']} < {*frame['path']} and len(listed) == 3 and listed['label'].nunique() == 3
    assert not capsys.readouterr().out


def test_texts_can_hold_any_name_whatever_else_is_installed(tmp_path):
    write_files(tmp_path, ['set/cat/1.jpg'])
    for frame in (read_dataset(tmp_path / 'set'), list_images(tmp_path)):
        assert getattr(frame['path'].dtype, 'storage', 'python') == 'python'  # pyarrow's raises UnicodeEncodeError


def test_the_whole_disk_can_be_the_root(tmp_path):
    write_files(tmp_path, ['a.jpg'])
    (tmp_path / 'set.csv').write_text(f'path,label\n{tmp_path}/a.jpg,cat\n')
    assert list(read_dataset(tmp_path / 'set.csv', '/')['path']) == [str(tmp_path / 'a.jpg')]


def test_a_long_csv_is_not_checked_file_by_file(tmp_path, monkeypatch):
    write_files(tmp_path, ['0.jpg'])
    lines = ['path,label', *(f'{number}.jpg,{number % 999}' for number in range(200_000))]
    (tmp_path / 'set.csv').write_text('\n'.join(lines))
    asked = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, 'isfile', lambda path: asked.append(path) or isfile(path))
    assert len(read_dataset(tmp_path / 'set.csv')) == 200_000
    assert len(asked) <= 130


def test_kaggles_folder_of_inputs_is_searched_unless_another_is_given():
    with pytest.raises(FileNotFoundError, match='^food-101: expected .*, found /kaggle/input '):
        read_dataset('food-101')


# Folders of images without classes


def test_every_image_below_a_folder_is_listed_however_it_is_arranged(tmp_path):
    write_files(tmp_path, ['b.JPG', 'deep/er/a.png', 'notes.txt', 'deep/c.webp'])
    frame = list_images(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in frame['path']] == ['b.JPG', 'deep/c.webp', 'deep/er/a.png']
    assert frame['label'].tolist() == [tmp_path.name, 'deep', 'er']
    for folder in (tmp_path / 'none', tmp_path / 'deep/er/a.png'):
        with pytest.raises(FileNotFoundError, match=f'^There is no folder {folder}: check the path.$'):
            list_images(folder)
