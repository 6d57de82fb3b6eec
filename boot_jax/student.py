"""A student out of a teacher.

The student is the teacher's network, started from its weights, with its time input
frozen at ``t_max``; the target time (and, if wanted, the guidance scale) enters through
embeddings added to the time embedding, whose last layer starts at zero. Its output is
turned into the signal by the teacher's own conversion at ``t_max``. So before training
``y_theta(eps, t) = f(eps, t_max)`` for every ``t``, and the boundary loss is zero.

The student of an objective without target times is the teacher's network as it is: its
time input says the noise level of its input. Its signal is its estimate from the
starting noise, whatever the target time.

**Output.** The paper argues for predicting the signal, not the noisy image. To show
why, the same output can be read as ``x_t``, the signal then being what is left of it
without the noise that it started from (`from_noisy_image`):

    y_t = (x_hat_t - sigma_t eps) / alpha_t.                                    (1)

An error of ``x_hat_t`` is one of ``y_t`` times ``1 / alpha_t``: that has no meaning
where ``alpha_t = 0``, and near there little.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.guidance import SCALE_KEY, Denoiser, of_student
from boot_jax.objectives import Jump, Signal
from boot_jax.prediction import expand, to_x_0
from boot_jax.schedules import NoiseSchedule
from boot_jax.teachers.base import Teacher, TeacherError, example_condition

TIME_CONDITIONINGS = ("added", "reused", "noise_level")

#: What a network's output is read as.
OUTPUTS = ("signal", "noisy_image")

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
      time_conditioning: what its time input, and the added embedding if any, are told.
      denoise: ``(params, x_t, t, condition) -> x_0``, the network called as the
        teacher's is; None for a student with a target time, which knows no other noise
        level than that of ``t_max``.
    """

    signal: Signal
    jump: Jump | None
    init: Callable[[Array], Any]
    network: nn.Module
    prediction_type: str
    time_conditioning: str = "added"
    denoise: Denoiser | None = None


