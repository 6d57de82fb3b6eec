"""Prompts to token ids, on the host: as CLIP has it, in pairs for SDXL, or by words.

A tokenizer is called with prompts and gives `Tokens`: ids of one shape a prompt, and
which prompts were longer than that. `ClipTokenizer` gives the ids of
``transformers.CLIPTokenizerFast``, but needs the ``tokenizers`` library alone.
"""

import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    models,
    normalizers,
    pre_tokenizers,
)
from tokenizers import Tokenizer as Backend

#: What CLIP's text encoders take where a folder names no length.
CLIP_LENGTH = 77

PADDING, UNKNOWN = 0, 1  # Of `WordTokenizer`; its words come after them.

# Contractions, words, single digits, runs of anything else (Radford et al., 2021).
_CLIP_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


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
    def fingerprint(self) -> str:
        """A hash of all that decides the ids."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """The ids of prompts."""
        ...


class ClipTokenizer:
    """Byte-pair encoding as CLIP's text encoders were trained with.

    A row is the start token, the prompt, the end token, then padding; of a prompt that
    is too long the beginning is kept, between both tokens. Text is brought to Unicode
    NFC, white space to single blanks, letters to lower case.
    """

    def __init__(
        self, backend: Backend, length: int, *, start_id: int, end_id: int, pad_id: int
    ):
        """See `from_folder`; ``backend`` is used as it is, without special tokens."""
        if length < 2:
            raise TokenizerError(
                f"a row must hold the start and the end token: {length} is too short"
            )
        self._backend = backend
        self._length = length
        self._start_id, self._end_id, self._pad_id = start_id, end_id, pad_id

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "ClipTokenizer":
        """The tokenizer in a pipeline's folder ``tokenizer`` or ``tokenizer_2``.

        Args:
          folder: holds ``vocab.json`` and ``merges.txt``, or else ``tokenizer.json``;
            and perhaps ``tokenizer_config.json`` and ``special_tokens_map.json``, which
            name the length of a row (77 by default) and the special tokens.

        Raises:
          TokenizerError: a file is missing or is not what it should be.
        """
        folder = pathlib.Path(folder)
        config = _read_json(folder / "tokenizer_config.json", {})
        backend, special = _backend(folder, config)
        ids = {name: backend.token_to_id(token) for name, token in special.items()}
        length = config.get("model_max_length")
        # Without a limit, transformers writes 10^30.
        if not isinstance(length, int) or length > 10**6:
            length = CLIP_LENGTH
        return cls(
            backend,
            length,
            start_id=ids["bos_token"],
            end_id=ids["eos_token"],
            pad_id=ids["pad_token"],
        )

    @property
    def row_shape(self) -> tuple[int]:
        """``(L,)``: the number of tokens in a row."""
        return (self._length,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of vocabulary, merges, rules, special tokens and length."""
        specials = (self._length, self._start_id, self._end_id, self._pad_id)
        return _hash(self._backend.to_str(), specials)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, L]`` of prompts; the backend's threads share the work."""
        room = self._length - 2
        ids = np.full((len(prompts), self._length), self._pad_id, np.int32)
        truncated = np.zeros(len(prompts), bool)
        ids[:, 0] = self._start_id
        encodings = self._backend.encode_batch_fast(
            list(prompts), add_special_tokens=False
        )
        for row, encoding in enumerate(encodings):
            pieces = encoding.ids
            truncated[row] = len(pieces) > room
            pieces = pieces[:room]
            ids[row, 1 : len(pieces) + 1] = pieces
            ids[row, len(pieces) + 1] = self._end_id
        return Tokens(ids, truncated)


class PairTokenizer:
    """Two tokenizers with rows of one shape, stacked: what SDXL's two encoders read."""

    def __init__(self, first: Tokenizer, second: Tokenizer):
        """The tokenizers of the first and of the second text encoder."""
        if first.row_shape != second.row_shape:
            raise TokenizerError(
                "both tokenizers of a pair must give rows of one shape, not "
                f"{first.row_shape} and {second.row_shape}"
            )
        self._both = (first, second)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """``(2, L)``."""
        return (2, *self._both[0].row_shape)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of both fingerprints."""
        return _hash("pair", *(tokenizer.fingerprint for tokenizer in self._both))

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, 2, L]``; truncated is what either of both truncates."""
        first, second = (tokenizer(prompts) for tokenizer in self._both)
        return Tokens(
            np.stack([first.ids, second.ids], axis=1),
            first.truncated | second.truncated,
        )


