"""Layers that the networks share: embeddings first, then the UNet's building stones.

Networks take images as ``[B, H, W, C]`` and give their last layer in float32, because
an epsilon teacher's output is divided by ``alpha`` near ``t_max`` (0.068 for Stable
Diffusion), which turns rounding into noise. Embeddings of scalars stay in float32 too:
they are small, and a student's derivative in its target time passes through them.

The submodules carry the names of PyTorch diffusers, a list's index after an underscore
(``attentions.0.to_out.0`` is ``attentions_0/to_out_0``).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models.attention import AttentionImplementation, dot_product_attention

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}

#: What a block keeps for its backward pass: everything, or what the policy of that name
#: in `jax.checkpoint_policies` says; the rest is computed again.
REMAT_POLICIES = (
    "none",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "nothing_saveable",
)


def rematerialised(block: Any, policy: str) -> Any:
    """A module class that trades time for memory in its backward pass.

    Args:
      block: a Linen module class.
      policy: one of `REMAT_POLICIES`.

    Raises:
      ValueError: the policy is not known.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat is {policy!r}; choose one of {REMAT_POLICIES}")
    if policy == "none":
        return block
    return nn.remat(block, policy=getattr(jax.checkpoint_policies, policy))


def timestep_embedding(
    time: Array,
    dim: int,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1.0,
    max_period: float = 10_000.0,
) -> Array:
    """Sinusoidal embedding of a network's time input.

    Args:
      time: ``[B]`` float, in the network's own units (0 to 1000 for most).
      dim: number of features; an odd one is padded with a zero.
      flip_sin_to_cos: cosines first.
      downscale_freq_shift: 1 reaches ``1 / max_period`` exactly, 0 stops short of it.
      max_period: the longest wave, over ``2 pi``.

    Returns:
      ``[B, dim]`` float32.

    The conventions are those of ``get_timestep_embedding`` in diffusers.
    """
    half = dim // 2
    exponent = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32)
    frequencies = jnp.exp(exponent / (half - downscale_freq_shift))
    angles = time.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


