"""The InceptionV3 network of FID, equal to PyTorch ports of TensorFlow's 2015 graph.

It is not the InceptionV3 of torchvision. In FID's graph (``inception-2015-12-05``):

  * average pooling divides by the pixels that are there, not by those of the padding;
  * the last block pools by maximum in its fourth branch;
  * there are 1,008 classes, and no auxiliary head.

The modules are named as in the published file of pytorch-fid
(``pt_inception-2015-12-05-6726825d.pth``), so `boot_jax.models.weights` maps them.

Sources: Szegedy et al., *Rethinking the Inception Architecture*, arXiv 1512.00567;
Heusel et al. 2017, arXiv 1706.08500, for its pooled features; Salimans et al. 2016,
arXiv 1606.03498, for its classes, whose logits are taken without the bias; Nash et al.
2021, arXiv 2103.03841, and Dhariwal and Nichol 2021, arXiv 2105.05233, for the spatial
features: the first 7 channels of the 1x1 branch of the third 17x17 block.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.models.weights import WeightsError, from_diffusers

#: The edge of the images that the network was trained on, in pixels.
SIZE = 299

#: Numbers of features of an image.
POOLED, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008

_SPATIAL_CHANNELS = 7

Pair = tuple[int, int]


class InceptionOutput(NamedTuple):
    """What the network says of ``N`` images, in float32.

    Attributes:
      pooled: ``[N, 2048]``, of FID and KID.
      spatial: ``[N, 2023]``, of sFID; ``[N, h w 7]`` at other sizes than 299.
      logits: ``[N, 1008]`` without the bias, of the inception score.
    """

    pooled: Array
    spatial: Array
    logits: Array


class BatchNorm(nn.Module):
    """Normalisation by running statistics alone, all of them parameters."""

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[N, H, W, C]`` to the same shape."""
        shape = x.shape[-1:]
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, shape)
        bias = self.param("bias", zeros, shape)
        mean = self.param("running_mean", zeros, shape)
        variance = self.param("running_var", ones, shape)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


class Unit(nn.Module):
    """A convolution without bias, its norm, and the positive part."""

    features: int
    kernel: Pair
    stride: int = 1
    padding: Pair = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[N, H, W, C]`` to ``[N, H', W', features]``."""
        x = nn.Conv(
            self.features,
            self.kernel,
            (self.stride, self.stride),
            [(pad, pad) for pad in self.padding],
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return jax.nn.relu(BatchNorm(name="bn")(x))


def _unit(
    features: int,
    kernel: int | Pair = 1,
    *,
    name: str,
    stride: int = 1,
    same: bool = True,
) -> Unit:
    """A unit that keeps the edges (``same``), or only takes whole windows."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (sides[0] // 2, sides[1] // 2) if same else (0, 0)
    return Unit(features, sides, stride, padding, name=name)


