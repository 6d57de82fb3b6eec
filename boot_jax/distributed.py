"""Several processes: how they find each other, and what only one of them does.

Process 0 writes files, logs and pictures; all compute. Everything here is a plain call
when there is one process.
"""

import concurrent.futures
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

MODES = ("auto", "on", "off")

# What an error of a collective says when a peer has gone, by transport.
_LOST_PEER = ("gloo", "nccl", "coordination", "unavailable", "deadline", "heartbeat")

# How often processes meet while one of them works; gloo waits for 30 seconds.
_MEETING_SECONDS = 5.0


class DistributedError(ValueError):
    """Processes that cannot be brought together, or what process 0 had to refuse."""


class PeersMissing(RuntimeError):
    """Processes that did not come in time; started again, they may."""


def start(
    mode: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Joins the other processes, where there are any; before anything else of JAX.

    Args:
      mode: ``auto`` joins if an argument or the environment (a Slurm step or an Open
        MPI run of several tasks, the workers of a TPU pod, JAX_COORDINATOR_ADDRESS)
        says so; ``on`` also lets JAX look for the metadata of a cloud; ``off`` never.
      coordinator_address: ``HOST:PORT`` of process 0.
      num_processes, process_id: how many, and which one this is.
      heartbeat_seconds: a process that is silent for so long counts as dead.
      environment: where to look.

    Returns:
      Whether there is a cluster now.

    Raises:
      DistributedError: an argument is missing, or the processes cannot meet.
      PeersMissing: they did not meet in time.
    """
    explicit = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    given = {name: value for name, value in explicit.items() if value is not None}
    found = _surroundings(environment)
    if mode == "off":
        return False
    if mode == "auto" and not given and found is None:
        return False
    arguments = (found or {}) | given
    missing = explicit.keys() - arguments.keys()
    if given and found is None and missing:
        raise DistributedError(
            "the environment names no cluster, so these flags are needed too: "
            + ", ".join(f"--{name}" for name in sorted(missing))
        )
    try:
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        text = (str(error).strip() or repr(error)).splitlines()[0]
        if "deadline" in text.lower() or "timed out" in text.lower():
            raise PeersMissing(f"not all processes came in time: {text}") from error
        raise DistributedError(
            f"the processes did not meet ({text}); say who they are by "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id, or run "
            "this one alone with --distributed=off"
        ) from error
    return True


def _surroundings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What a launcher's environment says; None if there is no sign of several."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {}
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {
            "num_processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
            "process_id": int(environment["OMPI_COMM_WORLD_RANK"]),
        }
    several_workers = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if several_workers or "JAX_COORDINATOR_ADDRESS" in environment:
        return {}
    return None


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def on_main(action: Callable[[], Any], *, takes_long: bool = False) -> Any:
    """Does something on process 0 alone; all get its result, or its refusal.

    Args:
      action: returns what JSON can hold.
      takes_long: it may take longer than a collective waits (30 s on CPUs), so that it
        is done in a thread, while all processes meet every few seconds.

    Raises:
      DistributedError: on the other processes, where ``action`` raised a ``ValueError``
        or ``OSError`` on process 0; there it is raised as it is.
    """
    if jax.process_count() == 1:
        return action()
    if takes_long:
        action = _while_all_meet(action)
    outcome: dict[str, Any] = {}
    refusal: Exception | None = None
    if is_main():
        try:
            outcome = {"result": action()}
        except (ValueError, OSError) as error:
            refusal, outcome = error, {"refusal": str(error)}
    outcome = _broadcast(outcome)
    if refusal is not None:
        raise refusal
    if "refusal" in outcome:
        raise DistributedError(outcome["refusal"])
    return outcome["result"]


def _while_all_meet(action: Callable[[], Any]) -> Callable[[], Any]:
    """Does it on process 0 while all wait; what it came to is had by a call."""
    with concurrent.futures.ThreadPoolExecutor(1, "boot_jax-main") as thread:
        future = thread.submit(action) if is_main() else concurrent.futures.Future()
        done = False
        while not done:
            concurrent.futures.wait([future], _MEETING_SECONDS if is_main() else 0)
            done = _broadcast({"done": future.done()})["done"]
    return future.result


def _broadcast(outcome: dict[str, Any]) -> dict[str, Any]:
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    return json.loads(bytes(np.asarray(text)))


def all_agree(fine: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def wait_for_all(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition comes true on every process, each within some seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return all_agree(condition())


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    if jax.process_count() == 1 or not isinstance(error, RuntimeError | ValueError):
        return False
    return any(word in str(error).lower() for word in _LOST_PEER)
