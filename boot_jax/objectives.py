"""The paper: a student learns the signal of its teacher's trajectories without data.

**The student** ``y_theta(eps, t)`` takes the noise at which a trajectory of the
teacher's ODE starts and a target time, and gives the signal there,

    y_t = (x_t - sigma_t eps) / alpha_t.                                        (1)

The signal obeys an ODE in which the noise has cancelled (Gu et al., *BOOT*, arXiv
2306.05544; ``f`` is the teacher as a denoiser, ``lambda = log(sigma / alpha)``):

    dy / dlambda = y - f(x, t),     x = alpha y + sigma eps,                    (2)

so that one DDIM step of the teacher from ``t`` to ``s < t`` moves the signal by

    y_s = y_t + k (f(x_t, t) - y_t),     k = 1 - exp(lambda_s - lambda_t).      (3)

**Bootstrap** (`boot_loss`). The student's own signal at ``t``, moved by eq. (3),
teaches its signal at ``s = t - delta``; SG stops the gradient through all of the
target:

    L_BS = E w || y_theta(eps, s) - SG[y + k (f(x_t, t) - y)] ||^2,  y = y_theta(eps, t)
    L_BC = E || y_theta(eps, t_max) - f(eps, t_max) ||^2
    L    = L_BS + beta L_BC.                                                    (4)

Divided by ``k``, the difference in L_BS is the one between the *implied image*
``y_t + (y_theta(eps, s) - y_t) / k`` and ``f``; with that, any distance between images
(squared error, LPIPS) serves. The weights ``w`` are then ``1`` for ``x0`` weighting,
``(k / delta)^2`` for ``dt``, ``k^2`` for ``uniform``, each in terms of that image.

**Continuous time** (`continuous_loss`). As ``delta`` goes to 0, eq. (2) itself:

    L = E || y_theta(eps, t) - SG[f(x_t, t) + (dt / dlambda) dy_theta / dt] ||^2  (5)

(the prediction half of FreeFlow, arXiv 2511.19428). Where ``alpha = 0`` the factor is 0
and eq. (5) is the boundary condition; elsewhere the boundary loss is added all the
same.

**Adaptive weights.** Early on, ``dy_theta / dt`` can run away before the student has
learned to follow it, and the damage to the weights it started from stays. Dividing each
image's distance ``d`` by its own size bounds every image's pull:

    d <- d / SG[d + c]^p                                                        (6)

(the adaptive weights of MeanFlow, arXiv 2505.13447).

The losses are pure: no state, no globals, nothing but arrays and the two functions

    denoise(params, x_t, t, condition) -> x_0        the teacher
    signal(params, eps, t, condition) -> y_t         the student

so they can be jitted, differentiated, vmapped and sharded by anybody's training loop.
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
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import SOLVERS, add_noise, signal_target, step_fraction

#: ``signal(params, eps, t, condition) -> y_t``: the contract of a student.
Signal = Callable[[Any, Array, Array, Any], Array]
#: ``distance(images, targets) -> [B]``.
Distance = Callable[[Array, Array], Array]

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

    def __post_init__(self) -> None:
        """Refuses what has no meaning, in one line each."""
        for name, known in (
            ("kind", tuple(LOSSES)),
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
    # Multiples of the golden ratio fill the unit interval evenly from any index on, so
    # that every device's share of the batch covers the whole range.
    strata = np.arange(batch_size) * ((np.sqrt(5) - 1) / 2) % 1
    offset = jax.random.uniform(key)
    return low + (high - low) * ((jnp.asarray(strata, offset.dtype) + offset) % 1)


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
      The loss, and ``{"loss/trajectory", "loss/boundary"}``, all scalars.
    """
    s = jnp.maximum(t - objective.delta, objective.t_min)
    k = step_fraction(schedule, t, s)
    closed = _close(denoise, teacher_params, condition)
    source = params if target_params is None else target_params
    y_t = stop_gradient(signal(source, eps, t, condition))
    x_0 = signal_target(closed, schedule, objective.solver, y_t, eps, t, s)
    y_s = signal(params, eps, s, condition)
    implied = y_t + (y_s - y_t) / expand(k, y_s)
    weight = {
        "x0": jnp.ones_like(k),
        "dt": (k / objective.delta) ** 2,
        "uniform": k**2,
    }[objective.weighting]
    distance = _distance(objective, implied, stop_gradient(x_0))
    loss = jnp.mean(weight * distance)
    return _with_boundary(
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


def continuous_loss(
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
    """The continuous-time loss, eq. (5), and the boundary loss.

    Arguments and results as in `boot_loss`, but for ``t [B]`` in ``[t_min, t_max]``.
    """
    source = params if target_params is None else target_params

    def along_time(t: Array) -> Array:
        return signal(source, eps, t, condition)

    if objective.derivative == "jvp":
        y_t, slope = jax.jvp(along_time, (t,), (jnp.ones_like(t),))
    else:
        y_t = along_time(t)
        before = jnp.maximum(t - objective.delta / 2, objective.t_min)
        after = jnp.minimum(t + objective.delta / 2, objective.t_max)
        rise = along_time(after) - along_time(before)
        slope = rise / expand(after - before, rise)
    x_t = add_noise(schedule, stop_gradient(y_t), eps, t)
    x_0 = denoise(teacher_params, x_t, t, condition)
    target = stop_gradient(x_0 + expand(schedule.dt_dlambda(t), slope) * slope)
    if target_params is not None:
        y_t = signal(params, eps, t, condition)
    loss = jnp.mean(_distance(objective, y_t, target))
    return _with_boundary(
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


#: The losses by ``objective.kind``; all of one signature.
LOSSES = {"boot": boot_loss, "continuous": continuous_loss}


def _distance(objective: Objective, images: Array, targets: Array) -> Array:
    """The distance of each image, ``[B]``, under the adaptive weights of eq. (6)."""
    distance = objective.distance(images, targets)
    if objective.adaptive_power == 0:
        return distance
    size = stop_gradient(distance) + objective.adaptive_offset
    return distance / size**objective.adaptive_power


def _close(
    denoise: Denoiser, teacher_params: Any, condition: Any
) -> Callable[[Array, Array], Array]:
    return lambda x_t, t: denoise(teacher_params, x_t, t, condition)


def _with_boundary(
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
