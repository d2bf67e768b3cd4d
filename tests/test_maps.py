"""Maps: similarities are those of the pairs that they are said to be of, and images stand where their vectors are near."""
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from guie import maps
from guie.images import read_image


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


@pytest.fixture
def searched(train):
    """12 objects with 2 images each as queries and 4 as index, and random vectors around a direction of each object."""
    rng, place = np.random.default_rng(3), train.groupby('label').cumcount()
    splits = {'query': train[place < 2].reset_index(drop=True), 'index': train[place >= 2].reset_index(drop=True)}
    centres = pd.DataFrame(rng.standard_normal((12, 16)), index=train['label'].unique())
    return splits, {part: (centres.loc[frame['label']].to_numpy() + rng.standard_normal((len(frame), 16))).astype(np.float32)
                    for part, frame in splits.items()}


def cosines(splits, vectors, projection=lambda rows: rows):
    """(similarities of all pairs, whether they are of one object), by numpy, both (queries, index images)."""
    query, index = (projection(vectors[part]) for part in ('query', 'index'))
    query, index = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (query, index))
    return query @ index.T, splits['query']['label'].to_numpy()[:, None] == splits['index']['label'].to_numpy()


def title(axis):
    return axis.texts[0].get_text()


def heights(axis):
    """The bars of each colour."""
    return [[bar.get_height() for bar in bars] for bars in axis.containers]


def test_every_pair_of_each_kind_is_in_the_histogram_and_the_title_says_the_area_under_the_roc_curve(searched):
    splits, vectors = searched
    ways = {'all': lambda rows: rows, 'two of $16_x$': lambda rows: rows[:, :2]}
    maps.plot_similarities(splits, {'all': vectors, 'two of $16_x$': (vectors, ways['two of $16_x$'])})
    for axis, (name, projection) in zip(plt.gcf().axes, ways.items()):
        values, same = cosines(splits, vectors, projection)
        area = roc_auc_score(same.ravel(), values.ravel())
        assert title(axis) == f'{name}: a pair of the same object is more alike than another {area:.1%} of the time'
        bars = axis.containers[0]
        edges = np.array([bar.get_x() for bar in bars] + [bars[-1].get_x() + bars[-1].get_width()])
        for found, mask in zip(heights(axis), (~same, same)):
            assert np.allclose(found, np.histogram(values[mask], edges)[0] / mask.sum(), atol=2 / mask.sum())
            assert np.isclose(sum(found), 1)


@pytest.mark.parametrize('same', [True, False])
def test_pairs_are_sampled_without_repetition_evenly_and_by_the_generator_alone(searched, same):
    splits, _ = searched
    seen = np.zeros((24, 48))
    for seed in range(60):
        queries, index = maps.sample_pairs(splits, same, 48, np.random.default_rng(seed))
        assert len({*zip(queries.tolist(), index.tolist())}) == 48
        again = maps.sample_pairs(splits, same, 48, np.random.default_rng(seed))
        assert np.array_equal(again, (queries, index))
        seen[queries, index] += 1
    right = cosines(splits, {part: np.ones((len(frame), 1)) for part, frame in splits.items()})[1] == same
    assert not seen[~right].any() and seen.sum() == 60 * 48
    rows = seen.sum(1) / seen.sum()
    assert abs(rows - 1 / 24).max() < .02  # of each query alike
    everything = maps.sample_pairs(splits, same, 10 ** 6, np.random.default_rng(0))
    assert {*zip(*map(np.ndarray.tolist, everything))} == {*map(tuple, np.argwhere(right).tolist())}


def test_an_image_makes_no_pair_with_itself(searched):
    index = searched[0]['index']
    queries, others = maps.sample_pairs({'query': index, 'index': index}, True, 10 ** 6, np.random.default_rng(0))
    assert len(queries) == 12 * 4 * 3 and (queries != others).all()


