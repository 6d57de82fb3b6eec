"""Figures of images compared one by one, and of a sampler's curve, in float64.

With what another sampler made of the same noise, or in their spread:
`normalized_error` and `variance_ratio`. Of a curve of steps: `equivalent_steps`.

Sets of features are compared in `boot_jax.evaluation.frechet`, `neighbours`, `kernel`
and `classes`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class EquivalentSteps(NamedTuple):
    """A number of teacher steps; ``censored`` where it is beyond the measured ones."""

    value: float
    censored: Literal["none", "above", "below"]

    def __str__(self) -> str:
        sign = {"none": "", "above": "> ", "below": "< "}[self.censored]
        return sign + f"{self.value:.1f}".removesuffix(".0")


class TotalVariance:
    """The total variance of images that come in batches, in float64.

    The mean over the images of the squared distance to the mean image.

    >>> variance = TotalVariance()
    >>> for batch in ([[0.0], [1.0]], [[5.0]]):
    ...     variance.update(batch)
    >>> round(variance.value(), 12)
    4.666666666667
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Floats = np.zeros(())
        self._scatter = 0.0

    def update(self, images: ArrayLike) -> None:
        """Adds ``[n, ...]``, at least one image."""
        batch = np.asarray(images, np.float64)
        mean, total = batch.mean(axis=0), self.count + len(batch)
        shift = mean - self._mean
        between = float(np.sum(shift**2)) * self.count * len(batch) / total
        self._scatter += float(np.sum((batch - mean[None]) ** 2)) + between
        self._mean = self._mean + shift * (len(batch) / total)
        self.count = total

    def value(self) -> float:
        """Of all batches so far.

        Raises:
          ValueError: there were none.
        """
        if not self.count:
            raise ValueError("a variance needs images, but there were none")
        return self._scatter / self.count


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
