"""The mesh on eight devices, and where arrays live on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from boot_jax import sharding
from boot_jax.sharding import MeshError, create_mesh


@pytest.mark.parametrize(
    "data, fsdp, shape",
    [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, 8, (1, 8)), (4, 2, (4, 2))],
)
def test_a_mesh_takes_all_devices(data, fsdp, shape):
    mesh = create_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("data, fsdp", [(-1, 3), (-1, 16), (3, 2), (2, 2), (0, 8)])
def test_a_mesh_that_does_not_divide_is_refused(data, fsdp):
    with pytest.raises(MeshError) as refusal:
        create_mesh(data, fsdp)
    message = str(refusal.value)
    assert "\n" not in message
    assert f"mesh.fsdp={fsdp}" in message and "a divisor of 8" in message


@pytest.mark.parametrize(
    "size, near", [(100, "take 96 or 104"), (9, "take 8 or 16"), (5, "take 8")]
)
def test_a_batch_that_does_not_divide_is_refused(size, near):
    with pytest.raises(MeshError) as refusal:
        sharding.check_batch_size("distill.batch_size", size, create_mesh(-1, 2))
    message = str(refusal.value)
    assert message.startswith(f"distill.batch_size is {size}")
    assert message.endswith(near) and "8 devices" in message
    sharding.check_batch_size("distill.batch_size", 16, create_mesh())


def test_a_batch_is_split_over_every_device():
    mesh = create_mesh(-1, 2)
    batch = jax.device_put(
        np.arange(32.0).reshape(16, 2), sharding.batch_sharding(mesh)
    )
    parts = [np.asarray(shard.data) for shard in batch.addressable_shards]
    assert [part.shape for part in parts] == [(2, 2)] * 8
    assert len({part.tobytes() for part in parts}) == 8


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((16, 64), (None, "fsdp")),
        ((64, 16), ("fsdp", None)),
        ((66, 16), (None, "fsdp")),  # the largest does not divide
        ((3, 3, 16, 32), (None, None, None, "fsdp")),
        ((1024,), ("fsdp",)),
        ((33, 35), ()),  # none divides
        ((16, 16), ()),  # too small
        ((), ()),
    ],
)
def test_parameters_are_split_in_their_largest_dimension(shape, spec):
    mesh = create_mesh(-1, 4)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    (where,) = jax.tree.leaves(
        sharding.parameter_shardings({"kernel": leaf}, mesh, min_size=1000)
    )
    assert where.mesh == mesh and where.spec == PartitionSpec(*spec)


def test_without_a_parameter_axis_all_are_replicated():
    tree = {"kernel": np.zeros((64, 64)), "count": np.zeros(())}
    shardings = sharding.parameter_shardings(tree, create_mesh(), min_size=1)
    assert all(where.is_fully_replicated for where in jax.tree.leaves(shardings))


def test_a_placed_parameter_takes_its_share_of_memory():
    mesh = create_mesh(-1, 4)
    tree = {"kernel": np.arange(4096, dtype=np.float32).reshape(64, 64)}
    placed = sharding.place(tree, sharding.parameter_shardings(tree, mesh, min_size=1))
    shards = placed["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(16, 64)}
    np.testing.assert_array_equal(placed["kernel"], tree["kernel"])


def test_place_copies():
    """What was given survives when what was placed is donated."""
    mesh = create_mesh()
    tree = {"a": jnp.arange(4.0), "count": jnp.asarray(3, jnp.int32)}
    placed = sharding.place(tree, sharding.replicated(mesh))
    jax.jit(lambda tree: tree, donate_argnums=0)(placed)
    assert placed["a"].is_deleted()
    np.testing.assert_array_equal(tree["a"], np.arange(4.0))
    assert placed["count"].dtype == jnp.int32
    assert len(placed["a"].sharding.device_set) == 8
