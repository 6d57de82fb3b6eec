"""The UNet of Stable Diffusion, equal to PyTorch diffusers' ``UNet2DConditionModel``.

For the configs of Stable Diffusion 1.x, 2.x and XL and their like. As in
`boot_jax.models.unet`, the fields keep diffusers' names and defaults, and what this
network does not know is refused.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models import layers
from boot_jax.models.attention import AttentionImplementation
from boot_jax.models.from_config import read_fields
from boot_jax.models.text_layers import PixelTransformer
from boot_jax.models.unet_blocks import Level, check_images, last_layers, run_blocks

# The values that each field may have; a field of several has only these.
CHOICES: dict[str, tuple[str | int | None, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": (0, 1),
    "act_fn": tuple(layers.ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "addition_embed_type": (None, "text_time"),
    "attention_implementation": (None, "xla", "cudnn"),
}
COUNTS = ("in_channels", "out_channels", "norm_num_groups", "cross_attention_dim")
COUNTS_OR_NONE = ("time_embedding_dim", "addition_time_embed_dim")
COUNTS_OR_NONE += ("projection_class_embeddings_input_dim",)
COUNTS_A_LEVEL = ("layers_per_block", "attention_head_dim")
COUNTS_A_LEVEL += ("transformer_layers_per_block",)

# Other fields of ``UNet2DConditionModel``, at the values that leave the network plain.
_PLAIN: dict[str, Any] = {
    "only_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
# Logits are float32 anyway, and the others are of how diffusers' Flax class computes or
# of embeddings that are refused.
_IGNORED = ("upcast_attention", "use_memory_efficient_attention", "split_head_dim")
_IGNORED += ("addition_embed_type_num_heads",)


class TextUNet(nn.Module):
    """Maps a noisy image, a time and an encoded text to the network's prediction.

    The fields up to ``projection_class_embeddings_input_dim`` are those of diffusers'
    ``UNet2DConditionModel``; its ``attention_head_dim`` is the **number** of heads.
    ``layers_per_block``, ``attention_head_dim`` and ``transformer_layers_per_block``
    are one number or one for each level. The other fields are those of
    `boot_jax.models.unet.UNet`.

    Raises:
      ValueError: an unsupported value, naming the field and the supported ones.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    time_embedding_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    added_embeddings: tuple[str, ...] = ()
    num_half_waves: int = 2
    dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None
    remat: str = "none"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "TextUNet":
        """Builds the network that a diffusers ``config.json`` describes.

        As `boot_jax.models.unet.UNet.from_config`; a config of diffusers' Flax class is
        read too.
        """
        absent = object()
        given = {
            field: value
            for field, value in config.items()
            if field not in _IGNORED and _PLAIN.get(field, absent) != value
        }
        return cls(**read_fields(cls, given, overrides))

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @property
    def time_embed_dim(self) -> int:
        """Features of the time embedding, and of all that is added to it."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        condition: Mapping[str, Array] | None = None,
        added: dict[str, Array] | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Runs the network.

        Args:
          x: ``[B, H, W, in_channels]``; all levels but the last halve ``H`` and ``W``.
          time: ``[B]`` float, what diffusers calls timesteps.
          condition: ``{"text": [B, L, cross_attention_dim]}`` float; with ``text_time``
            also ``"pooled": [B, P]`` float and ``"time_ids": [B, 6]`` (sizes and crop
            in pixels).
          added: ``{name: [B]}`` for each of ``added_embeddings``.
          deterministic: no dropout; otherwise a "dropout" random stream is needed.

        Returns:
          ``[B, H, W, out_channels]`` float32.

        Raises:
          ValueError: an image, condition or added scalars that do not fit the network.
        """
        check_images("TextUNet", x, self.in_channels, len(self.block_out_channels))
        condition = self._checked(condition or {})
        embedding = self._embed(time, condition, added)
        x = 2 * x - 1 if self.center_input_sample else x
        text = condition["text"].astype(self.dtype)
        x = self._run_blocks(x.astype(self.dtype), embedding, text, deterministic)
        return last_layers(
            x, self.out_channels, self.norm_num_groups, self.norm_eps, self.act_fn
        )

    def _checked(self, condition: Mapping[str, Array]) -> Mapping[str, Array]:
        """The condition, if it has the entries and the width that are wanted."""
        wanted = {"text"}
        if self.addition_embed_type is not None:
            wanted |= {"pooled", "time_ids"}
        if set(condition) != wanted:
            raise ValueError(
                f"TextUNet: the condition must have the entries {sorted(wanted)}, "
                f"but has {sorted(condition)}"
            )
        width = condition["text"].shape[-1]
        if width != self.cross_attention_dim:
            raise ValueError(
                f"TextUNet: the text is {width} wide, but cross_attention_dim is "
                f"{self.cross_attention_dim}"
            )
        return condition

    def _embed(
        self,
        time: Array,
        condition: Mapping[str, Array],
        added: dict[str, Array] | None,
    ) -> Array:
        """The sum of all embeddings, ``[B, E]`` float32."""
        waves = functools.partial(
            layers.timestep_embedding,
            flip_sin_to_cos=self.flip_sin_to_cos,
            downscale_freq_shift=self.freq_shift,
        )
        features = self.time_embed_dim
        embed_time = layers.TimestepEmbedding(
            features, self.act_fn, name="time_embedding"
        )
        embedding = embed_time(waves(time, self.block_out_channels[0]))
        if self.addition_embed_type is not None:
            ids, dim = condition["time_ids"], self.addition_time_embed_dim or 0
            sizes = waves(ids.reshape(-1), dim)
            sizes = sizes.reshape(ids.shape[0], ids.shape[1] * dim)
            pooled = condition["pooled"].astype(jnp.float32)
            joined = jnp.concatenate([pooled, sizes], axis=-1)
            wanted = self.projection_class_embeddings_input_dim
            if joined.shape[-1] != wanted:
                raise ValueError(
                    f"TextUNet: pooled is {pooled.shape[-1]} wide and {ids.shape[-1]} "
                    f"time_ids have {dim} features each, but together they must be "
                    f"projection_class_embeddings_input_dim={wanted}"
                )
            embed_text = layers.TimestepEmbedding(features, name="add_embedding")
            embedding = embedding + embed_text(joined)
        names = self.added_embeddings
        extra = layers.AddedEmbeddings(
            names, features, self.num_half_waves, name="added_embeddings"
        )
        return embedding + extra(added)

    def _run_blocks(
        self, x: Array, embedding: Array, text: Array, deterministic: bool
    ) -> Array:
        """From the first convolution to the last block."""
        settings = layers.LayerSettings(
            num_groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            activation=self.act_fn,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
            dropout=self.dropout,
            deterministic=deterministic,
            dtype=self.dtype,
            attention_implementation=self.attention_implementation,
        )
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        counts = {field: self._a_level(field) for field in COUNTS_A_LEVEL}
        attentions = [
            functools.partial(
                PixelTransformer,
                counts["attention_head_dim"][i],
                counts["transformer_layers_per_block"][i],
                self.use_linear_projection,
                settings,
            )
            for i in range(len(widths))
        ]
        down, up = [], []
        for i, name in enumerate(self.down_block_types):
            level = Level(
                features=widths[i],
                num_layers=counts["layers_per_block"][i],
                attention=attentions[i] if "CrossAttn" in name else None,
                resampling=None if i == last else "conv",
            )
            down.append(level)
        for i, name in enumerate(self.up_block_types):
            level = Level(
                features=widths[last - i],
                num_layers=counts["layers_per_block"][last - i] + 1,
                attention=attentions[last - i] if "CrossAttn" in name else None,
                resampling=None if i == last else "conv",
            )
            up.append(level)
        mid = None
        if self.mid_block_type is not None:
            scale = self.mid_block_scale_factor
            of_mid = dataclasses.replace(settings, output_scale_factor=scale)
            mid = (attentions[last], of_mid)
        return run_blocks(
            x,
            embedding,
            text,
            down=down,
            mid=mid,
            up=up,
            padding=self.downsample_padding,
            settings=settings,
            remat=self.remat,
        )

    def _a_level(self, field: str) -> tuple[int, ...]:
        """A field's number for each level, from the highest resolution on."""
        value = getattr(self, field)
        one = isinstance(value, int)
        return (value,) * len(self.block_out_channels) if one else value


