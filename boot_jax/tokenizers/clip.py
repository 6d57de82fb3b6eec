"""CLIP's tokenizer out of a pipeline's folder, by the ``tokenizers`` library alone.

It gives the ids of ``transformers.CLIPTokenizerFast``.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    models,
    normalizers,
    pre_tokenizers,
)
from tokenizers import Tokenizer as Backend

from boot_jax.jsons import read_object
from boot_jax.tokenizers.base import TokenizerError, Tokens, hash_of

#: What CLIP's text encoders take where a folder names no length.
CLIP_LENGTH = 77

# Contractions, words, single digits, runs of anything else (Radford et al., 2021).
_CLIP_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class ClipTokenizer:
    """Byte-pair encoding as CLIP's text encoders were trained with.

    A row is the start token, the prompt, the end token, then padding; of a prompt that
    is too long the beginning is kept, between both tokens. Text is brought to Unicode
    NFC, white space to single blanks, letters to lower case.

    Attributes:
      row_shape: ``(L,)``, the number of tokens in a row.
      vocabulary_size: one more than the largest id, with those of special tokens.
      fingerprint: a hash of vocabulary, merges, rules, special tokens and length.
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
        self._start_id, self._end_id, self._pad_id = start_id, end_id, pad_id
        self.row_shape = (length,)
        self.vocabulary_size = max(backend.get_vocab().values()) + 1
        specials = (length, start_id, end_id, pad_id)
        self.fingerprint = hash_of(backend.to_str(), specials)

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

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, L]`` of prompts; the backend's threads share the work."""
        (length,) = self.row_shape
        room = length - 2
        ids = np.full((len(prompts), length), self._pad_id, np.int32)
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
    return read_object(path, TokenizerError)
