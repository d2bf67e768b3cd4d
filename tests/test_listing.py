"""Which files are images: the same for folders of classes, folders of images and label files; the others are counted."""
import os

import pytest

from guie.datasets import list_images, read_dataset
from guie.listing import hidden, walk_images
from tests.worlds import lock_folders, write_files


def folder_of_classes(root):
    return read_dataset(root)


def label_file(root):
    """A CSV beside the folder that names every file in it."""
    files = sorted(os.path.join(place, name) for place, _, names in os.walk(root) for name in names)
    lines = [f'{os.path.relpath(file, root)},{os.path.relpath(file, root).split(os.sep)[0]}\n' for file in files]
    (root.parent / 'set.csv').write_text('path,label\n' + ''.join(lines))
    return read_dataset(root.parent / 'set.csv', root)


def found(listing, root):
    return [os.path.relpath(path, root) for path in sorted(listing(root)['path'])]


@pytest.fixture(params=[folder_of_classes, list_images, label_file], ids=lambda listing: listing.__name__)
def listing(request):
    return request.param


@pytest.mark.parametrize('name', [
    'a/._1.jpg', 'a/.hidden.png', '.thumbnails/1.jpg', '__MACOSX/a/1.jpg', 'a/.ipynb_checkpoints/1-checkpoint.jpg',
    'a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg', '.git/x/1.png', '$RECYCLE.BIN/S-1/1.jpg', '#recycle/1.jpg', 'lost+found/1.jpg',
    'a/b/.AppleDouble/1.jpg'])
def test_hidden_files_and_companions_are_no_images(tmp_path, listing, name):
    write_files(tmp_path / 'mine', ['a/1.jpg', 'b/2.jpg', name])
    assert found(listing, tmp_path / 'mine') == ['a/1.jpg', 'b/2.jpg']


def test_a_folder_that_is_hidden_itself_can_be_listed(tmp_path, listing):
    write_files(tmp_path / '.cache/mine', ['a/1.jpg', 'b/2.jpg'])
    assert found(listing, tmp_path / '.cache/mine') == ['a/1.jpg', 'b/2.jpg']


@pytest.mark.parametrize('suffix', ['jpg', 'JPEG', 'jpe', 'jfif', 'png', 'PNG', 'webp', 'gif', 'bmp', 'tif', 'TIFF', 'ppm'])
def test_each_suffix_that_pillow_reads_is_listed(tmp_path, listing, suffix):
    write_files(tmp_path / 'mine', [f'a/1.{suffix}'])
    assert found(listing, tmp_path / 'mine') == [f'a/1.{suffix}']


@pytest.mark.parametrize('name, said', [
    ('b/1.eps', '.eps 1'), ('b/1.PDF', '.pdf 1'), ('b/1', 'without suffix 1'), ('b/1.svg', '.svg 1'),
    ('b/Thumbs.db', '.db 1'),
    ('b/1.jpg.part', '.part 1'), ('b/clip.mp4', '.mp4 1'), ('b/v1.0/1', 'without suffix 1')])
def test_what_is_passed_over_is_counted_by_suffix(tmp_path, listing, name, said, capsys):
    write_files(tmp_path / 'mine', ['a/1.jpg', name])
    if listing is label_file and 'without' in said:  # who lists such a file says that it is an image
        assert found(listing, tmp_path / 'mine') == ['a/1.jpg', name] and not capsys.readouterr().out
    else:
        assert found(listing, tmp_path / 'mine') == ['a/1.jpg']
        assert f': skipped {said}\n' in capsys.readouterr().out


@pytest.mark.parametrize('suffix', ['heic', 'HEIF'])
def test_a_missing_plugin_is_named(tmp_path, listing, suffix, capsys, monkeypatch):
    monkeypatch.setattr('guie.listing.image_suffixes', lambda: {'jpg'})
    write_files(tmp_path / 'mine', ['a/1.jpg', f'b/1.{suffix}', f'b/2.{suffix}'])
    assert found(listing, tmp_path / 'mine') == ['a/1.jpg']
    assert f'skipped .{suffix.lower()} 2 (needs pillow-heif)' in capsys.readouterr().out


