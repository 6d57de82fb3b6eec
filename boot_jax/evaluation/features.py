"""Named feature extractors: the space that two sets of images are compared in.

A distance between sets of images means nothing without the features it was taken in,
so an extractor carries a name that says exactly what it is, and the name is shown
beside every figure. To add one: write a class that satisfies `FeatureExtractor` in a
file of its own and enter its factory in `FEATURES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from boot_jax.config import unknown

ImageShape = tuple[int, int, int]


class FeatureError(ValueError):
    """Features that cannot be had; the message says what to do about it."""


class Description(NamedTuple):
    """What an extractor says of ``N`` images, in floats.

    Attributes:
      features: ``[N, D]``.
      spatial: ``[N, S]``, of sFID; None where the extractor has none.
      logits: ``[N, K]`` of classes, without bias; None where it has none.
    """

    features: NDArray[Any]
    spatial: NDArray[Any] | None = None
    logits: NDArray[Any] | None = None

    def take(self, indices: NDArray[Any]) -> "Description":
        """Of some of the images."""
        spatial, logits = self.spatial, self.logits
        return Description(
            self.features[indices],
            None if spatial is None else spatial[indices],
            None if logits is None else logits[indices],
        )


class FeatureExtractor(Protocol):
    """Maps images to vectors, one for each image, independently of each other."""

    @property
    def name(self) -> str:
        """What the features are, in full, to be shown beside every figure."""
        ...

    @property
    def distance_name(self) -> str:
        """What a Frechet distance between them is called: FID, or not."""
        ...

    @property
    def image_shape(self) -> ImageShape:
        """``(H, W, C)`` of the images that it reads."""
        ...

    def describe(self, images: ArrayLike) -> Description:
        """Describes ``[N, H, W, C]`` floats in [-1, 1], each image by itself."""
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
    def distance_name(self) -> str:
        """Not FID."""
        return "Fréchet distance"

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
        given = check_images(images, self.image_shape)
        pooled = _mean_pool(given.astype(np.float64), self.factor)
        return pooled.reshape(len(pooled), -1)

    def describe(self, images: ArrayLike) -> Description:
        """The same, as a `Description` without spatial features and classes."""
        return Description(self(images))


def check_images(images: ArrayLike, image_shape: ImageShape) -> NDArray[Any]:
    """The images as an array.

    Raises:
      ValueError: another shape than ``[N, *image_shape]``, or integers.
    """
    given = np.asarray(images)
    if given.shape[1:] != image_shape:
        raise ValueError(
            f"these features are of images {list(image_shape)}, in a batch "
            f"[N, H, W, C], but were given an array of shape {list(given.shape)}"
        )
    if given.dtype.kind in "biu":
        raise ValueError(
            f"images are floats in [-1, 1], but these are {given.dtype}: "
            "divide uint8 images by 127.5 and subtract 1"
        )
    return given


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


def _pixels(
    image_shape: ImageShape, options: Mapping[str, Any], mesh: Mesh | None
) -> FeatureExtractor:
    return pixel_features(image_shape)


def _inception(
    image_shape: ImageShape, options: Mapping[str, Any], mesh: Mesh | None
) -> FeatureExtractor:
    from boot_jax.evaluation.inception_features import InceptionFeatures

    return InceptionFeatures.from_file(
        options["weights"],
        image_shape=image_shape,
        resize=options["resize"],
        round_uint8=options["round_uint8"],
        mesh=mesh,
    )


#: Each makes an extractor for images of a shape, from a config's ``evaluation``.
FEATURES: dict[
    str, Callable[[ImageShape, Mapping[str, Any], Mesh | None], FeatureExtractor]
] = {"pixels": _pixels, "inception": _inception}


def get_features(
    name: str,
    image_shape: ImageShape,
    options: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> FeatureExtractor:
    """Makes the extractor called ``name`` for images of shape ``(H, W, C)``.

    Args:
      name: a key of `FEATURES`.
      image_shape: ``(H, W, C)``.
      options: the ``evaluation`` section of a config; ``pixels`` reads nothing of it.
      mesh: of devices, for extractors that are networks.

    Raises:
      ValueError: no extractor is called so; the message lists those there are.
      FeatureError: its weights are missing; the message says where people get them.
    """
    if name not in FEATURES:
        raise ValueError(unknown("evaluation.features", name, FEATURES))
    return FEATURES[name](image_shape, options or {}, mesh)
