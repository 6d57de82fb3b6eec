"""What tells a good state from a broken one: checksums and finiteness, by array.

The checksum of an array is the sum modulo 2^32, over its elements, of a mix of each
one's bits and position. It is computed on the device from the values alone, so that it
does not depend on how the array is split, and covers the whole way from one device's
memory over the disk to another's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boot_jax.sharding import path_name


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its arrays: ``{path: {shape, dtype, checksum}}``.

    Raises:
      FloatingPointError: one holds NaN or infinity; names it.
    """
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    # All are under way before the first is waited for.
    digests = jax.device_get({name: _digest(leaf) for name, leaf in leaves.items()})
    bad = [name for name, (_, finite) in digests.items() if not finite]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise FloatingPointError(f"{bad[0]}{more} would hold NaN or infinity")
    return {
        name: layout(leaf) | {"checksum": int(digests[name][0])}
        for name, leaf in leaves.items()
    }


def layout(leaf: Any) -> dict[str, Any]:
    """Shape and type of an array, as JSON can hold them."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def misfits(saved: Mapping[str, Mapping[str, Any]], template: Any) -> list[str]:
    """How the arrays that a checkpoint holds differ from a template's, in words."""
    wanted = {
        path_name(path): layout(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    words = [f"it lacks {name}" for name in sorted(wanted.keys() - saved.keys())]
    words += [f"it has {name}" for name in sorted(saved.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & saved.keys()):
        has = {key: saved[name].get(key) for key in ("shape", "dtype")}
        if has != wanted[name]:
            words.append(f"{name} is {_words(has)}, not {_words(wanted[name])}")
    return words


def _words(layout: Mapping[str, Any]) -> str:
    return f"{layout['dtype']}{layout['shape']}"


@jax.jit
def _digest(leaf: Array) -> tuple[Array, Array]:
    """Checksum, and whether all elements are finite."""
    finite = jnp.isfinite(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else True
    bits = leaf
    if leaf.dtype != jnp.bool_:
        unsigned = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned)
    mixed = (bits.astype(jnp.uint32) ^ _positions(leaf.shape)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> np.uint32(13))
    return jnp.sum(mixed, dtype=jnp.uint32), jnp.all(finite)


def _positions(shape: tuple[int, ...]) -> Array:
    """The index of each element in row-major order, spread over all 32 bits."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        steps = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += steps * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return (index + np.uint32(1)) * np.uint32(0x9E3779B1)
