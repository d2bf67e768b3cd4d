"""Embedding: a vector an image, in order, by one process or two; kept in files that are used for the same weights alone."""
import dataclasses
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, contents, is_one_sentence, new_model, small_model

from guie import embedding
from guie.embedding import cached_vectors, embed, embed_all, save_vectors, selection_score, vectors_hash
from guie.errors import FileError, ProcessError
from guie.images import ImageDataset, read_pixels
from guie.model import Ensemble
from guie.retrieval import mean_precision_at_5


@pytest.fixture
def no_forward(monkeypatch):
    """From when it is called no model is used in this process."""
    return lambda: monkeypatch.setattr(embedding, 'loader', lambda *_, **__: pytest.fail('images were embedded'))


def test_a_vector_is_that_of_its_image_whatever_the_batch(train):
    model = new_model().eval()
    vectors = embed(model, train.head(10), batch_size=4)
    assert vectors.shape == (10, 32) and vectors.dtype == np.float32
    for path, vector in zip(train['path'], vectors):
        with torch.inference_mode():
            alone = model(read_pixels(path, 32).permute(2, 0, 1)[None])[0]
        assert np.allclose(vector, alone, atol=1e-6)
    assert embed(model, train.head(0)).shape[0] == 0


def test_vectors_are_kept_with_their_paths_and_used_again_only_for_the_same_weights(train, tmp_path):
    model, cache = new_model().eval(), tmp_path / 'v.npz'
    first = embed(model, train, cache=cache)
    with np.load(cache) as kept:
        assert kept['paths'].tolist() == train['path'].tolist() and np.array_equal(kept['vectors'], first)
    np.savez(cache, **{**np.load(cache), 'vectors': first * 0})
    assert not embed(model, train, cache=cache).any()
    backwards = embed(model, train.iloc[::-1], cache=cache)
    assert np.allclose(backwards, first[::-1], atol=1e-6)
    model.spec = dataclasses.replace(model.spec, activation='quick_gelu')  # as of a corrected tag
    assert embed(model, train.iloc[::-1], cache=cache).any()
    model.mean += 1
    other = embed(model, train.iloc[::-1], cache=cache)
    assert not np.allclose(other, backwards, atol=1e-6)
    with torch.no_grad():
        model.tower.proj.mul_(1.1)
        model.tower.proj[0, 0] += 1
    assert not np.allclose(embed(model, train.iloc[::-1], cache=cache), other, atol=1e-6)


@pytest.mark.parametrize('key', ['hash', 'digest'])  # the latter of the version before
def test_vectors_are_found_in_any_of_several_files_and_only_the_first_is_written(train, tmp_path, key):
    model, paths = small_model().eval(), np.array(train['path'].tolist(), str)
    known = [tmp_path / 'attached' / name for name in ('absent.npz', 'other.npz', 'right.npz')]
    known[0].parent.mkdir()
    for file, value in zip(known[1:], ('of other weights', vectors_hash(model))):
        np.savez(file, vectors=np.zeros((72, 32), np.float32), paths=paths, **{key: value})
    before = contents(tmp_path)
    assert not embed(model, train, cache=tmp_path / 'own.npz', known=known).any()
    assert embed(model, train, known=known[:2]).any() and contents(tmp_path) == before
    made = embed(model, train, cache=tmp_path / 'own.npz', known=known[:2])
    assert contents(tmp_path).keys() - before.keys() == {'own.npz'}
    assert np.array_equal(cached_vectors(tmp_path / 'own.npz', paths, vectors_hash(model), 32)[0], made)


@pytest.mark.parametrize('name', ['可乐'.encode('gbk'), 'ü'.encode('cp437'), b'\xff\xfe', '可乐'.encode()])
def test_vectors_are_kept_for_paths_of_any_bytes_and_an_unreadable_one_is_named(train, tmp_path, name, capsys):
    broken = tmp_path / os.fsdecode(name)
    broken.write_bytes(b'no image')
    frame = train.head(3).assign(path=[str(broken), *train['path'][1:3]])
    vectors = embed(small_model(), frame, cache=tmp_path / 'vectors.npz')
    said = capsys.readouterr().out
    assert said.encode() and '1 images could not be read, first ' in said
    paths, key = np.array(frame['path'].tolist(), str), vectors_hash(small_model())
    assert np.array_equal(cached_vectors(tmp_path / 'vectors.npz', paths, key, 32)[0], vectors)


def whole_cache(file, paths, key):
    save_vectors(file, np.zeros((len(paths), 32), np.float32), paths, key)
    return file.read_bytes()


