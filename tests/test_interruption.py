"""Signals and the watchdog, in processes of their own: how each of them ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from boot_jax.interruption import (
    EXIT_PREEMPTED,
    EXIT_STUCK,
    Interruption,
    Preempted,
    Watchdog,
)

# The main thread says when it is ready, and then does what a program is given.
PROGRAM = """
import sys, time
from boot_jax.interruption import Interruption, Preempted, Watchdog
import hashlib

def ready():
    print("ready", flush=True)

def busy():  # as a compilation is: a call in which Python runs no handler
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)

with Interruption() as asked:
    asked.join()
{body}
"""


def start(body: str) -> subprocess.Popen[str]:
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=indented)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_outside_of_training_a_signal_ends_at_once(name):
    """Even where Python cannot run a handler."""
    process = start("ready()\nbusy()")
    begun = time.monotonic()
    process.send_signal(getattr(signal, name))
    code, _, err = end(process)
    assert code == EXIT_PREEMPTED and time.monotonic() - begun < 10
    assert err == f"{name}: stopping; the same command goes on\n"


def test_what_must_be_finished_is_finished_first():
    process = start(
        """
def finish():
    time.sleep(0.5)
    print("finished", flush=True)

with asked.finishing(finish):
    ready()
    busy()
"""
    )
    process.terminate()
    code, out, _ = end(process)
    assert code == EXIT_PREEMPTED and out == "finished\n"


TRAINING = """
try:
    with asked.protected():
        ready()
        for step in range(600):
            time.sleep(0.1)
            if asked.poll():
                time.sleep({save})
                print("saved", flush=True)
                raise Preempted("saved")
except Preempted:
    sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_while_it_trains_the_next_boundary_is_awaited(name):
    process = start(TRAINING.format(save=0.2))
    process.send_signal(getattr(signal, name))
    code, out, err = end(process)
    assert code == EXIT_PREEMPTED and out == "saved\n"
    assert err.startswith(f"{name}: saving after this step")


@pytest.mark.parametrize(
    "first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM")]
)
def test_a_second_signal_quits_at_once(first, second):
    process = start(TRAINING.format(save=60))
    assert process.stderr is not None
    process.send_signal(getattr(signal, first))
    assert process.stderr.readline().startswith(first)
    time.sleep(1.1)
    begun = time.monotonic()
    process.send_signal(getattr(signal, second))
    code, out, err = end(process)
    assert code == 128 + getattr(signal, second) and out == ""
    assert time.monotonic() - begun < 10
    assert err == f"{second} again: quitting at once\n"


def test_one_request_may_come_twice():
    """As from a launcher, and from the scheduler that asked the launcher."""
    process = start(TRAINING.format(save=0.5))
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving")
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert code == EXIT_PREEMPTED and out == "saved\n" and err == ""


def test_a_request_after_the_last_boundary_is_not_forgotten():
    with Interruption() as asked, pytest.raises(Preempted), asked.protected():
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while asked._requested is None and time.monotonic() < deadline:
            time.sleep(0.01)


def test_the_old_handlers_come_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Interruption() as asked:
        asked.join()
        assert not asked.poll()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_watchdog_ends_what_hangs():
    process = start(
        """
with Watchdog(1.0) as watchdog:
    for step in range(4):
        watchdog.beat(f"step {step}")
        time.sleep(0.5)
    ready()
    watchdog.beat("step 7")
    busy()
"""
    )
    code, _, err = end(process)
    assert code == EXIT_STUCK
    line = err.splitlines()[0]
    assert (
        line.startswith("watchdog: step 7 took longer") and "watchdog_seconds=1" in line
    )
    assert "Thread" in err and "<string>" in err  # where every thread was


def test_a_watchdog_lets_go(capfd):
    with Watchdog(0.2) as watchdog:
        watchdog.beat("patient", patience=10)
        time.sleep(0.6)
    time.sleep(0.5)
    with Watchdog(0):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
