"""Starting below ``t_max``: the same equations, from any point of a trajectory.

A trajectory is known from any of its points. From ``x_u`` at time ``u`` write, with
``n = x_u / sigma_u`` and ``kappa_t = 1 - exp(lambda_t - lambda_u)``,

    x_t = alpha_t kappa_t y_t + sigma_t n.                                      (1)

This is a DDIM step from ``u`` to ``t`` whose estimate of the data is ``y_t``: the
signal *as seen from* ``x_u``. The probability-flow ODE, ``d(x / sigma) = f d(alpha /
sigma)``, holds for ``kappa alpha / sigma = alpha / sigma - alpha_u / sigma_u`` as well,
which differs from ``alpha / sigma`` by a constant. So ``y`` obeys the Signal-ODE of
`boot_jax.objectives` with ``alpha`` replaced by ``kappa alpha`` (`StartedSchedule`):

    dy / dlambda' = y - f(x_t, t),     lambda' = lambda - log kappa.            (2)

Where ``alpha_u = 0``, as at ``t_max`` of most schedules, ``kappa = 1`` and nothing
changes. At ``t = u``, ``lambda'`` is infinite: there ``y_u = f(x_u, u)``, the boundary
condition, which a student of the teacher's own weights and time input meets before it
is trained.

The points to start from are the student's own, ``x_u = alpha_u y_theta(eps, u) +
sigma_u eps``: no data is needed. A student that can start anywhere can be used in a few
steps: see `boot_jax.sampling.few_steps`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from boot_jax.guidance import Denoiser
from boot_jax.objectives.base import Objective, draw_times, lowest_time, with_boundary
from boot_jax.objectives.boot import boot_loss
from boot_jax.objectives.continuous import continuous_loss
from boot_jax.objectives.pid import pid_loss
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import add_noise, step_fraction

#: ``jump(params, x_u, u, t, condition) -> y_t``, the signal as seen from ``x_u``.
Jump = Callable[[Any, Array, Array, Array, Any], Array]

#: What happens between the steps of a student: see `boot_jax.sampling.few_steps`.
RENOISE = ("fresh", "along")

#: The losses that it extends.
LOSSES = {"boot": boot_loss, "continuous": continuous_loss, "pid": pid_loss}


@dataclasses.dataclass(frozen=True)
class StartedSchedule(NoiseSchedule):
    """A schedule as seen from points at times ``u [B]``, eq. (2); for times below.

    Attributes:
      base: the schedule.
      u: ``[B]``; where it is ``t_max``, the schedule is as it was.
      t_max: of the starting noise.
    """

    base: NoiseSchedule
    u: Array
    t_max: float

    def _kappa(self, t: Array) -> Array:
        kappa = step_fraction(self.base, self.u, t)
        return jnp.where(self.u < self.t_max, kappa, jnp.ones_like(kappa))

    def alpha(self, t: Array) -> Array:
        """``kappa alpha``."""
        return self._kappa(t) * self.base.alpha(t)

    def sigma(self, t: Array) -> Array:
        """As it was."""
        return self.base.sigma(t)

    def dt_dlambda(self, t: Array) -> Array:
        """``kappa dt / dlambda``, since ``dkappa / dlambda = kappa - 1``."""
        return self._kappa(t) * self.base.dt_dlambda(t)

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """From ``exp(-lambda) = exp(-lambda') + exp(-lambda_u)``."""
        below = jnp.logaddexp(-lambda_t, -self.base.lambda_(self.u))
        return self.base.t_from_lambda(jnp.where(self.u < self.t_max, -below, lambda_t))


def draw_starts(
    objective: Objective, key: Array, batch_size: int, progress: Array | float = 0.0
) -> tuple[Array, Array]:
    """Starting times ``u`` and target times ``t`` of a batch, ``[batch_size]`` each.

    The former are uniform in ``objective.start_times``, the latter are those of
    `draw_times`. See `choose_starts`.
    """
    start_key, time_key = jax.random.split(key)
    low, high = objective.start_times
    u = low + (high - low) * jax.random.uniform(start_key, (batch_size,))
    return u, draw_times(objective, time_key, batch_size, progress)


def choose_starts(objective: Objective, u: Array, t: Array) -> tuple[Array, Array]:
    """Leaves every ``objective.start_stride``-th start where it is; others are noise.

    Args:
      objective: for the share that starts below, and ``t_max`` of the noise.
      u: ``[B]``, starting times.
      t: ``[B]``, target times below ``t_max``.

    Returns:
      Both ``[B]``; target times are squeezed below their start.
    """
    starts = jnp.arange(u.shape[0]) % objective.start_stride == 0
    lowest = lowest_time(objective)
    squeezed = lowest + (t - lowest) * (u - lowest) / (objective.t_max - lowest)
    return jnp.where(starts, u, objective.t_max), jnp.where(starts, squeezed, t)


def started_loss(
    params: Any,
    teacher_params: Any,
    eps: Array,
    u: Array,
    t: Array,
    condition: Any,
    *,
    jump: Jump,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
    target_params: Any = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch, part of which starts below: of kinds with a target time.

    Args:
      params: the student's; the only argument that the gradient reaches.
      teacher_params: the teacher's.
      eps: ``[B, H, W, C]`` standard normal.
      u: ``[B]``; every ``objective.start_stride``-th may lie below ``t_max``.
      t: ``[B]``, at most ``u``; see `choose_starts`.
      condition: a pytree with leading size ``B``, or None.
      jump: the student; its signal is ``jump`` from the noise at ``t_max``.
      denoise: the teacher, guided and thresholded as its sampler does it.
      schedule: the teacher's.
      objective: the choices.
      target_params: parameters of the target network; None for the student's own.

    Returns:
      The loss, and ``{"loss/trajectory", "loss/boundary"}``, all scalars.
    """
    stride = objective.start_stride

    def signal(params: Any, eps: Array, t: Array, condition: Any) -> Array:
        t_max = jnp.full(t.shape, objective.t_max, t.dtype)
        x_t = expand(schedule.prior_scale(t_max), eps) * eps
        return jump(params, x_t, t_max, t, condition)

    def some(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[::stride], tree)

    y_u = stop_gradient(signal(params, some(eps), some(u), some(condition)))
    x_u = add_noise(schedule, y_u, some(eps), some(u))
    noise = _replace_every(stride, eps, x_u / expand(schedule.sigma(some(u)), x_u))
    scale = jnp.where(u < objective.t_max, schedule.sigma(u), schedule.prior_scale(u))

    def from_starts(params: Any, noise: Array, t: Array, condition: Any) -> Array:
        return jump(params, expand(scale, noise) * noise, u, t, condition)

    loss, told = LOSSES[objective.kind](
        params,
        teacher_params,
        noise,
        t,
        condition,
        signal=from_starts,
        denoise=denoise,
        schedule=StartedSchedule(schedule, u, objective.t_max),
        objective=dataclasses.replace(objective, boundary_weight=0.0),
        target_params=target_params,
    )
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
    return total, told | metrics


def _replace_every(stride: int, all_of: Array, some: Array) -> Array:
    """Rows ``0, stride, ...`` of ``all_of [B, ...]`` replaced, device by device."""
    rows = all_of.reshape(-1, stride, *all_of.shape[1:])
    return jnp.concatenate([some[:, None], rows[:, 1:]], axis=1).reshape(all_of.shape)
