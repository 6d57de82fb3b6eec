"""The mesh, and where arrays live on it.

Two axes over all devices: ``data`` splits the batch; ``fsdp`` splits the batch too, and
also the large parameters, their moving average and their optimizer state.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


class MeshError(ValueError):
    """A mesh that the devices, or a batch that the mesh, cannot be divided into."""


def create_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices; ``data = -1`` takes all that ``fsdp`` leaves.

    Raises:
      MeshError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    if data == -1 and count % fsdp == 0:
        data = count // fsdp
    if data * fsdp != count:
        raise MeshError(
            f"mesh.data={data} times mesh.fsdp={fsdp} is not the number of devices, "
            f"{count}; set mesh.data=-1 and mesh.fsdp to a divisor of {count}"
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that the devices cannot share evenly.

    Raises:
      MeshError: naming the field and the nearest sizes that would do.
    """
    if batch_size % mesh.size:
        below = batch_size // mesh.size * mesh.size
        near = " or ".join(str(n) for n in (below, below + mesh.size) if n)
        raise MeshError(
            f"{name} is {batch_size}, which {mesh.size} devices cannot share evenly; "
            f"take {near}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(tree: Any, mesh: Mesh, min_size: int = 2**20) -> Any:
    """One sharding a leaf: the largest dimension that ``fsdp`` divides, or replicated.

    Args:
      tree: arrays or shapes; a whole `TrainState` as well as parameters.
      mesh: from `create_mesh`.
      min_size: leaves with fewer elements are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        divisible = [n if n % fsdp == 0 else 0 for n in leaf.shape]
        if fsdp == 1 or leaf.size < min_size or not any(divisible):
            return replicated(mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[int(np.argmax(divisible))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(rule, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays where they belong, as copies, on one process or on several."""
    leaves, structure = jax.tree.flatten(shardings)
    return _placer(tuple(leaves), structure)(tree)


@functools.lru_cache(maxsize=64)
def _placer(leaves: tuple[NamedSharding, ...], structure: Any) -> Callable[[Any], Any]:
    return jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + 0, tree),
        out_shardings=jax.tree.unflatten(structure, leaves),
    )
