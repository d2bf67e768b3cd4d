"""Every picture shows the images it is given, and which are right."""
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from guie import pictures
from guie.cells import wrapped
from guie.images import ImageDataset, read_image
from guie.projection import l2_normalise


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


def shown(axis):
    """The image that an axis shows."""
    return np.asarray(axis.get_images()[0].get_array())


def is_shown(axis, paths):
    return any(np.array_equal(shown(axis), pixels(path)) for path in paths)


@cache
def pixels(path):
    return np.asarray(read_image(path, 32))


def place_of(axis, frame):
    """Which row of a table an axis shows."""
    return next(place for place, path in enumerate(frame['path']) if is_shown(axis, [path]))


def is_marked(axis):
    return '×' in texts_of(axis)


def texts_of(axis):
    return [text.get_text() for text in axis.texts]


def frames_of(axes):
    """The colours that images are framed in."""
    return [axis.spines['top'].get_edgecolor() for axis in axes]


def test_augmentations_are_those_of_training_below_the_images_as_read(train):
    pictures.show_augmentation(train, 32, 'autoaugment', count=3, seed=7)
    rows = np.array(plt.gcf().axes).reshape(4, 3)
    plain, augmented = ImageDataset(train, 32), ImageDataset(train, 32, 'autoaugment', seed=7)
    picked = np.random.default_rng(7).choice(len(train), 3, replace=False)
    for column, i in enumerate(picked):
        for axis, item in zip(rows[:, column], [plain[i], *(augmented[epoch, i] for epoch in range(3))]):
            assert np.array_equal(shown(axis), item['image'].permute(1, 2, 0))
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ['as read', 'epoch 0', 'epoch 1', 'epoch 2']


@pytest.fixture
def circle(train):
    """12 images of 12 objects as queries and 4 others of each as index; vectors on a circle, objects side by side, but the
    images of the last object among those of the first."""
    place = {label: number for number, label in enumerate(train['label'].unique())}
    query = train.groupby('label', sort=False).head(1).reset_index(drop=True)
    index = train.groupby('label', sort=False).tail(5).reset_index(drop=True)

    def vectors(frame):
        angle = frame['label'].map(place) % (len(place) - 1) / 2 + frame.groupby('label').cumcount() / 100
        return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)

    return {'query': query, 'index': index}, {'query': vectors(query), 'index': vectors(index)}


def test_neighbours_are_framed_by_whether_they_show_the_object_half_of_them_rows_with_an_error(circle):
    splits, vectors = circle
    pictures.show_neighbours(splits, vectors, size=32, rows=3)
    rows = np.array(plt.gcf().axes).reshape(3, 6)
    assert [texts_of(axis)[-1] for axis in rows[0]] == ['query', *'12345']
    right, wrong = to_rgba('tab:green'), to_rgba('tab:red')
    found = [{right, wrong} & set(frames_of(row[1:])) for row in rows]
    assert found[0] == {right} and all(wrong in colours for colours in found[1:])
    for row in rows:
        label, = (query.label for query in splits['query'].itertuples() if is_shown(row[0], [query.path]))
        own = splits['index']['path'][splits['index']['label'] == label]
        assert texts_of(row[0])[0].replace('\n', ' ') == wrapped(label).replace('\n', ' ')
        assert [colour == right for colour in frames_of(row[1:])] == [is_shown(axis, own) for axis in row[1:]]


@pytest.mark.parametrize('content', [None, b'', b'\xff\xd8\xff', b'no image'], ids=['absent', 'empty', 'torn', 'text'])
def test_an_unreadable_image_is_a_marked_black_one_and_named_once(circle, tmp_path, content, capsys):
    splits, vectors = circle
    bad = str(tmp_path / 'bad.jpg')
    if content is not None:
        Path(bad).write_bytes(content)
    first = splits['index']['label'] == splits['query']['label'].iloc[0]
    splits['index'] = splits['index'].assign(path=splits['index']['path'].mask(first, bad))
    splits['query'] = splits['query'].assign(path=[bad, *splits['query']['path'].iloc[1:]])
    pictures.show_neighbours(splits, vectors, size=32, rows=12)
    marked = [axis for axis in plt.gcf().axes if is_marked(axis)]
    assert len(marked) >= 6 and all(not shown(axis).any() for axis in marked)
    assert all(shown(axis).any() for axis in plt.gcf().axes if not is_marked(axis))
    said = f'1 images of this figure could not be read, first {bad}; they are shown black, with a cross.\n'
    assert capsys.readouterr().out == said
    pictures.show_augmentation(splits['query'], 32, 'flip', count=12)
    assert [is_marked(axis) for axis in plt.gcf().axes].count(True) == 4 and capsys.readouterr().out == said


