"""The correction of a student's distribution, without data.

The losses of `boot_jax.objectives` follow trajectories. What a student gets wrong on
the way adds up and, as it is fitted by least squares, it errs towards the mean: its
samples vary less than they should. The correction looks at the samples as a set.

**The direction.** Noise both distributions to a time ``r``: the one-step samples ``y =
y_theta(eps, t_min)`` to ``x_r = alpha_r y + sigma_r eps'`` with fresh noise ``eps'``,
whose density is ``q_r``; and the teacher's own, ``p_r``. They are equal for all ``r``
if they are equal for one. Since ``x_r`` depends on ``theta`` through ``y`` alone, and
the expectation of a score under its own density is 0, the gradient of their divergence
is

    grad KL(q_r | p_r) = E [alpha_r (grad log q_r - grad log p_r)(x_r) . dy/dtheta]. (1)

By Tweedie's formula a score is a denoiser, ``grad log p_r(x) = (alpha_r E[x_0 | x] -
x) / sigma_r^2``. So with the teacher ``f``, and with ``g`` the denoiser of the
student's own samples,

    grad KL(q_r | p_r) = (alpha_r / sigma_r)^2 E [(g(x_r, r) - f(x_r, r)) . dy/dtheta].
                                                                                (2)

Without the factor it is the gradient of the same divergences, of other weights for each
``r``, whose minimum is the same. It vanishes where ``g = f``: where the student has its
teacher's distribution.

**The auxiliary denoiser** ``g_psi``. It starts as the teacher, and learns all along
what the student's samples now are, by the denoising loss on them (`auxiliary_loss`):

    L_psi = E (1 + (alpha_r / sigma_r)^2) || g_psi(x_r, r) - SG[y] ||^2,        (3)

whose weights are those of a v-prediction where ``alpha^2 + sigma^2 = 1``. It is called
as the conditional half of a guided teacher is: what it learns from is guided already.

**The loss** (`correction_loss`), whose gradient is eq. (2) without the factor:

    L = E || y - SG[y - c (g_psi(x_r, r) - f(x_r, r))] ||^2.                    (4)

The gradient is stopped in both networks, as in eq. (1), where neither is
differentiated: through them, the student would look for samples at which they happen to
agree. As a divergence says nothing of how large a step is right, ``c`` makes the mean
norm of ``c (g - f)`` equal to ``a`` times that with which the loss of trajectories
pulls at the student's output: so ``a``, the *strength*, means the same for any teacher,
distance and weights.

Alone, eq. (4) may give up modes: where ``q_r`` has no samples, eq. (1) does not look.

Sources: Diff-Instruct (arXiv 2305.18455) and Distribution Matching Distillation (arXiv
2311.18828) for eqs. (1) to (3); FreeFlow (arXiv 2511.19428) for the correction without
data, beside a loss along trajectories, and on a share of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from boot_jax.guidance import Denoiser, of_student
from boot_jax.objectives.base import (
    Objective,
    Signal,
    squared_error,
    stratified,
)
from boot_jax.objectives.options import Correction
from boot_jax.schedules import NoiseSchedule
from boot_jax.solvers import add_noise

# Below it a difference of two networks is rounding, and has no direction.
_SMALLEST_NORM = 1e-6


def draw_renoising_times(correction: Correction, key: Array, batch_size: int) -> Array:
    """The times ``r`` of a batch, ``[batch_size]``, stratified over it."""
    share = stratified(key, batch_size)
    if correction.time_distribution == "logit_normal":
        normal = jax.scipy.special.ndtri(share)
        share = jax.nn.sigmoid(correction.time_mean + correction.time_scale * normal)
    low, high = correction.time_range
    return low + (high - low) * share


def correction_loss(
    params: Any,
    auxiliary_params: Any,
    teacher_params: Any,
    eps: Array,
    noise: Array,
    r: Array,
    condition: Any,
    trajectory_residual: Array | float,
    *,
    signal: Signal,
    denoise: Denoiser,
    auxiliary: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
) -> tuple[Array, dict[str, Array]]:
    """The correction of a share of the batch, eq. (4).

    Args:
      params: the student's; the only argument that the gradient reaches.
      auxiliary_params: of the auxiliary network.
      teacher_params: the teacher's.
      eps: ``[B, H, W, C]`` standard normal, of the one-step samples.
      noise: ``[B, H, W, C]`` standard normal, of their noising.
      r: ``[B]``; see `draw_renoising_times`.
      condition: a pytree with leading size ``B``, or None.
      trajectory_residual: of the rest of the batch: what ``boot_loss`` and
        ``continuous_loss`` give as ``correction/trajectory_residual``.
      signal: the student.
      denoise: the teacher, guided as the correction is to see it.
      auxiliary: ``g_psi``; its condition is the student's.
      schedule: the teacher's.
      objective: ``t_min``, and the correction's strength.

    Returns:
      The loss, and scalars: ``loss/correction``, ``correction/residual`` (the mean norm
      of ``g - f``, before ``c``), ``correction/diversity`` (the mean distance of two
      samples) and ``correction/variance`` (theirs, a mean over their dimensions).
      Norms and distances are root mean squares over an image.
    """
    y = signal(params, eps, jnp.full(r.shape, objective.t_min, r.dtype), condition)
    x_r = add_noise(schedule, stop_gradient(y), noise, r)
    own = auxiliary(auxiliary_params, x_r, r, of_student(condition))
    difference = stop_gradient(own - denoise(teacher_params, x_r, r, condition))
    size = jnp.mean(_root_mean_square(difference))
    wanted = objective.correction.strength * stop_gradient(trajectory_residual)
    scale = wanted / jnp.maximum(size, _SMALLEST_NORM)
    loss = jnp.mean(squared_error(y, stop_gradient(y) - scale * difference))
    samples = stop_gradient(y)
    return loss, {
        "loss/correction": loss,
        "correction/residual": size,
        "correction/diversity": _mean_pairwise_distance(samples),
        "correction/variance": jnp.mean(jnp.var(samples, axis=0, ddof=1)),
    }


def auxiliary_loss(
    auxiliary_params: Any,
    params: Any,
    eps: Array,
    noise: Array,
    r: Array,
    condition: Any,
    *,
    signal: Signal,
    auxiliary: Denoiser,
    schedule: NoiseSchedule,
    objective: Objective,
) -> tuple[Array, dict[str, Array]]:
    """What the auxiliary network learns from the student's samples, eq. (3).

    Arguments as in `correction_loss`; the gradient reaches the first alone.

    Returns:
      The loss, and ``{"loss/auxiliary"}``, both scalars.
    """
    start = jnp.full(r.shape, objective.t_min, r.dtype)
    y = stop_gradient(signal(params, eps, start, condition))
    x_r = add_noise(schedule, y, noise, r)
    x_0 = auxiliary(auxiliary_params, x_r, r, of_student(condition))
    weight = 1 + (schedule.alpha(r) / schedule.sigma(r)) ** 2
    loss = jnp.mean(weight * squared_error(x_0, y))
    return loss, {"loss/auxiliary": loss}


def _root_mean_square(images: Array) -> Array:
    return jnp.sqrt(jnp.mean(images**2, axis=tuple(range(1, images.ndim))))


def _mean_pairwise_distance(images: Array) -> Array:
    rows = images.reshape(images.shape[0], -1)
    lengths = jnp.mean(rows**2, axis=1)
    squared = lengths[:, None] + lengths[None] - 2 / rows.shape[1] * (rows @ rows.T)
    count = rows.shape[0] * (rows.shape[0] - 1)
    apart = 1 - jnp.eye(rows.shape[0], dtype=squared.dtype)
    return jnp.sum(apart * jnp.sqrt(jnp.maximum(squared, 0))) / count
