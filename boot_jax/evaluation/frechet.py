"""The Frechet distance of Gaussians, from moments that are gathered batch by batch.

Between features of InceptionV3 it is the FID of Heusel et al. 2017 (arXiv 1706.08500);
between others it is not. Its expectation falls with the number of images ``n``, nearly
as a constant over ``n``: only values at the same ``n`` compare, or those extrapolated
to infinitely many images (Chong and Forsyth 2020, arXiv 1911.07023).
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: Eigenvalues below this share of the largest count as 0 where they divide.
_RANK_TOLERANCE = 1e-12


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean ``[D]``, covariance ``[D, D]`` and number of the features of a set.

    The number is None where it is not known, as in most published files.

    Raises:
      ValueError: shapes that do not fit, fewer than two samples, or NaN or infinity.
    """

    mean: Floats
    covariance: Floats
    count: int | None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != self.mean.shape * 2:
            raise ValueError(
                "feature statistics are a mean [D] and a covariance [D, D], but were "
                f"given {list(self.mean.shape)} and {list(self.covariance.shape)}"
            )
        if self.count is not None and self.count < 2:
            raise ValueError(f"a covariance needs 2 samples, but there is {self.count}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("feature statistics must be finite: found NaN or infinity")

    @functools.cached_property
    def root(self) -> Floats:
        """The covariance's square root, ``[D, D]``; what rounding left below 0 is 0."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def checked_features(features: ArrayLike, at_least: int = 1) -> Floats:
    """Features ``[N, D]`` as float64.

    Raises:
      ValueError: another shape, fewer than ``at_least``, or NaN or infinity among them.
    """
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


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    How the images are cut into batches, and their order, change the result by rounding
    alone: the batches' own means and sums of squares are merged (Chan, Golub and
    LeVeque, *Updating formulae*, 1979), so that a mean far from 0 costs no digits.

    >>> moments = Moments()
    >>> for batch in ([[1.0], [2.0]], [[6.0]]):
    ...     moments.update(batch)
    >>> moments.statistics().mean
    array([3.])
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Floats = np.zeros(0)
        self._scatter: Floats = np.zeros((0, 0))

    def update(self, features: ArrayLike) -> None:
        """Adds a batch ``[n, D]``, which may be empty.

        Raises:
          ValueError: another width than the batches before, or NaN or infinity.
        """
        batch = checked_features(features, at_least=0)
        if not len(batch):
            return
        if not self.count:
            width = batch.shape[1]
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        if batch.shape[1] != len(self._mean):
            raise ValueError(
                f"these features are {batch.shape[1]} wide, but those of the batches "
                f"before are {len(self._mean)}"
            )
        mean = batch.mean(axis=0)
        centred = batch - mean
        total = self.count + len(batch)
        shift = mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self.count = total

    def statistics(self) -> FeatureStatistics:
        """Of all batches so far; the covariance is unbiased, over ``N - 1``.

        Raises:
          ValueError: there were fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples, but there is {self.count}")
        covariance = self._scatter / (self.count - 1)
        return FeatureStatistics(self._mean.copy(), covariance, self.count)


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean and unbiased covariance (over ``N - 1``) of features ``[N, D]``.

    Raises:
      ValueError: fewer than two samples, or NaN or infinity among them.
    """
    moments = Moments()
    moments.update(checked_features(features, at_least=2))
    return moments.statistics()


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
    _check_widths(a, b)
    cross = np.linalg.svd(a.root @ b.root, compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(max(np.sum((a.mean - b.mean) ** 2) + spread, 0.0))


def _check_widths(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            "a Frechet distance is between features of the same kind, but these have "
            f"dimensions {len(a.mean)} and {len(b.mean)}"
        )


def frechet_influences(
    reference: FeatureStatistics, own: FeatureStatistics, features: ArrayLike
) -> Floats:
    """What each image does to the distance from a fixed reference, to first order.

    With ``m`` and ``C`` the own mean and covariance, the distance is smooth in both;
    its gradients are ``2 (m - m_r)`` and ``I - T``, with ``T = C_r^1/2 (C_r^1/2 C
    C_r^1/2)^-1/2 C_r^1/2`` the optimal map to the reference. An image ``x`` so changes
    it by

        2 (m - m_r) . (x - m) + (x - m)^T (I - T) (x - m) - tr((I - T) C)

    over the number of images. Without full rank of ``C``, ``T`` is that on its range.

    Args:
      reference: held fixed.
      own: of ``features``.
      features: ``[N, D]``.

    Returns:
      ``[N]``, of mean 0 but for the ``N - 1`` in the covariance.
    """
    _check_widths(reference, own)
    squares, vectors = np.linalg.eigh(reference.root @ own.covariance @ reference.root)
    kept = squares > _RANK_TOLERANCE * max(float(squares[-1]), 1e-300)
    values = np.sqrt(squares[kept])
    half = reference.root @ vectors[:, kept] / np.sqrt(values)
    centred = np.asarray(features, np.float64) - own.mean
    quadratic = np.sum(centred**2, axis=1) - np.sum((centred @ half) ** 2, axis=1)
    trace = np.trace(own.covariance) - values.sum()
    return 2.0 * centred @ (own.mean - reference.mean) + quadratic - trace


class Extrapolation(NamedTuple):
    """A distance at infinitely many images, and the points it was drawn through."""

    value: float
    counts: list[int]
    distances: list[float]


def extrapolated_distance(
    reference: FeatureStatistics, features: ArrayLike, *, points: int = 8, seed: int = 0
) -> Extrapolation:
    """The Frechet distance extrapolated to infinitely many images (FID_infinity).

    It is linear in ``1 / n`` to leading order: random subsets of several sizes, from a
    fifth of the images to all, are fitted by least squares (Chong and Forsyth 2020,
    arXiv 1911.07023, there with 15 sizes from 5,000 on). The value may fall below 0 by
    the noise of the fit. The reference's own number of images is not extrapolated.

    Args:
      reference: what the distance is to.
      features: ``[N, D]``.
      points: sizes of subsets.
      seed: of the subsets.

    Raises:
      ValueError: fewer than 20 images, or fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"a line needs 2 points at least, not {points}")
    given = checked_features(features, at_least=20)
    counts = np.linspace(len(given) / 5, len(given), points).round().astype(int)
    rng = np.random.default_rng(seed)
    distances = []
    for count in counts:
        chosen = rng.choice(len(given), size=count, replace=False)
        own = feature_statistics(given[chosen])
        distances.append(frechet_distance(reference, own))
    _, intercept = np.polyfit(1.0 / counts, distances, 1)
    return Extrapolation(float(intercept), counts.tolist(), distances)


def rank_warning(what: str, count: int | None, width: int) -> str | None:
    """A line where there are too few images for a covariance of full rank, else None.

    >>> rank_warning("the samples", 10, 64)
    'the samples are 10, but a covariance of 64 features needs at least 65 images ...'
    """
    if count is None or count > width:
        return None
    return (
        f"{what} are {count}, but a covariance of {width} features needs at least "
        f"{width + 1} images to have full rank: this distance is biased upwards, and "
        "compares only with others at the same number"
    )
