"""Attention by the implementation that a config chooses.

``"cudnn"`` is the fused kernel of NVIDIA's library: the fastest there, in 16 bits, and
without a forward-mode derivative. It takes even lengths and heads of some sizes only;
others, such as the 77 tokens of a prompt, are left to XLA. None lets JAX choose.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

AttentionImplementation = Literal["xla", "cudnn"]

# Of the fused kernel, on any card that has it.
_LARGEST_HEAD, _HEAD_MULTIPLE = 128, 8


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    implementation: AttentionImplementation | None,
    *,
    is_causal: bool = False,
) -> Array:
    """Attention over ``[B, N, heads, D]``, in the dtype of its arguments.

    Logits and softmax are float32 whatever the dtype; on CPU all is, as XLA has no
    16-bit product for small shapes there. A causal one reads only what comes before.
    """
    dtype = query.dtype
    if implementation == "cudnn" and not _is_for_cudnn(query, key):
        implementation = "xla"
    if jax.default_backend() == "cpu":
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    # It promotes types within, which strict promotion refuses for 16-bit ones.
    with jax.numpy_dtype_promotion("standard"):
        attended = jax.nn.dot_product_attention(
            query, key, value, is_causal=is_causal, implementation=implementation
        )
    return attended.astype(dtype)


def _is_for_cudnn(query: Array, key: Array) -> bool:
    head = query.shape[-1]
    lengths_are_even = query.shape[1] % 2 == key.shape[1] % 2 == 0
    return lengths_are_even and head <= _LARGEST_HEAD and head % _HEAD_MULTIPLE == 0
