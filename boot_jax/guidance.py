"""Classifier-free guidance, as a wrapper of a denoiser.

    f~ = f(x, t, null) + w (f(x, t, c) - f(x, t, null))                         (1)

(Ho and Salimans, arXiv 2207.12598, in the convention where ``w = 1`` is no guidance:
the ``guidance_scale`` of diffusers and the "CFG scale" of most tools; the ``w`` of the
paper itself, where 0 is none, is one less).
Guiding ``x_0`` or the network's own prediction is the same thing, since they differ by
an affine map that both halves share.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.prediction import expand, from_x_0, to_x_0
from boot_jax.schedules import NoiseSchedule

#: ``denoise(params, x_t, t, condition) -> x_0``: the contract of a teacher.
Denoiser = Callable[[Any, Array, Array, Any], Array]

#: Where a condition carries the guidance scale that a student is told.
SCALE_KEY = "guidance_scale"

#: Where a condition carries that of the unconditional half: of a negative prompt.
NEGATIVE_KEY = "negative"


def guide(
    denoise: Denoiser,
    null_condition: Any,
    guidance_scale: float | None = None,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: Callable[[Array, Array, Array, Array], Array] | None = None,
) -> Denoiser:
    """Wraps a denoiser with eq. (1); both halves run as **one** batch of ``2B``.

    Args:
      denoise: ``(params, x_t, t, condition) -> x_0``.
      null_condition: the condition of the unconditional half, or a negative prompt: a
        dict like the condition, leaves of leading size 1 or ``B``; or `NEGATIVE_KEY`,
        to read it from ``condition["negative"]``.
      guidance_scale: ``w``; None to read it from ``condition["guidance_scale"] [B]``.
      interval: times between which it guides; ``w`` is 1 at all others (Kynkaanniemi et
        al., arXiv 2404.07724).
      rescale: ``(guided x_0, conditional x_0, x_t, t) -> x_0``, as of `rescaling`.

    Returns:
      A denoiser whose condition may carry ``guidance_scale`` and ``negative``; the
      wrapped one never sees those keys.
    """
    low, high = interval

    def guided(params: Any, x_t: Array, t: Array, condition: Any) -> Array:
        given = of_student(condition)
        given.pop(SCALE_KEY, None)
        negative = null_condition
        if isinstance(negative, str):
            negative = condition[negative]
        if guidance_scale is None:
            scale = condition[SCALE_KEY]
        else:
            scale = jnp.full(t.shape, guidance_scale, x_t.dtype)
        if interval != (0.0, 1.0):
            scale = jnp.where((low <= t) & (t <= high), scale, 1.0)
        null = jax.tree.map(
            lambda leaf, like: jnp.broadcast_to(leaf, like.shape), negative, given
        )
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), null, given)
        x_0 = denoise(params, jnp.concatenate([x_t, x_t]), jnp.tile(t, 2), both)
        without, with_condition = jnp.split(x_0, 2)
        x_0 = without + expand(scale, x_t) * (with_condition - without)
        return x_0 if rescale is None else rescale(x_0, with_condition, x_t, t)

    return guided


def of_student(condition: Any) -> Any:
    """A condition without what only the teacher is shown: the negative half."""
    if condition is None:
        return None
    return {name: leaf for name, leaf in condition.items() if name != NEGATIVE_KEY}


def rescaling(
    prediction_type: str, schedule: NoiseSchedule, factor: float
) -> Callable[[Array, Array, Array, Array], Array]:
    """Holds the contrast of what is guided (Lin et al., arXiv 2305.08891, section 3.4).

    What the network would have predicted is scaled, image by image, to the standard
    deviation that it has without guidance; ``factor`` mixes that with what it was.

    Args:
      prediction_type: of the network, in whose terms the deviation is taken.
      schedule: gives ``alpha`` and ``sigma``.
      factor: ``phi``, 0 (nothing) to 1.

    Returns:
      What `guide` takes as ``rescale``.
    """

    def rescale(x_0: Array, with_condition: Array, x_t: Array, t: Array) -> Array:
        alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
        alpha, sigma = expand(alpha_t, x_t), expand(sigma_t, x_t)

        def output(x_0: Array) -> Array:
            eps = (x_t - alpha * x_0) / sigma
            return from_x_0(prediction_type, x_0, eps, alpha_t, sigma_t)

        axes = tuple(range(1, x_t.ndim))
        guided, conditional = output(x_0), output(with_condition)
        # As in diffusers: torch's deviation divides by one less than the count.
        ratio = jnp.std(conditional, axes, ddof=1, keepdims=True) / jnp.std(
            guided, axes, ddof=1, keepdims=True
        )
        guided = guided * (factor * ratio + (1 - factor))
        return to_x_0(prediction_type, guided, x_t, alpha_t, sigma_t)

    return rescale


def draw_guidance_scale(
    key: Array, batch_size: int, w_min: float, w_max: float
) -> Array:
    """``[batch_size]`` scales, uniform in ``[w_min, w_max]``."""
    return jax.random.uniform(key, (batch_size,), minval=w_min, maxval=w_max)
