"""The paired evaluation: student and teacher from the same noise.

The teacher's ODE, solved finely by Heun's method, says where each noise leads. Against
it stand the student in one step and the teacher's DDIM in a few: how far each image is
from where it should be (normalised error), and how good the images are as a set
(Frechet distance, precision, recall, against real data where there is some, else
against the ODE's own samples). All of them go batch by batch, so that memory holds
features, and not images.

`compare` does it for one student, in one pass. For many students of one teacher,
`measure_teacher` does the teacher's half once, and `score_student` the other for each.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from boot_jax.evaluation import metrics
from boot_jax.evaluation.features import FeatureExtractor
from boot_jax.evaluation.over_time import error_over_time, exact_signals
from boot_jax.evaluation.pair import Judges, Pair
from boot_jax.evaluation.reference import Measured
from boot_jax.evaluation.scores import Scores, score, warnings_of
from boot_jax.evaluation.tallies import Batch, Noises, Tally, batches
from boot_jax.evaluation.teacher_side import TeacherSide
from boot_jax.sampling import Generator


def student_name(steps: int) -> str:
    """Of a row of the student."""
    return f"student, {steps} step{'' if steps == 1 else 's'}"


#: The row of the one-step student in a grid.
STUDENT = student_name(1)

# Numbers of DDIM steps that a grid shows.
_SHOWN_STEPS = (1, 8, 50)


def _silent(text: str) -> None:
    """Says nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How samples are scored; the same for all who are compared.

    Attributes:
      options: the ``evaluation`` section of a config.
      features: of the figures of sets; those of images read decoded samples.
      reference: real images; None to score against the ODE's samples.
      mesh: of devices.
      progress: told what is being done.
      judges: of single images.
    """

    options: Mapping[str, Any]
    features: FeatureExtractor
    reference: Measured | None
    mesh: Mesh
    progress: Callable[[str], None] = _silent
    judges: Judges = dataclasses.field(default_factory=Judges)

    def tally(self, name: str, sampler: Generator, pair: Pair) -> Tally:
        """Of one of a pair's samplers."""
        return Tally(
            name,
            sampler,
            pair=pair,
            features=self.features,
            options=self.options,
            judges=self.judges,
            progress=self.progress,
        )

    def noises(self, pair: Pair) -> Iterator[Noises]:
        """The batches to sample."""
        for noises in batches(pair, self.options, self.mesh):
            if noises.indices[0] > 0:
                first, last = noises.indices[0], noises.indices[-1]
                self.progress(f"images {first} to {last}")
            yield noises


