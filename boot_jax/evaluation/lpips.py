"""LPIPS: how different two images look, by a network's activations.

Zhang et al. 2018, *The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric*, arXiv 1801.03924: at five depths of VGG16 or AlexNet, each pixel's activations
are divided by their length; the squared differences, weighted by learned weights at
least 0, are averaged over the pixels and summed over the depths.

Weights are those of the package ``lpips``, version 0.1, with the network's own in one
file: the ``state_dict`` of ``lpips.LPIPS(net="vgg")`` or of ``net="alex"``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from boot_jax.evaluation.features import FeatureError
from boot_jax.evaluation.inception_features import file_hash
from boot_jax.models.weights import WeightsError, from_diffusers, read_tensors
from boot_jax.sharding import (
    batch_sharding,
    batch_shards,
    create_mesh,
    place,
    replicated,
    to_host,
)

# Of images in [-1, 1], by channel.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Convolution(NamedTuple):
    """One of a network's convolutions, each followed by the positive part.

    Attributes:
      index: in torchvision's ``features``.
      channels, kernel, stride, padding: of the convolution.
      pool: edge of the windows, two apart, whose maxima go in; 0 for none.
      is_tapped: whether activations are compared behind it.
    """

    index: int
    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    is_tapped: bool = True


#: The two networks, and the least edge of an image that leaves a pixel at all depths.
NETWORKS: dict[str, tuple[tuple[Convolution, ...], int]] = {
    "alex": (
        (
            Convolution(0, 64, kernel=11, stride=4, padding=2),
            Convolution(3, 192, kernel=5, padding=2, pool=3),
            Convolution(6, 384, pool=3),
            Convolution(8, 256),
            Convolution(10, 256),
        ),
        31,
    ),
    "vgg": (
        (
            Convolution(0, 64, is_tapped=False),
            Convolution(2, 64),
            Convolution(5, 128, pool=2, is_tapped=False),
            Convolution(7, 128),
            Convolution(10, 256, pool=2, is_tapped=False),
            Convolution(12, 256, is_tapped=False),
            Convolution(14, 256),
            Convolution(17, 512, pool=2, is_tapped=False),
            Convolution(19, 512, is_tapped=False),
            Convolution(21, 512),
            Convolution(24, 512, pool=2, is_tapped=False),
            Convolution(26, 512, is_tapped=False),
            Convolution(28, 512),
        ),
        16,
    ),
}


class PerceptualDistance(nn.Module):
    """Maps pairs of images to their distances."""

    network: str

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        """Compares images.

        Args:
          a, b: ``[N, H, W, 3]`` float32 in [-1, 1].

        Returns:
          ``[N]`` float32, 0 for equal images.
        """
        precision = jax.lax.Precision.HIGHEST
        shift, scale = (jnp.asarray(x)[None, None, None] for x in (_SHIFT, _SCALE))
        x, total = (jnp.concatenate([a, b]) - shift) / scale, jnp.zeros(len(a))
        depth = 0
        for layer in NETWORKS[self.network][0]:
            if layer.pool:
                x = nn.max_pool(x, (layer.pool, layer.pool), (2, 2))
            sides = (layer.kernel, layer.kernel)
            padding = [(layer.padding, layer.padding)] * 2
            strides = (layer.stride, layer.stride)
            name = f"features_{layer.index}"
            x = nn.Conv(
                layer.channels, sides, strides, padding, precision=precision, name=name
            )(x)
            x = jax.nn.relu(x)
            if layer.is_tapped:
                lengths = jnp.linalg.norm(x, axis=-1, keepdims=True)
                first, second = jnp.split(x / (lengths + 1e-10), 2)
                weigh = nn.Conv(
                    1, (1, 1), use_bias=False, precision=precision, name=f"lin{depth}"
                )
                total += weigh((first - second) ** 2).mean(axis=(1, 2, 3))
                depth += 1
        return total


def _renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of the package ``lpips`` as torchvision has them, without repetition.

    It wraps the network in slices, and keeps each of its own weights twice.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^net\.slice\d+\.", "features.", name)
        name = re.sub(r"^lins\.(\d+)\.", r"lin\1.", name)
        name = re.sub(r"^lin(\d+)\.model\.1\.", r"lin\1.", name)
        if not name.startswith(("scaling_layer.", "classifier.")):
            renamed[name] = tensor
    return renamed


class Lpips:
    """Scores pairs of images, over a mesh of devices."""

    def __init__(
        self, network: str, params: Any, name: str, mesh: Mesh | None = None
    ) -> None:
        """Most are made with `from_file`; the network is a key of `NETWORKS`."""
        self.network, self.name = network, name
        self._mesh = mesh or create_mesh()
        self._params = place(params, replicated(self._mesh))
        module, sharding = PerceptualDistance(network), batch_sharding(self._mesh)

        def distances(params: Any, a: Array, b: Array) -> Any:
            colours = (jnp.broadcast_to(x, (*x.shape[:3], 3)) for x in (a, b))
            return module.apply({"params": params}, *colours)

        self._distances = jax.jit(distances, out_shardings=sharding)

    @classmethod
    def from_file(cls, path: str, mesh: Mesh | None = None) -> "Lpips":
        """Reads the weights, and tells by them which network it is.

        Raises:
          FeatureError: there is no such file; the message says where people get it.
          WeightsError: it cannot be read, or holds other weights.
        """
        file = Path(path).expanduser()
        if not file.exists():
            raise FeatureError(
                f"evaluation.lpips_weights: there is no file {file}; save "
                "lpips.LPIPS(net='vgg').state_dict() of the package lpips there, as "
                "safetensors"
            )
        tensors = _renamed(read_tensors(file))
        first = tensors.get("features.0.weight", np.zeros(0))
        network = "alex" if first.shape[-1:] == (11,) else "vgg"
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        module = PerceptualDistance(network)
        template = jax.eval_shape(module.init, jax.random.key(0), image, image)
        try:
            params = from_diffusers(tensors, template["params"])
        except WeightsError as error:
            raise WeightsError(f"evaluation.lpips_weights: {error}") from error
        name = f"LPIPS {network} (weights {file_hash(file)})"
        return cls(network, params, name, mesh)

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Refuses images ``(H, W, C)`` that the network cannot compare.

        Raises:
          FeatureError: they are too small, or neither grey nor RGB.
        """
        least, (height, width, channels) = NETWORKS[self.network][1], image_shape
        if channels not in (1, 3):
            raise FeatureError(
                f"LPIPS compares grey or RGB images, but these have {channels} "
                "channels; leave 'lpips' out of evaluation.metrics"
            )
        if min(height, width) < least:
            raise FeatureError(
                f"LPIPS by {self.network} needs images of {least} pixels at least, but "
                f"these are {height}x{width}; leave 'lpips' out of evaluation.metrics"
            )

    def __call__(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
        """The distance of each pair, ``[N]``.

        Args:
          a, b: ``[N, H, W, C]`` in [-1, 1], C being 1 or 3; clipped where beyond.

        Raises:
          FeatureError: images that `check` refuses.
        """
        self.check(a.shape[1:])
        count, unit = len(a), batch_shards(self._mesh)
        filled = np.minimum(np.arange(-(-count // unit) * unit), count - 1)
        pair = (np.clip(x, -1.0, 1.0).astype(np.float32)[filled] for x in (a, b))
        placed = place(tuple(pair), batch_sharding(self._mesh))
        found = to_host(self._distances(self._params, *placed))
        return found[:count].astype(np.float64)
