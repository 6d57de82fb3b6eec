"""What a student's training minimises: an objective, on inputs that it draws itself.

Most objectives need no batch, or one of prompts. Those that learn from real images, or
from the teacher's stored samples, find them in the batch under `IMAGE`, or `TARGET` and
`INDEX`; the rest of it is what the images are conditioned on.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding

from boot_jax.conditions import Conditions, Encode
from boot_jax.guidance import Denoiser
from boot_jax.objectives import (
    LOSSES,
    Jump,
    Objective,
    Signal,
    choose_starts,
    draw_starts,
    draw_times,
    started_loss,
)
from boot_jax.schedules import NoiseSchedule
from boot_jax.training.microbatches import split_batch
from boot_jax.training.step import Loss

#: Where a batch carries real images ``[B, H, W, C]``; or the teacher's stored samples
#: alike, and the indices ``[B]`` of the noises that these start from.
IMAGE, TARGET, INDEX = "image", "target", "index"


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
    student_denoise: Denoiser | None = None,
    noise_of: Callable[[Array], Array] | None = None,
    jump: Jump | None = None,
) -> Loss:
    """The objective on noise, times and conditions that it draws itself.

    ``batch_sharding`` says where the inputs ``[m, B / m, ...]`` live. With ``encode``
    (of `boot_jax.conditions.prompt_encoder`) batches are of prompts, and ``frozen`` is
    ``{"teacher": its parameters, "text": the encoder's}`` instead of the former alone.
    ``student_denoise`` is needed with real images, ``noise_of``, which maps indices to
    noise, with stored samples, and ``jump``, the student from any start, with
    ``objective.start_times``.

    Raises:
      ValueError: there are starting times, but no ``jump``.
    """
    if objective.start_times and jump is None:
        raise ValueError(
            "objective.start_times needs a student that is told its start; set "
            "student.time_conditioning='added'"
        )

    def draw(batch: Any, key: Array, progress: Any, microbatches: int) -> Any:
        noise_key, time_key, condition_key = jax.random.split(key, 3)
        # Drawn in its last shape: drawn flat, and reshaped, every device would have to
        # make the noise of all.
        shape = (microbatches, batch_size // microbatches, *sample_shape)
        draw_all = draw_starts if objective.start_times else draw_times
        times = draw_all(objective, time_key, batch_size, progress)
        given = dict(batch or {})
        read = {name: given.pop(name) for name in (IMAGE, TARGET) if name in given}
        if noise_of is not None:
            eps = split_batch(noise_of(given.pop(INDEX)), microbatches)
            condition = given or None
        else:
            eps = jax.random.normal(noise_key, shape)
            condition = conditions.draw(condition_key, batch_size, given or None)
        drawn = eps, *split_batch((times, condition, read), microbatches)
        if batch_sharding is None:
            return drawn
        return jax.lax.with_sharding_constraint(drawn, batch_sharding)

    def value(
        params: Any, ema_params: Any, frozen: Any, inputs: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        eps, t, condition, read = inputs
        more: dict[str, Any] = {}
        if IMAGE in read:
            more = {"images": read[IMAGE], "student_denoise": student_denoise}
        if TARGET in read:
            more = {"targets": read[TARGET]}
        teacher_params = frozen
        if encode is not None:
            teacher_params = frozen["teacher"]
            condition = encode(frozen["text"], condition)
        target_params = ema_params if objective.target_network == "ema" else None
        shared: Any = {
            "denoise": denoise,
            "schedule": schedule,
            "objective": objective,
            "target_params": target_params,
        }
        if objective.start_times:
            assert jump is not None
            u, t = choose_starts(objective, *t)
            return started_loss(
                params, teacher_params, eps, u, t, condition, jump=jump, **shared
            )
        return LOSSES[objective.kind](
            params,
            teacher_params,
            eps,
            t,
            condition,
            signal=signal,
            **shared,
            **more,
        )

    return Loss(draw, value)
