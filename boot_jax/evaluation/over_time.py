"""The student's error at every target time, against the exact signal there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from boot_jax.evaluation import metrics
from boot_jax.evaluation.pair import Pair
from boot_jax.prediction import expand
from boot_jax.sharding import batch_sharding, batch_shards, place, to_host
from boot_jax.solvers import signal_step, time_grid


class ExactSignals(NamedTuple):
    """The signal of some noises, as the teacher's ODE has it.

    Attributes:
      times: ``[n + 1]``, falling.
      signals: ``[n + 1, images, H, W, C]``.
    """

    times: np.ndarray
    signals: np.ndarray


def exact_signals(pair: Pair, options: Mapping[str, Any], mesh: Mesh) -> ExactSignals:
    """Heun steps in signal space from the boundary condition ``y = f(eps, t_max)``.

    Args:
      pair: whose teacher and times.
      options: reads ``error_times``, ``error_images``, ``ode_steps`` and ``seed``.
      mesh: of devices.
    """
    num_times = options["error_times"]
    per_time = max(1, options["ode_steps"] // num_times)
    objective, schedule = pair.objective, pair.teacher.schedule
    times = time_grid(num_times * per_time, objective.t_max, objective.t_min)
    eps, condition = _drawn(pair, options, mesh)
    num = len(eps)

    @jax.jit
    def step(
        params: Any, eps: Array, condition: Any, y_t: Array, t: Array, s: Array
    ) -> Array:
        t, s = jnp.full((num,), t), jnp.full((num,), s)
        return signal_step(
            lambda x, t: pair.denoise(params, x, t, condition),
            schedule,
            "heun",
            y_t,
            eps,
            t,
            s,
        )

    @jax.jit
    def boundary(params: Any, eps: Array, condition: Any) -> Array:
        start = jnp.full((num,), objective.t_max)
        x_t = expand(schedule.prior_scale(start), eps) * eps
        return pair.denoise(params, x_t, start, condition)

    params, times = pair.teacher.params, np.asarray(times)
    y_t = boundary(params, eps, condition)
    signals = [to_host(y_t)]
    for index in range(len(times) - 1):
        y_t = step(params, eps, condition, y_t, times[index], times[index + 1])
        if (index + 1) % per_time == 0:
            signals.append(to_host(y_t))
    return ExactSignals(times[::per_time], np.stack(signals))


def error_over_time(
    pair: Pair,
    options: Mapping[str, Any],
    mesh: Mesh,
    exact: ExactSignals | None = None,
) -> dict[str, list[float]]:
    """The student's error at target times, over the variance of the ODE's images.

    Args:
      pair, options, mesh: see `exact_signals`.
      exact: of the same; made if not given.

    Returns:
      ``{"times": [...], "student": [...]}``, times falling.
    """
    exact = exact or exact_signals(pair, options, mesh)
    eps, condition = _drawn(pair, options, mesh)
    num = len(eps)

    @jax.jit
    def student(params: Any, eps: Array, condition: Any, t: Array) -> Array:
        return pair.signal(params, eps, jnp.full((num,), t), condition)

    # Over one variance, that of the images: at t_max the exact signal may have none.
    images = exact.signals[-1]
    errors = []
    for t, y_t in zip(exact.times, exact.signals, strict=True):
        predicted = to_host(student(pair.params, eps, condition, t))
        errors.append(metrics.normalized_error(images + (predicted - y_t), images))
    return {"times": exact.times.astype(float).tolist(), "student": errors}


def _drawn(pair: Pair, options: Mapping[str, Any], mesh: Mesh) -> tuple[Array, Any]:
    """Noise and encoded condition of the first images, filled up for the devices."""
    shards = batch_shards(mesh)
    indices = np.arange(-(-options["error_images"] // shards) * shards)
    drawn = pair.noise(options["seed"])(indices), pair.condition(indices)
    eps, condition = place(drawn, batch_sharding(mesh))
    return eps, pair.encode(condition)
