"""Physics-informed distillation: the signal's ODE as a residual to be made small.

Tee et al., *Physics Informed Distillation for Diffusion Models*, TMLR 2024, arXiv
2411.08378. Eq. (2) of `boot_jax.objectives`, over ``dlambda / dt``, is an equation that
the student must satisfy at every time, as a physics-informed network does:

    L = E || y - (dt / dlambda) dy / dt - SG[f(x_t, t)] ||^2,   y = y_theta(eps, t)  (1)
    x_t = alpha_t y + sigma_t eps.

In the paper, ``alpha = 1``, ``sigma = t`` and the student gives ``x = y + t eps``; the
residual is ``x - t dx/dt - f``, and ``eps`` cancels from it: that is eq. (1).

**Where the gradient goes.** Through ``y`` and through its derivative: this is what sets
eq. (1) apart from the continuous-time loss, which has the same zeros and holds the
derivative fixed. The teacher's estimate is held fixed: the authors' code
(github.com/pantheon5100/pid_diffusion) runs the teacher without gradients.

**The derivative** is exact (``jvp``), or as in the paper a difference to one other time
(``finite_difference``): the next lower one, ``t - delta``, or where there is none the
next higher. The paper takes both from 250 points of Karras' grid; here ``t`` is uniform
in ``[t_min, t_max]``.

**The boundary.** The paper writes ``x = (t / t_max) z + (1 - t / t_max) F`` with the
noise ``z`` at ``t_max``, which makes ``y(t_max) = 0``, near the mean of the data. Here
it is the boundary loss of `boot_jax.objectives`, which eq. (1) contains where
``alpha(t_max) = 0``.
"""

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


def pid_loss(
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
    target_params: None = None,
) -> tuple[Array, dict[str, Array]]:
    """The residual of eq. (1), and the boundary loss.

    Arguments and results as in `boot_jax.objectives.boot`, but for ``t [B]`` in
    ``[t_min, t_max]``, and ``target_params``: there is no target network.
    """
    del target_params

    def along_time(t: Array) -> Array:
        return signal(params, eps, t, condition)

    if objective.derivative == "jvp":
        y_t, slope = jax.jvp(along_time, (t,), (jnp.ones_like(t),))
    else:
        y_t = along_time(t)
        above = jnp.minimum(t + objective.delta, objective.t_max)
        below = t - objective.delta
        other = jnp.where(below < objective.t_min, above, below)
        rise = y_t - along_time(other)
        slope = rise / expand(t - other, rise)
    x_t = add_noise(schedule, stop_gradient(y_t), eps, t)
    x_0 = stop_gradient(denoise(teacher_params, x_t, t, condition))
    implied = y_t - expand(schedule.dt_dlambda(t), slope) * slope
    loss = jnp.mean(adaptive_distance(objective, implied, x_0))
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
    # As in continuous time; the pull on the derivative is left out.
    residual = residual_metrics(objective, implied, x_0, jnp.ones_like(t))
    return total, metrics | residual
