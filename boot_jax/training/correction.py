"""A loss of trajectories with the correction of a student's samples beside it."""

from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding

from boot_jax.auxiliary import AuxiliaryNetwork
from boot_jax.conditions import Encode
from boot_jax.guidance import Denoiser
from boot_jax.objectives import (
    Objective,
    Signal,
    auxiliary_loss,
    correction_loss,
    draw_renoising_times,
)
from boot_jax.objectives.base import TRAJECTORY_RESIDUAL
from boot_jax.schedules import NoiseSchedule
from boot_jax.training.auxiliary import Auxiliary, auxiliary_optimizer
from boot_jax.training.microbatches import split_batch
from boot_jax.training.step import Loss

# Of the keys that the correction draws from, beside those of the trajectories.
_STREAM = 2**30


def split_share(tree: Any, stride: int) -> tuple[Any, Any]:
    """Every ``stride``-th row of ``[B, ...]``, and the others.

    No row leaves the device that holds it, if each holds a multiple of ``stride``.
    """
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, stride, *leaf.shape[1:]), tree)
    share = jax.tree.map(lambda leaf: leaf[:, 0], grouped)
    rest = jax.tree.map(lambda leaf: leaf[:, 1:].reshape(-1, *leaf.shape[2:]), grouped)
    return share, rest


def corrected_loss(
    trajectories: Loss,
    *,
    network: AuxiliaryNetwork,
    signal: Signal,
    denoise: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
    batch_sharding: NamedSharding | None = None,
    encode: Encode | None = None,
    reference_variance: float | None = None,
) -> Loss:
    """The loss of `boot_jax.training.distillation` on a part of the batch, and eq. (4).

    Equations are those of `boot_jax.objectives.correction`.

    Args:
      trajectories: of `distillation_loss`.
      network: the auxiliary one.
      signal: the student.
      denoise: the teacher, guided as the correction is to see it.
      schedule: the teacher's.
      objective: whose ``correction`` has a strength.
      batch_sharding, encode: as of ``trajectories``.
      reference_variance: of the teacher's samples, a mean over their dimensions; with
        it, there is a metric ``correction/variance_ratio``.
    """
    correction = objective.correction

    def placed(drawn: Any) -> Any:
        if batch_sharding is None:
            return drawn
        return jax.lax.with_sharding_constraint(drawn, batch_sharding)

    def renoising(key: Array, like: Array) -> tuple[Array, Array]:
        """Noise as of ``like [m, B / m, ...]``, and times."""
        noise_key, time_key = jax.random.split(key)
        microbatches, size = like.shape[:2]
        times = draw_renoising_times(correction, time_key, microbatches * size)
        noise = jax.random.normal(noise_key, like.shape)
        return noise, split_batch(times, microbatches)

    def draw(batch: Any, key: Array, progress: Any, microbatches: int) -> Any:
        drawn = trajectories.draw(batch, key, progress, microbatches)
        like = drawn[0][:, :: correction.stride]
        own_key = jax.random.fold_in(key, _STREAM)
        return drawn, placed(renoising(own_key, like))

    def told(frozen: Any, condition: Any) -> tuple[Any, Any]:
        """The teacher's parameters, and the condition of both networks."""
        if encode is None:
            return frozen, condition
        return frozen["teacher"], encode(frozen["text"], condition)

    def value(
        params: Any, ema_params: Any, frozen: Any, inputs: Any, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        given, trained = frozen
        drawn, (noise, r) = inputs
        (eps, _, read, _), rest = split_share(drawn, correction.stride)
        loss, metrics = trajectories.value(params, ema_params, given, rest, key)
        teacher_params, condition = told(given, read)
        own, more = correction_loss(
            params,
            network.complete(trained, teacher_params),
            teacher_params,
            eps,
            noise,
            r,
            condition,
            metrics[TRAJECTORY_RESIDUAL],
            signal=signal,
            denoise=denoise,
            auxiliary=network.denoise,
            schedule=schedule,
            objective=objective,
        )
        metrics |= more
        if reference_variance is not None:
            ratio = metrics["correction/variance"] / reference_variance
            metrics["correction/variance_ratio"] = ratio
        return correction.trajectory_weight * loss + own, metrics

    def draw_samples(inputs: Any, key: Array, microbatches: int) -> Any:
        """Fresh noise for conditions of the step."""
        (eps, _, condition, _), _ = inputs
        stride = correction.auxiliary_stride
        like, read = jax.tree.map(lambda leaf: leaf[:, ::stride], (eps, condition))
        eps_key, own_key = jax.random.split(key)
        fresh = jax.random.normal(eps_key, like.shape)
        return placed((fresh, *renoising(own_key, like), read))

    def denoising(
        trained: Any, params: Any, frozen: Any, inputs: Any
    ) -> tuple[Array, dict[str, Array]]:
        eps, noise, r, read = inputs
        teacher_params, condition = told(frozen, read)
        return auxiliary_loss(
            network.complete(trained, teacher_params),
            params,
            eps,
            noise,
            r,
            condition,
            signal=signal,
            auxiliary=network.denoise,
            schedule=schedule,
            objective=objective,
        )

    optimizer = auxiliary_optimizer(
        correction.learning_rate, correction.b1, correction.b2
    )
    return Loss(
        draw=draw,
        value=value,
        auxiliary=Auxiliary(
            init=network.init,
            optimizer=optimizer,
            updates=correction.updates,
            draw=draw_samples,
            value=denoising,
            decay=correction.decay,
        ),
    )