def test_a_rare_suffix_is_counted_with_the_others_and_nothing_is_said_of_nothing(tmp_path, listing, capsys):
    write_files(tmp_path / 'mine', ['a/1.jpg'])
    listing(tmp_path / 'mine')
    assert not capsys.readouterr().out
    write_files(tmp_path / 'mine', [f'a/1.x{number}' for number in range(12)])
    listing(tmp_path / 'mine')
    assert 'others 4\n' in capsys.readouterr().out


@pytest.mark.parametrize('names', [['b/1.svg', 'b/2.txt'], ['._1.jpg', 'a/1.eps'], ['a/1.xyz']])
def test_nothing_but_what_is_passed_over_is_an_error_that_counts_it(tmp_path, listing, names):
    write_files(tmp_path / 'mine', names)
    with pytest.raises((ValueError, FileNotFoundError), match='skipped|names an image that can be read here') as error:
        listing(tmp_path / 'mine')
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_a_folder_called_like_an_image_is_none(tmp_path, listing):
    write_files(tmp_path / 'mine', ['a/1.jpg', 'x.jpg/2.png'])
    (tmp_path / 'mine/a/y.jpg').mkdir()
    assert found(listing, tmp_path / 'mine') == ['a/1.jpg', 'x.jpg/2.png']


LINKS = {  # link, where it leads, what is listed
    'to the folder itself': ('cat/all', '..', ['cat/1.jpg', 'dog/2.jpg']),
    'to its own folder': ('cat/again', '.', ['cat/1.jpg', 'dog/2.jpg']),
    'to a folder above the folder': ('cat/up', '../..', ['cat/1.jpg', 'dog/2.jpg']),
    'to the whole disk': ('cat/disk', '/', ['cat/1.jpg', 'dog/2.jpg']),
    'to a sibling before': ('dog/more', '../cat', ['cat/1.jpg', 'dog/2.jpg']),
    'to a sibling after': ('aaa', 'dog', ['cat/1.jpg', 'dog/2.jpg']),
    'to itself': ('cat/loop', 'loop', ['cat/1.jpg', 'dog/2.jpg']),
    'to elsewhere': ('bird', '../store/bird', ['bird/3.jpg', 'cat/1.jpg', 'dog/2.jpg']),
    'hidden': ('.bird', '../store/bird', ['cat/1.jpg', 'dog/2.jpg']),
}


@pytest.mark.parametrize('link, target, expected', LINKS.values(), ids=LINKS)
@pytest.mark.parametrize('listing', [folder_of_classes, list_images])
def test_links_to_folders_do_not_multiply_images(tmp_path, listing, link, target, expected):
    write_files(tmp_path, ['mine/cat/1.jpg', 'mine/dog/2.jpg', 'store/bird/3.jpg'])
    (tmp_path / 'mine' / link).symlink_to(target)
    assert found(listing, tmp_path / 'mine') == expected


def test_a_folder_behind_two_links_is_listed_once_and_the_second_counted(tmp_path, capsys):
    write_files(tmp_path, ['mine/cat/1.jpg', 'store/3.jpg', 'store/deep/4.jpg'])
    (tmp_path / 'mine/a').symlink_to('../store/deep')
    (tmp_path / 'mine/b').symlink_to('../store')
    (tmp_path / 'mine/c').symlink_to('../store')
    (tmp_path / 'store/back').symlink_to('../mine')
    assert found(list_images, tmp_path / 'mine') == ['a/4.jpg', 'b/3.jpg', 'cat/1.jpg']
    assert 'links to folders listed already 3\n' in capsys.readouterr().out  # c, store/deep again, store/back


def test_an_unreadable_folder_is_counted(tmp_path, monkeypatch):
    write_files(tmp_path, ['a/1.jpg', 'locked/2.jpg'])
    lock_folders(monkeypatch, 'locked')
    assert walk_images(str(tmp_path)) == (['/a/1.jpg'], {'unreadable folders': 1})


def test_a_class_may_have_a_name_like_a_handle():
    assert [name for name in ('@home', '#1', '_x', '$5', '~', 'MACOSX') if hidden(name)] == []
