"""What is constant in a finished student, and where a stock network can hold it.

**Time.** A student's network sees its own time frozen and the target time (and guidance
scale) through added embeddings. In use all of them are constants, so its embedding

    e = W_2 silu(W_1 p(tau) + b_1) + b_2 + sum_a A_a(value_a)                   (1)

is one vector. The stock network computes ``W_2 silu(...) + b_2`` alone: with
``W_2 = 0`` and ``b_2 = e`` it gives (1), whatever time it is told. A class embedding is
added after it, and stays what it is.

**Conversion.** With ``n = sqrt(alpha^2 + sigma^2)`` at ``t_max``, the network is given
``m eps`` (``m`` is ``n`` times the schedule's input scale) and its output becomes

    y = A eps - B output + C.                                                   (2)

(``C`` is 0 unless the teacher's samples are mapped to images by an affine decoder, such
as that of pixels in [0, 1].) One step of a stock scheduler from a level
``a^2 = alphas_cumprod``, ``s^2 = 1 - a^2`` to clean data, its noise being ``eps``
itself, is (2) with

    epsilon        A = 1 / a > 1    B = s / a    C = 0
    v_prediction   A = a <= 1       B = s        C = 0
    sample         A = 0            B = -1       C = 0

So ``A`` decides on the kind and the level. For teachers of these kinds that is their
own kind, at ``a = alpha / n``, and gives ``B`` too, for variance preserving and
exploding schedules alike. For others (a flow, a score, Karras' network) the last layer
is multiplied by what ``B`` lacks, and its bias moved by what makes ``C``. At
``t_max = 1`` of a flow, where ``A = 1``, ``s`` would be 0; ``a^2`` is then
``1 - 2^-20``, which is ``A`` to half a millionth. An input scale ``m`` other than 1 is
multiplied into the network's first layer.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from boot_jax.export.finished import FinishedStudent
from boot_jax.prediction import to_x_0
from boot_jax.teachers.base import example_condition
from boot_jax.teachers.folder import Component

#: The largest level that leaves a scheduler some noise, eq. (2) of a flow at its end.
_MOST_ALPHAS_CUMPROD = 1 - 2.0**-20
_MOST_BETAS = 8

#: Parameters by path.
Params = dict[tuple[str, ...], np.ndarray]


@dataclasses.dataclass(frozen=True)
class StockConversion:
    """Eq. (2) as a stock scheduler's one step.

    Attributes:
      prediction_type: one that diffusers' DDIM knows.
      betas: of all its training steps; one step goes from the last of them to data.
      input_scale: multiplies the network's first layer.
      output_scale: multiplies the network's output,
      output_offset: and is added to it then.
    """

    prediction_type: str
    betas: tuple[float, ...]
    input_scale: float
    output_scale: float
    output_offset: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StockModel:
    """A student as a model and a scheduler of diffusers.

    Attributes:
      class_name: of the model, in diffusers.
      config: its ``config.json``, without what begins with ``_``.
      tensors: its weights, by name, in PyTorch's layout.
      conversion: what its scheduler does.
      pipeline: the stock pipeline that runs it; None for the one-file pipeline.
      component: what the pipeline calls the network.
      parts: of the teacher's pipeline, by name, which go into its own as they are.
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    conversion: StockConversion
    pipeline: str | None = None
    component: str = "network"
    parts: Mapping[str, Component] = dataclasses.field(default_factory=dict)


