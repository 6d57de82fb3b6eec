"""What a run says while it runs: progress bar, ``metrics.jsonl``, TensorBoard."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX import SummaryWriter

from boot_jax.config import ConfigError


class Logger:
    """Writes the metrics of finished steps; only process 0 writes anything.

    A line of ``metrics.jsonl`` is ``{"step", "seconds", "images_per_second", "loss",
    ...}``, means over the steps since the line before. On a resume, lines beyond the
    restored step are dropped, so that the file has each step once.

    Args:
      directory: of the run.
      name: shown before the progress bar.
      start_step, num_steps, batch_size: of the run.
      log_every: steps between lines.
      tensorboard: whether to write event files as well.
      wandb_project: a Weights & Biases project, or "" for none.
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
    ) -> None:
        self._directory = pathlib.Path(directory)
        self._main = jax.process_index() == 0
        self._batch_size, self._log_every = batch_size, log_every
        self._rows: list[dict[str, np.ndarray]] = []
        self._step, self._count, self._time = start_step, 0, time.perf_counter()
        self._file = self._events = self._wandb = None
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
            self._events = SummaryWriter(str(self._directory / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics ``{name: [k]}`` of the k steps that end at ``step``.

        Raises:
          FloatingPointError: one of them is not finite; names it and the step.
        """
        values = {name: np.asarray(metric) for name, metric in metrics.items()}
        count = len(next(iter(values.values())))
        _check_finite(values, step - count)
        self._bar.update(count)
        if not self._main:
            return
        self._rows.append(values)
        self._step, self._count = step, self._count + count
        if step % self._log_every < count:
            self._flush()

    def _flush(self) -> None:
        means = {
            name: float(np.mean(np.concatenate([row[name] for row in self._rows])))
            for name in self._rows[0]
        }
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
            f"loss {means['loss']:.4g}, {speed:.0f} images/s", refresh=False
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


def _check_finite(values: Mapping[str, np.ndarray], first_step: int) -> None:
    bad = {
        name: int(np.argmin(np.isfinite(v)))
        for name, v in values.items()
        if not np.isfinite(v).all()
    }
    if bad:
        index = min(bad.values())
        names = ", ".join(f"{n} = {values[n][index]}" for n in bad if bad[n] == index)
        raise FloatingPointError(
            f"step {first_step + index + 1}: {names}. The run stopped; its checkpoints "
            "are from before. A lower learning rate or a longer warm-up may help"
        )


def _start_wandb(project: str, name: str, directory: pathlib.Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "run.wandb_project is set, but wandb is not installed; "
            "pip install 'boot_jax[wandb]'"
        ) from error
    return wandb.init(project=project, name=name, dir=str(directory), resume="allow")
