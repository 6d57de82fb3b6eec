"""Transformer layers of networks that read texts, as in PyTorch diffusers.

Their norms are taken in float32. The GELU is the exact one, and the GroupNorm ahead of
a transformer adds 1e-6 to the variance, as in PyTorch; diffusers' Flax classes take the
tanh approximation and 1e-5.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models import layers
from boot_jax.models.attention import AttentionImplementation, dot_product_attention


def layer_norm(x: Array, epsilon: float, dtype: DTypeLike, *, name: str) -> Array:
    """LayerNorm in float32, a submodule ``name`` of the module that calls it."""
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


class CrossAttention(nn.Module):
    """Attention of tokens to a context; only its last layer has a bias."""

    num_heads: int
    implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Maps ``x [B, N, D]``, reading ``context [B, M, _]``, to ``[B, N, D]``."""
        dim = x.shape[-1]
        heads = (self.num_heads, dim // self.num_heads)

        def project(name: str, source: Array) -> Array:
            dense = nn.Dense(dim, use_bias=False, dtype=self.dtype, name=name)
            return dense(source).reshape(*source.shape[:2], *heads)

        query, key, value = (
            project(name, source)
            for name, source in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        attended = dot_product_attention(query, key, value, self.implementation)
        return nn.Dense(dim, dtype=self.dtype, name="to_out_0")(
            attended.reshape(x.shape)
        )


class GEGLU(nn.Module):
    """A linear layer, one half of which gates the other through a GELU."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, N, D]`` to ``[B, N, features]``."""
        projected = nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
        hidden, gate = jnp.split(projected, 2, axis=-1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The perceptron of a block, four times as wide within."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, N, D]`` to the same shape."""
        dim = x.shape[-1]
        hidden = GEGLU(4 * dim, self.dtype, name="net_0")(x)
        return nn.Dense(dim, dtype=self.dtype, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and a perceptron.

    ``BasicTransformerBlock`` of diffusers.
    """

    num_heads: int
    implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Maps ``x [B, N, D]``, reading ``context [B, M, _]``, to ``[B, N, D]``."""

        def attention(name: str) -> CrossAttention:
            return CrossAttention(
                self.num_heads, self.implementation, self.dtype, name=name
            )

        h = layer_norm(x, 1e-5, self.dtype, name="norm1")
        x = x + attention("attn1")(h, h)
        h = layer_norm(x, 1e-5, self.dtype, name="norm2")
        x = x + attention("attn2")(h, context)
        h = layer_norm(x, 1e-5, self.dtype, name="norm3")
        return x + FeedForward(self.dtype, name="ff")(h)


class PixelTransformer(nn.Module):
    """Transformer blocks over an image's pixels, with their own norm and shortcut.

    ``Transformer2DModel`` of diffusers as its ``UNet2DConditionModel`` uses it.

    Attributes:
      num_heads: attention heads; they divide the channels.
      num_layers: transformer blocks.
      linear_projection: linear layers around the blocks, not 1x1 convolutions.
      settings: of the UNet.
    """

    num_heads: int
    num_layers: int
    linear_projection: bool
    settings: layers.LayerSettings

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Maps ``x [B, H, W, C]``, reading ``context [B, M, _]``, to the same shape."""
        batch, height, width, channels = x.shape
        settings, dtype = self.settings, self.settings.dtype
        pixels = (batch, height * width, channels)

        def projection(name: str) -> Callable[[Array], Array]:
            if self.linear_projection:
                return nn.Dense(channels, dtype=dtype, name=name)
            return nn.Conv(channels, (1, 1), dtype=dtype, name=name)

        h = layers.group_norm(x, settings.num_groups, 1e-6, dtype, name="norm")
        h = projection("proj_in")(h).reshape(pixels)
        for i in range(self.num_layers):
            h = TransformerBlock(
                self.num_heads,
                settings.attention_implementation,
                dtype,
                name=f"transformer_blocks_{i}",
            )(h, context)
        return x + projection("proj_out")(h.reshape(x.shape))