def test_few_pairs_are_enough_and_without_any_there_is_a_sentence(searched, capsys):
    splits, vectors = searched
    two = {part: [0, len(rows) - 1] for part, rows in vectors.items()}
    few = {part: splits[part].iloc[rows] for part, rows in two.items()}
    points = {part: vectors[part][rows] for part, rows in two.items()}
    maps.plot_similarities(few, {'two': points})
    values, same = cosines(few, points)
    assert title(plt.gcf().axes[0]).endswith(f' {roc_auc_score(same.ravel(), values.ravel()):.1%} of the time')
    plt.close('all')
    for part, words in (('unknown', 'the same object'), (few['query']['label'].iloc[0], 'different objects')):
        maps.plot_similarities({'query': few['query'].iloc[:1], 'index': few['index'].iloc[:1].assign(label=part)},
                               {'two': {name: rows[:1] for name, rows in points.items()}})
        assert capsys.readouterr().out == f'No query and index image show {words}: there are no similarities to compare.\n'
    assert not plt.get_fignums()


def test_ties_count_half():
    assert maps.area_under_curve(np.array([1., 2.]), np.array([1., 1.])) == .75
    high, low = np.random.default_rng(0).integers(0, 9, (2, 300))
    truth = roc_auc_score(np.repeat([1, 0], 300), np.concatenate([high, low]))
    assert np.isclose(maps.area_under_curve(high, low), truth)


def test_a_vector_that_is_not_finite_is_one_sentence(searched):
    splits, vectors = searched
    vectors['index'][7, 3] = np.nan
    for draw in (lambda: maps.plot_similarities(splits, {'a': vectors}), lambda: maps.show_map(splits, vectors)):
        with pytest.raises(ValueError, match='^Vectors of this figure hold NaN or infinite values: '):
            draw()


def places_shown(axis, splits, size=maps.THUMBNAIL):
    """[(part, row, (left, right, bottom, top))] of the images on a map."""
    known = {read_image(path, size).tobytes(): (part, row) for part, frame in splits.items()
             for row, path in enumerate(frame['path'])}
    return [(*known[np.asarray(image.get_array()).tobytes()], image.get_extent()) for image in axis.images]


def test_images_of_a_map_do_not_cover_each_other_stand_by_their_like_and_are_framed_as_what_they_are(searched):
    splits, vectors = searched
    close = {part: rows * .1 + vectors['query'][::2][splits[part]['label'].factorize()[0]] for part, rows in vectors.items()}
    maps.show_map(splits, close)
    axis, = plt.gcf().axes
    images, (frames, lines, dots) = places_shown(axis, splits), axis.collections
    assert len({(part, row) for part, row, _ in images}) == len(images) > 12
    assert len(images) + len(dots.get_offsets()) == 24 + 48
    boxes = np.array([extent for _, _, extent in images])
    lefts, lows = boxes[:, [0, 1]], boxes[:, [2, 3]]
    apart = (lefts[:, None, 0] >= lefts[:, 1]) | (lefts[:, 0] >= lefts[:, None, 1]) | (
        lows[:, None, 0] >= lows[:, 1]) | (lows[:, 0] >= lows[:, None, 1])
    assert (apart | np.eye(len(boxes), dtype=bool)).all() and boxes.min() >= 0 and boxes.max() <= 1
    assert [tuple(colour) for colour in frames.get_edgecolor()] == [
        to_rgba({'query': 'tab:orange', 'index': 'tab:blue'}[part]) for part, _, _ in images]
    labels = np.array([splits[part]['label'][row] for part, row, _ in images])
    centres = np.stack([lefts.mean(1), lows.mean(1)], 1)
    far = np.linalg.norm(centres[:, None] - centres, axis=2) + 9 * np.eye(len(centres))
    shared = np.isin(labels, [label for label in labels if (labels == label).sum() > 1])
    assert (labels[far.argmin(1)] == labels)[shared].mean() > .5
    ends = {tuple(map(tuple, np.round(line.vertices, 6))) for line in lines.get_paths()}
    pairs = {tuple(map(tuple, np.round(centres[[a, b]], 6))) for a, b in np.argwhere(labels[:, None] == labels) if a != b}
    assert ends <= pairs and len(ends) == len(labels) - len({*labels})