class WordTokenizer:
    """One id a word, for small teachers of one's own.

    Words are what white space separates, in lower case. Id 0 is padding, 1 an unknown
    word, 2 and up are the words of the vocabulary.

    Example:
        >>> tokenizer = WordTokenizer.from_prompts(["a red fox", "A blue hen"])
        >>> tokenizer(["a blue fox", "a green hen sings"]).ids.tolist()
        [[2, 3, 4], [2, 1, 5]]
        >>> tokenizer.unknown_words(["a green hen sings"])
        {'green': 1, 'sings': 1}
    """

    def __init__(self, vocabulary: Sequence[str], length: int):
        """The words, each once and in lower case, and how many a row holds."""
        if length < 1:
            raise TokenizerError(f"a row must hold at least 1 word, not {length}")
        for word, count in Counter(vocabulary).items():
            if count > 1 or _words(word) != [word]:
                raise TokenizerError(
                    f"a vocabulary has single words in lower case, each once: {word!r}"
                )
        self.vocabulary = tuple(vocabulary)
        self._length = length
        self._ids = {word: i for i, word in enumerate(vocabulary, UNKNOWN + 1)}

    @classmethod
    def from_prompts(
        cls, prompts: Iterable[str], length: int | None = None
    ) -> "WordTokenizer":
        """A tokenizer of all words in some prompts, sorted.

        Args:
          prompts: read once.
          length: words in a row; by default as many as the longest prompt has.
        """
        words: set[str] = set()
        longest = 1
        for prompt in prompts:
            found = _words(prompt)
            words.update(found)
            longest = max(longest, len(found))
        return cls(sorted(words), longest if length is None else length)

    @classmethod
    def from_json(cls, text: str) -> "WordTokenizer":
        """The tokenizer that `to_json` wrote."""
        try:
            fields = json.loads(text)
            vocabulary, length = fields["vocabulary"], fields["length"]
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(
                "a word tokenizer's JSON is an object with a vocabulary and a length"
            ) from error
        return cls(vocabulary, length)

    def to_json(self) -> str:
        """All of it, as a JSON object."""
        fields = {"length": self._length, "vocabulary": self.vocabulary}
        return json.dumps(fields, ensure_ascii=False)

    @property
    def row_shape(self) -> tuple[int]:
        """``(L,)``: the number of words in a row."""
        return (self._length,)

    @property
    def vocabulary_size(self) -> int:
        """The number of ids, with those of padding and of the unknown word."""
        return len(self.vocabulary) + UNKNOWN + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and of the length."""
        return _hash("words", self.to_json())

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, L]`` of prompts."""
        ids = np.full((len(prompts), self._length), PADDING, np.int32)
        truncated = np.zeros(len(prompts), bool)
        for row, prompt in enumerate(prompts):
            words = _words(prompt)
            truncated[row] = len(words) > self._length
            known = [self._ids.get(word, UNKNOWN) for word in words[: self._length]]
            ids[row, : len(known)] = known
        return Tokens(ids, truncated)

    def unknown_words(self, prompts: Iterable[str]) -> dict[str, int]:
        """The words that are not in the vocabulary, and how often; frequent ones first."""
        counts = Counter(
            word
            for prompt in prompts
            for word in _words(prompt)
            if word not in self._ids
        )
        return dict(counts.most_common())


def _words(text: str) -> list[str]:
    return text.lower().split()


def _hash(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _backend(
    folder: pathlib.Path, config: dict[str, Any]
) -> tuple[Backend, dict[str, str]]:
    """The byte-pair encoder of a folder, and its special tokens by name."""
    # In files of older releases the map has the last word on special tokens.
    named = config
    if "added_tokens_decoder" not in config:
        named = config | _read_json(folder / "special_tokens_map.json", {})
    try:
        added = [
            _added_token(token, token["special"])
            for _, token in sorted(
                config.get("added_tokens_decoder", {}).items(),
                key=lambda item: int(item[0]),
            )
        ]
        defaults = {"bos_token": "<|startoftext|>"}
        special = {}
        for name in _SPECIAL:
            token = named.get(name) or defaults.get(name, "<|endoftext|>")
            if isinstance(token, str):
                token = {"content": token, "normalized": name != "pad_token"}
            special[name] = token["content"]
            if token["content"] not in [other.content for other in added]:
                added.append(_added_token(token, special=True))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"the special tokens in {folder} are damaged ({error!r}); fetch it again"
        ) from error
    backend = _bare_backend(folder, special["unk_token"])
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in added if token.content not in present])
    return backend, special


def _added_token(token: dict[str, Any], special: bool) -> AddedToken:
    flags = {flag: token[flag] for flag in _FLAGS if flag in token}
    return AddedToken(token["content"], special=special, **flags)


def _bare_backend(folder: pathlib.Path, unknown: str) -> Backend:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    whole = folder / "tokenizer.json"
    try:
        if vocabulary.exists() and merges.exists():
            return _clip_backend(_read_json(vocabulary), merges, unknown)
        if whole.exists():
            backend = Backend.from_file(str(whole))
            backend.no_truncation()
            backend.no_padding()
            return backend
    # The library raises plain exceptions of its own.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise TokenizerError(
            f"the tokenizer in {folder} is damaged ({reason}); fetch it again"
        ) from error
    raise TokenizerError(
        f"{folder} has no tokenizer: it needs vocab.json and merges.txt, or "
        "tokenizer.json"
    )


def _clip_backend(
    vocabulary: dict[str, int], merges: pathlib.Path, unknown: str
) -> Backend:
    lines = merges.read_text(encoding="utf-8").strip().split("\n")
    pairs: list[Any] = [tuple(line.split()) for line in lines[1:]]  # after the version
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _read_json(path: pathlib.Path, missing: Any = None) -> Any:
    if missing is not None and not path.exists():
        return missing
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{path} cannot be read ({error}); fetch it again"
        ) from error
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} is not a JSON object; fetch it again")
    return fields
