"""Tokens of all prompts of some files, in a folder, mapped into memory.

They are made once. The files are read twice: the first time finds faults and prompts
that were there before, the second time tokenises the others, some thousands at a time.
While a cache is built, memory holds a 16-byte hash of each prompt in the files; sorting
them takes 50 MB a million at the peak. Nothing else grows.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from boot_jax import distributed
from boot_jax.prompts import storage
from boot_jax.prompts.files import (
    Prompt,
    PromptError,
    find_files,
    one_line_faults,
    read_prompts,
)
from boot_jax.prompts.storage import ArrayWriter
from boot_jax.tokenizers import Tokenizer

# Part of the key of each cache: to be raised when anything below changes what is in it.
_FORMAT = 1

# Prompts, and characters, that are tokenised at once.
_CHUNK, _CHUNK_CHARACTERS = 8192, 4_000_000


class PromptCache:
    """The tokens and texts of distinct prompts, by index; the number is its ``len``.

    Attributes:
      folder: where it is.
      row_shape: the shape of one prompt's tokens.
      has_negatives: whether each prompt has a negative one.
      num_duplicates: prompts of the files that were left out, as they had been there
        before (with the same negative prompt, if there are negative ones).
      num_truncated: prompts that are longer than a row of tokens.
      num_truncated_negatives: the same of negative prompts.
    """

    def __init__(self, folder: pathlib.Path, meta: dict[str, Any]):
        """What is in a whole folder; `open` finds or writes one."""
        self.folder = folder
        self.has_negatives: bool = meta["has_negatives"]
        self.num_duplicates: int = meta["num_duplicates"]
        self.num_truncated: int = meta["num_truncated"]
        self.num_truncated_negatives: int = meta["num_truncated_negatives"]
        self._tokens = {
            name: storage.read_array(folder / f"{name}.npy")
            for name in _token_names(self.has_negatives)
        }
        self.row_shape: tuple[int, ...] = self._tokens["tokens"].shape[1:]
        self._offsets = storage.read_array(folder / "offsets.npy")
        self._texts = np.memmap(folder / "texts.bin", np.uint8, "r")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        cache_dir: str | os.PathLike[str],
        *,
        column: str = "prompt",
        negative_column: str | None = None,
    ) -> "PromptCache":
        """The cache of some files for a tokenizer, which is built if need be.

        It is known by the content of the files in order of their names, the tokenizer
        and the columns. Of several processes, process 0 alone builds and verifies it,
        while the others wait.

        Args:
          path: as in `read_prompts`, like both columns.
          tokenizer: makes the tokens.
          cache_dir: holds a folder for each cache.

        Raises:
          PromptError: the files have a fault, or the cache cannot be written.
        """

        def prompts() -> Iterator[Prompt]:
            return read_prompts(path, column=column, negative_column=negative_column)

        def key() -> str:
            prompts()  # refuses what can be refused before anything is read
            hashes = []
            for file in find_files(path):
                with one_line_faults(file):
                    hashes.append(storage.file_hash(file))
            columns = [column, negative_column]
            return storage.key_of(_FORMAT, hashes, tokenizer.fingerprint, columns)

        def write(new: pathlib.Path) -> dict[str, Any]:
            meta = _write(new, prompts, tokenizer, negative_column is not None)
            if f"tokens-{key()}" != name:
                raise PromptError(f"{path} changed while it was read; start again")
            return meta

        name = f"tokens-{distributed.on_main(key, takes_long=True)}"
        folder = pathlib.Path(cache_dir).expanduser().absolute() / name
        return cls(folder, storage.ensure(folder, write))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The tokens of some prompts.

        Args:
          indices: ``[n]`` integers.

        Returns:
          ``{"tokens": [n, *row_shape] int32}``, with "negative_tokens" alike if there
          are negative prompts.
        """
        return {
            name: rows[indices].astype(np.int32) for name, rows in self._tokens.items()
        }

    def text(self, index: int) -> str:
        """The prompt of an index, in words."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no prompt {index}, only 0 to {len(self) - 1}")
        start, stop = self._offsets[index : index + 2]
        return bytes(self._texts[start:stop]).decode()


def _token_names(has_negatives: bool) -> tuple[str, ...]:
    return ("tokens", "negative_tokens") if has_negatives else ("tokens",)


def _write(
    folder: pathlib.Path,
    prompts: Callable[[], Iterator[Prompt]],
    tokenizer: Tokenizer,
    has_negatives: bool,
) -> dict[str, Any]:
    new = _first_occurrences(_progress(prompts(), "reading prompts"))
    count = int(new.sum())
    dtype = np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.int32
    shape = (count, *tokenizer.row_shape)
    names = _token_names(has_negatives)
    truncated = dict.fromkeys(names, 0)
    with contextlib.ExitStack() as stack:
        tokens = {
            name: stack.enter_context(ArrayWriter(folder / f"{name}.npy", shape, dtype))
            for name in names
        }
        texts = stack.enter_context((folder / "texts.bin").open("wb"))
        offsets = stack.enter_context(
            ArrayWriter(folder / "offsets.npy", (count + 1,), np.int64)
        )
        offsets.write(np.zeros(1, np.int64))
        bar = stack.enter_context(storage.progress_bar("tokenizing prompts", count))
        kept = itertools.compress(prompts(), new)
        for chunk in _chunks(kept):
            for name, words in zip(names, zip(*chunk, strict=True), strict=False):
                ids, too_long = tokenizer(words)
                tokens[name].write(ids)
                truncated[name] += int(too_long.sum())
            encoded = [prompt.text.encode() for prompt in chunk]
            offsets.write(texts.tell() + np.cumsum([len(text) for text in encoded]))
            texts.write(b"".join(encoded))
            bar.update(len(chunk))
    meta = {
        "num_prompts": count,
        "num_duplicates": len(new) - count,
        "num_truncated": truncated["tokens"],
        "num_truncated_negatives": truncated.get("negative_tokens", 0),
        "has_negatives": has_negatives,
    }
    storage.say(_report(meta, tokenizer.row_shape[-1]))
    return meta


def _report(meta: dict[str, Any], length: int) -> str:
    text = (
        f"{meta['num_prompts']} distinct prompts; {meta['num_duplicates']} duplicates "
        f"were left out, {meta['num_truncated']} too long for {length} tokens were cut"
    )
    if meta["has_negatives"]:
        text += f", and {meta['num_truncated_negatives']} negative ones"
    return text


def _first_occurrences(prompts: Iterable[Prompt]) -> np.ndarray:
    """Which prompts were not there before, ``[N]`` bool; by 128-bit hashes."""
    digests = bytearray()
    for text, negative in prompts:
        # No prompt has a line break, so this joins without ambiguity.
        whole = text if negative is None else f"{text}\n{negative}"
        digests += hashlib.blake2b(whole.encode(), digest_size=16).digest()
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first stays first
    new = np.ones(len(halves), bool)
    ordered = halves[order]
    new[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return new


def _chunks(prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    chunk: list[Prompt] = []
    characters = 0
    for prompt in prompts:
        chunk.append(prompt)
        characters += len(prompt.text) + len(prompt.negative or "")
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _progress(prompts: Iterator[Prompt], title: str) -> Iterator[Prompt]:
    with storage.progress_bar(title) as bar:
        for number, prompt in enumerate(prompts, 1):
            yield prompt
            if number % _CHUNK == 0:
                bar.update(_CHUNK)
