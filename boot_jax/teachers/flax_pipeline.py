"""Teachers run by diffusers' own Flax classes: ``FlaxStableDiffusionPipeline``.

Its UNet, autoencoder, text encoder and tokenizer are used as they are. The student is
our `boot_jax.models.text_unet.TextUNet`, whose parameters have the same tree, so that
it starts from the same weights; both differ by some 1e-5 of their output, for the
reasons that `boot_jax.models.text_layers` names.

These classes are deprecated; diffusers 0.39 and transformers 4.57 are the last to have
them. `boot_jax.teachers.diffusers` reads the same folders without either.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.models.text_unet import TextUNet
from boot_jax.models.weights import WeightsError, from_diffusers, to_diffusers
from boot_jax.teachers.base import (
    Decoder,
    Teacher,
    TeacherError,
    TextEncoder,
    network_denoiser,
)
from boot_jax.teachers.diffusers import build, roles_of
from boot_jax.teachers.folder import locate
from boot_jax.teachers.scheduler import read_scheduler
from boot_jax.tokenizers import Tokens

# What of an autoencoder's parameters decoding needs.
_DECODING = ("decoder", "post_quant_conv")


def load_teacher(path: str, *, revision: str = "", **overrides: Any) -> Teacher:
    """Reads a teacher from a Stable Diffusion pipeline that holds Flax weights.

    Args:
      path: a folder, or a hub id ``OWNER/NAME``.
      revision: of the hub id; empty for its newest.
      **overrides: fields of the student's network; ``dtype`` is also what the teacher
        computes in.

    Raises:
      TeacherError: diffusers or its Flax classes are not installed; or the folder is
        missing, damaged, without Flax weights, or holds what is not supported.
    """
    folder = locate(path, revision)
    roles = roles_of(folder)
    network = build(roles.network, overrides)
    if not isinstance(network, TextUNet) or network.addition_embed_type is not None:
        raise TeacherError(
            f"{folder} is no Stable Diffusion pipeline, which "
            "teacher.source='flax_pipeline' takes; try teacher.source='diffusers'"
        )
    scheduler = read_scheduler(roles.scheduler.config)
    pipeline, loaded = _load(folder, network.dtype)
    side = pipeline.unet.config["sample_size"]
    sample_shape = (side, side, network.in_channels)
    try:
        params = _as_ours(network, sample_shape, loaded["unet"])
    except WeightsError as error:
        raise WeightsError(f"{roles.network.folder}: {error}") from error
    return Teacher(
        denoise=network_denoiser(
            _apply(pipeline.unet), scheduler.schedule, scheduler.prediction_type
        ),
        params=params,
        schedule=scheduler.schedule,
        sample_shape=sample_shape,
        network=network,
        prediction_type=scheduler.prediction_type,
        has_null_label=False,
        thresholding=scheduler.thresholding,
        sampler_steps=scheduler.spacing,
        decoder=_decoder(pipeline.vae, loaded["vae"], sample_shape),
        text=_text_encoder(pipeline, loaded["text_encoder"]),
    )


def _load(folder: pathlib.Path, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the parameters of its parts."""
    try:
        with _quiet():
            from diffusers import (
                FlaxStableDiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
            )
    except (ImportError, RuntimeError) as error:
        raise TeacherError(
            "teacher.source='flax_pipeline' needs the Flax classes of diffusers 0.39; "
            "install boot_jax[diffusers], or set teacher.source='diffusers'"
        ) from error
    try:
        with _quiet():
            return FlaxStableDiffusionPipeline.from_pretrained(
                str(folder), dtype=dtype, safety_checker=None, feature_extractor=None
            )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(
            f"FlaxStableDiffusionPipeline cannot read {folder} ({reason}); it needs "
            "Flax weights (.msgpack): for others set teacher.source='diffusers'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line on every module that it is deprecated.

    And with JAX's usual promotion, which these classes rely on.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    logs = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        for log, verbosity in zip(logs, verbosities, strict=True):
            log.set_verbosity(verbosity)


def _as_ours(network: TextUNet, sample_shape: tuple[int, ...], params: Any) -> Any:
    """The same tree, checked against our network, as float32 arrays on the host."""
    text = jnp.zeros((1, 1, network.cross_attention_dim))
    shapes = jax.eval_shape(
        network.init,
        jax.random.key(0),
        jnp.zeros((1, *sample_shape)),
        jnp.zeros((1,)),
        {"text": text},
    )
    host = jax.tree.map(np.asarray, params)
    return from_diffusers(to_diffusers(host), shapes["params"])


def _apply(unet: Any) -> Any:
    """The UNet over channels last."""

    def apply(params: Any, x: Array, time: Array, condition: Any) -> Array:
        with _quiet():
            output = unet.apply(
                {"params": params},
                x.transpose(0, 3, 1, 2),
                jnp.asarray(time),
                condition["text"],
            ).sample
        return output.transpose(0, 2, 3, 1).astype(jnp.float32)

    return apply


def _decoder(vae: Any, params: Any, sample_shape: tuple[int, int, int]) -> Decoder:
    height, width, channels = sample_shape
    config = vae.config
    if config["latent_channels"] != channels:
        raise TeacherError(
            f"the autoencoder decodes {config['latent_channels']} channels, but the "
            f"network makes {channels}"
        )

    @jax.jit
    def decode(params: Any, latents: Array) -> Array:
        scaled = latents.transpose(0, 3, 1, 2) / config["scaling_factor"]
        with _quiet():
            images = vae.apply({"params": params}, scaled, method=vae.decode).sample
        return jnp.clip(images.transpose(0, 2, 3, 1).astype(jnp.float32), -1, 1)

    scale = 2 ** (len(config["block_out_channels"]) - 1)
    return Decoder(
        decode=decode,
        params={name: jax.tree.map(np.asarray, params[name]) for name in _DECODING},
        image_shape=(scale * height, scale * width, config["out_channels"]),
    )


def _text_encoder(pipeline: Any, params: Any) -> TextEncoder:
    def encode(params: Any, tokens: Array) -> dict[str, Array]:
        with _quiet():
            hidden = pipeline.text_encoder(tokens, params=params)[0]
        return {"text": hidden.astype(jnp.float32)}

    return TextEncoder(
        tokenizer=PipelineTokenizer(pipeline.tokenizer),
        encode=encode,
        params=jax.tree.map(np.asarray, params),
    )


class PipelineTokenizer:
    """A tokenizer of transformers as ours are called; see `boot_jax.tokenizers`."""

    def __init__(self, tokenizer: Any):
        """``tokenizer``: a ``CLIPTokenizer``; its ``model_max_length`` is the row's."""
        self._tokenizer = tokenizer

    @property
    def row_shape(self) -> tuple[int]:
        """``(L,)``."""
        return (self._tokenizer.model_max_length,)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary, the merges, the special tokens and the length."""
        tokenizer = self._tokenizer
        parts = [
            tokenizer.get_vocab(),
            sorted(map(str, getattr(tokenizer, "bpe_ranks", {}).items())),
            tokenizer.special_tokens_map,
            tokenizer.model_max_length,
        ]
        content = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, L]`` of prompts, padded and truncated as the pipeline does."""
        (length,) = self.row_shape
        ids = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="np",
        ).input_ids
        whole = self._tokenizer(list(prompts), verbose=False).input_ids
        truncated = np.array([len(row) > length for row in whole], bool)
        return Tokens(np.asarray(ids, np.int32), truncated)