def compare(
    pair: Pair, scoring: Scoring
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores student and teacher on the same noise.

    Returns:
      The results (see `boot_jax.evaluation.report`), and images for the grid by row.
    """
    teacher, students = _TeacherTallies(pair, scoring), _student_tallies(pair, scoring)
    for noises in scoring.noises(pair):
        target = teacher.add(noises)
        for student in students.values():
            student.add(student.sample(noises), target)
    return _results(pair, scoring, teacher.side(), students)


def measure_teacher(
    pair: Pair, scoring: Scoring, keep: Callable[[np.ndarray, np.ndarray], None]
) -> TeacherSide:
    """The teacher's half; the student of the pair is not called.

    Args:
      pair: whose teacher.
      scoring: how.
      keep: given the indices of images and the ODE's samples of them, by batches.
    """
    teacher = _TeacherTallies(pair, scoring)
    for noises in scoring.noises(pair):
        keep(noises.indices, teacher.add(noises).samples)
    return teacher.side()


def score_student(
    pair: Pair,
    scoring: Scoring,
    side: TeacherSide,
    targets: Callable[[np.ndarray], np.ndarray],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The student's half; what it gives is what `compare` does.

    Args:
      pair: whose student.
      scoring: that the teacher was measured with.
      side: of `measure_teacher`.
      targets: gives what ``keep`` was given.
    """
    students = _student_tallies(pair, scoring)
    for noises in scoring.noises(pair):
        target = students[1].batch(targets(noises.indices), noises.indices)
        for student in students.values():
            student.add(student.sample(noises), target)
    return _results(pair, scoring, side, students)


def _student_tallies(pair: Pair, scoring: Scoring) -> dict[int, Tally]:
    """By number of steps; one step always."""
    options = scoring.options
    asked = options["student_steps"] if pair.objective.start_times else ()
    return {
        steps: scoring.tally(
            student_name(steps), pair.student(steps, options["student_renoise"]), pair
        )
        for steps in sorted({1, *asked})
    }


class _TeacherTallies:
    """Of the teacher's samplers."""

    def __init__(self, pair: Pair, scoring: Scoring) -> None:
        self._pair, self._scoring = pair, scoring
        options = scoring.options
        steps = options["ode_steps"]
        name = f"teacher's ODE, Heun with {steps} steps"
        self._ode = scoring.tally(name, pair.ode(steps), pair)
        self._ddim = {
            steps: scoring.tally(
                f"teacher, DDIM with {steps} steps", pair.sampler(steps), pair
            )
            for steps in options["ddim_steps"]
        }

    def add(self, noises: Noises) -> Batch:
        """Samples a batch; gives where it leads."""
        target = self._ode.sample(noises)
        self._ode.add(target, target)
        for tally in self._ddim.values():
            tally.add(tally.sample(noises), target)
        return target

    def side(self) -> TeacherSide:
        """What all batches came to."""
        scoring, options = self._scoring, self._scoring.options
        scoring.progress("figures of the teacher")
        own = self._ode.samples.measured(
            data="the teacher's own ODE samples", count=self._ode.samples.count
        )
        spread = self._ode.variance.value()
        ddim = {
            str(steps): _scored(
                tally, tally.samples.measured(), scoring, own, spread
            ).as_dict()
            for steps, tally in self._ddim.items()
        }
        steps = options["ode_steps"]
        ode = {
            "name": f"Heun, {steps} steps",
            "network_calls": 2 * steps - 1,
            **score(scoring.reference or own, own, options).as_dict(),
        }
        scoring.progress("exact signals over target time")
        return TeacherSide(
            ddim=ddim,
            ode=ode,
            own=own,
            spread=spread,
            exact=exact_signals(self._pair, options, scoring.mesh),
            rows={
                f"teacher, {steps} step{'s' if steps > 1 else ''}": tally.shown()
                for steps, tally in self._ddim.items()
                if steps in _SHOWN_STEPS
            },
        )


def _scored(
    tally: Tally, measured: Measured, scoring: Scoring, own: Measured, spread: float
) -> Scores:
    reference = scoring.reference or own
    scores = score(reference, measured, scoring.options, teacher=own)
    tally.add_to(scores, spread)
    return scores


def _results(
    pair: Pair, scoring: Scoring, side: TeacherSide, students: Mapping[int, Tally]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    scoring.progress("figures of the student")
    options, features = scoring.options, scoring.features
    reference = scoring.reference or side.own
    measured = {steps: tally.samples.measured() for steps, tally in students.items()}
    by_steps = {
        str(steps): _of_student(tally, measured[steps], scoring, side)
        for steps, tally in students.items()
    }
    results: dict[str, Any] = {
        "student": by_steps.pop("1"),
        "teacher": {"ddim": side.ddim, "ode": side.ode},
    }
    if by_steps:
        results["student_steps"] = by_steps
    if pair.objective.has_target_time:
        scoring.progress("error over target time")
        results["error_over_time"] = error_over_time(
            pair, options, scoring.mesh, side.exact
        )
    results |= _equivalent(results)
    results["features"], results["num_images"] = features.name, options["num_images"]
    results["distance_name"] = features.distance_name
    results["reference"] = reference.provenance
    results["warnings"] = warnings_of(reference, measured[1], options)
    shown = {student_name(steps): tally.shown() for steps, tally in students.items()}
    return results, side.rows | shown


def _of_student(
    tally: Tally, measured: Measured, scoring: Scoring, side: TeacherSide
) -> dict[str, Any]:
    reference = scoring.reference or side.own
    scores = _scored(tally, measured, scoring, side.own, side.spread)
    if reference.variance:
        ratio = (measured.variance or 0.0) / reference.variance
        scores.figures["variance_ratio"] = ratio
    return scores.as_dict()


def _equivalent(results: Mapping[str, Any]) -> dict[str, Any]:
    """The number of DDIM steps that the student is worth, by Frechet distance."""
    ddim = results["teacher"]["ddim"]
    equal = metrics.equivalent_steps(
        [int(steps) for steps in ddim],
        [scores["frechet_distance"] for scores in ddim.values()],
        results["student"]["frechet_distance"],
    )
    return {
        "ddim_equivalent_steps": equal.value,
        "ddim_equivalent_steps_censored": equal.censored,
    }