def test_a_figure_of_unreadable_images_alone_is_one_sentence(circle):
    splits, vectors = circle
    gone = {part: frame.assign(path=[f'/none/{part}{i}.jpg' for i in range(len(frame))]) for part, frame in splits.items()}
    for draw in (lambda: pictures.show_neighbours(gone, vectors, size=32),
                 lambda: pictures.compare_neighbours(gone, {'one': vectors}, size=32),
                 lambda: pictures.show_objects(gone, size=32),
                 lambda: pictures.show_augmentation(gone['query'], 32, 'flip')):
        with pytest.raises(OSError, match='^None of the .* images of this figure can be read, first /none/') as error:
            draw()
        assert '\n' not in str(error.value) and not plt.get_fignums()


def test_with_fewer_than_five_index_images_all_of_them_are_shown(circle):
    splits, vectors = circle
    few = splits | {'index': splits['index'].head(3)}, vectors | {'index': vectors['index'][:3]}
    pictures.show_neighbours(*few, size=32, rows=2)
    assert [texts_of(axis)[-1] for axis in plt.gcf().axes[:4]] == ['query', *'123'] and len(plt.gcf().axes) == 8
    itself = {part: splits['index'].head(3) for part in splits}, {part: vectors['index'][:3] for part in splits}
    pictures.show_neighbours(*itself, exclude_self=True, size=32, rows=3)
    for query, *others in np.array(plt.gcf().axes).reshape(3, 3):
        assert not any(np.array_equal(shown(axis), shown(query)) for axis in others)


def test_names_are_labels_or_those_of_files_and_distances_are_euclidean(circle):
    splits, vectors = circle
    one = {part: frame.assign(label='products-10k/' + pd.Series(range(len(frame))).map('{:02d}'.format))
           for part, frame in splits.items()}
    pictures.show_neighbours(one, vectors, size=32, rows=12)
    for query, *others in np.array(plt.gcf().axes).reshape(12, 6):
        place = int(texts_of(query)[0])
        assert is_shown(query, [splits['query']['path'][place]])
        apart = np.linalg.norm(vectors['index'] - vectors['query'][place], axis=1)
        for axis, distance in zip(others, np.sort(apart)):
            name, said = texts_of(axis)[0].split(' · ')
            assert said == f'{distance:.2f}' and abs(apart[int(name)] - distance) < 1e-6
            assert is_shown(axis, [splits['index']['path'][int(name)]])
    mine = {part: splits['index'] for part in splits}, {part: vectors['index'] for part in splits}
    pictures.show_neighbours(*mine, exclude_self=True, size=32, rows=2)
    for axis in plt.gcf().axes:
        name = re.split(' · |\n', texts_of(axis)[0])[0]
        assert is_shown(axis, [path for path in splits['index']['path'] if os.path.basename(path) == name])


def test_frames_are_grey_where_the_index_has_no_more_of_the_object_and_none_where_all_labels_are_the_same(circle):
    splits, vectors = circle
    two = splits['index'].groupby('label').cumcount() < 2
    fewer = splits | {'index': splits['index'][two]}, vectors | {'index': vectors['index'][two]}
    pictures.show_neighbours(*fewer, size=32, rows=2)
    good, bad = np.array(plt.gcf().axes).reshape(2, 6)
    assert frames_of(good[1:]) == [to_rgba(colour) for colour in ['tab:green'] * 2 + ['tab:grey'] * 3]
    assert to_rgba('tab:red') in frames_of(bad[1:3]) and to_rgba('tab:red') not in frames_of(bad[3:])
    assert len(plt.gcf().legends[0].get_texts()) == 3
    pictures.show_neighbours({part: frame.assign(label='') for part, frame in splits.items()}, vectors, size=32)
    assert set(frames_of(plt.gcf().axes)) == {to_rgba('black')} and not plt.gcf().legends


