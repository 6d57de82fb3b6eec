"""What is compiled: the same under every transformation, once, without the teacher."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from boot_jax.conditions import Conditions
from boot_jax.models.dit import DiT
from boot_jax.objectives import LOSSES, Objective, draw_times
from boot_jax.schedules import get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, network_denoiser
from boot_jax.teachers.mixture import gaussian_mixture
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import create_state
from boot_jax.training.step import make_train_step

COSINE = get_schedule("cosine")
SHAPE = (4, 4, 1)
OPTIMIZER = optax.sgd(1e-2)


def mixture(num_components: int) -> Teacher:
    means = np.random.default_rng(0).normal(size=(num_components, *SHAPE))
    labels = [index % 3 for index in range(num_components)]
    return gaussian_mixture(
        means.astype(np.float32), np.ones(num_components), COSINE, labels=labels
    )


class Small(nn.Module):
    """A student's network that is compiled in no time."""

    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        told = time / 1000 + sum(added.values(), start=jnp.zeros_like(time))
        told = told + condition["label"].astype(jnp.float32)
        return nn.Dense(1)(jnp.tanh(x + told[:, None, None, None]))


def transformer(width: int) -> Teacher:
    module = DiT(
        1, patch_size=4, hidden_size=width, num_layers=1, num_heads=1, num_classes=3
    )
    label = {"label": jnp.zeros((1,), jnp.int32)}
    image, time = jnp.zeros((1, *SHAPE)), jnp.zeros((1,))
    shapes = jax.eval_shape(module.init, jax.random.key(0), image, time, label)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes["params"]
    )
    return Teacher(
        denoise=network_denoiser(module, COSINE, "v_prediction"),
        params=params,
        schedule=COSINE,
        sample_shape=SHAPE,
        num_classes=3,
        network=module,
        prediction_type="v_prediction",
    )


def made(teacher: Teacher, objective: Objective, captured: bool = False) -> Any:
    """A compiled step, and what it is called with; the student is always small."""
    student = create_student(teacher, network=Small())

    def denoise(params: Any, *rest: Any) -> Any:
        return teacher.denoise(teacher.params if captured else params, *rest)

    loss = distillation_loss(
        signal=student.signal,
        denoise=denoise,
        schedule=teacher.schedule,
        objective=objective,
        conditions=Conditions(num_classes=3),
        sample_shape=SHAPE,
        batch_size=4,
    )
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(None)
        return loss(*args)

    step = make_train_step(counted, OPTIMIZER, ema_decay=0.99, num_steps=10)
    state = create_state(student.init(jax.random.key(1)), OPTIMIZER)
    return step, (state, teacher.params, None, jax.random.key(2)), calls


def constant_bytes(step: Any, arguments: Any) -> int:
    """The bytes of the array constants in the program that is handed to XLA."""
    text = step.lower(*arguments).as_text()
    return sum(len(digits) // 2 for digits in re.findall(r'"0x([0-9A-F]+)"', text))


@pytest.mark.parametrize(
    "teacher_of, small, large, kind",
    [(mixture, 3, 300, "boot"), (transformer, 8, 64, "continuous")],
    ids=["mixture", "transformer"],
)
def test_the_program_does_not_grow_with_the_teacher(teacher_of, small, large, kind):
    objective = Objective(kind=kind)
    sizes, constants = [], []
    for size in (small, large):
        teacher = teacher_of(size).params
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(teacher)))
        constants.append(constant_bytes(*made(teacher_of(size), objective)[:2]))
    assert sizes[1] - sizes[0] > 15_000
    # A transformer's position embedding is a constant of its width.
    positions = 4 * (large - small) if teacher_of is transformer else 0
    assert constants[1] - constants[0] <= 4 * positions
    # The measure does see a teacher that is captured.
    captured = constant_bytes(*made(teacher_of(large), objective, captured=True)[:2])
    assert captured > 0.9 * sizes[1]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "continuous", "target_network": "ema"},
        {"kind": "boot", "solver": "ddim", "time_order": "progressive"},
    ],
)
def test_a_step_is_compiled_once(options):
    step, (state, *rest), calls = made(mixture(3), Objective(**options))
    state, metrics = step(state, *rest)
    traced = len(calls)
    losses = [float(metrics["loss"][0])]
    for _ in range(4):
        state, metrics = step(state, *rest)
        losses.append(float(metrics["loss"][0]))
    assert len(calls) == traced
    assert step._cache_size() == 1
    assert state.step == 5
    # Fresh noise in every step, from one key.
    assert len(set(losses)) == 5 and np.isfinite(losses).all()


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_losses_jit_vmap_and_shard(kind):
    teacher = mixture(3)
    params = {"a": jnp.asarray(0.7), "b": jnp.asarray(-0.4)}
    objective = Objective(kind=kind, boundary_share=0.5, solver="ddim")
    conditions = Conditions(num_classes=3)

    def signal(params: Any, eps: Any, t: Any, condition: Any) -> Any:
        bend = params["b"] * t * (1 + condition["label"].astype(t.dtype))
        return params["a"] * jnp.tanh(eps) + bend[:, None, None, None]

    @jax.jit
    def of_seed(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), 3)
        eps = jax.random.normal(keys[0], (16, *SHAPE))
        t = draw_times(objective, keys[1], 16)
        return eps, t, conditions.draw(keys[2], 16)

    def value_of(params: Any, eps: Any, t: Any, condition: Any) -> Any:
        return LOSSES[kind](
            params,
            teacher.params,
            eps,
            t,
            condition,
            signal=signal,
            denoise=teacher.denoise,
            schedule=COSINE,
            objective=objective,
        )[0]

    step = jax.value_and_grad(value_of)
    many = jax.jit(jax.vmap(lambda seed: step(params, *of_seed(seed))))(jnp.arange(2))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    compiled = jax.jit(step)
    for index in range(2):
        batch = of_seed(index)
        one_device = compiled(params, *batch)
        eight_devices = compiled(params, *jax.device_put(batch, split))
        of_many = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        for other in (eight_devices, of_many):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                other,
                one_device,
            )
