"""The floor of every figure: real images scored against other real images.

A perfect sampler draws from the law of the data, as each half of the real images does.
So what one half gets against the other is what a perfect sampler would get at that
number of images, and how far above 0 a Frechet distance starts. Extrapolated to
infinitely many images it should be near 0; what is left is of the reference, which has
no more images than before, and of the fit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from boot_jax.evaluation.features import Description, FeatureError
from boot_jax.evaluation.frechet import extrapolated_distance, feature_statistics
from boot_jax.evaluation.reference import Measured
from boot_jax.evaluation.scores import score

#: Real images that it takes at least, for the extrapolation of one half.
LEAST = 40


def self_test(real: Measured, options: Mapping[str, Any]) -> dict[str, Any]:
    """Scores a random half of the real images against the other.

    The half that stands for samples has no more than ``options["num_images"]``, so
    that, where there are real images enough, its figures compare with a student's.

    Args:
      real: with its features.
      options: the ``evaluation`` section of a config.

    Returns:
      Figures and ``intervals`` as of any sampler, with ``num_images``,
      ``num_reference`` and ``frechet_distance_infinite``.

    Raises:
      FeatureError: there are fewer than `LEAST` real images, or no features of theirs.
    """
    if real.description is None or len(real.description.features) < LEAST:
        raise FeatureError(
            f"evaluation.selftest needs the features of {LEAST} real images at least; "
            "raise evaluation.num_real, or name data"
        )
    total = len(real.description.features)
    order = np.random.default_rng(options["seed"]).permutation(total)
    first, second = order[: total // 2], order[total // 2 :][: options["num_images"]]
    reference, samples = _part(real.description, first), _part(real.description, second)
    assert samples.description is not None
    infinite = extrapolated_distance(
        reference.statistics, samples.description.features, seed=options["seed"]
    )
    return {
        "num_reference": len(first),
        "num_images": len(second),
        "frechet_distance_infinite": infinite.value,
        **score(reference, samples, options).as_dict(),
    }


def _part(whole: Description, chosen: np.ndarray) -> Measured:
    part = whole.take(chosen)
    return Measured(statistics=feature_statistics(part.features), description=part)


def sentence(found: Mapping[str, Any], distance_name: str) -> str:
    """What a self-test found, in one line."""
    value, infinite = found["frechet_distance"], found["frechet_distance_infinite"]
    return (
        f"a perfect sampler would get: {distance_name} {value:.3g} with "
        f"{found['num_images']:,} images ({infinite:.2g} extrapolated to infinitely "
        f"many), measured on {found['num_images']:,} real images against "
        f"{found['num_reference']:,} others"
    )
