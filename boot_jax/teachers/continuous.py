"""Teachers whose noise level is continuous: those of Karras et al., and NCSN++.

Both explode the variance, and both have conventions of their own: the former scales
images so that their deviation is ``sigma_data``, the latter has pixels in [0, 1]. Here
each is brought to what `boot_jax.schedules` knows, and its samples are mapped back to
images in [-1, 1] afterwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from boot_jax.schedules import EDMSchedule, NoiseSchedule
from boot_jax.teachers.base import TeacherError


@dataclasses.dataclass(frozen=True)
class PreconditionedSchedule(EDMSchedule):
    """Karras' schedule over images divided by ``sigma_data``, their deviation.

    Of unit variance then, they are scaled as `EDMSchedule` scales them, which is what
    Karras' ``c_in`` does to the images themselves (arXiv 2206.00364, table 1); the
    network is told a quarter of the logarithm of the noise in the images' own units.
    """

    sigma_data: float = 0.5

    def time_input(self, t: Array) -> Array:
        """``c_noise`` of Karras et al."""
        return (self.lambda_(t) + math.log(self.sigma_data)) / 4


@dataclasses.dataclass(frozen=True)
class GeometricSchedule(NoiseSchedule):
    """Variance exploding, ``sigma = sigma_min (sigma_max / sigma_min)^t``.

    Song et al., arXiv 2011.13456, eq. 9; the network is told ``sigma`` itself.
    """

    variance_preserving: ClassVar[bool] = False
    sigma_min: float = 0.01
    sigma_max: float = 1348.0

    @property
    def _slope(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Array) -> Array:
        """See the base class."""
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        """See the base class."""
        return jnp.exp(self.lambda_(t))

    def lambda_(self, t: Array) -> Array:
        """See the base class."""
        return math.log(self.sigma_min) + self._slope * t

    def dt_dlambda(self, t: Array) -> Array:
        """See the base class."""
        return jnp.full_like(t, 1 / self._slope)

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """See the base class."""
        return jnp.clip((lambda_t - math.log(self.sigma_min)) / self._slope, 0, 1)

    def time_input(self, t: Array) -> Array:
        """The noise level."""
        return self.sigma(t)


class Continuous(NamedTuple):
    """A schedule, what its network predicts, and how samples become images."""

    schedule: NoiseSchedule
    prediction_type: str
    to_image: Callable[[Any, Array], Array]


def preconditioned(config: Mapping[str, Any]) -> Continuous:
    """That of an ``EDMEulerScheduler``'s config, or its multistep brother's.

    Raises:
      TeacherError: its prediction type is not supported.
    """
    kind = config.get("prediction_type", "epsilon")
    # What diffusers calls epsilon here is the output of Karras' network.
    known = {"epsilon": "edm_prediction", "v_prediction": "v_prediction"}
    if kind not in known:
        raise TeacherError(
            f"{config['_class_name']}: prediction_type={kind!r} is not supported; use "
            + " or ".join(map(repr, known))
        )
    deviation = config.get("sigma_data", 0.5)
    schedule = PreconditionedSchedule(
        sigma_min=config.get("sigma_min", 0.002) / deviation,
        sigma_max=config.get("sigma_max", 80.0) / deviation,
        rho=config.get("rho", 7.0),
        sigma_data=deviation,
    )
    return Continuous(schedule, known[kind], functools.partial(_affine, deviation, 0.0))


def score_based(config: Mapping[str, Any]) -> Continuous:
    """That of a ``ScoreSdeVeScheduler``'s config, whose pixels are in [0, 1]."""
    schedule = GeometricSchedule(
        sigma_min=config.get("sigma_min", 0.01),
        sigma_max=config.get("sigma_max", 1348.0),
    )
    return Continuous(schedule, "score", functools.partial(_affine, 2.0, -1.0))


def _affine(scale: float, shift: float, params: Any, samples: Array) -> Array:
    return jnp.clip(scale * samples + shift, -1, 1)


#: How to read each scheduler over continuous noise.
CONTINUOUS: dict[str, Callable[[Mapping[str, Any]], Continuous]] = {
    "EDMEulerScheduler": preconditioned,
    "EDMDPMSolverMultistepScheduler": preconditioned,
    "ScoreSdeVeScheduler": score_based,
}
