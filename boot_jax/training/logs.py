"""What a run says: progress bar, ``metrics.jsonl``, TensorBoard, ``events.jsonl``."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from boot_jax.config import ConfigError
from boot_jax.training.health import SKIPPED, Health


class Logger:
    """Writes the metrics of finished steps; only process 0 writes anything.

    A line of ``metrics.jsonl`` is ``{"step", "seconds", "images_per_second", "loss",
    ...}``, means over the steps since the line before, without those that were skipped.
    On a resume, lines beyond the restored step are dropped, so that the file has each
    step once.

    Args:
      directory: of the run.
      name: shown before the progress bar.
      start_step, num_steps, batch_size: of the run.
      log_every: steps between lines.
      tensorboard: whether to write event files as well.
      wandb_project: a Weights & Biases project, or "" for none.
      health: examines the steps first.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        name: str,
        *,
        start_step: int,
        num_steps: int,
        batch_size: int,
        log_every: int = 100,
        tensorboard: bool = True,
        wandb_project: str = "",
        health: Health | None = None,
    ) -> None:
        self._directory = pathlib.Path(directory)
        self._main = jax.process_index() == 0
        self._health = health or Health([])
        self._batch_size, self._log_every = batch_size, log_every
        self._rows: list[dict[str, np.ndarray]] = []
        self._step, self._count, self._time = start_step, 0, time.perf_counter()
        self._file = self._events = self._wandb = self._skipped = None
        if self._main and wandb_project:
            self._wandb = _start_wandb(wandb_project, name, self._directory)
        interactive = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=start_step,
            desc=name,
            unit="step",
            disable=not self._main,
            mininterval=0.2 if interactive else 15.0,
            dynamic_ncols=interactive,
        )
        if not self._main:
            return
        path = self._directory / "metrics.jsonl"
        _drop_beyond(path, start_step)
        self._file = path.open("a")
        if tensorboard:
            # It brings in PyTorch, where that is installed: seconds, for all who log.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._directory / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics ``{name: [k]}`` of the k steps that end at ``step``.

        Raises:
          FloatingPointError: one of them is not finite; see `Health.examine`.
        """
        values = {name: np.asarray(metric) for name, metric in metrics.items()}
        count = len(next(iter(values.values())))
        good = self._health.examine(values, step - count)
        self._bar.update(count)
        if not self._main:
            return
        skipped = values.pop(SKIPPED, None)
        self._skipped = None if skipped is None else int(skipped[-1])
        self._rows.append({name: metric[good] for name, metric in values.items()})
        self._step, self._count = step, self._count + count
        if step % self._log_every < count:
            self._flush()

    def _flush(self) -> None:
        columns = {
            name: np.concatenate([row[name] for row in self._rows])
            for name in self._rows[0]
        }
        means = {name: float(np.mean(c)) for name, c in columns.items() if len(c)}
        if self._skipped is not None:
            means[SKIPPED] = self._skipped
        now = time.perf_counter()
        speed = self._batch_size * self._count / (now - self._time)
        line = {
            "step": self._step,
            "seconds": round(now - self._time, 3),
            "images_per_second": round(speed, 1),
            **means,
        }
        self._rows, self._count, self._time = [], 0, now
        self._bar.set_postfix_str(
            f"loss {means.get('loss', math.nan):.4g}, {speed:.0f} images/s",
            refresh=False,
        )
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                if name != "step":
                    self._events.add_scalar(name, value, self._step)
        if self._wandb is not None:
            self._wandb.log(line, step=self._step)

    def close(self) -> None:
        """Writes what is left of the steps, and closes the bar and the files."""
        if self._rows:
            self._flush()
        self._bar.close()
        for writer in (self._file, self._events):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(directory: str | pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``; none if there is no such file."""
    path = pathlib.Path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # a kill in the middle of a line
    return rows


def _drop_beyond(path: pathlib.Path, step: int) -> None:
    if path.exists():
        rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(directory: str | pathlib.Path, event: str, **fields: Any) -> None:
    """Appends what happened to a run to its ``events.jsonl``; process 0 alone does.

    Unlike `metrics.jsonl` it is a history: a resume drops nothing from it.
    """
    if jax.process_index() == 0:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        with (pathlib.Path(directory) / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def require_wandb() -> Any:
    """The module of Weights & Biases. Raises `ConfigError` if it is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "run.wandb_project is set, but wandb is not installed; "
            "pip install 'boot_jax[wandb]'"
        ) from error
    return wandb


def _start_wandb(project: str, name: str, directory: pathlib.Path) -> Any:
    wandb = require_wandb()
    return wandb.init(project=project, name=name, dir=str(directory), resume="allow")
