"""Who is compared: a student and its teacher, and who judges their images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

from boot_jax.conditions import TOKENS
from boot_jax.guidance import SCALE_KEY, Denoiser
from boot_jax.objectives import Jump, Objective, Signal
from boot_jax.sampling import (
    Generator,
    conditions_for,
    few_steps,
    image_noise,
    many_steps,
    one_step,
)
from boot_jax.teachers.base import Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A trained student, and its teacher as it was distilled.

    Attributes:
      signal, params: the student and the parameters to use (the moving average).
      denoise: the teacher, guided and thresholded.
      teacher: its parameters, schedule, shape and classes.
      objective: for ``t_min`` and ``t_max``.
      guidance_scale: told to a student that was trained on a range; else None.
      tokens: of prompts, ``[N, *row_shape]``, for images in turn; None without prompts.
      encode: condition with tokens to the one that both are called with, on the device.
      jump: the student from any start; None for one that starts from noise alone.
    """

    signal: Signal
    params: Any
    denoise: Denoiser
    teacher: Teacher
    objective: Objective
    guidance_scale: float | None = None
    tokens: np.ndarray | None = None
    encode: Callable[[Any], Any] = lambda condition: condition
    jump: Jump | None = None

    def student(self, num_steps: int = 1, renoise: str = "along") -> Generator:
        """The one-step generator, or the student in a few steps.

        See `boot_jax.sampling.few_steps`, for which there must be a ``jump``.
        """
        if num_steps == 1:
            return self._encoded(one_step(self.signal, self.params, self.objective))
        assert self.jump is not None  # validated
        return self._encoded(
            few_steps(
                self.jump,
                self.params,
                self.teacher.schedule,
                self.objective,
                num_steps,
                renoise,
            )
        )

    def _encoded(self, generator: Generator) -> Generator:
        return lambda eps, condition: generator(eps, self.encode(condition))

    def sampler(
        self, num_steps: int, solver: str = "ddim", power: float = 1.0
    ) -> Generator:
        """The teacher's sampler; see `boot_jax.sampling.many_steps`."""
        return self._encoded(
            many_steps(
                self.denoise,
                self.teacher.params,
                self.teacher.schedule,
                num_steps,
                t_max=self.objective.t_max,
                solver=solver,
                power=power,
            )
        )

    def ode(self, num_steps: int) -> Generator:
        """The teacher's ODE: Heun, its steps crowded where the image is decided.

        On the digits' teacher 80 such steps are off by 1.0e-6 of the variance, 500 DDIM
        steps by 6.3e-6.
        """
        return self.sampler(num_steps, "heun", power=1.5)

    def noise(self, seed: int) -> Callable[[np.ndarray], Array]:
        """Maps image indices to starting noise."""
        return lambda indices: image_noise(seed, indices, self.teacher.sample_shape)

    def condition(self, indices: np.ndarray, label: int = -1) -> Any:
        """The condition of images: every prompt or class in turn, or one class."""
        if self.tokens is not None:
            condition = {TOKENS: self.tokens[indices % len(self.tokens)]}
            if self.guidance_scale is not None:
                told = np.full(len(indices), self.guidance_scale, np.float32)
                condition[SCALE_KEY] = told
            return condition
        return conditions_for(
            indices,
            self.teacher.num_classes,
            label=label,
            guidance_scale=self.guidance_scale,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """What scores images one by one, beside the features of sets; None for none.

    Attributes:
      perceptual: ``(images, references) -> [n]``, distances to the ODE's images.
      matching: ``(images, indices) -> [n]``, how well images match their prompts.
    """

    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    matching: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
