"""Generation: one call of the student, or many of the teacher; one key per image.

Image ``i`` of a seed starts from the noise of ``fold_in(key(seed), i)``, so it does not
depend on the batch size or on the number of devices.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from boot_jax.config import ConfigError
from boot_jax.guidance import SCALE_KEY, Denoiser
from boot_jax.objectives import RENOISE, Jump, Objective, Signal, StartedSchedule
from boot_jax.prediction import expand
from boot_jax.schedules import NoiseSchedule
from boot_jax.sharding import batch_sharding, batch_shards, place, to_host
from boot_jax.solvers import (
    add_noise,
    ddim_step,
    heun_step,
    time_grid,
)
from boot_jax.teachers.base import Decoder

#: ``generate(eps [B, H, W, C], condition) -> images [B, H, W, C]``.
Generator = Callable[[Array, Any], Array]

# Of the noises of a stored set; no step of a run has this number.
_STORED_STREAM = 2**31 + 1


def image_noise(seed: int, indices: Any, sample_shape: tuple[int, ...]) -> Array:
    """Starting noise ``[len(indices), *sample_shape]``, one key per image."""
    return _noise(jax.random.key(seed), indices, sample_shape)


def stored_noise(seed: int, indices: Any, sample_shape: tuple[int, ...]) -> Array:
    """The same for images to learn from; that of no seed's images is among it."""
    key = jax.random.key(seed, impl="threefry2x32")
    return _noise(jax.random.fold_in(key, _STORED_STREAM), indices, sample_shape)


def _noise(key: Array, indices: Any, sample_shape: tuple[int, ...]) -> Array:
    def one(index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), sample_shape)

    return jax.vmap(one)(jnp.asarray(indices, jnp.uint32))


