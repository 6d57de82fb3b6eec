"""The diffusion transformer of diffusers, equal to its ``DiTTransformer2DModel``.

The network of `boot_jax.models.dit` in the layout that published weights have: each
block embeds time and label on its own, the positions of columns come before those of
rows, and the modules are named so that `boot_jax.models.weights` finds them. With
``out_channels`` twice the image's the second half is a learned variance, which an ODE
has no use for.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models import layers
from boot_jax.models.attention import AttentionImplementation, dot_product_attention
from boot_jax.models.dit import position_embedding
from boot_jax.models.from_config import read_fields

#: The values that each field may have.
CHOICES: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate", "gelu"),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "attention_implementation": (None, "xla", "cudnn"),
}
COUNTS = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers")
COUNTS += ("sample_size", "patch_size", "num_embeds_ada_norm")

# Fields of the older ``Transformer2DModel``, at the values that leave a plain DiT.
_OLDER = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
}


class LabelEmbedding(nn.Module):
    """A row for each label, and a last one for none."""

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, label: Array) -> Array:
        """Maps ``[B] int32`` to ``[B, features]``."""
        rows = self.num_classes + 1
        return nn.Embed(rows, self.features, name="embedding_table")(label)


class LabelledTime(nn.Module):
    """The sum of the embeddings of time and label, in float32."""

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, waves: Array, label: Array) -> Array:
        """Maps ``waves [B, 256]`` and ``label [B]`` to ``[B, features]``."""
        embed_time = layers.TimestepEmbedding(self.features, name="timestep_embedder")
        embed = LabelEmbedding(self.num_classes, self.features, name="class_embedder")
        return embed_time(waves) + embed(label)


class Modulation(nn.Module):
    """A block's own embedding, and what it shifts, scales and gates by."""

    num_classes: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, waves: Array, label: Array, added: Array | float
    ) -> tuple[Array, list[Array]]:
        """Gives the embedding ``[B, D]`` and six modulations ``[B, 1, D]``."""
        embed = LabelledTime(self.num_classes, self.features, name="emb")
        embedding = embed(waves, label) + added
        project = nn.Dense(6 * self.features, dtype=self.dtype, name="linear")
        parts = jnp.split(project(nn.silu(embedding))[:, None], 6, axis=-1)
        return embedding, parts


class SelfAttention(nn.Module):
    """Attention among tokens ``[B, N, D]``; only the last layer always has a bias."""

    num_heads: int
    use_bias: bool
    implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, N, D]`` to the same shape."""
        batch, tokens, dim = x.shape
        heads = (batch, tokens, self.num_heads, dim // self.num_heads)
        query, key, value = (
            nn.Dense(dim, use_bias=self.use_bias, dtype=self.dtype, name=name)(
                x
            ).reshape(heads)
            for name in ("to_q", "to_k", "to_v")
        )
        h = dot_product_attention(query, key, value, self.implementation)
        return nn.Dense(dim, dtype=self.dtype, name="to_out_0")(h.reshape(x.shape))


class GELU(nn.Module):
    """A linear layer, then the activation; the first of the perceptron."""

    features: int
    approximate: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, N, D]`` to ``[B, N, features]``."""
        hidden = nn.Dense(self.features, dtype=self.dtype, name="proj")(x)
        return nn.gelu(hidden, approximate=self.approximate)


class FeedForward(nn.Module):
    """The perceptron of a block, four times as wide within."""

    approximate: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, N, D]`` to the same shape."""
        dim = x.shape[-1]
        hidden = GELU(4 * dim, self.approximate, self.dtype, name="net_0")(x)
        return nn.Dense(dim, dtype=self.dtype, name="net_2")(hidden)


class Block(nn.Module):
    """Attention and perceptron of one `Transformer`, modulated and gated."""

    num_heads: int
    num_classes: int
    attention_bias: bool
    approximate: bool
    epsilon: float
    attention_implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, waves: Array, label: Array, added: Array | float
    ) -> tuple[Array, Array]:
        """Maps tokens ``[B, N, D]``; gives them and the block's embedding."""
        dim, dtype = x.shape[-1], self.dtype
        modulate = Modulation(self.num_classes, dim, dtype, name="norm1")
        embedding, parts = modulate(waves, label, added)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        attention = SelfAttention(
            self.num_heads,
            self.attention_bias,
            self.attention_implementation,
            dtype,
            name="attn1",
        )
        x = x + gate_1 * attention(_norm(x, 1e-6, dtype) * (1 + scale_1) + shift_1)
        h = _norm(x, self.epsilon, dtype) * (1 + scale_2) + shift_2
        return x + gate_2 * FeedForward(self.approximate, dtype, name="ff")(
            h
        ), embedding


