"""Bootstrap intervals of figures, from what each image does to them.

A figure that is a mean over images, or to first order one, is resampled by drawing its
terms with repetition: the images' features are neither gathered nor decomposed again,
and a thousand resamples of 50,000 images take seconds. For a Frechet distance it is
also the right thing to do: a set drawn with repetition has another distance for its
smaller variety alone, so that the percentiles of the plain bootstrap lie above the
figure itself.

An interval is of the images that were drawn, the reference held fixed. It knows nothing
of a figure's bias at this number of images; see `frechet.extrapolated_distance`.

Source: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapters 13, 22.
"""

import numpy as np
from numpy.typing import ArrayLike

# Numbers of one block of drawn indices.
_BLOCK = 2**22


def bootstrap_interval(
    value: float,
    terms: ArrayLike,
    *,
    resamples: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval around a figure that the resampled mean of its terms spans.

    It does not depend on the order of the terms.

    Args:
      value: the figure.
      terms: ``[N]``; its change is the change of their mean.
      resamples: how often they are drawn.
      seed: of the draws.
      level: the share of resamples in the interval.

    Returns:
      Its ends, ``value`` plus the percentiles of the resampled mean's change.

    Raises:
      ValueError: no terms, or an argument out of range.

    >>> bootstrap_interval(2.0, [1.0, 1.0, 1.0])
    (2.0, 2.0)
    """
    given = np.sort(np.asarray(terms, np.float64))
    if given.ndim != 1 or not len(given) or resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            "a bootstrap needs terms [N], 1 resample at least and a level in (0, 1), "
            f"but was given shape {list(given.shape)}, {resamples} and {level}"
        )
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(given))
    means = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(0, len(given), (count, len(given)))
        means.append(given[drawn].mean(axis=1))
    changes = np.concatenate(means) - given.mean()
    low, high = np.quantile(changes, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(value + low), float(value + high)
