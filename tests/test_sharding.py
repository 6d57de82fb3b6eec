"""The mesh on eight devices, and where arrays live on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from boot_jax import sharding
from boot_jax.config import default_config
from boot_jax.sharding import MeshError, create_mesh
from boot_jax.training.run import state_template


@pytest.mark.parametrize(
    "data, fsdp, shape",
    [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, 8, (1, 8)), (4, 2, (4, 2))],
)
def test_a_mesh_takes_all_devices(data, fsdp, shape):
    mesh = create_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == (*shape, 1)
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


@pytest.mark.parametrize(
    "rules, spec",
    [
        ([(".*", "replicate")], ()),
        ([("to_q", "tensor:out"), (".*", "fsdp")], (None, "tensor")),
        ([("to_q/kernel$", "tensor:in")], ("tensor", None)),
        ([("^block_3/", "fsdp:1")], (None, "fsdp")),
        ([("to_k", "replicate"), ("attention", "data:-2")], ("data", None)),
        ([("to_k", "tensor:out")], ()),  # none is found
        ([("to_q", "replicate"), ("to_q", "fsdp")], ()),  # the first counts
        ([], ()),
    ],
)
def test_rules_say_where_a_parameter_lives(rules, spec):
    mesh = create_mesh(2, 2, 2)
    tree = {"block_3": {"attention": {"to_q": {"kernel": np.zeros((32, 64))}}}}
    (where,) = jax.tree.leaves(sharding.parameter_shardings(tree, mesh, rules, 1))
    assert where.spec == PartitionSpec(*spec)


@pytest.mark.parametrize(
    "rule, words",
    [
        (("kernel", "tensor:2"), "kernel has shape (6, 9) and no dimension 2"),
        (("kernel", "tensor:out"), "whose dimension out the 2 devices"),
    ],
)
def test_a_rule_that_does_not_divide_is_refused(rule, words):
    tree = {"kernel": np.zeros((6, 9))}
    with pytest.raises(MeshError) as refusal:
        sharding.parameter_shardings(tree, create_mesh(2, 2, 2), [rule])
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "rule, words",
    [
        (("(", "fsdp"), "is not a rule"),
        (("a",), "is not a rule"),
        (("a", "split"), "'split' is not a tactic; choose replicate, fsdp"),
        (("a", "model:0"), "'model:0' is not a tactic"),
        (("a", "tensor:inner"), "'tensor:inner' is not a tactic"),
    ],
)
def test_a_rule_that_is_none_is_refused(rule, words):
    with pytest.raises(MeshError) as refusal:
        sharding.check_rules([(".*", "fsdp"), rule])
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tensor_axis_splits_no_batch():
    mesh = create_mesh(-1, 2, 2)
    assert mesh.devices.shape == (2, 2, 2) and sharding.batch_shards(mesh) == 4
    sharding.check_batch_size("distill.batch_size", 12, mesh)
    with pytest.raises(MeshError, match="in 2 microbatches; take 8 or 16"):
        sharding.check_batch_size("distill.batch_size", 12, mesh, microbatches=2)


def test_average_and_moments_live_where_their_parameters_do():
    """By the parameter they belong to, not by their own shape."""
    config = default_config()
    config.mesh.rules = (("to_q", "tensor:out"), ("other", "fsdp:in"))
    config.mesh.fsdp_min_size = 1
    mesh = create_mesh(2, 2, 2)

    def init(key):
        return {"to_q": jnp.zeros((8, 8)), "other": jnp.zeros((8, 8))}

    template = state_template(init, config.distill, mesh, config.mesh)
    wanted = {
        "to_q": PartitionSpec(None, "tensor"),
        "other": PartitionSpec("fsdp", None),
    }
    found: dict[str, list[PartitionSpec]] = {"to_q": [], "other": []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = sharding.path_name(path).split("/")[-1]
        if name in found:
            found[name].append(leaf.sharding.spec)
        else:
            assert leaf.sharding.is_fully_replicated
    # The parameter, its average, and both moments of Adam.
    assert found == {name: [spec] * 4 for name, spec in wanted.items()}


def test_a_key_is_placed_on_every_device():
    mesh = create_mesh()
    key = jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), 7)
    placed = sharding.place_key(key, mesh)
    assert placed == key and len(placed.sharding.device_set) == 8


def test_split_arrays_come_to_the_host():
    mesh = create_mesh(2, 4)
    tree = {"a": np.arange(16.0, dtype=np.float32).reshape(8, 2), "b": np.float32(3)}
    where = {"a": sharding.batch_sharding(mesh), "b": sharding.replicated(mesh)}
    host = sharding.to_host(sharding.place(tree, where))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    jax.tree.map(np.testing.assert_array_equal, host, tree)
