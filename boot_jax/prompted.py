"""The prompts of a run: what its batches bring, and what makes conditions of them."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
from jax import Array

from boot_jax.conditions import Encode, embedding_reader, prompt_encoder
from boot_jax.config import ConfigError
from boot_jax.prompts import EmbeddingCache, PromptCache
from boot_jax.teachers.base import TextEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """What batches are made of.

    Attributes:
      cache: tokens and texts.
      rows: what is read of each: its tokens, or the embeddings of these.
      encode: of `boot_jax.conditions`: rows to conditions.
      params: its first argument, on the host; None for those of the text encoder.
    """

    cache: PromptCache
    rows: PromptCache | EmbeddingCache
    encode: Encode
    params: Any = None


def open_prompts(
    section: Any, text: TextEncoder, workdir: pathlib.Path, *, guided: bool
) -> Prompts:
    """Opens the prompts of a config's section ``prompts``, and tokenises them once.

    Args:
      section: of the config.
      text: the teacher's encoder, its parameters on the host.
      workdir: where the caches are, if the section does not say it.
      guided: whether conditions need a negative half.

    Raises:
      ConfigError: no prompts are named, or embeddings are asked of a network that reads
        tokens itself.
      PromptError: they cannot be read.
    """
    if not section.path:
        raise ConfigError(
            "this teacher takes prompts, but prompts.path is empty; name a file of "
            "them, such as configs/prompts/starter.txt"
        )
    cache_dir = section.cache_dir or workdir / "prompts"
    cache = PromptCache.open(
        section.path,
        text.tokenizer,
        cache_dir,
        column=section.column,
        negative_column=section.negative_column or None,
    )
    if section.embeddings == "none":
        encode = prompt_encoder(text, section.negative if guided else None)
        return Prompts(cache=cache, rows=cache, encode=encode)
    if not jax.tree.leaves(text.params):
        raise ConfigError(
            "prompts.embeddings is set, but this teacher has no text encoder before "
            "its network; set prompts.embeddings='none'"
        )
    compiled = jax.jit(text.encode)
    # To the device once, and only if there is something to encode.
    params = functools.cache(lambda: jax.device_put(text.params))
    rows = EmbeddingCache.open(
        cache,
        lambda tokens: compiled(params(), tokens),
        text.fingerprint(),
        cache_dir,
        dtype=section.embeddings,
    )
    null = None
    if guided:
        ids = np.asarray(text.tokenizer([section.negative]).ids)
        null = jax.tree.map(np.asarray, compiled(params(), ids))
    return Prompts(cache=cache, rows=rows, encode=embedding_reader(guided), params=null)


def between_prompts(encode: Encode) -> Encode:
    """Conditions on the straight line between two prompts' embeddings.

    Args:
      encode: of `prompt_encoder`.

    Returns:
      The same, of ``{"tokens", "other_tokens", "weight": [B], ...}``; the weight is
      that of the other prompt.
    """

    def encode_between(params: Any, read: Any) -> Any:
        rest = {k: v for k, v in read.items() if k not in ("other_tokens", "weight")}
        first = encode(params, rest)
        other = encode(params, rest | {"tokens": read["other_tokens"]})

        def mix(start: Array, end: Array) -> Array:
            weight = read["weight"].reshape(-1, *(1,) * (start.ndim - 1))
            return start + weight.astype(start.dtype) * (end - start)

        return jax.tree.map(mix, first, other)

    return encode_between