class AddedEmbedding(nn.Module):
    """Embeds one more scalar, to be **added** to a time embedding; zero at the start.

    Fourier features of low frequency (``k pi`` for ``k = 1 ... num_half_waves``) and a
    two-layer perceptron whose last layer starts at zero. The signal is smooth in the
    target time; higher waves make a finite difference noisy and a JVP unstable.
    """

    features: int
    num_half_waves: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, value: Array) -> Array:
        """Maps ``value [B]``, about 0 to 1, to ``[B, features]``."""
        value = value.astype(jnp.float32)[:, None]
        waves = jnp.pi * jnp.arange(1, self.num_half_waves + 1, dtype=jnp.float32)
        angles = value * waves[None, :]
        parts = jnp.concatenate([value, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        hidden = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(parts)
        return nn.Dense(
            self.features,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros_init(),
            name="linear_2",
        )(nn.silu(hidden))


class AddedEmbeddings(nn.Module):
    """The sum of one `AddedEmbedding` for each name; zeros when there is none.

    A student differs from its teacher by these names alone: ``"target_time"`` and,
    where it is conditioned on it, ``"guidance_scale"``.
    """

    names: tuple[str, ...]
    features: int
    num_half_waves: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, added: dict[str, Array] | None) -> Array | float:
        """Maps ``{name: [B]}`` to ``[B, features]``.

        Raises:
          ValueError: the given names are not the ones of this network.
        """
        given = set(added or {})
        if given != set(self.names):
            raise ValueError(
                f"this network adds embeddings of {sorted(self.names)}, "
                f"but was given {sorted(given)}"
            )
        total: Array | float = 0.0
        for name in self.names:
            total = total + AddedEmbedding(
                self.features, self.num_half_waves, self.dtype, name=name
            )((added or {})[name])
        return total


class TimestepEmbedding(nn.Module):
    """Two linear layers around an activation, in float32, as in diffusers."""

    features: int
    activation: str = "silu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``x [B, K]`` to ``[B, features]``."""
        hidden = nn.Dense(self.features, name="linear_1")(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        return nn.Dense(self.features, name="linear_2")(hidden)


class GaussianFourierProjection(nn.Module):
    """Fourier features of a noise level's logarithm, at random frequencies.

    The frequencies are a parameter, so that they are saved and loaded, but no gradient
    reaches them. Source: Song et al., arXiv 2011.13456; diffusers' layer of that name.
    """

    features: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, time: Array) -> Array:
        """Maps ``time [B]``, above 0, to ``[B, 2 * features]`` float32."""
        init = nn.initializers.normal(self.scale)
        weight = jax.lax.stop_gradient(self.param("weight", init, (self.features,)))
        log_time = jnp.log(time.astype(jnp.float32))
        angles = log_time[:, None] * weight[None, :] * (2 * jnp.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What all ResNet blocks and attentions of one network share.

    Attributes:
      num_groups: groups of a ResNet block's GroupNorms.
      attention_groups: groups of an attention's GroupNorm; None leaves it out.
      epsilon: added to the variance in every GroupNorm.
      activation: a name in `ACTIVATIONS`.
      scale_shift: the time embedding scales and shifts instead of being added.
      head_dim: channels of one attention head; None is a single head.
      dropout: rate within ResNet blocks, where ``deterministic`` is False.
      deterministic: no dropout.
      output_scale_factor: divides the sum of a shortcut and its branch.
      dtype: what convolutions and matrix products compute in.
      attention_implementation: see `boot_jax.models.attention`.
    """

    num_groups: int = 32
    attention_groups: int | None = 32
    epsilon: float = 1e-5
    activation: str = "silu"
    scale_shift: bool = False
    head_dim: int | None = 8
    dropout: float = 0.0
    deterministic: bool = True
    output_scale_factor: float = 1.0
    dtype: DTypeLike = jnp.float32
    attention_implementation: AttentionImplementation | None = None


def group_norm(
    x: Array, num_groups: int, epsilon: float, dtype: DTypeLike, *, name: str
) -> Array:
    """GroupNorm in float32, a submodule ``name`` of the module that calls it.

    The variance is taken about the mean: ``E[x^2] - E[x]^2`` loses digits where the
    mean is large.
    """
    norm = nn.GroupNorm(num_groups, epsilon=epsilon, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


def conv_3x3(
    features: int,
    dtype: DTypeLike,
    precision: jax.lax.Precision | None = None,
    *,
    name: str,
) -> nn.Conv:
    """A 3x3 convolution that keeps the image's size."""
    return nn.Conv(
        features, (3, 3), padding=1, dtype=dtype, precision=precision, name=name
    )


def upsample_nearest(x: Array) -> Array:
    """Doubles height and width: ``[B, H, W, C]`` to ``[B, 2H, 2W, C]``."""
    batch, height, width, channels = x.shape
    pixels = x[:, :, None, :, None, :]
    pixels = jnp.broadcast_to(pixels, (batch, height, 2, width, 2, channels))
    return pixels.reshape(batch, 2 * height, 2 * width, channels)


def downsample_mean(x: Array) -> Array:
    """Means of 2x2 pixels: ``[B, H, W, C]`` to ``[B, H / 2, W / 2, C]``."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2; padding 0 means one row and column at the end."""

    padding: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, H / 2, W / 2, C]``."""
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=(2, 2),
            padding=(side, side),
            dtype=self.dtype,
            name="conv",
        )(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, 2H, 2W, C]``."""
        return conv_3x3(x.shape[-1], self.dtype, name="conv")(upsample_nearest(x))


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut, with the time embedding in between.

    ``ResnetBlock2D`` of diffusers; ``resample`` changes the size before the first
    convolution, on both ways. Without a time embedding, as in an autoencoder, there is
    nothing in between.
    """

    features: int
    settings: LayerSettings
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, time_embedding: Array | None) -> Array:
        """Maps ``x [B, H, W, C]`` and ``time_embedding [B, E]`` to ``features``."""
        settings = self.settings
        dtype = settings.dtype
        activation = ACTIVATIONS[settings.activation]
        norm = functools.partial(
            group_norm,
            num_groups=settings.num_groups,
            epsilon=settings.epsilon,
            dtype=dtype,
        )
        hidden = activation(norm(x, name="norm1"))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = conv_3x3(self.features, dtype, name="conv1")(hidden)
        if time_embedding is None:
            hidden = norm(hidden, name="norm2")
        else:
            width = self.features * (2 if settings.scale_shift else 1)
            project = nn.Dense(width, dtype=dtype, name="time_emb_proj")
            time = project(activation(time_embedding))[:, None, None, :]
            if settings.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                hidden = norm(hidden, name="norm2") * (1 + scale) + shift
            else:
                hidden = norm(hidden + time, name="norm2")
        hidden = nn.Dropout(settings.dropout)(
            activation(hidden), deterministic=settings.deterministic
        )
        hidden = conv_3x3(self.features, dtype, name="conv2")(hidden)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=dtype, name="conv_shortcut")(x)
        return (x + hidden) / settings.output_scale_factor


class Attention(nn.Module):
    """Self-attention over an image's pixels, with its own norm and shortcut.

    ``Attention`` of diffusers as its ``UNet2DModel`` uses it: as many whole heads as
    the channels hold.
    """

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[B, H, W, C]`` to the same shape."""
        batch, height, width, channels = x.shape
        settings = self.settings
        dtype = settings.dtype
        head_dim = settings.head_dim or channels
        heads = channels // head_dim
        if heads == 0:
            raise ValueError(
                f"attention_head_dim={head_dim} is more than the {channels} channels "
                "that the attention has; use at most as many"
            )
        hidden = x
        if settings.attention_groups is not None:
            groups = settings.attention_groups
            hidden = group_norm(x, groups, settings.epsilon, dtype, name="group_norm")
        hidden = hidden.reshape(batch, height * width, channels)
        query, key, value = (
            nn.Dense(heads * head_dim, dtype=dtype, name=name)(hidden).reshape(
                batch, height * width, heads, head_dim
            )
            for name in ("to_q", "to_k", "to_v")
        )
        attended = dot_product_attention(
            query, key, value, settings.attention_implementation
        )
        attended = attended.reshape(batch, height * width, heads * head_dim)
        out = nn.Dense(channels, dtype=dtype, name="to_out_0")(attended)
        return (x + out.reshape(x.shape)) / settings.output_scale_factor
