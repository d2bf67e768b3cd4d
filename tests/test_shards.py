"""Shards: each image of each tar file has one vector, however many processes there are and whichever is killed."""
import io
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from runs import is_one_sentence, new_model, small_model

from guie import shards
from guie.checkpoints import load_run, save_run
from guie.collection import SubmissionFile, read_parts
from guie.config import Config
from guie.embedding import embed
from guie.errors import FileError, InputError, MissingError
from guie.images import read_pixels
from guie.model import Ensemble
from guie.shards import embed_shards, nearest_in_shards, tar_files

pytest.importorskip('webdataset', reason='without webdataset (requirements-test.txt) tar files are untested')
MODEL = small_model().eval()


def write_tar(file, members):
    """A tar file of {name: bytes}."""
    with tarfile.open(file, 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(train, tmp_path):
    """A folder of 5 tar files with 3 images each, and texts and labels beside them as webdataset has them."""
    folder = tmp_path / 'tars'
    folder.mkdir()
    for shard in range(5):
        members = {}
        for number in range(3):
            path = train['path'][3 * shard + number]
            members |= {f'some/{number:03}.jpg': open(path, 'rb').read(), f'some/{number:03}.txt': b'a bee',
                        f'some/{number:03}.cls': b'7'}
        write_tar(folder / f'images-{shard:03}.tar', members)
    return folder


def kept(folder):
    """(names, vectors) of all tables of a folder, in their order."""
    parts = read_parts([folder])
    return ([name for part in parts for name in part.table['file']],
            np.concatenate([part.vectors[:] for part in parts if len(part.vectors)]))


def test_each_image_has_the_vector_that_its_file_has(tars, train, tmp_path):
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    names, vectors = kept(folder)
    assert names == [f'{tars}/images-{shard:03}.tar/some/{number:03}.jpg' for shard in range(5) for number in range(3)]
    assert vectors.dtype == np.float32 and np.allclose(vectors, embed(MODEL, train.head(15)), atol=1e-6)
    assert all(isinstance(part.vectors, np.memmap) for part in read_parts([folder]))


def test_an_ensemble_sees_each_image_at_the_size_of_each_member(tars, train, tmp_path):
    other = new_model(Config(model_name='local-dir:media/miniature', pretrained='miniature', image_size=64)).eval()
    both = Ensemble([MODEL, other]).eval()
    _, vectors = kept(embed_shards(both, [tars], tmp_path / 'kept'))
    assert np.allclose(vectors, embed(both, train.head(15)), atol=1e-6)


def test_what_is_there_is_not_read_again_and_another_model_has_vectors_of_its_own(tars, tmp_path, monkeypatch):
    folder = embed_shards(MODEL, sorted(tars.glob('*.tar'))[:2], tmp_path / 'kept')
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    read, original = [], shards.images_of
    monkeypatch.setattr(shards, 'images_of', lambda file: read.append(os.path.basename(file)) or original(file))
    assert embed_shards(MODEL, [tars], tmp_path / 'kept') == folder
    assert read == ['images-002.tar', 'images-003.tar', 'images-004.tar']
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert embed_shards(new_model().eval(), [tars], tmp_path / 'kept') != folder and len(read) == 8


def test_workers_and_small_batches_give_the_same(tars, tmp_path, monkeypatch):
    expected = kept(embed_shards(MODEL, [tars], tmp_path / 'kept'))
    monkeypatch.setattr(shards, 'BATCH', 2)
    found = kept(embed_shards(MODEL, [tars], tmp_path / 'again', workers=2))
    assert found[0] == expected[0] and np.allclose(found[1], expected[1], atol=1e-6)


KILLED = """
import os, signal, sys
from guie import shards
write = shards.write_part
def write_one_and_die(*given):
    write(*given)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == 'dies':
    shards.write_part = write_one_and_die
shards.main(*sys.argv[2:])
"""


def share(rank, fate, *given):
    """One of two processes, by hand -> its exit code."""
    environment = os.environ | {'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': str(rank)}
    return subprocess.run([sys.executable, '-c', KILLED, fate, *map(str, given)], env=environment).returncode


def test_of_two_processes_one_is_killed_and_the_same_command_goes_on_from_there(tars, train, tmp_path):
    save_run(tmp_path / 'run', new_model())
    given = tmp_path / 'run', tmp_path / 'kept', tars
    assert share(0, 'dies', *given) == -signal.SIGKILL and share(1, 'lives', *given) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / 'kept').rglob('*.npy')}
    assert len(before) == 3  # one of the killed process, two of the other
    assert share(0, 'lives', *given) == share(1, 'lives', *given) == 0
    folder, = (tmp_path / 'kept').iterdir()
    names, vectors = kept(folder)
    assert len(names) == 15 and len(set(names)) == 15 and len([*folder.glob('*.npy')]) == 5
    assert before == {file: file.stat().st_mtime_ns for file in before}  # nothing twice
    assert np.allclose(vectors, embed(load_run(tmp_path / 'run'), train.head(15)), atol=1e-6)


