"""Figures of nearest neighbours between sets of features ``[N, D]``, in float64.

* `precision_recall` (Kynkaanniemi et al. 2019, arXiv 1904.06991);
* `density_coverage` (Naeem et al. 2020, arXiv 2002.09797);
* `mean_pairwise_distance`, of one set.

Each is a mean over images, whose terms the functions ``*_terms`` give.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from boot_jax.evaluation.frechet import checked_features

Floats = NDArray[np.float64]

# Rows of a block of distances: 1,024 of them against 50,000 features take 400 MB.
BLOCK_ROWS = 1024

# Features wider than this have their distances expanded into products.
_WIDE = 256


class PrecisionRecall(NamedTuple):
    """Fidelity and variety, each in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Fidelity (about 1 at best, may exceed it) and variety (in [0, 1])."""

    density: float
    coverage: float


class Terms(NamedTuple):
    """What a pair of figures are the means of, in float64.

    Attributes:
      fidelity: ``[M]``, of the generated images.
      variety: ``[N]``, of the real ones.
    """

    fidelity: Floats
    variety: Floats


def squared_distances(a: Floats, b: Floats) -> Iterator[tuple[slice, Floats]]:
    """Blocks of rows of the squared distances between ``a`` and ``b``.

    Of narrow features the differences are squared, which is exact for equal points. Of
    wide ones that would take hours; they are expanded into ``|a|^2 + |b|^2 - 2ab``.
    """
    wide = a.shape[1] > _WIDE
    lengths = np.sum(b**2, axis=1) if wide else np.zeros(0)
    for start in range(0, len(a), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(a)))
        if wide:
            own = np.sum(a[rows] ** 2, axis=1)[:, None]
            expanded = own + lengths[None, :] - 2.0 * (a[rows] @ b.T)
            yield rows, np.maximum(expanded, 0.0)
        else:
            yield rows, cdist(a[rows], b, "sqeuclidean").astype(np.float64, copy=False)


def _squared_radii(features: Floats, k: int) -> Floats:
    """Each point's squared distance to its ``k``-th nearest other point, ``[N]``.

    A point at just the radius of a ball is common, and must count as within: where
    distances are rounded, the radii are larger by more than the rounding.
    """
    radii = np.empty(len(features))
    for rows, distances in squared_distances(features, features):
        # Sorted, the nearest is the point itself (or its double), at distance 0.
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    if features.shape[1] > _WIDE:
        largest = float(np.sum(features**2, axis=1).max())
        radii = radii * (1.0 + 1e-9) + 1e-12 * largest
    return radii


def _checked_pair(
    real: ArrayLike, generated: ArrayLike, k: int
) -> tuple[Floats, Floats]:
    if k < 1:
        raise ValueError(f"k is a number of neighbours, at least 1, but is {k}")
    pair = checked_features(real, k + 1), checked_features(generated, k + 1)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(
            "real and generated features must be of the same kind, but have "
            f"dimensions {pair[0].shape[1]} and {pair[1].shape[1]}"
        )
    return pair


def precision_recall_terms(real: ArrayLike, generated: ArrayLike, k: int = 3) -> Terms:
    """Of `precision_recall`: whether each image is in the other set's manifold."""
    real, generated = _checked_pair(real, generated, k)
    real_radii = _squared_radii(real, k)
    generated_radii = _squared_radii(generated, k)
    precise = np.zeros(len(generated), bool)
    recalled = np.zeros(len(real), bool)
    for rows, distances in squared_distances(generated, real):
        precise[rows] = (distances <= real_radii[None, :]).any(axis=1)
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
    return Terms(precise.astype(np.float64), recalled.astype(np.float64))


def precision_recall(
    real: ArrayLike, generated: ArrayLike, k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    The manifold of a set is the union of balls around its points, each reaching to the
    point's ``k``-th nearest neighbour in the set. Precision is the share of generated
    points within the real manifold, recall that of real points within the generated
    one. Both depend on N: compare only sets of the same sizes.

    Args:
      real: ``[N, D]``.
      generated: ``[M, D]``.
      k: neighbours; 3 in the paper.

    Raises:
      ValueError: fewer than ``k + 1`` points, other dimensions, or NaN or infinity.
    """
    terms = precision_recall_terms(real, generated, k)
    return PrecisionRecall(float(terms.fidelity.mean()), float(terms.variety.mean()))


def density_coverage_terms(real: ArrayLike, generated: ArrayLike, k: int = 5) -> Terms:
    """Of `density_coverage`: balls about each image over ``k``; balls with an image."""
    real, generated = _checked_pair(real, generated, k)
    radii = _squared_radii(real, k)
    density = np.empty(len(generated))
    covered = np.zeros(len(real), bool)
    for rows, distances in squared_distances(generated, real):
        inside = distances <= radii[None, :]
        density[rows] = inside.sum(axis=1) / k
        covered |= inside.any(axis=0)
    return Terms(density, covered.astype(np.float64))


def density_coverage(
    real: ArrayLike, generated: ArrayLike, k: int = 5
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797).

    Both use the balls of the real points alone, which an odd generated point cannot
    widen. Density is the mean number of balls that a generated point lies in, over
    ``k``; coverage the share of balls with a generated point in them.

    Args:
      real: ``[N, D]``.
      generated: ``[M, D]``.
      k: neighbours; 5 in the paper.

    Raises:
      ValueError: fewer than ``k + 1`` points, other dimensions, or NaN or infinity.
    """
    terms = density_coverage_terms(real, generated, k)
    return DensityCoverage(float(terms.fidelity.mean()), float(terms.variety.mean()))


def pairwise_distance_terms(features: ArrayLike) -> Floats:
    """Of `mean_pairwise_distance`: each image's mean distance to the others, ``[N]``.

    Raises:
      ValueError: fewer than 2 points, or NaN or infinity.
    """
    given = checked_features(features, at_least=2)
    terms = np.empty(len(given))
    for rows, squared in squared_distances(given, given):
        count = len(squared)
        squared[np.arange(count), np.arange(count) + rows.start] = 0.0
        terms[rows] = np.sqrt(squared).sum(axis=1) / (len(given) - 1)
    return terms


def mean_pairwise_distance(features: ArrayLike) -> float:
    """The mean Euclidean distance between two different images of a set ``[N, D]``.

    A measure of diversity, to be compared with the real images' own.

    >>> mean_pairwise_distance([[0.0, 0.0], [3.0, 4.0]])
    5.0
    """
    return float(pairwise_distance_terms(features).mean())
