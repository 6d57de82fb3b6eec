"""A batch in parts, one after the other in less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split_batch(tree: Any, microbatches: int) -> Any:
    """``[B, ...]`` as ``[m, B / m, ...]``."""
    return jax.tree.map(
        lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), tree
    )


def mean_over_microbatches(
    of_one: Callable[[Any, Any], Any], inputs: Any, microbatches: int
) -> Any:
    """The mean of ``of_one(index, part)`` over the parts of ``inputs [m, ...]``."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    if microbatches == 1:
        return of_one(0, first)

    def add(total: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_one(*item)), None

    indices = jnp.arange(microbatches)
    shapes = jax.eval_shape(of_one, indices[0], first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (indices, inputs))
    return jax.tree.map(lambda leaf: leaf / microbatches, total)
