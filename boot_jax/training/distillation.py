"""What a student's training minimises: an objective, on inputs that it draws itself."""

from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding

from boot_jax.conditions import Conditions, Encode
from boot_jax.guidance import Denoiser
from boot_jax.objectives import LOSSES, Objective, Signal, draw_times
from boot_jax.schedules import NoiseSchedule
from boot_jax.training.microbatches import split_batch
from boot_jax.training.step import Loss


def distillation_loss(
    *,
    signal: Signal,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
    conditions: Conditions,
    sample_shape: tuple[int, ...],
    batch_size: int,
    batch_sharding: NamedSharding | None = None,
    encode: Encode | None = None,
) -> Loss:
    """The objective on noise, times and conditions that it draws itself: no data.

    ``batch_sharding`` says where the inputs ``[m, B / m, ...]`` live. With ``encode``
    (of `boot_jax.conditions.prompt_encoder`) batches are of prompts, and ``frozen`` is
    ``{"teacher": its parameters, "text": the encoder's}`` instead of the former alone.
    """

    def draw(batch: Any, key: Array, progress: Any, microbatches: int) -> Any:
        noise_key, time_key, condition_key = jax.random.split(key, 3)
        # Drawn in its last shape: drawn flat, and reshaped, every device would have to
        # make the noise of all.
        shape = (microbatches, batch_size // microbatches, *sample_shape)
        times = draw_times(objective, time_key, batch_size, progress)
        condition = conditions.draw(condition_key, batch_size, batch)
        drawn = (
            jax.random.normal(noise_key, shape),
            *split_batch((times, condition), microbatches),
        )
        if batch_sharding is None:
            return drawn
        return jax.lax.with_sharding_constraint(drawn, batch_sharding)

    def value(
        params: Any, ema_params: Any, frozen: Any, inputs: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        eps, t, condition = inputs
        teacher_params = frozen
        if encode is not None:
            teacher_params = frozen["teacher"]
            condition = encode(frozen["text"], condition)
        return LOSSES[objective.kind](
            params,
            teacher_params,
            eps,
            t,
            condition,
            signal=signal,
            denoise=denoise,
            schedule=schedule,
            objective=objective,
            target_params=ema_params if objective.target_network == "ema" else None,
        )

    return Loss(draw, value)
