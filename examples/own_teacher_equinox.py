"""A teacher in Equinox: `eqx.partition` makes of any module a pure function.

python examples/own_teacher_equinox.py

A denoiser is trained on points in the plane; a copy of it, without the points, then
learns to get there in one call. Prints how far the student's points are from where the
teacher's ODE leads, over the variance there, before and after.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from boot_jax import (
    CosineSchedule,
    Objective,
    Teacher,
    gaussian_mixture,
    sample_ode,
    time_grid,
)
from boot_jax.conditions import Conditions
from boot_jax.evaluation.metrics import normalized_error
from boot_jax.solvers import add_noise
from boot_jax.teachers.mixture import sample_mixture
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import make_train_step

SCHEDULE, SHAPE, BATCH_SIZE = CosineSchedule(), (1, 1, 2), 256
MEANS = jnp.array([[-1.0, -1.0], [1.0, 0.0], [-0.5, 1.2]]).reshape(3, *SHAPE)
POINTS = gaussian_mixture(MEANS, [0.3, 0.3, 0.3], SCHEDULE)

network = eqx.nn.MLP(5, 2, 64, 3, jax.nn.silu, key=jax.random.key(0))
params, static = eqx.partition(network, eqx.is_inexact_array)


def apply(params, x, t, condition):
    """Points and times in, points out: ``denoise`` and ``signal`` in one."""
    waves = jnp.stack([t, jnp.sin(jnp.pi * t), jnp.cos(jnp.pi * t)], axis=1)
    inputs = jnp.concatenate([x.reshape(-1, 2), waves], axis=1)
    return jax.vmap(eqx.combine(params, static))(inputs).reshape(x.shape)


def denoising(params, ema_params, frozen, batch, key, progress):
    """How your teacher was trained is its own affair."""
    x_key, eps_key, t_key = jax.random.split(key, 3)
    x_0 = sample_mixture(POINTS, x_key, BATCH_SIZE)
    eps = jax.random.normal(eps_key, x_0.shape)
    t = jax.random.uniform(t_key, (BATCH_SIZE,))
    x_0_hat = apply(params, add_noise(SCHEDULE, x_0, eps, t), t, None)
    return jnp.mean((x_0_hat - x_0) ** 2), {}


def train(loss, params, frozen, num_steps):
    """All the steps in one dispatch; gives the moving average of the parameters."""
    optimizer = create_optimizer(
        learning_rate=3e-3, num_steps=num_steps, decay="cosine"
    )
    state = create_state(jax.tree.map(jnp.copy, params), optimizer)
    counts = {"num_steps": num_steps, "steps_per_dispatch": num_steps}
    step = make_train_step(loss, optimizer, ema_decay=0.99, **counts)
    return step(state, frozen, None, jax.random.key(1))[0].ema_params


teacher = Teacher(
    denoise=apply,
    params=train(denoising, params, None, 1000),
    schedule=SCHEDULE,
    sample_shape=SHAPE,
)

objective = Objective(kind="continuous", boundary_weight=0.0, adaptive_power=1.0)
distillation = distillation_loss(
    signal=apply,
    denoise=teacher.denoise,
    schedule=SCHEDULE,
    objective=objective,
    conditions=Conditions(),
    sample_shape=SHAPE,
    batch_size=BATCH_SIZE,
)
start = teacher.params
student = train(distillation, start, teacher.params, 2000)

eps = jax.random.normal(jax.random.key(2), (1024, *SHAPE))
exact = sample_ode(
    lambda x_t, t: teacher.denoise(teacher.params, x_t, t, None),
    SCHEDULE,
    eps,
    time_grid(64),
    "heun",
)
t_min = jnp.full(1024, objective.t_min)
for name, params in (("before", start), ("after", student)):
    error = normalized_error(apply(params, eps, t_min, None), exact)
    print(f"error {name}: {error:.4f}")
