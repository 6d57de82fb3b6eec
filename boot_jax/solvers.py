"""Steps along a teacher's probability-flow ODE, in image space and in signal space.

**Image space.** With the teacher frozen over a step, ``eps_hat = (x_t - alpha_t f) /
sigma_t`` and DDIM (Song et al., arXiv 2010.02502, eta = 0) is

    x_s = alpha_s f + sigma_s eps_hat.                                          (1)

**Signal space.** With ``y = (x - sigma eps) / alpha`` for the one noise ``eps`` at
which a trajectory starts, the same ODE loses its noise (method of BOOT, arXiv
2306.05544):

    dy / dlambda = y - f(alpha y + sigma eps, t),                               (2)
    y_s = y_t + k (f - y_t),     k = 1 - exp(lambda_s - lambda_t).              (3)

Eq. (3) is eq. (1) exactly. Heun's method evaluates the teacher again at the end of the
step and repeats it with the mean of both: second order in the step, in either space.

A *denoiser* here is a closed function ``x_0 = denoise(x_t, t)`` with ``t [B]``; bind
parameters and conditions with `functools.partial` or a lambda.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule

ClosedDenoiser = Callable[[Array, Array], Array]

SOLVERS = ("ddim", "heun")


def step_fraction(schedule: NoiseSchedule, t: Array, s: Array) -> Array:
    """``k`` of eq. (3): how far a step from ``t`` to ``s < t`` goes towards ``x_0``."""
    return -jnp.expm1(schedule.lambda_(s) - schedule.lambda_(t))


def add_noise(schedule: NoiseSchedule, y_t: Array, eps: Array, t: Array) -> Array:
    """``x_t = alpha_t y_t + sigma_t eps``: the image of a signal (or of clean data)."""
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    return expand(alpha_t, y_t) * y_t + expand(sigma_t, eps) * eps


def _ddim(schedule: NoiseSchedule, x_t: Array, x_0: Array, t: Array, s: Array) -> Array:
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    eps_hat = (x_t - expand(alpha_t, x_0) * x_0) / expand(sigma_t, x_t)
    return expand(alpha_s, x_0) * x_0 + expand(sigma_s, x_t) * eps_hat


def ddim_step(
    denoise: ClosedDenoiser, schedule: NoiseSchedule, x_t: Array, t: Array, s: Array
) -> Array:
    """One DDIM step in image space, eq. (1): ``x_t [B, ...]`` at ``t [B]`` to ``s``."""
    return _ddim(schedule, x_t, denoise(x_t, t), t, s)


def heun_step(
    denoise: ClosedDenoiser, schedule: NoiseSchedule, x_t: Array, t: Array, s: Array
) -> Array:
    """One Heun step in image space: two calls of the teacher."""
    x_0 = denoise(x_t, t)
    second = denoise(_ddim(schedule, x_t, x_0, t, s), s)
    return _ddim(schedule, x_t, (x_0 + second) / 2, t, s)


def signal_target(
    denoise: ClosedDenoiser,
    schedule: NoiseSchedule,
    solver: str,
    y_t: Array,
    eps: Array,
    t: Array,
    s: Array,
) -> Array:
    """Where a signal-space step goes: the ``f`` of eq. (3), ``[B, ...]``.

    For ``ddim`` the teacher's estimate at ``t``; for ``heun`` its mean with the
    estimate at the end of the DDIM step.

    Raises:
      ValueError: the solver is not known.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not known; choose one of {SOLVERS}")
    x_0 = denoise(add_noise(schedule, y_t, eps, t), t)
    if solver == "ddim":
        return x_0
    y_s = y_t + expand(step_fraction(schedule, t, s), y_t) * (x_0 - y_t)
    return (x_0 + denoise(add_noise(schedule, y_s, eps, s), s)) / 2


def signal_step(
    denoise: ClosedDenoiser,
    schedule: NoiseSchedule,
    solver: str,
    y_t: Array,
    eps: Array,
    t: Array,
    s: Array,
) -> Array:
    """One step of the signal, eq. (3), from ``y_t`` at ``t [B]`` to ``s [B]``."""
    target = signal_target(denoise, schedule, solver, y_t, eps, t, s)
    return y_t + expand(step_fraction(schedule, t, s), y_t) * (target - y_t)


def time_grid(
    num_steps: int, t_start: float = 1.0, t_end: float = 0.0, power: float = 1.0
) -> Array:
    """``[num_steps + 1]`` times from ``t_start`` down to ``t_end``.

    ``power = 1`` is uniform in ``t`` (the diffusers spacing ``trailing``); larger
    powers crowd the steps at the end, as Karras' grid does in ``sigma``.

    >>> time_grid(4)
    Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    fraction = jnp.linspace(1.0, 0.0, num_steps + 1)
    return t_end + (t_start - t_end) * fraction**power


def sample_ode(
    denoise: ClosedDenoiser,
    schedule: NoiseSchedule,
    eps: Array,
    times: Array,
    solver: str = "ddim",
) -> Array:
    """Follows the teacher's ODE from noise through ``times``, in image space.

    Starts at ``x = prior_scale * eps``. The last step, which mostly ends at ``sigma =
    0``, is a DDIM step for either solver, as in Karras et al.: it gives the teacher's
    estimate itself.

    Args:
      denoise: closed denoiser.
      schedule: the teacher's.
      eps: ``[B, ...]`` standard normal.
      times: ``[n + 1]``, falling; see `time_grid`.
      solver: ``ddim`` or ``heun``.

    Returns:
      ``[B, ...]``: the image at the last time.

    Raises:
      ValueError: the solver is not known.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not known; choose one of {SOLVERS}")
    step = {"ddim": ddim_step, "heun": heun_step}[solver]
    batch = eps.shape[:1]

    def body(x_t: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        t, s = (jnp.broadcast_to(time, batch) for time in pair)
        return step(denoise, schedule, x_t, t, s), None

    x_t = expand(schedule.prior_scale(times[:1]), eps) * eps
    x_t, _ = jax.lax.scan(body, x_t, (times[:-2], times[1:-1]))
    t, s = (jnp.broadcast_to(time, batch) for time in times[-2:])
    return ddim_step(denoise, schedule, x_t, t, s)
