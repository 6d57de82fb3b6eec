"""The paired evaluation: student and teacher from the same noise.

The teacher's ODE, solved finely by Heun's method, says where each noise leads. Against
it stand the student in one step and the teacher's DDIM in a few: how far each image is
from where it should be (normalised error), and how good the images are as a set
(Frechet distance, precision, recall, against real data where there is some, else
against the ODE's own samples). All of them go batch by batch, so that memory holds
features, and not images.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from boot_jax.conditions import TOKENS
from boot_jax.evaluation import metrics
from boot_jax.evaluation.features import FeatureExtractor
from boot_jax.evaluation.reference import Measured, Samples
from boot_jax.evaluation.scores import Scores, score, warnings_of
from boot_jax.guidance import SCALE_KEY, Denoiser
from boot_jax.objectives import Objective, Signal
from boot_jax.prediction import expand
from boot_jax.sampling import (
    Generator,
    conditions_for,
    image_noise,
    many_steps,
    one_step,
    to_images,
)
from boot_jax.sharding import batch_sharding, batch_shards, place, to_host
from boot_jax.solvers import signal_step, time_grid
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
    """

    signal: Signal
    params: Any
    denoise: Denoiser
    teacher: Teacher
    objective: Objective
    guidance_scale: float | None = None
    tokens: np.ndarray | None = None
    encode: Callable[[Any], Any] = lambda condition: condition

    def student(self) -> Generator:
        """The one-step generator."""
        return self._encoded(one_step(self.signal, self.params, self.objective))

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


def compare(
    pair: Pair,
    options: Mapping[str, Any],
    features: FeatureExtractor,
    reference: Measured | None,
    mesh: Mesh,
    progress: Callable[[str], None] = lambda text: None,
    judges: Judges | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores student and teacher on the same noise.

    Args:
      pair: who is compared.
      options: the ``evaluation`` section of a config.
      features: of the figures of sets; those of images read decoded samples.
      reference: real images; None to score against the ODE's samples.
      mesh: of devices.
      progress: told what is being done.
      judges: of single images.

    Returns:
      The results (see `boot_jax.evaluation.report`), and images for the grid by row.
    """
    ode_steps = options["ode_steps"]
    ode, student = f"teacher's ODE, Heun with {ode_steps} steps", "student, 1 step"
    ddim = {
        steps: f"teacher, DDIM with {steps} steps" for steps in options["ddim_steps"]
    }
    samplers = {ode: pair.ode(ode_steps), student: pair.student()}
    samplers |= {name: pair.sampler(steps) for steps, name in ddim.items()}
    tallies = {name: _Tally(pair, features, options) for name in samplers}
    judges = judges or Judges()
    reads_samples = features.image_shape == pair.teacher.sample_shape
    judged = judges.perceptual is not None or judges.matching is not None
    # Samples are decoded only for those who look at images.
    decoder = pair.teacher.decoder if judged or not reads_samples else None
    for indices, eps, condition in _batches(pair, options, mesh):
        target, is_first = None, indices[0] == 0
        if not is_first:
            progress(f"images {indices[0]} to {indices[-1]}")
        for name, sampler in samplers.items():
            if is_first:
                progress(name)
                jax.block_until_ready(sampler(eps, condition))  # compiles
            before = time.perf_counter()
            made = jax.block_until_ready(sampler(eps, condition))
            seconds = time.perf_counter() - before
            samples = to_host(made).astype(np.float32)[: len(indices)]
            batch = _Batch(samples, to_images(decoder, samples), indices)
            target = batch if target is None else target
            tallies[name].add(batch, target, seconds / len(made), judges)
    progress("figures")
    targets = tallies[ode]
    own = targets.samples.measured()
    reference = reference or own

    def scored(tally: _Tally) -> Scores:
        scores = score(reference, tally.samples.measured(), options, teacher=own)
        tally.add_to(scores, targets)
        return scores

    student_scores = scored(tallies[student])
    measured = tallies[student].samples.measured()
    if reference.variance:
        ratio = (measured.variance or 0.0) / reference.variance
        student_scores.figures["variance_ratio"] = ratio
    results: dict[str, Any] = {
        "student": student_scores.as_dict(),
        "teacher": {
            "ddim": {
                str(steps): scored(tallies[name]).as_dict()
                for steps, name in ddim.items()
            },
            "ode": {
                "name": f"Heun, {ode_steps} steps",
                "network_calls": 2 * ode_steps - 1,
                **score(reference, own, options).as_dict(),
            },
        },
    }
    progress("error over target time")
    results["error_over_time"] = error_over_time(pair, options, mesh)
    results |= _equivalent(results)
    results["features"], results["num_images"] = features.name, options["num_images"]
    results["distance_name"] = features.distance_name
    results["reference"] = reference.provenance
    results["warnings"] = warnings_of(reference, measured, options)
    shown = {steps: name for steps, name in ddim.items() if steps in (1, 8, 50)}
    rows = {
        f"teacher, {steps} step{'s' if steps > 1 else ''}": tallies[name].shown()
        for steps, name in shown.items()
    }
    return results, rows | {student: tallies[student].shown()}


def _batches(
    pair: Pair, options: Mapping[str, Any], mesh: Mesh
) -> Iterator[tuple[np.ndarray, Array, Any]]:
    """Indices, noise and condition, the latter two filled up for the devices."""
    num, shards = options["num_images"], batch_shards(mesh)
    size = -(-min(options["batch_size"], num) // shards) * shards
    noise = pair.noise(options["seed"])
    for start in range(0, num, size):
        # The last batch is filled up and cut, so that there is one compilation.
        whole = np.arange(start, start + size)
        drawn = noise(whole), pair.condition(whole)
        eps, condition = place(drawn, batch_sharding(mesh))
        yield whole[: num - start], eps, condition


class _Batch(NamedTuple):
    """Samples, and the images of them where someone looks at images."""

    samples: np.ndarray
    images: np.ndarray
    indices: np.ndarray


class _Tally:
    """What is kept of one sampler's images, batch by batch."""

    def __init__(
        self, pair: Pair, features: FeatureExtractor, options: Mapping[str, Any]
    ) -> None:
        asked = options["metrics"]
        keep_spatial = "spatial_frechet_distance" in asked
        self.samples = Samples(features, keep_spatial=keep_spatial)
        self.variance = metrics.TotalVariance()
        self._reads_samples = features.image_shape == pair.teacher.sample_shape
        self._wanted = options["grid_images"]
        self._first: list[np.ndarray] = []
        self._seconds: list[float] = []
        self._terms: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        batch: _Batch,
        target: _Batch,
        seconds_per_image: float,
        judges: Judges,
    ) -> None:
        """Adds a batch, and where its noises lead."""
        axes = tuple(range(1, batch.samples.ndim))
        difference = batch.samples.astype(np.float64) - target.samples
        self._keep("normalized_error", np.sum(difference**2, axis=axes))
        if judges.perceptual is not None:
            self._keep("lpips", judges.perceptual(batch.images, target.images))
        if judges.matching is not None:
            self._keep("clip_score", judges.matching(batch.images, batch.indices))
        self.samples.add(batch.samples if self._reads_samples else batch.images)
        self.variance.update(batch.samples)
        self._seconds.append(seconds_per_image)
        if batch.indices[0] < self._wanted:
            self._first.append(batch.samples)

    def _keep(self, name: str, terms: np.ndarray) -> None:
        self._terms.setdefault(name, []).append(np.asarray(terms, np.float64))

    def add_to(self, scores: Scores, targets: "_Tally") -> None:
        """Adds the figures of single images; ``targets`` is the ODE's tally."""
        spread = targets.variance.value()
        if not spread > 0.0:
            raise ValueError("the teacher's ODE gives the same image for every noise")
        for name, parts in self._terms.items():
            terms = np.concatenate(parts)
            scores.add_mean(
                name, terms / spread if name == "normalized_error" else terms
            )
        scores.figures["seconds_per_image"] = float(np.mean(self._seconds))
        if len(self._seconds) >= 4:  # fewer say nothing of their scatter
            scores.add_mean("seconds_per_image", np.asarray(self._seconds))

    def shown(self) -> np.ndarray:
        """The first samples, for the grid."""
        return np.concatenate(self._first)[: self._wanted]


