"""Classifier-free guidance, as a wrapper of a denoiser.

    f~ = f(x, t, null) + w (f(x, t, c) - f(x, t, null))                         (1)

(Ho and Salimans, arXiv 2207.12598, in the convention where ``w = 1`` is no guidance).
Guiding ``x_0`` or the network's own prediction is the same thing, since they differ by
an affine map that both halves share.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.prediction import expand

#: ``denoise(params, x_t, t, condition) -> x_0``: the contract of a teacher.
Denoiser = Callable[[Any, Array, Array, Any], Array]

#: Where a condition carries the guidance scale that a student is told.
SCALE_KEY = "guidance_scale"


def guide(
    denoise: Denoiser, null_condition: Any, guidance_scale: float | None = None
) -> Denoiser:
    """Wraps a denoiser with eq. (1); both halves run as **one** batch of ``2B``.

    Args:
      denoise: ``(params, x_t, t, condition) -> x_0``.
      null_condition: the condition of the unconditional half, or a negative prompt: a
        dict like the condition, its leaves of leading size 1 or ``B``.
      guidance_scale: ``w``; None to read it from ``condition["guidance_scale"] [B]``.

    Returns:
      A denoiser whose condition may carry ``guidance_scale``; the wrapped one never
      sees that key.
    """

    def guided(params: Any, x_t: Array, t: Array, condition: Any) -> Array:
        given = {key: leaf for key, leaf in condition.items() if key != SCALE_KEY}
        if guidance_scale is None:
            scale = expand(condition[SCALE_KEY], x_t)
        else:
            scale = jnp.asarray(guidance_scale, x_t.dtype)
        null = jax.tree.map(
            lambda leaf, like: jnp.broadcast_to(leaf, like.shape), null_condition, given
        )
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), null, given)
        x_0 = denoise(params, jnp.concatenate([x_t, x_t]), jnp.tile(t, 2), both)
        without, with_condition = jnp.split(x_0, 2)
        return without + scale * (with_condition - without)

    return guided


def draw_guidance_scale(
    key: Array, batch_size: int, w_min: float, w_max: float
) -> Array:
    """``[batch_size]`` scales, uniform in ``[w_min, w_max]``."""
    return jax.random.uniform(key, (batch_size,), minval=w_min, maxval=w_max)
