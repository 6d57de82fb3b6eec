"""The examples and the launcher run as their users run them."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_distils(name):
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, f"examples/{name}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    before, after = map(float, re.findall(r"error \w+: ([\d.]+)", done.stdout))
    assert before > 0.5
    assert after < 0.03


def _launch(*arguments):
    return subprocess.run(
        ["bash", "launch/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_launcher_shows_its_command():
    done = _launch("--dry-run", "configs/digits.py", "--workdir=runs/x")
    assert done.returncode == 0
    assert "-m boot_jax.main --config=configs/digits.py --workdir=runs/x" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("configs/none.py",), ("--dry-run",)])
def test_launcher_refuses_with_its_usage(arguments):
    done = _launch(*arguments)
    assert done.returncode == 2
    assert "usage" in done.stderr
