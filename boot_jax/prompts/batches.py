"""Batches of prompts, read ahead of the training loop."""

from collections.abc import Generator
from typing import Protocol

import numpy as np

from boot_jax.batches import Batch, dispatch_indices, read_ahead


class Rows(Protocol):
    """Rows of arrays by index: a `PromptCache` or an `EmbeddingCache`."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Maps indices ``[n]`` to arrays ``[n, ...]`` by name."""
        ...


def prompt_batches(
    cache: Rows,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps_per_dispatch: int = 1,
    *,
    rows: slice = slice(None),
) -> Generator[Batch, None, None]:
    """Batches without end, ``k = steps_per_dispatch`` at a time, read one item ahead.

    Which prompts a batch has is a pure function of ``(seed, step)``, as images of
    `boot_jax.batches.batches` are; a new permutation of all is drawn in each epoch.

    Args:
      cache: tokens or embeddings.
      batch_size: prompts in a step, over all processes; may exceed their number.
      seed: decides the order of the prompts.
      start_step: the first step to give; a run continued here sees what it would have.
      steps_per_dispatch: steps in an item.
      rows: the ``B`` rows of every batch that this process reads; all by default.

    Yields:
      ``{"tokens": [k, B, *row_shape] int32}``, with "negative_tokens" alike if there
      are negative prompts; or the embeddings by name, ``[k, B, ...]``; see
      `boot_jax.batches.read_ahead`.

    Raises:
      DataError: a size, seed or step that cannot be.
    """
    draw = dispatch_indices(
        len(cache), batch_size, seed, start_step, steps_per_dispatch
    )

    def read(first: int) -> Batch:
        indices = draw(first)[:, rows]
        return {
            name: taken.reshape(*indices.shape, *taken.shape[1:])
            for name, taken in cache.take(indices.ravel()).items()
        }

    return read_ahead(read, start_step, steps_per_dispatch)