def slerp(start: Array, end: Array, weights: Array) -> Array:
    """Spherical interpolation between two noises, ``[len(weights), ...]``.

    Along the great circle the norm of Gaussian noise is kept, which a straight line
    would lose (Shoemake, *Animating rotation with quaternion curves*, 1985).
    """
    cosine = jnp.vdot(start, end) / (jnp.linalg.norm(start) * jnp.linalg.norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    weights = expand(weights, jnp.broadcast_to(start, (1, *start.shape)))

    def share(part: Array) -> Array:
        # Equal ends, as of one seed, span no circle.
        return jnp.where(angle > 0, jnp.sin(part * angle) / jnp.sin(angle), part)

    return share(1 - weights) * start[None] + share(weights) * end[None]


def conditions_for(
    indices: np.ndarray,
    num_classes: int | None,
    *,
    label: int = -1,
    guidance_scale: float | None = None,
) -> Any:
    """The condition of given images: one label, or (``-1``) every class in turn.

    Args:
      indices: ``[B]`` of the images.
      num_classes: of the teacher; None gives None.
      label: the class of all, or -1.
      guidance_scale: told to a student that was trained on a range; None for others.

    Raises:
      ConfigError: there is no such class.
    """
    if num_classes is None:
        return None
    if not -1 <= label < num_classes:
        raise ConfigError(
            f"sample.label is {label}, but the classes are 0 to {num_classes - 1} "
            "(-1 for each in turn)"
        )
    labels = indices % num_classes if label == -1 else np.full(len(indices), label)
    condition: dict[str, np.ndarray] = {"label": labels.astype(np.int32)}
    if guidance_scale is not None:
        condition[SCALE_KEY] = np.full(len(indices), guidance_scale, np.float32)
    return condition


def one_step(signal: Signal, params: Any, objective: Objective) -> Generator:
    """The student: ``y_theta(eps, t_min)``, one call of the network."""
    return functools.partial(_student_step(signal, objective.t_min), params)


@functools.lru_cache(maxsize=8)
def _student_step(signal: Signal, t_min: float) -> Callable[..., Array]:
    return jax.jit(
        lambda params, eps, condition: signal(
            params, eps, jnp.full(eps.shape[:1], t_min, eps.dtype), condition
        )
    )


def few_steps(
    jump: Jump,
    params: Any,
    schedule: NoiseSchedule,
    objective: Objective,
    num_steps: int,
    renoise: str = "along",
) -> Generator:
    """The student in a few steps: to a sample, back to some noise, and again.

    From ``x_u``, at times ``u`` on a uniform grid below ``t_max``, ``fresh`` noise is
    added to the sample, ``x_r = alpha_r y + sigma_r eps'`` (as a consistency model is
    sampled, arXiv 2303.01469), which mends what the last step did wrong; or the step
    goes only ``along`` the trajectory to ``x_r``, which keeps to the one ODE. Fresh
    noise is a function of the starting noise, so that an image does not depend on its
    batch.

    Args:
      jump: the student; see `boot_jax.objectives.starts`.
      params: its parameters.
      schedule: the teacher's.
      objective: for ``t_min`` and ``t_max``.
      num_steps: calls of the student; 1 is `one_step`.
      renoise: ``fresh`` or ``along``.

    Raises:
      ValueError: another ``renoise``.
    """
    if renoise not in RENOISE:
        raise ValueError(f"renoise is {renoise!r}; choose one of {RENOISE}")
    generate = _student_steps(jump, schedule, objective, num_steps, renoise)
    return functools.partial(generate, params)


@functools.lru_cache(maxsize=8)
def _student_steps(
    jump: Jump,
    schedule: NoiseSchedule,
    objective: Objective,
    num_steps: int,
    renoise: str,
) -> Callable[..., Array]:
    times = np.asarray(time_grid(num_steps, objective.t_max))[:-1]

    def generate(params: Any, eps: Array, condition: Any) -> Array:
        def filled(value: Any) -> Array:
            return jnp.full(eps.shape[:1], value, eps.dtype)

        u = filled(times[0])
        x_u = expand(schedule.prior_scale(u), eps) * eps
        for index, level in enumerate(times[1:]):
            r = filled(level)
            if renoise == "fresh":
                y = jump(params, x_u, u, filled(objective.t_min), condition)
                x_u = add_noise(schedule, y, _fresh_noise(eps, index), r)
            else:
                y = jump(params, x_u, u, r, condition)
                seen = StartedSchedule(schedule, u, objective.t_max)
                noise = x_u / expand(schedule.sigma(u), x_u) if index else eps
                x_u = add_noise(seen, y, noise, r)
            u = r
        return jump(params, x_u, u, filled(objective.t_min), condition)

    return jax.jit(generate)


def _fresh_noise(eps: Array, step: int) -> Array:
    """Noise ``[B, ...]`` of a later step, each image's from its own starting noise."""

    def one(image: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(image.astype(jnp.float32), jnp.uint32)
        key = jax.random.key(jnp.sum(bits.ravel(), dtype=jnp.uint32))
        return jax.random.normal(
            jax.random.fold_in(key, step), image.shape, image.dtype
        )

    return jax.vmap(one)(eps)


def many_steps(
    denoise: Denoiser,
    params: Any,
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    t_max: float = 1.0,
    solver: str = "ddim",
    power: float = 1.0,
    steps: tuple[np.ndarray, np.ndarray] | None = None,
) -> Generator:
    """The teacher's sampler, from ``t_max`` to 0 on the grid of `time_grid`.

    With ``steps``, times ``t [num_steps]`` and where to from each, ``s``, it is another
    grid: of `boot_jax.teachers.base.Teacher.sampler_steps`, to sample as others do.

    The steps are dispatched one by one: one short program serves every number of steps,
    and convolutions on CPU keep all cores, which they lose inside a compiled loop.
    """
    compiled = _teacher_steps(denoise, schedule)
    times = np.asarray(time_grid(num_steps, t_max, power=power))
    starts, ends = (times[:-1], times[1:]) if steps is None else steps

    def generate(eps: Array, condition: Any) -> Array:
        x_t = eps * float(schedule.prior_scale(jnp.asarray(starts[0])))
        for index in range(num_steps):
            # The last step ends at clean data, where Heun's second call has no use.
            name = "ddim" if index == num_steps - 1 else solver
            x_t = compiled[name](params, x_t, starts[index], ends[index], condition)
        return x_t

    return generate


@functools.lru_cache(maxsize=8)
def _teacher_steps(
    denoise: Denoiser, schedule: NoiseSchedule
) -> dict[str, Callable[..., Array]]:
    def compiled(step: Callable[..., Array]) -> Callable[..., Array]:
        def run(params: Any, x_t: Array, t: Array, s: Array, condition: Any) -> Array:
            t, s = (jnp.broadcast_to(end, x_t.shape[:1]) for end in (t, s))
            return step(
                lambda x, t: denoise(params, x, t, condition), schedule, x_t, t, s
            )

        return jax.jit(run)

    return {"ddim": compiled(ddim_step), "heun": compiled(heun_step)}


def to_images(
    decoder: Decoder | None, samples: np.ndarray, batch_size: int = 16
) -> np.ndarray:
    """Samples as images ``[N, H, W, C]``; decoded, where they are something else."""
    if decoder is None:
        return samples
    batches = np.split(samples, range(batch_size, len(samples), batch_size))
    decoded = [decoder.decode(decoder.params, jnp.asarray(batch)) for batch in batches]
    return np.concatenate([np.asarray(images) for images in decoded])


class Generated(NamedTuple):
    """Images ``[num, H, W, C]`` float32, and the seconds of one."""

    images: np.ndarray
    seconds_per_image: float


def generate(
    generator: Generator,
    noise: Callable[[np.ndarray], Array],
    condition: Callable[[np.ndarray], Any],
    num: int,
    batch_size: int,
    mesh: Mesh,
) -> Generated:
    """``num`` images on the host, in batches that are spread over the mesh.

    Args:
      generator: of `one_step` or `many_steps`.
      noise: maps image indices to starting noise.
      condition: maps image indices to the batch's condition.
      num: how many.
      batch_size: of a batch; rounded up so that the devices share it evenly. The last
        batch is filled up and cut, so that there is one compilation.
      mesh: of `boot_jax.sharding.create_mesh`.

    Returns:
      The images on the host, and the seconds that the generator took for each, without
      its compilation, the drawing of noise and the transfer.
    """
    shards = batch_shards(mesh)
    batch_size = -(-min(batch_size, num) // shards) * shards
    sharding = batch_sharding(mesh)
    images, seconds = [], 0.0
    for start in range(0, num, batch_size):
        indices = np.arange(start, start + batch_size)
        eps, given = place((noise(indices), condition(indices)), sharding)
        if start == 0:
            jax.block_until_ready(generator(eps, given))  # compiles
        before = time.perf_counter()
        batch = jax.block_until_ready(generator(eps, given))
        seconds += time.perf_counter() - before
        images.append(to_host(batch).astype(np.float32))
    total = len(images) * batch_size
    return Generated(np.concatenate(images)[:num], seconds / total)
