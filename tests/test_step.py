"""What happens in a step, for both losses: one update, a function of seed and step."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from boot_jax import sharding
from boot_jax.conditions import Conditions
from boot_jax.models import create_network
from boot_jax.objectives import Objective
from boot_jax.schedules import get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, network_denoiser
from boot_jax.teachers.checkpoint import initialiser
from boot_jax.training import health
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import TrainState, create_optimizer, create_state
from boot_jax.training.step import Loss, make_train_step

COSINE = get_schedule("cosine")
SHAPE = (4, 4, 1)


def key_of(seed: int) -> Any:
    return jax.random.key(seed, impl="threefry2x32")


def random_params(shapes: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """From numpy, so that no initialiser of a library changes them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32),
        shapes,
    )


def transformer(num_classes: int | None = None) -> nn.Module:
    return create_network(
        "dit",
        sample_shape=SHAPE,
        num_classes=num_classes,
        patch_size=2,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
    )


class Small(nn.Module):
    """A network that is compiled in no time, with parameters that can be split."""

    num_classes: int | None = None
    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        told = time / 1000 + sum((added or {}).values(), start=jnp.zeros_like(time))
        if self.num_classes is not None:
            told = told + 0.3 * condition["label"].astype(jnp.float32)
        h = nn.Dense(64, name="first")(x + jnp.sin(told)[:, None, None, None])
        return nn.Dense(1, name="last")(jnp.tanh(h))


def teacher_of(network: nn.Module, num_classes: int | None = None) -> Teacher:
    shapes = jax.eval_shape(initialiser(network, SHAPE, num_classes), key_of(0))
    return Teacher(
        denoise=network_denoiser(network, COSINE, "v_prediction"),
        params=random_params(shapes),
        schedule=COSINE,
        sample_shape=SHAPE,
        num_classes=num_classes,
        network=network,
        prediction_type="v_prediction",
    )


def distilling(
    objective: Objective,
    num_classes: int | None = None,
    network: nn.Module | None = None,
    **options: Any,
) -> tuple[Any, TrainState, Any]:
    """A compiled step, a state that is not at its beginning, and the teacher's."""
    teacher = teacher_of(network or Small(num_classes), num_classes)
    student = create_student(teacher, t_max=objective.t_max)
    loss = distillation_loss(
        signal=student.signal,
        denoise=teacher.denoise,
        schedule=COSINE,
        objective=objective,
        conditions=Conditions(num_classes),
        sample_shape=SHAPE,
        batch_size=16,
        batch_sharding=options.pop("batch_sharding", None),
    )
    optimizer = create_optimizer(learning_rate=1e-2, num_steps=12)
    shapes = jax.eval_shape(student.init, key_of(0))
    state = create_state(random_params(shapes, seed=1), optimizer)
    step = make_train_step(loss, optimizer, ema_decay=0.99, num_steps=12, **options)
    return step, state, teacher.params


def copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def norm(tree: Any) -> float:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return float(np.linalg.norm(np.concatenate(leaves)))


GOLDEN = {
    "boot": {
        "loss": 1.26951,
        "loss/trajectory": 0.371573,
        "loss/boundary": 0.897939,
        "grad_norm": 19.5036,
        "update_norm": 0.138924,
    },
    "continuous": {
        "loss": 1.66848,
        "loss/trajectory": 0.738177,
        "loss/boundary": 0.930299,
        "grad_norm": 16.2714,
        "update_norm": 1.01355,
    },
}


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_golden_step(kind):
    """Nothing of what a step computes changes unnoticed."""
    network = transformer() if kind == "continuous" else None
    step, state, frozen = distilling(Objective(kind=kind), network=network)
    before = copy(state.params)
    state, metrics = step(state, frozen, None, key_of(3))
    scalars = {n: metric for n, metric in metrics.items() if metric.ndim == 1}
    found = {name: float(metric[0]) for name, metric in scalars.items()}
    moved = jax.tree.map(lambda new, old: new - old, state.params, before)
    found["update_norm"] = norm(moved)
    assert found == pytest.approx(GOLDEN[kind], rel=2e-3), (
        "one training step gives other numbers than it used to. If a change of the "
        "method, the network, the optimizer or the order of random draws was meant to "
        "do this, put these in GOLDEN and say so in the commit; if not, it is a bug. "
        f"Now: {found}"
    )


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_steps_in_one_dispatch_are_the_steps_one_by_one(kind):
    objective = Objective(kind=kind, target_network="ema", time_order="progressive")
    single, state, frozen = distilling(objective)
    many, *_ = distilling(objective, steps_per_dispatch=3)
    one, together = copy(state), copy(state)
    losses = []
    for _ in range(3):
        one, metrics = single(one, frozen, None, key_of(3))
        losses.append(float(metrics["loss"][0]))
    together, metrics = many(together, frozen, None, key_of(3))
    assert metrics["loss"].shape == metrics["grad_norm"].shape == (3,)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)
    assert one.step == together.step == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        one.params,
        together.params,
    )


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_give_the_loss_of_one(fsdp, num_classes):
    """With the batch over all of them, and the parameters over some."""
    objective = Objective(kind="boot", boundary_share=0.5)
    mesh = sharding.create_mesh(-1, fsdp)
    alone, state, frozen = distilling(objective, num_classes)
    shardings = sharding.parameter_shardings(state, mesh, min_size=64)
    shared, *_ = distilling(
        objective,
        num_classes,
        batch_sharding=sharding.batch_sharding(mesh, axis=1),
        state_sharding=shardings,
    )
    split = sharding.place(state, shardings)
    assert fsdp == 1 or not all(
        where.is_fully_replicated for where in jax.tree.leaves(shardings)
    )
    given = sharding.place(frozen, sharding.replicated(mesh))
    for _ in range(2):
        state, expected = alone(state, frozen, None, key_of(3))
        split, found = shared(split, given, None, key_of(3))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    where = jax.tree.map(lambda leaf: leaf.sharding, split)
    same = jax.tree.map(
        lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), where, shardings, split
    )
    assert all(jax.tree.leaves(same))


