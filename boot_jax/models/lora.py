"""Low-rank adapters of a network (Hu et al., *LoRA*, arXiv 2106.09685).

A kernel ``W`` becomes ``W + c A B`` with ``A [in, r]`` and ``B [r, out]``; a
convolution's window belongs to its inputs. ``B`` starts at zero, so that the network
starts as it was. Adapters are a tree of their own, which alone is trained and kept; the
other parameters (biases, norms, embeddings) are those of the network.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

_KERNEL, _DOWN, _UP = "kernel", "lora_down", "lora_up"


def init_adapters(params: Any, key: Array, rank: int) -> Any:
    """Adapters of all kernels, float32, with which the network is as it was.

    Args:
      params: of the network, arrays or shapes.
      key: a JAX key.
      rank: ``r``; less where a kernel has fewer inputs or outputs.

    Returns:
      A tree like ``params`` with ``{lora_down, lora_up}`` for each kernel.
    """
    adapters = {}
    for index, (path, kernel) in enumerate(_kernels(params).items()):
        fan_out = kernel.shape[-1]
        fan_in = kernel.size // fan_out
        r = min(rank, fan_in, fan_out)
        normal = jax.random.normal(jax.random.fold_in(key, index), (fan_in, r))
        adapters[(*path[:-1], _DOWN)] = normal / jnp.sqrt(float(fan_in))
        adapters[(*path[:-1], _UP)] = jnp.zeros((r, fan_out))
    return traverse_util.unflatten_dict(adapters)


def merge_adapters(params: Any, adapters: Any, scale: float = 1.0) -> Any:
    """The parameters with ``scale * A B`` added to each kernel, in float32.

    Args:
      params: of the network.
      adapters: of `init_adapters`, for the same network.
      scale: ``c``; ``alpha / r`` in the paper.
    """
    merged = traverse_util.flatten_dict(params)
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(adapters)
    for path, kernel in _kernels(params).items():
        down, up = flat[(*path[:-1], _DOWN)], flat[(*path[:-1], _UP)]
        change = down @ up
        whole = jnp.asarray(kernel, change.dtype)
        merged[path] = whole + scale * change.reshape(kernel.shape)
    return traverse_util.unflatten_dict(merged)


def _kernels(params: Any) -> dict[tuple[str, ...], Any]:
    flat = traverse_util.flatten_dict(params)
    return {path: leaf for path, leaf in flat.items() if path[-1] == _KERNEL}
