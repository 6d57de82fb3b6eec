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

KINDS = ("boot", "continuous", "pid", "direct", "progressive", "consistency")
#: Kinds whose student is told a target time; the others' is told its noise level.
TARGET_TIME_KINDS = ("boot", "continuous", "pid")
#: Kinds that learn from real images.
IMAGE_KINDS = ("progressive", "consistency")
WEIGHTINGS = ("x0", "dt", "uniform", "noisy_image")
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
      kind: ``boot`` (eq. 4), ``continuous`` (eq. 5), or a rival, each derived in its
        own module: ``pid``, ``direct``, ``progressive``, ``consistency``.
      t_min: the time of the one-step sample.
      t_max: the time of the starting noise.
      delta: the bootstrap's step in ``t``; also that of a finite difference.
      solver: the teacher's step in the target, ``ddim`` or ``heun``; ``progressive``
        always takes ``ddim``.
      weighting: ``x0``, ``dt``, ``uniform`` or ``noisy_image``: see the module's
        docstring.
      boundary_weight: ``beta`` of eq. (4); 0 turns the boundary loss off, which the
        kinds without a target time never have.
      boundary_share: the share of the batch that the boundary loss is taken on.
      target_network: whose signal makes the target, ``online`` or ``ema``.
      time_order: ``uniform``, or ``progressive`` from ``t_max`` down, which accumulates
        errors and is here to show that.
      derivative: ``jvp`` or ``finite_difference``, for ``continuous`` and ``pid``.
      adaptive_power: ``p`` of eq. (6); 0 turns it off.
      adaptive_offset: ``c`` of eq. (6), in units of the distance; positive.
      teacher_steps: of the teacher's sampler that ``direct`` regresses on, of the first
        teacher of ``progressive`` (a power of two), and between the points of
        ``consistency``.
      grid_power: of the times of these steps; see `boot_jax.solvers.time_grid`.
      stored_samples: so many noises, each with the teacher's sample, are made before
        the training, for ``direct``; 0 makes new ones in every step.
      start_times: ``(u_min, u_max)``: where part of the batch starts from the student's
        own trajectory instead of noise; empty for none. See
        `boot_jax.objectives.starts`.
      start_share: of the batch, that part.
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
    teacher_steps: int = 16
    grid_power: float = 1.0
    stored_samples: int = 0
    start_times: tuple[float, ...] = ()
    start_share: float = 0.25
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
        self._check_kind()
        self._check_starts()

    def _check_kind(self) -> None:
        """Refuses what has a meaning, but none for the kind."""
        steps = self.teacher_steps
        if steps < 1 or self.grid_power <= 0 or self.stored_samples < 0:
            raise ValueError(
                f"teacher_steps is {steps}, grid_power {self.grid_power} and "
                f"stored_samples {self.stored_samples}; at least 1, positive, and at "
                "least 0 are needed"
            )
        if self.kind == "progressive" and (steps < 2 or steps & (steps - 1)):
            raise ValueError(
                f"teacher_steps is {steps}, but progressive halves it down to 1; a "
                "power of two is needed, such as 16"
            )
        if self.kind == "consistency" and self.t_min == 0:
            raise ValueError(
                "t_min is 0, but consistency needs a little noise at its last point; "
                "a positive t_min is needed, such as 0.01"
            )
        if self.correction.strength > 0 and not self.has_target_time:
            raise ValueError(
                f"correction.strength is {self.correction.strength}, but {self.kind} "
                "has no trajectory that it is measured by; it is for "
                f"{', '.join(TARGET_TIME_KINDS)}"
            )
        kinds_of_choices = {
            ("target_network", "ema"): ("boot", "continuous", "consistency"),
            ("time_order", "progressive"): TARGET_TIME_KINDS,
        }
        for (name, value), kinds in kinds_of_choices.items():
            if getattr(self, name) == value and self.kind not in kinds:
                raise ValueError(
                    f"{name} is {value!r}, which {self.kind} does not have; it is for "
                    f"{', '.join(kinds)}"
                )

    @property
    def has_target_time(self) -> bool:
        """Whether the student is told a target time, or else its noise level."""
        return self.kind in TARGET_TIME_KINDS

    @property
    def needs_images(self) -> bool:
        """Whether real images are learned from."""
        return self.kind in IMAGE_KINDS

    @property
    def reads_stored(self) -> bool:
        """Whether the teacher's samples are made once, before the training."""
        return self.kind == "direct" and self.stored_samples > 0

    @property
    def has_boundary(self) -> bool:
        """Whether there is a boundary loss."""
        return self.has_target_time and self.boundary_weight > 0

    def _check_starts(self) -> None:
        if not 0 < self.start_share <= 1:
            raise ValueError(
                f"start_share is {self.start_share}, but must lie in (0, 1]; no start "
                "below t_max is start_times=()"
            )
        starts, lowest = self.start_times, lowest_time(self)
        if starts and not self.has_target_time:
            raise ValueError(
                f"start_times is {tuple(starts)}, but {self.kind} starts anywhere; "
                f"start_times is for {', '.join(TARGET_TIME_KINDS)}"
            )
        if starts and not (
            len(starts) == 2 and lowest < starts[0] < starts[1] <= self.t_max
        ):
            raise ValueError(
                f"start_times is {tuple(starts)}, but must be (u_min, u_max) between "
                f"{lowest:g} and t_max = {self.t_max:g}, or empty for none"
            )

    @property
    def start_stride(self) -> int:
        """Every so-many-th image starts below ``t_max``, if any does."""
        return max(1, round(1 / self.start_share)) if self.start_times else 1

    @property
    def boundary_stride(self) -> int:
        """The boundary loss, where there is one, takes every so-many-th image."""
        return max(1, round(1 / self.boundary_share)) if self.has_boundary else 1

    @property
    def num_stages(self) -> int:
        """The trainings, one after the other, that the objective takes."""
        return self.teacher_steps.bit_length() - 1 if self.kind == "progressive" else 1


