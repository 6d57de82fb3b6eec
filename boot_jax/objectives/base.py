"""What every objective shares: its choices, its times, distances and the boundary loss.

Equations are those of `boot_jax.objectives`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient

from boot_jax.guidance import Denoiser
from boot_jax.objectives.options import Correction
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import SOLVERS

#: ``signal(params, eps, t, condition) -> y_t``: the contract of a student.
Signal = Callable[[Any, Array, Array, Any], Array]
#: ``distance(images, targets) -> [B]``.
Distance = Callable[[Array, Array], Array]

#: In the metrics of a loss that a correction is measured by.
TRAJECTORY_RESIDUAL = "correction/trajectory_residual"

KINDS = ("boot", "continuous")
WEIGHTINGS = ("x0", "dt", "uniform")
TARGET_NETWORKS = ("online", "ema")
TIME_ORDERS = ("uniform", "progressive")
DERIVATIVES = ("jvp", "finite_difference")


def squared_error(images: Array, targets: Array) -> Array:
    """Mean squared error of each image, ``[B]``."""
    return jnp.mean((images - targets) ** 2, axis=tuple(range(1, images.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, and the choices that the paper leaves open.

    Attributes:
      kind: ``boot`` (eq. 4) or ``continuous`` (eq. 5).
      t_min: the time of the one-step sample.
      t_max: the time of the starting noise.
      delta: the bootstrap's step in ``t``; also that of a finite difference.
      solver: the teacher's step in the target, ``ddim`` or ``heun``.
      weighting: ``x0``, ``dt`` or ``uniform``: see the module's docstring.
      boundary_weight: ``beta`` of eq. (4); 0 turns the boundary loss off.
      boundary_share: the share of the batch that the boundary loss is taken on.
      target_network: whose signal makes the target, ``online`` or ``ema``.
      time_order: ``uniform``, or ``progressive`` from ``t_max`` down, which accumulates
        errors and is here to show that.
      derivative: ``jvp`` or ``finite_difference``, for ``continuous``.
      adaptive_power: ``p`` of eq. (6); 0 turns it off.
      adaptive_offset: ``c`` of eq. (6), in units of the distance; positive.
      distance: between images, ``[B]``; the squared error when not given.
      correction: of the distribution of samples; off unless it has a strength.
    """

    kind: str = "boot"
    t_min: float = 0.01
    t_max: float = 1.0
    delta: float = 0.04
    solver: str = "heun"
    weighting: str = "x0"
    boundary_weight: float = 1.0
    boundary_share: float = 1.0
    target_network: str = "online"
    time_order: str = "uniform"
    derivative: str = "jvp"
    adaptive_power: float = 0.0
    adaptive_offset: float = 0.01
    distance: Distance = squared_error
    correction: Correction = dataclasses.field(default_factory=Correction)

    def __post_init__(self) -> None:
        """Refuses what has no meaning, in one line each."""
        for name, known in (
            ("kind", KINDS),
            ("solver", SOLVERS),
            ("weighting", WEIGHTINGS),
            ("target_network", TARGET_NETWORKS),
            ("time_order", TIME_ORDERS),
            ("derivative", DERIVATIVES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {known}")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(
                f"t_min is {self.t_min} and t_max is {self.t_max}; "
                "0 <= t_min < t_max <= 1 is needed"
            )
        if not 0 < self.delta < self.t_max - self.t_min:
            raise ValueError(
                f"delta is {self.delta}; it must lie between 0 and "
                f"t_max - t_min = {self.t_max - self.t_min:g}"
            )
        if self.adaptive_power < 0 or self.adaptive_offset <= 0:
            raise ValueError(
                f"adaptive_power is {self.adaptive_power} and adaptive_offset is "
                f"{self.adaptive_offset}; at least 0, and positive, are needed"
            )
        if self.boundary_weight < 0 or not 0 < self.boundary_share <= 1:
            raise ValueError(
                f"boundary_weight is {self.boundary_weight} and boundary_share is "
                f"{self.boundary_share}; at least 0, and in (0, 1], are needed"
            )

    @property
    def boundary_stride(self) -> int:
        """The boundary loss, where there is one, takes every so-many-th image."""
        return max(1, round(1 / self.boundary_share)) if self.boundary_weight else 1


def draw_times(
    objective: Objective, key: Array, batch_size: int, progress: Array | float = 0.0
) -> Array:
    """The target times of a batch, ``[batch_size]``.

    Uniform over ``[t_min + delta, t_max]`` for ``boot``, whose other time is ``t -
    delta`` (a shorter last step would divide by a vanishing ``k``), and over ``[t_min,
    t_max]`` for ``continuous``. Stratified over the batch, with one draw for all: each
    time is uniform, the batch as a whole covers the range evenly.

    Args:
      objective: the ranges and the order.
      key: a JAX key.
      batch_size: number of images in the global batch.
      progress: 0 to 1, the share of training done; for ``progressive`` order only.
    """
    low = objective.t_min + (objective.delta if objective.kind == "boot" else 0.0)
    high = objective.t_max
    if objective.time_order == "progressive":
        front = high - (high - low) * jnp.asarray(progress)
        low, high = front, jnp.minimum(front + objective.delta, high)
    return low + (high - low) * stratified(key, batch_size)


def stratified(key: Array, batch_size: int) -> Array:
    """Numbers ``[batch_size]`` in [0, 1), each uniform, that cover it evenly."""
    # Multiples of the golden ratio fill the unit interval evenly from any index on, so
    # that every device's share of the batch covers the whole range.
    strata = np.arange(batch_size) * ((np.sqrt(5) - 1) / 2) % 1
    offset = jax.random.uniform(key)
    return (jnp.asarray(strata, offset.dtype) + offset) % 1


def adaptive_distance(objective: Objective, images: Array, targets: Array) -> Array:
    """The distance of each image, ``[B]``, under the adaptive weights of eq. (6)."""
    distance = objective.distance(images, targets)
    if objective.adaptive_power == 0:
        return distance
    size = stop_gradient(distance) + objective.adaptive_offset
    return distance / size**objective.adaptive_power


def residual_metrics(
    objective: Objective, images: Array, targets: Array, gain: Array
) -> dict[str, Array]:
    """How hard a loss pulls at the student's output, where a correction asks for it.

    The gradient of an image's adaptive distance in that image, times ``gain [B]`` (the
    loss's weight, and the derivative of the image in the output), in the units in which
    that of the squared error is the difference. Its root mean square, a mean over
    images, is `TRAJECTORY_RESIDUAL`.
    """
    if objective.correction.strength == 0:
        return {}
    images, targets = stop_gradient((images, targets))
    pull = jax.grad(
        lambda images: jnp.sum(adaptive_distance(objective, images, targets))
    )(images)
    axes = tuple(range(1, images.ndim))
    size = jnp.sqrt(jnp.mean(pull**2, axis=axes)) * (images[0].size / 2)
    return {TRAJECTORY_RESIDUAL: jnp.mean(gain * size)}


def with_boundary(
    loss: Array,
    params: Any,
    teacher_params: Any,
    eps: Array,
    condition: Any,
    signal: Signal,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
) -> tuple[Array, dict[str, Array]]:
    """Adds ``beta L_BC`` of eq. (4), on every n-th image of the batch."""
    metrics = {"loss/trajectory": loss}
    if objective.boundary_weight > 0:
        stride = objective.boundary_stride
        # A stride, not a leading slice: it stays on the device that holds the images.
        eps, condition = jax.tree.map(lambda leaf: leaf[::stride], (eps, condition))
        t_max = jnp.full(eps.shape[:1], objective.t_max, eps.dtype)
        x_t = expand(schedule.prior_scale(t_max), eps) * eps
        x_0 = stop_gradient(denoise(teacher_params, x_t, t_max, condition))
        distance = objective.distance(signal(params, eps, t_max, condition), x_0)
        metrics["loss/boundary"] = jnp.mean(distance)
        loss = loss + objective.boundary_weight * metrics["loss/boundary"]
    return loss, metrics
