"""What a run says: each step once, and no number that is not one."""

import builtins
import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from boot_jax.config import ConfigError
from boot_jax.training.logs import Logger, read_metrics


def logger(folder, **changes) -> Logger:
    options = {
        "start_step": 0,
        "num_steps": 12,
        "batch_size": 8,
        "log_every": 4,
        "tensorboard": False,
    }
    return Logger(folder, "student", **(options | changes))


def losses(*values):
    return {"loss": np.asarray(values), "grad_norm": 2 * np.asarray(values)}


def test_a_line_is_the_mean_of_its_steps(tmp_path):
    log = logger(tmp_path)
    for step in range(2, 14, 2):
        log.write(step, losses(step - 1.0, step))
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["loss"] for row in rows] == [2.5, 6.5, 10.5]
    assert [row["grad_norm"] for row in rows] == [5.0, 13.0, 21.0]
    for row in rows:
        assert list(row)[:3] == ["step", "seconds", "images_per_second"]
        assert row["images_per_second"] > 0 and row["seconds"] >= 0
    assert read_metrics(tmp_path) == rows


def test_speed_is_images_over_seconds(tmp_path, monkeypatch):
    now = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    log = logger(tmp_path)
    log.write(4, losses(1, 1, 1, 1))
    log.write(8, losses(1, 1, 1, 1))
    rows = read_metrics(tmp_path)
    assert [row["seconds"] for row in rows] == [2.0, 3.0]
    assert [row["images_per_second"] for row in rows] == [16.0, 10.7]


def test_a_dispatch_longer_than_a_line_is_one_line(tmp_path):
    log = logger(tmp_path, log_every=1)
    log.write(6, losses(*range(6)))
    log.write(12, losses(*range(6)))
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [6, 12]


def test_the_last_steps_are_written_at_the_end(tmp_path):
    """A run that is shorter than one line would say nothing otherwise."""
    log = logger(tmp_path, log_every=100)
    log.write(1, losses(1.0))
    log.write(2, losses(3.0))
    assert read_metrics(tmp_path) == []
    log.close()
    (row,) = read_metrics(tmp_path)
    assert (row["step"], row["loss"]) == (2, 2.0)


def test_lines_beyond_the_restored_step_are_dropped(tmp_path):
    log = logger(tmp_path)
    for step in (4, 8, 12):
        log.write(step, losses(1.0, 1.0, 1.0, 1.0))
    log.close()
    log = logger(tmp_path, start_step=8)
    assert [row["step"] for row in read_metrics(tmp_path)] == [4, 8]
    log.write(12, losses(5.0, 5.0, 5.0, 5.0))
    log.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(4, 1), (8, 1), (12, 5)]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": 1.0}\n{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [4]
    logger(tmp_path, start_step=4).close()
    assert path.read_text() == '{"step": 4, "loss": 1.0}\n'


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stops_with_metric_and_step(tmp_path, bad):
    log = logger(tmp_path)
    log.write(4, losses(1.0, 1.0, 1.0, 1.0))
    values = {"loss": np.asarray([1.0, 2.0, bad, bad]), "grad_norm": np.ones(4)}
    with pytest.raises(FloatingPointError) as stop:
        log.write(8, values)
    assert str(stop.value).startswith(f"step 7: loss = {bad}.")
    assert "grad_norm" not in str(stop.value) and "\n" not in str(stop.value)
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [4]


def test_the_first_that_is_not_finite_is_named(tmp_path):
    log = logger(tmp_path)
    values = {"loss": np.asarray([1.0, np.nan]), "grad_norm": np.asarray([np.inf, 1])}
    with pytest.raises(FloatingPointError, match=r"^step 1: grad_norm = inf\."):
        log.write(2, values)


def test_tensorboard_has_the_same_numbers(tmp_path):
    log = logger(tmp_path, tensorboard=True)
    log.write(4, losses(1.0, 1.0, 1.0, 5.0))
    log.close()
    (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    # A record is its length (8 bytes), a checksum (4), the event, a checksum (4).
    data, found = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {
            value.tag: (event.step, value.simple_value) for value in event.summary.value
        }
        data = data[16 + length :]
    assert found["loss"] == (4, 2.0) and found["grad_norm"] == (4, 4.0)


def test_without_tensorboard_there_is_none(tmp_path):
    logger(tmp_path).close()
    assert not (tmp_path / "tensorboard").exists()


def test_a_missing_wandb_is_one_line(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"pip install 'boot_jax\[wandb\]'"
    ) as refusal:
        logger(tmp_path, wandb_project="mine")
    assert "\n" not in str(refusal.value)


def test_wandb_is_told_every_line(tmp_path, monkeypatch):
    told = []

    class Run:
        def log(self, line, step):
            told.append((step, line["loss"]))

        def finish(self):
            told.append("finished")

    class Wandb:
        @staticmethod
        def init(**options):
            told.append(options["project"])
            return Run()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    log = logger(tmp_path, wandb_project="mine")
    log.write(4, losses(1.0, 1.0, 1.0, 1.0))
    log.close()
    assert told == ["mine", (4, 1.0), "finished"]