def lowest_time(objective: Objective) -> float:
    """The lowest target time that is drawn; see `draw_times`."""
    return objective.t_min + (objective.delta if objective.kind == "boot" else 0.0)


def draw_times(
    objective: Objective, key: Array, batch_size: int, progress: Array | float = 0.0
) -> Array:
    """The target times of a batch, ``[batch_size]``.

    Uniform over ``[t_min + delta, t_max]`` for ``boot``, whose other time is ``t -
    delta`` (a shorter last step would divide by a vanishing ``k``), and over ``[t_min,
    t_max]`` for ``continuous`` and ``pid``; uniform over the points of `grid_time` for
    ``progressive`` and ``consistency``; ``t_min`` for ``direct``. Stratified over the
    batch, with one draw for all: each time is uniform, the batch as a whole covers the
    range evenly.

    Args:
      objective: the ranges and the order.
      key: a JAX key.
      batch_size: number of images in the global batch.
      progress: 0 to 1, the share of training done; for ``progressive`` order only.
    """
    low, high = lowest_time(objective), objective.t_max
    if objective.time_order == "progressive":
        front = high - (high - low) * jnp.asarray(progress)
        low, high = front, jnp.minimum(front + objective.delta, high)
    fraction = stratified(key, batch_size)
    if objective.kind == "direct":
        return jnp.full_like(fraction, objective.t_min)
    if objective.needs_images:
        steps = grid_steps(objective)
        index = jnp.minimum(jnp.floor(steps * fraction) + 1, steps)
        return grid_time(objective, index, steps)
    return low + (high - low) * fraction


def stratified(key: Array, batch_size: int) -> Array:
    """Numbers ``[batch_size]`` in [0, 1), each uniform, that cover it evenly."""
    # Multiples of the golden ratio fill the unit interval evenly from any index on, so
    # that every device's share of the batch covers the whole range.
    strata = np.arange(batch_size) * ((np.sqrt(5) - 1) / 2) % 1
    offset = jax.random.uniform(key)
    return (jnp.asarray(strata, offset.dtype) + offset) % 1


def grid_steps(objective: Objective) -> int:
    """The steps of the student's grid, from ``t_max`` down.

    Those of ``consistency`` end at ``t_min``. The student of ``progressive`` makes half
    as many steps as its teacher, and ends at 0.
    """
    steps = objective.teacher_steps
    return steps // 2 if objective.kind == "progressive" else steps


def grid_time(objective: Objective, index: Array, steps: int) -> Array:
    """The times of points ``0 ... steps`` of a grid, the last of them ``t_max``."""
    end = _grid_end(objective)
    return end + (objective.t_max - end) * (index / steps) ** objective.grid_power


def grid_index(objective: Objective, t: Array, steps: int) -> Array:
    """The nearest point of a grid to each time; the inverse of `grid_time`."""
    end = _grid_end(objective)
    fraction = (t - end) / (objective.t_max - end)
    return jnp.round(steps * fraction ** (1 / objective.grid_power))


def _grid_end(objective: Objective) -> float:
    return objective.t_min if objective.kind == "consistency" else 0.0


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
    if objective.has_boundary:
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
