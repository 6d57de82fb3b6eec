"""The bootstrap loss of BOOT; derived in `boot_jax.objectives`."""

from typing import Any

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
from boot_jax.solvers import signal_target, step_fraction


def boot_loss(
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
    """The bootstrap and boundary losses, eq. (4).

    Args:
      params: the student's; the only argument that the gradient reaches.
      teacher_params: the teacher's.
      eps: ``[B, H, W, C]`` standard normal.
      t: ``[B]`` in ``[t_min + delta, t_max]``; see `draw_times`.
      condition: a pytree with leading size ``B``, or None.
      signal: the student.
      denoise: the teacher, guided and thresholded as its sampler does it.
      schedule: the teacher's.
      objective: the choices; its ``kind`` is not read here.
      target_params: parameters of the target network; None for the student's own.

    Returns:
      The loss, and ``{"loss/trajectory", "loss/boundary"}``, all scalars; where there
      is a correction, also ``correction/trajectory_residual``, what it is relative to.
    """
    s = jnp.maximum(t - objective.delta, objective.t_min)
    k = step_fraction(schedule, t, s)
    source = params if target_params is None else target_params
    y_t = stop_gradient(signal(source, eps, t, condition))

    def closed(x_t: Array, t: Array) -> Array:
        return denoise(teacher_params, x_t, t, condition)

    x_0 = signal_target(closed, schedule, objective.solver, y_t, eps, t, s)
    y_s = signal(params, eps, s, condition)
    implied = y_t + (y_s - y_t) / expand(k, y_s)
    weight = {
        "x0": jnp.ones_like(k),
        "dt": (k / objective.delta) ** 2,
        "uniform": k**2,
        "noisy_image": (schedule.alpha(s) * k) ** 2,
    }[objective.weighting]
    distance = adaptive_distance(objective, implied, stop_gradient(x_0))
    loss = jnp.mean(weight * distance)
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
    return total, metrics | residual_metrics(objective, implied, x_0, weight / k)
