"""Whether a student that is corrected keeps its variety: checked while it learns.

A correction may give up what its teacher can make, bit by bit. So every so many steps
some hundred one-step samples are held against the teacher's own, which are made once,
of other noise and the same conditions: their recall, precision, diversity and variance,
in the space of the samples. All go to ``events.jsonl``; a recall that is well below the
best that the run has had is warned of.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from boot_jax import sampling
from boot_jax.evaluation.neighbours import mean_pairwise_distance, precision_recall
from boot_jax.run import Run
from boot_jax.trained import pair_of
from boot_jax.training import logs

#: In ``events.jsonl``: a check, and one that found too little.
CHECKED, FELL = "recall", "recall_fell"

#: Of the teacher's sampler.
TEACHER_STEPS = 32


class RecallCheck:
    """Checks of one run; the teacher's samples are made when it is created.

    Args:
      run: whose; its ``run.recall_images`` says how many samples, ``run.recall_drop``
        what fall is warned of.

    Attributes:
      variance: of the teacher's samples, a mean over their dimensions.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._num = run, run.config.run.recall_images
        pair = pair_of(run, None)  # the student is given at each call
        steps = pair.sampler(TEACHER_STEPS)
        self._teacher = self._samples(steps, run.config.sample.seed + 1)
        self.variance = float(self._teacher.var(axis=0, ddof=1).mean())
        self._diversity = mean_pairwise_distance(self._teacher)

    def __call__(self, step: int, params: Any) -> None:
        """Records the check of a step, and warns if recall has fallen.

        Args:
          step: its number.
          params: of the student, on the mesh.
        """
        student = pair_of(self._run, params).student()
        samples = self._samples(student, self._run.config.sample.seed)
        scores = precision_recall(self._teacher, samples)
        workdir = self._run.workdir
        best = best_recall(workdir, step)
        logs.record(
            workdir,
            CHECKED,
            step=step,
            recall=scores.recall,
            precision=scores.precision,
            diversity_ratio=mean_pairwise_distance(samples) / self._diversity,
            variance_ratio=float(samples.var(axis=0, ddof=1).mean()) / self.variance,
        )
        if best is None or scores.recall >= best - self._run.config.run.recall_drop:
            return
        logs.record(workdir, FELL, step=step, recall=scores.recall, best=best)
        if jax.process_index() == 0:
            print(
                f"\nwarning: step {step}: the student's recall of its teacher's "
                f"samples fell to {scores.recall:.2f}, from {best:.2f} at best: it may "
                "be losing modes; a smaller objective.correction.strength or share, or "
                "more updates of the auxiliary network, may help",
                file=sys.stderr,
                flush=True,
            )

    def _samples(self, generator: sampling.Generator, seed: int) -> np.ndarray:
        """Rows ``[num, H * W * C]`` of the conditions in turn."""
        pair = pair_of(self._run, None)
        made = sampling.generate(
            generator,
            pair.noise(seed),
            pair.condition,
            self._num,
            self._run.config.distill.batch_size,
            self._run.mesh,
        )
        return made.images.reshape(self._num, -1).astype(np.float64)


def best_recall(workdir: pathlib.Path, before: int) -> float | None:
    """The highest recall that a run has had before a step; None if it was not checked.

    Args:
      workdir: of the run.
      before: the step; checks of it and of later ones are of a run that was cut off.
    """
    path = workdir / "events.jsonl"
    if not path.exists():
        return None
    found = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # a kill in the middle of a line
        if event.get("event") == CHECKED and event["step"] < before:
            found.append(event["recall"])
    return max(found, default=None)
