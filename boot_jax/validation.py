"""Whether a config makes sense: the one place where it is checked, at the border.

Each refusal says in one line what is wrong and what would be right; nothing below
re-checks it.
"""

import functools
import math
from typing import Any

from boot_jax import sharding
from boot_jax.config import (
    NETWORKS,
    TEACHER_SOURCES,
    ConfigError,
    objective_from,
    schedule_from,
    unknown,
)
from boot_jax.models.layers import REMAT_POLICIES
from boot_jax.objectives import RENOISE, Objective
from boot_jax.prediction import PREDICTION_TYPES, THRESHOLDING
from boot_jax.prompts.embeddings import DTYPES
from boot_jax.student import OUTPUTS, TIME_CONDITIONINGS, check_conversion
from boot_jax.training.state import LEARNING_RATE_DECAYS

#: What computes attention: JAX's choice, or one of its implementations.
ATTENTION = ("auto", "xla", "cudnn")

_CHOICES = {
    "teacher.source": TEACHER_SOURCES,
    "teacher.prediction_type": PREDICTION_TYPES,
    "teacher.thresholding": tuple(THRESHOLDING),
    "teacher.training.decay": LEARNING_RATE_DECAYS,
    "network.name": NETWORKS,
    "network.dtype": ("float32", "bfloat16"),
    "network.remat": REMAT_POLICIES,
    "network.attention": ATTENTION,
    "prompts.embeddings": ("none", *DTYPES),
    "teacher.param_dtype": ("float32", "bfloat16"),
    "student.time_conditioning": ("auto", *TIME_CONDITIONINGS),
    "student.output": OUTPUTS,
    "sample.renoise": RENOISE,
    "evaluation.student_renoise": RENOISE,
    "distill.decay": LEARNING_RATE_DECAYS,
}

_TRAINING = "num_steps batch_size learning_rate max_grad_norm microbatches"
_POSITIVE = tuple(
    f"{section}.{name}"
    for section, names in {
        "teacher.training": _TRAINING,
        "distill": _TRAINING,
        "student": "num_half_waves",
        "evaluation": "num_images num_real batch_size ode_steps error_times "
        "error_images grid_images neighbours",
        "sample": "num batch_size steps",
        "run": "log_every checkpoint_every keep_checkpoints heartbeat_seconds "
        "sample_images",
        "mesh": "fsdp tensor",
    }.items()
    for name in names.split()
)


def _field(config: Any, path: str) -> Any:
    return functools.reduce(lambda tree, name: tree[name], path.split("."), config)


def _check_choices(config: Any) -> None:
    for path, known in _CHOICES.items():
        if _field(config, path) not in known:
            raise ConfigError(unknown(path, _field(config, path), known))


def _check_positive(config: Any) -> None:
    for path in _POSITIVE:
        if not _field(config, path) > 0:
            raise ConfigError(f"{path} is {_field(config, path)}, but must be positive")


def _check_training(section: str, training: Any) -> None:
    for name in ("b1", "b2", "ema_decay", "warmup_steps", "weight_decay"):
        limit = math.inf if name in ("warmup_steps", "weight_decay") else 1
        if not 0 <= training[name] < limit:
            raise ConfigError(
                f"{section}.{name} is {training[name]}, but must lie in [0, {limit})"
            )
    if training.skip_nonfinite < 0:
        raise ConfigError(
            f"{section}.skip_nonfinite is {training.skip_nonfinite}, but must be 0 "
            "(stop at once) or the number of steps that may be skipped"
        )


def _check_microbatches(config: Any, objective: Any) -> None:
    """Shares are every so-many-th image: of every microbatch alike."""
    training = config.distill
    if training.batch_size % training.microbatches:
        return  # refused with the mesh, which knows the sizes that would do
    size = training.batch_size // training.microbatches
    for stride, what, share in (
        (objective.boundary_stride, "the boundary loss takes", "boundary_share"),
        (objective.start_stride, "a start below t_max takes", "start_share"),
    ):
        if size % stride:
            raise ConfigError(
                f"distill.batch_size / distill.microbatches is {size}, but must be a "
                f"multiple of {stride}: {what} every {stride}th image "
                f"(objective.{share} = {getattr(objective, share):g})"
            )


