"""Runs that are killed, asked to stop, moved and broken: none loses what it had saved.

All are processes of their own, and slow. They share one cache of compiled programs.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command import DIGITS, MIXTURE, write_config
from test_end_to_end import assert_same_state, saved_state, steps_of

from boot_jax.interruption import EXIT_PREEMPTED, EXIT_STUCK
from boot_jax.training.logs import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "local_processes.sh"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of the processes: one device each, and a cache of compiled programs."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "",
        "PYTHONUNBUFFERED": "1",
        "PYTHON": sys.executable,
    }


def start(environment, *flags) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "boot_jax.main", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


def run(environment, *flags) -> str:
    code, out = finish(start(environment, *flags))
    assert code == 0, out
    return out


def whole_steps(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_a_step_after(
    step: int, workdir: pathlib.Path, process: subprocess.Popen[str]
) -> None:
    wait_for(lambda: max(whole_steps(workdir), default=0) > step, process)


# A run without an end in sight, saving nearly all the time.
ENDLESS = (
    "--mode=distill",
    "--config.distill.decay=constant",
    "--config.run.checkpoint_every=10",
    "--config.run.tensorboard=False",
    "--config.network.dit.hidden_size=64",
)
FAR = 10**7


@pytest.mark.long
def test_kills_at_any_moment_change_nothing(tmp_path, environment):
    """25 times SIGKILL: then every number is that of a run that was never killed."""
    config = write_config(tmp_path, MIXTURE)
    broken, through = tmp_path / "broken", tmp_path / "through"
    moments, in_a_save, reached = random.Random(0), 0, 0
    for kill in range(25):
        process = start(
            environment,
            *(config, *ENDLESS, f"--workdir={broken}"),
            f"--config.distill.num_steps={FAR}",
        )
        if kill % 5:  # every fifth dies at the start, perhaps before it does anything
            wait_for_a_step_after(reached, broken, process)
            time.sleep(moments.uniform(0, 0.4))
        else:
            time.sleep(moments.uniform(0.5, 3.0))
        process.kill()
        _, out = finish(process)
        assert "error" not in out.lower(), out
        in_a_save += bool(list((broken / "checkpoints").glob("*tmp*")))
        now = max(whole_steps(broken), default=0)
        assert now >= reached, "a whole checkpoint was lost"
        reached = now
    assert in_a_save >= 3, "no kill came during a save"
    end = f"--config.distill.num_steps={reached + 10}"
    resumed = run(environment, config, *ENDLESS, end, f"--workdir={broken}")
    # It went on from the last whole checkpoint, and not from an earlier one.
    assert re.search(rf"\b{reached}/{reached + 10}\b", resumed), resumed
    run(environment, config, *ENDLESS, end, f"--workdir={through}")
    assert_same_state(
        saved_state(broken, reached + 10), saved_state(through, reached + 10)
    )


# What a run says, by which the moment of a signal is chosen: (words, seconds after,
# which training has many steps, whether it has everything to compile).
MOMENTS = [
    (None, 1.5, "teacher", True),  # while it starts
    pytest.param(None, 2.5, "teacher", True, marks=pytest.mark.long),
    ("checkpoints/0", 0.0, "teacher", True),  # the first step is being compiled
    pytest.param("checkpoints/0", 0.6, "teacher", True, marks=pytest.mark.long),
    ("teacher:", 0.2, "teacher", False),
    ("student:", 0.0, "student", False),
    pytest.param("student:", 0.15, "student", False, marks=pytest.mark.long),
    ("evaluate: teacher's ODE", 0.3, "neither", True),
    ("evaluate: student", 0.1, "neither", False),
    pytest.param(
        "evaluate: error over target time",
        0.05,
        "neither",
        False,
        marks=pytest.mark.long,
    ),
]
MANY, FEW = 3000, 50


@pytest.mark.parametrize("words, seconds, long, compiles", MOMENTS)
def test_a_request_to_stop_is_answered_at_any_moment(
    tmp_path_factory, environment, words, seconds, long, compiles
):
    tmp_path = tmp_path_factory.mktemp("asked")
    steps = {"teacher": FEW, "student": FEW} | {long: MANY}
    flags = [
        write_config(tmp_path, DIGITS),
        f"--workdir={tmp_path / 'run'}",
        f"--config.teacher.training.num_steps={steps['teacher']}",
        f"--config.distill.num_steps={steps['student']}",
        "--config.run.tensorboard=False",
        "--config.evaluation.ode_steps=200",
        "--config.evaluation.num_images=128",
    ]
    own = dict(environment)
    if compiles:
        own["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
    log = tmp_path / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "boot_jax.main", *flags],
            cwd=ROOT,
            env=own,
            stdout=sink,
            stderr=sink,
        )
        if words is not None and words.startswith("checkpoints"):
            first = tmp_path / "run" / "teacher" / words
            wait_for(first.is_dir, process)
        elif words is not None:
            wait_for(lambda: words in log.read_text(), process)
        time.sleep(seconds)
        process.send_signal(
            random.Random(seconds).choice([signal.SIGTERM, signal.SIGINT])
        )
        code = process.wait(timeout=60)
    assert code == EXIT_PREEMPTED, log.read_text()
    assert "the same command goes on" in log.read_text()
    assert "Traceback" not in log.read_text()
    if words is None:
        return  # it may not have got as far as a checkpoint
    folder = tmp_path / "run"
    if words.startswith(("checkpoints", "teacher")):
        folder = folder / "teacher"
    reached = max(whole_steps(folder))
    saved = re.search(r"saved step (\d+) of", log.read_text())
    if saved is not None:
        assert reached == int(saved.group(1))
    assert saved_state(folder, reached)
    # The same command goes on; a little will do to see it.
    end = max(reached + 10, FEW)
    name = "teacher.training" if folder.name == "teacher" else "distill"
    mode = "teacher" if folder.name == "teacher" else "distill"
    out = run(own, *flags, f"--mode={mode}", f"--config.{name}.num_steps={end}")
    assert "warning" not in out
    assert max(whole_steps(folder)) == end


TOPOLOGIES = {"1x8": (1, 8), "2x4": (2, 4), "1x1": (1, 1)}
MOVING = (
    "--mode=distill",
    "--config.distill.decay=constant",
    "--config.distill.batch_size=32",
    "--config.run.steps_per_dispatch=1",
    "--config.run.checkpoint_every=10",
    "--config.run.log_every=1",
    "--config.run.keep_checkpoints=10",
    "--config.run.tensorboard=False",
    "--config.mesh.fsdp_min_size=64",
)


def launch(environment, topology, *flags, seconds=300, code=0) -> str:
    processes, devices = TOPOLOGIES[topology]
    fsdp = "--config.mesh.fsdp=2" if devices > 1 else "--config.mesh.fsdp=1"
    done = subprocess.run(
        [
            *(
                "bash",
                str(LAUNCHER),
                f"--processes={processes}",
                f"--devices={devices}",
            ),
            *(str(flag).removeprefix("--config=") for flag in flags[:1]),
            *map(str, flags[1:]),
            fsdp,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def launch_in_background(environment, *flags) -> subprocess.Popen[str]:
    """Two processes of one device each."""
    return subprocess.Popen(
        ["bash", str(LAUNCHER), "--processes=2", "--devices=1", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pids_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Of both processes, as the launcher says them."""
    assert process.stdout is not None
    pids: dict[int, int] = {}
    while len(pids) < 2:
        found = re.search(r"process (\d): pid (\d+)", process.stdout.readline())
        if found:
            pids[int(found.group(1))] = int(found.group(2))
    return pids


