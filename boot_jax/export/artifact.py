"""The student as one file that jax alone runs: StableHLO with its weights inside.

`jax.export` lowers the one call of the network for every platform at once, for any
batch size. The weights stand behind an optimisation barrier: XLA would otherwise
compute what depends on them alone while it compiles, and round it otherwise than our
sampler, whose weights are arguments. With it both give the same bits on one backend.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.export.finished import ExportError, FinishedStudent

PLATFORMS = ("cpu", "cuda", "tpu")

#: Of weights; flatbuffers, of which the file is made, end at 2^31 bytes.
MOST_BYTES = 2_000_000_000


def why_not(finished: FinishedStudent) -> str:
    """Why there can be no such file; empty where there can."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(_weights(finished)))
    if size <= MOST_BYTES:
        return ""
    return (
        f"the weights are {size / 1e9:.1f} GB, and one StableHLO file holds at most "
        f"{MOST_BYTES / 1e9:.1f} GB"
    )


def _weights(finished: FinishedStudent) -> tuple[Any, Any]:
    """Of the student, and of what encodes its prompts."""
    text = finished.teacher.text
    return finished.params, None if text is None else text.params


def serialize(finished: FinishedStudent, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """The file's content; `jax.export.deserialize(bytearray(...)).call` runs it.

    It maps ``eps [B, H, W, C]`` float32 and, for a student with classes, ``label [B]
    int32``, or for one of prompts ``tokens [B, ...] int32``, to images ``[B, H, W, C]``
    float32.

    Raises:
      ExportError: the package flatbuffers is missing.
    """
    decoder, text = finished.teacher.decoder, finished.teacher.text
    weights = _weights(finished)

    def call(eps: Array, given: Array | None = None) -> Array:
        params, text_params = jax.lax.optimization_barrier(weights)
        if text is None or given is None:
            samples = finished(params, eps, given)
        else:
            condition = text.encode(text_params, given)
            samples = finished.of_condition(params, eps, condition)
        if decoder is None or finished.is_latent:
            return samples  # images, or latents for a network of its own
        return decoder.decode(None, samples)

    (batch,) = jax.export.symbolic_shape("batch")
    inputs = [jax.ShapeDtypeStruct((batch, *finished.sample_shape), jnp.float32)]
    if finished.num_classes is not None:
        inputs.append(jax.ShapeDtypeStruct((batch,), jnp.int32))
    elif text is not None:
        shape = (batch, *text.tokenizer.row_shape)
        inputs.append(jax.ShapeDtypeStruct(shape, jnp.int32))
    exported = jax.export.export(jax.jit(call), platforms=platforms)(*inputs)
    try:
        return bytes(exported.serialize())
    except ImportError as error:  # of flatbuffers, which jax does not require
        raise ExportError(str(error)) from error