def test_accelerate_launches_it(tars, tmp_path):
    save_run(tmp_path / 'run', new_model())
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1', '--num_machines', '1',
               '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m', 'guie.shards', str(tmp_path / 'run'),
               str(tmp_path / 'kept'), str(tars)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f'vectors of tar files are in {tmp_path}/kept/vectors-' in done.stdout
    assert len([*(tmp_path / 'kept').rglob('*.npy')]) == 5


def test_unreadable_images_have_no_vector_and_are_counted(tars, train, tmp_path, capsys):
    write_tar(tars / 'images-002.tar', {'a.jpg': b'no image', 'b.jpg': open(train['path'][0], 'rb').read()})
    write_tar(tars / 'images-003.tar', {'a.jpg': b'no image'})
    write_tar(tars / 'images-004.tar', {'a.txt': b'no image at all'})
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    printed = capsys.readouterr().out
    bad = tars / 'images-002.tar'
    assert f'{bad}: 1 of 2 images cannot be read and have no vector, first {bad}/a.jpg' in printed
    assert f'{tars}/images-003.tar: 1 of 1 images cannot be read' in printed
    names, vectors = kept(folder)
    assert len(names) == 9 and len(vectors) == 7 and len([*folder.glob('*.csv')]) == 5
    assert np.allclose(vectors[-1], embed(MODEL, train.head(1)), atol=1e-6)
    found = nearest_in_shards(folder, vectors[-1:], k=20)
    assert len(found) == 7 and f'{tars}/images-002.tar/b.jpg' in found['file'][:2].tolist()


def test_a_broken_tar_file_is_named_after_all_others_are_done(tars, tmp_path):
    content = (tars / 'images-001.tar').read_bytes()
    (tars / 'images-001.tar').write_bytes(content[:len(content) // 2])
    (tars / 'images-003.tar').write_bytes(b'no tar file' * 100)
    with pytest.raises(FileError, match=r'2 of 5 tar files cannot be read, first .*images-001.tar') as error:
        embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert is_one_sentence(error)
    folder, = (tmp_path / 'kept').iterdir()
    assert len([*folder.glob('*.npy')]) == 3


def test_the_nearest_of_all_tar_files_are_exact(tars, train, tmp_path):
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    names, vectors = kept(folder)
    queries = embed(MODEL, train.tail(4))
    found = nearest_in_shards(folder, queries, k=7)
    apart = np.linalg.norm(queries[:, None] - vectors[None], axis=2)
    assert found['query'].tolist() == np.arange(4).repeat(7).tolist()
    assert np.allclose(found['distance'], np.sort(apart, axis=1)[:, :7].ravel(), atol=1e-5)
    assert found.groupby('query')['file'].first().tolist() == [names[row] for row in apart.argmin(1)]


def test_a_list_of_tar_files_may_hold_folders_and_addresses(tars, tmp_path):
    first = str(tars / 'images-000.tar')
    assert tar_files([first, 'https://example.org/a.tar', tars]) == [
        first, 'https://example.org/a.tar', *(str(tars / f'images-{shard:03}.tar') for shard in range(1, 5))]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(MissingError, match='There is no .tar file in .*empty: name such files') as error:
        tar_files([tmp_path / 'empty'])
    assert is_one_sentence(error)


def test_what_cannot_embed_tar_files_is_one_sentence(tars, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='takes one image at a time') as error:
        embed_shards(SubmissionFile(MODEL, tmp_path / 'submission.zip'), [tars], tmp_path / 'kept')
    assert is_one_sentence(error)
    with pytest.raises(MissingError, match='There are no vectors in'):
        nearest_in_shards(tmp_path, np.ones((1, 32), np.float32))
    nan = small_model().eval()
    nan.tower[2].weight.data[:] = np.nan
    with pytest.raises(InputError, match='NaN or infinite numbers for images of .*images-000.tar'):
        embed_shards(nan, [tars], tmp_path / 'kept')
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(InputError, match='not installed: pip install webdataset') as error:
        embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert is_one_sentence(error)


def test_bytes_are_read_as_their_file_is(train):
    path = train['path'][0]
    assert (read_pixels(open(path, 'rb').read(), 32) == read_pixels(path, 32)).all()
    with pytest.raises(FileError, match='^An image cannot be read: '):
        read_pixels(b'no image', 32)
