"""What a diffusers ``scheduler_config.json`` says about a teacher.

A scheduler is a solver over a forward process; here only the process counts, and how
its sampler treats the network's output. So most schedulers say the same thing, and the
teacher is sampled by ours. Those over continuous noise are read in
`boot_jax.teachers.continuous`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from jax import Array

from boot_jax.prediction import Thresholding
from boot_jax.schedules import NoiseSchedule, from_diffusers
from boot_jax.teachers.base import TeacherError
from boot_jax.teachers.continuous import CONTINUOUS

#: Those that clip ``x_0`` unless told not to, and space their steps by ``leading``.
CLIPPING = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
)
#: Every scheduler over discrete betas whose network can be followed by an ODE.
DISCRETE = (
    *CLIPPING,
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
SUPPORTED = (*DISCRETE, *CONTINUOUS)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")

# Fields with which a supported scheduler is over another process than its betas'.
_ELSEWHERE = {"use_flow_sigmas": False, "timestep_type": "discrete"}


@dataclasses.dataclass(frozen=True)
class Spacing:
    """The times between which diffusers' ``DDIMScheduler`` steps.

    Attributes:
      num_train_timesteps: ``N``; training step ``i`` lies at ``t = (i + 1) / N``.
      kind: ``leading``, ``trailing`` or ``linspace``.
      steps_offset: added to the steps of ``leading``.
      ends_clean: whether the last step goes to ``t = 0``, not to training step 0.
    """

    num_train_timesteps: int
    kind: str = "leading"
    steps_offset: int = 0
    ends_clean: bool = True

    def __call__(self, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Times ``t [num_steps]`` at which the network is asked, and where to, ``s``.

        Every step is ``N // num_steps`` long, as in diffusers; so where that is not how
        far apart the times are, the next ``t`` is not the last ``s``.

        Raises:
          ValueError: more steps than the teacher was trained in.

        >>> Spacing(1000, "trailing")(4)
        (array([1.  , 0.75, 0.5 , 0.25], dtype=float32),
         array([0.75, 0.5 , 0.25, 0.  ], dtype=float32))
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"{num_steps} steps are not within 1 to {total}")
        asked = self._training_steps(num_steps)
        ends = asked - total // num_steps
        ends[ends < 0] = -1 if self.ends_clean else 0
        t, s = (((i + 1) / total).astype(np.float32) for i in (asked, ends))
        return t, s

    def _training_steps(self, num_steps: int) -> np.ndarray:
        """The training steps asked for, falling; ``[num_steps]`` whole numbers."""
        total = self.num_train_timesteps
        if self.kind == "linspace":
            return np.linspace(0, total - 1, num_steps).round()[::-1]
        if self.kind == "trailing":
            # By its length, as diffusers has it: arange may end one step early or late.
            steps = np.arange(total, 0, -total / num_steps).round() - 1
            return steps[:num_steps]
        steps = np.arange(num_steps)[::-1] * float(total // num_steps)
        return np.minimum(steps + self.steps_offset, total - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What `read_scheduler` finds; see `boot_jax.teachers.base.Teacher`.

    ``to_image`` is that of a `boot_jax.teachers.base.Decoder` without parameters, where
    samples are not images.
    """

    schedule: NoiseSchedule
    prediction_type: str
    thresholding: Thresholding
    spacing: Spacing | None = None
    to_image: Callable[[Any, Array], Array] | None = None


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """Reads a ``scheduler_config.json``.

    Raises:
      TeacherError: the scheduler has no ODE that a student could follow, or one of its
        values is not supported; names it and what is.
    """
    name = str(config.get("_class_name")).removeprefix("Flax")
    if name not in SUPPORTED:
        raise TeacherError(
            f"the scheduler {name} has no ODE that a student could follow, or not one "
            f"that is known here; supported are {', '.join(SUPPORTED)}"
        )
    try:
        if name in CONTINUOUS:
            schedule, prediction_type, to_image = CONTINUOUS[name](config)
            return Scheduler(
                schedule=schedule,
                prediction_type=prediction_type,
                thresholding=Thresholding(),
                to_image=to_image,
            )
        return _discrete(name, config)
    except (TypeError, ZeroDivisionError) as error:
        raise TeacherError(f"the config of {name} cannot be used: {error}") from error


def _discrete(name: str, config: Mapping[str, Any]) -> Scheduler:
    for field, wanted in _ELSEWHERE.items():
        if config.get(field, wanted) != wanted:
            _refuse(name, field, config[field], [wanted])
    prediction_type = config.get("prediction_type", "epsilon")
    if not config.get("predict_epsilon", True):  # its name before it had three values
        prediction_type = "sample"
    if prediction_type not in PREDICTION_TYPES:
        _refuse(name, "prediction_type", prediction_type, PREDICTION_TYPES)
    try:
        schedule = from_diffusers(config)
    except (TypeError, ValueError) as error:
        raise TeacherError(f"the betas of {name} cannot be used: {error}") from error
    return Scheduler(
        schedule=schedule,
        prediction_type=prediction_type,
        thresholding=_thresholding(name, config),
        spacing=_spacing(name, config, len(schedule.betas)),
    )


def _thresholding(name: str, config: Mapping[str, Any]) -> Thresholding:
    if config.get("thresholding", False):
        return Thresholding(
            "dynamic",
            config.get("sample_max_value", 1.0),
            config.get("dynamic_thresholding_ratio", 0.995),
        )
    if name in CLIPPING and config.get("clip_sample", True):
        return Thresholding("clip", config.get("clip_sample_range", 1.0))
    return Thresholding()


def _spacing(name: str, config: Mapping[str, Any], num_train: int) -> Spacing:
    usual = "leading" if name in (*CLIPPING, "PNDMScheduler") else "linspace"
    kind = config.get("timestep_spacing", usual)
    if kind not in SPACINGS:
        _refuse(name, "timestep_spacing", kind, SPACINGS)
    return Spacing(
        num_train_timesteps=num_train,
        kind=kind,
        steps_offset=config.get("steps_offset", 0),
        ends_clean=config.get("set_alpha_to_one", name != "PNDMScheduler"),
    )


def _refuse(name: str, field: str, value: Any, supported: Any) -> NoReturn:
    choices = " or ".join(map(repr, supported))
    raise TeacherError(f"{name}: {field}={value!r} is not supported; use {choices}")
