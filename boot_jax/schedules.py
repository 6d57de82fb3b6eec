"""Noise schedules: ``alpha``, ``sigma`` and ``lambda`` at a time ``t`` in [0, 1].

The forward process is

    x_t = alpha_t x_0 + sigma_t eps,                                            (1)

with data at ``t = 0`` and noise at ``t = 1``. Signal-space equations need

    lambda_t = log(sigma_t / alpha_t),                                          (2)

which **grows** with ``t``; it is minus half of the usual ``log_snr``. The
continuous-time objective needs ``dt / dlambda``, which is 0 wherever ``lambda`` is
infinite.

Every method takes and gives arrays of one shape, in the dtype of its argument, and is
exact in float32 at both ends: no ``0 / 0``, no difference of nearly equal numbers.
Where ``sigma = 0`` or ``alpha = 0``, ``lambda`` is minus or plus infinity, on purpose.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class NoiseSchedule(abc.ABC):
    """What every schedule offers; a new one implements the abstract methods."""

    #: Whether ``alpha^2 + sigma^2 = 1`` at all times.
    variance_preserving: ClassVar[bool] = True

    @abc.abstractmethod
    def alpha(self, t: Array) -> Array:
        """Factor of the clean image in eq. (1)."""

    @abc.abstractmethod
    def sigma(self, t: Array) -> Array:
        """Factor of the noise in eq. (1)."""

    @abc.abstractmethod
    def dt_dlambda(self, t: Array) -> Array:
        """Inverse slope of eq. (2), not negative; 0 where ``lambda`` is infinite."""

    @abc.abstractmethod
    def t_from_lambda(self, lambda_t: Array) -> Array:
        """Inverse of `lambda_`; clipped to [0, 1]."""

    def lambda_(self, t: Array) -> Array:
        """Half log noise-to-signal ratio, eq. (2)."""
        return jnp.log(self.sigma(t)) - jnp.log(self.alpha(t))

    def log_snr(self, t: Array) -> Array:
        """Log signal-to-noise ratio ``log(alpha^2 / sigma^2) = -2 lambda``."""
        return -2 * self.lambda_(t)

    def t_from_log_snr(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`; clipped to [0, 1]."""
        return self.t_from_lambda(log_snr / -2)

    def prior_scale(self, t: Array) -> Array:
        """Deviation of ``x_t`` for unit-variance data: the scale of starting noise."""
        return jnp.hypot(self.alpha(t), self.sigma(t))

    def input_scale(self, t: Array) -> Array:
        """What a network's image input is multiplied by; 1 unless variance explodes."""
        return jnp.ones_like(t)

    def time_input(self, t: Array) -> Array:
        """The time that a network is told, in its own units: 0 to 1000 by default."""
        return 1000 * t


@dataclasses.dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """``sigma / alpha = shift * tan(pi t / 2)``, variance preserving.

    ``shift = 1`` is the cosine schedule of Nichol and Dhariwal (arXiv 2102.09672)
    without its offset; ``shift > 1`` adds noise for larger images (Hoogeboom et al.,
    arXiv 2301.11093, eq. 5, whose shift in log-SNR is ``-2 log(shift)``).

    >>> float(CosineSchedule().lambda_(jnp.asarray(1.0)))
    inf
    """

    shift: float = 1.0

    def _parts(self, t: Array) -> tuple[Array, Array, Array]:
        # The cosine as a sine of the complement: exactly 0 at t = 1, also in float32.
        sine = self.shift * jnp.sin(jnp.pi / 2 * t)
        cosine = jnp.sin(jnp.pi / 2 * (1 - t))
        return sine, cosine, jnp.hypot(sine, cosine)

    def alpha(self, t: Array) -> Array:
        """See the base class."""
        _, cosine, norm = self._parts(t)
        return cosine / norm

    def sigma(self, t: Array) -> Array:
        """See the base class."""
        sine, _, norm = self._parts(t)
        return sine / norm

    def dt_dlambda(self, t: Array) -> Array:
        """``2 sin cos / pi``, which the shift does not change."""
        return 2 / jnp.pi * jnp.sin(jnp.pi / 2 * t) * jnp.sin(jnp.pi / 2 * (1 - t))

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """See the base class."""
        return 2 / jnp.pi * jnp.arctan(jnp.exp(lambda_t) / self.shift)


