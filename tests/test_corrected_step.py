"""The step of a corrected student: what is drawn, what is trained, what is kept."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boot_jax import sharding
from boot_jax.auxiliary import create_auxiliary
from boot_jax.conditions import Conditions
from boot_jax.objectives import Correction, Objective
from boot_jax.schedules import get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, as_sampled, network_denoiser
from boot_jax.training import health
from boot_jax.training.correction import corrected_loss, split_share
from boot_jax.training.distillation import distillation_loss
from boot_jax.training.state import create_optimizer, create_state
from boot_jax.training.step import Loss, make_train_step

COSINE = get_schedule("cosine")
SHAPE, BATCH, CLASSES = (4, 4, 1), 16, 3


def key_of(seed: int) -> Any:
    return jax.random.key(seed, impl="threefry2x32")


class Small(nn.Module):
    """A network that is compiled in no time, with parameters that can be split."""

    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        told = time / 1000 + 0.3 * condition["label"].astype(jnp.float32)
        for name in self.added_embeddings:
            init = nn.initializers.zeros_init()
            told = told + self.param(f"added_{name}", init, ()) * (added or {})[name]
        h = nn.Dense(64, name="first")(x + jnp.sin(told)[:, None, None, None])
        return nn.Dense(1, name="last")(jnp.tanh(h))


def teacher_of() -> Teacher:
    network = Small()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: network.init(
            key_of(0),
            jnp.zeros((1, *SHAPE)),
            jnp.zeros((1,)),
            {"label": jnp.zeros((1,), jnp.int32)},
        )["params"]
    )
    return Teacher(
        denoise=network_denoiser(network, COSINE, "v_prediction"),
        params=jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
            shapes,
        ),
        schedule=COSINE,
        sample_shape=SHAPE,
        num_classes=CLASSES,
        network=network,
        prediction_type="v_prediction",
    )


TEACHER = teacher_of()
RANGE = (1.0, 3.0)


def loss_of(
    kind: str = "continuous",
    batch_sharding: Any = None,
    reference_variance: float | None = None,
    **correction: Any,
) -> tuple[Loss, Any]:
    """A corrected loss of a guided teacher, whose scale is drawn; and the student."""
    options: dict[str, Any] = {"strength": 1.0} | correction
    objective = Objective(
        kind=kind,
        solver="ddim",
        boundary_weight=1.0 if kind == "boot" else 0.0,
        boundary_share=0.5,
        correction=Correction(**options),
    )
    conditions = Conditions(CLASSES, RANGE)
    denoise = as_sampled(
        TEACHER.denoise, null_condition=conditions.null(), guidance_scale=None
    )
    student = create_student(TEACHER, guidance_range=RANGE)
    shared: dict[str, Any] = {
        "signal": student.signal,
        "denoise": denoise,
        "schedule": COSINE,
        "objective": objective,
        "batch_sharding": batch_sharding,
    }
    loss = distillation_loss(
        conditions=conditions, sample_shape=SHAPE, batch_size=BATCH, **shared
    )
    if objective.correction.strength == 0:
        return loss, student
    rank = objective.correction.lora_rank
    return corrected_loss(
        loss,
        network=create_auxiliary(TEACHER, guidance_range=RANGE, lora_rank=rank),
        reference_variance=reference_variance,
        **shared,
    ), student


OPTIMIZER = create_optimizer(learning_rate=1e-2, num_steps=12)


def start_of(loss: Loss, student: Any) -> Any:
    own = None if loss.auxiliary is None else loss.auxiliary.create(key_of(1))
    params = jax.tree.map(jnp.asarray, student.init(key_of(2)))
    state = create_state(params, OPTIMIZER, own)
    return jax.tree.map(lambda leaf: jnp.array(leaf), state)  # may be donated


def step_of(loss: Loss, **options: Any) -> Any:
    return make_train_step(loss, OPTIMIZER, ema_decay=0.9, num_steps=12, **options)


def run(steps: int = 2, options: Any = None, **made: Any) -> tuple[Any, list[Any]]:
    loss, student = loss_of(**made)
    step, state, found = step_of(loss, **(options or {})), start_of(loss, student), []
    for _ in range(steps):
        state, metrics = step(state, TEACHER.params, None, key_of(3))
        found.append(metrics)
    return state, found


def assert_close(a: Any, b: Any, rtol: float = 2e-4, atol: float = 1e-5) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def test_a_share_is_every_so_many_th_row():
    tree = {"a": jnp.arange(12), "b": jnp.arange(24).reshape(12, 2)}
    share, rest = split_share(tree, 4)
    np.testing.assert_array_equal(share["a"], [0, 4, 8])
    np.testing.assert_array_equal(rest["a"], [1, 2, 3, 5, 6, 7, 9, 10, 11])
    np.testing.assert_array_equal(share["b"][:, 0], [0, 8, 16])
    np.testing.assert_array_equal(rest["b"][:, 1] - rest["b"][:, 0], np.ones(9))


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_a_step_trains_both_networks(kind):
    loss, student = loss_of(kind, reference_variance=0.5)
    before = start_of(loss, student)
    after, (metrics,) = run(1, kind=kind, reference_variance=0.5)
    assert set(metrics) >= {
        "loss/trajectory",
        "loss/correction",
        "loss/auxiliary",
        "correction/residual",
        "correction/trajectory_residual",
        "correction/diversity",
        "correction/variance",
        "correction/variance_ratio",
    }
    ratio = metrics["correction/variance"] / metrics["correction/variance_ratio"]
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-5)
    for name in ("params", "auxiliary"):
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()),
            getattr(after, name),
            getattr(before, name),
        )
        assert not all(jax.tree.leaves(same)), name
    # The auxiliary network is told scales, and labels, as the student is.
    assert "added_guidance_scale" in after.auxiliary.params
    total = metrics["loss/trajectory"] + metrics["loss/correction"]
    total = total + metrics.get("loss/boundary", 0.0)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_the_strength_holds_within_the_step():
    """The correction's value is the square of what it was scaled to, or larger."""
    for strength in (0.5, 2.0):
        _, (metrics,) = run(1, strength=strength)
        wanted = strength * metrics["correction/trajectory_residual"][0]
        # The mean square is at least the square of the mean.
        assert wanted**2 * 0.999 <= metrics["loss/correction"][0] < 3 * wanted**2


