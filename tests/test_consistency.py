"""Consistency distillation against its formula, and the exact consistency function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_students import (
    BATCH,
    COSINE,
    EPS,
    IMAGES,
    MEAN,
    OTHER,
    PARAMS,
    SCALE,
    as_params,
    bound,
    column,
    ddim,
    denoise,
    gaussian,
    levels,
    mixture,
    step,
)

from boot_jax.objectives import Objective, consistency_function, draw_times
from boot_jax.schedules import get_schedule

T_MIN = 0.01


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def grid(index, steps=BATCH, power=1.0):
    return T_MIN + (1 - T_MIN) * (index / steps) ** power


def ends(params, x, t):
    """``G``, as the DDIM step that it is."""
    return ddim(x, denoise(params, x, t), t, np.full(len(t), T_MIN))


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_loss_is_algorithm_2(solver, power, double):
    index = np.arange(1, BATCH + 1)
    t, s = grid(index, power=power), grid(index - 1, power=power)
    alpha, sigma = levels(t)
    x_t = alpha * IMAGES + sigma * EPS
    x_s = step(x_t, t, s, solver)
    options = {"solver": solver, "teacher_steps": BATCH, "grid_power": power}
    for target, choice in ((PARAMS, "online"), (OTHER, "ema")):
        loss = bound("consistency", mixture(), target_network=choice, **options)
        given = None if choice == "online" else as_params(OTHER)
        value, metrics = loss(as_params(PARAMS), t=t, target_params=given)
        expected = ((ends(PARAMS, x_t, t) - ends(target, x_s, s)) ** 2).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        assert set(metrics) == {"loss/consistency"}


def test_the_gradient_goes_through_the_upper_point_alone(double):
    index = np.arange(1, BATCH + 1)
    t, s = grid(index), grid(index - 1)
    alpha, sigma = levels(t)
    x_t = alpha * IMAGES + sigma * EPS
    (alpha_r, sigma_r) = levels(np.full(BATCH, T_MIN))
    known = ends(OTHER, step(x_t, t, s, "heun"), s)

    def by_hand(params):
        x_0 = denoise(params, jnp.asarray(x_t), jnp.asarray(t))
        end = sigma_r / sigma * (x_t - alpha * x_0) + alpha_r * x_0
        return jnp.mean((end - known) ** 2)

    loss = bound("consistency", mixture(), teacher_steps=BATCH)
    both = jax.grad(
        lambda *a: loss(a[0], a[1], t=t, target_params=a[2])[0], argnums=(0, 1, 2)
    )
    own, *others = both(as_params(PARAMS), mixture().params, as_params(OTHER))
    expected = jax.grad(by_hand)(as_params(PARAMS))
    for name, leaf in own.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-9)
    for leaf in jax.tree.leaves(others):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize("name", ["cosine", "flow", "edm", "linear_beta"])
def test_the_consistency_function_ends_where_it_begins(name):
    """Exactly, in float32, whatever the network says."""
    schedule = get_schedule(name)
    function = jax.jit(consistency_function(denoise, schedule, 0.05))
    x = jnp.asarray(EPS, jnp.float32)
    t = jnp.full(BATCH, 0.05, jnp.float32)
    ends = function({"a": 1e3, "b": 30.0, "c": -7.0}, x, t, None)
    np.testing.assert_array_equal(ends, x)
    above = function(PARAMS, x, t + 0.3, None)
    assert np.abs(above - x).max() > 0.05


def exact(params, x_t, t, condition):
    """The denoiser whose ``G`` follows the single Gaussian's trajectories exactly."""
    del condition
    end = jnp.full_like(t, T_MIN)
    (alpha, sigma), (alpha_r, sigma_r) = (
        (column(COSINE.alpha(at)), column(COSINE.sigma(at))) for at in (t, end)
    )
    v = jnp.sqrt(alpha**2 * SCALE**2 + sigma**2)
    v_r = jnp.sqrt(alpha_r**2 * SCALE**2 + sigma_r**2)
    x_r = alpha_r * MEAN + v_r / v * (x_t - alpha * MEAN)
    gain = alpha_r - alpha * sigma_r / sigma
    at_end = column(t <= T_MIN)  # where G does not look at it
    return (x_r - sigma_r / sigma * x_t) / jnp.where(at_end, 1, gain) + params


@pytest.mark.parametrize("solver, order", [("ddim", 2), ("heun", 3)])
def test_the_exact_consistency_function_is_a_fixed_point(solver, order, double):
    losses = []
    for steps in (32, 64, 128):
        # At the same eight times, some way from both ends.
        index = steps // 32 * np.array([6, 9, 12, 15, 18, 21, 24, 27])
        options = {"solver": solver, "teacher_steps": steps}
        loss = bound("consistency", gaussian(), {"student_denoise": exact}, **options)
        losses.append(float(loss(jnp.asarray(0.0), t=grid(index, steps))[0]))
    # The square of the error of one step.
    falls = np.log2(np.divide(losses[:-1], losses[1:])) / 2
    np.testing.assert_allclose(falls, order, atol=0.2)
    assert losses[-1] < 1e-6


def test_times_are_the_points_above_the_last():
    objective = Objective(kind="consistency", teacher_steps=4, grid_power=2.0)
    t = np.asarray(draw_times(objective, jax.random.key(0), 64))
    points = grid(np.arange(1, 5), 4, 2.0)
    nearest = np.abs(t[:, None] - points).argmin(1)
    np.testing.assert_allclose(t, points[nearest], rtol=1e-5)
    np.testing.assert_allclose(np.bincount(nearest), 16, atol=1)


def test_without_noise_at_the_end_it_is_refused():
    with pytest.raises(ValueError, match="t_min is 0, but consistency needs a little"):
        Objective(kind="consistency", t_min=0.0)
