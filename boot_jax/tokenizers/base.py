"""What a tokenizer is, and two of them side by side."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class TokenizerError(ValueError):
    """A tokenizer that cannot be made; the message says what is wrong with it."""


class Tokens(NamedTuple):
    """The ids of some prompts.

    Attributes:
      ids: ``[N, *row_shape]`` int32.
      truncated: ``[N]`` bool, whether a prompt was longer than its row.
    """

    ids: np.ndarray
    truncated: np.ndarray


class Tokenizer(Protocol):
    """Maps prompts to ids; a pure function, which ``fingerprint`` stands for."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one prompt's ids."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """The ids of prompts."""
        ...


class PairTokenizer:
    """Two tokenizers with rows of one shape, stacked: what SDXL's two encoders read.

    Attributes:
      row_shape: ``(2, L)``.
      vocabulary_size: that of the larger vocabulary.
      fingerprint: a hash of both fingerprints.
    """

    def __init__(self, first: Tokenizer, second: Tokenizer):
        """The tokenizers of the first and of the second text encoder."""
        if first.row_shape != second.row_shape:
            raise TokenizerError(
                "both tokenizers of a pair must give rows of one shape, not "
                f"{first.row_shape} and {second.row_shape}"
            )
        self._both = (first, second)
        self.row_shape = (2, *first.row_shape)
        self.vocabulary_size = max(first.vocabulary_size, second.vocabulary_size)
        self.fingerprint = hash_of("pair", first.fingerprint, second.fingerprint)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, 2, L]``; truncated is what either of both truncates."""
        first, second = (tokenizer(prompts) for tokenizer in self._both)
        return Tokens(
            np.stack([first.ids, second.ids], axis=1),
            first.truncated | second.truncated,
        )


def hash_of(*parts: Any) -> str:
    """A hash of parts that `str` tells apart."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
