"""A teacher in Flax Linen, which is also the network of its student.

python examples/own_teacher_linen.py

A denoiser is trained on points in the plane; `create_student` makes a student of it,
which starts from its weights and learns without the points. Prints how far the
student's points are from where the teacher's ODE leads, over the variance there, before
and after.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from boot_jax import (
    CosineSchedule,
    Objective,
    Teacher,
    create_student,
    gaussian_mixture,
    network_denoiser,
    sample_ode,
    time_grid,
)
from boot_jax.conditions import Conditions
from boot_jax.evaluation.metrics import normalized_error
from boot_jax.models.layers import AddedEmbeddings
from boot_jax.teachers.mixture import sample_mixture
from boot_jax.training.denoising import denoising_loss
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import make_train_step

SCHEDULE, SHAPE, BATCH_SIZE = CosineSchedule(), (1, 1, 2), 256
MEANS = jnp.array([[-1.0, -1.0], [1.0, 0.0], [-0.5, 1.2]]).reshape(3, *SHAPE)
POINTS = gaussian_mixture(MEANS, [0.3, 0.3, 0.3], SCHEDULE)


class Network(nn.Module):
    """A perceptron; `create_student` needs this signature and this field."""

    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, time, condition=None, added=None):
        angles = jnp.pi * time[:, None] / 1000  # the network's own time is 0 to 1000
        waves = jnp.concatenate([angles, jnp.sin(angles), jnp.cos(angles)], axis=1)
        h = nn.Dense(64)(jnp.concatenate([x.reshape(-1, 2), waves], axis=1))
        # Empty in a teacher; in a student the target time, zero before training.
        h = h + AddedEmbeddings(self.added_embeddings, 64, name="added_embeddings")(
            added
        )
        for _ in range(2):
            h = nn.Dense(64)(nn.silu(h))
        return nn.Dense(2)(nn.silu(h)).reshape(x.shape)


def train(loss, params, frozen, num_steps, batches=None):
    """All the steps in one dispatch; gives the moving average of the parameters."""
    optimizer = create_optimizer(
        learning_rate=3e-3, num_steps=num_steps, decay="cosine"
    )
    state = create_state(jax.tree.map(jnp.copy, params), optimizer)
    counts = {"num_steps": num_steps, "steps_per_dispatch": num_steps}
    step = make_train_step(loss, optimizer, ema_decay=0.99, **counts)
    return step(state, frozen, batches, jax.random.key(1))[0].ema_params


network = Network()
params = network.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))["params"]
denoising = denoising_loss(
    network=network,
    schedule=SCHEDULE,
    prediction_type="v_prediction",
    conditions=Conditions(),
)
data = sample_mixture(POINTS, jax.random.key(3), 1000 * BATCH_SIZE)
batches = {"image": data.reshape(1000, BATCH_SIZE, *SHAPE)}
teacher = Teacher(
    denoise=network_denoiser(network, SCHEDULE, "v_prediction"),
    params=train(denoising, params, None, 1000, batches),
    schedule=SCHEDULE,
    sample_shape=SHAPE,
    network=network,
    prediction_type="v_prediction",
)
learner = create_student(teacher)

objective = Objective(kind="continuous", boundary_weight=0.0, adaptive_power=1.0)
distillation = distillation_loss(
    signal=learner.signal,
    denoise=teacher.denoise,
    schedule=SCHEDULE,
    objective=objective,
    conditions=Conditions(),
    sample_shape=SHAPE,
    batch_size=BATCH_SIZE,
)
start = learner.init(jax.random.key(4))
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
    error = normalized_error(learner.signal(params, eps, t_min, None), exact)
    print(f"error {name}: {error:.4f}")
