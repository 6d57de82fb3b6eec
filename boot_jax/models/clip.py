"""The text encoder of CLIP, equal to transformers' ``CLIPTextModel``.

And, with ``projection_dim``, to ``CLIPTextModelWithProjection``. Stable Diffusion reads
the last hidden states; SDXL the last but one, which no norm has seen, and of its second
encoder also the projected ``text_embeds``.

Source: Radford et al., *Learning Transferable Visual Models From Natural Language
Supervision*, arXiv 2103.00020.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models.attention import AttentionImplementation, dot_product_attention
from boot_jax.models.from_config import read_fields
from boot_jax.models.text_layers import layer_norm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "projection_dim")
COUNTS += ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")

#: What `CLIPTextEncoder.from_config` reads.
FIELDS = (*COUNTS, "hidden_act", "layer_norm_eps", "eos_token_id")

#: Paths of what old files hold though nothing needs it: the numbers 0, 1, 2, ...
UNUSED = ("text_model/embeddings/position_ids",)

# Until transformers corrected it, configs said 2; the token is then the largest id.
_LEGACY_EOS = 2


class TextEncoding(NamedTuple):
    """What `CLIPTextEncoder` makes of ``B`` texts of ``L`` tokens, in float32.

    Attributes:
      last_hidden_state: ``[B, L, hidden_size]``, after the final norm.
      penultimate: ``[B, L, hidden_size]``, ahead of the last layer and of any norm.
      pooled: ``[B, hidden_size]``, the last hidden state at the end of the text.
      text_embeds: ``[B, projection_dim]``, that projected; None without a projection.
    """

    last_hidden_state: Array
    penultimate: Array
    pooled: Array
    text_embeds: Array | None


class Embeddings(nn.Module):
    """The sum of a table's row for each token and one for each position."""

    vocab_size: int
    max_positions: int
    features: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps ``[B, L] int32`` to ``[B, L, features]`` float32."""
        table = functools.partial(nn.Embed, features=self.features, dtype=jnp.float32)
        embed = table(self.vocab_size, name="token_embedding")
        place = table(self.max_positions, name="position_embedding")
        return embed(tokens) + place(jnp.arange(tokens.shape[1]))[None]


class Attention(nn.Module):
    """Self-attention of each token to all, or (causal) to itself and those before."""

    num_heads: int
    is_causal: bool
    implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, L, D]`` to the same shape."""
        batch, length, dim = x.shape
        heads = (batch, length, self.num_heads, dim // self.num_heads)
        query, key, value = (
            nn.Dense(dim, dtype=self.dtype, name=name)(x).reshape(heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = dot_product_attention(
            query, key, value, self.implementation, is_causal=self.is_causal
        )
        out = nn.Dense(dim, dtype=self.dtype, name="out_proj")
        return out(attended.reshape(x.shape))


class Perceptron(nn.Module):
    """Two linear layers around an activation."""

    features: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, L, D]`` to the same shape."""
        hidden = nn.Dense(self.features, dtype=self.dtype, name="fc1")(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class Layer(nn.Module):
    """Attention and a perceptron, each behind its norm."""

    num_heads: int
    is_causal: bool
    intermediate_size: int
    activation: str
    epsilon: float
    implementation: AttentionImplementation | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, L, D]`` to the same shape."""
        dtype = self.dtype
        attend = Attention(
            self.num_heads, self.is_causal, self.implementation, dtype, name="self_attn"
        )
        x = x + attend(layer_norm(x, self.epsilon, dtype, name="layer_norm1"))
        h = layer_norm(x, self.epsilon, dtype, name="layer_norm2")
        mlp = Perceptron(self.intermediate_size, self.activation, dtype, name="mlp")
        return x + mlp(h)


class Encoder(nn.Module):
    """Layers, which ``make_layer`` makes of their names."""

    num_layers: int
    make_layer: Callable[..., Layer]

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Maps ``[B, L, D]`` to what leaves the last layer, and what enters it."""
        entering = x
        for i in range(self.num_layers):
            entering, x = x, self.make_layer(name=f"layers_{i}")(x)
        return x, entering


class TextTransformer(nn.Module):
    """All of `CLIPTextEncoder` but pooling and projection."""

    make_embeddings: Callable[..., Embeddings]
    make_encoder: Callable[..., Encoder]
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        """Maps ``[B, L] int32`` to ``last_hidden_state`` and ``penultimate``."""
        x = self.make_embeddings(name="embeddings")(tokens).astype(self.dtype)
        last, penultimate = self.make_encoder(name="encoder")(x)
        last = layer_norm(last, self.epsilon, jnp.float32, name="final_layer_norm")
        return last, penultimate.astype(jnp.float32)


class CLIPTextEncoder(nn.Module):
    """Maps tokens to the hidden states and the pooled vector of their texts.

    The fields up to ``eos_token_id`` are transformers' ``CLIPTextConfig``'s, with its
    defaults. ``with_projection`` adds ``CLIPTextModelWithProjection``'s last layer.
    ``dtype`` is what the layers compute in, but for norms, softmax and embeddings;
    parameters are float32. ``attention_implementation``: see
    `boot_jax.models.layers.LayerSettings`.

    Raises:
      ValueError: an unsupported value, naming the field and the supported ones.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False
    dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], **overrides: Any
    ) -> "CLIPTextEncoder":
        """Builds the encoder that transformers' ``config.json`` describes.

        It has a projection if the config's ``architectures`` name the class that does.
        Fields of training and of generation, of which old configs are full, are
        ignored.

        Raises:
          ValueError: another model's config, or an unsupported value.
        """
        if config.get("model_type", "clip_text_model") != "clip_text_model":
            raise ValueError(
                f"CLIPTextEncoder: model_type={config['model_type']!r} is not "
                "supported; use the config of a 'clip_text_model'"
            )
        if config.get("use_attention_mask"):
            raise ValueError(
                "CLIPTextEncoder: use_attention_mask=True is not supported; use False"
            )
        given = {k: config[k] for k in FIELDS if config.get(k) is not None}
        classes = config.get("architectures") or []
        given["with_projection"] = any("WithProjection" in name for name in classes)
        return cls(**read_fields(cls, given, overrides))

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: Array) -> TextEncoding:
        """Encodes texts.

        Args:
          tokens: ``[B, L] int32``, ``L`` at most ``max_position_embeddings``.

        Raises:
          ValueError: there are more tokens than positions.
        """
        if tokens.shape[1] > self.max_position_embeddings:
            raise ValueError(
                f"CLIPTextEncoder: a text has {tokens.shape[1]} tokens; at most "
                f"max_position_embeddings={self.max_position_embeddings} fit"
            )
        last, penultimate = self._transformer()(tokens)
        if self.eos_token_id == _LEGACY_EOS:
            ends = tokens.argmax(-1)
        else:
            ends = (tokens == self.eos_token_id).argmax(-1)
        pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
        text_embeds = None
        if self.with_projection:
            project = nn.Dense(
                self.projection_dim,
                use_bias=False,
                dtype=jnp.float32,
                name="text_projection",
            )
            text_embeds = project(pooled)
        return TextEncoding(last, penultimate, pooled, text_embeds)

    def _transformer(self) -> TextTransformer:
        make_embeddings = functools.partial(
            Embeddings,
            self.vocab_size,
            self.max_position_embeddings,
            self.hidden_size,
        )
        make_layer = functools.partial(
            Layer,
            self.num_attention_heads,
            True,
            self.intermediate_size,
            self.hidden_act,
            self.layer_norm_eps,
            self.attention_implementation,
            self.dtype,
        )
        return TextTransformer(
            make_embeddings,
            functools.partial(Encoder, self.num_hidden_layers, make_layer),
            self.layer_norm_eps,
            self.dtype,
            name="text_model",
        )


def _check(encoder: CLIPTextEncoder) -> None:
    """Refuses fields with which the network would not be CLIP's, or not run."""

    def refuse(field: str, wanted: str) -> NoReturn:
        value = getattr(encoder, field)
        raise ValueError(
            f"CLIPTextEncoder: {field}={value!r} is not supported; use {wanted}"
        )

    for field in COUNTS:
        value = getattr(encoder, field)
        if not isinstance(value, int) or value < 1:
            refuse(field, "a positive integer")
    if encoder.hidden_act not in ACTIVATIONS:
        refuse("hidden_act", " or ".join(map(repr, ACTIVATIONS)))
    if encoder.hidden_size % encoder.num_attention_heads:
        refuse("num_attention_heads", f"a divisor of hidden_size={encoder.hidden_size}")
    if not isinstance(encoder.eos_token_id, int):
        refuse("eos_token_id", "the id of the token that ends a text")
    if encoder.attention_implementation not in (None, "xla", "cudnn"):
        refuse("attention_implementation", "None, 'xla' or 'cudnn'")
