"""What a folder is, and what distilling it takes, before anything is started.

A teacher's folder (ours, or in diffusers format), a hub id, or a workdir. The teacher's
weights are read, which finds out whether they fit; the training step is only traced, so
that neither its memory nor its time is spent. The figures are those of the program as
it is written, for one device: XLA may need less of both.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from boot_jax import config as config_lib
from boot_jax import sharding, validation
from boot_jax.conditions import prompt_encoder
from boot_jax.run import Run
from boot_jax.schedules import DiscreteSchedule, NoiseSchedule
from boot_jax.student import check_conversion
from boot_jax.student_batches import batch_shapes
from boot_jax.teachers import checkpoint as teacher_checkpoint
from boot_jax.teachers.base import Teacher, TeacherError
from boot_jax.teachers.folder import read_json
from boot_jax.training.run import optimizer_from
from boot_jax.training.state import create_state
from boot_jax.training.step import make_train_step


class InspectionError(ValueError):
    """A path with nothing that could be inspected; one line for the user."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies at a path.

    Attributes:
      kind: in words.
      config: of a run that distils it.
      workdir: of that run.
      settings: ``{field: value}`` of the config that make it that run; None where the
        config is the run's own.
    """

    kind: str
    config: Any
    workdir: pathlib.Path
    settings: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one distillation step: floating-point operations, and bytes by what they hold.

    ``activations`` are all that the backward pass is given beside the parameters.
    """

    flops: float
    teacher: int
    student: int
    gradients: int
    activations: int


def inspect(path: str, config: Any = None, batch_size: int | None = None) -> str:
    """A page of text about a folder.

    Args:
      path: a teacher's folder or hub id, or a workdir.
      config: what else the run would be; the defaults if None. A workdir has its own.
      batch_size: of a step; ``config.distill.batch_size`` if None.

    Raises:
      ValueError: one of the package's errors for what a user can mend.
    """
    found = find(path, config)
    if batch_size is not None:
        found.config.distill.batch_size = batch_size
    validation.validate(found.config)
    run = Run(found.config, found.workdir, sharding.create_mesh())
    parts = [
        f"{found.kind}: {path}",
        _table(_about(run.teacher)),
        _parameters(run.teacher.params),
        _table(_about_cost(run, step_cost(run))),
    ]
    if found.settings is None:
        parts.insert(1, _table(_progress(found)))
    else:
        parts.append(_flags(found.settings, run))
    return "\n\n".join(parts)


def find(path: str, config: Any = None) -> Found:
    """What is at a path, by the files that are there.

    Raises:
      InspectionError: nothing that is known, or a workdir without a teacher.
    """
    folder = pathlib.Path(path)
    config = config_lib.default_config() if config is None else config
    if (folder / "model.json").is_file():
        return _own_teacher(folder, config)
    if (folder / "config.json").is_file() and not (
        folder / "model_index.json"
    ).exists():
        return _workdir(folder)
    if (folder / "model_index.json").is_file() or not folder.exists():
        settings = {"teacher.source": "diffusers", "teacher.path": path}
        return _teacher("a teacher in diffusers format", config, settings)
    raise InspectionError(
        f"{path} is neither a teacher (model.json, or model_index.json of diffusers) "
        "nor a workdir (config.json)"
    )


def _own_teacher(folder: pathlib.Path, config: Any) -> Found:
    description = read_json(folder / "model.json")
    if description.get("format") == teacher_checkpoint.FORMAT:
        settings = {
            "teacher.source": "checkpoint",
            "teacher.path": str(folder),
            "teacher.prediction_type": description.get("prediction_type"),
        }
        schedule = description.get("schedule", {})
        settings |= {f"schedule.{name}": value for name, value in schedule.items()}
        found = _teacher("a teacher of boot_jax", config, settings)
        return _with_an_end(found)
    raise InspectionError(f"{folder / 'model.json'} was not written by boot_jax")