def losses(workdir: pathlib.Path) -> np.ndarray:
    assert steps_of(workdir) == list(range(1, 21))
    return np.array([row["loss"] for row in read_metrics(workdir)])


@pytest.mark.long
def test_every_topology_gives_the_same_and_takes_over_from_every_other(
    tmp_path, environment
):
    config = write_config(tmp_path, MIXTURE)
    ends = {}
    for first in TOPOLOGIES:
        half = tmp_path / f"{first}-half"
        ten, twenty = (f"--config.distill.num_steps={n}" for n in (10, 20))
        launch(environment, first, config, *MOVING, ten, f"--workdir={half}")
        for second in TOPOLOGIES:
            workdir = tmp_path / f"{first}-{second}"
            shutil.copytree(half, workdir)
            launch(environment, second, config, *MOVING, twenty, f"--workdir={workdir}")
            ends[first, second] = losses(workdir)
    straight = ends["1x1", "1x1"]
    for pair, moved in ends.items():
        np.testing.assert_allclose(
            moved, straight, rtol=0, atol=1e-5, err_msg=str(pair)
        )
    # Back on the same devices, it is the same to the last bit.
    for name in TOPOLOGIES:
        workdir = tmp_path / f"{name}-through"
        launch(environment, name, config, *MOVING, twenty, f"--workdir={workdir}")
        assert_same_state(
            saved_state(workdir, 20), saved_state(tmp_path / f"{name}-{name}", 20)
        )


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_one_of_two_processes_is_killed(tmp_path, environment, victim):
    """The other ends by itself, in bounded time; the pair goes on."""
    config = write_config(tmp_path, MIXTURE).removeprefix("--config=")
    workdir = tmp_path / "run"
    flags = (
        *MOVING,
        "--config.run.heartbeat_seconds=10",
        "--config.run.watchdog_seconds=20",
        f"--workdir={workdir}",
    )
    end = f"--config.distill.num_steps={FAR}"
    process = launch_in_background(environment, "--grace=90", config, *flags, end)
    pids = pids_of(process)
    wait_for_a_step_after(19, workdir, process)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    code, out = finish(process, 90)
    assert time.monotonic() - killed < 60
    assert code in (EXIT_STUCK, 134), out
    assert f"[{1 - victim}]" in out and (
        "another process has gone" in out or "another task died" in out
    )
    reached = max(whole_steps(workdir))
    end = f"--config.distill.num_steps={reached + 10}"
    launch(environment, "2x4", f"--config={config}", *flags, end)
    assert max(whole_steps(workdir)) == reached + 10


