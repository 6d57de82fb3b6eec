"""Direct distillation: regression on where the teacher's own sampler ends.

Luhman and Luhman, *Knowledge Distillation in Iterative Generative Models for Improved
Sampling Speed*, arXiv 2101.02388. With ``S(eps)`` the teacher's sample in
``teacher_steps`` steps from ``t_max`` to 0, `boot_jax.solvers.sample_ode`,

    L = E || y_theta(eps, t_min) - SG[S(eps)] ||^2.                             (1)

A squared error is least at the conditional mean; ``S`` is a function of ``eps``, so the
exact minimum is ``S`` itself. It costs a whole sampling of the teacher for each noise,
unless pairs are made once and stored (``objective.stored_samples``), which the student
may then come to know by heart.

As in the paper the student is the teacher's network as it is, told its own time
``t_max``: no target time is needed, for there is one target only.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from boot_jax.guidance import Denoiser
from boot_jax.objectives.base import Objective, Signal, adaptive_distance
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import sample_ode, time_grid


def direct_loss(
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
    targets: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The regression loss, eq. (1).

    Arguments and results as in `boot_jax.objectives.boot`, but for ``t [B]``, all of
    which is ``t_min``, and

    Args:
      target_params: None; there is no target network.
      targets: ``[B, H, W, C]``, the teacher's samples of ``eps`` where they are known:
        the teacher is not called then. None to make them.
    """
    del target_params
    if targets is None:
        times = time_grid(
            objective.teacher_steps, objective.t_max, power=objective.grid_power
        )
        targets = sample_ode(
            lambda x_t, t: denoise(teacher_params, x_t, t, condition),
            schedule,
            eps,
            times,
            objective.solver,
        )
    y = signal(params, eps, t, condition)
    loss = jnp.mean(adaptive_distance(objective, y, stop_gradient(targets)))
    return loss, {"loss/regression": loss}
