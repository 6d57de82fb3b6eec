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
from boot_jax.objectives import Jump, Signal
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
      jump: ``(params, x_u, u [B], t [B], condition) -> y_t``: the signal as seen from
        ``x_u`` (`boot_jax.objectives.starts`), told its time ``u`` as the teacher is;
        None where the student's target time has taken that input's place.
      init: ``key -> params``, float32; copies of the teacher's weights where it has a
        network, as numpy arrays.
      network: the Linen module behind ``signal``.
      prediction_type: what ``network`` predicts.
    """

    signal: Signal
    jump: Jump | None
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
    jump = _jump(student_network, teacher.schedule, prediction_type, guidance_range)

    def signal(params: Any, eps: Array, t: Array, condition: Any) -> Array:
        start = jnp.full(t.shape, t_max, t.dtype)
        x_t = expand(teacher.schedule.prior_scale(start), eps) * eps
        return jump(params, x_t, start, t, condition)

    return Student(
        signal=signal,
        jump=jump if TARGET_TIME in names else None,
        init=_initialiser(student_network, teacher, inherited),
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


def _jump(
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: str,
    guidance_range: tuple[float, float] | None,
) -> Jump:
    names: tuple[str, ...] = network.added_embeddings  # type: ignore[attr-defined]

    def jump(params: Any, x_u: Array, u: Array, t: Array, condition: Any) -> Array:
        own_time = u if TARGET_TIME in names else t
        added = {TARGET_TIME: t} if TARGET_TIME in names else {}
        if guidance_range is not None:
            low, high = guidance_range
            added[SCALE_KEY] = (condition[SCALE_KEY] - low) / max(high - low, 1e-6)
            condition = {k: leaf for k, leaf in condition.items() if k != SCALE_KEY}
        condition = of_student(condition)
        output = network.apply(
            {"params": params},
            expand(schedule.input_scale(u), x_u) * x_u,
            schedule.time_input(own_time),
            condition,
            added,
        )
        assert isinstance(output, Array)
        output = output[..., : x_u.shape[-1]]  # what follows is a learned variance
        return to_x_0(
            prediction_type, output, x_u, schedule.alpha(u), schedule.sigma(u)
        )

    return jump


def _initialiser(
    network: nn.Module, teacher: Teacher, inherited: Any
) -> Callable[[Array], Any]:
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
