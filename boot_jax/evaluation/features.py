"""Named feature extractors: the space that two sets of images are compared in.

A distance between sets of images means nothing without the features it was taken in,
so an extractor carries a name that says exactly what it is, and the name is shown
beside every figure. To add one: write a class that satisfies `FeatureExtractor` in a
file of its own and enter its factory in `FEATURES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

ImageShape = tuple[int, int, int]


class FeatureExtractor(Protocol):
    """Maps images to vectors, one for each image, independently of each other."""

    @property
    def name(self) -> str:
        """What the features are, in full, to be shown beside every figure."""
        ...

    def __call__(self, images: ArrayLike) -> NDArray[np.float64]:
        """Maps ``[N, H, W, C]`` floats in [-1, 1] to ``[N, D]`` float64."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelFeatures:
    """The pixels themselves in [-1, 1], averaged over ``factor`` x ``factor`` cells.

    Neither clipped nor rounded to uint8. A Frechet distance between them compares the
    means and covariances of the pixels: it is **not** an FID, and only to be compared
    with values of the same name. Where the factor does not divide an edge, the last
    cells are smaller, and are averaged over the pixels that they have.
    """

    image_shape: ImageShape
    factor: int = 1

    @property
    def name(self) -> str:
        """For instance ``pixels 8x8x3 (4x4 means of 32x32)``."""
        height, width, channels = self.image_shape
        pooled = f"pixels {-(-height // self.factor)}x{-(-width // self.factor)}"
        if self.factor == 1:
            return f"{pooled}x{channels}"
        cell = f"{self.factor}x{self.factor}"
        return f"{pooled}x{channels} ({cell} means of {height}x{width})"

    def __call__(self, images: ArrayLike) -> NDArray[np.float64]:
        """Maps ``[N, H, W, C]`` floats in [-1, 1] to ``[N, D]`` float64.

        Raises:
          ValueError: another image shape, or integers (which are not in [-1, 1]).
        """
        given = np.asarray(images)
        if given.shape[1:] != self.image_shape:
            raise ValueError(
                f"these features are of images {list(self.image_shape)}, in a batch "
                f"[N, H, W, C], but were given an array of shape {list(given.shape)}"
            )
        if given.dtype.kind in "biu":
            raise ValueError(
                f"images are floats in [-1, 1], but these are {given.dtype}: "
                "divide uint8 images by 127.5 and subtract 1"
            )
        pooled = _mean_pool(given.astype(np.float64), self.factor)
        return pooled.reshape(len(pooled), -1)


def _mean_pool(images: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    for axis in (1, 2):
        starts = np.arange(0, images.shape[axis], factor)
        counts = np.diff(starts, append=images.shape[axis])
        counts = counts.reshape([-1 if i == axis else 1 for i in range(images.ndim)])
        images = np.add.reduceat(images, starts, axis=axis) / counts
    return images


def pixel_features(image_shape: ImageShape, max_size: int = 8) -> PixelFeatures:
    """Pixels as features, pooled until no edge is longer than ``max_size``.

    Their number stays small enough for a covariance of a few thousand images.

    Args:
      image_shape: ``(H, W, C)``.
      max_size: the longest edge that is left, in pixels.

    Raises:
      ValueError: ``max_size`` or an edge is below 1.

    >>> pixel_features((28, 28, 1)).name
    'pixels 7x7x1 (4x4 means of 28x28)'
    """
    if max_size < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            "pixel features need an image shape (H, W, C) and a max_size of at least "
            f"1, but were given {tuple(image_shape)} and {max_size}"
        )
    height, width, channels = (int(size) for size in image_shape)
    factor = -(-max(height, width) // max_size)
    return PixelFeatures(image_shape=(height, width, channels), factor=factor)


FEATURES: dict[str, Callable[[ImageShape], FeatureExtractor]] = {
    "pixels": pixel_features,
}


def get_features(name: str, image_shape: ImageShape) -> FeatureExtractor:
    """Makes the extractor called ``name`` for images of shape ``(H, W, C)``.

    Raises:
      ValueError: no extractor is called so; the message lists those there are.
    """
    if name not in FEATURES:
        raise ValueError(
            f"there are no features called {name!r}; known are "
            f"{', '.join(map(repr, sorted(FEATURES)))}"
        )
    return FEATURES[name](image_shape)