def test_models_are_compared_on_the_same_queries_a_row_each(circle):
    splits, vectors = circle
    rng = np.random.default_rng(1)
    other = {part: rng.standard_normal((len(rows), 7)).astype(np.float32) for part, rows in vectors.items()}
    models = {'one': vectors, 'two': (other, lambda rows: rows[:, 2:])}
    pictures.compare_neighbours(splits, models, size=32, queries=3)
    axes = np.array(plt.gcf().axes).reshape(3, 11)
    queries = [place_of(row[0], splits['query']) for row in axes]
    assert len({*queries}) == 3 and texts_of(axes[0, 0])[-1] == 'query'
    points = {'one': vectors, 'two': {part: l2_normalise(rows[:, 2:]) for part, rows in other.items()}}
    for query, row in zip(queries, axes):
        for title, five in zip(points, (row[1:6], row[6:])):
            places = [place_of(axis, splits['index']) for axis in five]
            apart = np.linalg.norm(points[title]['index'] - points[title]['query'][query], axis=1)
            assert texts_of(five[0])[1] == title and np.allclose(apart[places], np.sort(apart)[:5], atol=1e-6)
            assert [texts_of(axis)[0][-4:] for axis in five] == [f'{apart[place]:.2f}' for place in places]
            right = splits['index']['label'][places] == splits['query']['label'][query]
            assert frames_of(five) == [to_rgba(colour) for colour in np.where(right, 'tab:green', 'tab:red')]
    pictures.compare_neighbours(splits, {'other way round': other}, size=32, queries=3)
    again = np.array(plt.gcf().axes).reshape(3, 6)[:, 0]
    assert all(np.array_equal(shown(a), shown(b)) for a, b in zip(again, axes[:, 0]))


def test_models_are_compared_on_queries_that_can_be_found_if_there_are_such(circle):
    splits, vectors = circle
    first = splits['index']['label'] == splits['query']['label'][3]
    only = splits | {'index': splits['index'][first]}, vectors | {'index': vectors['index'][first]}
    pictures.compare_neighbours(only[0], {'one': only[1]}, size=32, queries=3)
    assert is_shown(plt.gcf().axes[0], [splits['query']['path'][3]]) and len(plt.gcf().axes) == 6
    pictures.compare_neighbours(splits | {'query': splits['query'].assign(label='unknown')}, {'one': vectors}, size=32)
    assert len(plt.gcf().axes) == 4 * 6


def test_vectors_that_are_not_one_an_image_are_one_sentence(circle):
    splits, vectors = circle
    with pytest.raises(ValueError, match='^index has 60 images but 59 vectors: embed these images.$'):
        pictures.show_neighbours(splits, vectors | {'index': vectors['index'][1:]}, size=32)


def test_objects_are_shown_as_a_query_above_an_index_image_of_the_same(circle):
    splits, _ = circle
    lone = splits['query']['label'][0]
    splits['index'] = pd.concat([splits['index'][splits['index']['label'] != lone], splits['query']], ignore_index=True)
    pictures.show_objects(splits, count=12, size=32)
    rows = np.array(plt.gcf().axes).reshape(6, 4)
    labels = []
    for above, below in zip(rows[::2].flat, rows[1::2].flat):
        label = splits['query']['label'][place_of(above, splits['query'])]
        own = splits['index']['path'][splits['index']['label'] == label]
        own = own[~own.isin(splits['query']['path'])]
        assert wrapped(label) in texts_of(below)
        assert 'none' in texts_of(below) and not below.get_images() if label == lone else is_shown(below, own)
        labels.append(label)
    assert {*labels} == {*splits['query']['label']}
    assert [texts_of(row[0])[-1] for row in rows] == ['query', 'index'] * 3


def test_neighbours_are_those_of_projected_vectors(circle):
    splits, vectors = circle
    wide = {part: np.pad(rows, ((0, 0), (0, 1)), constant_values=9) for part, rows in vectors.items()}
    wide['index'][::2, 2] = 1
    pictures.show_neighbours(splits, vectors, size=32)
    pictures.show_neighbours(splits, wide, lambda rows: rows[:, :2] * rows[:, 2:], size=32)  # brought to length 1 afterwards
    first, second = (plt.figure(number).axes for number in (1, 2))
    assert all(np.array_equal(shown(a), shown(b)) for a, b in zip(first, second, strict=True))
