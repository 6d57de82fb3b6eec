"""Prompts to token ids, on the host: as CLIP has it, in pairs for SDXL, or by words.

A tokenizer is called with prompts and gives `Tokens`: ids of one shape a prompt, and
which prompts were longer than that.
"""

from boot_jax.tokenizers.base import PairTokenizer, Tokenizer, TokenizerError, Tokens
from boot_jax.tokenizers.clip import ClipTokenizer
from boot_jax.tokenizers.words import PADDING, WordTokenizer

__all__ = [
    "PADDING",
    "ClipTokenizer",
    "PairTokenizer",
    "Tokenizer",
    "TokenizerError",
    "Tokens",
    "WordTokenizer",
]
