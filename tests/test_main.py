"""The command as users call it: what they can mend is one line, and exit code 2."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import DIGITS, MIXTURE, command, write_config

from boot_jax.teachers import checkpoint as teacher_checkpoint
from boot_jax.training.checkpoints import Checkpoints
from boot_jax.training.state import create_state


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(tmp_path, capsys):
    """Calls the command and expects a refusal: one line, and nothing written over."""

    def call(*arguments, text=DIGITS, workdir=None):
        config = write_config(tmp_path, text)
        workdir = workdir or tmp_path / "run"
        before = contents(tmp_path)
        capsys.readouterr()
        assert command(config, f"--workdir={workdir}", *arguments) == 2
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: ") and "Traceback" not in said.err
        assert said.out == ""
        after = contents(tmp_path)
        after.pop("run/config.json", None)
        before.pop("run/config.json", None)
        assert after == before
        return lines[0]

    return call


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.distill.num_step=3", "num_step; num_steps"),
        ("--config.distil.num_steps=3", "distil; distill"),
        ("--config.seed=abc", "config.seed; abc"),
        ("--config.distill.learning_rate=fast", "config.distill.learning_rate; fast"),
        ("--config.data.labels=maybe", "config.data.labels; maybe"),
        ("--mode=train", "mode=train; teacher; distill; sample; evaluate"),
        ("--num=many", "num=many"),
        ("--worckdir=x", "worckdir"),
        ("evaluate", "'evaluate' is not a flag"),
        ("--config.objective.t_min=1.0", "t_min is 1.0; t_min < t_max"),
        ("--config.network.name=unett", "network.name; did you mean 'unet'"),
        ("--config.evaluation.features=inception", "evaluation.features; pixels"),
        ("--config.distill.num_steps=0", "distill.num_steps is 0; positive"),
        ("--num=0", "sample.num is 0; positive"),
        ("--config.mesh.fsdp=3", "mesh.fsdp=3; divisor of 8"),
        ("--config.data.name=digit", "digit; 'digits'"),
        (
            "--config.teacher.training.batch_size=100",
            "teacher.training.batch_size is 100; 96 or 104",
        ),
        ("--config.network.dit.patch_size=3", "patch_size 3; 8x8"),
    ],
)
def test_bad_input_is_one_line(refused, argument, words):
    message = refused(argument)
    for word in words.split("; "):
        assert word in message


def test_a_mended_config_goes_on_in_the_same_workdir(refused, tmp_path):
    """What was refused has left nothing behind that the right config would not fit."""
    refused("--config.data.name=digit")
    assert "96 or 104" in refused("--config.teacher.training.batch_size=100")


def test_the_students_batch_is_refused_too(refused):
    message = refused("--config.distill.batch_size=12", text=MIXTURE)
    assert "distill.batch_size is 12" in message and "take 8 or 16" in message


def test_a_missing_wandb_is_refused(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused("--config.run.wandb_project=mine", text=MIXTURE)
    assert "wandb is not installed" in message and "boot_jax[wandb]" in message


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_a_missing_student_is_refused_before_a_teacher_is_trained(
    refused, tmp_path, mode
):
    message = refused(f"--mode={mode}")
    assert "there is no student" in message and "--mode=distill" in message
    assert str(tmp_path / "run") in message


def test_no_config_is_refused(capsys):
    assert command() == 2
    assert "--config=configs/digits.py" in capsys.readouterr().err


@pytest.mark.parametrize("argument", [(), ("--config.seed=3",)])
def test_a_missing_config_file_is_refused(tmp_path, capsys, argument):
    path = tmp_path / "missing.py"
    assert command(f"--config={path}", *argument) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and str(path) in message


@pytest.mark.parametrize(
    "line, words",
    [
        ("config.distill.num_step = 3", "num_step"),
        ("config.distill.num_steps = 'many'", "num_steps"),
        ("raise ValueError('not today')", "not today"),
        ("open('not-there.txt')", "not-there.txt"),
    ],
)
def test_a_config_file_that_fails_is_one_line(refused, line, words):
    text = DIGITS.replace("    return config\n", f"    {line}\n    return config\n")
    assert words in refused(text=text)


def test_a_place_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("text")
    message = refused(workdir=tmp_path / "file" / "run")
    assert "cannot write to the workdir" in message


def test_a_foreign_folder_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("three years")
    assert "not a workdir of boot_jax" in refused()


def test_a_workdir_of_another_config_is_refused(refused, tmp_path):
    assert "there is no student" in refused("--mode=sample")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    message = refused("--mode=sample", "--config.schedule.name=flow")
    assert "schedule.name: 'cosine' -> 'flow'" in message
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["schedule"]["name"] == "cosine"


# Teachers and students that do not fit.


def save_teacher(folder, **changes) -> str:
    """An untrained teacher of digits, as the tiny config says unless changed."""
    options = {
        "network": "dit",
        "network_options": {
            "patch_size": 4,
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 2,
        },
        "schedule": "cosine",
        "schedule_options": {"shift": 1.0},
        "prediction_type": "v_prediction",
        "sample_shape": (8, 8, 1),
        "num_classes": None,
    }
    description = teacher_checkpoint.describe(**(options | changes))
    shapes = teacher_checkpoint.from_description(description).params
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    teacher_checkpoint.save_teacher(folder, description, params)
    return f"--config.teacher.path={folder}"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sample_shape": (16, 16, 1)}, "(16, 16, 1); (8, 8, 1)"),
        (
            {"schedule": "flow"},
            "schedule FlowSchedule; CosineSchedule; config.schedule",
        ),
        (
            {"prediction_type": "sample"},
            "teacher.prediction_type sample; v_prediction",
        ),
    ],
)
def test_a_teacher_that_is_not_what_the_config_says_is_refused(
    refused, tmp_path, changes, words
):
    path = save_teacher(tmp_path / "teacher", **changes)
    message = refused("--config.teacher.source=checkpoint", path)
    for word in words.split("; "):
        assert word in message


def test_a_teacher_that_takes_no_labels_is_not_guided(refused, tmp_path):
    path = save_teacher(tmp_path / "teacher")
    for guidance in ("guidance_scale=3.0", "guidance_range=(1.0, 3.0)"):
        message = refused(
            "--config.teacher.source=checkpoint", path, f"--config.teacher.{guidance}"
        )
        assert "guidance needs a class-conditional teacher" in message


def test_a_missing_teacher_is_refused(refused, tmp_path):
    path = f"--config.teacher.path={tmp_path / 'nowhere'}"
    message = refused("--config.teacher.source=checkpoint", path)
    assert "there is no teacher in" in message and "model.json" in message


def test_a_student_of_another_teacher_is_refused(refused, tmp_path):
    path = save_teacher(tmp_path / "teacher")
    theirs = {
        "identity": {
            "teacher": "0123456789abcdef",
            "schedule": "CosineSchedule(shift=1.0)",
            "prediction type": "v_prediction",
        }
    }
    workdir = tmp_path / "run"
    source = ("--config.teacher.source=checkpoint", path)
    assert "there is no student" in refused("--mode=sample", *source)
    checkpoints = Checkpoints(workdir / "checkpoints", theirs)
    checkpoints.save(create_state({"a": jnp.zeros(3)}, optax.sgd(1.0)))
    checkpoints.close()
    for mode in ("sample", "distill", "all", "evaluate"):
        message = refused(f"--mode={mode}", *source)
        assert "made with another teacher (0123456789abcdef, now " in message
        assert "--config.run.force=True" in message


# As a process of its own.


def process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "boot_jax.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_exit_code_is_seen_outside(tmp_path):
    done = process(write_config(tmp_path, DIGITS), "--config.distill.num_step=3")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "'num_steps'" in done.stderr


def test_help_names_every_flag():
    done = process("--help")
    for flag in ("--config", "--workdir", "--mode", "--num", "--seed"):
        assert flag in done.stdout
    assert "Traceback" not in done.stderr
