"""How processes are told of each other; what several do is in test_survival.py."""

import jax
import pytest

from boot_jax import distributed, pipeline
from boot_jax.config import default_config
from boot_jax.distributed import DistributedError
from boot_jax.interruption import EXIT_STUCK, Interruption

FLAGS = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call to jax.distributed.initialize."""
    made = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **given: made.append(given)
    )
    return made


@pytest.mark.parametrize(
    "environment, flags, arguments",
    [
        ({}, FLAGS, FLAGS),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, {}, {}),
        (
            {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"},
            {},
            {"num_processes": 3, "process_id": 2},
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"},
            {"coordinator_address": "b:2"},
            {"num_processes": 3, "process_id": 2, "coordinator_address": "b:2"},
        ),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, {}, {}),
        ({"JAX_COORDINATOR_ADDRESS": "c:3"}, {}, {}),
    ],
)
def test_several_processes_are_joined(calls, environment, flags, arguments):
    assert distributed.start(environment=environment, heartbeat_seconds=7, **flags)
    assert calls == [arguments | {"heartbeat_timeout_seconds": 7}]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8"},  # the batch script, or a shell on the node
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_one_process_stays_alone(calls, environment):
    assert not distributed.start(environment=environment)
    assert not calls


def test_the_flag_has_the_last_word(calls):
    slurm = {"SLURM_STEP_NUM_TASKS": "4"}
    assert not distributed.start("off", environment=slurm, **FLAGS)
    assert not calls
    assert distributed.start("on", environment={})
    assert calls == [{"heartbeat_timeout_seconds": 100}]


@pytest.mark.parametrize("missing", sorted(FLAGS))
def test_a_missing_flag_is_named(calls, missing):
    given = {name: value for name, value in FLAGS.items() if name != missing}
    with pytest.raises(DistributedError, match=f"flags are needed too: --{missing}$"):
        distributed.start(environment={}, **given)
    assert not calls


def test_processes_that_do_not_meet_are_one_line(monkeypatch):
    def fail(**given):
        raise RuntimeError("nobody there\nmore\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(DistributedError) as refusal:
        distributed.start(environment={}, **FLAGS)
    message = str(refusal.value)
    assert "\n" not in message and "nobody there" in message
    assert "--coordinator_address=HOST:PORT" in message


def test_processes_that_come_too_late_may_be_started_again(monkeypatch, capsys):
    def fail(**given):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nmore\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    cluster = {"distributed": "auto", **FLAGS}
    with Interruption() as asked:
        code = pipeline.answer("all", default_config(), "nowhere", cluster, asked)
    assert code == EXIT_STUCK
    assert "not all processes came in time: DEADLINE" in capsys.readouterr().err


def test_one_process_does_everything_itself():
    assert distributed.is_main()
    assert distributed.on_main(lambda: {"a": [1]}) == {"a": [1]}
    with pytest.raises(OSError, match="full"):
        distributed.on_main(lambda: (_ for _ in ()).throw(OSError("full")))
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    assert distributed.wait_for_all(lambda: True)
    assert not distributed.wait_for_all(lambda: False, seconds=0.2)


def test_a_lost_peer_is_told_from_other_errors(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert not distributed.is_lost_peer(gone)  # there is none to lose
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.is_lost_peer(gone)
    assert distributed.is_lost_peer(RuntimeError("UNAVAILABLE: Socket closed"))
    assert not distributed.is_lost_peer(ValueError("shapes differ"))
    assert not distributed.is_lost_peer(KeyError("gloo"))
