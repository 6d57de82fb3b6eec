"""Time of a distillation step, as ratios to a teacher-training step in the same run.

python benchmarks/step_time.py --batch_size=128 --steps=40
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from boot_jax import CosineSchedule, Objective, Teacher, create_student
from boot_jax.conditions import Conditions
from boot_jax.models.dit import DiT
from boot_jax.teachers.base import network_denoiser
from boot_jax.teachers.checkpoint import initialiser
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import denoising_loss, distillation_loss, make_train_step

OBJECTIVES = {
    "boot, Heun": Objective(),
    "boot, DDIM": Objective(solver="ddim"),
    "continuous, JVP": Objective(kind="continuous", boundary_weight=0.0),
    "continuous, difference": Objective(
        kind="continuous", boundary_weight=0.0, derivative="finite_difference"
    ),
}
SHAPE = (8, 8, 1)


def seconds_per_step(
    loss: Callable[..., Any], params: Any, frozen: Any, batches: Any, k: int, steps: int
) -> float:
    """The median over dispatches of ``k`` steps, compilation left out."""
    optimizer = create_optimizer(learning_rate=1e-4, num_steps=steps)
    step = make_train_step(
        loss, optimizer, ema_decay=0.999, num_steps=steps, steps_per_dispatch=k
    )
    state = create_state(jax.tree.map(jnp.copy, params), optimizer)
    times = []
    for _ in range(1 + max(3, steps // k)):
        before = time.perf_counter()
        state, metrics = step(state, frozen, batches, jax.random.key(0))
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - before) / k)
    return sorted(times[1:])[len(times[1:]) // 2]


def main(batch_size: int, steps: int) -> None:
    """Prints one row an objective, for one and for twenty steps per dispatch."""
    schedule = CosineSchedule()
    network = DiT(
        out_channels=1, patch_size=4, hidden_size=128, num_layers=4, num_heads=4
    )
    params = initialiser(network, SHAPE, None)(jax.random.key(0))
    teacher = Teacher(
        denoise=network_denoiser(network, schedule, "v_prediction"),
        params=params,
        schedule=schedule,
        sample_shape=SHAPE,
        network=network,
        prediction_type="v_prediction",
    )
    student = create_student(teacher)
    start = student.init(jax.random.key(1))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {batch_size}")
    print(f"{'step':24}  {'k = 1':>8}  {'k = 20':>8}   (teacher training, k = 1: 1.00)")
    training = denoising_loss(
        network=network,
        schedule=schedule,
        prediction_type="v_prediction",
        conditions=Conditions(),
    )
    base = 0.0
    for name, objective in {"teacher training": None, **OBJECTIVES}.items():
        ratios = []
        for k in (1, 20):
            if objective is None:
                images = {"image": jnp.zeros((k, batch_size, *SHAPE))}
                taken = seconds_per_step(training, params, None, images, k, steps)
                base = base or taken
            else:
                loss = distillation_loss(
                    signal=student.signal,
                    denoise=teacher.denoise,
                    schedule=schedule,
                    objective=objective,
                    conditions=Conditions(),
                    sample_shape=SHAPE,
                    batch_size=batch_size,
                )
                taken = seconds_per_step(loss, start, params, None, k, steps)
            ratios.append(taken / base)
        print(f"{name:24}  {ratios[0]:8.2f}  {ratios[1]:8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    main(**vars(parser.parse_args()))
