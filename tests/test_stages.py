"""Stages: who teaches whom, in how many steps, and where they are kept."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boot_jax import stages
from boot_jax.config import default_config
from boot_jax.run import Run
from boot_jax.sharding import create_mesh
from boot_jax.stages import stage_lengths


@dataclasses.dataclass
class Trained:
    ema_params: Any


def run_of(folder: pathlib.Path, kind: str = "progressive") -> Run:
    config = default_config()
    config.data.name = ""
    config.teacher.source = "mixture"
    config.teacher.mixture.means = ((1.0, 0.0), (-1.0, 0.5))
    config.teacher.mixture.scales = (0.3, 0.2)
    config.network.dit.update(patch_size=1, hidden_size=8, num_layers=1, num_heads=1)
    config.objective.kind = kind
    config.objective.teacher_steps = 8
    config.distill.num_steps = 10
    return Run(config, folder, create_mesh())


def watched(run: Run) -> list[stages.Stage]:
    """The stages that a run takes, none of them trained."""
    seen = []

    def train_stage(stage):
        seen.append(stage)
        return Trained({})

    stages.run_stages(run, train_stage)
    return seen


@pytest.mark.parametrize("num_steps, count", [(5000, 4), (11, 3), (7, 7), (9, 1)])
def test_stages_share_the_steps(num_steps, count):
    lengths = stage_lengths(num_steps, count)
    assert len(lengths) == count and sum(lengths) == num_steps
    assert len(set(lengths[:-1])) <= 1
    assert lengths[0] <= lengths[-1] < lengths[0] + count


def test_each_stage_learns_from_the_one_before(tmp_path):
    run, seen = run_of(tmp_path), []

    def train_stage(stage):
        seen.append(stage)
        return Trained({"weights": len(seen)})

    assert stages.run_stages(run, train_stage).ema_params == {"weights": 3}
    assert [stage.objective.teacher_steps for stage in seen] == [8, 4, 2]
    assert [stage.training.num_steps for stage in seen] == [3, 3, 4]
    assert [stage.directory for stage in seen] == [
        tmp_path / "stages" / "01",
        tmp_path / "stages" / "02",
        tmp_path,
    ]
    assert [stage.is_last for stage in seen] == [False, False, True]
    first, second, last = seen
    assert first.denoise is run.denoise and first.frozen is run.frozen
    assert first.init is run.student.init
    assert second.denoise is last.denoise is run.student.denoise
    assert second.frozen == second.init(None) == {"weights": 1}
    assert last.frozen == last.init(None) == {"weights": 2}
    assert first.metadata["identity"]["stage"] == "stage 1 of 3"
    assert last.metadata == run.metadata
    keys = {tuple(np.asarray(jax.random.key_data(stage.key))) for stage in seen}
    assert len(keys) == 3
    # The config itself is as it was.
    assert run.config.distill.num_steps == 10
    json.dumps(last.metadata)


def test_a_run_goes_on_in_the_newest_stage_that_has_begun(tmp_path):
    for begun, expected in ((1, [1, 2, 3]), (2, [1, 2, 3]), (3, [2, 3])):
        folder = tmp_path / str(begun)
        folders = stages.stage_directories(folder, 3)
        for path in folders[:begun]:
            (path / "checkpoints").mkdir(parents=True)
        seen = watched(run_of(folder))
        assert [folders.index(stage.directory) + 1 for stage in seen] == expected
        # Those that another has begun from are read, and not trained further.
        lengths = [stage.training.num_steps for stage in seen]
        full = [3, 3, 4][-len(seen) :]
        assert lengths == [
            0 if number < begun else length
            for number, length in zip(expected, full, strict=True)
        ]


def test_other_kinds_have_one_stage(tmp_path):
    run = run_of(tmp_path, "continuous")
    (stage,) = watched(run)
    assert stage.directory == tmp_path and stage.is_last and stage.name == "student"
    assert stage.objective == run.objective
    assert stage.training.to_dict() == run.config.distill.to_dict()
    assert stage.metadata == run.metadata


def test_a_students_denoiser_is_the_next_teacher(tmp_path):
    """It gives, of its parameters, what the network it is says at each noise level."""
    student = run_of(tmp_path).student
    params = student.init(jax.random.key(0))
    x_t, t = jnp.ones((4, 1, 1, 2)), jnp.linspace(0.2, 1.0, 4)
    estimates = student.denoise(params, x_t, t, None)
    eps = jax.random.normal(jax.random.key(1), (4, 1, 1, 2))
    signals = [student.signal(params, eps, time, None) for time in (t, t / 2)]
    np.testing.assert_array_equal(*signals)
    start = student.denoise(params, eps, jnp.ones(4), None)
    np.testing.assert_allclose(signals[0], start, rtol=1e-6)
    assert np.abs(np.diff(estimates, axis=0)).max() > 1e-3