def test_without_strength_nothing_is_changed():
    """Neither the state, nor the loss, nor what it draws."""
    plain, _ = loss_of(strength=0.0)
    state, (metrics,) = run(1, strength=0.0)
    assert plain.auxiliary is None and state.auxiliary is None
    assert not any(name.startswith("correction") for name in metrics)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert not any("auxiliary" in jax.tree_util.keystr(path) for path, _ in leaves)
    corrected, _ = loss_of()
    drawn = corrected.draw(None, key_of(5), 0.0, 1)[0]
    assert_close(drawn, plain.draw(None, key_of(5), 0.0, 1), 0, 0)


def test_the_correction_alone():
    """``trajectory_weight = 0``: the trajectories only measure."""
    _, (metrics,) = run(1, trajectory_weight=0.0)
    np.testing.assert_allclose(metrics["loss"], metrics["loss/correction"], rtol=1e-6)
    assert metrics["loss/trajectory"] > 0


@pytest.mark.parametrize("updates", [1, 3])
def test_the_auxiliary_network_learns_before_the_student_moves(updates):
    """Its updates, written out: of fresh noise, on the samples of the student as is."""
    loss, student = loss_of(updates=updates)
    auxiliary = loss.auxiliary
    assert auxiliary is not None
    state = start_of(loss, student)
    key = jax.random.fold_in(key_of(3), 0)
    inputs = loss.draw(None, key, 0.0, 1)
    params, moments, seen = state.auxiliary.params, state.auxiliary.opt_state, []
    slope = jax.jit(jax.grad(auxiliary.value, has_aux=True))
    for index in range(updates):
        own_key = jax.random.fold_in(jax.random.fold_in(key, 2**31), index)
        part = jax.tree.map(lambda x: x[0], auxiliary.draw(inputs, own_key, 1))
        seen.append(part[0])
        grads, _ = slope(params, state.params, TEACHER.params, part)
        with jax.numpy_dtype_promotion("standard"):
            moved, moments = auxiliary.optimizer.update(grads, moments, params)
        params = jax.tree.map(jnp.add, params, moved)
    after, _ = run(1, updates=updates)
    assert_close(after.auxiliary.params, params)
    assert len({float(eps[0, 0, 0, 0]) for eps in seen}) == updates


