"""The losses against formulas written out by hand and closed-form trajectories."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from boot_jax.objectives import (
    LOSSES,
    Objective,
    draw_times,
    squared_error,
)
from boot_jax.schedules import get_schedule
from boot_jax.teachers.mixture import gaussian_mixture

COSINE = get_schedule("cosine")
BATCH, SHAPE = 8, (1, 2, 1)
EPS = jax.random.normal(jax.random.key(0), (BATCH, *SHAPE))
T = jnp.linspace(0.1, 1.0, BATCH)
MEANS = np.array([[-1.0, 0.5], [0.3, -0.7]], np.float32).reshape(2, *SHAPE)
TEACHER = gaussian_mixture(MEANS, [0.5, 0.4], COSINE)
PARAMS = {"a": jnp.asarray([0.7, -0.4]), "b": jnp.asarray(0.3), "c": jnp.asarray(0.2)}
OTHER = {"a": jnp.asarray([0.1, 0.6]), "b": jnp.asarray(-0.2), "c": jnp.asarray(0.5)}
KINDS = ("boot", "continuous")


def signal(params: Any, eps: Any, t: Any, condition: Any) -> Any:
    """A student small enough to be differentiated by hand."""
    del condition
    t = t[:, None, None, None]
    bend = params["b"] * t + params["c"] * t**2
    return params["a"][None, None, :, None] * jnp.tanh(eps) + bend * (1 + eps)


def bound(kind: str = "boot", schedule: Any = COSINE, **options: Any) -> Any:
    """The loss of the student above and the mixture, of arrays alone."""
    objective = Objective(kind=kind, **options)
    return lambda params, teacher_params, target_params=None, eps=EPS, t=T: LOSSES[
        kind
    ](
        params,
        teacher_params,
        eps,
        t,
        None,
        signal=signal,
        denoise=TEACHER.denoise,
        schedule=schedule,
        objective=objective,
        target_params=target_params,
    )


# --- the formulas, in numpy float64


def teach(x_t: Any, t: Any) -> np.ndarray:
    x_t, t = jnp.asarray(x_t, jnp.float32), jnp.asarray(t, jnp.float32)
    return np.asarray(TEACHER.denoise(TEACHER.params, x_t, t, None), np.float64)


def student(params: Any, t: Any) -> np.ndarray:
    y_t = signal(params, EPS, jnp.asarray(t, jnp.float32), None)
    return np.asarray(y_t, np.float64)


def levels(t: Any) -> tuple[np.ndarray, np.ndarray]:
    angle = np.pi / 2 * np.asarray(t, np.float64)[:, None, None, None]
    # The cosine as a sine of the complement: 0 at t = 1.
    return np.sin(np.pi / 2 - angle), np.sin(angle)


def frozen_target(params: Any, solver: str, delta: float) -> Any:
    """``target, k, s`` of eqs. (3) and (4)."""
    t = np.asarray(T, np.float64)
    s = np.maximum(t - delta, 0.01)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(t), levels(s)
    k = 1 - alpha_t * sigma_s / (sigma_t * alpha_s)
    eps, y = np.asarray(EPS, np.float64), student(params, t)
    f = teach(alpha_t * y + sigma_t * eps, t)
    if solver == "heun":
        y_s = y + k * (f - y)
        f = (f + teach(alpha_s * y_s + sigma_s * eps, s)) / 2
    return y + k * (f - y), k, s


def boundary(params: Any, stride: int = 1) -> float:
    eps, ones = EPS[::stride], np.ones(BATCH)
    error = student(params, ones)[::stride] - teach(eps, ones[::stride])
    return float((error**2).mean())


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("weighting", ["x0", "dt", "uniform", "noisy_image"])
def test_bootstrap_loss_is_equation_4(weighting, solver):
    delta = 0.06
    target, k, s = frozen_target(PARAMS, solver, delta)
    weight = {
        "x0": 1 / k**2,
        "dt": 1 / delta**2 + 0 * k,
        "uniform": 1 + 0 * k,
        "noisy_image": levels(s)[0] ** 2,  # the error of alpha_s y_s + sigma_s eps
    }
    expected = (weight[weighting] * (student(PARAMS, s) - target) ** 2).mean()
    loss = bound(weighting=weighting, solver=solver, delta=delta, boundary_weight=0.5)
    value, metrics = jax.jit(loss)(PARAMS, TEACHER.params)
    assert set(metrics) == {"loss/trajectory", "loss/boundary"}
    np.testing.assert_allclose(metrics["loss/trajectory"], expected, rtol=2e-4)
    np.testing.assert_allclose(metrics["loss/boundary"], boundary(PARAMS), rtol=1e-4)
    np.testing.assert_allclose(value, expected + 0.5 * boundary(PARAMS), rtol=2e-4)


def test_continuous_loss_is_equation_5():
    t = np.asarray(T, np.float64)
    alpha, sigma = levels(t)
    eps, y = np.asarray(EPS, np.float64), student(PARAMS, t)
    slope = (0.3 + 2 * 0.2 * t[:, None, None, None]) * (1 + eps)
    factor = 2 / np.pi * sigma * alpha
    target = teach(alpha * y + sigma * eps, t) + factor * slope
    expected = ((y - target) ** 2).mean()
    for options in ({}, {"derivative": "finite_difference", "delta": 0.04}):
        loss = jax.jit(bound("continuous", **options))
        metrics = loss(PARAMS, TEACHER.params)[1]
        # The central difference of a parabola is exact but at the end, where it is
        # one-sided; and there the factor is 0.
        np.testing.assert_allclose(metrics["loss/trajectory"], expected, rtol=1e-3)
        np.testing.assert_allclose(
            metrics["loss/boundary"], boundary(PARAMS), rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_boundary_takes_its_share_of_the_batch(kind):
    for share, stride in ((1.0, 1), (0.25, 4), (0.01, BATCH)):
        loss = jax.jit(bound(kind, boundary_share=share, solver="ddim"))
        _, metrics = loss(PARAMS, TEACHER.params)
        expected = boundary(PARAMS, stride)
        np.testing.assert_allclose(metrics["loss/boundary"], expected, rtol=1e-4)
    value, metrics = bound(kind, boundary_weight=0.0)(PARAMS, TEACHER.params)
    assert set(metrics) == {"loss/trajectory"}
    assert value == metrics["loss/trajectory"]


def test_any_distance_is_taken_between_implied_images():
    target, k, s = frozen_target(PARAMS, "ddim", 0.04)
    y = student(PARAMS, T)
    f = y + (target - y) / k
    implied = y + (student(PARAMS, s) - y) / k
    loss = bound(
        solver="ddim",
        boundary_weight=0.0,
        distance=lambda a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3)),
    )
    expected = np.abs(implied - f).mean()
    np.testing.assert_allclose(loss(PARAMS, TEACHER.params)[0], expected, rtol=1e-4)


def test_squared_error_is_a_mean_per_image():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
    expected = ((a - b) ** 2).reshape(3, -1).mean(1)
    actual = squared_error(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# --- where the gradient flows


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_bootstrap_gradient_sees_a_constant_target(solver):
    target, k, s = frozen_target(PARAMS, solver, 0.04)
    image = teach(EPS, np.ones(BATCH))
    constants = [jnp.asarray(x, jnp.float32) for x in (target, k, s, image)]

    def by_hand(params: Any) -> Any:
        target, k, s, image = constants
        start = signal(params, EPS, jnp.ones((BATCH,)), None)
        moved = signal(params, EPS, s, None)
        return jnp.mean((moved - target) ** 2 / k**2) + jnp.mean((start - image) ** 2)

    loss = bound(solver=solver)
    actual = jax.grad(lambda p: loss(p, TEACHER.params)[0])(PARAMS)
    expected = jax.grad(by_hand)(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-3, atol=1e-4)


def test_continuous_gradient_sees_a_constant_target():
    alpha, sigma = levels(T)
    y = student(PARAMS, T)
    slope = (0.3 + 0.4 * np.asarray(T)[:, None, None, None]) * (1 + np.asarray(EPS))
    f = teach(alpha * y + sigma * np.asarray(EPS), T)
    target = jnp.asarray(f + 2 / np.pi * sigma * alpha * slope, jnp.float32)
    expected = jax.grad(lambda p: jnp.mean((signal(p, EPS, T, None) - target) ** 2))(
        PARAMS
    )
    loss = bound("continuous", boundary_weight=0.0)
    actual = jax.grad(lambda p: loss(p, TEACHER.params)[0])(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher_or_the_target_network(kind):
    loss = bound(kind)
    both = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1, 2)))
    own, teacher, target = both(PARAMS, TEACHER.params, OTHER)
    for leaf in jax.tree.leaves((teacher, target)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_network_makes_the_target_alone(kind):
    loss = bound(kind, boundary_weight=0.0)
    value = jax.jit(loss)(PARAMS, TEACHER.params, OTHER)[0]
    if kind == "boot":
        target, k, s = frozen_target(OTHER, "heun", 0.04)
        # The signal it starts from is the target network's too.
        expected = ((student(PARAMS, s) - target) ** 2 / k**2).mean()
    else:
        alpha, sigma = levels(T)
        slope = (-0.2 + np.asarray(T)[:, None, None, None]) * (1 + np.asarray(EPS))
        f = teach(alpha * student(OTHER, T) + sigma * np.asarray(EPS), T)
        target = f + 2 / np.pi * sigma * alpha * slope
        expected = ((student(PARAMS, T) - target) ** 2).mean()
    np.testing.assert_allclose(value, expected, rtol=5e-4)


# --- the exact map of a single Gaussian


def exact_signal(params: Any, eps: Any, t: Any, condition: Any) -> Any:
    """``y_t`` of data ``N(m, s^2)`` on schedules without terminal signal.

    ``x_t = alpha m + v eps`` with ``v^2 = alpha^2 s^2 + sigma^2``, hence
    ``y_t = m + (v - sigma) / alpha eps``, here without the cancellation.
    """
    del condition
    alpha, sigma = (f(t)[:, None, None, None] for f in params["schedule"])
    v = jnp.sqrt(alpha**2 * 0.7**2 + sigma**2)
    return (
        0.4
        + params["off"] * (1 - t)[:, None, None, None]
        + (alpha * 0.7**2 / (v + sigma) * eps)
    )


def residual(kind: str, schedule: Any, off: float, **options: Any) -> float:
    teacher = gaussian_mixture(jnp.full((1, *SHAPE), 0.4), [0.7], schedule)
    loss, metrics = LOSSES[kind](
        {"off": off},
        teacher.params,
        jnp.asarray(np.asarray(EPS), jnp.asarray(0.0).dtype),
        jnp.linspace(0.3, 1.0, BATCH),
        None,
        signal=lambda params, *rest: exact_signal(
            {**params, "schedule": (schedule.alpha, schedule.sigma)}, *rest
        ),
        denoise=teacher.denoise,
        schedule=schedule,
        objective=Objective(kind=kind, t_min=0.02, **options),
    )
    assert metrics["loss/boundary"] < 1e-10
    return float(loss)


@pytest.mark.parametrize("name, options", [("cosine", {}), ("flow", {"shift": 2.0})])
def test_the_exact_map_is_a_fixed_point(name, options):
    schedule = get_schedule(name, **options)
    assert residual("continuous", schedule, 0.0) < 1e-10
    assert residual("continuous", schedule, 0.1) > 1e-4
    with jax.enable_x64(True):
        assert residual("continuous", schedule, 0.0) < 1e-25
        difference = residual(
            "continuous", schedule, 0.0, derivative="finite_difference", delta=1e-3
        )
        assert difference < 1e-10
        for solver, order in (("ddim", 1), ("heun", 2)):
            deltas = (0.04, 0.02, 0.01)
            losses = [
                residual("boot", schedule, 0.0, solver=solver, delta=delta)
                for delta in deltas
            ]
            # The loss is the square of an error of this order.
            falls = np.log2(np.divide(losses[:-1], losses[1:])) / 2
            np.testing.assert_allclose(falls, order, atol=0.2)
            wrong = residual("boot", schedule, 0.1, solver=solver, delta=0.01)
            assert wrong > 100 * losses[-1]
    assert residual("boot", schedule, 0.0) < 1e-4


# --- times


def test_times_cover_the_range_evenly():
    objective = Objective(t_min=0.1, delta=0.05, t_max=0.95)
    for seed in range(5):
        t = np.sort(draw_times(objective, jax.random.key(seed), 64))
        assert t[0] >= 0.15 and t[-1] <= 0.95
        gaps = np.diff(t, prepend=t[-1] - 0.8) / 0.8 * 64
        assert gaps.min() > 0.3 and gaps.max() < 2
        # And so does the share of each of eight devices.
        shares = np.sort(draw_times(objective, jax.random.key(seed), 64).reshape(8, 8))
        gaps = np.diff(shares, axis=1, prepend=shares[:, -1:] - 0.8) / 0.8 * 8
        assert gaps.max() < 2.1
    continuous = dataclasses.replace(objective, kind="continuous")
    t = np.asarray(draw_times(continuous, jax.random.key(0), 256))
    assert 0.1 <= t.min() < 0.15 and 0.945 < t.max() <= 0.95


def test_each_time_is_uniform():
    objective = Objective(kind="continuous", t_min=0.1, delta=0.05, t_max=0.9)
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = np.asarray(jax.vmap(lambda key: draw_times(objective, key, 5))(keys))
    for column in range(5):
        assert kstest((drawn[:, column] - 0.1) / 0.8, "uniform").pvalue > 1e-3


def test_progressive_times_move_down():
    objective = Objective(t_min=0.0, delta=0.1, time_order="progressive")
    key = jax.random.key(0)
    for progress, low, high in ((0, 1.0, 1.0), (0.5, 0.55, 0.65), (1, 0.1, 0.2)):
        t = np.asarray(
            draw_times(objective, key, 100, jnp.asarray(progress, jnp.float32))
        )
        assert low - 1e-6 <= t.min() and t.max() <= high + 1e-6
        assert np.ptp(t) >= 0.9 * (high - low)


# --- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"kind": "bot"},
            r"kind is 'bot'; choose one of \('boot', 'continuous', 'pid'",
        ),
        ({"solver": "euler"}, r"solver is 'euler'; choose one of \('ddim', 'heun'\)"),
        ({"weighting": "snr"}, "weighting is 'snr'; choose one of .'x0', 'dt', 'unif"),
        ({"target_network": "none"}, "target_network is 'none'; choose one of .'onli"),
        ({"time_order": "down"}, "time_order is 'down'; choose one of .'uniform', 'p"),
        ({"derivative": "grad"}, "derivative is 'grad'; choose one of .'jvp', 'fini"),
        ({"t_min": -0.1}, "t_min is -0.1 and t_max is 1.0; 0 <= t_min < t_max <= 1"),
        ({"t_max": 1.1}, "t_min is 0.01 and t_max is 1.1; 0 <= t_min < t_max <= 1"),
        ({"t_min": 0.6, "t_max": 0.5}, "t_min is 0.6 and t_max is 0.5; 0 <= t_min"),
        ({"delta": 0.0}, "delta is 0.0; it must lie between 0 and .* = 0.99"),
        ({"delta": 0.5, "t_min": 0.6}, "delta is 0.5; it must lie between 0 .* = 0.4"),
        ({"boundary_weight": -1.0}, "boundary_weight is -1.0 .* at least 0, and in"),
        ({"boundary_share": 0.0}, "boundary_share is 0.0; at least 0, and in .0, 1"),
        ({"boundary_share": 1.5}, "boundary_share is 1.5; at least 0, and in .0, 1"),
        (
            {"teacher_steps": 0},
            "teacher_steps is 0, grid_power .* at least 1, positive",
        ),
        ({"grid_power": 0.0}, "grid_power 0.0 .* at least 1, positive, and at least 0"),
        (
            {"stored_samples": -1},
            "stored_samples -1; at least 1, positive, and",
        ),
        (
            {"kind": "progressive", "teacher_steps": 12},
            "teacher_steps is 12, but progressive halves it .* a power of two .* 16",
        ),
        ({"kind": "progressive", "teacher_steps": 1}, "teacher_steps is 1, but progr"),
        (
            {"kind": "pid", "target_network": "ema"},
            "target_network is 'ema', which pid does not have; it is for boot, cont",
        ),
        (
            {"kind": "direct", "time_order": "progressive"},
            "time_order is 'progressive', which direct does not have; it is for boot",
        ),
    ],
)
def test_an_objective_without_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)
