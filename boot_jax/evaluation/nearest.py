"""Samples beside the real images that are nearest to them, to see what was memorised.

Near is meant in the features of the evaluation. How near is near is told by the real
images themselves: each has a distance to its own nearest other real image. A sample
nearer to a real image than real images ever are to each other may be a copy.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from boot_jax.evaluation.frechet import checked_features
from boot_jax.evaluation.neighbours import squared_distances

Floats = NDArray[np.float64]

#: Real images by indices ``[n]``: ``[n, H, W, C]`` in [-1, 1].
RealImages = Callable[[NDArray[Any]], NDArray[Any]]

# Rows of real features that samples are compared with at once.
_BLOCK_ROWS = 8192


class Neighbour(NamedTuple):
    """A real image near a sample.

    Attributes:
      index: among the real images.
      distance: Euclidean, between features.
      image: ``[H, W, C]`` in [-1, 1].
    """

    index: int
    distance: float
    image: NDArray[Any]


class Typical(NamedTuple):
    """How far real images are from their nearest other: quantiles of that distance."""

    low: float
    median: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShownSample:
    """A sample of a page, and what may be looked at beside it.

    Attributes:
      image: ``[H, W, C]`` in [-1, 1].
      caption: what it is of, such as a prompt; empty for nothing.
      neighbours: the nearest real images, nearest first; empty where there are none.
      typical: the 5 %, 50 % and 95 % quantiles among the real images; None likewise.
      share: of the real images, those that have another at least as near as this sample
        has its nearest; None likewise.
    """

    image: NDArray[Any]
    caption: str = ""
    neighbours: tuple[Neighbour, ...] = ()
    typical: Typical | None = None
    share: float | None = None


def nearest(
    samples: ArrayLike, real: ArrayLike, k: int
) -> tuple[NDArray[np.int64], Floats]:
    """The ``k`` real images nearest to each sample, nearest first.

    Of equal distances the lower index comes first. Differences are squared, never
    expanded, so that a copy has distance 0.

    Args:
      samples: features ``[n, D]``.
      real: features ``[N, D]``.
      k: at least 1; all of them where there are fewer.

    Returns:
      Indices ``[n, k]`` and Euclidean distances ``[n, k]``.

    Raises:
      ValueError: ``k`` below 1, features of other widths, or NaN or infinity.
    """
    if k < 1:
        raise ValueError(f"k is a number of neighbours, at least 1, but is {k}")
    queries, others = checked_features(samples, 1), checked_features(real, 1)
    if queries.shape[1] != others.shape[1]:
        raise ValueError(
            "samples and real images must have features of one kind, but have "
            f"dimensions {queries.shape[1]} and {others.shape[1]}"
        )
    indices = np.empty((len(queries), 0), np.int64)
    squared = np.empty((len(queries), 0))
    for start in range(0, len(others), _BLOCK_ROWS):
        block = others[start : start + _BLOCK_ROWS]
        found = np.concatenate([squared, cdist(queries, block, "sqeuclidean")], axis=1)
        numbers = np.broadcast_to(
            np.arange(start, start + len(block)), (len(queries), len(block))
        )
        numbers = np.concatenate([indices, numbers], axis=1)
        order = np.argsort(found, axis=1, kind="stable")[:, :k]
        squared = np.take_along_axis(found, order, axis=1)
        indices = np.take_along_axis(numbers, order, axis=1)
    return indices, np.sqrt(squared)


def distances_among(real: ArrayLike) -> Floats:
    """Each real image's distance to its nearest other, ``[N]``.

    Args:
      real: features ``[N, D]``.

    Raises:
      ValueError: fewer than 2 images, or NaN or infinity.
    """
    given = checked_features(real, 2)
    found = np.empty(len(given), np.int64)
    for rows, squared in squared_distances(given, given):
        count = len(squared)
        squared[np.arange(count), np.arange(count) + rows.start] = np.inf
        found[rows] = squared.argmin(axis=1)
    # Of wide features those were rounded: what they found is measured again.
    return np.linalg.norm(given - given[found], axis=1)


def show_samples(
    rows: Mapping[str, NDArray[Any]],
    features: Mapping[str, NDArray[Any]],
    real_features: NDArray[Any],
    real_images: RealImages,
    k: int,
    captions: Sequence[str] = (),
) -> dict[str, list[ShownSample]]:
    """Finds the real images nearest to the samples of each row.

    Args:
      rows: name to images ``[n, H, W, C]`` in [-1, 1].
      features: name to their features ``[n, D]``.
      real_features: ``[N, D]``; row ``i`` is of real image ``i``.
      real_images: gives those that are shown.
      k: neighbours of each sample.
      captions: of the samples of every row; empty for none.
    """
    among = np.sort(distances_among(real_features))
    low, median, high = np.quantile(among, [0.05, 0.5, 0.95]).tolist()
    shown = {}
    for name, images in rows.items():
        indices, distances = nearest(features[name], real_features, k)
        wanted = np.unique(indices)
        images_of = dict(zip(wanted.tolist(), real_images(wanted), strict=True))
        nearer = np.searchsorted(among, distances[:, 0], side="right") / len(among)
        shown[name] = [
            ShownSample(
                image=image,
                caption=captions[place] if captions else "",
                neighbours=tuple(
                    Neighbour(i, distance, images_of[i])
                    for i, distance in zip(own, far, strict=True)
                ),
                typical=Typical(low, median, high),
                share=share,
            )
            for place, (image, own, far, share) in enumerate(
                zip(
                    images,
                    indices.tolist(),
                    distances.tolist(),
                    nearer.tolist(),
                    strict=True,
                )
            )
        ]
    return shown