DAMAGE = {'empty': lambda whole: b'', 'cut': lambda whole: whole[:-100], 'cut early': lambda whole: whole[:40],
          'no archive': lambda whole: b'not an archive', 'damaged': lambda whole: whole[:300] + b'x' + whole[301:]}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_of_vectors_is_made_again(train, tmp_path, damage):
    model, paths, file = small_model().eval(), np.array(train['path'].tolist(), str), tmp_path / 'v.npz'
    whole = whole_cache(file, paths, vectors_hash(model))
    assert not embed(model, train, cache=file).any()
    file.write_bytes(damage(whole))
    assert embed(model, train, cache=file).any()
    assert cached_vectors(file, paths, vectors_hash(model), 32)[0].any()


def test_a_file_of_python_objects_is_not_read(tmp_path):
    np.savez(tmp_path / 'v.npz', vectors=np.array([{}], dtype=object), paths=np.array(['a']), hash='key')
    assert cached_vectors(tmp_path / 'v.npz', np.array(['a']), 'key', 32) is None


def test_a_disk_that_refuses_the_vectors_costs_only_the_time_to_embed_again(train, tmp_path, capsys):
    (tmp_path / 'file').touch()
    model = small_model().eval()
    assert np.array_equal(embed(model, train, cache=tmp_path / 'file/v.npz'), embed(model, train))
    assert capsys.readouterr().out.count('could not be written') == 1


def test_an_unreadable_image_has_the_vector_of_a_black_square_and_is_named(train, tmp_path, capsys):
    (tmp_path / 'broken.jpg').write_bytes(b'not an image')
    Image.new('RGB', (40, 30)).save(tmp_path / 'black.png')
    model, frame = new_model().eval(), train.head(4).copy()
    frame.loc[2, 'path'] = str(tmp_path / 'broken.jpg')
    vectors = embed(model, frame)
    assert f'1 images could not be read, first {tmp_path}/broken.jpg' in capsys.readouterr().out
    frame.loc[2, 'path'] = str(tmp_path / 'black.png')
    assert np.allclose(vectors, embed(model, frame), atol=1e-6)
    with pytest.raises(OSError, match='More than 0 images .max_unreadable. cannot be read'):
        embed(model, frame.assign(path=str(tmp_path / 'broken.jpg')), max_unreadable=0)
    frame.loc[2, 'path'], bad = str(tmp_path / 'broken.jpg'), []
    capsys.readouterr()
    assert np.array_equal(embed(model, frame, unreadable=bad), vectors)
    assert bad == [str(tmp_path / 'broken.jpg')] and 'could not be read' not in capsys.readouterr().out
    embed(Ensemble([model, model]), frame, unreadable=bad)
    assert bad == [str(tmp_path / 'broken.jpg')] and 'could not be read' not in capsys.readouterr().out


def test_what_could_not_be_read_is_told_as_long_as_it_lasts_and_embedded_once_it_can(train, tmp_path, capsys, no_forward):
    model, frame, file = new_model().eval(), train.head(6).copy(), tmp_path / 'late.png'
    frame.loc[[2, 4], 'path'] = str(file), str(tmp_path / 'absent.png')
    caches = {'cache': tmp_path / 'v.npz', 'known': [tmp_path / 'attached.npz']}
    file.write_bytes(b'a download under way')
    for _ in range(2):  # the second one finds the vectors in the file
        black = embed(model, frame, **caches)
        assert f'2 images could not be read, first {file}; they count as a black' in capsys.readouterr().out
    shutil.copy(tmp_path / 'v.npz', tmp_path / 'attached.npz')
    Image.open(train['path'][9]).save(file)
    vectors = embed(model, frame, **caches)
    assert f'1 images could not be read, first {tmp_path}/absent.png' in capsys.readouterr().out
    expected = embed(model, frame.assign(path=[train['path'][9] if path == str(file) else path for path in frame['path']]))
    assert np.allclose(vectors, expected, atol=1e-5) and not np.allclose(vectors[2], black[2], atol=1e-2)
    no_forward()
    assert np.array_equal(embed(model, frame, **caches), vectors)
    assert np.array_equal(embed_all(model, {'v': frame}, tmp_path, ['v'], unreadable=(bad := []))['v'], vectors)
    assert bad == [str(tmp_path / 'absent.png')]


def test_vectors_are_kept_under_a_name_without_a_suffix_too(train, tmp_path, no_forward):
    model = small_model().eval()
    made = embed(model, train, cache=tmp_path / 'vectors')
    assert list(contents(tmp_path)) == ['vectors']
    no_forward()
    assert np.array_equal(embed(model, train, cache=tmp_path / 'vectors'), made)