def flat(params: Any) -> Params:
    """Parameters by path, from a tree of them."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def constant_embedding(finished: FinishedStudent, parts: Collection[str]) -> np.ndarray:
    """``e`` of eq. (1), ``[E]`` float32, heard from the student itself while it runs.

    Args:
      finished: the student.
      parts: the submodules whose outputs are its terms.
    """
    heard: dict[str, Any] = {}

    def listen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.module.name in parts:
            heard[context.module.name] = output
        return output

    def embedding(params: Any) -> Any:
        eps = jnp.zeros((1, *finished.sample_shape))
        with nn.intercept_methods(listen):
            finished.of_condition(params, eps, example_condition(finished.teacher))
        return sum(jnp.asarray(term, jnp.float32) for term in heard.values())

    # Compiled, so that the rest of the network is never computed.
    return np.asarray(jax.jit(embedding)(finished.params)).reshape(-1)


def frozen_time(finished: FinishedStudent) -> float:
    """The time that the student's network is told, in the network's own units."""
    times, told = finished.objective, finished.student.time_conditioning
    t = times.t_min if told == "reused" else times.t_max
    return float(finished.teacher.schedule.time_input(jnp.asarray([t]))[0])


def stock_conversion(finished: FinishedStudent, num_steps: int = 1) -> StockConversion:
    """Eq. (2) of a student, as a stock scheduler does it.

    Args:
      finished: the student.
      num_steps: the fewest training steps that the scheduler is to have.
    """
    schedule = finished.teacher.schedule
    n = _at_t_max(finished, schedule.prior_scale)
    input_scale = float((n * _at_t_max(finished, schedule.input_scale))[0])
    a, b, c = _coefficients(finished)
    if finished.student.prediction_type == "sample":
        kind, level = "sample", 0.0
    elif a > 1:
        kind, level = "epsilon", a**-2
    else:
        kind, level = "v_prediction", min(a**2, _MOST_ALPHAS_CUMPROD)
    betas = stock_betas(level, num_steps)
    alphas_cumprod = _product(betas)
    stock_b = -1.0 if kind == "sample" else np.sqrt(1 - alphas_cumprod)
    if kind == "epsilon":
        stock_b /= np.sqrt(alphas_cumprod)
    return StockConversion(
        prediction_type=kind,
        betas=betas,
        input_scale=_but_for_rounding(input_scale),
        output_scale=_but_for_rounding(float(b / stock_b)),
        output_offset=float(-c / stock_b),
    )


def _coefficients(finished: FinishedStudent) -> tuple[float, float, float]:
    """``A``, ``B`` and ``C`` of eq. (2), asked of the conversions themselves."""
    schedule, decoder = finished.teacher.schedule, finished.teacher.decoder
    functions = (schedule.alpha, schedule.sigma, schedule.prior_scale)
    alpha, sigma, n = (_at_t_max(finished, function) for function in functions)
    one, zero = jnp.ones((1,)), jnp.zeros((1,))
    kind = finished.student.prediction_type
    a = float(to_x_0(kind, zero, n * one, alpha, sigma)[0])
    b = -float(to_x_0(kind, one, zero, alpha, sigma)[0])
    if decoder is None or finished.is_latent:
        return a, b, 0.0
    # Without parameters a decoder is affine, but for a clip to [-1, 1].
    shift, further = (float(decoder.decode(None, x)[0]) for x in (zero, one / 8))
    scale = 8 * (further - shift)
    return scale * a, scale * b, shift


def _but_for_rounding(factor: float) -> float:
    """Rounding alone is no reason to touch a weight."""
    return 1.0 if abs(factor - 1) < 4e-6 else factor


def stock_betas(alphas_cumprod: float, num_steps: int = 1) -> tuple[float, ...]:
    """Equal betas, the fewest whose float32 product of ``1 - beta`` is the level.

    A beta near 1 leaves few digits of ``1 - beta``: with 4e-5 (a linear schedule's end)
    one beta would be off by 7e-4, four are off by 1e-6. Few, because a pipeline that is
    asked for more steps than there are betas refuses, and a student has but one.

    >>> stock_betas(0.0)
    (1.0,)
    >>> len(stock_betas(4e-5)) <= 4
    True
    """
    candidates = [
        (float(np.float32(1 - alphas_cumprod ** (1 / count))),) * count
        for count in range(num_steps, num_steps + _MOST_BETAS)
    ]

    def error(betas: tuple[float, ...]) -> float:
        return abs(_product(betas) - alphas_cumprod)

    good = [c for c in candidates if error(c) <= 2e-6 * alphas_cumprod]
    return good[0] if good else min(candidates, key=error)


def _product(betas: tuple[float, ...]) -> float:
    """The last ``alphas_cumprod``, in float32 as diffusers computes it."""
    alphas = np.float32(1) - np.asarray(betas, np.float32)
    return float(np.prod(alphas, dtype=np.float32))


def _at_t_max(finished: FinishedStudent, function: Any) -> Any:
    return function(jnp.asarray([finished.objective.t_max], jnp.float32))


def hold(params: Params, layer: tuple[str, ...], value: np.ndarray) -> None:
    """Makes a linear layer give one value, whatever it is given."""
    params[*layer, "kernel"] = np.zeros_like(params[*layer, "kernel"])
    params[*layer, "bias"] = np.asarray(value, np.float32)


def scale_input(params: Params, layer: tuple[str, ...], factor: float) -> None:
    """Multiplies what a layer is given: its kernel alone."""
    if factor != 1:
        path = (*layer, "kernel")
        params[path] = params[path] * np.float32(factor)


def change_output(
    params: Params, layer: tuple[str, ...], factor: float, offset: float
) -> None:
    """Multiplies what a layer gives, then adds to it."""
    scale_input(params, layer, factor)
    path = (*layer, "bias")
    if (factor, offset) != (1, 0):
        params[path] = params[path] * np.float32(factor) + np.float32(offset)


def keep_channels(
    params: Params, layer: tuple[str, ...], kept: int, given: int
) -> None:
    """Cuts a layer's output of ``given`` channels a pixel to the first ones.

    What follows them is a learned variance, which one step to clean data has no use
    for, and which not every scheduler would set aside.
    """
    for leaf in ("kernel", "bias"):
        array = params[*layer, leaf]
        pixels = array.reshape(*array.shape[:-1], -1, given)[..., :kept]
        params[*layer, leaf] = pixels.reshape(*array.shape[:-1], -1)
