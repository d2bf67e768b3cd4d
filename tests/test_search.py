"""Search: what is found is what comparing all vectors finds, by image and by text, and bad input is one sentence."""
import os
import shutil
import signal
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from runs import is_one_sentence, new_model, one_of_two, small_model
from torch import nn
from worlds import class_folders

import demo
from guie import collection, search
from guie.checkpoints import save_run
from guie.collection import Collection
from guie.config import Config
from guie.embedding import embed
from guie.errors import FileError, InputError, MissingError
from guie.images import read_image
from guie.model import Embedder
from guie.projection import fit_pca, l2_normalise
from guie.results import save_ensemble
from guie.search import Search, faiss_index, nearest_rows, text_recall
from guie.submission import export_submission, host_pixels, load_submission
from guie.text import load_text_tower
from guie.towers import load_image_tower

MODEL = small_model().eval()


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


@pytest.fixture
def photos(train, tmp_path):
    """A folder of 4 class folders with 6 images each."""
    return class_folders(train, tmp_path / 'photos', 'abcd', 6)


@pytest.fixture(scope='module')
def named(tmp_path_factory):
    """A folder of class folders with words that the miniature's text tower knows: 5 objects, 3 images each."""
    root = tmp_path_factory.mktemp('named')
    rows = demo.objects().query("split == 'pretraining'").head(5)
    for row in rows.itertuples(name=None):
        for number, name in enumerate(demo.write_object(row, root / 'drawn', 3, 64, .3, 5)):
            to = root / 'photos' / row[2].replace(' ', '_') / f'{number}.jpg'
            to.parent.mkdir(parents=True, exist_ok=True)
            (root / 'drawn' / name).rename(to)
    return root / 'photos'


def zero_shot(dim=None):
    """The miniature CLIP's own tower, with a projection to `dim`."""
    tower = load_image_tower('local-dir:media/miniature', 'miniature', 64)
    torch.manual_seed(3)
    return Embedder(tower, projection=dim and nn.Linear(128, dim)).eval()


def brute_force(vectors, query, k, leave_out=None):
    """(positions, distances) of the k nearest rows, by (distance, position)."""
    distances = np.linalg.norm(vectors.astype(np.float64) - query.astype(np.float64), axis=1)
    order = [row for row in np.lexsort([np.arange(len(vectors)), distances]) if row != leave_out][:k]
    return order, distances[order]


def units(seed, n, dim=16):
    return l2_normalise(np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32))


def texts_shown():
    return [[text.get_text() for text in axis.texts] for axis in plt.gcf().axes]


# By image

