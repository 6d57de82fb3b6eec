"""A diffusion transformer: patches, adaLN-zero, optional class labels or text.

After Peebles and Xie, *Scalable Diffusion Models with Transformers* (arXiv 2212.09748):
each block is modulated by the time (and class) embedding, its residuals are gated by
factors that start at zero, and so is the last layer, so that a new network is the zero
function.

The words of a text are tokens beside those of the image, in one self-attention (as in
Bao et al., *U-ViT*, arXiv 2209.12152), and their mean is in the embedding, too.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models.attention import AttentionImplementation, dot_product_attention
from boot_jax.models.layers import (
    AddedEmbeddings,
    rematerialised,
    timestep_embedding,
)

_ZEROS = nn.initializers.zeros_init()
_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)
_PADDING = 0  # the word id


def position_embedding(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed sine-cosine embedding of a grid: ``[height * width, dim]`` float32.

    A quarter of the features each for sine and cosine of the row and of the column.

    Raises:
      ValueError: ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"hidden_size is {dim}; a multiple of 4 is needed")
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = np.mgrid[:height, :width]
    angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Attention(nn.Module):
    """Self-attention over tokens ``[B, N, D]``."""

    num_heads: int
    implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, N, D]`` to ``[B, N, D]``."""
        batch, tokens, dim = x.shape
        heads = (batch, tokens, self.num_heads, dim // self.num_heads)
        q, k, v = (
            _dense(dim, name, self.dtype)(x).reshape(heads)
            for name in ("to_q", "to_k", "to_v")
        )
        attended = dot_product_attention(q, k, v, self.implementation)
        return _dense(dim, "to_out", self.dtype)(attended.reshape(batch, tokens, dim))


class DiTBlock(nn.Module):
    """Self-attention and a perceptron, both modulated and gated by the embedding."""

    num_heads: int
    mlp_ratio: float
    attention_implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        """Maps tokens ``[B, N, D]`` under ``embedding [B, D]``, after its silu."""
        dim = x.shape[-1]
        modulation = _dense(6 * dim, "modulation", self.dtype, _ZEROS)(embedding)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(
            modulation[:, None], 6, axis=-1
        )
        h = _norm("norm_1", self.dtype)(x) * (1 + scale_1) + shift_1
        attention = Attention(
            self.num_heads, self.attention_implementation, self.dtype, name="attention"
        )
        x = x + gate_1 * attention(h)
        h = _norm("norm_2", self.dtype)(x) * (1 + scale_2) + shift_2
        h = _dense(int(self.mlp_ratio * dim), "linear_1", self.dtype)(h)
        h = _dense(dim, "linear_2", self.dtype)(nn.gelu(h, approximate=True))
        return x + gate_2 * h


class DiT(nn.Module):
    """Diffusion transformer over ``[B, H, W, C]``.

    Attributes:
      out_channels: channels of the output, ``C``.
      patch_size: side of a patch; it divides the height and the width.
      hidden_size: width; a multiple of 4 and of ``num_heads``.
      num_layers: number of blocks.
      num_heads: attention heads.
      mlp_ratio: width of the perceptron over ``hidden_size``.
      num_classes: number of labels; label ``num_classes`` is the null one. None for an
        network without.
      vocab_size: number of word ids, of which 0 is padding; None for a network without
        text. A network has labels or text, not both.
      text_length: words in a row.
      added_embeddings: names of the scalars added to the time embedding: a student's.
      num_half_waves: of the added embeddings' Fourier features over [0, 1].
      attention_implementation: of `jax.nn.dot_product_attention`; None chooses.
      remat: what each block keeps for the backward pass, which recomputes the rest; one
        of `boot_jax.models.layers.REMAT_POLICIES`.
      dtype: of the computation; parameters and the last layer are float32.
    """

    out_channels: int
    patch_size: int = 2
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    vocab_size: int | None = None
    text_length: int = 0
    added_embeddings: tuple[str, ...] = ()
    num_half_waves: int = 2
    attention_implementation: AttentionImplementation | None = None
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def _embed(
        self,
        time: Array,
        condition: Any,
        text: Array | None,
        added: dict[str, Array] | None,
    ) -> Array:
        """The embedding ``[B, D]`` of everything but the image."""
        dim = self.hidden_size
        waves = timestep_embedding(
            time, 256, flip_sin_to_cos=True, downscale_freq_shift=0.0
        )
        h = nn.silu(_dense(dim, "time_linear_1", self.dtype, _NORMAL)(waves))
        embedding = _dense(dim, "time_linear_2", self.dtype, _NORMAL)(h)
        if self.num_classes is not None:
            embed = nn.Embed(
                self.num_classes + 1,
                dim,
                dtype=self.dtype,
                embedding_init=_NORMAL,
                name="label_embedding",
            )
            embedding = embedding + embed(condition["label"])
        if text is not None:
            word = (condition["tokens"] != _PADDING).astype(self.dtype)[..., None]
            mean = (text * word).sum(1) / jnp.maximum(word.sum(1), 1)
            embedding = embedding + _dense(dim, "text_linear", self.dtype)(mean)
        extra = AddedEmbeddings(
            self.added_embeddings,
            dim,
            self.num_half_waves,
            self.dtype,
            name="added_embeddings",
        )
        return embedding + extra(added)

    def _embed_text(self, condition: Any) -> Array:
        """The embedding ``[B, L, D]`` of each word; padding has one, too."""
        assert self.vocab_size is not None
        embed = nn.Embed(
            self.vocab_size,
            self.hidden_size,
            dtype=self.dtype,
            embedding_init=_NORMAL,
            name="text_embedding",
        )
        return embed(condition["tokens"])

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
          x: ``[B, H, W, C]`` float.
          time: ``[B]`` float, 0 to 1000.
          condition: ``{"label": [B] int32}`` with ``num_classes``, ``{"tokens": [B, L]
            int32}`` with ``vocab_size``; else not read.
          added: ``{name: [B]}`` for the names in ``added_embeddings``.

        Returns:
          ``[B, H, W, out_channels]`` float32.

        Raises:
          ValueError: the sizes do not divide, the wrong scalars were added, or the
            network is to have labels and text.
        """
        if self.num_classes is not None and self.vocab_size is not None:
            raise ValueError(
                "num_classes and vocab_size are both set: a dit has labels or text"
            )
        batch, height, width, channels = x.shape
        p = self.patch_size
        if height % p or width % p or self.hidden_size % self.num_heads:
            raise ValueError(
                f"patch_size {p} must divide the image's {height}x{width}, and "
                f"num_heads {self.num_heads} hidden_size {self.hidden_size}"
            )
        rows, columns = height // p, width // p
        patches = x.reshape(batch, rows, p, columns, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        tokens = _dense(self.hidden_size, "patch_embedding", self.dtype)(patches)
        position = position_embedding(rows, columns, self.hidden_size)
        tokens = tokens + jnp.asarray(position, tokens.dtype)[None]
        text = None if self.vocab_size is None else self._embed_text(condition)
        embedding = nn.silu(self._embed(time, condition, text, added))
        if text is not None:
            shape = (self.text_length, self.hidden_size)
            place = self.param("text_position", _NORMAL, shape)
            text = text + jnp.asarray(place, text.dtype)[None]
            tokens = jnp.concatenate([text, tokens], axis=1)
        block = rematerialised(DiTBlock, self.remat)
        for index in range(self.num_layers):
            tokens = block(
                self.num_heads,
                self.mlp_ratio,
                self.attention_implementation,
                self.dtype,
                name=f"block_{index}",
            )(tokens, embedding)
        tokens = tokens[:, -rows * columns :]  # those of the image
        modulation = _dense(2 * self.hidden_size, "modulation", self.dtype, _ZEROS)
        shift, scale = jnp.split(modulation(embedding)[:, None], 2, axis=-1)
        tokens = _norm("norm_out", self.dtype)(tokens) * (1 + scale) + shift
        last = _dense(p * p * self.out_channels, "linear_out", jnp.float32, _ZEROS)
        patches = last(tokens.astype(jnp.float32))
        patches = patches.reshape(batch, rows, columns, p, p, self.out_channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def _dense(features: int, name: str, dtype: DTypeLike, init: Any = _XAVIER) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def _norm(name: str, dtype: DTypeLike) -> Callable[[Array], Array]:
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, name=name)
    return lambda x: norm(x.astype(jnp.float32)).astype(dtype)