def test_the_auxiliary_networks_rate_falls_with_the_training():
    moved = {}
    for decay in ("constant", "cosine"):
        loss, student = loss_of(decay=decay)
        state = start_of(loss, student)
        state = state.replace(step=jnp.full_like(state.step, 9))  # of 12
        before = jax.tree.map(np.array, state.auxiliary.params)
        after, _ = step_of(loss)(state, TEACHER.params, None, key_of(3))
        moved[decay] = jax.tree.map(np.subtract, after.auxiliary.params, before)
    left = (1 + np.cos(0.75 * np.pi)) / 2
    assert_close(
        moved["cosine"], jax.tree.map(lambda move: left * move, moved["constant"])
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved["cosine"])) > 1e-5


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 1), (2, 2)])
def test_eight_devices_give_the_step_of_one(fsdp, tensor):
    mesh = sharding.create_mesh(-1, fsdp, tensor)
    made = dict(kind="boot", lora_rank=2 if fsdp == 1 else 0, share=0.5)
    rules = sharding.DEFAULT_RULES
    if tensor > 1:
        rules = ((r"first/(kernel|bias)$", "tensor:out"), *rules)
    alone, expected = run(**made)
    loss, student = loss_of(
        batch_sharding=sharding.batch_sharding(mesh, axis=1), **made
    )
    state = start_of(loss, student)
    shardings = sharding.parameter_shardings(state, mesh, rules, min_size=64)
    state = sharding.place(state, shardings)
    frozen = sharding.place(TEACHER.params, sharding.replicated(mesh))
    step = step_of(loss, state_sharding=shardings)
    for metrics in expected:
        state, found = step(state, frozen, None, key_of(3))
        for name in metrics:
            np.testing.assert_allclose(found[name], metrics[name], rtol=1e-3, atol=1e-6)
    assert_close(alone.params, state.params, rtol=5e-3, atol=1e-4)
    if fsdp > 1:
        split = state.auxiliary.params["first"]["bias"].sharding
        assert not split.is_fully_replicated
        assert ("tensor" in split.spec) == (tensor > 1)


def test_steps_in_one_dispatch_are_the_steps_one_by_one():
    one, singles = run(3, updates=2)
    together, (metrics,) = run(1, updates=2, options={"steps_per_dispatch": 3})
    losses = [float(m["loss"][0]) for m in singles]
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-3)
    assert_close(one.auxiliary.params, together.auxiliary.params, 1e-3, 1e-4)


def test_microbatches_draw_and_average_alike():
    """But the student's scale is of each microbatch."""
    plain, (one,) = run(1)
    parts, (other,) = run(1, options={"microbatches": 2})
    for name, rtol in (
        ("loss/auxiliary", 1e-4),
        ("loss/trajectory", 1e-4),
        ("correction/residual", 0.01),
    ):
        np.testing.assert_allclose(one[name], other[name], rtol=rtol)
    # A step of Adam's size, but for gradients that are all but zero.
    difference = jax.tree.map(
        lambda a, b: jnp.median(jnp.abs(a - b)),
        plain.auxiliary.params,
        parts.auxiliary.params,
    )
    assert max(jax.tree.leaves(difference)) < 1e-5


def test_an_auxiliary_network_that_breaks_is_a_step_to_skip():
    loss, student = loss_of()
    step = step_of(loss, skip_nonfinite=True)
    state = start_of(loss, student)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.auxiliary)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(
        state.replace(auxiliary=broken), TEACHER.params, None, key_of(3)
    )
    assert metrics[health.SKIPPED][0] == 1 and state.step == 1
    assert_close(state.params, before, 0, 0)


@functools.cache
def low_rank() -> Any:
    return run(2, lora_rank=2)


def test_adapters_are_what_is_kept_and_trained():
    state, metrics = low_rank()
    assert set(state.auxiliary.params) == {"adapters", "added"}
    assert all(np.isfinite(m["loss"]).all() for m in metrics)
    for own in state.auxiliary.params["adapters"].values():
        assert np.asarray(own["lora_up"]).any()
