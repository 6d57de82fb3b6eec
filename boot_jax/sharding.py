"""The mesh, and where arrays live on it.

Three axes over all devices of all processes: ``data`` splits the batch; ``fsdp`` splits
the batch too, and also large parameters, their moving average and their optimizer
state; ``tensor`` splits the parameters that a rule asks for, and no batch.

A *rule* is ``(regex, tactic)``. The first whose regex is found in a parameter's path,
such as ``block_3/attention/to_q/kernel``, says where it lives:

  * ``replicate``: whole on every device;
  * ``fsdp``: split along the largest dimension that the axis divides, if the parameter
    has ``fsdp_min_size`` elements or more, else replicated;
  * ``AXIS:DIMENSION``: that dimension over that axis, as in ``tensor:out``. A dimension
    is a number, or ``in`` or ``out``: the last two of a kernel.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

#: ``(regex, tactic)`` of parameters; see the module's docstring.
Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((".*", "fsdp"),)

_SPLIT = re.compile(rf"({'|'.join(AXES)}):(in|out|-?\d+)")
_DIMENSIONS = {"in": -2, "out": -1}


class MeshError(ValueError):
    """A mesh that the devices, or an array that the mesh, cannot be divided into."""


def create_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; ``data = -1`` takes all that the others leave.

    Raises:
      MeshError: the sizes do not multiply to the number of devices.
    """
    count, others = jax.device_count(), fsdp * tensor
    if data == -1 and count % others == 0:
        data = count // others
    if data * others != count:
        raise MeshError(
            f"mesh.data={data} times mesh.fsdp={fsdp} times mesh.tensor={tensor} is "
            f"not the number of devices, {count}; set mesh.data=-1 and the product of "
            f"the others to a divisor of {count}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(
    name: str, batch_size: int, mesh: Mesh, microbatches: int = 1
) -> None:
    """Refuses a batch that the devices cannot share evenly.

    Raises:
      MeshError: naming the field and the nearest sizes that would do.
    """
    unit = batch_shards(mesh) * microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        near = " or ".join(str(n) for n in (below, below + unit) if n)
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise MeshError(
            f"{name} is {batch_size}, which {batch_shards(mesh)} devices cannot share "
            f"evenly{parts}; take {near}"
        )


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, the leading one by default, over every device of a data axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_rules(rules: Rules) -> None:
    """Refuses rules that are not ``(regex, tactic)``.

    Raises:
      MeshError: naming the first that is wrong, and what a tactic may be.
    """
    for rule in rules:
        try:
            pattern, tactic = rule
            re.compile(pattern)
        except (TypeError, ValueError, re.error) as error:
            raise MeshError(
                f"{rule!r} is not a rule: (regex, tactic) is needed ({error})"
            ) from error
        if tactic not in ("replicate", "fsdp") and not _SPLIT.fullmatch(str(tactic)):
            raise MeshError(
                f"{tactic!r} is not a tactic; choose replicate, fsdp, or "
                f"AXIS:DIMENSION with an axis of {', '.join(AXES)} and a dimension "
                "that is in, out or a number"
            )


def parameter_shardings(
    params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES, min_size: int = 2**20
) -> Any:
    """One sharding a parameter; a parameter that no rule finds is replicated.

    Args:
      params: arrays or shapes.
      mesh: from `create_mesh`.
      rules: see the module's docstring.
      min_size: below this many elements, ``fsdp`` replicates.

    Raises:
      MeshError: a rule names a dimension that is not there or that does not divide.
    """

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        tactic = next((t for regex, t in rules if re.search(regex, name)), "replicate")
        return NamedSharding(mesh, _spec(name, leaf, tactic, mesh, min_size))

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def path_name(path: Any) -> str:
    """The path of a leaf as rules see it, such as ``block_3/attention/to_q/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(
    name: str, leaf: Any, tactic: str, mesh: Mesh, min_size: int
) -> PartitionSpec:
    split = _SPLIT.fullmatch(tactic)
    if split is not None:
        axis, wanted = split.groups()
        dimension = int(_DIMENSIONS.get(wanted, wanted))
        if not -leaf.ndim <= dimension < leaf.ndim:
            raise MeshError(
                f"{name} has shape {leaf.shape} and no dimension {wanted}, which the "
                f"rule {tactic!r} asks for"
            )
        if leaf.shape[dimension] % mesh.shape[axis]:
            raise MeshError(
                f"{name} has shape {leaf.shape}, whose dimension {wanted} the "
                f"{mesh.shape[axis]} devices of {tactic!r} cannot share evenly"
            )
    else:
        axis, count = "fsdp", mesh.shape["fsdp"]
        divisible = [size if size % count == 0 else 0 for size in leaf.shape]
        if tactic == "replicate" or leaf.size < min_size or not any(divisible):
            return PartitionSpec()
        dimension = int(np.argmax(divisible))
    if mesh.shape[axis] == 1:
        return PartitionSpec()
    spec: list[str | None] = [None] * leaf.ndim
    spec[dimension] = axis
    return PartitionSpec(*spec)


def place(tree: Any, shardings: Any) -> Any:
    """Copies arrays to where they belong, on one process or on several.

    Arrays of the host go to each device in parts, so that no device ever holds more
    than its own. Every process must give the same numbers.

    Args:
      tree: numpy or JAX arrays.
      shardings: a tree of shardings, or one for all leaves.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_place_leaf, tree, shardings)


def _place_leaf(leaf: Any, where: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return _copier(where)(leaf)
    host = np.asarray(leaf)
    # A copy, for the CPU's arrays may share the memory of numpy's.
    return jax.make_array_from_callback(
        host.shape, where, lambda index: np.array(host[index], host.dtype)
    )


@functools.lru_cache(maxsize=64)
def _copier(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda leaf: leaf + 0, out_shardings=where)


def place_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A key on every device of every process."""
    data, impl = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
    wrap = functools.partial(jax.random.wrap_key_data, impl=impl)
    return jax.jit(wrap, out_shardings=replicated(mesh))(data)


def to_host(tree: Any) -> Any:
    """Numpy arrays of a tree, on every process; of several, all must call it."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
