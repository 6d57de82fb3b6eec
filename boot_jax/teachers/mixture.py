"""The exact teacher: a Gaussian mixture, whose denoiser has a closed form.

With data ``sum_k w_k N(m_k, s_k^2 I)``, the noisy image of eq. (1) in
`boot_jax.schedules` is again a mixture, of ``N(alpha m_k, v_k I)`` with
``v_k = alpha^2 s_k^2 + sigma^2``, so that

    E[x_0 | x_t] = sum_k p_k(x_t) (m_k + (alpha s_k^2 / v_k) (x_t - alpha m_k)),
    p_k(x_t)  proportional to  w_k N(x_t; alpha m_k, v_k I).

Its trajectories are known to any accuracy, which makes it the judge of everything else.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.guidance import Denoiser
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.teachers.base import Teacher


def mixture_denoiser(schedule: NoiseSchedule) -> Denoiser:
    """The posterior mean in closed form, of the parameters of `gaussian_mixture`.

    A condition ``{"label": [B]}`` picks a row of the weights; None is the last row.
    """

    def denoise(params: Any, x_t: Array, t: Array, condition: Any) -> Array:
        means, variances = params["means"], params["scales"] ** 2
        alpha = schedule.alpha(t)[:, None]
        variance = alpha**2 * variances[None] + schedule.sigma(t)[:, None] ** 2
        axes = tuple(range(2, means.ndim + 1))
        offset = x_t[:, None] - expand(alpha, x_t[:, None]) * means[None]
        label = -1 if condition is None else condition["label"]
        log_weights = jnp.atleast_2d(params["log_weights"][label])
        log_p = log_weights - jnp.sum(offset**2, axis=axes) / (2 * variance)
        log_p = log_p - means[0].size / 2 * jnp.log(variance)
        gain = alpha * variances[None] / variance
        component = means[None] + expand(gain, offset) * offset
        posterior = jax.nn.softmax(log_p, axis=-1)
        return jnp.sum(expand(posterior, component) * component, axis=1)

    return denoise


def gaussian_mixture(
    means: Any,
    scales: Any,
    schedule: NoiseSchedule,
    *,
    weights: Any = None,
    labels: Sequence[int] | None = None,
) -> Teacher:
    """A teacher that is exact.

    Args:
      means: ``[K, H, W, C]``.
      scales: ``[K]``, standard deviations, positive.
      schedule: any.
      weights: ``[K]``, positive; equal when not given.
      labels: the class of each component; makes the teacher class-conditional, its null
        label (the number of classes) meaning the whole mixture.

    Returns:
      A `Teacher` without a network.
    """
    means = jnp.asarray(means)
    scales = jnp.asarray(scales, means.dtype)
    log_weights = np.log(np.ones(len(means)) if weights is None else weights)[None]
    num_classes = None
    if labels is not None:
        num_classes = max(labels) + 1
        member = np.asarray(labels)[None] == np.arange(num_classes)[:, None]
        of_class = np.where(member, log_weights, -np.inf)
        log_weights = np.concatenate([of_class, log_weights])
    height, width, channels = means.shape[1:]
    return Teacher(
        denoise=mixture_denoiser(schedule),
        params={
            "means": means,
            "scales": scales,
            "log_weights": jnp.asarray(log_weights, means.dtype),
        },
        schedule=schedule,
        sample_shape=(height, width, channels),
        num_classes=num_classes,
    )


def sample_mixture(teacher: Teacher, key: Array, num: int) -> Array:
    """``[num, H, W, C]`` exact samples of a mixture teacher's data."""
    component_key, noise_key = jax.random.split(key)
    params = teacher.params
    component = jax.random.categorical(
        component_key, params["log_weights"][-1], shape=(num,)
    )
    means = params["means"][component]
    noise = jax.random.normal(noise_key, means.shape, means.dtype)
    return means + expand(params["scales"][component], noise) * noise
