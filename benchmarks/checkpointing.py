"""How long a save keeps the loop waiting, and how long a restore takes.

python benchmarks/checkpointing.py --network=unet --steps=200
"""

import argparse
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boot_jax import CosineSchedule, Objective, Teacher, create_student, sharding
from boot_jax.conditions import Conditions
from boot_jax.models import create_network
from boot_jax.teachers.base import network_denoiser
from boot_jax.teachers.checkpoint import initialiser
from boot_jax.training.checkpoints import Checkpoints
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import make_train_step

# The UNet of configs/cifar10.py, and a transformer that a CPU can step.
NETWORKS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "unet": (
        (32, 32, 3),
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": (
                "DownBlock2D",
                "AttnDownBlock2D",
                "DownBlock2D",
                "DownBlock2D",
            ),
            "up_block_types": (
                "UpBlock2D",
                "UpBlock2D",
                "AttnUpBlock2D",
                "UpBlock2D",
            ),
            "attention_head_dim": None,
            "dtype": jnp.bfloat16,
        },
    ),
    "dit": ((8, 8, 1), {"patch_size": 4, "hidden_size": 384, "num_layers": 8}),
}


def training(name: str, batch_size: int, k: int) -> tuple[Any, Any, Any]:
    """A compiled distillation step, its state and the teacher's parameters."""
    shape, options = NETWORKS[name]
    network, schedule = (
        create_network(name, sample_shape=shape, **options),
        CosineSchedule(),
    )
    teacher = Teacher(
        denoise=network_denoiser(network, schedule, "v_prediction"),
        params=initialiser(network, shape, None)(jax.random.key(0)),
        schedule=schedule,
        sample_shape=shape,
        network=network,
        prediction_type="v_prediction",
    )
    student = create_student(teacher)
    optimizer = create_optimizer(learning_rate=1e-4, num_steps=10**6)
    loss = distillation_loss(
        signal=student.signal,
        denoise=teacher.denoise,
        schedule=schedule,
        objective=Objective(solver="ddim"),
        conditions=Conditions(),
        sample_shape=shape,
        batch_size=batch_size,
    )
    step = make_train_step(
        loss, optimizer, ema_decay=0.999, num_steps=10**6, steps_per_dispatch=k
    )
    where = sharding.replicated(sharding.create_mesh())
    state = sharding.place(
        create_state(student.init(jax.random.key(1)), optimizer), where
    )
    return step, state, sharding.place(teacher.params, where)


def main(network: str, batch_size: int, steps: int, k: int, saves: int) -> None:
    """Prints the seconds between saves, of a save as the loop sees it, of a restore."""
    step, state, frozen = training(network, batch_size, k)
    key = jax.random.key(2)
    between, blocked = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder), {"identity": {}})
        state = jax.block_until_ready(step(state, frozen, None, key)[0])
        checkpoints.finish(state)  # compiles the checksums
        for _ in range(saves):
            start = time.perf_counter()
            for _ in range(steps // k):
                state = step(state, frozen, None, key)[0]
            jax.block_until_ready(state)
            before = time.perf_counter()
            checkpoints.save(state)
            after = time.perf_counter()
            between.append(before - start)
            blocked.append(after - before)
        before = time.perf_counter()
        checkpoints.wait()
        last = time.perf_counter() - before
        before = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(state))
        restoring = time.perf_counter() - before
        checkpoints.close()
        size = sum(
            f.stat().st_size for f in pathlib.Path(folder).rglob("*") if f.is_file()
        )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    share = float(np.median(np.asarray(blocked) / np.asarray(between)))
    print(
        f"{network}, {parameters / 1e6:.1f} M parameters, batch {batch_size}, {device}"
    )
    print(f"{steps} steps between saves        {np.median(between):8.2f} s")
    print(f"a save blocks the loop for     {np.median(blocked):8.2f} s  ({share:.1%})")
    print(f"the last save then takes       {last:8.2f} s more in the background")
    print(f"a restore, verified, takes     {restoring:8.2f} s")
    print(f"two checkpoints on disk        {size / 1e6:8.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--saves", type=int, default=3)
    main(**vars(parser.parse_args()))
