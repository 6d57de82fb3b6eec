"""The blocks that UNets are built of, and how a UNet runs through them.

The attention of a block is whatever module its maker gives: self-attention among pixels
in an unconditional UNet, a transformer that also reads a text in a conditional one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.models import layers
from boot_jax.models.layers import LayerSettings, ResnetBlock

Resampling = Literal["conv", "resnet"]

#: Makes, of a name, a module that is called as ``attention(x, *context)``.
MakeAttention = Callable[..., Callable[..., Array]]


class DownBlock(nn.Module):
    """ResNet blocks, each followed by attention if it has some, then half the size."""

    features: int
    num_layers: int
    attention: MakeAttention | None
    resampling: Resampling | None
    padding: int
    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: Array, embedding: Array, *context: Array
    ) -> tuple[Array, ...]:
        """Gives every layer's output; the last one goes on, all are skips."""
        settings, outputs = self.settings, []
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, settings, name=f"resnets_{i}")(x, embedding)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, *context)
            outputs.append(x)
        if self.resampling == "conv":
            padding, dtype = self.padding, settings.dtype
            x = layers.Downsample(padding, dtype, name="downsamplers_0")(x)
        elif self.resampling == "resnet":
            half = layers.downsample_mean
            block = ResnetBlock(self.features, settings, half, name="downsamplers_0")
            x = block(x, embedding)
        return (*outputs, x) if self.resampling else tuple(outputs)


class MidBlock(nn.Module):
    """Two ResNet blocks around attention, at the lowest resolution."""

    attention: MakeAttention | None
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None, *context: Array) -> Array:
        """Maps ``[B, H, W, C]`` to the same shape."""
        settings, features = self.settings, x.shape[-1]
        x = ResnetBlock(features, settings, name="resnets_0")(x, embedding)
        if self.attention is not None:
            x = self.attention(name="attentions_0")(x, *context)
        return ResnetBlock(features, settings, name="resnets_1")(x, embedding)


def check_images(name: str, x: Array, in_channels: int, levels: int) -> None:
    """Refuses images that do not fit a UNet, which halves them between its levels.

    Raises:
      ValueError: other channels, or sides that cannot be halved so often.
    """
    multiple = 2 ** (levels - 1)
    if x.shape[-1] != in_channels or x.shape[1] % multiple or x.shape[2] % multiple:
        raise ValueError(
            f"{name}: images of shape [B, H, W, C] = {x.shape} do not fit; C must be "
            f"{in_channels}, and H and W multiples of {multiple}"
        )


class UpBlock(nn.Module):
    """One ResNet block for each skip, the last skip first, then twice the size."""

    features: int
    attention: MakeAttention | None
    resampling: Resampling | None
    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: Array, skips: tuple[Array, ...], embedding: Array, *context: Array
    ) -> Array:
        """Joins ``x`` and the skips, all ``[B, H, W, _]``."""
        settings = self.settings
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = ResnetBlock(self.features, settings, name=f"resnets_{i}")(x, embedding)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, *context)
        if self.resampling == "conv":
            x = layers.Upsample(settings.dtype, name="upsamplers_0")(x)
        elif self.resampling == "resnet":
            twice = layers.upsample_nearest
            block = ResnetBlock(self.features, settings, twice, name="upsamplers_0")
            x = block(x, embedding)
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of a UNet, on the way down or up.

    Attributes:
      features: channels.
      num_layers: ResNet blocks.
      attention: what follows each of them; None for nothing.
      resampling: how the size changes at the end; None leaves it.
    """

    features: int
    num_layers: int
    attention: MakeAttention | None
    resampling: Resampling | None


def run_blocks(
    x: Array,
    embedding: Array,
    *context: Array,
    down: Sequence[Level],
    mid: tuple[MakeAttention | None, LayerSettings] | None,
    up: Sequence[Level],
    padding: int,
    settings: LayerSettings,
    remat: str,
) -> Array:
    """From the first convolution to the last block, within the module that calls it.

    Args:
      x: images ``[B, H, W, C]``.
      embedding: ``[B, E]``, of the time and all that is added to it.
      *context: what the attentions read beside the image, each ``[B, ...]``.
      down: from the highest resolution to the lowest.
      mid: attention and settings of the block between; None leaves it out.
      up: from the lowest resolution to the highest.
      padding: of the convolutions that halve the size, 0 or 1.
      settings: of all blocks but the one between.
      remat: one of `boot_jax.models.layers.REMAT_POLICIES`.

    Returns:
      ``[B, H, W, up[-1].features]``.
    """
    wrap = functools.partial(layers.rematerialised, policy=remat)
    first = layers.conv_3x3(down[0].features, settings.dtype, name="conv_in")
    skips = (first(x),)
    for i, level in enumerate(down):
        block = wrap(DownBlock)(
            features=level.features,
            num_layers=level.num_layers,
            attention=level.attention,
            resampling=level.resampling,
            padding=padding,
            settings=settings,
            name=f"down_blocks_{i}",
        )
        skips += block(skips[-1], embedding, *context)
    x = skips[-1]
    if mid is not None:
        x = wrap(MidBlock)(*mid, name="mid_block")(x, embedding, *context)
    for i, level in enumerate(up):
        block = wrap(UpBlock)(
            features=level.features,
            attention=level.attention,
            resampling=level.resampling,
            settings=settings,
            name=f"up_blocks_{i}",
        )
        x = block(x, skips[-level.num_layers :], embedding, *context)
        skips = skips[: -level.num_layers]
    return x


def last_layers(
    x: Array,
    out_channels: int,
    num_groups: int,
    epsilon: float,
    activation: str = "silu",
) -> Array:
    """The last norm and convolution of a UNet, in float32: ``[B, H, W, _]``."""
    norm = (num_groups, epsilon, jnp.float32)
    x = layers.group_norm(x, *norm, name="conv_norm_out")
    precision = jax.lax.Precision.HIGHEST
    conv = layers.conv_3x3(out_channels, jnp.float32, precision, name="conv_out")
    return conv(layers.ACTIVATIONS[activation](x))
