"""The UNet of diffusion models, equal to PyTorch diffusers' ``UNet2DModel``.

`UNet.from_config` reads the ``config.json`` of a diffusers folder; the fields keep
diffusers' names and defaults. A block or a value that this network does not know is
refused: a UNet of other blocks than its weights were trained in runs, only badly.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models import layers
from boot_jax.models.attention import AttentionImplementation
from boot_jax.models.from_config import read_fields
from boot_jax.models.layers import Attention, LayerSettings
from boot_jax.models.unet_blocks import (
    Level,
    Resampling,
    check_images,
    last_layers,
    run_blocks,
)

Condition = Mapping[str, Array] | None
Added = dict[str, Array] | None

# The values that each field may have; a field of several has only these.
CHOICES: dict[str, tuple[str | int | None, ...]] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": tuple(layers.ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
    "attention_implementation": (None, "xla", "cudnn"),
}
COUNTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
COUNTS_OR_NONE = ("attention_head_dim", "attn_norm_num_groups", "time_embedding_dim")
COUNTS_OR_NONE += ("num_class_embeds", "num_train_timesteps")


class UNet(nn.Module):
    """Maps a noisy image and a time to the network's prediction, of the image's shape.

    The fields up to ``num_train_timesteps`` are those of diffusers' ``UNet2DModel``.
    Then: ``added_embeddings``, names of further scalars that join the time embedding,
    with ``num_half_waves`` waves each;
    ``dtype``, what the blocks compute in (parameters, norms, embeddings and the last
    convolution stay in float32); ``attention_implementation``, see `LayerSettings`;
    ``remat``, what each block keeps for the backward pass: one of
    `boot_jax.models.layers.REMAT_POLICIES`.

    Raises:
      ValueError: an unsupported value, naming the field and the supported ones.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *("AttnDownBlock2D",) * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: Resampling = "conv"
    upsample_type: Resampling = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    added_embeddings: tuple[str, ...] = ()
    num_half_waves: int = 2
    dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None
    remat: str = "none"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "UNet":
        """Builds the network that a diffusers ``config.json`` describes.

        Keys that begin with ``_`` are ignored, absent ones have diffusers' defaults,
        and ``overrides`` are fields of this class that go over the config's.

        Raises:
          ValueError: an unknown key or an unsupported value.
        """
        return cls(**read_fields(cls, config, overrides))

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        condition: Condition = None,
        added: Added = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Runs the network.

        Args:
          x: ``[B, H, W, in_channels]``; all blocks but the last halve ``H`` and ``W``.
          time: ``[B]`` float, what diffusers calls timesteps.
          condition: ``{"label": [B] int}`` for a class-conditional network
            (``[B, time_embedding_dim]`` float if ``class_embed_type`` is "identity").
          added: ``{name: [B]}`` for each of ``added_embeddings``.
          deterministic: no dropout; otherwise a "dropout" random stream is needed.

        Returns:
          ``[B, H, W, out_channels]`` float32.

        Raises:
          ValueError: an image, condition or added scalars that do not fit the network.
        """
        check_images("UNet", x, self.in_channels, len(self.block_out_channels))
        embedding = self._embed(time, condition, added)
        x = 2 * x - 1 if self.center_input_sample else x
        x = self._run_blocks(x.astype(self.dtype), embedding, deterministic)
        x = last_layers(x, self.out_channels, self.norm_num_groups, self.norm_eps)
        if self.time_embedding_type == "fourier":
            x = x / time.astype(jnp.float32)[:, None, None, None]
        return x

    def _embed(self, time: Array, condition: Condition, added: Added) -> Array:
        """The sum of all embeddings, ``[B, E]`` float32."""
        features = self.time_embedding_dim or 4 * self.block_out_channels[0]
        project = self._time_projection()
        embed_time = layers.TimestepEmbedding(features, name="time_embedding")
        embedding = embed_time(project(time))
        labelled = self.class_embed_type or self.num_class_embeds
        wanted, given = {"label"} if labelled else set(), set(condition or {})
        if given != wanted:
            raise ValueError(
                f"UNet: the condition must have the entries {sorted(wanted)}, "
                f"but has {sorted(given)}"
            )
        if condition:
            label, name = condition["label"], "class_embedding"
            if self.class_embed_type == "timestep":
                label = layers.TimestepEmbedding(features, name=name)(project(label))
            elif self.class_embed_type is None:
                label = nn.Embed(self.num_class_embeds or 0, features, name=name)(label)
            embedding = embedding + label.astype(jnp.float32)
        names = self.added_embeddings
        extra = layers.AddedEmbeddings(
            names, features, self.num_half_waves, name="added_embeddings"
        )
        return embedding + extra(added)

    def _time_projection(self) -> Callable[[Array], Array]:
        """What maps ``[B]`` times to the features that ``time_embedding`` takes."""
        width, name = self.block_out_channels[0], "time_proj"
        if self.time_embedding_type == "fourier":
            return layers.GaussianFourierProjection(width, name=name)
        if self.time_embedding_type == "learned":
            table = nn.Embed(self.num_train_timesteps or 0, width, name=name)
            return lambda time: table(jnp.round(time).astype(jnp.int32))
        return lambda time: layers.timestep_embedding(
            time,
            width,
            flip_sin_to_cos=self.flip_sin_to_cos,
            downscale_freq_shift=self.freq_shift,
        )

    def _run_blocks(self, x: Array, embedding: Array, deterministic: bool) -> Array:
        """From the first convolution to the last block."""
        settings = LayerSettings(
            num_groups=self.norm_num_groups,
            attention_groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            activation=self.act_fn,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
            head_dim=self.attention_head_dim,
            dropout=self.dropout,
            deterministic=deterministic,
            dtype=self.dtype,
            attention_implementation=self.attention_implementation,
        )
        attention = functools.partial(Attention, settings)
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        down = [
            Level(
                features=widths[i],
                num_layers=self.layers_per_block,
                attention=attention if "Attn" in name else None,
                resampling=_resampling(name, self.downsample_type, i == last),
            )
            for i, name in enumerate(self.down_block_types)
        ]
        up = [
            Level(
                features=widths[last - i],
                num_layers=self.layers_per_block + 1,
                attention=attention if "Attn" in name else None,
                resampling=_resampling(name, self.upsample_type, i == last),
            )
            for i, name in enumerate(self.up_block_types)
        ]
        mid = None
        if self.mid_block_type is not None:
            groups = None if settings.scale_shift else self.norm_num_groups
            of_mid = dataclasses.replace(
                settings,
                attention_groups=self.attn_norm_num_groups or groups,
                output_scale_factor=self.mid_block_scale_factor,
            )
            attend = functools.partial(Attention, of_mid)
            mid = (attend if self.add_attention else None, of_mid)
        return run_blocks(
            x,
            embedding,
            down=down,
            mid=mid,
            up=up,
            padding=self.downsample_padding,
            settings=settings,
            remat=self.remat,
        )


def _resampling(block: str, chosen: Resampling, is_last: bool) -> Resampling | None:
    """How a block changes the size; only those with attention follow the config."""
    own = "resnet" if "Resnet" in block else chosen if "Attn" in block else "conv"
    return None if is_last else own


def _check(unet: UNet) -> None:
    """Refuses fields with which the network would not be diffusers', or not run."""

    def refuse(field: str, value: object, wanted: str) -> NoReturn:
        raise ValueError(f"UNet: {field}={value!r} is not supported; use {wanted}")

    for field, choices in CHOICES.items():
        value = getattr(unet, field)
        for choice in value if isinstance(value, tuple) else (value,):
            if choice not in choices:
                refuse(field, choice, " or ".join(map(repr, choices)))
    for field in COUNTS + COUNTS_OR_NONE:
        value, optional = getattr(unet, field), field in COUNTS_OR_NONE
        accepted = value > 0 if isinstance(value, int) else optional and value is None
        if not accepted:
            refuse(field, value, "a positive integer" + " or None" * optional)
    if unet.time_embedding_type == "learned" and unet.num_train_timesteps is None:
        refuse("num_train_timesteps", None, "a number, as the times are learned")
    widths = unet.block_out_channels
    for field in ("down_block_types", "up_block_types"):
        if len(getattr(unet, field)) != len(widths):
            refuse(field, getattr(unet, field), f"one for each width of {widths}")
    for field, normed in {"norm": widths, "attn_norm": widths[-1:]}.items():
        groups = getattr(unet, f"{field}_num_groups")
        if math.gcd(*normed) % (groups or 1):
            refuse(f"{field}_num_groups", groups, f"a divisor of all of {normed}")
