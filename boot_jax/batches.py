"""Batches of a data set, read ahead of the training loop.

What a batch holds is a pure function of ``(seed, step)``: an exact resume needs nothing
saved, and neither the number of processes nor that of the steps in a dispatch changes
what is learned from.
"""

import concurrent.futures
import functools
import itertools
import sys
from collections.abc import Callable, Generator

import numpy as np

from boot_jax.data import DataError, Dataset
from boot_jax.tokenizers import Tokenizer

_ORDER_STREAM, _FLIP_STREAM = 0, 1

Batch = dict[str, np.ndarray]


def batch_indices(
    num_examples: int, batch_size: int, seed: int, step: int
) -> np.ndarray:
    """The examples in batch number ``step``, as indices ``[batch_size]`` int64.

    Each epoch is a new permutation of all examples; a batch may straddle two epochs, or
    span several if it is larger than the data set. Raises `DataError` for a size below
    1, or a negative seed or step.
    """
    if min(num_examples, batch_size) < 1 or min(seed, step) < 0:
        raise DataError(
            "num_examples and batch_size must be at least 1, seed and step at least 0, "
            f"not {num_examples}, {batch_size}, {seed} and {step}"
        )
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
        order = _permutation(num_examples, seed, epoch)
        epoch_start = epoch * num_examples
        parts.append(order[max(start - epoch_start, 0) : stop - epoch_start])
    return np.concatenate(parts).astype(np.int64)


def dispatch_indices(
    num_examples: int, batch_size: int, seed: int, start_step: int, length: int
) -> Callable[[int], np.ndarray]:
    """Maps a step to the examples in the batches from it on, ``[length, batch_size]``.

    Raises:
      DataError: the length is below 1, or as `batch_indices` at ``start_step``: now,
        not later.
    """
    if length < 1:
        raise DataError(f"steps_per_dispatch must be at least 1: {length}")
    batch_indices(num_examples, batch_size, seed, start_step)

    def draw(first: int) -> np.ndarray:
        steps = range(first, first + length)
        return np.stack(
            [batch_indices(num_examples, batch_size, seed, step) for step in steps]
        )

    return draw


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps_per_dispatch: int = 1,
    *,
    random_flip: bool = False,
    tokenizer: Tokenizer | None = None,
    rows: slice = slice(None),
) -> Generator[Batch, None, None]:
    """Batches without end, ``k = steps_per_dispatch`` at a time, read one item ahead.

    Args:
      batch_size: images in a step, over all processes; may exceed the data set's size.
      seed: decides the order of the images, and the flips.
      start_step: the first step to give; a run continued here sees what it would have.
      random_flip: mirror each image left to right with probability 1/2.
      tokenizer: of the captions, which are left out without one.
      rows: the ``B`` rows of every batch that this process reads; all by default.

    Yields:
      ``{"image": [k, B, H, W, C] float32 in [-1, 1], "label": [k, B] int32}``, without
      "label" where the data set has none; where it has captions, a tokenizer's
      ``"tokens": [k, B, *row_shape] int32``, too; see `read_ahead`.

    Raises:
      DataError: a size, seed or step that cannot be; while iterating, a bad image.
    """
    draw = dispatch_indices(
        len(dataset), batch_size, seed, start_step, steps_per_dispatch
    )

    def read(first: int) -> Batch:
        indices, steps = draw(first)[:, rows], range(first, first + steps_per_dispatch)
        images = dataset.images(indices.ravel())
        if random_flip:
            coins = [_random_words(batch_size, seed, _FLIP_STREAM, i) for i in steps]
            heads = np.stack(coins)[:, rows].reshape(-1, 1, 1, 1) < 2**63
            images = np.where(heads, images[:, :, ::-1], images)
        batch = {"image": images.reshape(*indices.shape, *dataset.image_shape)}
        labels = dataset.labels(indices.ravel())
        if labels is not None:
            batch["label"] = labels.reshape(indices.shape)
        if tokenizer is not None and dataset.captions is not None:
            ids = tokenizer(dataset.captions(indices.ravel())).ids
            batch["tokens"] = ids.reshape(*indices.shape, *ids.shape[1:])
        return batch

    return read_ahead(read, start_step, steps_per_dispatch)


def read_ahead(
    read: Callable[[int], Batch], start: int, stride: int
) -> Generator[Batch, None, None]:
    """Gives ``read(start)``, ``read(start + stride)``, ... without end.

    The next one is read in a thread while the consumer works; the thread ends when the
    generator is closed, dropped or has raised.
    """
    thread = concurrent.futures.ThreadPoolExecutor(1, "boot_jax-batches")
    is_finalizing = sys.is_finalizing  # at the interpreter's end, sys may be gone
    try:
        ahead = thread.submit(read, start)
        for step in itertools.count(start + stride, stride):
            batch = ahead.result()
            ahead = thread.submit(read, step)
            yield batch
    finally:
        # Waits for the thread; at the interpreter's end that has been done.
        thread.shutdown(wait=not is_finalizing())


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    words = _random_words(num_examples, seed, _ORDER_STREAM, epoch)
    order = np.argsort(words, kind="stable")
    # Half the memory, which counts for tens of millions.
    return order.astype(np.uint32) if num_examples <= 2**32 else order


def _random_words(count: int, seed: int, stream: int, index: int) -> np.ndarray:
    # Raw words: unlike Generator's methods, they are the same in every numpy release.
    seeds = np.random.SeedSequence(seed, spawn_key=(stream, index))
    return np.random.Philox(seeds).random_raw(count)