def _mean_pool(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    """35x35 pixels: ``FIDInceptionA``."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[N, H, W, C]`` to ``[N, H, W, 224 + pool_features]``."""
        five = _unit(48, name="branch5x5_1")(x)
        three = _unit(64, name="branch3x3dbl_1")(x)
        three = _unit(96, 3, name="branch3x3dbl_2")(three)
        branches = [
            _unit(64, name="branch1x1")(x),
            _unit(64, 5, name="branch5x5_2")(five),
            _unit(96, 3, name="branch3x3dbl_3")(three),
            _unit(self.pool_features, name="branch_pool")(_mean_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """From 35x35 to 17x17 pixels: ``InceptionB``."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[N, H, W, C]`` to ``[N, H // 2, W // 2, C + 480]``, H and W odd."""
        three = _unit(64, name="branch3x3dbl_1")(x)
        three = _unit(96, 3, name="branch3x3dbl_2")(three)
        branches = [
            _unit(384, 3, stride=2, same=False, name="branch3x3")(x),
            _unit(96, 3, stride=2, same=False, name="branch3x3dbl_3")(three),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """17x17 pixels, its 7x7 convolutions in two halves: ``FIDInceptionC``."""

    inner: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Maps ``[N, H, W, C]`` to ``[N, H, W, 768]``, and the 1x1 branch alone."""
        inner = self.inner
        single = _unit(192, name="branch1x1")(x)
        seven = _unit(inner, name="branch7x7_1")(x)
        seven = _unit(inner, (1, 7), name="branch7x7_2")(seven)
        double = _unit(inner, name="branch7x7dbl_1")(x)
        for i, kernel in ((2, (7, 1)), (3, (1, 7)), (4, (7, 1))):
            double = _unit(inner, kernel, name=f"branch7x7dbl_{i}")(double)
        branches = [
            single,
            _unit(192, (7, 1), name="branch7x7_3")(seven),
            _unit(192, (1, 7), name="branch7x7dbl_5")(double),
            _unit(192, name="branch_pool")(_mean_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1), single


class BlockD(nn.Module):
    """From 17x17 to 8x8 pixels: ``InceptionD``."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[N, H, W, C]`` to ``[N, H // 2, W // 2, C + 512]``, H and W odd."""
        three = _unit(192, name="branch3x3_1")(x)
        seven = _unit(192, name="branch7x7x3_1")(x)
        seven = _unit(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = _unit(192, (7, 1), name="branch7x7x3_3")(seven)
        branches = [
            _unit(320, 3, stride=2, same=False, name="branch3x3_2")(three),
            _unit(192, 3, stride=2, same=False, name="branch7x7x3_4")(seven),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """8x8 pixels: ``FIDInceptionE_1``, and with ``max_pool`` ``FIDInceptionE_2``."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[N, H, W, C]`` to ``[N, H, W, 2048]``."""
        three = _unit(384, name="branch3x3_1")(x)
        double = _unit(448, name="branch3x3dbl_1")(x)
        double = _unit(384, 3, name="branch3x3dbl_2")(double)
        if self.max_pool:
            pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        else:
            pooled = _mean_pool(x)
        branches = [
            _unit(320, name="branch1x1")(x),
            _unit(384, (1, 3), name="branch3x3_2a")(three),
            _unit(384, (3, 1), name="branch3x3_2b")(three),
            _unit(384, (1, 3), name="branch3x3dbl_3a")(double),
            _unit(384, (3, 1), name="branch3x3dbl_3b")(double),
            _unit(192, name="branch_pool")(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """Maps images to the features of FID, sFID and the inception score."""

    @nn.compact
    def __call__(self, x: Array) -> InceptionOutput:
        """Describes images.

        Args:
          x: ``[N, 299, 299, 3]`` float32 in about [-1, 1], RGB; see
            `boot_jax.evaluation.resizing`. Other sizes from 75 on are computed too.
        """
        x = _unit(32, 3, stride=2, same=False, name="Conv2d_1a_3x3")(x)
        x = _unit(32, 3, same=False, name="Conv2d_2a_3x3")(x)
        x = _halve(_unit(64, 3, name="Conv2d_2b_3x3")(x))
        x = _unit(80, name="Conv2d_3b_1x1")(x)
        x = _halve(_unit(192, 3, same=False, name="Conv2d_4a_3x3")(x))
        for name, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            x = BlockA(pool_features, name=f"Mixed_5{name}")(x)
        x = BlockB(name="Mixed_6a")(x)
        single = {}
        for name, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x, single[name] = BlockC(inner, name=f"Mixed_6{name}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(max_pool=False, name="Mixed_7b")(x)
        x = BlockE(max_pool=True, name="Mixed_7c")(x)
        pooled = x.mean(axis=(1, 2))
        spatial = single["d"][..., :_SPATIAL_CHANNELS]
        classify = nn.Dense(
            CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc"
        )
        return InceptionOutput(
            pooled, spatial.reshape(len(spatial), -1), classify(pooled)
        )


def inception_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The network's parameters out of the tensors of pytorch-fid's file.

    Args:
      tensors: by PyTorch's names. Counts of batches and the bias of the classes are not
        read.

    Raises:
      WeightsError: tensors are missing, unexpected or of another shape, as those of
        torchvision's own InceptionV3 are.
    """
    given = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked") and name != "fc.bias"
    }
    if any(name.startswith("AuxLogits.") for name in given):
        raise WeightsError(
            "these are the weights of torchvision's InceptionV3, not of FID's; "
            "take pytorch-fid's pt_inception-2015-12-05-6726825d"
        )
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    template = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)
    return from_diffusers(given, template["params"])
