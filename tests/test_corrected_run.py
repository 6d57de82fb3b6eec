"""Whole runs with a correction, at a tiny size: what they leave, and how they go on."""

import json
import pathlib
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from command import DIGITS, MIXTURE, command, write_config

from boot_jax.recall import CHECKED, FELL, best_recall
from boot_jax.training import logs
from boot_jax.training.checkpoints import Checkpoints
from boot_jax.training.state import create_state

FLAGS = (
    "--config.objective.correction.strength=0.5",
    "--config.objective.correction.updates=2",
    "--config.run.checkpoint_every=4",
    "--config.run.steps_per_dispatch=2",
    "--config.run.log_every=2",
    "--config.run.recall_every=4",
    "--config.run.recall_images=32",
    "--config.distill.num_steps=12",
)


def saved_state(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read without our code."""
    path = folder / "checkpoints" / str(step) / "state"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(
            path,
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
                checkpointer.metadata(path).item_metadata.tree,
            ),
        )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def events(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """A run of the mixture from beginning to end; gives its flags and its workdir."""
    folder = tmp_path_factory.mktemp("corrected")
    flags = (write_config(folder, MIXTURE), *FLAGS)
    workdir = folder / "through"
    assert command(*flags, "--mode=distill", f"--workdir={workdir}") == 0
    return flags, workdir


def test_a_run_goes_on_as_if_it_had_never_stopped(through, tmp_path, monkeypatch):
    """The auxiliary network and its optimizer, too, bit for bit."""
    (flags, whole), broken = through, tmp_path / "broken"
    write = logs.Logger.write

    def stop(self, step, metrics):
        write(self, step, metrics)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(logs.Logger, "write", stop)
        with pytest.raises(Killed):
            command(*flags, "--mode=distill", f"--workdir={broken}")
    assert command(*flags, "--mode=distill", f"--workdir={broken}") == 0
    ours, theirs = saved_state(broken, 12), saved_state(whole, 12)
    assert ours.keys() == theirs.keys()
    own = [name for name in ours if "auxiliary" in name]
    assert any("opt_state" in name for name in own)
    assert any("params" in name for name in own)
    different = [n for n in ours if ours[n].tobytes() != theirs[n].tobytes()]
    assert not different


def test_a_run_tells_of_its_correction(through):
    _, workdir = through
    rows = logs.read_metrics(workdir)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    for row in rows:
        for name in ("residual", "trajectory_residual"):
            assert row[f"correction/{name}"] > 0, name
        assert row["loss/auxiliary"] > 0
    # At the start all samples are one point.
    for name in ("diversity", "variance_ratio"):
        assert rows[0][f"correction/{name}"] < rows[-1][f"correction/{name}"]
    checks = events(workdir, CHECKED)
    assert [check["step"] for check in checks] == [4, 8, 12]
    for check in checks:
        assert 0 <= check["recall"] <= 1 and 0 <= check["precision"] <= 1
        assert check["diversity_ratio"] > 0 and check["variance_ratio"] > 0


def test_the_auxiliary_network_is_no_part_of_what_is_used(through):
    flags, workdir = through
    where = f"--workdir={workdir}"
    assert command(*flags, "--mode=sample", "--num=3", where) == 0
    points = np.load(workdir / "samples" / "seed_0" / "samples.npy")
    assert points.shape == (3, 1, 1, 2) and np.isfinite(points).all()


def test_a_fall_of_recall_is_warned_of(through, tmp_path, monkeypatch, capsys):
    flags, _ = through
    found = iter([0.8, 0.75, 0.5])

    class Scores:
        precision = 1.0

        def __init__(self) -> None:
            self.recall = next(found)

    monkeypatch.setattr(
        sys.modules["boot_jax.recall"], "precision_recall", lambda *_: Scores()
    )
    workdir = tmp_path / "run"
    assert command(*flags, "--mode=distill", f"--workdir={workdir}") == 0
    (fell,) = events(workdir, FELL)
    assert (fell["step"], fell["recall"], fell["best"]) == (12, 0.5, 0.8)
    said = capsys.readouterr().err
    assert said.count("warning: step 12: the student's recall") == 1
    assert "fell to 0.50, from 0.80 at best" in said
    assert best_recall(workdir, 12) == 0.8 and best_recall(workdir, 4) is None
    assert best_recall(tmp_path, 12) is None


@pytest.mark.parametrize(
    "flag, words",
    [
        ("objective.correction.share=0.9", "correction.share is 0.9"),
        ("objective.correction.share=0.3", "must be a multiple of 3"),
        ("objective.correction.lora_rank=4", "no weights that low-rank adapters"),
        ("distill.microbatches=4", "must be a multiple of 4, and more than that"),
        ("run.recall_images=3", "run.recall_images is 3, but must be at least 4"),
    ],
)
def test_what_does_not_go_together_is_refused(through, tmp_path, capsys, flag, words):
    flags, _ = through
    code = command(
        *flags, "--mode=distill", f"--config.{flag}", f"--workdir={tmp_path / 'run'}"
    )
    said = capsys.readouterr().err
    assert code == 2 and words in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (
            "--config.data.labels=True",
            "--config.teacher.guidance_scale=2.0",
            "--config.objective.correction.guidance_interval=(0.2, 0.8)",
            "--config.objective.correction.lora_rank=4",
        ),
        (
            "--config.data.labels=True",
            "--config.teacher.guidance_range=(1.0, 3.0)",
            "--config.sample.guidance_scale=2.0",
            "--config.network.dtype=bfloat16",
        ),
        (
            "--config.objective.kind=boot",
            "--config.objective.boundary_weight=1.0",
            "--config.objective.correction.time_distribution=logit_normal",
            "--config.distill.microbatches=2",
        ),
    ],
    ids=["guided, low-rank", "range, bfloat16", "boot, microbatches"],
)
def test_digits(tmp_path, flags):
    """From teacher to report, with labels, guidance or none."""
    workdir = tmp_path / "run"
    code = command(
        write_config(tmp_path, DIGITS),
        f"--workdir={workdir}",
        *FLAGS,
        "--config.teacher.training.num_steps=12",
        "--config.evaluation.ddim_steps=(1,)",
        *flags,
    )
    assert code == 0 and (workdir / "report.html").exists()
    rows = logs.read_metrics(workdir)
    assert all(np.isfinite(row["loss/correction"]) for row in rows)


def test_a_checkpoint_of_before_there_were_corrections_is_read(tmp_path):
    class OldState(flax.struct.PyTreeNode):
        step: Any
        params: Any
        ema_params: Any
        opt_state: Any
        skipped: Any

    now = create_state({"a": jnp.arange(3.0)}, optax.adam(1e-3))
    old = OldState(**{name: getattr(now, name) for name in OldState.__annotations__})
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"identity": {}})
    checkpoints.finish(old)  # type: ignore[arg-type]
    restored = checkpoints.restore(now)
    checkpoints.close()
    assert restored.auxiliary is None
    assert jax.tree.structure(restored) == jax.tree.structure(now)
    np.testing.assert_array_equal(restored.params["a"], np.arange(3.0))
