"""A student as it is used: one call of the network, its times and scale fixed."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from boot_jax.guidance import SCALE_KEY
from boot_jax.objectives import Objective
from boot_jax.student import Student
from boot_jax.teachers.base import Teacher


class ExportError(ValueError):
    """A student that cannot be exported as asked; one line for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # jax hashes it
class FinishedStudent:
    """``(eps, label or tokens) -> image``, and what it is made of.

    Attributes:
      student: its network, signal and prediction type.
      params: the parameters to use (the moving average), on the host.
      teacher: for schedule, image shape, classes and what reads prompts; the parameters
        of its network are not read.
      objective: for ``t_min``, where it is evaluated, and ``t_max``.
      guidance_scale: told to a student that was trained on a range; else None.
    """

    student: Student
    params: Any
    teacher: Teacher
    objective: Objective
    guidance_scale: float | None = None

    @property
    def network(self) -> nn.Module:
        """The Linen module."""
        return self.student.network

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)``."""
        return self.teacher.sample_shape

    @property
    def num_classes(self) -> int | None:
        """Number of labels; None if it takes none."""
        return self.teacher.num_classes

    @property
    def is_latent(self) -> bool:
        """Whether its samples are for another network to decode."""
        decoder = self.teacher.decoder
        return decoder is not None and decoder.params is not None

    def __call__(self, params: Any, eps: Array, given: Array | None = None) -> Array:
        """The sample ``y_theta(eps, t_min)`` of each noise.

        Args:
          params: as the attribute; an argument, so that it is never captured.
          eps: ``[B, H, W, C]``.
          given: ``[B] int32`` labels, or ``[B, ...] int32`` tokens of prompts; None for
            a student that takes neither.

        Returns:
          ``[B, H, W, C]`` float32.
        """
        text = self.teacher.text
        if given is None:
            return self.of_condition(params, eps, None)
        if text is None:
            return self.of_condition(params, eps, {"label": given})
        return self.of_condition(params, eps, text.encode(text.params, given))

    def of_condition(self, params: Any, eps: Array, condition: Any) -> Array:
        """The same, of a condition such as an encoded text; None for none."""
        if condition is not None and self.guidance_scale is not None:
            scale = jnp.full(eps.shape[:1], self.guidance_scale, jnp.float32)
            condition = {**condition, SCALE_KEY: scale}
        t = jnp.full(eps.shape[:1], self.objective.t_min, eps.dtype)
        return self.student.signal(params, eps, t, condition)
