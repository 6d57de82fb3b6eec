"""Physics-informed distillation against its formula and the exact map of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_students import (
    BATCH,
    COSINE,
    EPS,
    MEAN,
    PARAMS,
    SCALE,
    T,
    as_params,
    bound,
    column,
    gaussian,
    levels,
    mixture,
    signal,
    slope,
    teach,
)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def dt_dlambda(t):
    alpha, sigma = levels(t)
    return 2 / np.pi * alpha * sigma


def residual(params, rise):
    """``y - (dt / dlambda) y'`` and the estimate that it should equal."""
    alpha, sigma = levels(T)
    y = signal(params, EPS, T)
    return y - dt_dlambda(T) * rise, teach(alpha * y + sigma * EPS, T)


def boundary(params):
    ones = np.ones(BATCH)
    return ((signal(params, EPS, ones) - teach(EPS, ones)) ** 2).mean()


def test_the_loss_is_the_residual_of_the_ode():
    implied, x_0 = residual(PARAMS, slope(PARAMS, EPS, T))
    loss = bound("pid", mixture(), boundary_weight=0.5)
    value, metrics = loss(as_params(PARAMS))
    expected = ((implied - x_0) ** 2).mean()
    np.testing.assert_allclose(metrics["loss/trajectory"], expected, rtol=1e-10)
    np.testing.assert_allclose(metrics["loss/boundary"], boundary(PARAMS), rtol=1e-10)
    np.testing.assert_allclose(value, expected + 0.5 * boundary(PARAMS), rtol=1e-10)


def test_a_finite_difference_goes_down_and_up_where_there_is_no_down():
    delta = 0.06
    other = np.where(T - delta < 0.08, T + delta, T - delta)
    assert (other > T).sum() == 1
    rise = signal(PARAMS, EPS, T) - signal(PARAMS, EPS, other)
    implied, x_0 = residual(PARAMS, rise / column(T - other))
    options = {"delta": delta, "t_min": 0.08, "boundary_weight": 0.0}
    loss = bound("pid", mixture(), derivative="finite_difference", **options)
    expected = ((implied - x_0) ** 2).mean()
    np.testing.assert_allclose(loss(as_params(PARAMS))[0], expected, rtol=1e-10)


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
def test_the_gradient_goes_through_signal_and_derivative_not_the_teacher(derivative):
    x_0 = jnp.asarray(residual(PARAMS, 0.0)[1])
    delta, t = 0.04, jnp.asarray(T)

    def by_hand(params):
        y = signal(params, jnp.asarray(EPS), t)
        rise = slope(params, jnp.asarray(EPS), t)
        if derivative == "finite_difference":
            rise = (y - signal(params, jnp.asarray(EPS), t - delta)) / delta
        return jnp.mean((y - dt_dlambda(T) * rise - x_0) ** 2)

    options = {"derivative": derivative, "delta": delta, "boundary_weight": 0.0}
    loss = bound("pid", mixture(), **options)
    own, teacher = jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1))(
        as_params(PARAMS), mixture().params
    )
    expected = jax.grad(by_hand)(as_params(PARAMS))
    fixed = bound("continuous", mixture(), **options)
    other = jax.grad(lambda params: fixed(params)[0])(as_params(PARAMS))
    for name, leaf in own.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-9)
        # The derivative does not depend on the first.
        assert name == "a" or abs(leaf - other[name]) > 1e-2 * abs(leaf)
    for leaf in jax.tree.leaves(teacher):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def exact(params, eps, t, condition):
    """``y_t`` of the single Gaussian, without the cancellation of ``v - sigma``."""
    del condition
    alpha, sigma = (column(f(t)) for f in (COSINE.alpha, COSINE.sigma))
    v = jnp.sqrt(alpha**2 * SCALE**2 + sigma**2)
    return MEAN + params * column(1 - t) + alpha * SCALE**2 / (v + sigma) * eps


def test_the_exact_map_is_a_fixed_point():
    t = np.linspace(0.2, 1.0, BATCH)

    def value(off, **options):
        loss = bound("pid", gaussian(), {"signal": exact}, **options)
        return float(loss(jnp.asarray(off), t=t)[0])

    assert value(0.0) < 1e-25
    assert value(0.1) > 1e-4
    deltas = (0.02, 0.01, 0.005)
    losses = [
        value(0.0, derivative="finite_difference", delta=delta) for delta in deltas
    ]
    # The square of an error of first order.
    falls = np.log2(np.divide(losses[:-1], losses[1:])) / 2
    np.testing.assert_allclose(falls, 1, atol=0.1)
    gradient = jax.grad(
        lambda off: bound("pid", gaussian(), {"signal": exact})(off, t=t)[0]
    )(jnp.asarray(0.0))
    assert abs(gradient) < 1e-12