@pytest.mark.parametrize('rows', [(2, 0), (2, 3), (4, 5), (5, 5), (12, 40)])
@pytest.mark.parametrize('kind', ['random', 'equal', 'one column'])
def test_a_map_of_few_or_of_equal_vectors(searched, rows, kind, recwarn, capfd):
    splits, vectors = ({part: whole[part][:count] for part, count in zip(('query', 'index'), rows)} for whole in searched)
    projection = {'random': None, 'equal': lambda rows: rows[:, :3] * 0 + 1,
                  'one column': lambda rows: np.sign(np.arange(len(rows)) - .5)[:, None]}[kind]
    maps.show_map(splits, vectors, projection, images=30)
    axis, = plt.gcf().axes
    shown, different = len(axis.images), {'random': sum(rows), 'equal': 1}.get(kind, 2)
    assert 1 <= shown <= 30 and shown + len(axis.collections[2].get_offsets()) == sum(rows)
    assert shown == different if different < 3 else shown > 1
    plt.gcf().canvas.draw()
    assert not recwarn.list and capfd.readouterr() == ('', '')


def test_at_most_so_many_images_are_shown_and_every_one_once(searched):
    splits, vectors = searched
    for images in (1, 5, 20):
        maps.show_map(splits, vectors, images=images)
        assert images / 2 <= len(plt.gcf().axes[0].images) <= images
    mine = {part: splits['index'] for part in splits}
    maps.show_map(mine, {part: vectors['index'] for part in splits})
    axis, = plt.gcf().axes
    assert len(axis.images) + len(axis.collections[2].get_offsets()) == 48


def test_a_sample_takes_some_images_of_each_object_before_more_of_any_and_queried_objects_first():
    def frame(counts, name):
        labels = np.repeat([*counts], [*counts.values()])
        return pd.DataFrame({'path': [f'{name}{i}' for i in range(len(labels))], 'label': labels})

    others = {f'x{i}': 9 for i in range(50)}
    splits = {'query': frame({'a': 400, 'b': 1}, 'q'), 'index': frame({'a': 800, 'b': 2} | others, 'i')}

    def counts(most):
        table = maps.sample_images(splits, most, np.random.default_rng(5))
        rows = pd.DataFrame([splits[('query', 'index')[part]].iloc[row] for part, row in zip(table['part'], table['row'])])
        assert [*rows['path']] == [*table['path']] and table['path'].is_unique
        return rows['label'].value_counts()

    assert counts(8).to_dict() == {'a': 5, 'b': 3}
    assert counts(8 + 250).to_dict() == {'a': 5, 'b': 3} | {f'x{i}': 5 for i in range(50)}
    assert counts(8 + 250 + 205).to_dict() == {'a': 10, 'b': 3} | {f'x{i}': 9 for i in range(50)}
    assert counts(10 ** 6).sum() == 401 + 802 + 450


def test_an_unreadable_image_of_a_map_is_black_marked_at_its_place_and_named(searched, capsys):
    splits, vectors = searched
    splits['query'] = splits['query'].assign(path=['/none/\udcff.jpg', *splits['query']['path'][1:]])
    few = {part: frame.iloc[:3] for part, frame in splits.items()}, {part: rows[:3] for part, rows in vectors.items()}
    maps.show_map(*few)
    axis, = plt.gcf().axes
    black, = (image.get_extent() for image in axis.images if not np.asarray(image.get_array()).any())
    cross, = axis.texts
    assert cross.get_text() == '×' and np.allclose(cross.get_position(), (np.mean(black[:2]), np.mean(black[2:])))
    assert cross.get_transform() == axis.transAxes and axis.get_xlim() == axis.get_ylim() == (0, 1)
    assert capsys.readouterr().out.startswith('1 images of this figure could not be read, first /none/\\udcff.jpg; ')


def test_a_plane_without_tsne_is_the_pca_and_so_is_one_of_few_points():
    points = np.random.default_rng(0).standard_normal((40, 6)) * [5, 3, 1, 1, 1, 1]
    for rows, tsne in ((points, False), (points[:9], True)):
        assert maps.enough_for_tsne(rows) != tsne
        plane, known = maps.on_plane(rows, 5, tsne), PCA(2).fit_transform(rows)
        for column in (0, 1):
            assert abs(np.corrcoef(plane[:, column], known[:, column])[0, 1]) > 1 - 1e-9
        assert np.allclose([plane.min(0), plane.max(0)], [[0, 0], [1, 1]])
