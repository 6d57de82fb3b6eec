"""The inception score, of the classes that a network sees in images.

Salimans et al. 2016, *Improved Techniques for Training GANs*, arXiv 1606.03498:

    exp( E_x KL( p(y | x) || p(y) ) ),      p(y) = E_x p(y | x)

between 1 and the number of classes. It says nothing of real images.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, logsumexp

from boot_jax.evaluation.frechet import checked_features

Floats = NDArray[np.float64]


class InceptionScore(NamedTuple):
    """The mean over splits, and to first order what each image does to it, ``[N]``.

    The standard deviation over the splits is what papers print behind it.
    """

    value: float
    deviation: float
    influences: Floats


def inception_score(logits: ArrayLike, splits: int = 10) -> InceptionScore:
    """The score of images, the mean of those of consecutive parts.

    With more than one part it depends on the images' order; papers use 10.

    Args:
      logits: ``[N, K]``, of InceptionV3 without the bias.
      splits: parts, each with its own ``p(y)``.

    Raises:
      ValueError: fewer images than parts, or NaN or infinity.
    """
    if splits < 1:
        raise ValueError(f"the images are split into 1 part at least, not {splits}")
    given = log_softmax(checked_features(logits, splits), axis=1)
    scores, influences = [], []
    for part in np.array_split(given, splits):
        marginal = logsumexp(part, axis=0) - np.log(len(part))
        divergences = np.sum(np.exp(part) * (part - marginal[None]), axis=1)
        score = np.exp(divergences.mean())
        scores.append(score)
        # p(y) maximises the mean log-likelihood: its own change is of second order.
        influences.append(score * (divergences - divergences.mean()))
    return InceptionScore(
        float(np.mean(scores)), float(np.std(scores)), np.concatenate(influences)
    )
