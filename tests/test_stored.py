"""Stored samples: what they are, whose they are, and how a set is finished."""

import json
import pathlib

import jax
import numpy as np
import pytest

from boot_jax import stored
from boot_jax.config import default_config
from boot_jax.objectives.calls import sampling_calls
from boot_jax.run import Run
from boot_jax.sampling import image_noise, many_steps, stored_noise
from boot_jax.sharding import create_mesh
from boot_jax.student_batches import batch_shapes, batches_of
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.workdir import WorkdirError

NUM, BATCH = 21, 8
MEANS = ((1.0, 0.0), (-1.0, 0.5))


def run_of(folder: pathlib.Path, **fields) -> Run:
    folder.mkdir(exist_ok=True)
    config = default_config()
    config.data.name = ""
    config.teacher.source = "mixture"
    config.teacher.mixture.means = MEANS
    config.teacher.mixture.scales = (0.3, 0.2)
    config.network.dit.update(patch_size=1, hidden_size=8, num_layers=1, num_heads=1)
    config.objective.update(kind="direct", stored_samples=NUM, teacher_steps=3)
    config.distill.batch_size = BATCH
    config.update_from_flattened_dict(
        {path.replace("__", "."): value for path, value in fields.items()}
    )
    return Run(config, folder, create_mesh())


def labelled(run: Run) -> Run:
    """The same run of a class-conditional teacher."""
    means = np.asarray(MEANS, np.float32).reshape(2, 1, 1, 2)
    teacher = gaussian_mixture(means, [0.3, 0.2], run.schedule, labels=(0, 1))
    run.__dict__["teacher"] = teacher
    return run


def test_a_set_is_the_teachers_samples_of_noises_made_again(tmp_path):
    run = run_of(tmp_path)
    samples = stored.open_stored(run)
    assert len(samples) == NUM and set(samples.arrays) == {"target"}
    indices = np.array([0, 5, 9, 20, 3])
    taken = samples.take(indices)
    eps = stored_noise(0, taken["index"], (1, 1, 2))
    teacher = run.teacher
    sampler = many_steps(run.denoise, teacher.params, run.schedule, 3, solver="heun")
    np.testing.assert_allclose(
        taken["target"], sampler(eps, None), rtol=1e-5, atol=1e-6
    )
    # None of these noises is that of an image which is looked at later.
    alone = np.asarray(image_noise(0, np.arange(NUM), (1, 1, 2))).ravel()
    assert not np.isin(np.asarray(eps).ravel(), alone).any()
    meta = json.loads((tmp_path / "stored_samples" / "meta.json").read_text())
    assert meta["done"] == NUM and meta["seconds"] > 0
    assert sampling_calls(run.objective) == 5


def test_a_set_is_made_once(tmp_path, monkeypatch):
    first = stored.open_stored(run_of(tmp_path))
    monkeypatch.setattr(stored, "_make", None)
    again = stored.open_stored(run_of(tmp_path))
    np.testing.assert_array_equal(first.arrays["target"], again.arrays["target"])


def test_an_interrupted_set_is_finished_to_the_bit(tmp_path, monkeypatch):
    whole = stored.open_stored(labelled(run_of(tmp_path / "whole")))
    write = stored._write

    def stop(folder, rows, start, num, meta):
        if start == BATCH:
            # It dies with rows on the disk that nothing speaks of.
            write(folder, rows, start, num, meta | {"done": BATCH})
            raise KeyboardInterrupt
        write(folder, rows, start, num, meta)

    with monkeypatch.context() as patch:
        patch.setattr(stored, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            stored.open_stored(labelled(run_of(tmp_path / "broken")))
    finished = stored.open_stored(labelled(run_of(tmp_path / "broken")))
    assert set(finished.arrays) == set(whole.arrays) == {"target", "label"}
    for name, leaf in whole.arrays.items():
        np.testing.assert_array_equal(leaf, finished.arrays[name])


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"seed": 1}, "seed (0, now 1)"),
        ({"objective__teacher_steps": 4}, "teacher_steps (3, now 4)"),
        ({"objective__solver": "ddim"}, "solver (heun, now ddim)"),
        ({"objective__stored_samples": 30}, "stored_samples (21, now 30)"),
        ({"teacher__mixture__scales": (0.3, 0.25)}, "teacher ("),
        ({"teacher__guidance_rescale": 0.5}, "guidance ("),
        ({"distill__batch_size": 16}, "batch_size (8, now 16)"),
    ],
)
def test_another_set_is_refused_in_one_line(tmp_path, fields, named):
    stored.open_stored(run_of(tmp_path))
    with pytest.raises(WorkdirError) as refusal:
        stored.open_stored(run_of(tmp_path, **fields))
    message = str(refusal.value)
    assert f"made with another {named}" in message and "\n" not in message
    assert "another --workdir" in message


@pytest.mark.parametrize("name", ["meta.json", "target.npy"])
def test_a_damaged_set_is_refused(tmp_path, name):
    stored.open_stored(run_of(tmp_path))
    (tmp_path / "stored_samples" / name).write_text("{")
    with pytest.raises(WorkdirError, match=r"is damaged.*delete.* makes it anew"):
        stored.open_stored(run_of(tmp_path))


def test_batches_are_a_function_of_the_step(tmp_path):
    run = labelled(run_of(tmp_path))
    make = batches_of(run)
    assert make is not None
    three, one = make(0, 3), make(2, 1)
    together, alone = next(three), next(one)
    shapes = {name: leaf.shape for name, leaf in together.items()}
    expected = jax.tree.map(lambda leaf: (3, *leaf.shape), batch_shapes(run))
    assert shapes == expected
    for name, leaf in together.items():
        np.testing.assert_array_equal(leaf[2], alone[name][0])
        assert leaf.dtype == batch_shapes(run)[name].dtype
    samples = stored.open_stored(run)
    indices = np.asarray(together["index"])
    for name in ("target", "label"):
        np.testing.assert_array_equal(together[name], samples.arrays[name][indices])
    # In an epoch each comes once.
    assert len(set(indices.ravel()[:NUM])) == NUM
    assert set(np.asarray(samples.arrays["label"])) == {0, 1}
    # A sample is of its label's component.
    side = np.sign(np.asarray(samples.arrays["target"])[:, 0, 0, 0])
    np.testing.assert_array_equal(side, 1 - 2 * samples.arrays["label"])
