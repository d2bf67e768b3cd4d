"""Every picture shows the images it is given, and which are right."""
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from guie import pictures
from guie.images import ImageDataset, read_image


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


def shown(axis):
    """The image that an axis shows."""
    return np.asarray(axis.get_images()[0].get_array())


def is_shown(axis, paths):
    return any(np.array_equal(shown(axis), read_image(path, 32)) for path in paths)


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
    assert [axis.get_title() for axis in rows[0]] == ['query', *'12345']
    right, wrong = to_rgba('tab:green'), to_rgba('tab:red')
    found = [{right, wrong} & set(frames_of(row[1:])) for row in rows]
    assert found[0] == {right} and all(wrong in colours for colours in found[1:])
    for row in rows:
        label, = (query.label for query in splits['query'].itertuples() if is_shown(row[0], [query.path]))
        own = splits['index']['path'][splits['index']['label'] == label]
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
    marked = [axis for axis in plt.gcf().axes if axis.texts]
    assert len(marked) >= 6 and all(not shown(axis).any() for axis in marked)
    assert all(shown(axis).any() for axis in plt.gcf().axes if not axis.texts)
    said = f'1 images of this figure could not be read, first {bad}; they are shown black, with a cross.\n'
    assert capsys.readouterr().out == said
    pictures.show_augmentation(splits['query'], 32, 'flip', count=12)
    assert [bool(axis.texts) for axis in plt.gcf().axes].count(True) == 4 and capsys.readouterr().out == said


def test_a_figure_of_unreadable_images_alone_is_one_sentence(circle):
    splits, vectors = circle
    gone = {part: frame.assign(path=[f'/none/{part}{i}.jpg' for i in range(len(frame))]) for part, frame in splits.items()}
    for draw in (lambda: pictures.show_neighbours(gone, vectors, size=32),
                 lambda: pictures.show_augmentation(gone['query'], 32, 'flip')):
        with pytest.raises(OSError, match='^None of the .* images of this figure can be read, first /none/') as error:
            draw()
        assert '\n' not in str(error.value) and not plt.get_fignums()


def test_with_fewer_than_five_index_images_all_of_them_are_shown(circle):
    splits, vectors = circle
    few = splits | {'index': splits['index'].head(3)}, vectors | {'index': vectors['index'][:3]}
    pictures.show_neighbours(*few, size=32, rows=2)
    assert [axis.get_title() for axis in plt.gcf().axes] == ['query', '1', '2', '3'] + [''] * 4
    itself = {part: splits['index'].head(3) for part in splits}, {part: vectors['index'][:3] for part in splits}
    pictures.show_neighbours(*itself, exclude_self=True, size=32, rows=3)
    for query, *others in np.array(plt.gcf().axes).reshape(3, 3):
        assert not any(np.array_equal(shown(axis), shown(query)) for axis in others)


def test_neighbours_are_those_of_projected_vectors(circle):
    splits, vectors = circle
    wide = {part: np.pad(rows, ((0, 0), (0, 1)), constant_values=9) for part, rows in vectors.items()}
    wide['index'][::2, 2] = 1
    pictures.show_neighbours(splits, vectors, size=32)
    pictures.show_neighbours(splits, wide, lambda rows: rows[:, :2] * rows[:, 2:], size=32)  # brought to length 1 afterwards
    first, second = (plt.figure(number).axes for number in (1, 2))
    assert all(np.array_equal(shown(a), shown(b)) for a, b in zip(first, second, strict=True))
