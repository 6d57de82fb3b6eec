"""Figures for sets of images, in numpy and float64; nothing here depends on a network.

Of sets of features ``[N, D]``, compared as distributions:

* `frechet_distance` (Dowson and Landau 1982; with InceptionV3 features it is the FID of
  Heusel et al. 2017, arXiv 1706.08500, and with others it is not);
* `precision_recall` (Kynkaanniemi et al. 2019, arXiv 1904.06991);
* `density_coverage` (Naeem et al. 2020, arXiv 2002.09797).

Of images, compared one by one with what another sampler made of the same noise, or in
their spread: `normalized_error` and `variance_ratio`.

Of a sampler's curve: `equivalent_steps`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

Floats = NDArray[np.float64]

# Rows of a block of distances: 1,024 of them against 50,000 features take 400 MB.
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean ``[D]``, covariance ``[D, D]`` and number of the features of a set.

    Raises:
      ValueError: shapes that do not fit, fewer than two samples, or NaN or infinity.
    """

    mean: Floats
    covariance: Floats
    count: int

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != self.mean.shape * 2:
            raise ValueError(
                "feature statistics are a mean [D] and a covariance [D, D], but were "
                f"given {list(self.mean.shape)} and {list(self.covariance.shape)}"
            )
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples, but there is {self.count}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("feature statistics must be finite: found NaN or infinity")


class PrecisionRecall(NamedTuple):
    """Fidelity and variety, each in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Fidelity (about 1 at best, may exceed it) and variety (in [0, 1])."""

    density: float
    coverage: float


class EquivalentSteps(NamedTuple):
    """A number of teacher steps; ``censored`` where it is beyond the measured ones."""

    value: float
    censored: Literal["none", "above", "below"]

    def __str__(self) -> str:
        sign = {"none": "", "above": "> ", "below": "< "}[self.censored]
        return sign + f"{self.value:.1f}".removesuffix(".0")


def _checked(features: ArrayLike, at_least: int) -> Floats:
    given = np.asarray(features)
    if given.ndim != 2 or len(given) < at_least:
        raise ValueError(
            f"features must be [N, D] with N at least {at_least} here, "
            f"but have shape {list(given.shape)}"
        )
    given = given.astype(np.float64)
    if not np.isfinite(given).all():
        bad = int((~np.isfinite(given)).any(axis=1).sum())
        raise ValueError(
            f"features must be finite, but {bad} of {len(given)} images "
            "have NaN or infinity among theirs"
        )
    return given


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean and unbiased covariance (over ``N - 1``) of features ``[N, D]``.

    Raises:
      ValueError: fewer than two samples, or NaN or infinity among them.
    """
    given = _checked(features, at_least=2)
    mean = given.mean(axis=0)
    centred = given - mean
    covariance = centred.T @ centred / (len(given) - 1)
    return FeatureStatistics(mean, covariance, len(given))


def _square_root(covariance: Floats) -> Floats:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared 2-Wasserstein distance between the Gaussians with these statistics.

        |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)

    The last trace is the sum of the singular values of ``C_a^1/2 C_b^1/2``. So no root
    of a nonsymmetric matrix is taken, and singular covariances (corner pixels that
    never change, fewer images than features) are nothing special. Never NaN; what
    rounding leaves below 0 is 0.

    Raises:
      ValueError: the features have not the same dimension.

    See also: Dowson and Landau, J. Multivariate Analysis 12 (1982); Heusel et al. 2017.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            "a Frechet distance is between features of the same kind, but these have "
            f"dimensions {len(a.mean)} and {len(b.mean)}"
        )
    product = _square_root(a.covariance) @ _square_root(b.covariance)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(max(np.sum((a.mean - b.mean) ** 2) + spread, 0.0))


def _squared_distances(a: Floats, b: Floats) -> Iterator[tuple[slice, Floats]]:
    """Blocks of rows of the squared distances between ``a`` and ``b``.

    Differences are squared, not expanded into ``|a|^2 + |b|^2 - 2ab``: that is slower,
    but exact for equal points, and a point at just the radius of a ball is common.
    """
    for start in range(0, len(a), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(a)))
        yield rows, cdist(a[rows], b, "sqeuclidean").astype(np.float64, copy=False)


def _squared_radii(features: Floats, k: int) -> Floats:
    """Each point's squared distance to its ``k``-th nearest other point, ``[N]``."""
    radii = np.empty(len(features))
    for rows, distances in _squared_distances(features, features):
        # Sorted, the nearest is the point itself (or its double), at distance 0.
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii


def _checked_pair(
    real: ArrayLike, generated: ArrayLike, k: int
) -> tuple[Floats, Floats]:
    if k < 1:
        raise ValueError(f"k is a number of neighbours, at least 1, but is {k}")
    pair = _checked(real, k + 1), _checked(generated, k + 1)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(
            "real and generated features must be of the same kind, but have "
            f"dimensions {pair[0].shape[1]} and {pair[1].shape[1]}"
        )
    return pair


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
    real, generated = _checked_pair(real, generated, k)
    real_radii = _squared_radii(real, k)
    generated_radii = _squared_radii(generated, k)
    precise = np.zeros(len(generated), bool)
    recalled = np.zeros(len(real), bool)
    for rows, distances in _squared_distances(generated, real):
        precise[rows] = (distances <= real_radii[None, :]).any(axis=1)
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
    return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


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
    real, generated = _checked_pair(real, generated, k)
    radii = _squared_radii(real, k)
    total = 0
    covered = np.zeros(len(real), bool)
    for _, distances in _squared_distances(generated, real):
        inside = distances <= radii[None, :]
        total += int(inside.sum())
        covered |= inside.any(axis=0)
    return DensityCoverage(total / (k * len(generated)), float(covered.mean()))


