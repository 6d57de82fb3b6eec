"""What is restored is what was saved, bit for bit, or it is refused."""

import json
import os
import pathlib
import shutil
import subprocess
import time

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
        skipped=jnp.asarray(0, jnp.int32),
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
    split = sharding.place(state, sharding.parameter_shardings(state, mesh, min_size=1))
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


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def biggest_file(folder: pathlib.Path) -> pathlib.Path:
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(folder: pathlib.Path) -> None:
    path = biggest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_zeros(folder: pathlib.Path) -> None:
    path = biggest_file(folder)
    path.write_bytes(bytes(path.stat().st_size))


def remove_a_file(folder: pathlib.Path) -> None:
    biggest_file(folder).unlink()


def flip_bits(folder: pathlib.Path) -> None:
    path = biggest_file(folder)
    data = bytearray(path.read_bytes())
    for index in range(len(data) // 3, len(data), 97):
        data[index] ^= 0x10
    path.write_bytes(bytes(data))


def garble_metadata(folder: pathlib.Path) -> None:
    (folder / "metadata" / "metadata").write_text('{"identity": [')


def remove_metadata(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "metadata")


def remove_the_state(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "state")


def change_a_checksum(folder: pathlib.Path) -> None:
    path = folder / "metadata" / "metadata"
    saved = json.loads(path.read_text())
    saved["state"]["ema_params/kernel"]["checksum"] ^= 1
    path.write_text(json.dumps(saved))


DAMAGES = [
    truncate,
    fill_with_zeros,
    remove_a_file,
    flip_bits,
    garble_metadata,
    remove_metadata,
    remove_the_state,
    change_a_checksum,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_set_aside(tmp_path, damage, capsys):
    saved(tmp_path, 3, 7)
    whole = contents(tmp_path / "3")
    damage(tmp_path / "7")
    broken, events = contents(tmp_path / "7"), []
    checkpoints = Checkpoints(
        tmp_path,
        METADATA,
        record=lambda event, **fields: events.append((event, fields)),
    )
    assert_same(checkpoints.restore(state_at(0)), state_at(3))
    said = capsys.readouterr().err
    assert "warning: the checkpoint of step 7 is broken (" in said
    assert str(tmp_path / "broken" / "7") in said
    (event,) = events
    assert event[0] == "broken_checkpoint" and event[1]["step"] == 7
    # Kept as it was; and the good one is untouched.
    assert contents(tmp_path / "broken" / "7") == broken
    assert contents(tmp_path / "3") == whole
    # The run goes on from there, and may reach the same step again.
    assert checkpoints.latest_step() == 3
    checkpoints.save(state_at(7))
    checkpoints.wait()
    assert_same(checkpoints.restore(state_at(0)), state_at(7))
    checkpoints.close()
    damage(tmp_path / "7")
    checkpoints = Checkpoints(tmp_path, METADATA)
    assert_same(checkpoints.restore(state_at(0)), state_at(3))
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "broken")) == ["7", "7-2"]


def test_with_none_sound_nothing_begins_afresh(tmp_path):
    saved(tmp_path, 3, 7)
    for step in (3, 7):
        truncate(tmp_path / str(step))
    message = refusal_of(tmp_path)
    assert "none of the 2 checkpoints" in message and "--workdir" in message
    assert sorted(os.listdir(tmp_path / "broken")) == ["3", "7"]
    checkpoints = Checkpoints(tmp_path, METADATA)
    assert checkpoints.latest_step() is None and checkpoints.lost()
    checkpoints.close()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    saved(tmp_path, 3)
    state = state_at(4)
    state.ema_params["kernel"] = state.ema_params["kernel"].at[1, 1].set(jnp.nan)
    checkpoints = Checkpoints(tmp_path, METADATA)
    with pytest.raises(FloatingPointError, match=r"^step 4: ema_params/kernel would"):
        checkpoints.save(state)
    checkpoints.close()
    assert Checkpoints(tmp_path, METADATA).latest_step() == 3


def test_some_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, METADATA, keep=1, keep_every=4)
    for step in range(11):
        checkpoints.save(state_at(step))
    checkpoints.close()
    assert sorted(int(name) for name in os.listdir(tmp_path)) == [4, 8, 10]