def _check(unet: TextUNet) -> None:
    """Refuses fields with which the network would not be diffusers', or not run."""

    def refuse(field: str, value: object, wanted: str) -> NoReturn:
        raise ValueError(f"TextUNet: {field}={value!r} is not supported; use {wanted}")

    def is_count(value: object) -> bool:
        return isinstance(value, int) and value > 0

    for field, choices in CHOICES.items():
        value = getattr(unet, field)
        for choice in value if isinstance(value, tuple) else (value,):
            if choice not in choices:
                refuse(field, choice, " or ".join(map(repr, choices)))
    for field in COUNTS + COUNTS_OR_NONE:
        value, optional = getattr(unet, field), field in COUNTS_OR_NONE
        if not (is_count(value) or (optional and value is None)):
            refuse(field, value, "a positive integer" + " or None" * optional)
    widths = unet.block_out_channels
    for field in COUNTS_A_LEVEL:
        value = getattr(unet, field)
        several = isinstance(value, tuple) and len(value) == len(widths)
        if not all(map(is_count, value if several else (value,))):
            refuse(field, value, f"a positive integer, or one for each of {widths}")
    for field in ("down_block_types", "up_block_types"):
        if len(getattr(unet, field)) != len(widths):
            refuse(field, getattr(unet, field), f"one for each width of {widths}")
    if math.gcd(*widths) % unet.norm_num_groups:
        groups = unet.norm_num_groups
        refuse("norm_num_groups", groups, f"a divisor of all of {widths}")
    heads = unet.attention_head_dim
    each = heads if isinstance(heads, tuple) else (heads,) * len(widths)
    if any(width % count for width, count in zip(widths, each, strict=True)):
        refuse("attention_head_dim", heads, f"numbers of heads that divide {widths}")
    if unet.addition_embed_type is not None:
        for field in ("addition_time_embed_dim", COUNTS_OR_NONE[-1]):
            if getattr(unet, field) is None:
                refuse(field, None, "a number, as addition_embed_type is 'text_time'")
