"""Progressive distillation: two steps of the teacher become one, again and again.

Salimans and Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, arXiv
2202.00512. The student is a denoiser ``x_theta(x_t, t)``, of the teacher's own kind, at
home at the points of a grid of ``N`` steps from ``t_max`` to 0. Its teacher ``f`` makes
``2 N``. From real data ``x_0`` and a point ``t`` of the student's grid,

    x_t = alpha_t x_0 + sigma_t eps,

two DDIM steps of the teacher go from ``t`` by way of the point between to ``s``, one
step of the student's grid below. One DDIM step from ``x_t`` to the same ``x_s`` is one
with the estimate (their algorithm 2)

    target = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t),
    L = E w || x_theta(x_t, t) - SG[target] ||^2,   w = max(SNR(t), 1).         (1)

``w`` is their truncated SNR weight: the squared error of the image where it is larger
than that of the noise, and the latter elsewhere.

Then the student is the teacher of the next *stage*, whose student starts from it and
makes ``N / 2`` steps, down to one. This module is the loss of one stage, the one in
which the teacher makes ``objective.teacher_steps``; `boot_jax.stages` runs them all.
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
from boot_jax.solvers import add_noise, ddim_step


def progressive_loss(
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
    student_denoise: Denoiser,
    images: Array,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one stage, eq. (1).

    Arguments and results as in `boot_jax.objectives.boot`, but for

    Args:
      teacher_params, denoise: of this stage's teacher.
      t: ``[B]``, points of the student's grid above 0; see `draw_times`.
      signal: not called.
      objective: its ``teacher_steps`` are those of this stage's teacher.
      target_params: None; there is no target network.
      student_denoise: the student as a denoiser, of `boot_jax.student.Student`.
      images: ``[B, H, W, C]``, real ones in [-1, 1], of the conditions.
    """
    del signal, target_params
    steps = grid_steps(objective)
    index = grid_index(objective, t, steps)
    half = grid_time(objective, 2 * index - 1, 2 * steps)
    s = grid_time(objective, index - 1, steps)
    x_t = add_noise(schedule, images, eps, t)
    x_s, start = x_t, t
    for end in (half, s):
        x_s = ddim_step(
            lambda x_t, t: denoise(teacher_params, x_t, t, condition),
            schedule,
            x_s,
            start,
            end,
        )
        start = end
    ratio = schedule.sigma(s) / schedule.sigma(t)
    gain = schedule.alpha(s) - ratio * schedule.alpha(t)
    target = (x_s - expand(ratio, x_t) * x_t) / expand(gain, x_t)
    x_0 = student_denoise(params, x_t, t, condition)
    weight = jnp.maximum(jnp.exp(schedule.log_snr(t)), 1.0)
    distance = adaptive_distance(objective, x_0, stop_gradient(target))
    loss = jnp.mean(weight * distance)
    return loss, {"loss/progressive": loss}
