"""Time and memory of a distillation step, as ratios to a teacher-training step's.

python benchmarks/step_time.py --network=dit --batch_size=128
python benchmarks/step_time.py --only=continuous,corrected

The memory is the compiled step's: state, inputs and temporaries on one device.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from boot_jax import CosineSchedule, Objective, Teacher, create_student
from boot_jax.auxiliary import create_auxiliary
from boot_jax.conditions import Conditions
from boot_jax.models import create_network
from boot_jax.objectives import Correction
from boot_jax.teachers.base import network_denoiser
from boot_jax.teachers.checkpoint import initialiser
from boot_jax.training.correction import corrected_loss
from boot_jax.training.denoising import denoising_loss
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.run import compiled_bytes
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import Loss, make_train_step

SHAPE, SCHEDULE, PREDICTION = (8, 8, 1), CosineSchedule(), "v_prediction"
NETWORKS: dict[str, dict[str, Any]] = {
    "dit": {"patch_size": 4, "hidden_size": 128, "num_layers": 4, "num_heads": 4},
    "unet": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}
OBJECTIVES = {
    "boot, Heun": Objective(),
    "boot, DDIM": Objective(solver="ddim"),
    "boot, DDIM, no boundary": Objective(solver="ddim", boundary_weight=0.0),
    "continuous, JVP": Objective(kind="continuous", boundary_weight=0.0),
    "continuous, difference": Objective(
        kind="continuous", boundary_weight=0.0, derivative="finite_difference"
    ),
}
_CORRECTIONS = {
    "corrected": Correction(strength=1.0),
    "corrected, whole batch": Correction(strength=1.0, auxiliary_share=1.0),
    "corrected, rank 8": Correction(strength=1.0, lora_rank=8),
}
OBJECTIVES |= {
    name: Objective(kind="continuous", boundary_weight=0.0, correction=correction)
    for name, correction in _CORRECTIONS.items()
}
BASE = "teacher training"


class Dispatch(NamedTuple):
    """Some steps in one, compiled: what one of them takes, and the bytes of all."""

    seconds: Callable[[], float]
    memory: int | None


def compiled(loss: Loss, params: Any, frozen: Any, batches: Any, k: int) -> Dispatch:
    """A dispatch of ``k`` steps."""
    optimizer = create_optimizer(learning_rate=1e-4, num_steps=1000)
    step = make_train_step(
        loss, optimizer, ema_decay=0.999, num_steps=1000, steps_per_dispatch=k
    )
    # A copy: the step gives its state's own buffers away.
    second = loss.auxiliary
    own = None if second is None else second.create(jax.random.key(2))
    state = create_state(jax.tree.map(jnp.copy, params), optimizer, own)

    program = step.lower(state, frozen, batches, jax.random.key(0)).compile()

    def dispatch() -> float:
        nonlocal state
        before = time.perf_counter()
        state, metrics = program(state, frozen, batches, jax.random.key(0))
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - before) / k

    dispatch()
    return Dispatch(dispatch, compiled_bytes(program))


def dispatches(
    network_name: str, batch_size: int, k: int, only: Sequence[str]
) -> dict[str, Dispatch]:
    """One of every kind of step whose name begins as asked, by name."""
    network = create_network(network_name, sample_shape=SHAPE, **NETWORKS[network_name])
    params = initialiser(network, SHAPE, None)(jax.random.key(0))
    teacher = Teacher(
        denoise=network_denoiser(network, SCHEDULE, PREDICTION),
        params=params,
        schedule=SCHEDULE,
        sample_shape=SHAPE,
        network=network,
        prediction_type=PREDICTION,
    )
    student = create_student(teacher)
    start = student.init(jax.random.key(1))
    training = denoising_loss(
        network=network,
        schedule=SCHEDULE,
        prediction_type=PREDICTION,
        conditions=Conditions(),
    )
    images = {"image": jnp.zeros((k, batch_size, *SHAPE))}
    found = {BASE: compiled(training, params, None, images, k)}
    for name, objective in OBJECTIVES.items():
        if not name.startswith(tuple(only)):
            continue
        shared: dict[str, Any] = {
            "signal": student.signal,
            "denoise": teacher.denoise,
            "schedule": SCHEDULE,
            "objective": objective,
        }
        loss = distillation_loss(
            conditions=Conditions(),
            sample_shape=SHAPE,
            batch_size=batch_size,
            **shared,
        )
        if objective.correction.strength:
            rank = objective.correction.lora_rank
            second = create_auxiliary(teacher, lora_rank=rank)
            loss = corrected_loss(loss, network=second, **shared)
        found[name] = compiled(loss, start, params, None, k)
    return found


def main(
    network: str, batch_size: int, rounds: int, many: int, only: Sequence[str]
) -> None:
    """Prints a row for each kind of step, with one and with many per dispatch."""
    kinds = {k: dispatches(network, batch_size, k, only) for k in (1, many)}
    # In turn, so that whatever else the machine does falls on all of them alike.
    rows = [
        [[dispatch.seconds() for dispatch in kind.values()] for kind in kinds.values()]
        for _ in range(rounds)
    ]
    seconds = np.asarray(rows)  # [round, k, name]
    ratios = np.median(seconds / seconds[:, :1, :1], axis=0)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{network}, batch {batch_size}, {device}, jax {jax.__version__}")
    head = f"{'k = 1':>8} {f'k = {many}':>8} {'memory':>8}"
    print(f"{'step':24} {head}   (k steps per dispatch)")
    base = kinds[1][BASE].memory
    for (name, kind), one, several in zip(kinds[1].items(), *ratios, strict=True):
        memory = f"{kind.memory / base:8.2f}" if kind.memory and base else f"{'-':>8}"
        print(f"{name:24} {one:8.2f} {several:8.2f} {memory}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="dit")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--many", type=int, default=20)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[""],
        help="kinds of step: how their names begin, separated by commas",
    )
    main(**vars(parser.parse_args()))
