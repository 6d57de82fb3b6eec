"""The examples, the benchmark and the launcher run as their users run them."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

import boot_jax

ROOT = pathlib.Path(__file__).parents[1]
# The others are run where what they need is: test_export_artifact, test_tiny_sd.
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if path.stem not in ("run_artifact", "write_tiny_sd")
)
USAGE = "usage: launch/gpu.sh [--dry-run] CONFIG"


def run_python(*arguments: str) -> str:
    """What a program prints, on one device and under JAX's own settings."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_distils(path):
    command = f"python examples/{path.name}"
    assert path.read_text().splitlines()[2] == command
    said = run_python(f"examples/{path.name}")
    before, after = map(float, re.findall(r"error \w+: ([\d.]+)", said))
    # In units of the variance of where the teacher's ODE leads.
    assert after < 0.03
    assert after < before / 5


def test_the_loss_alone_needs_no_network_library():
    program = (
        "import runpy, sys\n"
        "sys.modules['flax'] = None\n"
        "import boot_jax\n"
        "boot_jax.Objective, boot_jax.boot_loss, boot_jax.get_schedule\n"
        "foreign = {'orbax', 'optax', 'absl', 'ml_collections'} & set(sys.modules)\n"
        "print(sorted(foreign))\n"
    )
    assert run_python("-c", program).strip() == "[]"


def test_the_public_names_are_there():
    assert len(set(boot_jax.__all__)) == len(boot_jax.__all__)
    for name in boot_jax.__all__:
        assert getattr(boot_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'create_studet'"):
        _ = boot_jax.create_studet  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_benchmark_prints_its_ratios(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step_time = importlib.import_module("step_time")
    assert len(step_time.OBJECTIVES) == 8
    small = {"patch_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    monkeypatch.setitem(step_time.NETWORKS, "dit", small)
    step_time.main("dit", 4, rounds=1, many=2, only=["corrected, rank"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("dit, batch 4, ")
    names = [row[:24].strip() for row in rows]
    assert names == ["teacher training", "corrected, rank 8"]
    ratios = [[float(figure) for figure in row[24:].split()] for row in rows]
    assert ratios[0][0] == 1
    assert all(figure > 0 for row in ratios for figure in row)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dry-run", "configs/digits.py", "--workdir=runs/x", "--config.seed=3"),
        ("configs/digits.py", "--workdir=runs/x", "--config.seed=3", "--dry-run"),
    ],
)
def test_the_launcher_shows_its_command(arguments):
    done = launch(*arguments)
    assert done.returncode == 0
    assert done.stdout.split() == [
        *("python", "-m", "boot_jax.main", "--config=configs/digits.py"),
        *("--workdir=runs/x", "--config.seed=3"),
    ]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((), "which config?"),
        (("--dry-run",), "which config?"),
        (("configs/none.py",), "no config configs/none.py"),
        (("launch/gpu.sh",), "no config launch/gpu.sh"),
        (("configs/digits.py", "configs/cifar10.py"), "configs/cifar10.py is one"),
        (("configs/digits.py", "--workdir", "runs/x"), "--workdir has no value"),
        (("--config=configs/digits.py",), "give the config as it is"),
    ],
)
def test_the_launcher_refuses_with_its_usage(arguments, reason):
    done = launch(*arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert reason in done.stderr
    assert USAGE in done.stderr