def test_a_step_is_a_function_of_seed_and_step():
    step, state, frozen = distilling(Objective(solver="ddim"))
    losses = {}
    for seed, at in ((3, 0), (3, 0), (4, 0), (3, 1)):
        begun = copy(state).replace(step=jnp.asarray(at, jnp.int32))
        _, metrics = step(begun, frozen, None, key_of(seed))
        losses.setdefault((seed, at), set()).add(float(metrics["loss"][0]))
    assert all(len(values) == 1 for values in losses.values())
    assert len(set().union(*losses.values())) == 3


def quadratic(params, ema_params, frozen, batch, key, progress):
    """A loss whose every gradient is known: ``|a - batch|^2 / 2``."""
    loss = jnp.sum((params["a"] - batch["image"]) ** 2) / 2
    return loss, {"progress": jnp.asarray(progress, jnp.float32)}


def test_an_update_by_hand():
    """Gradient, its norm, the optimizer's step, the average and the counts."""
    step = make_train_step(quadratic, optax.sgd(0.5), ema_decay=0.99, num_steps=4)
    state = create_state({"a": jnp.asarray([1.0, 2.0])}, optax.sgd(0.5))
    batch = {"image": jnp.asarray([[4.0, 6.0]])}
    state, metrics = step(state, None, batch, key_of(0))
    assert float(metrics["loss"][0]) == 12.5 and float(metrics["grad_norm"][0]) == 5.0
    np.testing.assert_allclose(state.params["a"], [2.5, 4.0])
    # The first decay is 1 / 10.
    np.testing.assert_allclose(state.ema_params["a"], [2.35, 3.8], rtol=1e-6)
    assert state.step == 1 and metrics["progress"][0] == 0.0
    state, metrics = step(state, None, batch, key_of(0))
    assert state.step == 2 and metrics["progress"][0] == 0.25


def test_every_step_of_a_dispatch_gets_its_own_batch():
    step = make_train_step(
        quadratic, optax.sgd(1.0), ema_decay=0.0, num_steps=4, steps_per_dispatch=3
    )
    state = create_state({"a": jnp.zeros(1)}, optax.sgd(1.0))
    batches = {"image": jnp.asarray([[2.0], [4.0], [10.0]])}
    state, metrics = step(state, None, batches, key_of(0))
    # Full steps: each lands on its batch.
    np.testing.assert_allclose(metrics["loss"], [2.0, 2.0, 18.0])
    np.testing.assert_allclose(state.params["a"], [10.0])


def test_the_state_is_donated():
    step, state, frozen = distilling(Objective(solver="ddim"))
    step(state, frozen, None, key_of(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def losses_of(step, state, frozen, steps=3):
    found = []
    for _ in range(steps):
        state, metrics = step(state, frozen, None, key_of(3))
        found.append(metrics)
    return state, found


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"boundary_share": 0.25, "solver": "ddim"},
        {"kind": "continuous", "boundary_weight": 0.0, "adaptive_power": 1.0},
        {"solver": "heun", "target_network": "ema"},
    ],
)
def test_microbatches_change_nothing(microbatches, options):
    """The same noise, times and labels; gradient and metrics equal to rounding."""
    both = [
        losses_of(*distilling(Objective(**options), num_classes=3, microbatches=m))
        for m in (1, microbatches)
    ]
    for (plain_state, plain), (parts_state, parts) in [both]:
        for one, other in zip(plain, parts, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_allclose(one[name], other[name], rtol=2e-5, atol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            plain_state.params,
            parts_state.params,
        )


def test_microbatches_split_over_devices():
    mesh = sharding.create_mesh(4, 2)
    options = dict(batch_sharding=sharding.batch_sharding(mesh, axis=1))
    objective = Objective(boundary_share=1.0, solver="ddim")
    _, plain = losses_of(*distilling(objective))
    step, state, frozen = distilling(objective, microbatches=2, **options)
    everywhere = sharding.replicated(mesh)
    state, frozen = sharding.place((state, frozen), everywhere)
    _, parts = losses_of(step, state, frozen)
    for one, other in zip(plain, parts, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=2e-5)


def breaking_at(*steps: int) -> Loss:
    """`quadratic`, but for some steps whose gradient is not finite."""

    def draw(batch: Any, key: Any, progress: Any, m: int) -> Any:
        bad = jnp.any(jnp.isclose(progress * 8, jnp.asarray(steps, jnp.float32)))
        return {"bad": bad[None]}

    def value(params: Any, ema_params: Any, frozen: Any, inputs: Any, key: Any):
        factor = jnp.where(inputs["bad"], jnp.inf, 1.0)
        loss = jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 2) * factor
        return loss, {}

    return Loss(draw, value)


