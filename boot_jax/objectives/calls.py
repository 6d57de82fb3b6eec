"""What an objective costs: evaluations of either network, and real images read."""

import dataclasses

from boot_jax.objectives.base import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """Evaluations per starting noise of a batch.

    Attributes:
      teacher: of the teacher's network, both halves of guidance counted. In the later
        stages of ``progressive`` the teacher is the student of the stage before.
      student: of the student's network; the tangent of a JVP counts as one more. The
        backward pass is not counted: one evaluation of the student is differentiated
        for each image of the batch, but for ``pid`` both are (or one and its tangent),
        so that its backward pass costs twice as much.
      images: real images read.
      auxiliary: of the auxiliary network of a correction, its backward passes not
        counted either.
    """

    teacher: float
    student: float
    images: float = 0.0
    auxiliary: float = 0.0

    @property
    def total(self) -> float:
        """Evaluations of any network."""
        return self.teacher + self.student + self.auxiliary

    def times(self, count: float) -> "Calls":
        """Of so many noises."""
        each = dataclasses.asdict(self)
        return Calls(**{name: count * value for name, value in each.items()})


def calls_of(objective: Objective, guided: bool = False) -> Calls:
    """The evaluations of one training step, per starting noise.

    For ``progressive`` the mean over its stages, only the first of which has a teacher
    that is guided.

    Args:
      objective: whose.
      guided: whether each of the teacher's estimates takes two evaluations.
    """
    boundary = 1 / objective.boundary_stride if objective.has_boundary else 0.0
    ema = objective.target_network == "ema"
    a_step, halves = {"ddim": 1, "heun": 2}[objective.solver], 2 if guided else 1
    images = 1.0 if objective.needs_images else 0.0
    # Of the student, and of the teacher before guidance.
    student, teacher = {
        "boot": (2, a_step),
        "continuous": (
            {"jvp": 2, "finite_difference": 3}[objective.derivative] + ema,
            1,
        ),
        "pid": (2, 1),
        "direct": (1, 0 if objective.reads_stored else sampling_calls(objective)),
        "progressive": (1, 2),
        "consistency": (2, a_step),
    }[objective.kind]
    if objective.kind == "progressive":
        halves = 1 + (halves - 1) / objective.num_stages
    if objective.start_times:
        student += 1 / objective.start_stride  # the points to start from
    calls = Calls(
        teacher=(teacher + boundary) * halves, student=student + boundary, images=images
    )
    return _corrected(calls, objective, 2 if guided else 1)


def _corrected(calls: Calls, objective: Objective, halves: int) -> Calls:
    """With a correction, which takes a share of the batch from the trajectories."""
    correction = objective.correction
    if correction.strength == 0:
        return calls
    share = 1 / correction.stride
    learned = correction.updates / correction.auxiliary_stride
    return Calls(
        teacher=(1 - share) * calls.teacher + share * halves,
        student=(1 - share) * calls.student + share + learned,
        images=(1 - share) * calls.images,
        auxiliary=share + learned,
    )


def sampling_calls(objective: Objective) -> int:
    """The teacher's estimates in one of its samples, as ``direct`` takes them."""
    steps = objective.teacher_steps
    return 2 * steps - 1 if objective.solver == "heun" else steps


def calls_before(objective: Objective, guided: bool = False) -> int:
    """The teacher's evaluations before the first step: those of a stored set."""
    stored = objective.stored_samples if objective.reads_stored else 0
    return stored * sampling_calls(objective) * (2 if guided else 1)
