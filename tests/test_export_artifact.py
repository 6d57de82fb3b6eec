"""The artefact runs where boot_jax cannot be imported, and gives our sampler's bits."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from finished_students import finished_student

from boot_jax.export.artifact import serialize
from boot_jax.sampling import one_step
from boot_jax.schedules import get_schedule

ROOT = pathlib.Path(__file__).parents[1]
WITHOUT_US = """
import runpy, sys
for name in ("boot_jax", "flax", "optax", "orbax", "ml_collections"):
    sys.modules[name] = None  # an import of it is an error
program, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


def sampled(finished, noise, condition=None):
    """What our sampler gives."""
    sampler = one_step(finished.student.signal, finished.params, finished.objective)
    return np.asarray(sampler(noise, condition))


def deserialized(finished):
    artifact = jax.export.deserialize(bytearray(serialize(finished)))
    assert set(artifact.platforms) == {"cpu", "cuda", "tpu"}
    return artifact


def noise_of(finished, num):
    shape = (num, *finished.sample_shape)
    return np.random.default_rng(3).standard_normal(shape, np.float32)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_program_without_boot_jax_gives_the_same_bits(tmp_path, network):
    finished = finished_student(network)
    noise = noise_of(finished, 5)
    np.save(tmp_path / "noise.npy", noise)
    (tmp_path / "student").write_bytes(serialize(finished))
    files = [tmp_path / name for name in ("student", "images.npy", "noise.npy")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, ROOT / "examples/run_artifact.py", *files],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 images of shape (8, 8, 1) in one step")
    images = np.load(tmp_path / "images.npy")
    assert images.tobytes() == sampled(finished, noise).tobytes()
    assert images.std() > 0.1


def test_any_batch_and_labels():
    finished = finished_student("dit", num_classes=3, guidance_scale=2.0)
    artifact = deserialized(finished)
    for num in (1, 6):
        noise, label = noise_of(finished, num), np.arange(num, dtype=np.int32) % 3
        scale = np.full(num, 2.0, np.float32)
        expected = sampled(finished, noise, {"label": label, "guidance_scale": scale})
        images = np.asarray(artifact.call(noise, label))
        assert images.tobytes() == expected.tobytes()
        other = np.asarray(artifact.call(noise, (label + 1) % 3))
        assert np.abs(other - images).max() > 0.01


def test_bfloat16_and_a_variance_exploding_teacher_go_out_too():
    finished = finished_student("dit", schedule=get_schedule("edm"), dtype="bfloat16")
    noise = noise_of(finished, 2)
    images = np.asarray(deserialized(finished).call(noise))
    assert images.dtype == np.float32
    assert images.tobytes() == sampled(finished, noise).tobytes()
