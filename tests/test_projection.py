"""Projection to 64 dimensions, against scikit-learn and against slow numpy."""
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from guie.projection import concatenate, dims_of, fit_pca, l2_normalise, project, random_projection


def embeddings(n=900, d=96, seed=0):
    """A decaying spectrum in a random rotation, around a mean as long as the spread."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    scale = np.arange(1, d + 1) ** -0.7
    mean = rng.standard_normal(d)
    mean *= np.linalg.norm(scale) / np.linalg.norm(mean)
    return (rng.standard_normal((n, d)) * scale @ rotation + mean).astype(np.float32)


def aligned(rows, reference):
    return rows * np.sign((rows * reference).sum(1, keepdims=True))


@pytest.mark.parametrize('n, dim', [(900, 64), (900, 1), (9000, 64), (65, 64)])
def test_fit_pca_is_scikit_learns(n, dim):
    x = embeddings(n)
    ours, theirs = fit_pca(x, dim), PCA(dim, svd_solver='full').fit(x.astype(np.float64))
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-6)
    np.testing.assert_allclose(aligned(ours.components, theirs.components_), theirs.components_, atol=1e-6)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, atol=1e-6)


@pytest.mark.parametrize('weights', [np.ones(400), np.linspace(0, 2, 400), np.arange(400) % 7 == 0])
def test_a_weighted_pca_is_the_eigenvectors_of_the_weighted_covariance(weights):
    x = embeddings(400)
    share = weights / weights.sum()
    mean = sum(w * row.astype(np.float64) for w, row in zip(share, x))
    covariance = sum(w * np.outer(row - mean, row - mean) for w, row in zip(share, x))
    variances, directions = np.linalg.eigh(covariance)
    ours, largest = fit_pca(x, 20, weights=weights), directions[:, :-21:-1].T
    np.testing.assert_allclose(ours.mean, mean, atol=1e-10)
    np.testing.assert_allclose(aligned(ours.components, largest), largest, atol=1e-6)
    np.testing.assert_allclose(ours.explained_variance_ratio, variances[:-21:-1] / variances.sum(), atol=1e-9)


def test_the_folded_layer_is_scikit_learns_transform_with_the_larger_entry_of_each_direction_positive():
    x, new = embeddings(), embeddings(seed=1)
    projection = fit_pca(x, 64)
    theirs = PCA(64, svd_solver='full').fit(x.astype(np.float64))
    signs = np.sign(np.take_along_axis(theirs.components_, abs(theirs.components_).argmax(1)[:, None], 1))
    expected = theirs.transform(new) * signs.T
    layer = projection.linear()
    assert isinstance(layer, torch.nn.Linear) and (layer.in_features, layer.out_features) == (96, 64)
    np.testing.assert_allclose(layer(torch.from_numpy(new)).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(projection(new), expected, atol=2e-5)
    assert projection(new).dtype == np.float32 and not any(p.requires_grad for p in layer.parameters())


def test_the_first_columns_are_the_pca_to_fewer_dimensions():
    x = embeddings()
    np.testing.assert_allclose(fit_pca(x, 64)(x)[:, :10], fit_pca(x, 10)(x), atol=1e-6)


@pytest.mark.parametrize('whiten', [0.5, 1.0])
def test_whitening_takes_that_power_of_the_variance_away(whiten):
    x = embeddings()
    plain, whitened = fit_pca(x)(x).var(0, ddof=1), fit_pca(x, whiten=whiten)(x).var(0, ddof=1)
    np.testing.assert_allclose(whitened, plain ** (1 - whiten), rtol=1e-4)
    theirs = PCA(64, svd_solver='full', whiten=True).fit_transform(x.astype(np.float64))
    np.testing.assert_allclose(aligned(fit_pca(x, whiten=1)(x).T, theirs.T).T, theirs, atol=1e-4)


def test_whole_weights_are_repeated_rows_and_only_their_ratios_matter():
    x, weights = embeddings(300), np.random.default_rng(0).integers(0, 4, 300)
    repeated, weighted = fit_pca(np.repeat(x, weights, axis=0), 20), fit_pca(x, 20, weights=weights)
    scaled = fit_pca(x, 20, weights=weights * 7.5)
    for other in (repeated, scaled):
        np.testing.assert_allclose(weighted.mean, other.mean, atol=1e-6)
        np.testing.assert_allclose(weighted.components, other.components, atol=1e-6)
        np.testing.assert_allclose(other.explained_variance_ratio, weighted.explained_variance_ratio, 1e-5)


def test_a_memory_map_and_other_float_types_serve(tmp_path):
    x = embeddings().astype(np.float16)
    np.save(tmp_path / 'x.npy', x)
    expected = fit_pca(x.astype(np.float64), 8)
    for same in (x, np.load(tmp_path / 'x.npy', mmap_mode='r'), torch.from_numpy(x)):
        np.testing.assert_allclose(fit_pca(same, 8).components, expected.components, atol=1e-5)


def test_a_mean_far_larger_than_the_spread_costs_no_digits():
    x = embeddings().astype(np.float64)
    near, far = fit_pca(x, 20), fit_pca(x + 1e5, 20)
    np.testing.assert_allclose(far.components, near.components, atol=1e-6)


def test_vectors_are_projected_by_a_pca_of_the_training_images_or_by_a_map_given():
    vectors = {name: embeddings(80, 16, seed) for seed, name in enumerate(('pca', 'query', 'index', 'selection_query',
                                                                           'selection_index'))}
    pca = fit_pca(vectors['pca'], 5)
    for split in ('', 'selection_'):
        for found, part in zip(project(vectors, 5, split=split), ('query', 'index'), strict=True):
            np.testing.assert_allclose(found, l2_normalise(pca(vectors[split + part])), atol=1e-6)
    query, index = project(vectors, 2, random_projection(16, 5))  # its first two columns
    np.testing.assert_allclose(index, l2_normalise(random_projection(16, 5)(vectors['index'])[:, :2]), atol=1e-6)
    assert query.shape == (80, 2)


@pytest.mark.parametrize('n, d, dim', [(4, 96, 3), (2, 96, 1), (48, 96, 47), (64, 96, 63), (65, 96, 64), (900, 16, 16)])
def test_a_pca_of_few_images_is_to_as_many_dimensions_as_they_have(n, d, dim):
    vectors = {name: embeddings(rows, d) for name, rows in (('pca', n), ('query', 3), ('index', 5))}
    assert dims_of(vectors['pca']) == dim == fit_pca(vectors['pca'], dims_of(vectors['pca'])).varied
    query, index = project(vectors)
    assert query.shape == (3, dim) and index.shape == (5, dim) and np.isfinite(query).all()


def test_how_many_directions_vary_is_how_many_can_be_whitened():
    alike = np.concatenate([embeddings(8), embeddings(8)])  # each image twice
    varied = fit_pca(alike, 15).varied
    assert varied == 7 and fit_pca(alike, varied, whiten=1).components.shape == (7, 96)


def test_folding_draws_no_random_numbers():
    projection = fit_pca(embeddings(), 8)
    state = torch.get_rng_state()
    projection.linear()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('shape, dim, sentence', [
    ((200, 96), 65, 'dim is 65, but the competition takes at most 64'),
    ((200, 96), 0, 'dim is 0'),
    ((200, 32), 33, 'the embeddings have 32 columns: ask for 1 to 32'),
    ((20, 96), 20, '20 embeddings span at most 19 directions: ask for 1 to 19'),
    ((200,), 1, r'a table \(n, d\)'),
])
def test_a_dimension_that_cannot_be_is_an_error_with_the_way_out(shape, dim, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_pca(np.random.default_rng(0).standard_normal(shape), dim)


@pytest.mark.parametrize('row', [0, 8191, 8500])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_the_first_bad_row_is_named(row, value):
    x = embeddings(9000, 8)
    x[[row, 8999], 3] = value
    with pytest.raises(ValueError, match=f'^embedding {row} holds NaN or infinite'):
        fit_pca(x, 4)


@pytest.mark.parametrize('weights', [[1.0] * 19, [-1.0] + [1] * 19, [0.0] * 20, [np.nan] + [1] * 19])
def test_weights_that_do_not_fit_are_an_error(weights):
    with pytest.raises(ValueError, match='weights must be 20 finite numbers'):
        fit_pca(embeddings(20), 4, weights=weights)


def test_whitening_directions_without_variance_is_an_error_and_plain_pca_of_them_is_not():
    flat = embeddings(300, 10) @ np.random.default_rng(0).standard_normal((10, 50)).astype(np.float32)
    assert fit_pca(flat, 20).explained_variance_ratio[10:].max() < 1e-7
    with pytest.raises(ValueError, match='vary in 10 directions only'):
        fit_pca(flat, 20, whiten=1)


@pytest.mark.parametrize('weights', [None, np.linspace(.1, 3, 301)])
def test_embeddings_that_are_all_equal_are_an_error(weights):
    for seed in range(8):
        with pytest.raises(ValueError, match='vary in 0 directions only'):
            fit_pca(np.tile(embeddings(1, 10, seed), (301, 1)), 4, weights=weights)


def test_a_projection_refuses_vectors_of_another_model():
    with pytest.raises(ValueError, match=r'takes \(n, 96\) vectors, not \(5, 95\)'):
        fit_pca(embeddings())(np.zeros((5, 95)))


def test_a_random_projection_is_orthonormal_and_the_same_for_the_same_seed():
    projection = random_projection(96, 64, seed=3)
    np.testing.assert_allclose(projection.components @ projection.components.T, np.eye(64), atol=1e-12)
    np.testing.assert_array_equal(projection.components, random_projection(96, 64, seed=3).components)
    assert not np.allclose(projection.components, random_projection(96, 64, seed=4).components)
    assert not projection.mean.any() and projection(embeddings()).shape == (900, 64)
    with pytest.raises(ValueError, match='competition takes at most 64'):
        random_projection(96, 65)


@pytest.mark.parametrize('kind', [np.asarray, torch.from_numpy])
def test_l2_normalise_leaves_zero_rows_zero(kind):
    x = kind(np.array([[3, 4], [0, 0], [1e-12, 0], [-5e15, 0]], dtype=np.float32))
    expected = [[0.6, 0.8], [0, 0], [1, 0], [-1, 0]]
    np.testing.assert_allclose(np.asarray(l2_normalise(x)), expected, atol=1e-6)
    assert l2_normalise(x).dtype == x.dtype and type(l2_normalise(x)) is type(x)


def test_l2_normalise_has_a_finite_gradient_at_zero_and_works_in_half_precision():
    x = torch.zeros(2, 3, requires_grad=True)
    l2_normalise(x).sum().backward()
    assert x.grad.isfinite().all()
    half = torch.tensor([[300.0] * 400, [0.0] * 400], dtype=torch.float16)
    np.testing.assert_allclose(l2_normalise(half).float().norm(dim=1).numpy(), [1, 0], atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(l2_normalise(half.numpy()), axis=1), [1, 0], atol=1e-6)


def test_concatenated_models_weigh_the_same_whatever_their_length():
    a, b = embeddings(20, 8), 100 * embeddings(20, 5, seed=1)
    joined = concatenate([a, b])
    assert joined.shape == (20, 13) and joined.dtype == np.float32
    np.testing.assert_allclose(joined[:, :8], a / np.linalg.norm(a, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(joined[:, 8:], axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match=r'the models embedded \[20, 19\] images'):
        concatenate([a, b[:19]])
