"""A student out of a teacher.

The student is the teacher's network, started from its weights, with its time input
frozen at ``t_max``; the target time (and, if wanted, the guidance scale) enters through
embeddings added to the time embedding, whose last layer starts at zero. Its output is
turned into the signal by the teacher's own conversion at ``t_max``. So before training
``y_theta(eps, t) = f(eps, t_max)`` for every ``t``, and the boundary loss is zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.guidance import SCALE_KEY, of_student
from boot_jax.objectives import Signal
from boot_jax.prediction import expand, to_x_0
from boot_jax.schedules import NoiseSchedule
from boot_jax.teachers.base import Teacher, TeacherError, example_condition

TIME_CONDITIONINGS = ("added", "reused")

#: Name of the added embedding of the target time.
TARGET_TIME = "target_time"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """A network that gives the signal in one call.

    Attributes:
      signal: ``(params, eps [B, H, W, C], t [B], condition) -> y_t``.
      init: ``key -> params``, float32; copies of the teacher's weights where it has a
        network, as numpy arrays.
      network: the Linen module behind ``signal``.
      prediction_type: what ``network`` predicts.
    """

    signal: Signal
    init: Callable[[Array], Any]
    network: nn.Module
    prediction_type: str


def create_student(
    teacher: Teacher,
    *,
    t_max: float = 1.0,
    network: nn.Module | None = None,
    time_conditioning: str = "added",
    guidance_range: tuple[float, float] | None = None,
    **overrides: Any,
) -> Student:
    """Makes a student of a teacher's network, or of a new one.

    Args:
      teacher: whose network, weights, schedule and prediction type are taken over.
      t_max: the time at which the network's own time input is frozen.
      network: for a teacher without one: it then starts from random weights and
        predicts ``v_prediction``.
      time_conditioning: ``added`` embeddings, or the teacher's own time input
        ``reused`` for the target time (worse: for comparison).
      guidance_range: ``(w_min, w_max)``, to condition on
      ``condition["guidance_scale"]``. **overrides: fields of the network to change,
      such as ``dtype`` or ``remat``.

    Raises:
      TeacherError: there is no network, or its prediction cannot be converted at
        ``t_max``.
      ValueError: unknown ``time_conditioning``.
    """
    if time_conditioning not in TIME_CONDITIONINGS:
        raise ValueError(
            f"time_conditioning is {time_conditioning!r}; "
            f"choose one of {TIME_CONDITIONINGS}"
        )
    base = teacher.network if network is None else network
    if base is None:
        raise TeacherError(
            "this teacher has no network that a student could be made of; "
            "give one as `network`"
        )
    prediction_type = "v_prediction"
    if network is None:
        prediction_type = teacher.prediction_type or prediction_type
    check_conversion(prediction_type, teacher.schedule, t_max)
    names = (TARGET_TIME,) if time_conditioning == "added" else ()
    names += (SCALE_KEY,) if guidance_range is not None else ()
    student_network = base.clone(added_embeddings=names, **overrides)
    inherited = teacher.params if network is None else None
    return Student(
        signal=_signal(
            student_network, teacher.schedule, prediction_type, t_max, guidance_range
        ),
        init=initialiser(student_network, teacher, inherited),
        network=student_network,
        prediction_type=prediction_type,
    )


def check_conversion(
    prediction_type: str, schedule: NoiseSchedule, t_max: float
) -> None:
    """Refuses an epsilon prediction where ``alpha(t_max)`` is 0: a `TeacherError`."""
    with jax.ensure_compile_time_eval():  # also while a caller is being traced
        alpha = float(schedule.alpha(jnp.asarray(t_max)))
    if prediction_type == "epsilon" and alpha == 0:
        raise TeacherError(
            f"an epsilon teacher has no estimate at t_max = {t_max}, where alpha is 0; "
            "set objective.t_max a little lower, such as 0.99"
        )


def _signal(
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: str,
    t_max: float,
    guidance_range: tuple[float, float] | None,
) -> Signal:
    names: tuple[str, ...] = network.added_embeddings  # type: ignore[attr-defined]

    def signal(params: Any, eps: Array, t: Array, condition: Any) -> Array:
        start = jnp.full(t.shape, t_max, t.dtype)
        own_time = start if TARGET_TIME in names else t
        added = {TARGET_TIME: t} if TARGET_TIME in names else {}
        if guidance_range is not None:
            added[SCALE_KEY] = relative_scale(condition[SCALE_KEY], guidance_range)
            condition = {k: leaf for k, leaf in condition.items() if k != SCALE_KEY}
        condition = of_student(condition)
        x_t = expand(schedule.prior_scale(start), eps) * eps
        output = network.apply(
            {"params": params},
            expand(schedule.input_scale(start), x_t) * x_t,
            schedule.time_input(own_time),
            condition,
            added,
        )
        assert isinstance(output, Array)
        output = output[..., : x_t.shape[-1]]  # what follows is a learned variance
        alpha_t, sigma_t = schedule.alpha(start), schedule.sigma(start)
        return to_x_0(prediction_type, output, x_t, alpha_t, sigma_t)

    return signal


def relative_scale(scale: Array, guidance_range: tuple[float, float]) -> Array:
    """Guidance scales as an embedding takes them: 0 to 1 over their range."""
    low, high = guidance_range
    return (scale - low) / max(high - low, 1e-6)


def initialiser(
    network: nn.Module, teacher: Teacher, inherited: Any
) -> Callable[[Array], Any]:
    """``key -> params`` of a network: copies of a teacher's weights, and what is new.

    Args:
      network: of the teacher, perhaps with added embeddings.
      teacher: for the shapes of its inputs.
      inherited: its parameters; None for a network that starts from random ones.
    """

    def fresh(key: Array) -> Any:
        names: tuple[str, ...] = network.added_embeddings  # type: ignore[attr-defined]
        one = jnp.zeros((1,))
        image = jnp.zeros((1, *teacher.sample_shape))
        added = dict.fromkeys(names, one)
        condition = example_condition(teacher)
        return network.init(key, image, one, condition, added)["params"]

    def init(key: Array) -> Any:
        if inherited is None:
            return jax.jit(fresh)(key)
        # Compiled, so that only the new embeddings are ever made; and the teacher's
        # weights are copied, since the training step gives its own buffers away: on the
        # host, from where each device gets its part.
        new = jax.jit(
            lambda key: {
                name: leaf for name, leaf in fresh(key).items() if name not in inherited
            }
        )(key)
        copied = jax.tree.map(lambda leaf: np.array(leaf, np.float32), inherited)
        return copied | new

    return init
