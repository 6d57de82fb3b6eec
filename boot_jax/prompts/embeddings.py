"""What a text encoder makes of all prompts, in a folder, mapped into memory.

It takes a disk instead of an encoder beside the student: at 77 tokens of 768 numbers of
2 bytes, 118 GB a million prompts.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from boot_jax.prompts import storage
from boot_jax.prompts.cache import PromptCache
from boot_jax.prompts.files import PromptError
from boot_jax.prompts.storage import ArrayWriter

#: How numbers may be kept; integers and booleans stay as they are.
DTYPES = ("bfloat16", "float16", "float32")

_FORMAT = 1

# Maps tokens [n, *row_shape] int32 to arrays by name, [n, ...].
Encode = Callable[[np.ndarray], Mapping[str, Any]]


class EmbeddingCache:
    """The embeddings of the prompts of a `PromptCache`, by the same indices.

    Attributes:
      folder: where it is.
    """

    def __init__(self, folder: pathlib.Path, meta: Mapping[str, Any]):
        """What is in a whole folder; `open` finds or writes one."""
        self.folder = folder
        self._dtypes = {
            name: jnp.dtype(dtype) for name, dtype in meta["dtypes"].items()
        }
        self._arrays = {
            name: storage.read_array(folder / f"{name}.npy") for name in self._dtypes
        }

    @classmethod
    def open(
        cls,
        prompts: PromptCache,
        encode: Encode,
        fingerprint: str,
        cache_dir: str | os.PathLike[str],
        *,
        dtype: str = "bfloat16",
        chunk_size: int = 64,
    ) -> "EmbeddingCache":
        """The embeddings of some prompts by a text encoder, made if need be.

        Args:
          prompts: whose tokens are encoded, negative ones too.
          encode: maps tokens ``[chunk_size, *row_shape]`` int32 to arrays by name, of
            the same leading size. It is called on process 0 alone, so that it must not
            wait for another.
          fingerprint: stands for the encoder and its parameters.
          cache_dir: holds a folder for each cache.
          dtype: of the embeddings on the disk and in batches; one of ``DTYPES``.
          chunk_size: prompts that are encoded at once.

        Raises:
          PromptError: the dtype is not known, a number is not finite in it, or the
            cache cannot be written.
        """
        if dtype not in DTYPES:
            raise PromptError(
                f"embeddings cannot be kept as {dtype!r}; use {', '.join(DTYPES)}"
            )
        key = storage.key_of(_FORMAT, prompts.folder.name, fingerprint, dtype)
        folder = pathlib.Path(cache_dir).expanduser().absolute() / f"embeddings-{key}"

        def write(new: pathlib.Path) -> dict[str, Any]:
            return _write(new, prompts, encode, jnp.dtype(dtype), chunk_size)

        return cls(folder, storage.ensure(folder, write))

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The embeddings of some prompts.

        Args:
          indices: ``[n]`` integers.

        Returns:
          What the encoder gave, ``[n, ...]`` each, under its names; those of negative
          prompts under ``negative_`` and the name.
        """
        return {
            name: np.asarray(rows[indices]).view(self._dtypes[name])
            for name, rows in self._arrays.items()
        }


def _write(
    folder: pathlib.Path,
    prompts: PromptCache,
    encode: Encode,
    dtype: np.dtype,
    chunk_size: int,
) -> dict[str, Any]:
    writers: dict[str, ArrayWriter] = {}
    dtypes: dict[str, str] = {}
    with (
        contextlib.ExitStack() as stack,
        storage.progress_bar("encoding prompts", len(prompts)) as bar,
    ):
        for start in range(0, len(prompts), chunk_size):
            # The last chunk is filled up, so that the encoder sees one shape only.
            indices = np.arange(start, start + chunk_size).clip(max=len(prompts) - 1)
            count = min(chunk_size, len(prompts) - start)
            for name, rows in _encoded(prompts.take(indices), encode).items():
                kept = _cast(rows[:count], dtype, name)
                if start == 0:
                    dtypes[name] = kept.dtype.name
                    shape = (len(prompts), *kept.shape[1:])
                    writer = ArrayWriter(
                        folder / f"{name}.npy", shape, _stored(kept).dtype
                    )
                    writers[name] = stack.enter_context(writer)
                writers[name].write(_stored(kept))
            bar.update(count)
    return {"dtypes": dtypes}


def _encoded(tokens: Mapping[str, np.ndarray], encode: Encode) -> dict[str, np.ndarray]:
    entries: dict[str, np.ndarray] = {}
    for source, ids in tokens.items():
        prefix = source.removesuffix("tokens")  # "" or "negative_"
        for name, rows in encode(ids).items():
            entries[prefix + name] = np.asarray(rows)
    return entries


def _cast(rows: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    with np.errstate(over="ignore"):
        kept = rows.astype(dtype)
    if not np.isfinite(kept).all():
        reason = "is not finite"
        if np.isfinite(rows).all():
            reason = f"is too large for {dtype.name}; use bfloat16 or float32"
        raise PromptError(f"a number of the text embedding {name!r} {reason}")
    return kept


def _stored(rows: np.ndarray) -> np.ndarray:
    """The same bits in a type that ``.npy`` files know."""
    return rows.view(np.uint16) if rows.dtype.name == "bfloat16" else rows
