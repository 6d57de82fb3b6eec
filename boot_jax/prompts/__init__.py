"""Prompts on the host: files of any size to batches of tokens or of embeddings.

`read_prompts` streams files; `PromptCache` holds their tokens, once and for all, in a
folder; `EmbeddingCache` what a text encoder makes of them; `prompt_batches` gives
either to the training loop. Nothing holds all prompts in memory.
"""

from boot_jax.prompts.batches import prompt_batches
from boot_jax.prompts.cache import PromptCache
from boot_jax.prompts.embeddings import EmbeddingCache
from boot_jax.prompts.files import Prompt, PromptError, read_prompts

__all__ = [
    "EmbeddingCache",
    "Prompt",
    "PromptCache",
    "PromptError",
    "prompt_batches",
    "read_prompts",
]