def _check_starts(config: Any, objective: Any) -> None:
    """Starts below ``t_max`` are told to the student by the teacher's time input."""
    student = config.student
    told = student.time_conditioning in ("auto", "added")
    if objective.start_times and not (told and student.output == "signal"):
        raise ConfigError(
            "objective.start_times needs student.time_conditioning='added', whose "
            "network is told where it starts, and student.output='signal'"
        )
    if config.sample.steps > 1 and not objective.start_times:
        raise ConfigError(
            f"sample.steps is {config.sample.steps}, but the student only learned to "
            "start from noise; train it with objective.start_times=(0.1, 1.0), or set "
            "sample.steps=1"
        )


def _check_correction(config: Any, objective: Any) -> None:
    """It takes every so-many-th image, and the boundary loss so many of the rest."""
    correction, training = objective.correction, config.distill
    if correction.strength == 0 or training.batch_size % training.microbatches:
        return
    part = training.batch_size // training.microbatches
    strides = {
        "share": (correction.stride, part // correction.stride),
        "auxiliary_share": (correction.auxiliary_stride, part),
    }
    for name, (stride, images) in strides.items():
        if part % stride or images < 2:
            raise ConfigError(
                f"distill.batch_size / distill.microbatches is {part}, but must be a "
                f"multiple of {stride}, and more than that: objective.correction."
                f"{name} = {getattr(correction, name):g} takes every {stride}th image"
            )
    rest = part - part // correction.stride
    for name, share, every in (
        ("boundary_share", objective.boundary_share, objective.boundary_stride),
        ("start_share", objective.start_share, objective.start_stride),
    ):
        if rest % every:
            raise ConfigError(
                f"objective.correction.share = {correction.share:g} leaves {rest} "
                f"images of {part} to the trajectories, of which objective.{name} = "
                f"{share:g} takes every {every}th; choose shares that divide"
            )


def _check_run(config: Any) -> None:
    for name in (
        "keep_every",
        "watchdog_seconds",
        "spike_factor",
        "sample_every",
        "recall_every",
        "recall_drop",
    ):
        if not config.run[name] >= 0:
            raise ConfigError(
                f"run.{name} is {config.run[name]}, but must be positive, or 0 for none"
            )
    if config.run.recall_images < 4:
        raise ConfigError(
            f"run.recall_images is {config.run.recall_images}, but must be at least 4: "
            "recall looks at three neighbours of each"
        )
    for name in ("rules", "teacher_rules"):
        try:
            sharding.check_rules(config.mesh[name])
        except sharding.MeshError as error:
            raise ConfigError(f"mesh.{name}: {error}") from error


def _check_evaluation(evaluation: Any) -> None:
    for name in ("ddim_steps", "student_steps"):
        steps = evaluation[name]
        if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
            raise ConfigError(
                f"evaluation.{name} is {tuple(steps)}, but must be positive numbers of "
                "steps, at least one, each once"
            )
    if min(evaluation.num_images, evaluation.num_real) <= evaluation.neighbours:
        raise ConfigError(
            "evaluation.num_images and evaluation.num_real must be more than "
            f"evaluation.neighbours = {evaluation.neighbours}"
        )


def _check_guidance(config: Any) -> None:
    teacher = config.teacher
    guided = teacher.guidance_scale != 1.0 or teacher.guidance_range
    conditional = config.data.labels or config.data.captions
    if teacher.source == "train" and guided and not conditional:
        raise ConfigError(
            "guidance needs a class-conditional teacher (set data.labels=True) or one "
            "that takes prompts (data.captions=True); or set "
            "teacher.guidance_scale=1.0 and an empty teacher.guidance_range"
        )
    if config.data.labels and config.data.captions:
        raise ConfigError("data.labels and data.captions are both set; choose one")
    low, high = interval = tuple(teacher.guidance_interval)
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"teacher.guidance_interval is {interval}, but must be (t_low, t_high) in "
            "[0, 1]; all of it is (0.0, 1.0)"
        )
    if not 0 <= teacher.guidance_rescale <= 1:
        raise ConfigError(
            f"teacher.guidance_rescale is {teacher.guidance_rescale}, but must lie in "
            "[0, 1]"
        )
    drawn = tuple(teacher.guidance_range)
    if drawn and (len(drawn) != 2 or not drawn[0] <= drawn[1]):
        raise ConfigError(
            f"teacher.guidance_range is {drawn}, but must be (w_min, w_max) or empty"
        )
    told = config.sample.guidance_scale
    if not drawn and told != 1.0:
        raise ConfigError(
            f"sample.guidance_scale is {told}, but the student was not trained on a "
            "range of them (teacher.guidance_range); leave it at 1"
        )
    if drawn and not drawn[0] <= told <= drawn[1]:
        raise ConfigError(
            f"sample.guidance_scale is {told}, but must lie in the range that the "
            f"student learns, teacher.guidance_range = {drawn}"
        )


