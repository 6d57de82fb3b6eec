"""The student as one file that jax alone runs: StableHLO with its weights inside.

`jax.export` lowers the one call of the network for every platform at once, for any
batch size. The weights stand behind an optimisation barrier: XLA would otherwise
compute what depends on them alone while it compiles, and round it otherwise than our
sampler, whose weights are arguments. With it both give the same bits on one backend.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from boot_jax.export.finished import ExportError, FinishedStudent

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(finished: FinishedStudent, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """The file's content; `jax.export.deserialize(bytearray(...)).call` runs it.

    It maps ``eps [B, H, W, C]`` float32 and, for a student with classes,
    ``label [B] int32`` to images ``[B, H, W, C]`` float32.

    Raises:
      ExportError: the package flatbuffers is missing.
    """

    decoder = finished.teacher.decoder

    def call(eps: Array, label: Array | None = None) -> Array:
        samples = finished(jax.lax.optimization_barrier(finished.params), eps, label)
        if decoder is None or finished.is_latent:
            return samples  # images, or latents for a network of its own
        return decoder.decode(None, samples)

    (batch,) = jax.export.symbolic_shape("batch")
    inputs = [jax.ShapeDtypeStruct((batch, *finished.sample_shape), jnp.float32)]
    if finished.num_classes is not None:
        inputs.append(jax.ShapeDtypeStruct((batch,), jnp.int32))
    exported = jax.export.export(jax.jit(call), platforms=platforms)(*inputs)
    try:
        return bytes(exported.serialize())
    except ImportError as error:  # of flatbuffers, which jax does not require
        raise ExportError(str(error)) from error
