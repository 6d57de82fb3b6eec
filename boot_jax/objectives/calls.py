"""What an objective costs: evaluations of either network, and real images read."""

import dataclasses

from boot_jax.objectives.base import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """Evaluations per starting noise of a batch.

    Attributes:
      teacher: of the teacher's network, both halves of guidance counted.
      student: of the student's network; the tangent of a JVP counts as one more. The
        backward pass, one per step for all objectives, is not counted.
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


def calls_of(objective: Objective, guided: bool = False) -> Calls:
    """The evaluations of one training step, per starting noise.

    Args:
      objective: whose.
      guided: whether each of the teacher's estimates takes two evaluations.
    """
    boundary = 1 / objective.boundary_stride if objective.boundary_weight else 0.0
    if objective.kind == "boot":
        teacher, student = {"ddim": 1, "heun": 2}[objective.solver], 2
    else:
        teacher, student = 1, {"jvp": 2, "finite_difference": 3}[objective.derivative]
        student += objective.target_network == "ema"
    halves = 2 if guided else 1
    calls = Calls(teacher=(teacher + boundary) * halves, student=student + boundary)
    return _corrected(calls, objective, halves)


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
