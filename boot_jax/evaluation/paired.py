"""The paired evaluation: student and teacher from the same noise.

The teacher's ODE, solved finely by Heun's method, says where each noise leads. Against
it stand the student in one step and the teacher's DDIM in a few: how far each image is
from where it should be (normalised error), and how good the images are as a set
(Frechet distance, precision, recall, against real data where there is some, else
against the ODE's own samples).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from boot_jax.conditions import TOKENS
from boot_jax.evaluation import frechet, metrics, neighbours
from boot_jax.evaluation.features import FeatureExtractor
from boot_jax.guidance import SCALE_KEY, Denoiser
from boot_jax.objectives import Objective, Signal
from boot_jax.prediction import expand
from boot_jax.sampling import (
    Generated,
    Generator,
    conditions_for,
    generate,
    image_noise,
    many_steps,
    one_step,
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


def compare(
    pair: Pair,
    options: Mapping[str, Any],
    features: FeatureExtractor,
    real_images: np.ndarray | None,
    mesh: Mesh,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores student and teacher on the same noise.

    Args:
      pair: who is compared.
      options: the ``evaluation`` section of a config.
      features: of the Frechet distance, precision and recall.
      real_images: ``[N, H, W, C]`` in [-1, 1]; None to score against the ODE's samples.
      mesh: of devices.
      progress: told what is being done.

    Returns:
      The results (see `boot_jax.evaluation.report`), and images for the grid by row.
    """
    num, batch_size = options["num_images"], options["batch_size"]
    noise = pair.noise(options["seed"])

    def run(generator: Generator) -> Generated:
        return generate(generator, noise, pair.condition, num, batch_size, mesh)

    ode_steps = options["ode_steps"]
    progress(f"teacher's ODE, Heun with {ode_steps} steps")
    reference = run(pair.ode(ode_steps)).images
    real = reference if real_images is None else real_images
    scorer = _Scorer(features, real, reference, options["neighbours"])
    progress("student, 1 step")
    student = run(pair.student())
    results: dict[str, Any] = {
        "student": scorer.score(student)
        | {"variance_ratio": metrics.variance_ratio(student.images, real)},
        "teacher": {"ddim": {}},
    }
    rows: dict[str, np.ndarray] = {}
    for steps in options["ddim_steps"]:
        progress(f"teacher, DDIM with {steps} steps")
        sampled = run(pair.sampler(steps))
        results["teacher"]["ddim"][str(steps)] = scorer.score(sampled)
        if steps in (1, 8, 50):
            name = f"teacher, {steps} step{'s' if steps > 1 else ''}"
            rows[name] = sampled.images[: options["grid_images"]]
    rows["student, 1 step"] = student.images[: options["grid_images"]]
    results["teacher"]["ode"] = {
        "name": f"Heun, {ode_steps} steps",
        "network_calls": 2 * ode_steps - 1,
        **scorer.score(Generated(reference, float("nan")), fit=False),
    }
    progress("error over target time")
    results["error_over_time"] = error_over_time(pair, options, mesh)
    results |= _equivalent(results)
    results["features"], results["num_images"] = features.name, num
    return results, rows


class _Scorer:
    """The figures of one set of images, against real data and the ODE's samples."""

    def __init__(
        self,
        features: FeatureExtractor,
        real: np.ndarray,
        reference: np.ndarray,
        neighbours: int,
    ) -> None:
        self._features, self._reference, self._k = features, reference, neighbours
        self._real = features(real)
        self._statistics = frechet.feature_statistics(self._real)

    def score(self, generated: Generated, fit: bool = True) -> dict[str, float]:
        found = self._features(generated.images)
        nearby = neighbours.precision_recall(self._real, found, self._k)
        scores = {
            "frechet_distance": frechet.frechet_distance(
                self._statistics, frechet.feature_statistics(found)
            ),
            "precision": nearby.precision,
            "recall": nearby.recall,
        }
        if fit:
            scores["normalized_error"] = metrics.normalized_error(
                generated.images, self._reference
            )
            scores["seconds_per_image"] = generated.seconds_per_image
        return scores


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
