"""Consistency distillation: two points of one trajectory must lead to the same end.

Song et al., *Consistency Models*, arXiv 2303.01469, algorithm 2. On a grid of
``teacher_steps`` steps from ``t_max`` to ``t_min``, from real data ``x_0`` and a point
``t`` above another, ``s``,

    x_t = alpha_t x_0 + sigma_t eps,     x_s = one step of the teacher from x_t to s,
    L = E || G(x_t, t) - SG[G(x_s, s)] ||^2                                     (1)

(distance and weight 1 as in the paper). ``SG[G]`` is of the student itself, or of its
moving average (``target_network``), as in the paper.

**The consistency function** must end a trajectory at ``t_min`` where it begins,
``G(x, t_min) = x``. The paper gets this from ``G = c_skip x + c_out F`` with
``c_skip = 1`` and ``c_out = 0`` at ``t_min``. Here ``G`` is the DDIM step of the
student's denoiser ``D`` from ``t`` to ``t_min = r``, which is of that form:

    G(x, t) = (sigma_r / sigma_t) x + (alpha_r - alpha_t sigma_r / sigma_t) D(x, t)  (2)

(the form of consistency trajectory models, Kim et al., arXiv 2310.02279). The condition
holds exactly, in floating point too, for any network, schedule and prediction type; a
student started from its teacher starts as the teacher's one DDIM step; and the signal
of ``G`` at ``t_max``, where ``alpha = 0``, is ``D`` itself: what a student without a
target time gives.

With the exact ``G`` the loss is what the teacher's step misses, squared: it falls as
``h^4`` in the step ``h`` for ``ddim`` and ``h^6`` for ``heun``.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from boot_jax.guidance import Denoiser
from boot_jax.objectives.base import (
    Objective,
    Signal,
    adaptive_distance,
    grid_index,
    grid_steps,
    grid_time,
)
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import add_noise, ddim_step, heun_step


def consistency_function(
    denoise: Denoiser, schedule: NoiseSchedule, t_min: float
) -> Denoiser:
    """``G`` of eq. (2), ``(params, x_t, t, condition) -> x`` at ``t_min``."""

    def consistency(params: Any, x_t: Array, t: Array, condition: Any) -> Array:
        end = jnp.full_like(t, t_min)
        ratio = schedule.sigma(end) / schedule.sigma(t)
        gain = schedule.alpha(end) - ratio * schedule.alpha(t)
        # What a compiler knows of a constant it may round otherwise than a variable.
        is_end = t <= end
        ratio, gain = jnp.where(is_end, 1.0, ratio), jnp.where(is_end, 0.0, gain)
        x_0 = denoise(params, x_t, t, condition)
        return expand(ratio, x_t) * x_t + expand(gain, x_0) * x_0

    return consistency


def consistency_loss(
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
    student_denoise: Denoiser,
    images: Array,
) -> tuple[Array, dict[str, Array]]:
    """The consistency loss, eq. (1).

    Arguments and results as in `boot_jax.objectives.boot`, but for

    Args:
      t: ``[B]``, points of the grid above ``t_min``; see `draw_times`.
      signal: not called.
      student_denoise: ``D``, the student as a denoiser, of `boot_jax.student.Student`.
      images: ``[B, H, W, C]``, real ones in [-1, 1], of the conditions.
    """
    del signal
    steps = grid_steps(objective)
    s = grid_time(objective, grid_index(objective, t, steps) - 1, steps)
    x_t = add_noise(schedule, images, eps, t)
    step = {"ddim": ddim_step, "heun": heun_step}[objective.solver]
    x_s = stop_gradient(
        step(
            lambda x_t, t: denoise(teacher_params, x_t, t, condition),
            schedule,
            x_t,
            t,
            s,
        )
    )
    consistency = consistency_function(student_denoise, schedule, objective.t_min)
    source = params if target_params is None else target_params
    target = stop_gradient(consistency(source, x_s, s, condition))
    end = consistency(params, x_t, t, condition)
    loss = jnp.mean(adaptive_distance(objective, end, target))
    return loss, {"loss/consistency": loss}