def _equivalent(results: Mapping[str, Any]) -> dict[str, Any]:
    """The number of DDIM steps that the student is worth, by Frechet distance."""
    ddim = results["teacher"]["ddim"]
    equal = metrics.equivalent_steps(
        [int(steps) for steps in ddim],
        [scores["frechet_distance"] for scores in ddim.values()],
        results["student"]["frechet_distance"],
    )
    return {
        "ddim_equivalent_steps": equal.value,
        "ddim_equivalent_steps_censored": equal.censored,
    }


def error_over_time(
    pair: Pair, options: Mapping[str, Any], mesh: Mesh
) -> dict[str, list[float]]:
    """The student's error at target times, over the variance of the ODE's images.

    The reference is the signal itself, followed by Heun steps in signal space from the
    boundary condition ``y = f(eps, t_max)``.

    Args:
      pair: who is compared.
      options: reads ``error_times``, ``error_images``, ``ode_steps`` and ``seed``.
      mesh: of devices.

    Returns:
      ``{"times": [...], "student": [...]}``, times falling.
    """
    num_times, shards = options["error_times"], batch_shards(mesh)
    num = -(-options["error_images"] // shards) * shards
    per_time = max(1, options["ode_steps"] // num_times)
    objective, schedule = pair.objective, pair.teacher.schedule
    times = time_grid(num_times * per_time, objective.t_max, objective.t_min)
    indices = np.arange(num)
    drawn = pair.noise(options["seed"])(indices), pair.condition(indices)
    eps, condition = place(drawn, batch_sharding(mesh))
    condition = pair.encode(condition)

    @jax.jit
    def step(
        params: Any, eps: Array, condition: Any, y_t: Array, t: Array, s: Array
    ) -> Array:
        t, s = jnp.full((num,), t), jnp.full((num,), s)
        return signal_step(
            lambda x, t: pair.denoise(params, x, t, condition),
            schedule,
            "heun",
            y_t,
            eps,
            t,
            s,
        )

    @jax.jit
    def student(params: Any, eps: Array, condition: Any, t: Array) -> Array:
        return pair.signal(params, eps, jnp.full((num,), t), condition)

    @jax.jit
    def boundary(params: Any, eps: Array, condition: Any) -> Array:
        start = jnp.full((num,), objective.t_max)
        x_t = expand(schedule.prior_scale(start), eps) * eps
        return pair.denoise(params, x_t, start, condition)

    params, times = pair.teacher.params, np.asarray(times)
    y_t = boundary(params, eps, condition)
    errors = []
    for index in range(num_times + 1):
        t = times[index * per_time]
        predicted = student(pair.params, eps, condition, t)
        errors.append(to_host(predicted) - to_host(y_t))
        for i in range(index * per_time, min((index + 1) * per_time, len(times) - 1)):
            y_t = step(params, eps, condition, y_t, times[i], times[i + 1])
    # Over one variance, that of the images: at t_max the exact signal may have none.
    images = to_host(y_t)
    return {
        "times": times[::per_time].astype(float).tolist(),
        "student": [metrics.normalized_error(images + e, images) for e in errors],
    }
