"""What reads the prompts of Stable Diffusion and of SDXL: tokenizers and encoders.

Stable Diffusion's UNet reads the last hidden states of one CLIP text encoder. SDXL's
reads the last but one of two encoders side by side, the second one's projected vector,
and six numbers: the size of the image, where it was cropped, and the size to draw. As
in its pipeline these are the image's own size, cropped at 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from boot_jax.models.clip import UNUSED, CLIPTextEncoder, TextEncoding
from boot_jax.models.text_unet import TextUNet
from boot_jax.models.weights import WeightsError, from_diffusers, read_weights
from boot_jax.teachers.base import TeacherError, TextEncoder
from boot_jax.teachers.folder import Component
from boot_jax.tokenizers import ClipTokenizer, PairTokenizer, TokenizerError

_PROJECTING = "CLIPTextModelWithProjection"
#: Classes of text encoders, and of tokenizers.
ENCODERS = ("CLIPTextModel", _PROJECTING)
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

#: The parts of a pipeline that read its prompts.
PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """One encoder and its tokenizer."""

    tokenizer: ClipTokenizer
    encoder: CLIPTextEncoder
    params: Any


def read_text_encoder(
    parts: Mapping[str, Component],
    network: TextUNet,
    image_size: tuple[int, int],
    *,
    empty_is_zero: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> TextEncoder:
    """Reads the text encoders of a pipeline, as its UNet wants them.

    Args:
      parts: of the pipeline, those of `PARTS` by name.
      network: the UNet; SDXL's takes ``text_time``.
      image_size: height and width of the images, in pixels, which SDXL's UNet is told.
      empty_is_zero: an empty prompt becomes zeros, as SDXL's pipeline has it where no
        negative prompt is given (``force_zeros_for_empty_prompt``).
      dtype: what the encoders compute in.

    Raises:
      TeacherError: a part is missing, of another class, or does not fit the others.
      WeightsError: an encoder's weights cannot be read or do not fit it.
    """
    is_xl = network.addition_embed_type is not None
    suffixes = ("", "_2") if is_xl else ("",)
    wanted = [f"{kind}{n}" for n in suffixes for kind in ("tokenizer", "text_encoder")]
    if set(parts) != set(wanted):
        raise TeacherError(
            f"the UNet needs {', '.join(wanted)} in its pipeline, which has "
            f"{', '.join(sorted(parts)) or 'none of them'}"
        )
    readers = {
        f"text_encoder{n}": _read(
            parts[f"tokenizer{n}"], parts[f"text_encoder{n}"], dtype
        )
        for n in suffixes
    }
    _check(network, parts, readers)
    tokenizers = [reader.tokenizer for reader in readers.values()]
    params = {name: reader.params for name, reader in readers.items()}
    if not is_xl:
        encoder = readers["text_encoder"].encoder

        def encode(params: Any, tokens: Array) -> dict[str, Array]:
            encoding = _encode(encoder, params["text_encoder"], tokens)
            return {"text": encoding.last_hidden_state}

        return TextEncoder(tokenizer=tokenizers[0], encode=encode, params=params)
    pair = PairTokenizer(*tokenizers)
    empty = np.asarray(pair([""]).ids) if empty_is_zero else None
    encoders = {name: reader.encoder for name, reader in readers.items()}

    def encode_xl(params: Any, tokens: Array) -> dict[str, Array]:
        first, second = (
            _encode(encoder, params[name], tokens[:, i])
            for i, (name, encoder) in enumerate(encoders.items())
        )
        text = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        pooled = second.text_embeds
        assert pooled is not None  # as `_check` has seen to
        if empty is not None:
            given = jnp.any(tokens != empty, axis=(1, 2))
            text = jnp.where(given[:, None, None], text, 0.0)
            pooled = jnp.where(given[:, None], pooled, 0.0)
        ids = jnp.asarray([*image_size, 0, 0, *image_size], jnp.float32)
        ids = jnp.broadcast_to(ids[None], (*tokens.shape[:1], 6))
        return {"text": text, "pooled": pooled, "time_ids": ids}

    return TextEncoder(tokenizer=pair, encode=encode_xl, params=params)


def _encode(encoder: CLIPTextEncoder, params: Any, tokens: Array) -> TextEncoding:
    encoding = encoder.apply({"params": params}, tokens)
    assert isinstance(encoding, TextEncoding)
    return encoding


def _read(tokenizer: Component, encoder: Component, dtype: DTypeLike) -> _Reader:
    for part, known in ((tokenizer, TOKENIZERS), (encoder, ENCODERS)):
        if part.class_name not in known:
            raise TeacherError(
                f"the pipeline's {part.folder.name} is a {part.class_name}, which is "
                f"not supported; supported are {' and '.join(known)}"
            )
    try:
        read = ClipTokenizer.from_folder(tokenizer.folder)
    except TokenizerError as error:
        raise TeacherError(str(error)) from error
    if not encoder.config:
        raise TeacherError(f"{encoder.folder} has no config.json")
    try:
        network = CLIPTextEncoder.from_config(
            encoder.config,
            with_projection=encoder.class_name == _PROJECTING,
            dtype=dtype,
        )
        tokens = jnp.zeros((1, *read.row_shape), jnp.int32)
        shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherError(f"{encoder.folder / 'config.json'}: {reason}") from error
    if read.vocabulary_size > network.vocab_size:
        raise TeacherError(
            f"{tokenizer.folder} has {read.vocabulary_size} tokens, but its text "
            f"encoder knows {network.vocab_size}; they are not of one pipeline"
        )
    try:
        tensors = read_weights(encoder.folder)
        params = from_diffusers(tensors, shapes, ignore=UNUSED)
    except WeightsError as error:
        raise WeightsError(f"{encoder.folder}: {error}") from error
    return _Reader(read, network, params)


def _check(
    network: TextUNet, parts: Mapping[str, Component], readers: Mapping[str, _Reader]
) -> None:
    """Refuses encoders that the UNet was not made for."""
    widths = {name: reader.encoder.hidden_size for name, reader in readers.items()}
    if sum(widths.values()) != network.cross_attention_dim:
        given = " and ".join(f"the {name} is {w} wide" for name, w in widths.items())
        raise TeacherError(
            f"{given}, but the UNet reads texts of cross_attention_dim="
            f"{network.cross_attention_dim}; they are not of one pipeline"
        )
    if network.addition_embed_type is None:
        return
    second = readers["text_encoder_2"].encoder
    if not second.with_projection:
        raise TeacherError(
            f"the pipeline's text_encoder_2 is a {parts['text_encoder_2'].class_name}; "
            f"SDXL needs a {_PROJECTING}"
        )
    joined = second.projection_dim + 6 * (network.addition_time_embed_dim or 0)
    if joined != network.projection_class_embeddings_input_dim:
        raise TeacherError(
            f"the text_encoder_2 projects to {second.projection_dim}, which with six "
            f"sizes makes {joined}, but the UNet takes projection_class_embeddings_"
            f"input_dim={network.projection_class_embeddings_input_dim}"
        )
