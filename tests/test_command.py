"""The command as users call it: a tiny run from end to end, and bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    "--config=configs/digits.py",
    "--config.network.dit.hidden_size=32",
    "--config.network.dit.num_layers=1",
    "--config.teacher.training.num_steps=40",
    "--config.distill.num_steps=40",
    "--config.teacher.training.batch_size=32",
    "--config.distill.batch_size=32",
    "--config.evaluation.num_images=64",
    "--config.evaluation.num_real=64",
    "--config.evaluation.batch_size=64",
    "--config.evaluation.ddim_steps=1,8,50",
    "--config.evaluation.ode_steps=8",
    "--config.evaluation.error_times=4",
    "--config.evaluation.error_images=16",
    "--config.run.checkpoint_every=20",
    "--config.run.log_every=20",
]


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "boot_jax.main", *flags],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = command(*TINY, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert "network" in done.stdout and "report" in done.stdout
    return folder


def test_run_leaves_what_it_promises(workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert results["student"]["frechet_distance"] > 0
    assert results["student"]["normalized_error"] > 0
    for steps in ("1", "8", "50"):
        assert results["teacher"]["ddim"][steps]["frechet_distance"] > 0
        assert results["teacher"]["ddim"][steps]["normalized_error"] >= 0
    assert results["ddim_equivalent_steps"] >= 1
    assert {"teacher", "distill", "evaluate"} <= set(results["seconds"])
    assert "jax" in results["versions"]
    for name in ("config.json", "report.html", "samples/grid.png", "metrics.jsonl"):
        assert (workdir / name).stat().st_size > 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [20, 40]


def test_second_run_trains_nothing_again(workdir):
    before = (workdir / "teacher" / "model.safetensors").stat().st_mtime_ns
    done = command(*TINY, f"--workdir={workdir}", "--mode=distill")
    assert done.returncode == 0, done.stderr
    assert "step/s" not in done.stderr
    assert (workdir / "teacher" / "model.safetensors").stat().st_mtime_ns == before


def test_samples_depend_on_the_seed_alone(workdir):
    def sample(*flags):
        flags = ("--mode=sample", "--num=5", *flags)
        done = command(*TINY, f"--workdir={workdir}", *flags)
        assert done.returncode == 0, done.stderr

    folder = workdir / "samples" / "seed_3"
    sample("--seed=3")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"0000{i}.png" for i in range(5)), "grid.png"]
    first = [(folder / name).read_bytes() for name in names]
    sample("--seed=3", "--config.sample.batch_size=2")
    assert [(folder / name).read_bytes() for name in names] == first
    sample("--seed=3", "--config.sample.interpolate_to=4")
    path = workdir / "samples" / "seed_3_to_4" / "00000.png"
    assert path.read_bytes() == first[0]


BAD = {
    "misspelt": (["--config.objective.detla=1"], "delta"),
    "type": (["--config.distill.num_steps=many"], "num_steps"),
    "times": (["--config.objective.t_min=1.0"], "t_min"),
    "mesh": (["--config.mesh.fsdp=3"], "mesh.fsdp"),
    "features": (["--config.evaluation.features=fid"], "features"),
    "other config": (["--config.objective.delta=0.1"], "belongs to another config"),
    "label": (["--config.teacher.guidance_scale=2.0"], "class-conditional"),
    "mode": (["--mode=dance"], "mode"),
    "unwritable": (["--workdir=/dev/null/runs"], "workdir"),
    "no checkpoint": (["--config.teacher.source=checkpoint"], "teacher.path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(workdir, name):
    flags, expected = BAD[name]
    kept = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = command(*TINY, f"--workdir={workdir}", *flags)
    assert done.returncode == 2, done.stderr
    lines = [x for x in done.stderr.splitlines() if x.strip()]
    assert len([x for x in lines if x.startswith("error:")]) == 1
    assert "Traceback" not in done.stderr
    assert expected in lines[-1]
    assert kept == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_foreign_teacher_is_refused(workdir, tmp_path):
    flags = [f"--workdir={tmp_path / 'new'}", "--config.teacher.source=checkpoint"]
    path = f"--config.teacher.path={workdir / 'teacher'}"
    done = command(*TINY, *flags, path, "--config.schedule.name=flow")
    assert done.returncode == 2
    assert "schedule" in done.stderr
    done = command(*TINY, *flags, f"--config.teacher.path={tmp_path}")
    assert done.returncode == 2
    assert "there is no teacher" in done.stderr
