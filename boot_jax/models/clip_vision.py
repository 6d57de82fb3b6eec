"""The image encoder of CLIP, equal to transformers' ``CLIPVisionModelWithProjection``.

A vision transformer whose first token, of the class, is projected to the space that
texts are projected to (see `boot_jax.models.clip`).

Source: Radford et al., *Learning Transferable Visual Models From Natural Language
Supervision*, arXiv 2103.00020; Dosovitskiy et al., arXiv 2010.11929.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models.attention import AttentionImplementation
from boot_jax.models.clip import ACTIVATIONS, Encoder, Layer
from boot_jax.models.from_config import read_fields
from boot_jax.models.text_layers import layer_norm

COUNTS = ("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers")
COUNTS += ("num_attention_heads", "num_channels", "image_size", "patch_size")

#: What `CLIPVisionEncoder.from_config` reads.
FIELDS = (*COUNTS, "hidden_act", "layer_norm_eps")

#: Paths of what old files hold though nothing needs it: the numbers 0, 1, 2, ...
UNUSED = ("vision_model/embeddings/position_ids",)


class VisionEncoding(NamedTuple):
    """What `CLIPVisionEncoder` makes of ``B`` images of ``P`` patches, in float32.

    Attributes:
      last_hidden_state: ``[B, 1 + P, hidden_size]``, behind the last layer.
      pooled: ``[B, hidden_size]``, its first token after the final norm.
      image_embeds: ``[B, projection_dim]``, that projected.
    """

    last_hidden_state: Array
    pooled: Array
    image_embeds: Array


class PatchEmbeddings(nn.Module):
    """A token of the class and one for each patch, with their positions."""

    features: int
    patch_size: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, 1 + P, features]`` float32."""
        sides = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.features, sides, sides, "VALID", use_bias=False, name="patch_embedding"
        )(images)
        batch = len(images)
        tokens = patches.reshape(batch, -1, self.features)
        initial = nn.initializers.normal(0.02)
        first = self.param("class_embedding", initial, (self.features,))
        first = jnp.broadcast_to(first, (batch, 1, self.features))
        tokens = jnp.concatenate([first, tokens], axis=1)
        count = tokens.shape[1]
        place = nn.Embed(count, self.features, name="position_embedding")
        return tokens + place(jnp.arange(count))[None]


class VisionTransformer(nn.Module):
    """All of `CLIPVisionEncoder` but the projection."""

    features: int
    patch_size: int
    num_layers: int
    make_layer: functools.partial[Layer]
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Maps ``[B, H, W, C]`` to ``last_hidden_state`` and ``pooled``."""
        embed = PatchEmbeddings(self.features, self.patch_size, name="embeddings")
        # The name is misspelt in every published file.
        x = layer_norm(embed(images), self.epsilon, self.dtype, name="pre_layrnorm")
        last, _ = Encoder(self.num_layers, self.make_layer, name="encoder")(x)
        last = last.astype(jnp.float32)
        pooled = layer_norm(
            last[:, 0], self.epsilon, jnp.float32, name="post_layernorm"
        )
        return last, pooled


class CLIPVisionEncoder(nn.Module):
    """Maps images to vectors that compare with those of texts by their cosine.

    The fields are transformers' ``CLIPVisionConfig``'s, with its defaults. ``dtype`` is
    what the layers compute in, but for norms, softmax and embeddings; parameters are
    float32. ``attention_implementation``: see `boot_jax.models.layers.LayerSettings`.

    Raises:
      ValueError: an unsupported value, naming the field and the supported ones.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], **overrides: Any
    ) -> "CLIPVisionEncoder":
        """Builds the encoder that transformers' ``config.json`` describes.

        Fields of training, of which old configs are full, are ignored.

        Raises:
          ValueError: another model's config, or an unsupported value.
        """
        if config.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise ValueError(
                f"CLIPVisionEncoder: model_type={config['model_type']!r} is not "
                "supported; use the config of a 'clip_vision_model'"
            )
        given = {k: config[k] for k in FIELDS if config.get(k) is not None}
        return cls(**read_fields(cls, given, overrides))

    def __post_init__(self) -> None:
        for field in COUNTS:
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"CLIPVisionEncoder: {field}={value!r} is not supported; use a "
                    "positive integer"
                )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"CLIPVisionEncoder: hidden_act={self.hidden_act!r} is not supported; "
                f"use {' or '.join(map(repr, ACTIVATIONS))}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPVisionEncoder: num_attention_heads={self.num_attention_heads} is "
                f"not supported; use a divisor of hidden_size={self.hidden_size}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array) -> VisionEncoding:
        """Encodes images.

        Args:
          images: ``[B, image_size, image_size, num_channels]`` float32, normalised.

        Raises:
          ValueError: images of another shape.
        """
        shape = (self.image_size, self.image_size, self.num_channels)
        if images.shape[1:] != shape:
            raise ValueError(
                f"CLIPVisionEncoder: images are {images.shape[1:]}, not {shape}"
            )
        make_layer = functools.partial(
            Layer,
            self.num_attention_heads,
            False,
            self.intermediate_size,
            self.hidden_act,
            self.layer_norm_eps,
            self.attention_implementation,
            self.dtype,
        )
        last, pooled = VisionTransformer(
            self.hidden_size,
            self.patch_size,
            self.num_hidden_layers,
            make_layer,
            self.layer_norm_eps,
            self.dtype,
            name="vision_model",
        )(images)
        project = nn.Dense(
            self.projection_dim, use_bias=False, name="visual_projection"
        )
        return VisionEncoding(last, pooled, project(pooled))
