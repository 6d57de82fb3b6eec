"""The modes of the command: what each does, from a config and a workdir.

teacher   train the teacher, where the config says so
distill   train the student
sample    images from the student
evaluate  compare both, and write the report
export    the student for PyTorch diffusers, for jax alone, and as plain weights
all       whatever of the first two is missing, then evaluate (the default)
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax import config as config_lib
from boot_jax import data as data_lib
from boot_jax import (
    distributed,
    interruption,
    sampling,
    sharding,
    summary,
    validation,
)
from boot_jax.evaluation import paired
from boot_jax.evaluation.features import FEATURES, get_features
from boot_jax.export.card import origin_of
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folder import write_export
from boot_jax.interruption import Interruption
from boot_jax.models.weights import WeightsError
from boot_jax.run import Run
from boot_jax.teachers.base import TeacherError
from boot_jax.teachers.mixture import sample_mixture
from boot_jax.training.checkpoints import CheckpointError, Checkpoints
from boot_jax.training.logs import record
from boot_jax.training.run import state_template, train
from boot_jax.training.state import TrainState
from boot_jax.training.step import distillation_loss
from boot_jax.workdir import WorkdirError, open_workdir

#: What a user can mend; `boot_jax.main` answers each in one line.
USER_ERRORS = (
    CheckpointError,
    config_lib.ConfigError,
    data_lib.DataError,
    distributed.DistributedError,
    ExportError,
    sharding.MeshError,
    TeacherError,
    WeightsError,
    WorkdirError,
)


def distill(run: Run) -> TrainState:
    """Trains the student to the end, or reads it if it is trained."""
    config, teacher = run.config, run.teacher
    training = config.distill
    sharding.check_batch_size(
        "distill.batch_size", training.batch_size, run.mesh, training.microbatches
    )
    key = jax.random.key(config.seed, impl="threefry2x32")
    return train(
        run.workdir,
        "student",
        loss=distillation_loss(
            signal=run.student.signal,
            denoise=run.denoise,
            schedule=teacher.schedule,
            objective=run.objective,
            conditions=run.conditions,
            sample_shape=teacher.sample_shape,
            batch_size=training.batch_size,
            batch_sharding=sharding.batch_sharding(run.mesh, axis=1),
        ),
        init=run.student.init,
        frozen=run.placed_teacher.params,
        batches=None,
        key=jax.random.fold_in(key, 2**31),
        training=training,
        config=config,
        mesh=run.mesh,
        metadata=run.metadata,
        interruption=run.interruption,
    )


def trained_pair(run: Run) -> paired.Pair:
    """The student of the newest checkpoint, and its teacher.

    Raises:
      CheckpointError: there is none, or it is of another run.
    """
    if not (run.workdir / "checkpoints").is_dir():
        raise CheckpointError(
            f"there is no student in {run.workdir}; train one with --mode=distill"
        )
    checkpoints = Checkpoints(
        run.workdir / "checkpoints",
        run.metadata,
        force=run.config.run.force,
        record=functools.partial(record, run.workdir),
    )
    template = state_template(
        run.student.init, run.config.distill, run.mesh, run.config.mesh
    )
    state = checkpoints.restore(template)
    checkpoints.close()
    scale = run.config.sample.guidance_scale if run.guidance_range else None
    return paired.Pair(
        signal=run.student.signal,
        params=state.ema_params,
        denoise=run.denoise,
        teacher=run.placed_teacher,
        objective=run.objective,
        guidance_scale=scale,
    )


def sample(run: Run) -> pathlib.Path:
    """Writes images of the student: one grid, and each alone.

    Image ``i`` of a seed is the same whatever the batch size or the number of devices.
    With ``sample.interpolate_to`` they lie on the great circle between image 0 of
    either seed.

    Returns:
      The folder, under ``samples`` in the workdir.
    """
    options, pair = run.config.sample, trained_pair(run)
    noise, name = pair.noise(options.seed), f"seed_{options.seed}"
    between = options.interpolate_to >= 0
    if options.label >= 0:
        name += f"_label_{options.label}"
    if pair.guidance_scale is not None:
        name += f"_guidance_{pair.guidance_scale:g}"
    if between:
        noise = _great_circle(pair, options)
        name += f"_to_{options.interpolate_to}"

    def condition(indices: np.ndarray) -> Any:
        # Between two seeds everything else is held.
        return pair.condition(indices * (not between), options.label)

    images = sampling.generate(
        pair.student(), noise, condition, options.num, options.batch_size, run.mesh
    ).images
    folder = run.workdir / "samples" / name
    images = sampling.to_images(run.teacher.decoder, images, options.batch_size)
    distributed.on_main(lambda: summary.save_images(folder, images))
    return folder


def _great_circle(pair: paired.Pair, options: Any) -> Callable[[np.ndarray], Array]:
    """Noise from image 0 of one seed to image 0 of the other, by image index."""
    first = np.zeros(1, int)
    start, end = (
        pair.noise(seed)(first)[0] for seed in (options.seed, options.interpolate_to)
    )
    steps = max(options.num - 1, 1)
    return lambda indices: sampling.slerp(
        start, end, jnp.asarray(indices / steps, jnp.float32)
    )


def evaluate(run: Run) -> pathlib.Path:
    """Compares student and teacher; writes ``results.json`` and ``report.html``.

    Returns:
      The report's path.
    """
    pair, options = trained_pair(run), run.config.evaluation
    features = get_features(options.features, run.teacher.sample_shape)
    real, provenance = _real_images(run)
    watch = summary.Stopwatch()
    results, rows = paired.compare(
        pair, options, features, real, run.mesh, progress=watch.progress
    )
    results["data"] = provenance
    return summary.write(
        run.workdir, run.config, results, rows, pair, run.mesh, watch.seconds()
    )


def _real_images(run: Run) -> tuple[np.ndarray | None, str]:
    """What the samples are scored against, and where it comes from."""
    most = run.config.evaluation.num_real
    if run.dataset is not None:
        count = min(most, len(run.dataset))
        return run.dataset.images(np.arange(count)), run.dataset.provenance
    if run.config.teacher.source == "mixture":
        key = jax.random.key(run.config.evaluation.seed, impl="threefry2x32")
        images = sample_mixture(run.teacher, key, most)
        return np.asarray(images), f"{most} exact samples of the mixture"
    return None, "the teacher's own ODE samples: the config names no data"


def export(run: Run) -> pathlib.Path:
    """Writes the student in forms that others can run; gives the folder."""
    pair, results = trained_pair(run), run.workdir / "results.json"
    finished = FinishedStudent(
        student=run.student,
        params=sharding.to_host(pair.params),
        teacher=run.teacher,
        objective=run.objective,
        guidance_scale=pair.guidance_scale,
    )
    folder = run.workdir / "export"
    write = functools.partial(
        write_export,
        folder,
        finished,
        config=run.config,
        results=json.loads(results.read_text()) if results.exists() else None,
        origin=origin_of(run.config, run.workdir, run.teacher.fingerprint()),
        warn=lambda text: print(f"export: {text}", file=sys.stderr),
    )
    distributed.on_main(lambda: write() and None)
    return folder


def inspect(path: str, config: Any, batch_size: int | None) -> int:
    """Prints what a teacher, a workdir or a config is; gives the exit code."""
    from boot_jax import inspection  # it stands on this floor, and imports this module

    try:
        print(inspection.inspect(path, config, batch_size))
    except (*USER_ERRORS, inspection.InspectionError) as error:
        interruption.say(f"error: {error}")
        return interruption.EXIT_REFUSED
    return 0


def execute(
    mode: str, config: Any, workdir: str, asked: Interruption | None = None
) -> str:
    """Runs one mode of the command; gives the line to print at its end.

    Raises:
      ValueError: one of `USER_ERRORS`, for what a user can mend.
      FloatingPointError: a loss or gradient is not finite.
      Preempted: the run was asked to stop, and has saved.
    """
    validation.validate(config)
    if config.evaluation.features not in FEATURES:
        raise config_lib.ConfigError(
            f"evaluation.features is {config.evaluation.features!r}, but must be one "
            f"of {', '.join(FEATURES)}"
        )
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    folder = open_workdir(workdir, config)
    run = Run(config, folder, mesh, asked or Interruption())
    if mode == "teacher":
        _ = run.teacher
        return f"teacher: {run.workdir / 'teacher'}"
    if mode == "sample":
        return f"samples: {sample(run)}"
    if mode == "export":
        return f"export: {export(run)}"
    if mode in ("all", "distill"):
        distill(run)
    if mode == "distill":
        return f"student: {run.workdir / 'checkpoints'}"
    return f"report: {evaluate(run)}"


def answer(
    mode: str,
    config: Any,
    workdir: str,
    cluster: dict[str, Any],
    asked: Interruption,
) -> int:
    """Runs one mode among whatever processes there are; says how it ended.

    Args:
      mode, config, workdir: see `execute`.
      cluster: arguments of `boot_jax.distributed.start`, its mode as ``distributed``.
      asked: the signals, heard already.

    Returns:
      The exit code of `boot_jax.main`.
    """
    try:
        heartbeat = config.run.heartbeat_seconds
        mode_of_cluster = cluster.pop("distributed")
        distributed.start(mode_of_cluster, **cluster, heartbeat_seconds=heartbeat)
        asked.join()
        done = execute(mode, config, workdir, asked)
    except USER_ERRORS as error:
        interruption.say(f"error: {error}")
        return interruption.EXIT_REFUSED
    except FloatingPointError as error:
        interruption.say(f"stopped: {error}")
        return interruption.EXIT_NOT_FINITE
    except interruption.Preempted as stop:
        interruption.say(f"{stop}; the same command goes on")
        return interruption.EXIT_PREEMPTED
    except (OSError, RuntimeError, ValueError) as error:
        if distributed.is_lost_peer(error):
            interruption.abandon(error)
        if not isinstance(error, OSError):
            raise
        interruption.say(
            f"error: {error.filename or 'a file'}: {error.strerror or error}"
        )
        return interruption.EXIT_REFUSED
    if distributed.is_main():
        print(done)
    return 0
