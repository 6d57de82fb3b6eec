"""The decoder of diffusers' ``AutoencoderKL``: latents to images, for looking only.

Distillation lives in the latents; nothing is ever encoded, so there is no encoder.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from boot_jax.models import layers
from boot_jax.models.from_config import read_fields
from boot_jax.models.unet_blocks import MidBlock

#: Prefixes of the tensors that decoding needs.
PREFIXES = ("decoder.", "post_quant_conv.")

# Of the encoder, of training, or of how the images are cut up: nothing to decode by.
_IGNORED = ("in_channels", "down_block_types", "sample_size", "force_upcast")
_IGNORED += ("use_quant_conv",)


class UpDecoderBlock(nn.Module):
    """ResNet blocks, then twice the size."""

    features: int
    num_layers: int
    upsample: bool
    settings: layers.LayerSettings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, H, W, _]`` to ``[B, H or 2H, W or 2W, features]``."""
        for i in range(self.num_layers):
            block = layers.ResnetBlock(
                self.features, self.settings, name=f"resnets_{i}"
            )
            x = block(x, None)
        if self.upsample:
            x = layers.Upsample(self.settings.dtype, name="upsamplers_0")(x)
        return x


class Decoder(nn.Module):
    """All but the first convolution of `VAEDecoder`, named as in diffusers."""

    widths: tuple[int, ...]
    num_layers: int
    out_channels: int
    attention: bool
    settings: layers.LayerSettings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps latents ``[B, h, w, latent_channels]`` to images."""
        settings, last = self.settings, len(self.widths) - 1
        x = layers.conv_3x3(self.widths[0], settings.dtype, name="conv_in")(x)
        attend = functools.partial(layers.Attention, settings)
        mid = MidBlock(attend if self.attention else None, settings, name="mid_block")
        x = mid(x, None)
        for i, width in enumerate(self.widths):
            name, upsample = f"up_blocks_{i}", i < last
            block = UpDecoderBlock(
                width, self.num_layers, upsample, settings, name=name
            )
            x = block(x)
        norm = (settings.num_groups, settings.epsilon, settings.dtype)
        x = nn.silu(layers.group_norm(x, *norm, name="conv_norm_out"))
        return layers.conv_3x3(self.out_channels, settings.dtype, name="conv_out")(x)


class VAEDecoder(nn.Module):
    """Decodes latents as a diffusion model has them: scaled, in float32.

    The fields are those of diffusers' ``AutoencoderKL`` that decoding needs.

    Raises:
      ValueError: an unsupported value, naming the field and the supported ones.
    """

    out_channels: int = 3
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: None = None
    latents_std: None = None
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VAEDecoder":
        """Builds the decoder that an ``AutoencoderKL``'s ``config.json`` describes."""
        given = {k: v for k, v in config.items() if k not in _IGNORED}
        return cls(**read_fields(cls, given, {}))

    def __post_init__(self) -> None:
        wanted: dict[str, Any] = {
            "up_block_types": ("UpDecoderBlock2D",) * len(self.block_out_channels),
            "latents_mean": None,
            "latents_std": None,
        }
        for field, value in wanted.items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"VAEDecoder: {field}={getattr(self, field)!r} is not supported; "
                    f"use {value!r}"
                )
        if self.act_fn not in layers.ACTIVATIONS:
            raise ValueError(
                f"VAEDecoder: act_fn={self.act_fn!r} is not supported; use one of "
                f"{sorted(layers.ACTIVATIONS)}"
            )
        super().__post_init__()

    @property
    def scale(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.block_out_channels) - 1)

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        """Maps ``[B, h, w, latent_channels]`` to ``[B, H, W, out_channels]``."""
        x = latents.astype(jnp.float32) / self.scaling_factor
        x = x + (self.shift_factor or 0.0)
        if self.use_post_quant_conv:
            x = nn.Conv(self.latent_channels, (1, 1), name="post_quant_conv")(x)
        settings = layers.LayerSettings(
            num_groups=self.norm_num_groups,
            attention_groups=self.norm_num_groups,
            epsilon=1e-6,
            activation=self.act_fn,
            head_dim=None,
        )
        return Decoder(
            widths=self.block_out_channels[::-1],
            num_layers=self.layers_per_block + 1,
            out_channels=self.out_channels,
            attention=self.mid_block_add_attention,
            settings=settings,
            name="decoder",
        )(x)