@dataclasses.dataclass(frozen=True)
class LinearBetaSchedule(NoiseSchedule):
    """Variance preserving with ``beta(t)`` linear (Song et al., arXiv 2011.13456).

    ``-2 log alpha = beta_min t + (beta_max - beta_min) t^2 / 2``. The defaults are
    those of DDPM in continuous time.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _decay(self, t: Array) -> Array:
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t**2

    def alpha(self, t: Array) -> Array:
        """See the base class."""
        return jnp.exp(-self._decay(t) / 2)

    def sigma(self, t: Array) -> Array:
        """See the base class."""
        return jnp.sqrt(-jnp.expm1(-self._decay(t)))

    def dt_dlambda(self, t: Array) -> Array:
        """``2 sigma^2 / beta``, from ``lambda = log(exp(decay) - 1) / 2``."""
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return -2 * jnp.expm1(-self._decay(t)) / beta

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """The positive root of a quadratic, in the form without cancellation."""
        most = (self.beta_min + self.beta_max) / 2  # At t = 1; finite for any lambda.
        decay = jnp.minimum(jax.nn.softplus(2 * lambda_t), most)
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2 * slope * decay)
        return jnp.clip(2 * decay / (self.beta_min + root), 0, 1)


@dataclasses.dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """Variance preserving, through the discrete noise levels of a trained teacher.

    Of ``N`` betas, training step ``i`` lies at ``t = (i + 1) / N``, and ``t = 0`` is
    clean data; so a network is told ``N t - 1``. Between the levels the direction
    ``(alpha, sigma)`` runs along the chord, which keeps both ends exact, zero terminal
    signal included, and has a closed inverse.
    """

    betas: tuple[float, ...]

    @functools.cached_property
    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        """``alpha`` and ``sigma`` at ``t = i / N``, ``[N + 1]`` float64."""
        with np.errstate(divide="ignore"):  # a last beta of 1: no signal is left
            decay = -np.cumsum(np.log1p(-np.asarray(self.betas, np.float64)))
        alpha = np.concatenate([[1.0], np.exp(-decay / 2)])
        sigma = np.concatenate([[0.0], np.sqrt(-np.expm1(-decay))])
        return alpha, sigma

    def _ends(self, index: Array, dtype: Any) -> tuple[Array, Array, Array, Array]:
        """``alpha, alpha', sigma, sigma'`` at both ends of a chord."""
        alpha, sigma = self._levels
        tables = (alpha[:-1], alpha[1:], sigma[:-1], sigma[1:])
        a0, a1, s0, s1 = (jnp.asarray(table, dtype)[index] for table in tables)
        return a0, a1, s0, s1

    def _index(self, t: Array) -> Array:
        last = len(self.betas) - 1
        return jnp.clip(jnp.floor(t * len(self.betas)).astype(jnp.int32), 0, last)

    def _direction(self, t: Array) -> tuple[Array, Array]:
        """``(alpha, sigma)`` up to a common factor."""
        index = self._index(t)
        a0, a1, s0, s1 = self._ends(index, t.dtype)
        right = t * len(self.betas) - index.astype(t.dtype)
        return (1 - right) * a0 + right * a1, (1 - right) * s0 + right * s1

    def alpha(self, t: Array) -> Array:
        """See the base class."""
        alpha, sigma = self._direction(t)
        return alpha / jnp.hypot(alpha, sigma)

    def sigma(self, t: Array) -> Array:
        """See the base class."""
        alpha, sigma = self._direction(t)
        return sigma / jnp.hypot(alpha, sigma)

    def dt_dlambda(self, t: Array) -> Array:
        """``alpha sigma / (alpha sigma' - sigma alpha')``, of the chord."""
        alpha, sigma = self._levels
        cross = np.asarray(alpha[:-1] * sigma[1:] - sigma[:-1] * alpha[1:])
        slope = jnp.asarray(len(self.betas) * cross, t.dtype)[self._index(t)]
        alpha_t, sigma_t = self._direction(t)
        return alpha_t * sigma_t / slope

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """Finds the chord by its ends' ``lambda``, then solves it in closed form."""
        alpha, sigma = self._levels
        inner = jnp.asarray(np.log(sigma[1:-1] / alpha[1:-1]), lambda_t.dtype)
        index = jnp.searchsorted(inner, lambda_t, side="right")
        a0, a1, s0, s1 = self._ends(index, lambda_t.dtype)
        # The wanted direction, finite for every lambda, crossed with the chord's ends.
        a = jnp.sqrt(jax.nn.sigmoid(-2 * lambda_t))
        s = jnp.sqrt(jax.nn.sigmoid(2 * lambda_t))
        start, end = s * a0 - a * s0, s * a1 - a * s1
        right = start / (start - end)
        return jnp.clip((index.astype(lambda_t.dtype) + right) / len(self.betas), 0, 1)

    def time_input(self, t: Array) -> Array:
        """The (fractional) training step: 0 for the first noise level."""
        return len(self.betas) * t - 1


