"""Students of a comparison are scored against one teacher, which is measured once."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from boot_jax import config as config_lib
from boot_jax import distributed, judging
from boot_jax.comparing.claims import claimed
from boot_jax.evaluation import paired
from boot_jax.evaluation.teacher_side import (
    Targets,
    TeacherSide,
    has_teacher_side,
    read_teacher_side,
    write_teacher_side,
)
from boot_jax.run import Run
from boot_jax.trained import pair_of, trained_pair

# To be raised when the same teacher would be measured otherwise.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What a student is worth.

    Attributes:
      scores: its figures, with ``intervals``, and the DDIM steps that it is worth.
      warnings: of the figures.
      key: of the teacher's half that it was scored against; "" if it was not.
      samples: its first ones ``[n, H, W, C]``, for a grid.
    """

    scores: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    key: str = ""
    samples: np.ndarray | None = None


class Scorer:
    """Scores the students of a comparison.

    Args:
      base: the run of the whole comparison; its teacher is loaded now.
      progress: told what is being done.
    """

    def __init__(self, base: Run, progress: Callable[[str], None]) -> None:
        self.progress, self._base = progress, base
        # In a run of its own, so that the base keeps no teacher on the device.
        reader = dataclasses.replace(base, loaded_teacher=base.teacher)
        self._pair = pair = pair_of(reader, None)
        self._reader = reader
        self.judge = judging.judge_of(reader, pair, progress)
        tokens = b"" if pair.tokens is None else pair.tokens.tobytes()
        self._about = {
            "format": _FORMAT,
            "teacher": base.teacher.fingerprint(),
            "prompts": hashlib.sha256(tokens).hexdigest()[:12],
            "reference": getattr(self.judge.scoring.reference, "provenance", None),
            "features": self.judge.scoring.features.name,
            "judges": self.judge.told["judges"],
        }

    def key(self, run: Run) -> str:
        """Names the teacher's half of the evaluation that a run's student needs.

        All but those of another ``t_max`` or ``t_min`` need the same.
        """
        text = json.dumps(self._provenance(run), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _provenance(self, run: Run) -> dict[str, Any]:
        config = json.loads(config_lib.to_json(run.config))
        for name in ("selftest", "student_steps", "student_renoise"):
            config["evaluation"].pop(name)  # the teacher's half is without
        teacher = config["teacher"]
        kept = ("param_dtype", "thresholding", *(k for k in teacher if "guidance" in k))
        return self._about | {
            "times": [run.objective.t_min, run.objective.t_max],
            "sampler": {name: teacher[name] for name in kept},
            "network": config["network"]["dtype"],
            "told": [config["sample"]["guidance_scale"], config["prompts"]["negative"]],
            "negative": config["sample"]["negative_prompt"],
            "evaluation": config["evaluation"],
        }

    def show(self, rows: Mapping[str, np.ndarray]) -> judging.Shown:
        """Samples by name with the real images that are nearest to them."""
        scoring = self.judge.scoring
        return judging.show(
            self._reader, self._pair, scoring.features, scoring.reference, rows
        )

    def score(self, run: Run) -> Scored:
        """Scores the student of a run that is trained."""
        side, targets = self.teacher_side(run)
        results, rows = paired.score_student(
            trained_pair(run), self.judge.scoring, side, targets.read
        )
        steps = "ddim_equivalent_steps"
        return Scored(
            scores=results["student"] | {steps: results[steps]},
            warnings=results["warnings"],
            key=self.key(run),
            samples=rows[paired.STUDENT],
        )

    def teacher_side(self, run: Run) -> tuple[TeacherSide, Targets]:
        """The teacher's half for a run's student, measured now if it is not there."""
        key, scoring = self.key(run), self.judge.scoring
        folder = self._base.workdir / "teacher_scores" / key
        with claimed(folder.with_name(f"{key}.lock"), wait=True):
            if not distributed.on_main(lambda: has_teacher_side(folder)):
                self._measure(run, folder)
        return read_teacher_side(folder, scoring.features), Targets(folder)

    def _measure(self, run: Run, folder: pathlib.Path) -> None:
        scoring = self.judge.scoring
        count, shape = scoring.options["num_images"], run.teacher.sample_shape
        distributed.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        is_main = distributed.is_main()
        targets = Targets(folder, (count, *shape)) if is_main else None

        def keep(indices: np.ndarray, samples: np.ndarray) -> None:
            if targets is not None:
                targets.write(indices, samples)

        side = paired.measure_teacher(pair_of(run, None), scoring, keep)
        if targets is not None:
            targets.flush()
        told = self._provenance(run)
        distributed.on_main(lambda: write_teacher_side(folder, side, told))
