"""The only loop: what is saved, what is said, and when it stops."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from boot_jax.interruption import Interruption, Preempted, Watchdog
from boot_jax.training import loop
from boot_jax.training.checkpoints import Checkpoints
from boot_jax.training.logs import Logger, read_metrics
from boot_jax.training.loop import default_dispatch, dispatch_length, fit
from boot_jax.training.state import TrainState, create_state


@pytest.mark.parametrize(
    "wanted, counts, length",
    [
        (30, (4000, 1000, 0), 25),
        (20, (4000, 1000, 0), 20),
        (20, (40, 20, 0), 20),
        (20, (7, 1000, 0), 1),
        (20, (14, 7, 7), 7),
        (20, (100, 50, 15), 5),
        (1, (4000, 1000, 0), 1),
        (1000, (4000, 1000, 0), 1000),
    ],
)
def test_a_dispatch_divides_everything(wanted, counts, length):
    found = dispatch_length(wanted, *counts)
    assert found == length
    assert found <= wanted and all(count % found == 0 for count in counts)
    larger = range(found + 1, wanted + 1)
    assert not any(all(c % n == 0 for c in counts) for n in larger)


@pytest.mark.parametrize(
    "backend, convolutional, steps",
    [("cpu", True, 1), ("cpu", False, 20), ("gpu", True, 20), ("tpu", False, 20)],
)
def test_convolutions_on_cpu_are_dispatched_alone(
    monkeypatch, backend, convolutional, steps
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_dispatch(convolutional) == steps


class Recorder:
    """A checkpoint folder and a log that only remember what they were told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def save(self, state: TrainState) -> None:
        self.events.append(("save", int(state.step)))

    def must_retry(self) -> bool:
        return False

    def finish(self, state: TrainState) -> None:
        self.events.append(("wait",))

    def write(self, step: int, metrics: Any) -> None:
        self.events.append(("write", step))
        if not np.isfinite(np.asarray(metrics["loss"])).all():
            raise FloatingPointError(f"step {step}")


def run(recorder: Any, *, bad_from: float = math.inf, start: int = 0, **options: Any):
    k = options["steps_per_dispatch"]

    def step(state: TrainState, frozen: Any, batch: Any, key: Any):
        recorder.events.append(("dispatch", int(state.step) + k, frozen, batch, key))
        bad = int(state.step) + k >= bad_from
        metrics = {"loss": jnp.full((k,), jnp.nan if bad else 1.0)}
        return state.replace(step=state.step + k), metrics

    state = create_state({"a": jnp.zeros(())}, optax.sgd(1.0))
    return fit(
        state.replace(step=jnp.asarray(start, jnp.int32)),
        step,
        frozen="teacher",
        key="key",
        checkpoints=recorder,
        logger=recorder,
        interruption=Interruption(),
        watchdog=Watchdog(0),
        **options,
    )


def kinds(recorder: Recorder) -> list[tuple[Any, ...]]:
    return [event[:2] for event in recorder.events]


def test_metrics_are_read_one_dispatch_late_and_before_a_save():
    recorder = Recorder()
    state = run(
        recorder, batches=None, num_steps=8, steps_per_dispatch=2, checkpoint_every=4
    )
    assert state.step == 8
    assert kinds(recorder) == [
        ("dispatch", 2),
        ("dispatch", 4),
        ("write", 2),
        ("write", 4),
        ("save", 4),
        ("dispatch", 6),
        ("dispatch", 8),
        ("write", 6),
        ("write", 8),
        ("save", 8),
        ("wait",),
    ]
    dispatches = [event for event in recorder.events if event[0] == "dispatch"]
    assert {event[2:] for event in dispatches} == {("teacher", None, "key")}


def test_the_last_state_is_saved_whatever_the_interval():
    recorder = Recorder()
    run(recorder, batches=None, num_steps=6, steps_per_dispatch=2, checkpoint_every=100)
    assert [e for e in kinds(recorder) if e[0] != "dispatch"] == [
        ("write", 2),
        ("write", 4),
        ("write", 6),
        ("save", 6),
        ("wait",),
    ]


def test_a_run_goes_on_from_its_step_with_its_batches():
    recorder = Recorder()

    def batches() -> Iterator[str]:
        yield from ("third", "fourth")

    run(
        recorder,
        start=4,
        batches=batches(),
        num_steps=8,
        steps_per_dispatch=2,
        checkpoint_every=8,
    )
    dispatches = [event for event in recorder.events if event[0] == "dispatch"]
    assert [(event[1], event[3]) for event in dispatches] == [
        (6, "third"),
        (8, "fourth"),
    ]


@pytest.mark.parametrize("bad_from", [2, 4, 6, 8])
def test_a_bad_state_is_never_saved(bad_from):
    recorder = Recorder()
    with pytest.raises(FloatingPointError):
        run(
            recorder,
            bad_from=bad_from,
            batches=None,
            num_steps=8,
            steps_per_dispatch=2,
            checkpoint_every=4,
        )
    saves = [event[1] for event in recorder.events if event[0] == "save"]
    assert saves == ([4] if bad_from > 4 else [])


def test_after_a_bad_step_the_checkpoint_is_from_before(tmp_path):
    """With the true folder and log."""
    recorder = Recorder()
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"identity": {}})
    log = Logger(
        tmp_path,
        "student",
        start_step=0,
        num_steps=12,
        batch_size=1,
        log_every=1,
        tensorboard=False,
    )
    recorder.save, recorder.finish = checkpoints.save, checkpoints.finish
    recorder.must_retry = checkpoints.must_retry
    recorder.write = log.write
    with pytest.raises(FloatingPointError, match=r"^step 7: loss = nan"):
        run(
            recorder,
            bad_from=7,
            batches=None,
            num_steps=12,
            steps_per_dispatch=1,
            checkpoint_every=3,
        )
    log.close()
    checkpoints.close()
    assert Checkpoints(tmp_path / "checkpoints", {}).latest_step() == 6
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


class Asked(Interruption):
    """A request to stop that comes after so many boundaries."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def poll(self) -> bool:
        self.after -= 1
        return self.after < 0


def test_a_request_to_stop_is_answered_at_the_next_step(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("test_loop.Interruption", lambda: Asked(after=2))
    with pytest.raises(Preempted, match="saved step 6 of 100"):
        run(
            recorder,
            batches=None,
            num_steps=100,
            steps_per_dispatch=2,
            checkpoint_every=100,
        )
    assert [e for e in kinds(recorder) if e[0] != "dispatch"] == [
        ("write", 2),
        ("write", 4),
        ("write", 6),
        ("save", 6),
        ("wait",),
    ]


def test_a_save_that_failed_is_made_again_at_the_next_step():
    recorder = Recorder()
    failed = iter([False, True, False, False])
    recorder.must_retry = lambda: next(failed)
    run(
        recorder,
        batches=None,
        num_steps=10,
        steps_per_dispatch=2,
        checkpoint_every=100,
    )
    saves = [event for event in kinds(recorder) if event[0] == "save"]
    assert saves == [("save", 4), ("save", 10)]


def test_nothing_is_done_for_a_run_that_is_over():
    recorder = Recorder()
    run(
        recorder,
        start=8,
        batches=None,
        num_steps=8,
        steps_per_dispatch=2,
        checkpoint_every=4,
    )
    assert kinds(recorder) == [("wait",)]


def test_this_is_the_loop_that_trains():
    """Or the tests above would look at nothing."""
    from boot_jax.training import run as training_run

    assert training_run.fit is loop.fit
