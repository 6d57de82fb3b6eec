"""What is kept of a sampler's images, batch by batch: their features, not the images.

All samplers are run on the same batches of noise, so that image ``i`` of each comes
from the same.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from boot_jax.evaluation import metrics
from boot_jax.evaluation.features import FeatureExtractor
from boot_jax.evaluation.pair import Judges, Pair
from boot_jax.evaluation.reference import Samples
from boot_jax.evaluation.scores import Scores
from boot_jax.sampling import Generator, to_images
from boot_jax.sharding import batch_sharding, batch_shards, place, to_host


class Noises(NamedTuple):
    """A batch to be sampled.

    Attributes:
      indices: of the images.
      eps, condition: of them, filled up for the devices.
    """

    indices: np.ndarray
    eps: Array
    condition: Any


class Batch(NamedTuple):
    """Samples, and the images of them where someone looks at images."""

    samples: np.ndarray
    images: np.ndarray
    indices: np.ndarray


def batches(pair: Pair, options: Mapping[str, Any], mesh: Mesh) -> Iterator[Noises]:
    """The noises of an evaluation, ``num_images`` in batches of ``batch_size``."""
    num, shards = options["num_images"], batch_shards(mesh)
    size = -(-min(options["batch_size"], num) // shards) * shards
    noise = pair.noise(options["seed"])
    for start in range(0, num, size):
        # The last batch is filled up and cut, so that there is one compilation.
        whole = np.arange(start, start + size)
        drawn = noise(whole), pair.condition(whole)
        eps, condition = place(drawn, batch_sharding(mesh))
        yield Noises(whole[: num - start], eps, condition)


class Tally:
    """Runs a sampler, and keeps what its figures need.

    Args:
      name: of the sampler, told to ``progress`` when it is compiled.
      sampler: gives samples.
      pair: whose teacher's decoder turns them into images.
      features: of the figures of sets.
      options: the ``evaluation`` section of a config.
      judges: of single images.
      progress: told what is being done.
    """

    def __init__(
        self,
        name: str,
        sampler: Generator,
        *,
        pair: Pair,
        features: FeatureExtractor,
        options: Mapping[str, Any],
        judges: Judges,
        progress: Callable[[str], None],
    ) -> None:
        asked = options["metrics"]
        keep_spatial = "spatial_frechet_distance" in asked
        self.samples = Samples(features, keep_spatial=keep_spatial)
        self.variance = metrics.TotalVariance()
        self._name, self._sampler, self._progress = name, sampler, progress
        self._judges = judges
        self._reads_samples = features.image_shape == pair.teacher.sample_shape
        judged = judges.perceptual is not None or judges.matching is not None
        # Samples are decoded only for those who look at images.
        needs_images = judged or not self._reads_samples
        self._decoder = pair.teacher.decoder if needs_images else None
        self._wanted = options["grid_images"]
        self._first: list[np.ndarray] = []
        self._seconds: list[float] = []
        self._terms: dict[str, list[np.ndarray]] = {}

    def sample(self, noises: Noises) -> Batch:
        """What the sampler makes of a batch, timed."""
        if noises.indices[0] == 0:
            self._progress(self._name)
            jax.block_until_ready(self._sampler(noises.eps, noises.condition))
        before = time.perf_counter()
        made = jax.block_until_ready(self._sampler(noises.eps, noises.condition))
        self._seconds.append((time.perf_counter() - before) / len(made))
        samples = to_host(made).astype(np.float32)[: len(noises.indices)]
        return self.batch(samples, noises.indices)

    def batch(self, samples: np.ndarray, indices: np.ndarray) -> Batch:
        """Samples with their images."""
        return Batch(samples, to_images(self._decoder, samples), indices)

    def add(self, batch: Batch, target: Batch) -> None:
        """Adds a batch, and where its noises lead."""
        axes = tuple(range(1, batch.samples.ndim))
        difference = batch.samples.astype(np.float64) - target.samples
        self._keep("normalized_error", np.sum(difference**2, axis=axes))
        if self._judges.perceptual is not None:
            self._keep("lpips", self._judges.perceptual(batch.images, target.images))
        if self._judges.matching is not None:
            self._keep("clip_score", self._judges.matching(batch.images, batch.indices))
        self.samples.add(batch.samples if self._reads_samples else batch.images)
        self.variance.update(batch.samples)
        if batch.indices[0] < self._wanted:
            self._first.append(batch.samples)

    def _keep(self, name: str, terms: np.ndarray) -> None:
        self._terms.setdefault(name, []).append(np.asarray(terms, np.float64))

    def add_to(self, scores: Scores, spread: float) -> None:
        """Adds the figures of single images; ``spread`` is the targets' variance."""
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
