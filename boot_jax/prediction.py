"""What a network predicts, and the clean image ``x_0`` that it means.

With ``x_t = alpha x_0 + sigma eps`` and ``n = sqrt(alpha^2 + sigma^2)``, networks
predict

    epsilon          eps                             x_0 = (x_t - sigma eps) / alpha
    sample           x_0
    v_prediction     v = (alpha eps - sigma x_0) / n x_0 = (alpha x_t / n - sigma v) / n
    flow_prediction  u = eps - x_0           x_0 = (x_t - sigma u) / (alpha + sigma)

and, of networks that are imported and never trained here,

    score            s = -eps / sigma        x_0 = (x_t + sigma^2 s) / alpha
    edm_prediction   -v

The names are those of diffusers, as far as it has them. For a variance-preserving
schedule (``n = 1``), ``v`` is that of Salimans and Ho (arXiv 2202.00512); for a
variance-exploding one it is minus the preconditioned output of Karras et al. (arXiv
2206.00364) with unit data variance.
Everything above this module knows denoisers only: ``x_0`` out.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

#: What a network of ours may be trained to predict.
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

#: What networks of others predict besides.
IMPORTED_TYPES = ("score", "edm_prediction")


def _check(prediction_type: str, known: tuple[str, ...] = PREDICTION_TYPES) -> None:
    if prediction_type not in known:
        raise ValueError(
            f"prediction type {prediction_type!r} is not known; "
            f"choose one of {', '.join(known)}"
        )


def expand(factor: Array, like: Array) -> Array:
    """Appends axes to ``factor [B]`` until it broadcasts against ``like [B, ...]``."""
    return factor.reshape(factor.shape + (1,) * (like.ndim - factor.ndim))


def to_x_0(
    prediction_type: str, output: Array, x_t: Array, alpha_t: Array, sigma_t: Array
) -> Array:
    """The clean image that a network's output means.

    Args:
      prediction_type: one of `PREDICTION_TYPES` or `IMPORTED_TYPES`.
      output: ``[B, ...]``, what the network gave.
      x_t: ``[B, ...]``, what it was given, not scaled.
      alpha_t: ``[B]``; not 0 for ``epsilon``.
      sigma_t: ``[B]``.

    Raises:
      ValueError: the prediction type is not known.

    >>> x_t, half = jnp.ones((1, 2)), jnp.asarray([0.5])
    >>> to_x_0("epsilon", jnp.ones((1, 2)), x_t, half, half)
    Array([[1., 1.]], dtype=float32)
    """
    _check(prediction_type, PREDICTION_TYPES + IMPORTED_TYPES)
    alpha, sigma = expand(alpha_t, x_t), expand(sigma_t, x_t)
    if prediction_type == "edm_prediction":
        return to_x_0("v_prediction", -output, x_t, alpha_t, sigma_t)
    if prediction_type == "score":
        return (x_t + sigma**2 * output) / alpha
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "v_prediction":
        norm = jnp.hypot(alpha, sigma)
        return (alpha * (x_t / norm) - sigma * output) / norm
    if prediction_type == "flow_prediction":
        return (x_t - sigma * output) / (alpha + sigma)
    return output


def from_x_0(
    prediction_type: str, x_0: Array, eps: Array, alpha_t: Array, sigma_t: Array
) -> Array:
    """What a perfect network would predict, given the image and the noise.

    Shapes and errors as in `to_x_0`, whose inverse it is; the target of teacher
    training.
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        alpha, sigma = expand(alpha_t, x_0), expand(sigma_t, x_0)
        return (alpha * eps - sigma * x_0) / jnp.hypot(alpha, sigma)
    if prediction_type == "flow_prediction":
        return eps - x_0
    return x_0


def clip(x_0: Array, limit: float = 1.0) -> Array:
    """Static thresholding to ``[-limit, limit]``, as samplers of pixel models do."""
    return jnp.clip(x_0, -limit, limit)


def dynamic_threshold(
    x_0: Array, ratio: float = 0.995, max_value: float = 1.0
) -> Array:
    """Dynamic thresholding per image (Saharia et al., arXiv 2205.11487, section 2.3).

    The ``ratio`` quantile ``s`` of ``|x_0|`` over an image, held in ``[1, max_value]``,
    is where it is clipped, and what it is divided by (as diffusers does it).
    """
    magnitudes = jnp.abs(x_0.reshape(x_0.shape[0], -1))
    limit = jnp.quantile(magnitudes, ratio, axis=1)
    limit = expand(jnp.clip(limit, 1.0, max_value), x_0)
    return jnp.clip(x_0, -limit, limit) / limit


#: Thresholding by its name in a config; each maps ``x_0`` to ``x_0``.
THRESHOLDING: dict[str, Callable[[Array], Array]] = {
    "none": lambda x_0: x_0,
    "clip": clip,
    "dynamic": dynamic_threshold,
}


@dataclasses.dataclass(frozen=True)
class Thresholding:
    """What a teacher's own sampler does to ``x_0``, with its numbers.

    Attributes:
      kind: a name in `THRESHOLDING`.
      limit: where ``clip`` cuts, or the most that ``dynamic`` divides by.
      ratio: the quantile of ``dynamic``.
    """

    kind: str = "none"
    limit: float = 1.0
    ratio: float = 0.995

    def __call__(self, x_0: Array) -> Array:
        """Maps ``x_0 [B, ...]`` to the same shape."""
        if self.kind == "clip":
            return clip(x_0, self.limit)
        if self.kind == "dynamic":
            return dynamic_threshold(x_0, self.ratio, self.limit)
        return x_0