def test_two_processes_stop_at_one_step_when_one_is_asked(tmp_path, environment):
    config = write_config(tmp_path, MIXTURE).removeprefix("--config=")
    workdir = tmp_path / "run"
    flags = (*MOVING, f"--workdir={workdir}", f"--config.distill.num_steps={FAR}")
    process = launch_in_background(environment, config, *flags)
    pid = pids_of(process)[1]
    wait_for_a_step_after(19, workdir, process)
    os.kill(pid, signal.SIGINT)
    code, out = finish(process, 60)
    assert code == EXIT_PREEMPTED, out
    steps = set(re.findall(r"saved step (\d+) of", out))
    assert len(steps) == 1, out
    assert max(whole_steps(workdir)) == int(steps.pop())


def test_a_process_that_hangs_ends_all(tmp_path, environment):
    """Stopped, not dead: nothing is closed, and only time tells."""
    config = write_config(tmp_path, MIXTURE).removeprefix("--config=")
    workdir = tmp_path / "run"
    flags = (*MOVING, f"--workdir={workdir}", f"--config.distill.num_steps={FAR}")
    watchdog = "--config.run.watchdog_seconds=20"
    process = launch_in_background(environment, "--grace=5", config, *flags, watchdog)
    pid = pids_of(process)[1]
    wait_for_a_step_after(19, workdir, process)
    os.kill(pid, signal.SIGSTOP)
    code, out = finish(process, 120)
    assert code == EXIT_STUCK, out
    assert re.search(r"watchdog: (saving )?step \d+ took longer than allowed", out)
