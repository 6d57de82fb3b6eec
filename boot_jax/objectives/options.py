"""The choices of a correction, whose equations `boot_jax.objectives.correction` has."""

import dataclasses

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
RATE_DECAYS = ("constant", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """How the student's distribution is corrected, beside its trajectories.

    Attributes:
      strength: ``a`` of the weight of eq. (4); 0 turns the correction off.
      share: of the batch that is corrected, up to a half; the rest is for the loss of
        trajectories.
      trajectory_weight: of that loss; 0 leaves the correction alone.
      time_range: of the times ``r`` to which samples are noised again.
      time_distribution: of ``r`` within the range: ``uniform``, or ``logit_normal``,
        the sigmoid of ``N(time_mean, time_scale^2)``.
      time_mean: above 0 leans to noise.
      time_scale: positive.
      guidance_interval: times between which the teacher of the correction is guided;
        empty for those of the trajectories.
      updates: of the auxiliary network, for each of the student.
      auxiliary_share: of the batch, for one of them.
      learning_rate: of the auxiliary network.
      decay: of that rate over the training, ``constant`` or ``cosine`` to zero.
      b1: of its Adam.
      b2: of its Adam.
      lora_rank: of low-rank adapters in the place of a whole auxiliary network; 0 for
        the latter.
    """

    strength: float = 0.0
    share: float = 0.25
    trajectory_weight: float = 1.0
    time_range: tuple[float, float] = (0.05, 0.95)
    time_distribution: str = "uniform"
    time_mean: float = 0.5
    time_scale: float = 1.0
    guidance_interval: tuple[float, ...] = ()
    updates: int = 1
    auxiliary_share: float = 0.25
    learning_rate: float = 5e-4
    decay: str = "cosine"
    b1: float = 0.0
    b2: float = 0.99
    lora_rank: int = 0

    def __post_init__(self) -> None:
        """Refuses what has no meaning, in one line each."""
        low, high = self.time_range
        checks = {
            "strength": (self.strength >= 0, "at least 0 (0 turns it off)"),
            "share": (0 < self.share <= 0.5, "in (0, 0.5]"),
            "trajectory_weight": (self.trajectory_weight >= 0, "at least 0"),
            "time_range": (0 < low < high < 1, "(low, high) with 0 < low < high < 1"),
            "time_distribution": (
                self.time_distribution in TIME_DISTRIBUTIONS,
                f"one of {TIME_DISTRIBUTIONS}",
            ),
            "time_scale": (self.time_scale > 0, "positive"),
            "guidance_interval": (
                _is_interval(self.guidance_interval),
                "(t_low, t_high) in [0, 1], or () for the teacher's own",
            ),
            "updates": (self.updates >= 1, "at least 1"),
            "auxiliary_share": (0 < self.auxiliary_share <= 1, "in (0, 1]"),
            "learning_rate": (self.learning_rate > 0, "positive"),
            "decay": (self.decay in RATE_DECAYS, f"one of {RATE_DECAYS}"),
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "in [0, 1)"),
            "lora_rank": (self.lora_rank >= 0, "at least 0 (0 for a whole network)"),
        }
        for name, (good, words) in checks.items():
            if not good:
                raise ValueError(
                    f"correction.{name} is {getattr(self, name)!r}, but must be {words}"
                )

    @property
    def stride(self) -> int:
        """The correction takes every so-many-th image of a batch."""
        return round(1 / self.share)

    @property
    def auxiliary_stride(self) -> int:
        """An update of the auxiliary network, every so-many-th condition."""
        return round(1 / self.auxiliary_share)


def _is_interval(interval: tuple[float, ...]) -> bool:
    if not interval:
        return True
    return len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1
