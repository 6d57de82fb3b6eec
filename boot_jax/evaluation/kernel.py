"""The kernel distance: with features of InceptionV3 it is the KID.

Binkowski et al. 2018, *Demystifying MMD GANs*, arXiv 1801.01401: the squared maximum
mean discrepancy under the kernel ``k(x, y) = (x . y / D + 1)^3``, estimated without
bias:

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

So its expectation does not depend on the number of images, as a Frechet distance's
does, and it may fall below 0.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from boot_jax.evaluation.frechet import checked_features

Floats = NDArray[np.float64]

# Rows of a block of the kernel's matrix.
_BLOCK_ROWS = 1024


class KernelDistance(NamedTuple):
    """The distance, and to first order what each generated image does to it, ``[M]``.

    The latter have mean 0, over the images, and the reference is held fixed.
    """

    value: float
    influences: Floats


def kernel_distance(real: ArrayLike, generated: ArrayLike) -> KernelDistance:
    """The unbiased estimate from all pairs of images.

    Published code averages subsets of 1,000 images instead (see
    `subset_kernel_distances`), which has the same expectation and a larger variance.

    Args:
      real: ``[N, D]``.
      generated: ``[M, D]``.

    Raises:
      ValueError: fewer than 2 images, other dimensions, or NaN or infinity.
    """
    real, generated = _checked_pair(real, generated, 2)
    own = _row_means(generated, generated, without_itself=True)
    to_real = _row_means(generated, real)
    of_real = _row_means(real, real, without_itself=True)
    value = own.mean() + of_real.mean() - 2.0 * to_real.mean()
    pulls = 2.0 * (own - to_real)
    return KernelDistance(float(value), pulls - pulls.mean())


def subset_kernel_distances(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Floats:
    """The estimate of random subsets of both sets, ``[num_subsets]``.

    Args:
      real: ``[N, D]``.
      generated: ``[M, D]``.
      num_subsets: how many.
      subset_size: images of each set in a subset, without repetition.
      seed: of the choice.

    Raises:
      ValueError: fewer images than a subset has, other dimensions, NaN or infinity.
    """
    real, generated = _checked_pair(real, generated, max(subset_size, 2))
    rng = np.random.default_rng(seed)

    def subset(features: Floats) -> Floats:
        return features[rng.choice(len(features), subset_size, replace=False)]

    drawn = ((subset(real), subset(generated)) for _ in range(num_subsets))
    return np.asarray([kernel_distance(*pair).value for pair in drawn])


def _row_means(a: Floats, b: Floats, without_itself: bool = False) -> Floats:
    """For each row of ``a`` the mean kernel with those of ``b``, ``[len(a)]``."""
    means = np.empty(len(a))
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = a[start : start + _BLOCK_ROWS]
        sums = _kernel(rows @ b.T, a.shape[1]).sum(axis=1)
        if without_itself:
            sums -= _kernel(np.sum(rows**2, axis=1), a.shape[1])
        means[start : start + _BLOCK_ROWS] = sums
    return means / (len(b) - without_itself)


def _kernel(products: Floats, width: int) -> Floats:
    return (products / width + 1.0) ** 3


def _checked_pair(
    real: ArrayLike, generated: ArrayLike, at_least: int
) -> tuple[Floats, Floats]:
    pair = checked_features(real, at_least), checked_features(generated, at_least)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(
            "real and generated features must be of the same kind, but have "
            f"dimensions {pair[0].shape[1]} and {pair[1].shape[1]}"
        )
    return pair
