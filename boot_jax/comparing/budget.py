"""How many steps each method gets, so that all cost the same."""

import copy
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax

from boot_jax import distributed, pipeline
from boot_jax.config import ConfigError
from boot_jax.objectives.calls import Calls, calls_before, calls_of
from boot_jax.run import Run
from boot_jax.training.logs import read_metrics
from boot_jax.training.loop import default_dispatch, dispatch_length
from boot_jax.workdir import write_text

# Lines of the log of a timing; the first does not count.
_TIMED = 6
# A number of steps is rounded to a multiple of at most one part in so many.
_ROUNDING = 50


def calls_per_step(run: Run) -> Calls:
    """What one step of a run's training costs: the evaluations of a whole batch."""
    return calls_of(run.objective, run.is_guided).times(run.config.distill.batch_size)


def calls_of_training(run: Run, steps: int) -> Calls:
    """What all of a run's training costs, in so many steps."""
    calls, before = (
        calls_per_step(run).times(steps),
        calls_before(run.objective, run.is_guided),
    )
    return dataclasses.replace(calls, teacher=calls.teacher + before)


def steps_within(base: Run, run: Run, amount: float) -> int:
    """The steps of a method that cost ``amount`` times what the config's own run does.

    Args:
      base: the config's own run; its ``compare.budget`` is ``calls`` or ``steps``.
      run: of the method.
      amount: of the budget.

    Raises:
      ConfigError: the calls do not suffice for what comes before the first step.
    """
    steps = amount * base.config.distill.num_steps
    if base.config.compare.budget == "calls":
        given = amount * calls_of_training(base, base.config.distill.num_steps).total
        before = calls_before(run.objective, run.is_guided)
        if before >= given:
            raise ConfigError(
                f"its stored samples take {before:,} network calls, but the budget is "
                f"{given:,.0f}; set objective.stored_samples lower, or compare.amounts "
                "higher"
            )
        steps = (given - before) / calls_per_step(run).total
    return rounded_steps(steps, base.config.run)


def rounded_steps(steps: float, section: Any) -> int:
    """A number of steps that divides into dispatches of many; at most 1 % off.

    Args:
      steps: to be rounded; 1 at least is given.
      section: the config's ``run``: the steps between checkpoints, and in a dispatch.
    """
    wanted = section.steps_per_dispatch or default_dispatch(convolutional=False)
    most = max(1, min(wanted, int(steps / _ROUNDING)))
    unit = dispatch_length(most, section.checkpoint_every)
    return max(1, round(steps / unit)) * unit


def seconds_per_step(run: Run, folder: pathlib.Path) -> float:
    """What a step of a run takes once it is compiled, timed on a short run.

    Args:
      run: of the method.
      folder: of the method, where ``timing.json`` keeps what was found on these devices
        for this config.

    Raises:
      FloatingPointError: a loss or gradient is not finite.
    """
    kept = folder / "timing.json"
    about = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "objective": run.config.objective.to_dict(),
        "student": run.config.student.to_dict(),
        "batch_size": run.config.distill.batch_size,
    }
    about = json.loads(json.dumps(about))

    def read() -> float | None:
        if not kept.is_file():
            return None
        found = json.loads(kept.read_text())
        return found["seconds_per_step"] if found["about"] == about else None

    found = distributed.on_main(read)
    if found is None:
        found = _timed(run, folder / "timing")
        text = json.dumps({"seconds_per_step": found, "about": about}, indent=2)
        distributed.on_main(lambda: write_text(kept, text + "\n"))
    return found


def _timed(run: Run, folder: pathlib.Path) -> float:
    config = copy.deepcopy(run.config)
    every = config.run.steps_per_dispatch or default_dispatch(convolutional=False)
    config.distill.num_steps = _TIMED * every
    config.run.update(
        log_every=every,
        checkpoint_every=_TIMED * every,
        sample_every=0,
        tensorboard=False,
        wandb_project="",
    )

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def read() -> float:
        seconds, steps = 0.0, 0
        for path in sorted(folder.rglob("metrics.jsonl")):
            rows = read_metrics(path.parent)
            first = min(1, len(rows) - 1)  # a stage may have a single line
            start = rows[first - 1]["step"] if first else 0
            seconds += sum(row["seconds"] for row in rows[first:])
            steps += int(rows[-1]["step"] - start)
        return seconds / steps

    distributed.on_main(clear)
    try:
        pipeline.distill(dataclasses.replace(run, config=config, workdir=folder))
        return distributed.on_main(read)
    finally:
        distributed.on_main(clear)
