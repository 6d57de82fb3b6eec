"""A student in Equinox: its arrays are the parameters, the rest is static.

python examples/own_teacher_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from boot_jax import (
    FlowSchedule,
    Objective,
    continuous_loss,
    draw_times,
    gaussian_mixture,
    sample_ode,
    time_grid,
)

schedule = FlowSchedule()
objective = Objective(kind="continuous", boundary_weight=0.0, adaptive_power=1.0)
# Any function (params, x_t, t, condition) -> x_0 can teach; this one is exact.
means = jnp.array([[-1.0, -1.0], [1.0, 0.0], [-0.5, 1.2]]).reshape(3, 1, 1, 2)
teacher = gaussian_mixture(means, [0.3, 0.3, 0.3], schedule)


def features(eps, t):
    flat, t = eps.reshape(-1, 2), t[:, None]
    waves = [jnp.sin(jnp.pi * t), jnp.cos(jnp.pi * t)]
    return jnp.concatenate([flat, t, *waves], axis=-1)


network = eqx.nn.MLP(5, 2, 64, 3, activation=jax.nn.silu, key=jax.random.key(0))
params, static = eqx.partition(network, eqx.is_inexact_array)


def signal(params, eps, t, condition):
    mlp = eqx.combine(params, static)
    return jax.vmap(mlp)(features(eps, t)).reshape(eps.shape)


@jax.jit
def step(params, state, key):
    noise_key, time_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, (256, 1, 1, 2))
    t = draw_times(objective, time_key, 256)
    grads, _ = jax.grad(continuous_loss, has_aux=True)(
        params,
        teacher.params,
        eps,
        t,
        None,
        signal=signal,
        denoise=teacher.denoise,
        schedule=schedule,
        objective=objective,
    )
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state


def error(params):
    """Mean squared distance to the teacher's ODE, over its variance."""
    eps = jax.random.normal(jax.random.key(9), (1024, 1, 1, 2))
    exact = sample_ode(
        lambda x_t, t: teacher.denoise(teacher.params, x_t, t, None),
        schedule,
        eps,
        time_grid(200),
    )
    found = signal(params, eps, jnp.full(1024, objective.t_min), None)
    return float(jnp.mean((found - exact) ** 2) / jnp.var(exact))


optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
state = optimizer.init(params)
print(f"error before: {error(params):.3f}")
for key in jax.random.split(jax.random.key(1), 1500):
    params, state = step(params, state, key)
print(f"error after: {error(params):.3f}")
