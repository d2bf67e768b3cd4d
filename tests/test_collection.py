"""Collection: vectors on disk that are always those of the images there now, and nothing is embedded twice."""
import errno
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from runs import is_one_sentence, small_model
from worlds import class_folders

from guie import collection
from guie.collection import SubmissionFile, cache_folders, collect, find_images, read_parts, vectors_of
from guie.embedding import embed
from guie.errors import FileError, InputError, MissingError

MODEL = small_model().eval()


@pytest.fixture
def photos(train, tmp_path):
    """A folder of 3 class folders with 4 images each."""
    return class_folders(train, tmp_path / 'photos', 'abc', 4)


@pytest.fixture
def read(monkeypatch):
    """A list of the names of the images that are embedded from now on."""
    names, original = [], collection.vectors_of

    def watched(model, paths, *rest, **options):
        names.extend(map(os.path.basename, paths))
        return original(model, paths, *rest, **options)

    monkeypatch.setattr(collection, 'vectors_of', watched)
    return names


def opened(photos, model=MODEL, table=None, folders=None):
    """The Collection of a folder, kept next to it."""
    frame, root = find_images(photos if table is None else table)
    return collect(frame, root, model, folders or [photos.parent / 'kept'])


def parts(photos):
    return sorted((photos.parent / 'kept').rglob('*.npy'))


def assert_vectors(found, model=MODEL):
    """A vector is that of its image, embedded here and now."""
    assert found.vectors.shape == (len(found.files), 32) and found.vectors.dtype == np.float32
    assert np.allclose(found.vectors, embed(model, found.files.assign(label='')), atol=1e-6)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)