def test_an_image_finds_those_with_the_nearest_vectors_but_not_itself(photos, tmp_path):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    expected = embed(MODEL, found.files.assign(label=''))
    assert np.allclose(found.vectors, expected, atol=1e-6)
    for place in (0, 13, 23):
        rows, distances = brute_force(expected, expected[place], 7, leave_out=place)
        table = found.like(found.files['path'][place], 7)
        assert table.columns.tolist() == ['path', 'distance', 'label'] and table.index.tolist() == list(range(7))
        assert table['path'].tolist() == found.files['path'].iloc[rows].tolist()
        assert table['label'].tolist() == ['abcd'[int(Path(path).stem) // 6] for path in table['path']]
        assert np.allclose(table['distance'], distances, atol=1e-5)


def test_a_path_a_pillow_image_and_an_array_find_the_same(photos, tmp_path, train):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    outside = train['path'][40]
    image = Image.open(outside)
    rows, _ = brute_force(found.vectors, embed(MODEL, train.iloc[[40]])[0], 5)
    expected = found.files['path'].iloc[rows].tolist()
    assert len(expected) == 5
    for query in (outside, Path(outside), image, np.array(image), image.convert('RGBA')):
        assert found.like(query)['path'].tolist() == expected
    inside = found.files['path'][3]
    table = found.like(Image.open(inside))  # only a path is known to be one of the images
    assert table['path'][0] == inside and table['distance'][0] == pytest.approx(0, abs=1e-3)


def test_a_row_shows_the_query_and_what_was_found_with_names_and_distances(photos, tmp_path):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    path = found.files['path'][0]
    table = found.like(path, 3)
    shown = texts_shown()
    assert shown[0] == ['0.jpg', 'query']
    assert shown[1:] == [[f'{label} · {distance:.2f}', str(rank)] for rank, (label, distance) in enumerate(zip(
        table['label'], table['distance']), start=1)]
    for axis, shown in zip(plt.gcf().axes, [path, *table['path']]):
        assert np.array_equal(axis.get_images()[0].get_array(), read_image(shown, 96))
    plt.close('all')
    found.like(np.array(read_image(path, 32)), 12)
    assert len(plt.gcf().axes) == 13 and texts_shown()[0] == ['query']
    plt.close('all')
    found.like(path, draw=False)
    assert plt.get_fignums() == []


def test_an_image_that_changed_since_is_embedded_anew_and_still_not_its_own_neighbour(photos, tmp_path, train):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    path = found.files['path'][2]
    shutil.copy(train['path'][50], path)
    rows, _ = brute_force(found.vectors, embed(MODEL, train.iloc[[50]])[0], 5, leave_out=2)
    assert found.like(path)['path'].tolist() == found.files['path'].iloc[rows].tolist()


def test_an_image_is_not_its_own_neighbour_whichever_links_lead_to_it_or_to_the_folder(photos, tmp_path, train):
    (tmp_path / 'link').symlink_to(photos)
    (photos / 'a/again.jpg').symlink_to(photos / 'a/1.jpg')  # an image of its own
    (tmp_path / 'one.jpg').symlink_to(photos / 'a/1.jpg')
    table = pd.DataFrame({'path': [str(tmp_path / 'link' / path.relative_to(photos)) for path in photos.rglob('*.jpg')]})
    for folder in (photos, tmp_path / 'link', table):
        found = Search(MODEL, folder, cache=tmp_path / 'kept')
        for query, name in ((photos / 'a/0.jpg', 'a/0.jpg'), (tmp_path / 'link/a/0.jpg', 'a/0.jpg'),
                            (photos / 'a/again.jpg', 'a/again.jpg'), (tmp_path / 'one.jpg', 'a/1.jpg')):
            assert found.files['path'][found.place_of(query)].endswith(f'/{name}')
            assert not found.like(query, 24, draw=False)['path'].str.endswith(f'/{name}').any()
        assert found.place_of(train['path'][40]) is None


def test_more_than_there_are_is_all_there_are_and_said(photos, tmp_path, capsys):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    table = found.like(found.files['path'][0], 99)
    assert len(table) == 23 and 'There are only 23 images to find, so k=99 finds 23.' in capsys.readouterr().out
    alone = Search(MODEL, found.files.head(1), cache=tmp_path / 'one')
    assert alone.like(alone.files['path'][0]).empty and 'only 0 images' in capsys.readouterr().out
    assert alone.nearest(alone.vectors[0])['distance'].tolist() == pytest.approx([0], abs=1e-6)


@pytest.mark.parametrize('query, error, words', [
    ('none.jpg', MissingError, 'There is no image none.jpg'), ('', MissingError, 'There is no image'),
    ('broken.jpg', FileError, 'broken.jpg cannot be read'), (np.zeros((4, 4, 3)), InputError, 'is no image: give uint8'),
    (np.zeros((4, 4), np.uint8), InputError, r'\(4, 4\) is no image'), (7, InputError, 'A int is no image')])
def test_a_query_that_is_no_image_is_one_sentence(photos, tmp_path, monkeypatch, query, error, words):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    monkeypatch.chdir(tmp_path)
    Path('broken.jpg').write_bytes(b'no image')
    with pytest.raises(error, match=words) as caught:
        found.like(query)
    assert is_one_sentence(caught)


@pytest.mark.parametrize('folders', [[b'\xff\xfe'], [b'\xff\xfe', b'\xfd']])
def test_names_that_are_no_utf_8_are_found_and_shown(train, tmp_path, capsys, folders):
    for place, path in enumerate(train['path'][:6]):
        to = tmp_path / 'photos' / os.fsdecode(folders[place % len(folders)]) / f'{place}{os.fsdecode(bytes([0xff]))}.jpg'
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    (to.parent / os.fsdecode(b'\xfe.jpg')).write_bytes(b'no image')
    found = Search(zero_shot(), tmp_path / 'photos', cache=tmp_path / 'kept')
    rows, _ = brute_force(found.vectors, found.vectors[4], 5, leave_out=4)
    assert found.like(found.files['path'][4])['path'].tolist() == found.files['path'].iloc[rows].tolist()
    assert len(found.text('apple')) == 5 and repr(found).encode() and capsys.readouterr().out.encode()


@pytest.mark.parametrize('k', [0, -1, 2.5, True, '5', None])
def test_k_counts_images(photos, tmp_path, k):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    with pytest.raises(InputError, match='counts the images to find') as error:
        found.like(found.files['path'][0], k)
    assert is_one_sentence(error)


@pytest.mark.parametrize('vector', [np.zeros(31), np.full(32, np.nan), np.zeros((1, 32))])
def test_another_vector_is_one_sentence(photos, tmp_path, vector):
    with pytest.raises(InputError, match='give 32 finite numbers') as error:
        Search(MODEL, photos, cache=tmp_path / 'kept').nearest(vector)
    assert is_one_sentence(error)


def test_a_vector_is_scaled_before_it_is_compared(photos, tmp_path):
    found = Search(MODEL, photos, cache=tmp_path / 'kept')
    query = np.arange(1, 33)
    rows, distances = brute_force(found.vectors, query / np.linalg.norm(query), 4)
    table = found.nearest(query, 4)
    assert table['path'].tolist() == found.files['path'].iloc[rows].tolist() and np.allclose(table['distance'], distances)


# Models

def test_the_run_says_where_vectors_are_kept_and_what_there_is(photos, tmp_path, capsys, monkeypatch):
    save_run(tmp_path / 'run', new_model().eval(), Config())
    (photos / 'a/0.jpg').write_bytes(b'no image')
    found = Search(tmp_path / 'run', photos)
    kept, = (tmp_path / 'run/search').iterdir()
    assert repr(found) == (f'Search: 23 images (1 cannot be read) of {photos}, 32 numbers each by {tmp_path}/run, kept in '
                           f'{kept}') and kept.name.startswith('photos-')
    monkeypatch.setattr(collection, 'embed', lambda *_, **__: pytest.fail('images were embedded'))
    again = Search(tmp_path / 'run/model.safetensors', photos)
    assert isinstance(again.vectors, np.memmap) and np.array_equal(again.vectors, found.vectors)
    assert sorted(path.name for path in photos.iterdir()) == list('abcd')  # nothing is written among the images


def test_a_run_of_64_numbers_and_an_ensemble_are_searched_by_theirs(photos, train, tmp_path):
    torch.manual_seed(1)
    members = [new_model().eval(), zero_shot()]
    members[0].projection = nn.Linear(32, 20)
    frame = train.head(9)
    full = [embed(members[0].tower and Embedder(members[0].tower, members[0].head).eval(), frame), embed(members[1], frame)]
    joint = np.concatenate(full, 1)
    pca = fit_pca(joint, 6)
    for name, member in zip('ab', members):
        save_run(tmp_path / name, member, Config())
    save_ensemble(tmp_path / 'both', [tmp_path / 'a', tmp_path / 'b'], pca)
    with torch.no_grad():
        projected = l2_normalise(members[0].projection(torch.from_numpy(full[0])).numpy())
    assert np.allclose(Search(tmp_path / 'a', frame).vectors, projected, atol=1e-5)
    both = Search(tmp_path / 'both', frame)
    assert both.vectors.shape == (9, 6) and np.allclose(both.vectors, l2_normalise(pca(joint)), atol=1e-5)
    rows, _ = brute_force(both.vectors, both.vectors[4], 5, leave_out=4)
    assert both.like(frame['path'][4])['path'].tolist() == frame['path'].iloc[rows].tolist()
    loaded = Search(both.model, frame, cache=tmp_path / 'kept')
    assert np.array_equal(loaded.vectors, both.vectors) and ' by ensemble, kept in' in repr(loaded)


def test_a_submission_is_searched_by_what_the_host_would_compute(photos, tmp_path, capsys):
    torch.manual_seed(2)
    path = tmp_path / 'out/submission.zip'
    export_submission(zero_shot(24), path)
    (photos / 'a/1.jpg').write_bytes(b'no image')
    found = Search(path, photos)
    module = load_submission(path)
    with torch.no_grad():
        expected = np.stack([module(host_pixels(path)[None])[0].numpy() for path in found.files['path']])
    assert found.vectors.shape == (23, 24) and np.allclose(found.vectors, expected, atol=1e-6)
    assert found.unreadable == [str(photos / 'a/1.jpg')] and str(tmp_path / 'out/search') in repr(found)
    rows, _ = brute_force(expected, expected[5], 5, leave_out=5)
    assert found.like(found.files['path'][5])['path'].tolist() == found.files['path'].iloc[rows].tolist()
    with pytest.raises(FileError, match='cannot be read') as error:
        found.like(photos / 'a/1.jpg')
    assert is_one_sentence(error)


def test_what_cannot_search_is_one_sentence(photos, tmp_path):
    for run, error in ((nn.Linear(3, 3), InputError), (7, InputError), (tmp_path / 'none', FileNotFoundError),
                       (tmp_path / 'none.zip', MissingError)):
        with pytest.raises(error) as caught:
            Search(run, photos)
        assert is_one_sentence(caught)
    assert not (tmp_path / 'search').exists()


# Neighbours

@pytest.mark.parametrize('leave_out', [None, 0, 37])
def test_neighbours_are_exact_in_the_order_of_distance_and_position(leave_out):
    vectors = units(0, 300)
    vectors[[50, 120, 250]] = vectors[37]
    for query in (vectors[37], *units(1, 5)):
        rows, distances = brute_force(vectors, query, 9, leave_out)
        found = nearest_rows(vectors, query, 9, leave_out)
        assert found[0].tolist() == rows and np.allclose(found[1], distances, atol=1e-6)


def test_rounded_products_do_not_decide():
    query, rng = units(2, 1, 64)[0], np.random.default_rng(0)
    vectors = l2_normalise(query + 3e-4 * rng.standard_normal((5000, 64), dtype=np.float32))
    by_product = np.argsort(-(vectors @ query), kind='stable')
    wrong = 0
    for k in range(1, 60):
        expected, _ = brute_force(vectors, query, k)
        assert nearest_rows(vectors, query, k)[0].tolist() == expected
        wrong += {*by_product[:k].tolist()} != {*expected}
    assert wrong > 5  # products alone choose others


def test_faiss_finds_the_same_and_its_groups_recall_is_printed(photos, tmp_path, capsys, monkeypatch):
    pytest.importorskip('faiss', reason='without faiss (benchmarks/requirements.txt) Search(faiss=True) is untested')
    vectors = units(3, 3000)
    index = faiss_index(vectors, part=700)
    assert index.ntotal == 3000 and capsys.readouterr().out == ''
    for place, query in enumerate(vectors[:20]):
        rows, _ = brute_force(vectors, query, 5, place)
        assert nearest_rows(vectors, query, 5, place, index)[0].tolist() == rows
    monkeypatch.setattr(search, 'FLAT', 1000)
    groups, queries = faiss_index(vectors), np.linspace(0, 2999, 100).astype(int)
    recall = np.mean([np.isin(brute_force(vectors, vectors[query], 5, query)[0],
                              nearest_rows(vectors, vectors[query], 5, query, groups)[0]) for query in queries])
    assert f'faiss: recall@5 {recall:.3f} against exact search, for 100 of the images.' in capsys.readouterr().out
    assert .05 < recall < 1
    assert len(nearest_rows(vectors, vectors[0], 2900, 0, groups)[0]) == 2900  # more than its groups hold: exact
    with_index = Search(MODEL, photos, cache=tmp_path / 'kept', faiss=True)
    path = with_index.files['path'][8]
    assert with_index.like(path).equals(Search(MODEL, photos, cache=tmp_path / 'kept').like(path))


def test_faiss_is_used_unasked_only_for_many_images_where_it_is_installed(photos, tmp_path, monkeypatch):
    pytest.importorskip('faiss', reason='without faiss its use for many images is untested')
    assert Search(MODEL, photos, cache=tmp_path).faiss is None
    monkeypatch.setattr('guie.search.FLAT', 3)
    assert Search(MODEL, photos, cache=tmp_path, faiss=False).faiss is None
    assert Search(MODEL, photos, cache=tmp_path).faiss.ntotal > 3
    monkeypatch.setitem(__import__('sys').modules, 'faiss', None)
    assert Search(MODEL, photos, cache=tmp_path).faiss is None


def test_faiss_that_is_not_installed_is_one_sentence(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'faiss', None)
    with pytest.raises(InputError, match='pip install faiss-cpu') as error:
        Search(MODEL, photos, cache=tmp_path / 'kept', faiss=True)
    assert is_one_sentence(error)


# By text

def by_hand(model, words):
    """Where a text lies: its vector, of length 1, through the model's projection."""
    vectors = l2_normalise(load_text_tower('local-dir:media/miniature', 'miniature')(words))
    if model.projection is None:
        return vectors
    return l2_normalise(vectors @ model.projection.weight.detach().numpy().T + model.projection.bias.detach().numpy())


@pytest.mark.parametrize('dim', [None, 40])
def test_a_text_finds_what_lies_nearest_to_it_through_the_same_projection(named, tmp_path, dim, capsys):
    model = zero_shot(dim)
    found = Search(model, named, cache=tmp_path / 'kept')
    labels = sorted(path.name for path in named.iterdir())
    words = [label.replace('_', ' ') for label in labels]
    queries = by_hand(model, words)
    hits = []
    for word, label, query in zip(words, labels, queries):
        rows, distances = brute_force(found.vectors, query, 5)
        table = found.text(word)
        assert table['path'].tolist() == found.files['path'].iloc[rows].tolist()
        assert np.allclose(table['distance'], distances, atol=1e-5)
        hits.append(label in found.files['label'].iloc[rows].tolist())
    chance = 1 - comb(12, 5) / comb(15, 5)
    said = capsys.readouterr().out
    assert said.count(f'among its first five for {np.mean(hits):.1%} of 5 labels ({chance:.1%} by chance).') == 1
    assert said.count('Search by text') == 1
    assert dim or np.mean(hits) == 1
    assert len(list((tmp_path / 'kept').rglob('*.npy'))) == 1
    assert texts_shown()[0][-1].replace('\n', ' ') == word or '…' in texts_shown()[0][-1]


def test_a_trained_head_is_left_out_for_texts_and_the_towers_vectors_are_kept_too(named, tmp_path, capsys, monkeypatch):
    trained = new_model().eval()
    tower = Embedder(trained.tower).eval()
    found = Search(trained, named, cache=tmp_path / 'kept')
    expected = embed(tower, found.files)
    rows, _ = brute_force(expected, by_hand(tower, ['abacus'])[0], 4)
    assert found.text('abacus', 4)['path'].tolist() == found.files['path'].iloc[rows].tolist()
    assert found.vectors.shape[1] == 32 and 'what the tower alone sees' in capsys.readouterr().out
    assert sorted(path.name.split('-')[0] for path in next((tmp_path / 'kept').iterdir()).iterdir()) == ['text', 'vectors']
    monkeypatch.setattr(collection, 'embed', lambda *_, **__: pytest.fail('images were embedded'))
    again = Search(trained, named, cache=tmp_path / 'kept')
    assert again.text('abacus', 4)['path'].tolist() == found.files['path'].iloc[rows].tolist()


def test_without_class_folders_it_says_that_nothing_is_known_of_its_texts(named, tmp_path, capsys):
    images = sorted(named.rglob('*.jpg'))[:4]
    found = Search(zero_shot(), pd.DataFrame({'path': images}), cache=tmp_path / 'kept')
    assert len(found.text('apple', 9)) == 4
    said = capsys.readouterr().out
    assert 'How well texts find these images is not known' in said and 'Search by text' not in said


def test_the_recall_of_texts_is_that_of_a_few_names_where_there_are_many(monkeypatch):
    labels, words = [f'kind_{number}' for number in range(9) for _ in range(1 + number % 3)], []
    model, vectors = Embedder(nn.Flatten(), spec=MODEL.spec), units(5, len(labels), 8)
    anchors = units(6, 9, 8)

    def encode(texts):
        words.extend(texts)
        return anchors[[int(text.split()[1]) for text in texts]]

    model.register_parameter('any', nn.Parameter(torch.zeros(1)))
    monkeypatch.setattr(search, 'NAMES', 3)
    files = pd.DataFrame({'path': labels, 'label': labels})
    said = text_recall((encode, model, Collection(files, vectors, [])))
    assert words == ['kind 0', 'kind 4', 'kind 8']
    hits = [f'kind_{number}' in np.array(labels)[brute_force(vectors, anchors[number], 5)[0]] for number in (0, 4, 8)]
    chance = np.mean([1 - comb(18 - count, 5) / comb(18, 5) for count in (1, 2, 3)])
    assert f'{np.mean(hits):.1%} of 3 labels ({chance:.1%} by chance)' in said


def test_the_recall_of_texts_is_the_same_for_labels_of_categories_some_of_which_no_image_has(named, tmp_path, capsys):
    files = Search(zero_shot(), named, cache=tmp_path / 'kept').files
    categories = pd.Categorical(files['label'], [*files['label'].unique(), *map(str, range(40))])
    said = []
    for table in (files, files.assign(label=categories)):
        found = Search(zero_shot(), table[['path', 'label']], cache=tmp_path / 'kept')
        found.text('apple', 3)
        said.append(next(line for line in capsys.readouterr().out.splitlines() if 'Search by text' in line))
    assert said[0] == said[1]


@pytest.mark.parametrize('words', ['', '  ', None, 7, ['red']])
def test_a_text_is_some_words(named, tmp_path, words):
    with pytest.raises(InputError, match='give some words') as error:
        Search(zero_shot(), named, cache=tmp_path / 'kept').text(words)
    assert is_one_sentence(error)


def test_models_without_a_text_half_say_why_and_what_to_do(photos, train, tmp_path):
    export_submission(zero_shot(8), tmp_path / 'submission.zip')
    save_run(tmp_path / 'a', zero_shot(), Config())
    save_ensemble(tmp_path / 'both', [tmp_path / 'a', tmp_path / 'a'], fit_pca(units(1, 40, 256), 6))
    timm = load_image_tower('timm:test_vit', 'random', 32)
    for run, words in ((tmp_path / 'submission.zip', 'submission.zip holds'), (tmp_path / 'both', 'of an ensemble share'),
                       (Embedder(timm), 'timm:test_vit has')):
        with pytest.raises(InputError, match=f'{words} no text half: search by the run of one open_clip model') as error:
            Search(run, train.head(3), cache=tmp_path / 'kept').text('apple')
        assert is_one_sentence(error)


# Several processes

KILLED = """
import os, signal, sys
from guie import collection, search
collection.PART, write = 2, collection.write_part
def write_one_and_die(*given):
    write(*given)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == 'dies':
    collection.write_part = write_one_and_die
search.main(*sys.argv[2:])
"""


def test_of_two_processes_one_is_killed_and_the_same_command_goes_on_from_there(photos, tmp_path, monkeypatch):
    save_run(tmp_path / 'run', model := new_model().eval())
    given = tmp_path / 'run', photos, tmp_path / 'kept'
    killed, other = one_of_two(0, KILLED, 'dies', *given), one_of_two(1, KILLED, 'lives', *given)
    assert (killed.wait(), other.wait()) == (-signal.SIGKILL, 0)
    tables = [pd.read_csv(file) for file in (tmp_path / 'kept').rglob('*.csv')]
    assert sorted(map(len, tables)) == [2] * 7  # one part of the killed process, six of the other
    assert [one.wait() for one in [one_of_two(rank, KILLED, 'lives', *given) for rank in range(2)]] == [0, 0]
    named = pd.concat([pd.read_csv(file) for file in (tmp_path / 'kept').rglob('*.csv')])['file']
    assert len(named) == 24 and named.is_unique  # nothing twice
    monkeypatch.setattr('guie.collection.vectors_of', lambda *_, **__: pytest.fail('all are embedded'))
    found = Search(tmp_path / 'run', photos, cache=tmp_path / 'kept')
    expected = embed(model, found.files.assign(label=''))
    assert np.allclose(found.vectors, expected, atol=1e-6) and isinstance(found.vectors, np.memmap)


@pytest.mark.parametrize('given', [(), ('run',), ('run', 'photos', 'kept', 'more')])
def test_a_process_that_is_not_told_what_to_embed_is_one_sentence(tmp_path, given):
    with pytest.raises(InputError, match='Name a run and a folder of images') as error:
        search.main(*given)
    assert is_one_sentence(error)
    if not given:
        done = subprocess.run([sys.executable, '-m', 'guie.search'], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {'PYTHONPATH': os.getcwd()})
        assert done.returncode == 1 and done.stderr == f'{error.value}\n' and not [*tmp_path.iterdir()]


def test_where_there_are_several_gpus_many_images_are_embedded_by_a_process_each(photos, tmp_path, monkeypatch, capsys):
    save_run(tmp_path / 'run', model := new_model().eval())
    monkeypatch.setattr('guie.search.processes_here', lambda: 2)
    monkeypatch.setattr('guie.search.WORTH_LAUNCHING', 24)
    monkeypatch.setattr('guie.collection.vectors_of', lambda *_, **__: pytest.fail('the processes embed all'))
    found = Search(tmp_path / 'run', photos)
    assert np.allclose(found.vectors, embed(model, found.files.assign(label='')), atol=1e-6)
    monkeypatch.setattr('guie.search.launch', lambda *_, **__: pytest.fail('nothing is left to embed'))
    assert len(Search(tmp_path / 'run', photos).files) == 24


def test_an_image_that_cannot_be_read_is_told_why(named, tmp_path):
    whole = next(named.rglob('*.jpg')).read_bytes()
    (tmp_path / 'half.jpg').write_bytes(whole[:len(whole) // 3])
    (tmp_path / 'notes.heic').write_text('no image')
    found = Search(zero_shot(), named, cache=tmp_path / 'kept')
    for name, why in (('half.jpg', 'truncated|premature|broken'), ('notes.heic', 'files of this kind need pillow-heif')):
        with pytest.raises(OSError, match=f'{name} cannot be read: .*({why})'):
            found.like(tmp_path / name)
