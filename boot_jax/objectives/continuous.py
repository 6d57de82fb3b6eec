"""The loss in continuous time; derived in `boot_jax.objectives`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from boot_jax.guidance import Denoiser
from boot_jax.objectives.base import (
    Objective,
    Signal,
    adaptive_distance,
    residual_metrics,
    with_boundary,
)
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import add_noise


def continuous_loss(
    params: Any,
    teacher_params: Any,
    eps: Array,
    t: Array,
    condition: Any,
    *,
    signal: Signal,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
    target_params: Any = None,
) -> tuple[Array, dict[str, Array]]:
    """The continuous-time loss, eq. (5), and the boundary loss.

    Arguments and results as in `boot_jax.objectives.boot`, but for ``t [B]`` in
    ``[t_min, t_max]``.
    """
    source = params if target_params is None else target_params

    def along_time(t: Array) -> Array:
        return signal(source, eps, t, condition)

    if objective.derivative == "jvp":
        y_t, slope = jax.jvp(along_time, (t,), (jnp.ones_like(t),))
    else:
        y_t = along_time(t)
        before = jnp.maximum(t - objective.delta / 2, objective.t_min)
        after = jnp.minimum(t + objective.delta / 2, objective.t_max)
        rise = along_time(after) - along_time(before)
        slope = rise / expand(after - before, rise)
    x_t = add_noise(schedule, stop_gradient(y_t), eps, t)
    x_0 = denoise(teacher_params, x_t, t, condition)
    target = stop_gradient(x_0 + expand(schedule.dt_dlambda(t), slope) * slope)
    if target_params is not None:
        y_t = signal(params, eps, t, condition)
    loss = jnp.mean(adaptive_distance(objective, y_t, target))
    total, metrics = with_boundary(
        loss,
        params,
        teacher_params,
        eps,
        condition,
        signal,
        denoise,
        schedule,
        objective,
    )
    residual = residual_metrics(objective, y_t, target, jnp.ones_like(t))
    return total, metrics | residual
