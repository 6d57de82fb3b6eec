"""A cell of a comparison: one method, amount and seed; an ordinary run of its own."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from boot_jax import config as config_lib
from boot_jax import distributed, pipeline, validation
from boot_jax.comparing import budget
from boot_jax.comparing.claims import claimed
from boot_jax.comparing.methods import Method
from boot_jax.comparing.scoring import Scored, Scorer
from boot_jax.config import ConfigError
from boot_jax.run import Run
from boot_jax.summary import training_seconds
from boot_jax.workdir import WorkdirError, write_text

#: What a cell came to; its last file.
RESULT = "cell.json"
_SHOWN = "shown.npy"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method within one budget, from one seed.

    Attributes:
      base: the run of the whole comparison, whose teacher is everybody's.
      method: how it distils.
      amount: of ``compare.budget``.
      seed: of the student's training.
    """

    base: Run
    method: Method
    amount: float
    seed: int

    @property
    def folder(self) -> pathlib.Path:
        """Its workdir, ``cells/METHOD/BUDGET_AMOUNT/SEED``."""
        within = f"{self.base.config.compare.budget}_{self.amount:g}"
        return self._of_method / within / str(self.seed)

    @property
    def _of_method(self) -> pathlib.Path:
        return self.base.workdir / "cells" / self.method.name

    def check(self) -> None:
        """Refuses, before anything is trained, what cannot be run.

        Raises:
          ConfigError: the method's settings make no sense.
          WorkdirError: its folder is of another config.
        """
        try:
            validation.validate(self._configured())
            config = self._configured(self._planned_steps())
            validation.validate(config)
        except ConfigError as error:
            raise ConfigError(f"compare, method {self.method.name}: {error}") from error
        distributed.on_main(lambda: self._refuse_changed(config))

    def is_finished(self, scorer: Scorer) -> bool:
        """Whether its result is there, scored as it would be now."""
        found = self.result()
        if found is None:
            return False
        return found["failed"] is not None or found["scored"] == scorer.key(self._run())

    def result(self) -> dict[str, Any] | None:
        """What it came to; None while that is not known."""
        path = self.folder / RESULT

        def read() -> Any:
            return json.loads(path.read_text()) if path.is_file() else None

        return distributed.on_main(read)

    def shown(self) -> np.ndarray | None:
        """The first samples of its student ``[n, H, W, C]``; None if it failed."""
        path = self.folder / _SHOWN
        return np.load(path) if path.is_file() else None

    def run(self, scorer: Scorer) -> bool:
        """Trains and scores it, or goes on with that.

        Returns:
          Whether it is finished; False if another process is at it.

        Raises:
          Preempted: the training was asked to stop, and has saved.
        """
        if self.is_finished(scorer):
            return True
        with claimed(self.folder.with_name(f"{self.seed}.lock")) as mine:
            if mine and not self.is_finished(scorer):
                scorer.progress(str(self))
                self._train_and_score(scorer)
            return mine

    def __str__(self) -> str:
        by = self.base.config.compare.budget
        return f"{self.method.name}, {by} {self.amount:g}, seed {self.seed}"

    def _configured(self, num_steps: int | None = None) -> Any:
        """The cell's config; with the steps of the config's own run if None is said."""
        config = self.method.config(self.base.config)
        config.title = f"{config.title}: {self.method.name}"
        config.seed = self.seed
        if num_steps is not None:
            config.distill.num_steps = num_steps
        if self._shares_own_teacher:
            config.teacher.source = "checkpoint"
            config.teacher.path = str(self.base.workdir / "teacher")
        return config

    @property
    def _shares_own_teacher(self) -> bool:
        """Whether the comparison trained it, in its own workdir."""
        return self.base.config.teacher.source == "train"

    def _run(self, num_steps: int | None = None) -> Run:
        return dataclasses.replace(
            self.base,
            config=self._configured(num_steps),
            workdir=self.folder,
            loaded_teacher=self.base.teacher,
        )

    def _planned_steps(self) -> int | None:
        """Its number of steps; None if that is still to be timed."""
        if self.base.config.compare.budget == "seconds":
            kept = distributed.on_main(self._read_config)
            return kept["distill"]["num_steps"] if kept else None
        method = dataclasses.replace(self.base, config=self._configured())
        return budget.steps_within(self.base, method, self.amount)

    def _timed_steps(self) -> int:
        seconds = budget.seconds_per_step(self._run(), self._of_method)
        return budget.rounded_steps(self.amount / seconds, self.base.config.run)

    def _read_config(self) -> dict[str, Any] | None:
        path = self.folder / "config.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            _ = found["distill"]["num_steps"]
        except (KeyError, TypeError, ValueError) as error:
            raise WorkdirError(
                f"{path} is not a config of boot_jax; move {self.folder} away"
            ) from error
        return found

    def _refuse_changed(self, config: Any) -> None:
        old, new = self._read_config(), config.to_dict()
        has_begun = any(self.folder.rglob("checkpoints"))
        if old is None or not (has_begun or (self.folder / RESULT).exists()):
            return
        if self._shares_own_teacher:  # wherever the workdir lies now
            new["teacher"]["path"] = old["teacher"]["path"]
        changed = config_lib.differences(old, new)
        steps = [found["distill"]["num_steps"] for found in (old, new)]
        if steps[0] != steps[1]:  # the learning rate's decay is of all steps
            changed.append(f"distill.num_steps: {steps[0]} -> {steps[1]}")
        if changed:
            shown = "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")
            raise WorkdirError(
                f"{self.folder} was run with another config ({shown}); move it away to "
                "run it anew, or choose another --workdir"
            )

    def _train_and_score(self, scorer: Scorer) -> None:
        steps, scored, failed = 0, Scored(), None
        try:
            steps = self._planned_steps() or self._timed_steps()
            run = self._run(steps)
            distributed.on_main(lambda: self._open(run.config))
            pipeline.distill(run)
            scored = scorer.score(run)
        except FloatingPointError as error:
            failed = str(error)
        result = {
            "method": self.method.name,
            "amount": self.amount,
            "seed": self.seed,
            "scores": scored.scores,
            **self._costs(steps),
            "settings": list(self.method.settings),
            "failed": failed,
            "warnings": scored.warnings,
            "scored": scored.key,
        }

        def write() -> None:
            if scored.samples is not None:
                np.save(self.folder / _SHOWN, scored.samples)
            text = json.dumps(result, indent=2, allow_nan=False)
            write_text(self.folder / RESULT, text + "\n")

        distributed.on_main(write)

    def _open(self, config: Any) -> None:
        self._refuse_changed(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.json", config_lib.to_json(config))

    def _costs(self, steps: int) -> dict[str, Any]:
        calls = budget.calls_of_training(self._run(), steps)
        logs = [path.parent for path in self.folder.rglob("metrics.jsonl")]
        totals = dataclasses.asdict(calls).items()
        return {
            "calls": {name: round(value) for name, value in totals},
            "steps": steps,
            "seconds": sum(training_seconds(folder) for folder in logs),
            "memory": {
                "bytes": max(self._compiled_bytes(), default=None),
                "how": "compiled training step, per device",
            },
            "needs_data": calls.images > 0,
        }

    def _compiled_bytes(self) -> list[int]:
        """What each of its compiled steps said to hold."""
        lines = [
            json.loads(line)
            for path in self.folder.rglob("events.jsonl")
            for line in path.read_text().splitlines()
        ]
        return [line["memory_bytes"] for line in lines if line.get("memory_bytes")]
