"""What is restored is what was saved, bit for bit, or it is refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from boot_jax import sharding
from boot_jax.training.checkpoints import CheckpointError, Checkpoints
from boot_jax.training.state import TrainState, create_optimizer, create_state

METADATA = {"identity": {"teacher": "abc", "schedule": "cosine"}, "config": {"a": 1}}
OPTIMIZER = create_optimizer(learning_rate=1e-2, num_steps=10, decay="cosine")


def state_at(step: int, width: int = 5, seed: int = 0) -> TrainState:
    """A whole state with nothing in it that could be made again."""
    shapes = create_state({"kernel": jnp.zeros((3, width))}, OPTIMIZER)
    rng = np.random.default_rng(seed + step)
    filled = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 100, leaf.dtype), shapes
    )
    return filled.replace(step=jnp.asarray(step, jnp.int32))


def assert_same(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def saved(folder: pathlib.Path, *steps: int, metadata=None) -> None:
    checkpoints = Checkpoints(folder, metadata or METADATA, keep=10)
    for step in steps:
        checkpoints.save(state_at(step))
    checkpoints.close()


def refusal_of(folder: pathlib.Path, metadata=None, template=None) -> str:
    checkpoints = Checkpoints(folder, metadata or METADATA)
    with pytest.raises(CheckpointError) as refusal:
        checkpoints.restore(state_at(0) if template is None else template)
    checkpoints.close()
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    return str(refusal.value)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, 7)
    checkpoints = Checkpoints(tmp_path, METADATA)
    assert checkpoints.latest_step() == 7
    restored = checkpoints.restore(state_at(0, seed=9))
    assert_same(restored, state_at(7))
    # Optax's types too: the next update takes it as it took the first.
    with jax.numpy_dtype_promotion("standard"):
        OPTIMIZER.update(restored.params, restored.opt_state, restored.params)
    checkpoints.close()


@pytest.mark.parametrize("size", [4000, 4_000_000])
def test_a_state_may_be_donated_at_once(tmp_path, size):
    """The save goes on in the background, while the step writes over the buffers."""
    state = TrainState(
        step=jnp.asarray(1, jnp.int32),
        params={"kernel": jnp.arange(size, dtype=jnp.float32)},
        ema_params={"kernel": jnp.full((size,), 2.0)},
        opt_state=(),
    )
    spoil = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0
    )
    checkpoints = Checkpoints(tmp_path, METADATA)
    checkpoints.save(state)
    spoiled = spoil(state)
    for _ in range(5):
        spoiled = spoil(spoiled)
    assert spoiled.step == -1
    restored = checkpoints.restore(spoiled)
    checkpoints.close()
    np.testing.assert_array_equal(restored.params["kernel"], np.arange(size))
    np.testing.assert_array_equal(restored.ema_params["kernel"], np.full(size, 2.0))
    assert restored.step == 1


def test_a_state_is_restored_where_the_template_says(tmp_path):
    """From one mesh to another: the numbers stay, the places change."""
    mesh = sharding.create_mesh(1, 8)
    kernel = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    state = create_state({"kernel": jnp.asarray(kernel)}, optax.sgd(1e-2))
    split = sharding.place(state, sharding.parameter_shardings(state, mesh, 1))
    assert split.params["kernel"].sharding.spec == PartitionSpec("fsdp", None)
    checkpoints = Checkpoints(tmp_path, METADATA)
    checkpoints.save(split)
    checkpoints.wait()
    other = sharding.create_mesh(4, 2)
    where = NamedSharding(other, PartitionSpec(None, "fsdp"))
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=where if leaf.ndim == 2 else sharding.replicated(other),
        ),
        state,
    )
    restored = checkpoints.restore(template)
    checkpoints.close()
    assert restored.params["kernel"].sharding.is_equivalent_to(where, 2)
    assert_same(restored, state)


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, METADATA, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(state_at(step))
    checkpoints.wait()
    assert_same(checkpoints.restore(state_at(0)), state_at(4))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_saving_a_step_again_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, METADATA)
    checkpoints.save(state_at(1))
    checkpoints.save(state_at(1, seed=50))
    checkpoints.wait()
    assert_same(checkpoints.restore(state_at(0)), state_at(1))
    checkpoints.close()


def test_none_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, METADATA)
    assert checkpoints.latest_step() is None
    checkpoints.close()
    assert "there is no checkpoint" in refusal_of(tmp_path)


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    """A kill in the middle of a save leaves a folder that never got its name."""
    saved(tmp_path, 3)
    (tmp_path / "4.orbax-checkpoint-tmp-123").mkdir()
    checkpoints = Checkpoints(tmp_path, METADATA)
    assert checkpoints.latest_step() == 3
    assert_same(checkpoints.restore(state_at(0)), state_at(3))
    checkpoints.close()


def test_another_identity_is_refused_with_both(tmp_path):
    saved(tmp_path, 3)
    other = {"identity": {"teacher": "xyz", "schedule": "cosine"}}
    message = refusal_of(tmp_path, other)
    assert "another teacher (abc, now xyz)" in message
    assert "--config.run.force=True" in message and "workdir" in message
    # Nothing was lost by asking.
    checkpoints = Checkpoints(tmp_path, METADATA)
    assert_same(checkpoints.restore(state_at(0)), state_at(3))
    checkpoints.close()


def test_another_identity_can_be_forced(tmp_path):
    saved(tmp_path, 3)
    other = {"identity": {"teacher": "xyz", "schedule": "cosine"}}
    checkpoints = Checkpoints(tmp_path, other, force=True)
    assert_same(checkpoints.restore(state_at(0)), state_at(3))
    checkpoints.close()


def test_what_is_not_identity_may_differ(tmp_path):
    saved(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, METADATA | {"config": {"a": 2}})
    assert_same(checkpoints.restore(state_at(0)), state_at(3))
    checkpoints.close()


@pytest.mark.parametrize("what", ["shape", "missing", "extra"])
def test_a_state_that_does_not_fit_is_refused(tmp_path, what):
    saved(tmp_path, 3)
    template = state_at(0)
    if what == "shape":
        template = state_at(0, width=6)
    elif what == "missing":
        template = template.replace(params={})
    else:
        params = {"kernel": template.params["kernel"], "bias": jnp.zeros(2)}
        template = template.replace(params=params)
    message = refusal_of(tmp_path, template=template)
    assert "the checkpoint of step 3" in message and "does not fit" in message


def test_a_folder_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "weights.bin").write_bytes(b"\0" * 8)
    message = refusal_of(tmp_path)
    assert "does not hold checkpoints of boot_jax" in message
    assert (tmp_path / "5" / "weights.bin").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    saved(tmp_path, 3)
    files = [path for path in (tmp_path / "3" / "state").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"rubbish")
    assert "step 3" in refusal_of(tmp_path)