def test_what_a_kill_left_is_cleared_away(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    Checkpoints(tmp_path, METADATA).close()
    wait_for_files(tmp_path, ["3"])


def wait_for_files(folder: pathlib.Path, names: list[str]) -> None:
    """Orbax clears away what was left in a thread of its own, which none waits for."""
    deadline = time.monotonic() + 30
    while os.listdir(folder) != names:
        assert time.monotonic() < deadline, os.listdir(folder)
        time.sleep(0.02)


class Disk:
    """A file system of its own, small and not always there; for root alone."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def mount(self, *options: str) -> None:
        self.folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", str(self.folder)],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("no file system can be mounted here")

    def remount(self, option: str) -> None:
        command = ["mount", "-o", f"remount,{option}", str(self.folder)]
        subprocess.run(command, check=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    disk.mount("-o", "size=40m")
    yield disk
    subprocess.run(["umount", "-l", str(disk.folder)], check=True)


def large_state(step: int) -> TrainState:
    """8 MB, for a disk to be full of."""

    def noise(seed: int) -> jax.Array:
        values = np.random.default_rng(seed).normal(size=10**6)
        return jnp.asarray(values, jnp.float32)

    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"kernel": noise(2 * step)},
        ema_params={"kernel": noise(2 * step + 1)},
        opt_state=(),
        skipped=jnp.asarray(0, jnp.int32),
    )


def test_a_full_disk_is_one_line_and_costs_nothing(disk, capsys):
    events = []
    checkpoints = Checkpoints(
        disk.folder / "checkpoints",
        METADATA,
        keep=1,
        record=lambda event, **fields: events.append((event, fields)),
    )
    checkpoints.save(large_state(1))
    checkpoints.wait()
    filler = disk.folder / "filler"
    filler.write_bytes(bytes(26 * 2**20))
    with pytest.raises(CheckpointError) as refusal:
        checkpoints.finish(large_state(2))
    message = str(refusal.value)
    assert "\n" not in message and str(disk.folder / "checkpoints") in message
    assert "the checkpoint of step 1 is left as it was" in message
    assert "o space left" in message, message
    assert [fields["tries"] for _, fields in events] == [1, 2, 3]
    checkpoints.close()
    wait_for_files(disk.folder / "checkpoints", ["1"])
    # With room again, it goes on.
    filler.unlink()
    checkpoints = Checkpoints(disk.folder / "checkpoints", METADATA, keep=1)
    assert_same(checkpoints.restore(large_state(0)), large_state(1))
    checkpoints.finish(large_state(2))
    checkpoints.close()
    assert os.listdir(disk.folder / "checkpoints") == ["2"]


def test_a_save_that_failed_is_noticed_and_made_again(disk, capsys):
    """At the next step, by which time there may be room."""
    checkpoints = Checkpoints(disk.folder / "checkpoints", METADATA, keep=1)
    checkpoints.finish(large_state(1))
    filler = disk.folder / "filler"
    filler.write_bytes(bytes(26 * 2**20))
    checkpoints.save(large_state(2))
    deadline = time.monotonic() + 30
    while not checkpoints.must_retry():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "try 1 of 3" in capsys.readouterr().err
    filler.unlink()
    checkpoints.save(large_state(3))
    checkpoints.wait()
    assert not checkpoints.must_retry()
    assert_same(checkpoints.restore(large_state(0)), large_state(3))
    checkpoints.close()


def test_a_read_only_disk_is_one_line(disk):
    checkpoints = Checkpoints(disk.folder / "checkpoints", METADATA)
    checkpoints.finish(large_state(1))
    disk.remount("ro")
    with pytest.raises(CheckpointError) as refusal:
        checkpoints.finish(large_state(2))
    checkpoints.close()
    message = str(refusal.value)
    assert "\n" not in message and "ead-only file system" in message, message
    assert "the checkpoint of step 1 is left as it was" in message
    with pytest.raises(CheckpointError, match="ead-only file system"):
        Checkpoints(disk.folder / "others", METADATA)
    disk.remount("rw")
    checkpoints = Checkpoints(disk.folder / "checkpoints", METADATA)
    assert_same(checkpoints.restore(large_state(0)), large_state(1))
    checkpoints.close()


def test_a_directory_that_has_gone_is_one_line(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, METADATA)
    checkpoints.finish(state_at(1))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"checkpoints has gone.*the same command"
    ):
        checkpoints.save(state_at(2))
    checkpoints.close()
    assert not folder.exists() and os.listdir(tmp_path / "elsewhere") == ["1"]