def test_no_images_have_as_many_columns_as_images_have(train):
    plain, headed = small_model().eval(), small_model().eval()
    plain.head, projected = None, small_model().eval()
    projected.projection = torch.nn.Linear(32, 16)
    joined = Ensemble([plain, headed], torch.nn.Linear(40, 12)).eval()
    for model, width in ((plain, 8), (headed, 32), (projected, 16), (joined, 12), (Ensemble([plain, projected]), 24)):
        assert embed(model, train.head(0)).shape == (0, width) and embed(model, train.head(2)).shape == (2, width)


def kill_workers(monkeypatch, path):
    """From now on a data-loading process that reads this image is killed, as where memory runs out."""
    here, original = os.getpid(), ImageDataset.readable

    def readable(self, index):
        if os.getpid() != here and self.paths[index] == path:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(ImageDataset, 'readable', readable)


def test_a_killed_data_loading_process_is_one_sentence(train, monkeypatch):
    kill_workers(monkeypatch, train['path'][3])
    with pytest.raises(ProcessError, match='^query: a data-loading process was killed, .*: free some and run') as error:
        embed(small_model(), train, workers=1, desc='query')
    assert is_one_sentence(error) and embed(small_model(), train, workers=0).shape == (72, 32)


def test_what_a_data_loading_process_raises_is_one_sentence_too(train, tmp_path):
    frame = train.head(4).assign(path=str(tmp_path / 'absent.png'))
    with pytest.raises(FileError, match='^More than 1 images .max_unreadable. cannot be read; the last: .*absent') as error:
        embed(small_model(), frame, workers=1, max_unreadable=1)
    assert '\n' not in str(error.value)


def test_several_splits_are_kept_by_name_and_found_again_also_in_a_folder_that_is_not_written(train, tmp_path, no_forward):
    model, splits = small_model().eval(), {'pca': train, 'query': train.head(5), 'index': train.tail(9)}
    made = embed_all(model, splits, tmp_path / 'attached')
    assert {name: len(vectors) for name, vectors in made.items()} == {'pca': 72, 'query': 5, 'index': 9}
    assert sorted(contents(tmp_path)) == [f'attached/{name}.npz' for name in ('index', 'pca', 'query')]
    (tmp_path / 'attached/query.npz').unlink()
    before = contents(tmp_path)
    assert np.array_equal(embed_all(model, splits, known=tmp_path / 'attached')['query'], made['query'])
    assert contents(tmp_path) == before
    embed_all(model, splits, tmp_path / 'own', known=tmp_path / 'attached')
    assert contents(tmp_path).keys() - before.keys() == {'own/query.npz'}
    no_forward()
    found = embed_all(model, splits, tmp_path / 'own', known=tmp_path / 'attached')
    assert all(np.array_equal(found[name], made[name]) for name in splits)


def test_the_selection_score_is_that_of_the_full_width_on_the_selection_split(train):
    model, first = new_model().eval(), train.groupby('label').cumcount() < 2
    splits = {'selection_query': train[first], 'selection_index': train[~first], 'query': train, 'index': train}
    query, index = (embed(model, splits[f'selection_{name}']) for name in ('query', 'index'))
    expected = mean_precision_at_5(query, train[first]['label'], index, train[~first]['label'])
    assert selection_score(model, splits) == pytest.approx(expected) and 0 < expected < 1


def test_images_are_read_once_for_several_models_as_far_as_memory_allows(train, tmp_path, monkeypatch, capsys):
    (tmp_path / 'broken.jpg').write_bytes(b'not an image')
    frame, pixels, read, original = train.head(20).copy(), {}, [], ImageDataset.readable
    frame.loc[2, 'path'] = str(tmp_path / 'broken.jpg')
    first, second = new_model().eval(), new_model(CONFIG.override(head_seed=9)).eval()
    expected = embed(second, frame, batch_size=8)
    told = capsys.readouterr().out
    monkeypatch.setattr(ImageDataset, 'readable', lambda self, index: read.append(index) or original(self, index))
    embed(first, frame, batch_size=8, workers=0, pixels=pixels)
    assert len(read) == 20
    capsys.readouterr()
    assert np.array_equal(embed(second, frame, batch_size=8, workers=0, pixels=pixels), expected) and len(read) == 20
    assert capsys.readouterr().out == told and 'broken.jpg' in told  # what cannot be read is still named
    embed(second, frame.head(5), workers=0, pixels=pixels)  # other images
    assert len(read) == 25
    needed = 3 * 32 * 32 * 20
    for free, again in ((4 * needed, 20), (4 * needed - 1, 40)):
        monkeypatch.setattr(embedding.psutil, 'virtual_memory', lambda free=free: SimpleNamespace(available=free))
        pixels = {}
        read.clear()
        twice = [embed(first, frame, workers=0, pixels=pixels) for _ in range(2)]
        assert np.array_equal(*twice) and len(read) == again


# Several processes

