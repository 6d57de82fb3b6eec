"""What a teacher is: a denoiser, its parameters and the schedule it was trained on."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.guidance import Denoiser, guide
from boot_jax.prediction import THRESHOLDING, Thresholding, expand, to_x_0
from boot_jax.schedules import NoiseSchedule
from boot_jax.tokenizers import Tokenizer


class TeacherError(ValueError):
    """A teacher that is missing, foreign, or does not fit what is asked of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """What turns samples into images, where a teacher does not work on images itself.

    Attributes:
      decode: ``(params, samples [B, H, W, C]) -> images`` in [-1, 1].
      params: its parameters, a pytree.
      image_shape: ``(H, W, C)`` of the images.
    """

    decode: Callable[[Any, Array], Array]
    params: Any
    image_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """What turns prompts into what a network is conditioned on.

    Attributes:
      tokenizer: of prompts, on the host.
      encode: ``(params, tokens [B, *row_shape] int32) -> {name: [B, ...]}``, on the
        device; a network that reads tokens itself has them given back as ``tokens``.
      params: its parameters, a pytree.
    """

    tokenizer: Tokenizer
    encode: Callable[[Any, Array], dict[str, Array]]
    params: Any

    def fingerprint(self) -> str:
        """A hash of the tokenizer and the parameters."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        _add(digest, self.params)
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """Everything that distillation needs to know.

    Any pure function serves: give ``denoise`` and, if it has a Linen network of the
    shape of those in `boot_jax.models`, also ``network`` and ``prediction_type``, so
    that the student can start from it.

    Attributes:
      denoise: ``(params, x_t [B, H, W, C], t [B], condition) -> x_0``.
      params: its parameters, a pytree; always passed as an argument, never captured.
      schedule: the noise schedule it was trained on.
      sample_shape: ``(H, W, C)``.
      num_classes: number of class labels; None if it takes none.
      network: the Linen module behind ``denoise``; None if there is none.
      prediction_type: what ``network`` predicts.
      has_null_label: whether label ``num_classes`` means none, as guidance needs it.
      thresholding: what its own sampler does to ``x_0``; None leaves it to the config.
      sampler_steps: ``num_steps -> (t [n], s [n])``: the times between which its own
        sampler steps; None where it has none.
      decoder: of samples to images; None where samples are images.
      text: of the prompts that it takes; None if it takes none.
    """

    denoise: Denoiser
    params: Any
    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    num_classes: int | None = None
    network: nn.Module | None = None
    prediction_type: str | None = None
    has_null_label: bool = True
    thresholding: Thresholding | None = None
    sampler_steps: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    decoder: Decoder | None = None
    text: TextEncoder | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)`` of the images that samples are, or are decoded to."""
        return self.decoder.image_shape if self.decoder else self.sample_shape

    def fingerprint(self) -> str:
        """A hash of the parameters, schedule, shape and prediction type.

        And of the thresholding, where it is the teacher's own, and of what reads its
        prompts.
        """
        digest = hashlib.sha256()
        known = (self.schedule, self.sample_shape, self.num_classes)
        digest.update(repr((known, self.prediction_type)).encode())
        if self.thresholding is not None:
            digest.update(repr(self.thresholding).encode())
        if self.text is not None:
            digest.update(self.text.fingerprint().encode())
        _add(digest, self.params)
        return digest.hexdigest()[:16]


def _add(digest: Any, params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())


def example_condition(teacher: Teacher) -> Any:
    """A condition of leading size 1 in the shapes that a teacher takes; zeros."""
    if teacher.text is not None:
        text = teacher.text
        tokens = jnp.zeros((1, *text.tokenizer.row_shape), jnp.int32)
        shapes = jax.eval_shape(text.encode, text.params, tokens)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if teacher.num_classes is None:
        return None
    return {"label": jnp.zeros((1,), jnp.int32)}


#: ``(params, x [B, H, W, C], time [B], condition) -> [B, H, W, C]``: a network.
Apply = Callable[[Any, Array, Array, Any], Array]


def network_denoiser(
    network: nn.Module | Apply, schedule: NoiseSchedule, prediction_type: str
) -> Denoiser:
    """A denoiser out of a network: input scaling, its own time, and the conversion.

    Args:
      network: called as ``network(x, time, condition)``; see `boot_jax.models`. Or a
        function of parameters and these.
      schedule: gives the scaling, the time input, and ``alpha`` and ``sigma``.
      prediction_type: one of `boot_jax.prediction.PREDICTION_TYPES`.

    Returns:
      ``(params, x_t, t, condition) -> x_0`` in float32.
    """

    def denoise(params: Any, x_t: Array, t: Array, condition: Any) -> Array:
        scaled = expand(schedule.input_scale(t), x_t) * x_t
        time = schedule.time_input(t)
        if isinstance(network, nn.Module):
            output = network.apply({"params": params}, scaled, time, condition)
        else:
            output = network(params, scaled, time, condition)
        assert isinstance(output, Array)
        output = output[..., : x_t.shape[-1]]  # what follows is a learned variance
        alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
        return to_x_0(prediction_type, output, x_t, alpha_t, sigma_t)

    return denoise


def as_sampled(
    denoise: Denoiser,
    *,
    null_condition: Any = None,
    guidance_scale: float | None = 1.0,
    thresholding: str | Thresholding = "none",
    **guidance: Any,
) -> Denoiser:
    """The teacher exactly as its sampler runs it: guided first, then thresholded.

    Args:
      denoise: the plain denoiser.
      null_condition: of the unconditional half, or where it is; see
        `boot_jax.guidance.guide`. None switches guidance off.
      guidance_scale: ``w``; 1 switches guidance off, None reads it from the condition.
      thresholding: ``none``, ``clip`` or ``dynamic``; or one with its numbers.
      **guidance: ``interval`` and ``rescale`` of `boot_jax.guidance.guide`.

    Raises:
      ValueError: the thresholding is not known.
    """
    if isinstance(thresholding, str):
        thresholding = Thresholding(thresholding)
    if thresholding.kind not in THRESHOLDING:
        raise ValueError(
            f"thresholding is {thresholding.kind!r}; "
            f"choose one of {sorted(THRESHOLDING)}"
        )
    if null_condition is not None and guidance_scale != 1.0:
        denoise = guide(denoise, null_condition, guidance_scale, **guidance)
    return lambda params, x_t, t, condition: thresholding(
        denoise(params, x_t, t, condition)
    )