def test_vectors_are_mapped_from_one_file_and_read_again_without_a_model(photos, read):
    found = opened(photos)
    assert_vectors(found)
    assert found.files['path'].tolist() == sorted(map(str, photos.rglob('*.jpg'))) == sorted(
        str(photos / 'abc'[int(name[:-4]) // 4] / name) for name in read)
    assert found.files['label'].tolist() == ['a'] * 4 + ['b'] * 4 + ['c'] * 4
    assert found.files['size'].tolist() == [os.path.getsize(path) for path in found.files['path']]
    file, = parts(photos)
    assert isinstance(found.vectors, np.memmap) and Path(found.vectors.filename) == file
    assert np.array_equal(np.load(file, mmap_mode='r'), found.vectors)
    read.clear()
    again = opened(photos)
    assert np.array_equal(again.vectors, found.vectors) and again.files.equals(found.files) and read == []


def test_new_and_changed_images_are_embedded_alone_and_those_that_are_gone_leave(photos, read, train):
    opened(photos)
    read.clear()
    shutil.copy(train['path'][20], photos / 'a/00.jpg')
    shutil.copy(train['path'][21], photos / 'b/5.jpg')
    (photos / 'c/9.jpg').unlink()
    found = opened(photos)
    assert sorted(read) == ['00.jpg', '5.jpg'] and len(found.files) == 12
    assert_vectors(found)
    assert isinstance(found.vectors, np.memmap) and len(parts(photos)) == 1 and len(np.load(parts(photos)[0])) == 12
    assert str(photos / 'c/9.jpg') not in found.files['path'].tolist()
    read.clear()
    (photos / 'c/10.jpg').unlink()
    assert_vectors(opened(photos))
    assert read == [] and len(parts(photos)) == 1 and len(np.load(parts(photos)[0])) == 11


def test_a_stopped_session_loses_a_part_at_most(photos, monkeypatch):
    original, calls = collection.vectors_of, []

    def stop_at(number):
        def hooked(model, paths, *rest, **options):
            calls.append(paths)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(model, paths, *rest, **options)
        return hooked

    monkeypatch.setattr(collection, 'PART', 5)
    monkeypatch.setattr(collection, 'vectors_of', stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        opened(photos)
    assert list(map(len, calls)) == [5, 5, 2] and len(parts(photos)) == 2
    calls.clear()
    found = opened(photos)
    assert list(map(len, calls)) == [2] and len(parts(photos)) == 1
    assert_vectors(found)


def test_another_model_embeds_all_again_and_says_so_and_the_first_ones_vectors_stay(photos, read, capsys):
    other = small_model().eval()
    with torch.no_grad():
        other.head.embedding.weight += 1
    first = opened(photos)
    assert 'another model' not in capsys.readouterr().out
    read.clear()
    assert_vectors(opened(photos, other), other)
    assert len(read) == 12 and 'vectors of another model, so all 12 images are embedded again' in capsys.readouterr().out
    read.clear()
    assert np.array_equal(opened(photos).vectors, first.vectors) and read == []
    assert 'another model' not in capsys.readouterr().out


def test_an_unreadable_image_is_named_left_out_and_not_read_again_until_it_changes(photos, read, capsys, train):
    (photos / 'b/4.jpg').write_bytes(b'no image')
    (photos / 'c/8.jpg').write_bytes(b'none either')
    for _ in range(2):
        found = opened(photos)
        assert found.unreadable == [str(photos / 'b/4.jpg'), str(photos / 'c/8.jpg')] and len(found.files) == 10
        assert_vectors(found)
        assert (f'2 images cannot be read, and are left out until changed, first {photos}/b/4.jpg.\n'
                in capsys.readouterr().out)
    assert len(read) == 12
    shutil.copy(train['path'][30], photos / 'b/4.jpg')
    found = opened(photos)
    assert read[12:] == ['4.jpg'] and found.unreadable == [str(photos / 'c/8.jpg')] and len(found.files) == 11
    assert_vectors(found)


def test_an_image_that_vanishes_meanwhile_is_left_out_and_may_come_back(photos, monkeypatch, capsys, read):
    original, away = collection.embed, photos.parent / 'away.jpg'
    frame, root = find_images(photos)
    (photos / 'c/11.jpg').unlink()  # after the folder was listed

    def lose(*given, **options):
        (photos / 'a/1.jpg').rename(away)  # before it is read
        return original(*given, **options)

    monkeypatch.setattr(collection, 'embed', lose)
    found = collect(frame, root, MODEL, [photos.parent / 'kept'])
    monkeypatch.setattr(collection, 'embed', original)
    assert len(found.files) == 10 and found.unreadable == []
    assert_vectors(found)
    assert (f'2 images vanished while the folder was read, and are left out, first {photos}/a/1.jpg.\n'
            in capsys.readouterr().out)
    read.clear()
    away.rename(photos / 'a/1.jpg')
    assert_vectors(opened(photos))
    assert read == ['1.jpg']


@pytest.mark.parametrize('suffix', ['csv', 'npy'])
def test_a_damaged_part_is_embedded_again(photos, read, capsys, suffix):
    expected = opened(photos).vectors.tolist()  # what is mapped changes with its file
    file = parts(photos)[0].with_suffix(f'.{suffix}')
    file.write_bytes(file.read_bytes()[:90])
    read.clear()
    found = opened(photos)
    assert len(read) == 12 and found.vectors.tolist() == expected and len(parts(photos)) == 1
    assert capsys.readouterr().out.count(f'{file.with_suffix(".csv")} is damaged') == 1


def test_a_part_that_the_system_refuses_to_read_is_one_sentence_and_stays(photos, read, monkeypatch):
    opened(photos)
    read.clear()

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, 'Too many open files')

    with monkeypatch.context() as patch:
        patch.setattr(collection.np, 'load', refuse)
        with pytest.raises(FileError, match=r'could not be read [(]Too many open files[)]: try again; .*ulimit -n') as error:
            opened(photos)
    assert is_one_sentence(error) and len(opened(photos).vectors) == 12 and read == []


def test_a_part_that_another_process_joined_with_others_meanwhile_is_no_damaged_one(photos, monkeypatch, capsys):
    opened(photos)
    file, = (part.with_suffix('.csv') for part in parts(photos))
    monkeypatch.setattr(Path, 'glob', lambda folder, pattern: [file, file.with_name('0.csv')])
    assert len(read_parts([file.parent])) == 1 and 'damaged' not in capsys.readouterr().out


def test_a_table_is_searched_in_its_own_order_and_shares_the_vectors_of_its_folder(photos, read, capsys):
    whole, _ = find_images(photos)
    some, others = whole.iloc[[10, 0, 5]].assign(label=[7, 7, 9]), whole.iloc[[1, 2, 8]].drop(columns='label')
    for _ in range(2):
        found = opened(photos, table=pd.concat([some, some.head(1)]))
        assert found.files['path'].tolist() == some['path'].tolist() and found.files['label'].tolist() == [7, 7, 9]
        assert_vectors(found)
        assert '1 rows of the table repeat an image' in capsys.readouterr().out
        found = opened(photos, table=others)
        assert found.files['path'].tolist() == others['path'].tolist() and 'label' not in found.files
        assert_vectors(found)
    assert len(read) == 6
    assert_vectors(opened(photos))
    assert len(read) == 12 and len(parts(photos)) == 1


@pytest.mark.parametrize('name', [b'\xff\xfe.jpg', '可乐 "a,b".jpg'.encode(), b'a\rb\nc.jpg', b'NA.jpg', b'1.0.jpg'])
def test_names_of_any_bytes_are_found_again(photos, read, name):
    shutil.copy(photos / 'a/0.jpg', photos / 'a' / os.fsdecode(name))
    found = opened(photos)
    assert_vectors(found)
    read.clear()
    assert opened(photos).files['path'].tolist() == found.files['path'].tolist() and read == []


def test_what_an_attached_run_holds_is_read_there_and_only_the_rest_is_written_elsewhere(photos, read, train):
    attached, own = photos.parent / 'attached', photos.parent / 'own'
    opened(photos, folders=[attached])
    before = {file: file.read_bytes() for file in attached.rglob('*.*')}
    read.clear()
    opened(photos, folders=[attached, own])
    assert read == [] and not own.exists()
    shutil.copy(train['path'][20], photos / 'a/0.jpg')
    written = []
    for _ in range(2):
        assert_vectors(opened(photos, folders=[attached, own]))
        written.append(list(own.rglob('*.npy')))
    assert read == ['0.jpg'] and {file: file.read_bytes() for file in attached.rglob('*.*')} == before
    assert len(written[0]) == 1 and written[0] == written[1]


def test_a_full_disk_is_one_sentence_and_the_parts_before_stay(photos, monkeypatch, read):
    monkeypatch.setattr(collection, 'PART', 5)
    original, calls = collection.write_array_header_1_0, []

    def full(*given):
        calls.append(given)
        if len(calls) == 2:
            raise OSError(28, 'No space left on device')
        original(*given)

    monkeypatch.setattr(collection, 'write_array_header_1_0', full)
    with pytest.raises(FileError, match='could not be written .No space left on device.') as error:
        opened(photos)
    assert is_one_sentence(error) and len(parts(photos)) == 1
    read.clear()
    assert_vectors(opened(photos))
    assert len(read) == 7


def test_folders_without_images_are_one_sentence(tmp_path, photos):
    with pytest.raises(MissingError, match='There is no folder'):
        find_images(tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(MissingError, match='holds no images'):
        find_images(tmp_path / 'empty')
    for table in (pd.DataFrame({'path': []}), pd.DataFrame({'file': ['a']})):
        with pytest.raises(InputError, match='names no images') as error:
            find_images(table)
        assert is_one_sentence(error)
    for path in photos.rglob('*.jpg'):
        path.write_bytes(b'')
    with pytest.raises(FileError, match=f'None of the images below {photos} can be read, first {photos}/a/0.jpg') as error:
        opened(photos)
    assert is_one_sentence(error)


@pytest.mark.parametrize('bad', [None, np.nan, '', 7, b'a.jpg'])
def test_a_table_with_an_empty_cell_for_a_path_is_one_sentence(photos, bad):
    paths = [photos / 'a/0.jpg', str(photos / 'a/1.jpg'), bad, bad]
    with pytest.raises(InputError, match=r'names no image in 2 of 4 rows, first row 2 \(path .*\): leave these') as error:
        find_images(pd.DataFrame({'path': pd.Series(paths, dtype=object)}))
    assert is_one_sentence(error)
    with pytest.raises(InputError, match='names no image in 1 of 2 rows, first row 1'):
        find_images(pd.DataFrame({'path': pd.Series(['/a.jpg', None], dtype='string')}))


def test_a_model_that_gives_nan_is_one_sentence_and_nothing_is_kept(photos):
    broken = small_model().eval()
    with torch.no_grad():
        broken.head.embedding.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=f'NaN or infinite numbers for {photos}/a/0.jpg') as error:
        opened(photos, broken)
    assert is_one_sentence(error) and parts(photos) == []


def test_vectors_lie_in_the_runs_folder_or_in_runs_or_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home, root = tmp_path / 'out/vit', '/data/photos'
    home.mkdir(parents=True)
    own, = cache_folders(root, home, 'vit')
    assert own.parent == home / 'search' and own.name.startswith('photos-') and len(own.name) == len('photos-') + 8
    assert cache_folders('/other/photos', home, 'vit') != [own]
    assert cache_folders(root, None, 'ViT-H-14') == [Path('runs/search/ViT-H-14') / own.name]
    assert cache_folders(root, home, 'vit', tmp_path / 'here') == [tmp_path / 'here' / own.name]
    (tmp_path / 'locked').mkdir()
    (tmp_path / 'locked/search').touch()  # a file in the way, which refuses root too
    assert cache_folders(root, tmp_path / 'locked', 'old') == [
        tmp_path / 'locked/search' / own.name, Path('runs/search/old') / own.name]
    with pytest.raises(FileError, match='give another folder for the vectors as cache=') as error:
        cache_folders(root, home, 'vit', tmp_path / 'locked/search')
    assert is_one_sentence(error)


@pytest.mark.parametrize('name', ['a' * 255, '图' * 85, 'a' * 246])
def test_a_folder_of_the_longest_name_is_searched_too(photos, name, tmp_path):
    folder = photos.rename(tmp_path / name)
    own, = cache_folders(str(folder), tmp_path / 'run', 'run')
    assert own.is_dir() and len(os.fsencode(own.name)) <= 255 and name.startswith(own.name[:-9]) and len(own.name) > 90
    frame, root = find_images(folder)
    assert len(collect(frame, root, MODEL, [own]).vectors) == 12


def test_what_killed_processes_left_is_deleted_once_it_is_a_day_old(photos, read):
    opened(photos)
    folder, before = parts(photos)[0].parent, parts(photos)
    left = [folder / name for name in ('.part-1.npy', '.part-1.csv', '1.npy', 'mine.npy', '.part-2.npy', '2.npy')]
    for path in left:
        path.touch()
    for path in [*left[:4], *folder.glob('1*')]:
        os.utime(path, (time.time() - 90_000,) * 2)
    opened(photos)
    assert [path for path in left if path.exists()] == left[3:]  # another process may write, and one's own is no leftover
    assert all(path.exists() for path in before) and len(read) == 12


def test_leftovers_that_may_not_be_deleted_stay(photos, monkeypatch):
    opened(photos)
    left = parts(photos)[0].parent / '.part-1.npy'
    left.touch()
    os.utime(left, (0, 0))

    def refuse(path, **_):
        raise PermissionError(f'{path} lies in a folder that is read only')

    monkeypatch.setattr(Path, 'unlink', refuse)
    assert_vectors(opened(photos))
    assert left.exists()


def test_parts_of_unreadable_images_alone_are_read(photos, monkeypatch):
    monkeypatch.setattr(collection, 'PART', 4)
    for path in (photos / 'a').iterdir():
        path.write_bytes(b'no image')
    monkeypatch.setattr(collection, 'merge', lambda *_: False)
    found = opened(photos)
    assert len(found.unreadable) == 4 and not isinstance(found.vectors, np.memmap)
    assert_vectors(found)
    assert [len(part.vectors) for part in read_parts([parts(photos)[0].parent])] == [0, 4, 4]


def test_vectors_of_says_which_images_could_be_read(photos):
    paths = [str(photos / 'a/0.jpg'), str(photos / 'none.jpg'), str(photos / 'a/1.jpg')]
    vectors, readable = vectors_of(MODEL, paths, 'some')
    assert readable.tolist() == [True, False, True]
    assert np.allclose(vectors, embed(MODEL, pd.DataFrame({'path': paths, 'label': ''}))[[0, 2]], atol=1e-6)
    Image.new('RGB', (8, 8)).save(photos / 'black.png')  # a black image is an image
    assert vectors_of(MODEL, [str(photos / 'black.png')], 'one')[1].all()


def test_vectors_of_a_submission_are_scaled_to_length_1(photos):
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # the mean colour, 0 to 255
    module.register_forward_pre_hook(lambda _, images: images[0].float())
    path = str(photos / 'a/0.jpg')
    colour = np.asarray(Image.open(path), np.float32).mean((0, 1))
    vectors, readable = vectors_of(SubmissionFile(module, photos), [path, str(photos / 'none.jpg')], 'some')
    assert np.allclose(vectors, colour / np.linalg.norm(colour), atol=1e-5) and readable.tolist() == [True, False]


def test_parts_that_another_process_joins_while_they_are_read_lose_no_image(photos, monkeypatch, capsys):
    frame, root = find_images(photos)
    folders = [photos.parent / 'kept']
    collect(frame.iloc[:5].reset_index(drop=True), root, MODEL, folders)
    collection.embed_share(frame.iloc[5:].reset_index(drop=True), MODEL, folders, 0, 1)
    original, raced = collection.read_parts, []

    def joined_meanwhile(places):
        listed = [file for folder in places for file in sorted(folder.glob('*.csv'))]
        if not raced:
            raced.append(True)
            with monkeypatch.context() as patch:
                patch.setattr(collection, 'read_parts', original)
                collect(frame, root, MODEL, folders)
            return [part for part in map(collection.read_part, listed) if part]
        return original(places)

    monkeypatch.setattr(collection, 'read_parts', joined_meanwhile)
    monkeypatch.setattr(collection, 'embed_new', lambda *_: None)  # another process was as fast
    found = collect(frame, root, MODEL, folders)
    assert len(found.files) == len(frame) and 'vanished' not in capsys.readouterr().out


def test_a_list_of_paths_is_searched_and_paths_that_do_not_exist_are_one_sentence(photos, tmp_path):
    paths = sorted(photos.rglob('*.jpg'))[:3]
    found = [find_images(given)[0]['path'].tolist() for given in (paths, tuple(map(str, paths)))]
    assert found == [[*map(str, paths)]] * 2
    with pytest.raises(FileNotFoundError, match='None of the images of the table exist, first .*no/such/a.jpg') as error:
        find_images(pd.DataFrame({'path': ['no/such/a.jpg', 'no/such/b.jpg']}))
    assert is_one_sentence(error)