@pytest.mark.parametrize('worth, model', [(73, new_model), (1, small_model)], ids=['few images', 'a tower of ones own'])
def test_no_processes_are_launched_for_few_images_or_for_a_tower_that_they_could_not_build(train, monkeypatch, worth, model):
    monkeypatch.setattr(embedding, 'processes_here', lambda: 2)
    monkeypatch.setattr(embedding, 'WORTH_LAUNCHING', worth)
    monkeypatch.setattr(embedding, 'launch', lambda *_, **__: pytest.fail('processes were launched'))
    model = model().eval()
    assert np.array_equal(embed_all(model, {'query': train}, names=['query'])['query'], embed(model, train))


def test_two_processes_embed_every_image_once_in_order_and_what_they_keep_is_found_here(
        train, tmp_path, monkeypatch, capfd, no_forward):
    (tmp_path / 'broken.jpg').write_bytes(b'not an image')
    model, odd = new_model().eval(), train.tail(7).reset_index(drop=True)
    odd.loc[5, 'path'] = str(tmp_path / 'broken.jpg')  # read by the second process, named by the first
    splits = {'whole': train, 'odd': odd, 'single': train.head(1), 'none': train.head(0), 'known': train.head(3)}
    expected = {name: embed(model, frame) for name, frame in splits.items()}
    attached = embed(model, splits['known'], cache=tmp_path / 'attached/known.npz') + 1
    paths = np.array(splits['known']['path'].tolist(), str)
    save_vectors(tmp_path / 'attached/known.npz', attached, paths, vectors_hash(model))
    before = contents(tmp_path)
    monkeypatch.setattr(embedding, 'processes_here', lambda: 2)
    monkeypatch.setattr(embedding, 'WORTH_LAUNCHING', 1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    capfd.readouterr()
    no_forward()
    found = embed_all(model, splits, tmp_path / 'vectors', list(splits), tmp_path / 'attached')
    for name, vectors in (expected | {'known': attached}).items():
        assert len(found[name]) == len(splits[name]) and np.allclose(found[name], vectors, atol=1e-5), name
    said = capfd.readouterr().out
    assert said.count(f'1 images could not be read, first {tmp_path}/broken.jpg') == 1
    assert re.search('whole: .* 0/1 ', said)  # batches of 64 in the first process, which alone would have 2 of 72 images
    made = contents(tmp_path)
    assert made.keys() - before.keys() == {f'vectors/{name}.npz' for name in ('whole', 'odd', 'single')}
    assert all(made[name] == before[name] for name in before)
    shutil.copy(train['path'][0], tmp_path / 'broken.jpg')  # mended: both processes see it and embed again
    expected, found = found, embed_all(model, splits, tmp_path / 'vectors', list(splits), tmp_path / 'attached')
    assert np.allclose(found['odd'][5], found['whole'][0], atol=1e-5)
    assert np.allclose(np.delete(found['odd'], 5, 0), np.delete(expected['odd'], 5, 0), atol=1e-5)
    monkeypatch.setattr(embedding, 'processes_here', lambda: 1)
    again = embed_all(model, splits, tmp_path / 'vectors', list(splits), tmp_path / 'attached')
    assert all(np.array_equal(again[name], found[name]) for name in splits)


def test_a_model_comes_home_also_after_an_error(train, monkeypatch):
    model, moves = small_model(), []
    monkeypatch.setattr(model, 'to', lambda place: moves.append(place.type) or model)
    monkeypatch.setattr(embedding, 'best_device', lambda: torch.device('meta'))
    with pytest.raises((RuntimeError, NotImplementedError)):
        embed(model, train.head(2), workers=0)
    assert moves == ['meta', 'cpu']


def test_the_number_of_loading_processes_reaches_every_pass_over_the_images(train, monkeypatch):
    seen, loader = [], embedding.loader
    monkeypatch.setattr(embedding, 'loader', lambda *given, workers, **more: seen.append(workers) or loader(
        *given, workers=workers, **more))
    splits = {'selection_query': train[::6], 'selection_index': train[1::6]}
    selection_score(small_model(), splits, workers=0)
    embed_all(small_model(), splits, names=['selection_query'], workers=0)
    assert seen == [0] * 3


def test_relative_paths_from_another_folder_are_other_images(train, tmp_path, monkeypatch):
    for name, source in (('a', train['path'][0]), ('b', train['path'][40])):
        (tmp_path / name).mkdir()
        shutil.copyfile(source, tmp_path / name / '0.png')
    model, frame, found = small_model(), train.head(1).assign(path='0.png'), []
    for name in 'aab':
        monkeypatch.chdir(tmp_path / name)
        found.append(embed(model, frame, cache=tmp_path / 'kept.npz'))
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2], atol=1e-3)
