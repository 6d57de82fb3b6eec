"""The trainings that make a student: one, or for progressive distillation several.

Each stage but the last one lies in ``workdir/stages/NN``, with checkpoints and logs of
its own; the last one in the workdir itself, where a student is looked for. They share
``distill.num_steps`` equally, the last one taking what does not divide; the learning
rate warms up and decays in each. An interrupted run goes on in the newest stage that
has begun; what was learned in those before it stays as it is.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from boot_jax.guidance import Denoiser
from boot_jax.objectives import Objective
from boot_jax.run import Run

# The keys of the stages but the last, whose key is that of any student.
_STAGE_STREAM = 2**31 + 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What `boot_jax.training.run.train` is given for one stage.

    Attributes:
      directory: of checkpoints and logs.
      name: shown beside the progress.
      objective: of this stage.
      denoise, frozen: its teacher.
      init: ``key -> params``.
      key: everything random derives from it and the step.
      training: the config's section, with the number of steps of this stage.
      metadata: kept in its checkpoints.
      is_last: whether its student is the run's.
    """

    directory: pathlib.Path
    name: str
    objective: Objective
    denoise: Denoiser
    frozen: Any
    init: Callable[[Array], Any]
    key: Array
    training: Any
    metadata: dict[str, Any]
    is_last: bool


def stage_lengths(num_steps: int, num_stages: int) -> list[int]:
    """The steps of each stage.

    >>> stage_lengths(5000, 4), stage_lengths(11, 3)
    ([1250, 1250, 1250, 1250], [3, 3, 5])
    """
    share = num_steps // num_stages
    return [share] * (num_stages - 1) + [num_steps - share * (num_stages - 1)]


def stage_directories(workdir: pathlib.Path, num_stages: int) -> list[pathlib.Path]:
    """Where each stage lies, in turn."""
    before = [workdir / "stages" / f"{i:02d}" for i in range(1, num_stages)]
    return [*before, workdir]


def run_stages(run: Run, train_stage: Callable[[Stage], Any]) -> Any:
    """Trains what is left to train; gives the last stage's state.

    Args:
      run: whose.
      train_stage: trains one, from its newest checkpoint if there is one, and gives its
        state, whose ``ema_params`` are the next stage's teacher.
    """
    count = run.objective.num_stages
    folders = stage_directories(run.workdir, count)
    begun = [i for i, folder in enumerate(folders) if (folder / "checkpoints").is_dir()]
    newest = max(begun, default=0)
    state = None
    for index in range(max(newest - 1, 0), count):
        stage = _stage(run, index, None if state is None else state.ema_params)
        if index < newest:  # another has begun from it
            stage.training.num_steps = 0
        state = train_stage(stage)
    return state


def _stage(run: Run, index: int, taught: Any) -> Stage:
    """One stage, of the parameters ``taught`` in the one before, where they matter."""
    count = run.objective.num_stages
    training = run.config.distill.copy_and_resolve_references()
    training.num_steps = stage_lengths(training.num_steps, count)[index]
    is_last = index == count - 1
    key = jax.random.key(run.config.seed, impl="threefry2x32")
    number, metadata = f"stage {index + 1} of {count}", run.metadata
    if not is_last:
        metadata["identity"] |= {"stage": number}
    denoise, frozen, init = run.denoise, run.frozen, run.student.init
    if taught is not None:
        assert run.student.denoise is not None
        denoise = run.student.denoise
        is_mapped = run.encode is not None
        frozen = {**frozen, "teacher": taught} if is_mapped else taught
        init = lambda key: taught  # noqa: E731
    return Stage(
        directory=stage_directories(run.workdir, count)[index],
        name="student" if count == 1 else f"student, {number}",
        objective=dataclasses.replace(
            run.objective, teacher_steps=run.objective.teacher_steps >> index
        ),
        denoise=denoise,
        frozen=frozen,
        init=init,
        key=jax.random.fold_in(key, 2**31 if is_last else _STAGE_STREAM + index),
        training=training,
        metadata=metadata,
        is_last=is_last,
    )