def _teacher(kind: str, config: Any, settings: dict[str, Any]) -> Found:
    # Scored against its own samples: which images it was trained on is not known here.
    settings["data.name"] = ""
    config = config.copy_and_resolve_references()  # the caller's stays as it is
    try:
        config.update_from_flattened_dict(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise InspectionError(
            f"model.json names what no config has: {' '.join(str(error).split())}"
        ) from error
    return Found(kind, config, pathlib.Path(), settings)


def _with_an_end(found: Found) -> Found:
    """With a ``t_max`` at which the teacher has an estimate."""
    config = found.config
    schedule = config_lib.schedule_from(config.schedule)
    try:
        kind, t_max = config.teacher.prediction_type, config.objective.t_max
        check_conversion(kind, schedule, t_max)
    except TeacherError:
        config.objective.t_max = 0.99
        return dataclasses.replace(
            found, settings={**(found.settings or {}), "objective.t_max": 0.99}
        )
    return found


def _workdir(folder: pathlib.Path) -> Found:
    config = config_lib.default_config()
    try:
        config.update(read_json(folder / "config.json"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InspectionError(
            f"{folder / 'config.json'} is not a config of boot_jax"
        ) from error
    trained = teacher_checkpoint.exists(folder / "teacher")
    if config.teacher.source == "train" and not trained:
        raise InspectionError(
            f"{folder} is a workdir whose teacher is not trained yet: --mode=teacher"
        )
    return Found(f"a workdir of boot_jax, {config.title!r}", config, folder)


def step_cost(run: Run) -> Cost:
    """What one distillation step takes; it is traced and lowered, never run."""
    teacher, training = run.teacher, run.config.distill
    optimizer = optimizer_from(training)
    params, text, encode = teacher.params, teacher.text, None
    batch = batch_shapes(run)
    if text is not None:
        params = {"teacher": params, "text": text.params}
        encode = prompt_encoder(text, "" if run.is_guided else None)
    loss = run.loss(encode)
    key = jax.random.key(0)
    frozen = jax.eval_shape(lambda: params)
    second = loss.auxiliary

    def create(key: Any) -> Any:
        own = None if second is None else second.create(key)
        return create_state(run.student.init(key), optimizer, own)

    state = jax.eval_shape(create, key)
    step = make_train_step(
        loss,
        optimizer,
        ema_decay=training.ema_decay,
        num_steps=training.num_steps,
    )
    one_step = jax.tree.map(lambda leaf: leaf.update(shape=(1, *leaf.shape)), batch)
    analysis: Any = step.lower(state, frozen, one_step, key).cost_analysis()  # type: ignore[attr-defined]

    def pullback(params: Any, frozen: Any, batch: Any) -> Any:
        return jax.vjp(
            lambda params: loss(params, params, frozen, batch, key, 0.0)[0], params
        )[1]

    size = _bytes(state.params)
    known = frozen if second is None else (frozen, state.auxiliary.params)
    kept = _bytes(jax.eval_shape(pullback, state.params, known, batch))
    return Cost(
        flops=float(analysis["flops"]),
        teacher=_bytes(frozen),
        student=_bytes(state),
        gradients=size,
        activations=max(kept - size, 0),  # the parameters are given to it as well
    )


def _about(teacher: Teacher) -> dict[str, str]:
    rows = {
        "network": type(teacher.network).__name__ if teacher.network else "none",
        "parameters": _size(teacher.params),
        "samples": _shape(teacher.sample_shape),
        "schedule": _schedule(teacher.schedule),
        "predicts": teacher.prediction_type or "x_0, by a formula",
        "conditions": _conditions(teacher),
        "fingerprint": teacher.fingerprint(),
    }
    if teacher.text is not None:
        rows["text encoder"] = _size(teacher.text.params)
    if teacher.decoder is not None:
        rows["samples"] += f", decoded to {_shape(teacher.decoder.image_shape)}"
        rows["decoder"] = _size(teacher.decoder.params)
    if teacher.thresholding is not None:
        rows["thresholding"] = str(teacher.thresholding)
    return rows


def _conditions(teacher: Teacher) -> str:
    if teacher.text is not None:
        return f"prompts of {teacher.text.tokenizer.row_shape[-1]} tokens"
    if teacher.num_classes is None:
        return "none"
    guided = "can be guided" if teacher.has_null_label else "no null label known"
    return f"{teacher.num_classes} classes, {guided}"


def _schedule(schedule: NoiseSchedule) -> str:
    """Its name and numbers, and what is left of the image at the end."""
    text = repr(schedule)
    if isinstance(schedule, DiscreteSchedule):
        betas = schedule.betas
        text = f"{len(betas)} betas, {betas[0]:.3g} to {betas[-1]:.3g}"
    return f"{text}; alpha is {float(schedule.alpha(jax.numpy.ones(()))):.3g} at t = 1"


def _parameters(params: Any) -> str:
    """A row for each part of the network, or for each tensor that is no part."""
    rows = [("part", "tensors", "parameters", "largest tensor")]
    for name, part in params.items():
        leaves = jax.tree.leaves(part)
        largest = max(leaves, key=lambda leaf: leaf.size)
        count = sum(leaf.size for leaf in leaves)
        rows.append((name, str(len(leaves)), f"{count:,}", _shape(largest.shape)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {tensors:>{widths[1]}}  {count:>{widths[2]}}  {shape}"
        for name, tensors, count, shape in rows
    )


def _about_cost(run: Run, cost: Cost) -> dict[str, str]:
    batch = run.config.distill.batch_size
    objective = run.objective
    together = cost.teacher + cost.student + cost.gradients + cost.activations
    return {
        f"a step of {batch}": f"{objective.kind}, {objective.solver} target, network "
        f"in {run.config.network.dtype}, remat={run.config.network.remat}",
        "operations": f"{cost.flops:.3g}, {cost.flops / batch:.3g} for each noise",
        "teacher": _memory(cost.teacher),
        "student": f"{_memory(cost.student)}, with moving average and optimizer",
        "gradients": _memory(cost.gradients),
        "activations": f"{_memory(cost.activations)} for the backward pass",
        "together": f"about {_memory(together)}",
    }


def _progress(found: Found) -> dict[str, str]:
    """How far the student of a workdir is."""
    folders = [found.workdir, *(found.workdir / "stages").glob("*")]
    steps = [
        max(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())
        for checkpoints in (folder / "checkpoints" for folder in folders)
        if any(path.name.isdigit() for path in checkpoints.glob("*"))
    ]
    done = f"step {sum(steps):,}" if steps else "not begun"
    rows = {"student": f"{done} of {found.config.distill.num_steps:,}"}
    for name in ("results.json", "report.html", "export"):
        if (found.workdir / name).exists():
            rows[name] = "there"
    return rows


def _flags(settings: Mapping[str, Any], run: Run) -> str:
    """The fields to set, as they are given to the command."""
    lines = [f"--config.{name}={_quoted(value)}" for name, value in settings.items()]
    if run.teacher.num_classes is not None and run.teacher.has_null_label:
        lines.append("--config.teacher.guidance_scale=1.0  # or more")
    if run.teacher.text is not None:
        lines.append("--config.prompts.path=FILE  # of prompts, to learn from")
        lines.append("--config.teacher.guidance_scale=7.5  # or another")
    return "to distil it, set in the config:\n" + "\n".join(lines)


def _quoted(value: Any) -> str:
    return '""' if value == "" else str(value)


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _size(params: Any) -> str:
    if not jax.tree.leaves(params):
        return "none"
    leaves = jax.tree.leaves(params)
    count = sum(leaf.size for leaf in leaves)
    return f"{count:,} in {len(leaves)} tensors, {_memory(_bytes(params))}"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _memory(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