@dataclasses.dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """Variance exploding, with Karras spacing (arXiv 2206.00364, eq. 5).

    ``alpha = 1`` and ``sigma^(1/rho)`` linear in ``t``, from ``sigma_min`` to
    ``sigma_max``; a uniform grid in ``t`` is Karras' grid. A network's image input is
    scaled by ``1 / sqrt(1 + sigma^2)``, for data of unit variance.
    """

    variance_preserving: ClassVar[bool] = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _root(self, t: Array) -> Array:
        low, high = self._ends
        return low * (1 - t) + high * t

    def alpha(self, t: Array) -> Array:
        """See the base class."""
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        """See the base class."""
        return self._root(t) ** self.rho

    def lambda_(self, t: Array) -> Array:
        """See the base class."""
        return self.rho * jnp.log(self._root(t))

    def dt_dlambda(self, t: Array) -> Array:
        """See the base class."""
        low, high = self._ends
        return self._root(t) / (self.rho * (high - low))

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """See the base class."""
        low, high = self._ends
        return jnp.clip((jnp.exp(lambda_t / self.rho) - low) / (high - low), 0, 1)

    def input_scale(self, t: Array) -> Array:
        """``1 / sqrt(1 + sigma^2)`` (``c_in`` of Karras et al., unit data variance)."""
        return 1 / jnp.hypot(jnp.ones_like(t), self.sigma(t))


@dataclasses.dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow: ``alpha = 1 - sigma``, with the time shift of larger images.

    ``sigma = shift t / (1 + (shift - 1) t)`` (Esser et al., arXiv 2403.03206, eq. 23);
    in ``lambda`` a plain sum: ``lambda = log(t / (1 - t)) + log(shift)``.
    """

    variance_preserving: ClassVar[bool] = False
    shift: float = 1.0

    def _norm(self, t: Array) -> Array:
        return 1 - t + self.shift * t

    def alpha(self, t: Array) -> Array:
        """See the base class."""
        return (1 - t) / self._norm(t)

    def sigma(self, t: Array) -> Array:
        """See the base class."""
        return self.shift * t / self._norm(t)

    def dt_dlambda(self, t: Array) -> Array:
        """``t (1 - t)``, which the shift does not change."""
        return t * (1 - t)

    def t_from_lambda(self, lambda_t: Array) -> Array:
        """See the base class."""
        return jax.nn.sigmoid(lambda_t - float(np.log(self.shift)))


def discrete_betas(
    name: str, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """Betas by their diffusers name: ``linear | scaled_linear | squaredcos_cap_v2``.

    Returns:
      ``[num_steps]`` float64.

    Raises:
      ValueError: the name is not one of these.
    """
    if name == "linear":
        return np.linspace(beta_start, beta_end, num_steps)
    if name == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
    if name == "squaredcos_cap_v2":
        time = np.arange(num_steps + 1) / num_steps
        alphas_cumprod = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(
        f"beta schedule {name!r} is not known; "
        "choose linear, scaled_linear or squaredcos_cap_v2"
    )


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas without a last signal (Lin et al., arXiv 2305.08891, algorithm 1)."""
    # Shifted so that the last alpha is 0, and scaled so that the first one stays.
    alpha = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alphas_cumprod = np.concatenate([[1.0], alpha**2])
    return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]


def discrete_schedule(
    *,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> DiscreteSchedule:
    """The discrete schedule of diffusers' options, with diffusers' defaults.

    Raises:
      ValueError: the beta schedule's name is not known.
    """
    if trained_betas is None:
        betas = discrete_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
    else:
        betas = np.asarray(trained_betas, np.float64)
    if rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    return DiscreteSchedule(betas=tuple(betas.tolist()))


def from_diffusers(config: Mapping[str, Any]) -> DiscreteSchedule:
    """That of a ``scheduler_config.json``, of which it reads `discrete_schedule`'s."""
    names = inspect.signature(discrete_schedule).parameters
    return discrete_schedule(**{key: config[key] for key in names if key in config})


#: Schedules by their name in a config, each with its fields as keyword arguments.
SCHEDULES = {
    "cosine": CosineSchedule,
    "linear_beta": LinearBetaSchedule,
    "edm": EDMSchedule,
    "flow": FlowSchedule,
    "discrete": discrete_schedule,
}


def get_schedule(name: str, **options: Any) -> NoiseSchedule:
    """Builds a schedule by name: ``cosine | linear_beta | edm | flow | discrete``.

    Raises:
      ValueError: unknown name, or an option that the schedule does not have.

    >>> get_schedule("flow", shift=3.0)
    FlowSchedule(shift=3.0)
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule {name!r} is not known; choose one of {sorted(SCHEDULES)}"
        )
    try:
        return SCHEDULES[name](**options)
    except TypeError as error:
        raise ValueError(f"schedule {name!r} has no such option: {error}") from error