def run_breaking(skip: bool, k: int = 1):
    optimizer = create_optimizer(learning_rate=0.1, num_steps=8)
    step = make_train_step(
        breaking_at(2, 5),
        optimizer,
        ema_decay=0.9,
        num_steps=8,
        steps_per_dispatch=k,
        skip_nonfinite=skip,
    )
    state = create_state({"a": jnp.ones(2), "b": jnp.ones(3)}, optimizer)
    states, metrics = [copy(state)], []
    for _ in range(8 // k):
        state, found = step(state, None, None, key_of(0))
        states.append(copy(state))
        metrics.append(found)
    return states, metrics


def test_a_step_that_is_not_finite_names_its_tensor_group():
    _, metrics = run_breaking(skip=False)
    for index, found in enumerate(metrics[:3]):
        np.testing.assert_array_equal(found[health.GRADIENTS][0], [True, index != 2])
    with pytest.raises(FloatingPointError, match=r"step 3: .*finite: gradients of b"):
        values = {name: np.asarray(metric) for name, metric in metrics[2].items()}
        health.Health(health.group_names({"a": 0, "b": 0})).examine(values, 2)


@pytest.mark.parametrize("k", [1, 4])
def test_a_skipped_step_leaves_all_but_the_count(k):
    states, metrics = run_breaking(skip=True, k=k)
    skipped = np.concatenate([found[health.SKIPPED] for found in metrics])
    np.testing.assert_array_equal(skipped, [0, 0, 1, 1, 1, 2, 2, 2])
    assert states[-1].step == 8 and states[-1].skipped == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))
    if k == 1:
        for bad, good in ((2, False), (5, False), (3, True)):
            before, after = states[bad], states[bad + 1]
            same = jax.tree.map(
                lambda a, b: bool((a == b).all()),
                (before.params, before.ema_params, before.opt_state),
                (after.params, after.ema_params, after.opt_state),
            )
            assert all(jax.tree.leaves(same)) is not good


def compiled_on(mesh: Any, **options: Any) -> Any:
    """The step of the small transformer, compiled for a mesh."""
    objective = Objective(boundary_share=0.5)
    network = transformer()
    step, state, frozen = distilling(objective, network=network, **options)
    params = sharding.parameter_shardings(state.params, mesh, min_size=64)
    where = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    # Adam's moments live where their parameters do.
    where = where.replace(params=params, ema_params=params)
    del step
    step, state, frozen = distilling(
        objective,
        network=network,
        batch_sharding=sharding.batch_sharding(mesh, axis=1),
        state_sharding=where,
        metrics_sharding=sharding.replicated(mesh),
        **options,
    )
    state = sharding.place(state, where)
    frozen = sharding.place(frozen, sharding.replicated(mesh))
    return step.lower(state, frozen, None, key_of(0)).compile()


def collectives(compiled: Any) -> set[str]:
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text()))


@pytest.mark.slow
@pytest.mark.usefixtures("without_cache")
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_data_parallel_step_reduces_gradients_and_gathers_nothing(microbatches):
    mesh = sharding.create_mesh(4, 1, 2)
    assert collectives(compiled_on(sharding.create_mesh(), microbatches=1)) == {
        "all-reduce"
    }
    assert collectives(compiled_on(mesh, microbatches=microbatches)) == {"all-reduce"}
    # The measure does see others.
    assert "all-gather" in collectives(compiled_on(sharding.create_mesh(4, 2)))


@pytest.mark.slow
@pytest.mark.usefixtures("without_cache")
def test_parameters_take_less_of_each_device_with_fsdp():
    sizes = {}
    for fsdp in (1, 2, 4, 8):
        analysis = compiled_on(sharding.create_mesh(-1, fsdp)).memory_analysis()
        sizes[fsdp] = analysis.argument_size_in_bytes
    print("bytes of arguments on each device, by fsdp:", sizes)
    teacher = teacher_of(transformer()).params
    replicated = 4 * sum(leaf.size for leaf in jax.tree.leaves(teacher))
    split = {fsdp: size - replicated for fsdp, size in sizes.items()}
    assert split[1] > split[2] > split[4] > split[8]
    # Two of four copies are split here; the moments are in test_sharding.py.
    assert split[2] < 0.8 * split[1]
