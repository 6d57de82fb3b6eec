"""The modes of the command: what each does, from a config and a workdir.

teacher   train the teacher, where the config says so
distill   train the student
sample    images from the student
evaluate  compare both, and write the report
compare   train and score several methods, and write a table of them
export    the student for PyTorch diffusers, for jax alone, and as plain weights
all       whatever of the first two is missing, then evaluate (the default)
"""

import functools
import json
import pathlib
import sys
from typing import Any

from boot_jax import config as config_lib
from boot_jax import data as data_lib
from boot_jax import (
    distributed,
    gallery,
    interruption,
    judging,
    sharding,
    stages,
    student_batches,
    summary,
    validation,
)
from boot_jax.evaluation.features import FeatureError
from boot_jax.evaluation.options import check_options
from boot_jax.export.card import origin_of
from boot_jax.export.finished import ExportError, FinishedStudent
from boot_jax.export.folder import write_export
from boot_jax.interruption import Interruption
from boot_jax.models import is_convolutional
from boot_jax.models.weights import WeightsError
from boot_jax.prompts import PromptError
from boot_jax.recall import RecallCheck
from boot_jax.run import Run
from boot_jax.teachers.base import TeacherError
from boot_jax.tokenizers import TokenizerError
from boot_jax.trained import trained_pair
from boot_jax.training.checkpoints import CheckpointError
from boot_jax.training.run import train
from boot_jax.training.state import TrainState
from boot_jax.workdir import WorkdirError, open_workdir

#: What a user can mend; `boot_jax.main` answers each in one line.
USER_ERRORS = (
    CheckpointError,
    config_lib.ConfigError,
    data_lib.DataError,
    distributed.DistributedError,
    ExportError,
    FeatureError,
    PromptError,
    sharding.MeshError,
    TeacherError,
    TokenizerError,
    WeightsError,
    WorkdirError,
)


def distill(run: Run) -> TrainState:
    """Trains the student to the end, or reads it if it is trained."""
    config, training = run.config, run.config.distill
    sharding.check_batch_size(
        "distill.batch_size", training.batch_size, run.mesh, training.microbatches
    )
    corrected = run.objective.correction.strength > 0
    check = RecallCheck(run) if corrected and config.run.recall_every else None
    encode, batches = run.encode, student_batches.batches_of(run)
    grids = gallery.TrainingGrids(run) if config.run.sample_every else None

    def train_stage(stage: stages.Stage) -> TrainState:
        return train(
            stage.directory,
            stage.name,
            loss=run.loss(
                encode,
                sharding.batch_sharding(run.mesh, axis=1),
                stage.objective,
                stage.denoise,
                None if check is None else check.variance,
            ),
            init=stage.init,
            frozen=stage.frozen,
            batches=batches,
            key=stage.key,
            training=stage.training,
            config=config,
            mesh=run.mesh,
            metadata=stage.metadata,
            interruption=run.interruption,
            convolutional=is_convolutional(run.student.network),
            show=grids if stage.is_last else None,
            check=check,
        )

    return stages.run_stages(run, train_stage)


def evaluate(run: Run) -> pathlib.Path:
    """Compares student and teacher; writes ``results.json`` and ``report.html``.

    Returns:
      The report's path.
    """
    pair, watch = trained_pair(run), summary.Stopwatch()
    results, (rows, note) = judging.judge(run, pair, watch.progress)
    return summary.write(
        run.workdir, run.config, results, rows, note, pair, run.mesh, watch.seconds()
    )


def export(run: Run) -> pathlib.Path:
    """Writes the student in forms that others can run; gives the folder."""
    if run.config.student.output != "signal":
        raise ExportError(
            f"student.output is {run.config.student.output!r}, but only students whose "
            "output is the signal can be exported"
        )
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
    check_options(config)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    folder = open_workdir(workdir, config)
    run = Run(config, folder, mesh, asked or Interruption())
    if mode == "teacher":
        teacher, source = run.teacher, config.teacher
        where = run.workdir / "teacher" if source.source == "train" else source.path
        return f"teacher: {where or source.source} ({teacher.fingerprint()})"
    if mode == "sample":
        return f"samples: {gallery.sample(run)}"
    if mode == "export":
        return f"export: {export(run)}"
    if mode == "compare":
        from boot_jax import comparing  # it stands on this floor, and imports this

        return f"comparison: {comparing.compare(run)}"
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
    except distributed.PeersMissing as error:
        interruption.say(f"{error}; the same command goes on")
        return interruption.EXIT_STUCK
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
