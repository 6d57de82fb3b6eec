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
    """

    teacher: float
    student: float
    images: float = 0.0

    @property
    def total(self) -> float:
        """Evaluations of either network."""
        return self.teacher + self.student


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
    if objective.start_times:
        student += 1 / objective.start_stride  # the points to start from
    return Calls(
        teacher=(teacher + boundary) * (2 if guided else 1), student=student + boundary
    )
