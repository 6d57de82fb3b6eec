"""Data-free distillation of diffusion models into one-step generators.

The names of the science floor need jax alone; the others bring Flax with them, and are
imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from boot_jax.guidance import guide
from boot_jax.objectives import (
    Objective,
    boot_loss,
    consistency_loss,
    continuous_loss,
    direct_loss,
    draw_times,
    pid_loss,
    progressive_loss,
)
from boot_jax.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearBetaSchedule,
    NoiseSchedule,
    get_schedule,
)
from boot_jax.solvers import sample_ode, signal_step, time_grid

if TYPE_CHECKING:
    from boot_jax.student import Student, create_student
    from boot_jax.teachers.base import Teacher, as_sampled, network_denoiser
    from boot_jax.teachers.mixture import gaussian_mixture

_LATER = {
    "Student": "boot_jax.student",
    "Teacher": "boot_jax.teachers.base",
    "as_sampled": "boot_jax.teachers.base",
    "create_student": "boot_jax.student",
    "gaussian_mixture": "boot_jax.teachers.mixture",
    "network_denoiser": "boot_jax.teachers.base",
}

__all__ = [
    "CosineSchedule",
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "LinearBetaSchedule",
    "NoiseSchedule",
    "Objective",
    "Student",
    "Teacher",
    "as_sampled",
    "boot_loss",
    "consistency_loss",
    "continuous_loss",
    "create_student",
    "direct_loss",
    "draw_times",
    "gaussian_mixture",
    "get_schedule",
    "guide",
    "network_denoiser",
    "pid_loss",
    "progressive_loss",
    "sample_ode",
    "signal_step",
    "time_grid",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'boot_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
