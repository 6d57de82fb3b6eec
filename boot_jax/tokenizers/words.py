"""One id a word, for small teachers of one's own."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from boot_jax.tokenizers.base import TokenizerError, Tokens, hash_of

PADDING, UNKNOWN = 0, 1  # The words of a vocabulary come after them.


class WordTokenizer:
    """One id a word, for small teachers of one's own.

    Words are what white space separates, in lower case. Id 0 is padding, 1 an unknown
    word, 2 and up are the words of the vocabulary.

    Attributes:
      vocabulary: the words, in order of their ids.
      row_shape: ``(L,)``, the number of words in a row.
      vocabulary_size: the number of ids, with those of padding and the unknown word.
      fingerprint: a hash of vocabulary and length.

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
        self.row_shape = (length,)
        self.vocabulary_size = len(vocabulary) + UNKNOWN + 1
        self._ids = {word: i for i, word in enumerate(vocabulary, UNKNOWN + 1)}
        self.fingerprint = hash_of("words", self.to_json())

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
        fields = {"length": self.row_shape[0], "vocabulary": self.vocabulary}
        return json.dumps(fields, ensure_ascii=False)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids ``[N, L]`` of prompts."""
        (length,) = self.row_shape
        ids = np.full((len(prompts), length), PADDING, np.int32)
        truncated = np.zeros(len(prompts), bool)
        for row, prompt in enumerate(prompts):
            words = _words(prompt)
            truncated[row] = len(words) > length
            known = [self._ids.get(word, UNKNOWN) for word in words[:length]]
            ids[row, : len(known)] = known
        return Tokens(ids, truncated)

    def unknown_words(self, prompts: Iterable[str]) -> dict[str, int]:
        """The words that are not in the vocabulary, the most frequent first.

        Returns:
          How often each is there.
        """
        counts = Counter(
            word
            for prompt in prompts
            for word in _words(prompt)
            if word not in self._ids
        )
        return dict(counts.most_common())


def _words(text: str) -> list[str]:
    return text.lower().split()