def _total_variance(images: Floats) -> float:
    """Mean over the images of the squared distance to the mean image."""
    return float(images.var(axis=0).sum())


def normalized_error(images: ArrayLike, reference: ArrayLike) -> float:
    """Mean squared distance to the reference, over the reference's total variance.

        sum_n |x_n - r_n|^2 / sum_n |r_n - mean(r)|^2

    0 is perfect; 1 is what predicting the mean image for every noise gives. Both arrays
    are ``[N, ...]`` and paired: row n of each comes from the same noise.

    Raises:
      ValueError: shapes that differ, or a reference without any variance.

    >>> normalized_error([[0.0], [0.0]], [[-1.0], [1.0]])
    1.0
    """
    made, target = np.asarray(images, np.float64), np.asarray(reference, np.float64)
    if made.shape != target.shape or made.ndim < 2:
        raise ValueError(
            "images and their reference are paired, [N, ...] both, but have shapes "
            f"{list(made.shape)} and {list(target.shape)}"
        )
    error = np.sum((made - target) ** 2) / len(target)
    return float(error / _nonzero_variance(target))


def variance_ratio(images: ArrayLike, reference: ArrayLike) -> float:
    """Total pixel variance of the images over that of the reference.

        E |x - mean(x)|^2 / E |r - mean(r)|^2

    Below 1 the images are blurred, or too much alike. The two sets need not be paired
    nor equally many: ``[N, ...]`` and ``[M, ...]``.

    Raises:
      ValueError: image shapes that differ, or a reference without any variance.

    >>> variance_ratio([[-1.0], [1.0]], [[-2.0], [2.0]])
    0.25
    """
    made, target = np.asarray(images, np.float64), np.asarray(reference, np.float64)
    if made.shape[1:] != target.shape[1:] or min(made.ndim, target.ndim) < 2:
        raise ValueError(
            "images and reference are [N, ...] of the same image shape, but have "
            f"shapes {list(made.shape)} and {list(target.shape)}"
        )
    return _total_variance(made) / _nonzero_variance(target)


def _nonzero_variance(reference: Floats) -> float:
    variance = _total_variance(reference)
    if not variance > 0.0:
        raise ValueError(
            "the reference images must differ from each other, "
            f"but their total variance is {variance}"
        )
    return variance


def equivalent_steps(
    steps: Sequence[int], distances: Sequence[float], distance: float
) -> EquivalentSteps:
    """How many teacher steps give the student's distance.

    The teacher's curve is first made to fall: each entry becomes the least distance of
    any with as many steps or fewer (the *running minimum*; many-step samplers may get
    worse again). Between entries, ``log(steps)`` is linear in ``log(distance)``. A
    student better than the whole curve gets the largest number, censored ``above``;
    one worse than its first entry gets the smallest, 1 as a rule, censored ``below``.

    Args:
      steps: the teacher's numbers of steps, each once, in any order.
      distances: the distance at each of them, at least 0.
      distance: the student's.

    Raises:
      ValueError: lists that do not match, or values out of range.

    >>> print(equivalent_steps([1, 4, 16], [16.0, 4.0, 1.0], 2.0))
    8
    >>> print(equivalent_steps([1, 4, 16], [16.0, 4.0, 1.0], 0.5))
    > 16
    """
    x, y = np.asarray(steps, np.float64), np.asarray(distances, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(np.unique(x)) < max(len(x), 1):
        raise ValueError(
            "a curve needs one distance for each number of steps, each once, but has "
            f"steps {list(steps)} and {len(distances)} distances"
        )
    if x.min() < 1 or not (
        np.isfinite([*y, distance]).all() and min(*y, distance) >= 0
    ):
        raise ValueError(
            "steps must be at least 1 and distances finite and at least 0, but are "
            f"{list(steps)}, {list(distances)} and the student's {distance}"
        )
    order = np.argsort(x)
    x, y = x[order], np.minimum.accumulate(y[order])
    if distance > y[0]:
        return EquivalentSteps(float(x[0]), "below")
    if distance < y[-1]:
        return EquivalentSteps(float(x[-1]), "above")
    after = int(np.argmax(y <= distance))
    if y[after] == distance:
        return EquivalentSteps(float(x[after]), "none")
    # A distance of 0 has no logarithm: take the smallest number that has one.
    near, far, own = np.log(np.maximum([y[after - 1], y[after], distance], 1e-300))
    share = (near - own) / (near - far)
    value = np.exp(np.log(x[after - 1]) * (1 - share) + np.log(x[after]) * share)
    return EquivalentSteps(float(value), "none")
