"""The figures of a set of samples against a reference, each with its interval."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boot_jax.evaluation import frechet, neighbours
from boot_jax.evaluation.classes import inception_score
from boot_jax.evaluation.features import Description
from boot_jax.evaluation.frechet import FeatureStatistics, rank_warning
from boot_jax.evaluation.intervals import bootstrap_interval
from boot_jax.evaluation.kernel import kernel_distance, subset_kernel_distances
from boot_jax.evaluation.reference import Measured

Floats = NDArray[np.float64]

#: Beside the Frechet distance, which is always there; see `configs`' ``evaluation``.
METRICS = (
    "precision_recall",
    "density_coverage",
    "kernel_distance",
    "inception_score",
    "spatial_frechet_distance",
    "diversity",
    "lpips",
    "clip_score",
)

#: Those that need features of InceptionV3.
OF_INCEPTION = ("inception_score", "spatial_frechet_distance")

#: Those that need the reference's features, not only its statistics.
OF_FEATURES = ("precision_recall", "density_coverage", "kernel_distance")

# Of the coverage's balls (Naeem et al. 2020).
_COVERAGE_NEIGHBOURS = 5

# Subsets of a kernel distance, as published.
_KERNEL_SUBSETS = 100


class Scores:
    """Figures by name, with the interval that a bootstrap gives each.

    Attributes:
      figures: name to value.
      intervals: name to its ends, low and high.
    """

    def __init__(self, resamples: int, seed: int) -> None:
        """Of a bootstrap; without resamples there are no intervals."""
        self.figures: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self._resamples, self._seed = resamples, seed

    def add(self, name: str, value: float, terms: Floats, least: float = 0.0) -> None:
        """A figure whose change is the change of the terms' mean; at ``least`` so."""
        self.figures[name] = float(value)
        if self._resamples:
            ends = bootstrap_interval(
                value, terms, resamples=self._resamples, seed=self._seed
            )
            self.intervals[name] = [max(end, least) for end in ends]

    def add_mean(self, name: str, terms: Floats) -> None:
        """A figure that is a mean over images."""
        self.add(name, float(np.mean(terms)), terms, least=-np.inf)

    def as_dict(self) -> dict[str, Any]:
        """Figures by name, and ``intervals`` if there are any."""
        return self.figures | ({"intervals": self.intervals} if self.intervals else {})


def score(
    reference: Measured,
    samples: Measured,
    options: Mapping[str, Any],
    teacher: Measured | None = None,
) -> Scores:
    """The figures that a config asks for.

    Args:
      reference: compared with. What it lacks the features for is left out.
      samples: that are scored.
      options: the ``evaluation`` section of a config.
      teacher: the teacher's own samples, for ``recall_of_teacher``; None for none.
    """
    asked, found = options["metrics"], samples.description
    assert found is not None, "samples are described"
    scores = Scores(options["bootstrap"], options["seed"])

    def add_distance(
        name: str,
        real: FeatureStatistics | None,
        own: FeatureStatistics | None,
        features: NDArray[Any] | None,
    ) -> None:
        if real is not None and own is not None and features is not None:
            value = frechet.frechet_distance(real, own)
            scores.add(name, value, frechet.frechet_influences(real, own, features))

    add_distance(
        "frechet_distance", reference.statistics, samples.statistics, found.features
    )
    if "spatial_frechet_distance" in asked:
        add_distance(
            "spatial_frechet_distance",
            reference.spatial,
            samples.spatial,
            found.spatial,
        )
    if "inception_score" in asked and found.logits is not None:
        made = inception_score(found.logits, options["inception_splits"])
        scores.add("inception_score", made.value, made.influences, least=1.0)
        scores.figures["inception_score_deviation"] = made.deviation
    if "diversity" in asked:
        terms = neighbours.pairwise_distance_terms(found.features)
        # Each pair is of two images: a change of one moves twice its term.
        scores.add("mean_pairwise_distance", float(terms.mean()), 2.0 * terms)
    if "diversity" in asked and teacher is not None and teacher.description:
        nearby = neighbours.precision_recall_terms(
            teacher.description.features, found.features, options["neighbours"]
        )
        scores.add_mean("recall_of_teacher", nearby.variety)
    if reference.description is not None:
        _add_neighbours(scores, reference.description.features, found, options)
    return scores


def _add_neighbours(
    scores: Scores,
    real: NDArray[Any],
    found: Description,
    options: Mapping[str, Any],
) -> None:
    asked, k = options["metrics"], options["neighbours"]
    if "precision_recall" in asked:
        nearby = neighbours.precision_recall_terms(real, found.features, k)
        scores.add_mean("precision", nearby.fidelity)
        scores.add_mean("recall", nearby.variety)
    if "density_coverage" in asked:
        k = min(_COVERAGE_NEIGHBOURS, len(real) - 1, len(found.features) - 1)
        nearby = neighbours.density_coverage_terms(real, found.features, k)
        scores.add_mean("density", nearby.fidelity)
        scores.add_mean("coverage", nearby.variety)
    if "kernel_distance" in asked:
        _add_kernel_distance(scores, real, found, options)


def _add_kernel_distance(
    scores: Scores,
    real: NDArray[Any],
    found: Description,
    options: Mapping[str, Any],
) -> None:
    size = options["kernel_subset_size"]
    if not size:
        made = kernel_distance(real, found.features)
        scores.add("kernel_distance", *made, least=-np.inf)
        return
    size = min(size, len(real), len(found.features))
    parts = subset_kernel_distances(
        real,
        found.features,
        num_subsets=_KERNEL_SUBSETS,
        subset_size=size,
        seed=options["seed"],
    )
    # Subsets share images: their scatter is that of papers, but no interval.
    scores.figures["kernel_distance"] = float(parts.mean())
    scores.figures["kernel_distance_deviation"] = float(parts.std())


def warnings_of(
    reference: Measured, samples: Measured, options: Mapping[str, Any]
) -> list[str]:
    """A line for each covariance without full rank, and for figures left out."""
    warnings = []
    for what, statistics in (
        ("the reference's images", reference.statistics),
        ("the samples", samples.statistics),
    ):
        width = len(statistics.mean)
        if warning := rank_warning(what, statistics.count, width):
            warnings.append(warning)
    lost = [name for name in options["metrics"] if name in OF_FEATURES]
    if reference.description is None and lost:
        warnings.append(
            f"left out: {', '.join(lost)}; the reference statistics hold no features, "
            "and the config names no data"
        )
    if reference.spatial is None and "spatial_frechet_distance" in options["metrics"]:
        warnings.append(
            "left out: spatial_frechet_distance; the reference statistics hold no mu_s"
        )
    return warnings
