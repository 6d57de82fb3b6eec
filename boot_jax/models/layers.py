"""Layers that the networks share: embeddings first, then the UNet's blocks.

Networks take images as ``[B, H, W, C]`` and give their last layer in float32, because
an epsilon teacher's output is divided by ``alpha`` near ``t_max`` (0.068 for Stable
Diffusion), which turns rounding into noise.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


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
        angles = value * jnp.pi * jnp.arange(1, self.num_half_waves + 1)[None, :]
        waves = jnp.concatenate([value, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        hidden = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(waves)
        return nn.Dense(
            self.features,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros_init(),
            name="linear_2",
        )(nn.silu(hidden))


class AddedEmbeddings(nn.Module):
    """The sum of one `AddedEmbedding` for each name; zeros when there is none.

    A student differs from its teacher by these names alone: ``"target_time"`` and, where
    it is conditioned on it, ``"guidance_scale"``.
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
