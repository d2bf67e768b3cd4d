"""Shards: each image of each tar file has one vector, however many processes there are and whichever is killed."""
import errno
import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pandas as pd
import pytest
from runs import is_one_sentence, new_model, one_of_two, small_model, wait_for

from guie import shards
from guie.checkpoints import load_run, save_run
from guie.collection import SubmissionFile, read_parts
from guie.config import Config
from guie.embedding import embed
from guie.errors import FileError, InputError, MissingError, Stopped
from guie.images import read_pixels
from guie.model import Ensemble
from guie.shards import embed_shards, nearest_in_shards, part_of, tar_files

MODEL = small_model().eval()


def write_tar(file, members):
    """A tar file of {name: bytes}."""
    with tarfile.open(file, 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def content_of(train, number):
    """The bytes of an image."""
    with open(train['path'][number], 'rb') as file:
        return file.read()


@pytest.fixture
def tars(train, tmp_path):
    """A folder of 5 tar files with 3 images each, and texts and labels beside them as webdataset has them."""
    folder = tmp_path / 'tars'
    folder.mkdir()
    for shard in range(5):
        members = {}
        for number in range(3):
            members |= {f'some/{number:03}.jpg': content_of(train, 3 * shard + number), f'some/{number:03}.txt': b'a bee',
                        f'some/{number:03}.cls': b'7'}
        write_tar(folder / f'images-{shard:03}.tar', members)
    return folder


def kept(folder):
    """(names, vectors) of all tables of a folder, in their order."""
    parts = read_parts([folder])
    return ([name for part in parts for name in part.table['file']],
            np.concatenate([part.vectors[:] for part in parts if len(part.vectors)]))


def times(folder):
    """{file: time of change} of all vectors below a folder."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob('*.npy')}


def test_each_image_has_the_vector_that_its_file_has(tars, train, tmp_path, capsys):
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    names, vectors = kept(folder)
    assert names == [f'{tars}/images-{shard:03}.tar/some/{number:03}.jpg' for shard in range(5) for number in range(3)]
    assert vectors.dtype == np.float32 and np.allclose(vectors, embed(MODEL, train.head(15)), atol=1e-6)
    assert all(isinstance(part.vectors, np.memmap) for part in read_parts([folder]))
    assert 'tar files: skipped .txt 15, .cls 15\n' in capsys.readouterr().out


def test_an_ensemble_sees_each_image_at_the_size_of_each_member(tars, train, tmp_path):
    other = new_model(Config(model_name='local-dir:media/miniature', pretrained='miniature', image_size=64)).eval()
    both = Ensemble([MODEL, other]).eval()
    _, vectors = kept(embed_shards(both, [tars], tmp_path / 'kept'))
    assert np.allclose(vectors, embed(both, train.head(15)), atol=1e-6)


def test_what_is_there_is_not_read_again_and_another_model_has_vectors_of_its_own(tars, tmp_path, monkeypatch):
    folder = embed_shards(MODEL, sorted(tars.glob('*.tar'))[:2], tmp_path / 'kept')
    before, read, original = times(folder), [], shards.images_of
    monkeypatch.setattr(shards, 'images_of',
                        lambda file, passed: read.append(os.path.basename(file)) or original(file, passed))
    assert embed_shards(MODEL, [tars], tmp_path / 'kept', workers=0) == folder
    assert read == ['images-002.tar', 'images-003.tar', 'images-004.tar']
    assert before == {file: time for file, time in times(folder).items() if file in before}
    assert embed_shards(new_model().eval(), [tars], tmp_path / 'kept', workers=0) != folder and len(read) == 8
    next(iter(before)).unlink()
    embed_shards(MODEL, [tars], tmp_path / 'kept', workers=0)
    assert len(read) == 9 and times(folder).keys() > before.keys()


def test_workers_and_small_batches_give_the_same(tars, tmp_path, monkeypatch):
    expected = kept(embed_shards(MODEL, [tars], tmp_path / 'kept', workers=0))
    monkeypatch.setattr(shards, 'BATCH', 2)
    found = kept(embed_shards(MODEL, [tars], tmp_path / 'again', workers=2))
    assert found[0] == expected[0] and np.allclose(found[1], expected[1], atol=1e-6)


# Several processes

KILLED = """
import os, signal, sys
from guie import shards
write, written = shards.write_part, []
def write_and_die_in_the_second(*given):
    write(*given)
    written.append(1)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == 'dies':
    shards.write_part = write_and_die_in_the_second
shards.main(*sys.argv[2:])
"""


def test_of_two_processes_one_is_killed_and_the_same_command_goes_on_from_there(tars, train, tmp_path):
    save_run(tmp_path / 'run', new_model())
    given = tmp_path / 'run', tmp_path / 'kept', tars
    killed, other = one_of_two(0, KILLED, 'dies', *given), one_of_two(1, KILLED, 'lives', *given)
    assert (killed.wait(), other.wait()) == (-signal.SIGKILL, 0)
    before = times(tmp_path / 'kept')
    folder, = (tmp_path / 'kept').iterdir()
    finished = {file.stem.rpartition('-')[0] for file in folder.glob('images-*.npy')}
    assert finished == {'images-000', 'images-001', 'images-003'}  # the killed one was within images-002
    assert [one.wait() for one in [one_of_two(rank, KILLED, 'lives', *given) for rank in range(2)]] == [0, 0]
    names, vectors = kept(folder)
    assert len(names) == 15 and len(set(names)) == 15 and len([*folder.glob('images-*.npy')]) == 5
    assert before.items() <= times(tmp_path / 'kept').items()  # nothing that was written was made again
    assert np.allclose(vectors, embed(load_run(tmp_path / 'run'), train.head(15)), atol=1e-6)
    found = nearest_in_shards(folder, vectors[:1], 15)
    assert sorted(found['file']) == sorted(names)  # nor is anything found that the killed one left


def test_accelerate_launches_it_and_a_broken_tar_file_ends_no_other_process(tars, tmp_path):
    save_run(tmp_path / 'run', new_model())
    (tars / 'images-001.tar').write_bytes(b'no tar file' * 100)
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1', '--num_machines', '1',
               '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m', 'guie.shards', str(tmp_path / 'run'),
               str(tmp_path / 'kept'), str(tars)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'Process 0 of 1: 1 of 5 tar files cannot be used, first ' in done.stdout
    (tars / 'images-001.tar').unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert f'Process 0 of 1 is done; the vectors are in {tmp_path}/kept/vectors-' in done.stdout
    assert len([*(tmp_path / 'kept').rglob('images-*.npy')]) == 4


def test_a_process_that_cannot_write_or_was_asked_for_nothing_ends_with_an_error(tars, tmp_path):
    save_run(tmp_path / 'run', new_model())
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').mkdir()
    for given, words in ((['run', 'file', tars], 'file/vectors-.* could not be written'), ([], 'Name a run, a folder')):
        command = [sys.executable, '-m', 'guie.shards', *[str(tmp_path / one) for one in given]]
        place = os.environ | {'PYTHONPATH': os.getcwd()}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / 'empty', env=place)
        assert done.returncode == 1 and re.search(words, done.stderr) and done.stderr.count('\n') == 1
        assert not [*(tmp_path / 'empty').iterdir()]


def test_a_disk_that_is_full_ends_it_though_tar_files_that_cannot_be_used_do_not(tars, tmp_path, monkeypatch, capsys):
    save_run(tmp_path / 'run', new_model())
    (tars / 'images-001.tar').write_bytes(b'no tar file' * 100)
    shards.main(tmp_path / 'run', tmp_path / 'kept', tars)
    assert '1 of 5 tar files cannot be used' in capsys.readouterr().out

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(shards, 'write_part', full)
    with pytest.raises(FileError, match='No space left on device.: free some space') as error:
        shards.main(tmp_path / 'run', tmp_path / 'again', tars)
    assert is_one_sentence(error)


def test_a_worker_that_is_killed_is_one_sentence_and_the_same_command_goes_on(tars, tmp_path, monkeypatch):
    parent, done = os.getpid(), shards.decoded

    def killed_in_the_third(file, *given):
        if os.getpid() != parent and file.endswith('002.tar'):
            wait_for(lambda: len([*tmp_path.glob('kept/*/images-*.csv')]) >= 2)  # those before
            os.kill(os.getpid(), signal.SIGKILL)
        return done(file, *given)

    monkeypatch.setattr(shards, 'decoded', killed_in_the_third)
    with pytest.raises(Stopped, match='^tar files: a data-loading process was killed.* same command goes on') as error:
        embed_shards(MODEL, [tars], tmp_path / 'kept', workers=1)
    assert is_one_sentence(error)
    before = times(tmp_path / 'kept')
    assert len(before) == 2
    embed_shards(MODEL, [tars], tmp_path / 'kept', workers=0)
    assert len(times(tmp_path / 'kept')) == 5 and before.items() <= times(tmp_path / 'kept').items()


def test_what_killed_processes_left_is_deleted_after_a_day(tars, tmp_path):
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    before = sorted(folder.iterdir())
    for name in ('.part-old', '.part-new'):
        (folder / name).mkdir()
        (folder / name / 'images-000.npy').touch()
    for path in [folder / '.part-old', *before]:
        os.utime(path, (time.time() - 90_000,) * 2)
    embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert sorted(folder.iterdir()) == sorted([*before, folder / '.part-new'])


# What people bring

def test_names_are_those_in_the_tar_file_and_what_is_no_image_is_counted(tars, train, tmp_path, capsys):
    image = content_of(train, 0)
    write_tar(tars / 'images-000.tar', {'A.JPG': image, 'a.jpg': image, 'b._v.jpg': image, '._a.jpg': b'',
                                        'no suffix': image, 'c.xyz': b'', 'd.tar.gz': b''})
    with tarfile.open(tars / 'images-000.tar', 'a') as tar:
        link = tarfile.TarInfo('link.jpg')
        link.type, link.linkname = tarfile.SYMTYPE, 'a.jpg'
        tar.addfile(link)
    folder = embed_shards(MODEL, [tars / 'images-000.tar'], tmp_path / 'kept')
    assert kept(folder)[0] == [f'{tars}/images-000.tar/{name}' for name in ('A.JPG', 'a.jpg', 'b._v.jpg')]
    printed = capsys.readouterr().out
    assert all(part in printed for part in ('skipped', '.jpg 1', 'without suffix 1', '.xyz 1', '.gz 1', 'links 1'))


def test_unreadable_images_have_no_vector_and_are_counted_with_a_reason(tars, train, tmp_path, capsys):
    write_tar(tars / 'images-002.tar', {'a.jpg': b'no image', 'b.jpg': content_of(train, 0)})
    write_tar(tars / 'images-003.tar', {'a.jpg': b'no image', 'b.jpg': b'none'})
    write_tar(tars / 'images-004.tar', {'a.txt': b'no image at all'})
    with pytest.raises(FileError, match=r'1 of 5 tar files cannot be used, first .*images-003.tar .none of its images '
                                        r'can be read: The image a.jpg cannot be read') as error:
        embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert is_one_sentence(error)
    printed = capsys.readouterr().out
    assert 'images-002.tar: 1 of 2 images cannot be read and have no vector (The image a.jpg cannot be read: ' in printed
    assert 'images-004.tar: there is no image in it' in printed
    folder, = (tmp_path / 'kept').iterdir()
    names, vectors = kept(folder)
    assert len(names) == 8 and len(vectors) == 7 and len([*folder.glob('*.csv')]) == 4
    assert np.allclose(vectors[-1], embed(MODEL, train.head(1)), atol=1e-6)
    found = nearest_in_shards(folder, vectors[-1:], k=20)
    assert len(found) == 7 and f'{tars}/images-002.tar/b.jpg' in found['file'][:2].tolist()


@pytest.mark.parametrize('place', ['in a member', 'after a member', 'in a header', 'before the end', 'a wrong header'])
def test_a_damaged_tar_file_leaves_nothing_and_is_named_after_all_others_are_done(tars, tmp_path, place):
    file = tars / 'images-001.tar'
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        third = tar.getmembers()[3]
        end = tar.getmembers()[-1].offset_data + 512
    length = {'in a member': third.offset_data + 100, 'after a member': third.offset, 'in a header': third.offset + 100,
              'before the end': end, 'a wrong header': None}[place]
    file.write_bytes(content[:length] if length else content[:third.offset] + b'x' + content[third.offset + 1:])
    with pytest.raises(FileError, match=r'1 of 5 tar files cannot be used, first .*images-001.tar \(ReadError') as error:
        embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert is_one_sentence(error)
    folder, = (tmp_path / 'kept').iterdir()
    assert len([*folder.glob('images-*.npy')]) == 4 and not [*folder.glob('images-001*')]


def damage(content, way, third):
    """A tar file's bytes without the header of its third member, followed by themselves or by zeros, or zeros alone."""
    return {'a header of zeros': content[:third] + bytes(512) + content[third + 512:], 'joined': content * 2,
            'zeros': bytes(102_400), 'zeros from the third': content[:third] + bytes(5 << 20)}[way]


@pytest.mark.parametrize('form', ['file', 'gzip', 'pipe:'])
@pytest.mark.parametrize('way', ['a header of zeros', 'joined', 'zeros', 'zeros from the third'])
def test_a_tar_file_that_goes_on_behind_its_end_or_is_zeros_is_damaged(tars, tmp_path, way, form):
    file = tars / 'images-001.tar'
    with tarfile.open(file) as tar:
        third = tar.getmembers()[3].offset
    content = damage(file.read_bytes(), way, third)
    packed = gzip.compress(content) if way != 'joined' else gzip.compress(content[:len(content) // 2]) * 2
    file.write_bytes(packed if form == 'gzip' else content)
    if form == 'pipe:':
        pytest.importorskip('webdataset', reason='without webdataset (requirements-test.txt) addresses are untested')
    with pytest.raises(FileError, match=r'1 of 2 tar files .*images-001.tar \(ReadError: damaged') as error:
        embed_shards(MODEL, [f'pipe:cat {file}' if form == 'pipe:' else file, tars / 'images-002.tar'], tmp_path / 'kept')
    assert is_one_sentence(error) and len(times(tmp_path / 'kept')) == 1


def test_padding_gzip_and_an_archive_of_nothing_are_no_damage(tars, tmp_path, capsys):
    subprocess.run(['tar', '-b', '4096', '-C', tmp_path, '-cf', tars / 'padded.tar', 'tars/images-000.tar'], check=True)
    assert (tars / 'padded.tar').stat().st_size == 2 << 20
    content = (tars / 'images-000.tar').read_bytes()
    (tars / 'long.tar').write_bytes(content + bytes(2 << 20))
    (tars / 'zipped.tar').write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))  # as bgzip writes it
    write_tar(tars / 'nothing.tar', {})
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert len(kept(folder)[1]) == 21 and f'{tars}/nothing.tar: there is no image in it' in capsys.readouterr().out


SIGNED = ['X-Amz-Signature={}&X-Amz-Expires=3600', 'X-Goog-Signature={}', 'Expires=9{}&Signature={}&Key-Pair-Id=K',
          'AWSAccessKeyId={}&Signature={}', 'Policy={}', 'sv=2024&sp=r&se=2{}&sig={}', 'token={}']


@pytest.mark.parametrize('query', SIGNED)
@pytest.mark.parametrize('own', ['', 'id=7', 'path=a/b'])
def test_an_address_is_known_without_what_signs_it(tmp_path, query, own):
    signed = [f'https://example.org/get?{"&".join(filter(None, [own, query.format(*letter * 2)]))}' for letter in 'ab']
    plain = part_of(tmp_path, f'https://example.org/get{own and "?" + own}')
    assert part_of(tmp_path, signed[0]) == part_of(tmp_path, signed[1]) == plain and plain.name.startswith('get-')
    with pytest.raises(InputError, match='named with several signatures.*: name it once') as error:
        tar_files(signed)
    assert is_one_sentence(error)


def test_addresses_that_differ_in_anything_else_have_vectors_of_their_own(tars, tmp_path):
    different = [f'https://example.org/get{rest}' for rest in
                 ('', '?file=a.tar', '?file=b.tar', '?file=b.tar&page=2', '?sp=1', '?sp=2', '?expired=1', '?mytoken=1')]
    different += [f'pipe:curl https://example.org/get?{rest}' for rest in ('file=a.tar', 'file=b.tar', 'token=a', 'token=b')]
    assert len({part_of(tmp_path, address) for address in different}) == len(different)
    assert part_of(tmp_path, '/some/a.tar').name == 'a-725416d5.csv'  # as ever: what was embedded is found
    assert part_of(tmp_path, '/some/what?.tar').name == 'what?-299dd3eb.csv'
    assert part_of(tmp_path, 'https://example.org/a.tar').name == 'a-7bc44d3a.csv'
    pytest.importorskip('webdataset', reason='without webdataset (requirements-test.txt) addresses are untested')
    (tmp_path / 'get').write_text(f'cat {tars}/images-${{1#*file=}}.tar')
    folder = embed_shards(MODEL, [f'pipe:sh {tmp_path}/get "https://h/get?file=00{one}"' for one in '12'], tmp_path / 'kept')
    assert len(kept(folder)[0]) == 6 and len(times(folder)) == 2


@pytest.mark.parametrize('name', ['图' * 80, 'a' * 250, 'é' * 125, os.fsdecode(b'\xff' * 250)])
def test_a_tar_file_of_a_long_name_is_embedded_as_any_other(tars, tmp_path, name):
    (tars / 'images-000.tar').rename(tars / f'{name}.tar')
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    assert len(times(folder)) == 5 and f'{tars}/{name}.tar/some/000.jpg' in kept(folder)[0]


def test_addresses_are_opened_by_webdataset_and_known_without_their_signature(tars, train, tmp_path, monkeypatch):
    pytest.importorskip('webdataset', reason='without webdataset (requirements-test.txt) addresses are untested')
    address = f'file:{tars}/images-000.tar'
    names, vectors = kept(embed_shards(MODEL, [f'pipe:cat {tars}/images-000.tar'], tmp_path / 'kept'))
    assert np.allclose(vectors, embed(MODEL, train.head(3)), atol=1e-6) and len(names) == 3
    with pytest.raises(MissingError, match='There is no tar file file:'):  # webdataset's form for a file, which has no //
        tar_files([address])
    signed = [part_of(tmp_path, f'https://example.org/a.tar?signature={letter * 900}') for letter in 'ab']
    assert signed[0] == signed[1] and signed[0].name.startswith('a-') and not signed[0].exists()
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(InputError, match='not installed: pip install webdataset') as error:
        tar_files(['https://example.org/a.tar'])
    assert is_one_sentence(error)


def test_tar_files_are_named_by_folders_files_and_addresses(tars, tmp_path):
    first = str(tars / 'images-000.tar')
    assert tar_files([first, tars]) == [str(tars / f'images-{shard:03}.tar') for shard in range(5)]
    (tmp_path / 'empty').mkdir()
    for given, words in (([tmp_path / 'empty'], 'There is no .tar file in .*empty: name another folder'),
                         ([tars, tars / 'images-00.tar'], 'There is no tar file .*images-00.tar: check the path'),
                         ([], 'No tar file is named: name some')):
        with pytest.raises(MissingError, match=words) as error:
            tar_files(given)
        assert is_one_sentence(error)
    with pytest.raises(InputError, match='Name a run, a folder for the vectors, and tar files') as error:
        shards.main('run', 'folder')


def test_what_cannot_embed_tar_files_is_one_sentence(tars, tmp_path):
    with pytest.raises(InputError, match='takes one image at a time') as error:
        embed_shards(SubmissionFile(MODEL, tmp_path / 'submission.zip'), [tars], tmp_path / 'kept')
    assert is_one_sentence(error)
    (tmp_path / 'file').touch()
    with pytest.raises(FileError, match='could not be written .*choose another folder') as error:
        embed_shards(MODEL, [tars], tmp_path / 'file')
    assert is_one_sentence(error)
    nan = small_model().eval()
    nan.tower[2].weight.data[:] = np.nan
    with pytest.raises(InputError, match='NaN or infinite numbers for images of .*images-000.tar'):
        embed_shards(nan, [tars], tmp_path / 'kept')


# Search

def test_the_nearest_of_all_tar_files_are_exact(tars, train, tmp_path):
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    names, vectors = kept(folder)
    queries = embed(MODEL, train.tail(4))
    found = nearest_in_shards(folder, queries, k=7)
    apart = np.linalg.norm(queries[:, None] - vectors[None], axis=2)
    assert found['query'].tolist() == np.arange(4).repeat(7).tolist()
    assert np.allclose(found['distance'], np.sort(apart, axis=1)[:, :7].ravel(), atol=1e-5)
    places = [names.index(name) for name in found['file']]
    assert np.allclose(apart[found['query'], places], found['distance'], atol=1e-5)
    assert not found.duplicated(['query', 'file']).any()


def test_vectors_that_are_half_written_or_damaged_are_not_searched(tars, train, tmp_path):
    with pytest.raises(MissingError, match='There are no vectors in'):
        nearest_in_shards(tmp_path, np.ones((1, 32), np.float32))
    folder = embed_shards(MODEL, [tars], tmp_path / 'kept')
    query = embed(MODEL, train.head(1))
    (folder / '.part-x.csv').touch()  # another process writes
    parts = sorted(folder.glob('images-*.csv'))
    parts[4].with_suffix('.npy').unlink()
    assert len(nearest_in_shards(folder, query, 20)) == 12
    parts[0].write_text('no table')
    with pytest.raises(FileError, match='was damaged: run the command that embeds again') as error:
        nearest_in_shards(folder, query, 20)
    assert is_one_sentence(error)
    assert len(kept(embed_shards(MODEL, [tars], tmp_path / 'kept'))[0]) == 15
    assert len(nearest_in_shards(folder, query, 20)) == 15


@pytest.mark.parametrize('length', [0, 60, 200])
def test_vectors_that_are_cut_off_are_deleted_and_the_next_command_makes_them_anew(tars, train, tmp_path, length):
    folder, query = embed_shards(MODEL, [tars], tmp_path / 'kept'), embed(MODEL, train.head(1))
    cut = sorted(folder.glob('images-*.npy'))[1]
    cut.write_bytes(cut.read_bytes()[:length])
    with pytest.raises(FileError, match='images-001-.*csv was damaged: run the command that embeds again') as error:
        nearest_in_shards(folder, query, 20)
    assert is_one_sentence(error) and not cut.exists()
    assert embed_shards(MODEL, [tars], tmp_path / 'kept') == folder
    assert len(nearest_in_shards(folder, query, 20)) == 15


@pytest.mark.parametrize('k', [0, -1, True, 2.5, '3', None])
def test_k_counts_images(tars, train, tmp_path, k):
    folder = embed_shards(MODEL, [tars / 'images-000.tar'], tmp_path / 'kept')
    with pytest.raises(InputError, match='but it counts the images to find: give 1 or more') as error:
        nearest_in_shards(folder, embed(MODEL, train.head(1)), k)
    assert is_one_sentence(error)


def test_bytes_are_read_as_their_file_is(train):
    path, image = train['path'][0], content_of(train, 0)
    assert (read_pixels('a.jpg', 32, content=image) == read_pixels(path, 32)).all()
    with pytest.raises(FileError, match='^The image a.jpg cannot be read: '):
        read_pixels('a.jpg', 32, content=b'no image')
    table = pd.DataFrame({'path': [path], 'label': ['a']})
    assert (embed(MODEL, table) == embed(MODEL, train.head(1))).all()
