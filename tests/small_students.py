"""Students small enough to be written out by hand, and exact teachers in numpy.

Numpy computes in float64; JAX does where a test enables it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boot_jax.objectives import LOSSES, Objective
from boot_jax.schedules import get_schedule
from boot_jax.teachers.mixture import gaussian_mixture

COSINE = get_schedule("cosine")
BATCH, SHAPE = 8, (1, 2, 1)
_RANDOM = np.random.default_rng(0)
EPS = _RANDOM.standard_normal((BATCH, *SHAPE))
IMAGES = _RANDOM.uniform(-1, 1, (BATCH, *SHAPE))
T = np.linspace(0.1, 1.0, BATCH)
MEANS = np.array([[-1.0, 0.5], [0.3, -0.7]]).reshape(2, *SHAPE)
SCALES = np.array([0.5, 0.4])
PARAMS = {"a": 0.7, "b": 0.3, "c": -0.2}
OTHER = {"a": 0.4, "b": -0.2, "c": 0.5}

MEAN, SCALE = 0.4, 0.7  # of the single Gaussian


def column(values: Any) -> Any:
    return values[:, None, None, None]


def signal(params: Any, eps: Any, t: Any, condition: Any = None) -> Any:
    """A student with a target time; of numpy or JAX arrays."""
    del condition
    t = column(t)
    return params["a"] * eps + (params["b"] * t + params["c"] * t**2) * (1 + eps)


def slope(params: Any, eps: Any, t: Any) -> Any:
    """Its derivative by the target time."""
    return (params["b"] + 2 * params["c"] * column(t)) * (1 + eps)


def denoise(params: Any, x_t: Any, t: Any, condition: Any = None) -> Any:
    """A student with a noise level; of numpy or JAX arrays."""
    del condition
    return params["a"] * x_t / (1 + x_t**2) + params["b"] * column(t) + params["c"]


def levels(t: Any) -> tuple[np.ndarray, np.ndarray]:
    """``alpha`` and ``sigma`` of the cosine schedule; the former is 0 at ``t = 1``."""
    angle = np.pi / 2 * column(np.asarray(t, np.float64))
    return np.sin(np.pi / 2 - angle), np.sin(angle)


def teach(x_t: np.ndarray, t: Any) -> np.ndarray:
    """The mixture's posterior mean, a component at a time."""
    alpha, sigma = levels(t)
    total, weights = np.zeros_like(x_t), np.zeros_like(alpha)
    for mean, scale in zip(MEANS, SCALES, strict=True):
        variance = alpha**2 * scale**2 + sigma**2
        offset = x_t - alpha * mean
        square = (offset**2).sum((1, 2, 3), keepdims=True)
        weight = np.exp(-square / (2 * variance)) / variance ** (MEANS[0].size / 2)
        total += weight * (mean + alpha * scale**2 / variance * offset)
        weights += weight
    return total / weights


def ddim(x_t: np.ndarray, x_0: np.ndarray, t: Any, s: Any) -> np.ndarray:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(t), levels(s)
    return alpha_s * x_0 + sigma_s / sigma_t * (x_t - alpha_t * x_0)


def step(x_t: np.ndarray, t: Any, s: Any, solver: str = "ddim") -> np.ndarray:
    """One step of the mixture's ODE."""
    x_0 = teach(x_t, t)
    if solver == "heun":
        x_0 = (x_0 + teach(ddim(x_t, x_0, t, s), s)) / 2
    return ddim(x_t, x_0, t, s)


def mixture() -> Any:
    return gaussian_mixture(MEANS, SCALES, COSINE)


def gaussian() -> Any:
    return gaussian_mixture(np.full((1, *SHAPE), MEAN), [SCALE], COSINE)


def spread(t: Any) -> Any:
    """``v_t`` of the single Gaussian, whose trajectories are ``alpha m + v eps``."""
    alpha, sigma = levels(t)
    return np.sqrt(alpha**2 * SCALE**2 + sigma**2)


def bound(kind: str, teacher: Any, functions: Any = None, **options: Any) -> Callable:
    """A loss of ``(params, teacher_params, eps, t, ...)``, in float64.

    To be called, and differentiated, where float64 is enabled.
    """
    known = {"signal": signal, **(functions or {})}
    if kind in ("progressive", "consistency"):
        known = {"student_denoise": denoise, **known}

    def loss(
        params: Any,
        teacher_params: Any = None,
        eps: Any = EPS,
        t: Any = T,
        **more: Any,
    ) -> Any:
        if "student_denoise" in known:
            more.setdefault("images", jnp.asarray(IMAGES))
        return LOSSES[kind](
            params,
            teacher.params if teacher_params is None else teacher_params,
            jnp.asarray(eps),
            jnp.asarray(t),
            None,
            denoise=teacher.denoise,
            schedule=teacher.schedule,
            objective=Objective(kind=kind, **options),
            **known,
            **more,
        )

    return loss


def as_params(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)
