"""Projection: embeddings (n, d) of one or several models to at most 64 numbers, by a map that folds into a linear layer."""
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from guie.errors import InputError

MAX_DIM = 64  # the competition's limit
VARIED = 1e-7  # share of variance; float32 leaves about 1e-8 of noise in directions without any


@dataclass(frozen=True)
class Projection:
    """The map x -> components · (x - mean). The first j columns of a PCA's output are the PCA to j."""

    mean: np.ndarray                      # float64 (d,)
    components: np.ndarray                # float64 (dim, d), one direction a row, times its whitening factor
    explained_variance_ratio: np.ndarray  # float64 (dim,), shares of the variance in all d; NaN if random

    def __call__(self, embeddings):
        """(n, d) -> float32 (n, dim), the arithmetic of `linear`."""
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise InputError(f'this projection takes (n, {len(self.mean)}) vectors, not {embeddings.shape}: '
                             'give it embeddings of the model it was fitted on')
        bias = (self.components @ self.mean).astype(np.float32)
        return embeddings @ self.components.T.astype(np.float32) - bias

    @property
    def varied(self):
        """The number of its directions in which the fitted embeddings differ: so many can be whitened."""
        return int((self.explained_variance_ratio > VARIED).sum())

    def linear(self):
        """The same map as one frozen float32 nn.Linear(d, dim), the mean folded into its bias."""
        layer = nn.utils.skip_init(nn.Linear, *self.components.shape[::-1]).requires_grad_(False)
        layer.weight.copy_(torch.from_numpy(self.components))
        layer.bias.copy_(torch.from_numpy(-self.components @ self.mean))
        return layer


def l2_normalise(x):
    """Scales the last axis to length 1; zeros stay zero. Arrays become float32, tensors keep their dtype."""
    if isinstance(x, torch.Tensor):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.where(length > 0, length, 1)
    x = np.asarray(x, dtype=np.float32)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def concatenate(embeddings_list):
    """Embeddings (n, d_i) of the same images by several models, each L2-normalised, side by side: (n, Σ d_i)."""
    counts = [len(embeddings) for embeddings in embeddings_list]
    if len(set(counts)) != 1:
        raise InputError(f'the models embedded {counts} images: give embeddings of the same images')
    return np.concatenate([l2_normalise(embeddings) for embeddings in embeddings_list], axis=1)


@np.errstate(invalid='ignore')  # 0 / 0, where all rows are equal
def fit_pca(embeddings, dim=MAX_DIM, *, whiten=0.0, weights=None):
    """Principal components of (n, d) embeddings, by scikit-learn in float64 -> Projection.
    whiten: direction j is multiplied by variance_j ** (-whiten / 2): 0 is plain, 1 makes each variance 1. weights: (n,)
    importance of the rows, e.g. to even out kinds of object; only their ratios matter. Signs: each direction's largest
    absolute entry is positive. ValueError: dim out of range, unfit weights, a NaN or infinite row, embeddings that hardly
    vary."""
    from sklearn.decomposition import PCA  # takes a second to import

    rows = np.asarray(embeddings)
    if rows.ndim != 2:
        raise InputError(f'PCA takes a table (n, d) of embeddings, not {rows.shape}: stack them')
    check_dim(dim, rows.shape[1], len(rows))
    if not (finite := np.isfinite(rows).all(1)).all():
        raise InputError(f'embedding {finite.argmin()} holds NaN or infinite values: leave it out or embed it again')
    first = rows[0].astype(np.float64)
    rows = np.subtract(rows, first, dtype=np.float64)  # equal rows become 0, and a mean far above the spread costs no digits
    mean = rows.mean(0)
    if weights is not None:
        rows, mean = weighted(rows, np.asarray(weights, dtype=np.float64))
    pca = PCA(dim, svd_solver='covariance_eigh').fit(rows)
    variance, varied = pca.explained_variance_.clip(min=0), int((pca.explained_variance_ratio_ > VARIED).sum())
    if varied < (dim if whiten else 1):
        raise InputError(f'the embeddings vary in {varied} directions only: ask for no more, or do not whiten')
    scale = variance[:, None] ** (-whiten / 2) if whiten else 1
    return Projection(first + mean, pca.components_ * scale, pca.explained_variance_ratio_)


def weighted(rows, weights):
    """(centred rows times the roots of their weights, with their negatives; mean): plain PCA of these is the weighted
    one."""
    if weights.shape != (len(rows),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise InputError(f'weights must be {len(rows)} finite numbers >= 0, one a row, and not all zero')
    mean = np.average(rows, axis=0, weights=weights)
    half = (rows - mean) * np.sqrt(weights / weights.mean())[:, None]
    return np.concatenate([half, -half]), mean


def random_projection(d, dim=MAX_DIM, seed=0):
    """A Projection onto `dim` random orthonormal directions: what a PCA must beat."""
    check_dim(dim, d)
    directions, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, dim)))
    return Projection(np.zeros(d), directions.T, np.full(dim, np.nan))


def check_dim(dim, d, n=np.inf):
    """ValueError unless n embeddings of d columns can be brought to dim."""
    for most, reason in ((MAX_DIM, f'the competition takes at most {MAX_DIM} dimensions'),
                         (d, f'the embeddings have {d} columns'),
                         (n - 1, f'{n} embeddings span at most {n - 1} directions')):
        if not 1 <= dim <= most:
            raise InputError(f'dim is {dim}, but {reason}: ask for 1 to {most}')


def dims_of(embeddings, dim=MAX_DIM):
    """The dimensions, at most dim, that a PCA of (n, d) embeddings can have: up to d, and fewer than n."""
    return min(dim, embeddings.shape[1], len(embeddings) - 1)


def project(vectors, dim=64, projection=None, split=''):
    """(query, index) of embed_all's vectors, projected to `dim` columns and L2-normalised.
    projection: a map (n, d) -> (n, columns), whose first dim columns count; None: a PCA fitted on vectors['pca'], the
    training images, to as many columns as they allow. split: 'selection_' for the objects to make choices on."""
    projection = projection or fit_pca(vectors['pca'], dims_of(vectors['pca'], dim))
    return tuple(l2_normalise(projection(vectors[split + part])[:, :dim]) for part in ('query', 'index'))