def _check_attention(config: Any) -> None:
    if config.network.attention != "cudnn":
        return
    if config.network.dtype != "bfloat16":
        raise ConfigError(
            "network.attention is 'cudnn', which computes in 16 bits: set "
            "network.dtype='bfloat16', or network.attention='auto'"
        )
    objective = config.objective
    if objective.kind in ("continuous", "pid") and objective.derivative == "jvp":
        raise ConfigError(
            "network.attention is 'cudnn', which has no jvp: set "
            "objective.derivative='finite_difference' or network.attention='xla'"
        )


def _check_kind(config: Any, objective: Objective) -> None:
    """Refuses what does not go with the objective's kind."""
    kind, told = objective.kind, config.student.time_conditioning
    if told != "auto" and (told != "noise_level") != objective.has_target_time:
        fitting = (
            "'added' or 'reused'" if objective.has_target_time else "'noise_level'"
        )
        raise ConfigError(
            f"student.time_conditioning is {told!r}, but objective.kind {kind!r} needs "
            f"{fitting}; 'auto' chooses it"
        )
    exact = config.teacher.source == "mixture"
    if objective.needs_images and not config.data.name and not exact:
        raise ConfigError(
            f"objective.kind {kind!r} needs real images: set data.name; boot, "
            "continuous, pid and direct do not"
        )
    if config.distill.num_steps < objective.num_stages:
        raise ConfigError(
            f"distill.num_steps is {config.distill.num_steps}, but must be at least "
            f"{objective.num_stages}, the stages of objective.teacher_steps = "
            f"{objective.teacher_steps}"
        )


def validate(config: Any) -> None:
    """Checks a config as a whole, before anything is written or compiled.

    Raises:
      ConfigError: the first thing that is wrong, in one line.
    """
    _check_choices(config)
    _check_positive(config)
    _check_training("teacher.training", config.teacher.training)
    _check_training("distill", config.distill)
    _check_evaluation(config.evaluation)
    _check_guidance(config)
    _check_attention(config)
    _check_run(config)
    schedule = schedule_from(config.schedule)
    objective = objective_from(config.objective)
    _check_microbatches(config, objective)
    _check_correction(config, objective)
    _check_starts(config, objective)
    _check_kind(config, objective)
    if config.teacher.source in ("train", "checkpoint", "mixture"):
        prediction = config.teacher.prediction_type
        if config.teacher.source == "mixture":
            prediction = "v_prediction"  # of its student, which has a new network
        try:
            check_conversion(
                prediction, schedule, objective.t_max, config.student.output
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    means, scales = (len(config.teacher.mixture[name]) for name in ("means", "scales"))
    if config.teacher.source == "mixture" and (not means or means != scales):
        raise ConfigError(
            f"teacher.mixture has {means} means and {scales} scales; as many of each, "
            "at least one, are needed"
        )
    if config.teacher.source == "train" and not config.data.name:
        raise ConfigError(
            "teacher.source is 'train', but data.name is empty; name the images to "
            "train on (digits, folder or tfds:NAME)"
        )
    source = config.teacher.source
    folders = ("checkpoint", "diffusers", "flax_pipeline")
    if source in folders and not config.teacher.path:
        file = "model.json" if source == "checkpoint" else "model_index.json"
        hint = f"but teacher.path is empty; give the folder that holds {file}"
        raise ConfigError(f"teacher.source is {source!r}, {hint}")