def create_student(
    teacher: Teacher,
    *,
    t_max: float = 1.0,
    network: nn.Module | None = None,
    time_conditioning: str = "added",
    output: str = "signal",
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
        ``reused`` for the target time (worse: for comparison); or no target time, the
        time input being that of the ``noise_level``.
      output: ``signal``, or ``noisy_image`` (worse: for comparison): eq. (1).
      guidance_range: ``(w_min, w_max)``, to condition on
      ``condition["guidance_scale"]``. **overrides: fields of the network to change,
      such as ``dtype`` or ``remat``.

    Raises:
      TeacherError: there is no network, or its prediction cannot be converted at
        ``t_max``.
      ValueError: unknown ``time_conditioning`` or ``output``.
    """
    if time_conditioning not in TIME_CONDITIONINGS:
        raise ValueError(
            f"time_conditioning is {time_conditioning!r}; "
            f"choose one of {TIME_CONDITIONINGS}"
        )
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}; choose one of {OUTPUTS}")
    base = teacher.network if network is None else network
    if base is None:
        raise TeacherError(
            "this teacher has no network that a student could be made of; "
            "give one as `network`"
        )
    prediction_type = "v_prediction"
    if network is None:
        prediction_type = teacher.prediction_type or prediction_type
    check_conversion(prediction_type, teacher.schedule, t_max, output)
    names = (TARGET_TIME,) if time_conditioning == "added" else ()
    names += (SCALE_KEY,) if guidance_range is not None else ()
    student_network = base.clone(added_embeddings=names, **overrides)
    inherited = teacher.params if network is None else None
    estimate = _estimate(
        student_network, teacher.schedule, prediction_type, guidance_range
    )
    told_noise_level = time_conditioning == "noise_level"
    signal = _signal(estimate, teacher.schedule, t_max, time_conditioning)
    if output == "noisy_image":
        signal = from_noisy_image(signal, teacher.schedule)
    return Student(
        signal=signal,
        jump=_jump(estimate) if TARGET_TIME in names and output == "signal" else None,
        init=initialiser(student_network, teacher, inherited),
        network=student_network,
        prediction_type=prediction_type,
        time_conditioning=time_conditioning,
        denoise=_denoiser(estimate) if told_noise_level else None,
    )


def _jump(estimate: "_Estimate") -> Jump:
    def jump(params: Any, x_u: Array, u: Array, t: Array, condition: Any) -> Array:
        return estimate(params, x_u, u, u, condition, {TARGET_TIME: t})

    return jump


def from_noisy_image(noisy_image: Signal, schedule: NoiseSchedule) -> Signal:
    """The signal of a student that gives ``x_hat_t``, eq. (1).

    Args:
      noisy_image: ``(params, eps, t, condition) -> x_hat_t``.
      schedule: the teacher's; its ``alpha(t)`` is to be positive at every ``t``.
    """

    def signal(params: Any, eps: Array, t: Array, condition: Any) -> Array:
        x_t = noisy_image(params, eps, t, condition).astype(jnp.float32)
        noise = expand(schedule.sigma(t), eps) * eps
        return (x_t - noise) / expand(schedule.alpha(t), x_t)

    return signal


def check_conversion(
    prediction_type: str, schedule: NoiseSchedule, t_max: float, output: str = "signal"
) -> None:
    """Refuses what divides by ``alpha(t_max)`` where that is 0: a `TeacherError`."""
    with jax.ensure_compile_time_eval():  # also while a caller is being traced
        alpha = float(schedule.alpha(jnp.asarray(t_max)))
    if prediction_type == "epsilon" and alpha == 0:
        raise TeacherError(
            f"an epsilon teacher has no estimate at t_max = {t_max}, where alpha is 0; "
            "set objective.t_max a little lower, such as 0.99"
        )
    if output == "noisy_image" and alpha == 0:
        raise TeacherError(
            f"student.output is 'noisy_image', which has no signal at t_max = {t_max}, "
            "where alpha is 0; set objective.t_max a little lower, such as t_max=0.98"
        )


#: ``(params, x_t, t, own_time, condition, added) -> x_0``: the network at noise level
#: ``t``, its time input being told ``own_time``.
_Estimate = Callable[[Any, Array, Array, Array, Any, dict[str, Array]], Array]


def _estimate(
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: str,
    guidance_range: tuple[float, float] | None,
) -> _Estimate:
    def estimate(
        params: Any,
        x_t: Array,
        t: Array,
        own_time: Array,
        condition: Any,
        added: dict[str, Array],
    ) -> Array:
        if guidance_range is not None:
            scale = relative_scale(condition[SCALE_KEY], guidance_range)
            added = {**added, SCALE_KEY: scale}
            condition = {k: leaf for k, leaf in condition.items() if k != SCALE_KEY}
        output = network.apply(
            {"params": params},
            expand(schedule.input_scale(t), x_t) * x_t,
            schedule.time_input(own_time),
            of_student(condition),
            added,
        )
        assert isinstance(output, Array)
        output = output[..., : x_t.shape[-1]]  # what follows is a learned variance
        return to_x_0(
            prediction_type, output, x_t, schedule.alpha(t), schedule.sigma(t)
        )

    return estimate


def _signal(
    estimate: _Estimate, schedule: NoiseSchedule, t_max: float, time_conditioning: str
) -> Signal:
    def signal(params: Any, eps: Array, t: Array, condition: Any) -> Array:
        start = jnp.full(t.shape, t_max, t.dtype)
        own_time = t if time_conditioning == "reused" else start
        added = {TARGET_TIME: t} if time_conditioning == "added" else {}
        x_t = expand(schedule.prior_scale(start), eps) * eps
        return estimate(params, x_t, start, own_time, condition, added)

    return signal


def _denoiser(estimate: _Estimate) -> Denoiser:
    def denoise(params: Any, x_t: Array, t: Array, condition: Any) -> Array:
        return estimate(params, x_t, t, t, condition, {})

    return denoise


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
