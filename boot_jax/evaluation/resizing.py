"""How images are brought to a feature network's size: FID changes with it.

Three published ways, each a separable linear map, so that the whole of it is one matrix
for each edge (Parmar, Zhang and Zhu 2022, arXiv 2104.11222, compare them):

  * ``clean``: Pillow's bicubic filter in floating point, which is widened where images
    shrink, then clipped to [0, 255]; that of clean-fid;
  * ``legacy_pytorch``: ``torch.nn.functional.interpolate``, bilinear without corners
    aligned and without a wider filter; that of pytorch-fid;
  * ``legacy_tensorflow``: ``tf.image.resize_bilinear`` of TensorFlow 1, whose pixels
    have their places at the corners; that of the graph of 2015, and of ADM's evaluator.

They also differ in what they call a normalised image, see `Resizer.__call__`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _bicubic(x: Floats) -> Floats:
    """Keys' cubic with ``a = -1/2``, on [-2, 2]."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _pillow(size: int, new_size: int) -> Floats:
    """Row ``i`` holds the weights of the old pixels in the new pixel ``i``."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    weights = np.zeros((new_size, size))
    for i in range(new_size):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2.0 * stretch + 0.5), 0)
        last = min(int(centre + 2.0 * stretch + 0.5), size)
        places = np.arange(first, last, dtype=np.float64)
        weights[i, first:last] = _bicubic((places - centre + 0.5) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)


def _bilinear(size: int, new_size: int, offset: float) -> Floats:
    places = (np.arange(new_size) + offset) * (size / new_size) - offset
    places = np.clip(places, 0.0, size - 1)
    first = np.floor(places).astype(int)
    second, share = np.minimum(first + 1, size - 1), places - first
    weights, rows = np.zeros((new_size, size)), np.arange(new_size)
    np.add.at(weights, (rows, first), 1.0 - share)
    np.add.at(weights, (rows, second), share)
    return weights


_MATRICES: dict[str, Callable[[int, int], Floats]] = {
    "clean": _pillow,
    "legacy_pytorch": functools.partial(_bilinear, offset=0.5),
    "legacy_tensorflow": functools.partial(_bilinear, offset=0.0),
}

#: The ways to resize, by name.
RESIZE_MODES = tuple(_MATRICES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resizer:
    """Images in [-1, 1] to what a network of FID reads.

    Attributes:
      mode: one of `RESIZE_MODES`.
      size: the new edge, in pixels.
      round_uint8: whether images are rounded to 256 levels first, as those in files
        are; without it they are clipped alone.
    """

    mode: str
    size: int
    round_uint8: bool

    @property
    def name(self) -> str:
        """Mode and rounding, to be shown beside every figure."""
        return f"{self.mode} resize, {'uint8' if self.round_uint8 else 'not rounded'}"

    def __call__(self, images: Array) -> Array:
        """Rounds, resizes and normalises.

        Args:
          images: ``[N, H, W, C]`` floats in [-1, 1]; one channel is repeated to three.

        Returns:
          ``[N, size, size, 3]`` float32: ``(x - 127.5) / 127.5`` for ``legacy_pytorch``
          and ``(x - 128) / 128`` for the others, ``x`` in [0, 255].
        """
        levels = jnp.clip(images.astype(jnp.float32) * 127.5 + 127.5, 0.0, 255.0)
        if self.round_uint8:
            levels = jnp.rint(levels)
        matrix = _MATRICES[self.mode]
        for axis in (2, 1):  # Pillow, too, takes the rows first.
            if levels.shape[axis] != self.size:
                weights = matrix(levels.shape[axis], self.size).astype(np.float32)
                levels = jnp.moveaxis(
                    jnp.tensordot(
                        jnp.moveaxis(levels, axis, -1),
                        weights.T,
                        axes=1,
                        precision=jax.lax.Precision.HIGHEST,
                    ),
                    -1,
                    axis,
                )
        middle = 127.5 if self.mode == "legacy_pytorch" else 128.0
        resized = (jnp.clip(levels, 0.0, 255.0) - middle) / middle
        return jnp.broadcast_to(resized, (*resized.shape[:3], 3))