class Transformer(nn.Module):
    """Maps noisy images, a time and labels to the network's prediction.

    The fields up to ``norm_eps`` are those of diffusers' ``DiTTransformer2DModel``;
    ``dropout``, ``norm_num_groups`` and ``upcast_attention`` change nothing here. The
    label ``num_embeds_ada_norm`` is the null one. The others are those of
    `boot_jax.models.unet.UNet`.

    Raises:
      ValueError: an unsupported value, naming the field and the supported ones.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    added_embeddings: tuple[str, ...] = ()
    num_half_waves: int = 2
    dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None
    remat: str = "none"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "Transformer":
        """Builds the network that a diffusers ``config.json`` describes.

        As `boot_jax.models.unet.UNet.from_config`; a config of the older
        ``Transformer2DModel`` is read too.
        """
        plain = object()
        given = {k: v for k, v in config.items() if _OLDER.get(k, plain) != v}
        return cls(**read_fields(cls, given, overrides))

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        condition: Any = None,
        added: dict[str, Array] | None = None,
    ) -> Array:
        """Predicts for noisy images.

        Args:
          x: ``[B, H, W, C]`` float, ``H = W = sample_size``.
          time: ``[B]`` float, in training steps.
          condition: ``{"label": [B] int32}``.
          added: ``{name: [B]}`` for the names in ``added_embeddings``.

        Returns:
          ``[B, H, W, out_channels or C]`` float32.

        Raises:
          ValueError: the image is of another size, or the wrong scalars were added.
        """
        size, p = self.sample_size, self.patch_size
        dim = self.num_attention_heads * self.attention_head_dim
        if x.shape[1:] != (size, size, self.in_channels):
            raise ValueError(
                f"Transformer: images must be {size}x{size}x{self.in_channels}, but "
                f"are {'x'.join(map(str, x.shape[1:]))}"
            )
        rows = size // p
        tokens = PatchEmbedding(dim, p, self.dtype, name="pos_embed")(x)
        waves = layers.timestep_embedding(
            time, 256, flip_sin_to_cos=True, downscale_freq_shift=1.0
        )
        extra = layers.AddedEmbeddings(
            self.added_embeddings, dim, self.num_half_waves, name="added_embeddings"
        )(added)
        block = layers.rematerialised(Block, self.remat)
        embeddings = []
        for i in range(self.num_layers):
            tokens, embedding = block(
                num_heads=self.num_attention_heads,
                num_classes=self.num_embeds_ada_norm,
                attention_bias=self.attention_bias,
                approximate=self.activation_fn == "gelu-approximate",
                epsilon=self.norm_eps,
                attention_implementation=self.attention_implementation,
                dtype=self.dtype,
                name=f"transformer_blocks_{i}",
            )(tokens, waves, condition["label"], extra)
            embeddings.append(embedding)
        # The first block's embedding serves the last layer as well.
        modulate = nn.Dense(2 * dim, dtype=self.dtype, name="proj_out_1")
        parts = modulate(nn.silu(embeddings[0]))[:, None]
        shift, scale = jnp.split(parts, 2, axis=-1)
        tokens = _norm(tokens, 1e-6, self.dtype) * (1 + scale) + shift
        channels = self.out_channels or self.in_channels
        last = nn.Dense(p * p * channels, dtype=jnp.float32, name="proj_out_2")
        patches = last(tokens.astype(jnp.float32))
        patches = patches.reshape(-1, rows, rows, p, p, channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, channels)


class PatchEmbedding(nn.Module):
    """Tokens of an image's patches, with their place added."""

    features: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, N, features]``, row by row."""
        side = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.features, side, side, padding="VALID", dtype=self.dtype, name="proj"
        )(x)
        batch, rows, columns, dim = patches.shape
        # diffusers has the column's half first.
        position = np.roll(position_embedding(rows, columns, dim), dim // 2, axis=1)
        tokens = patches.reshape(batch, rows * columns, dim)
        return tokens + jnp.asarray(position, tokens.dtype)[None]


def _norm(x: Array, epsilon: float, dtype: DTypeLike) -> Array:
    """LayerNorm without parameters, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred / jnp.sqrt(variance + epsilon)).astype(dtype)


def _check(network: Transformer) -> None:
    """Refuses fields with which the network would not be diffusers', or not run."""

    def refuse(field: str, wanted: str) -> NoReturn:
        value = getattr(network, field)
        raise ValueError(
            f"Transformer: {field}={value!r} is not supported; use {wanted}"
        )

    for field, choices in CHOICES.items():
        if getattr(network, field) not in choices:
            refuse(field, " or ".join(map(repr, choices)))
    for field in COUNTS:
        value = getattr(network, field)
        if not isinstance(value, int) or value < 1:
            refuse(field, "a positive integer")
    if network.out_channels not in (None, *(n * network.in_channels for n in (1, 2))):
        refuse("out_channels", "in_channels, or twice that for a learned variance")
    if network.sample_size % network.patch_size:
        refuse("patch_size", f"a divisor of sample_size={network.sample_size}")
