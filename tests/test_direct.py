"""Direct distillation against the teacher's sampler, written out."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_students import (
    BATCH,
    EPS,
    MEAN,
    PARAMS,
    SCALE,
    as_params,
    bound,
    gaussian,
    levels,
    mixture,
    signal,
    spread,
    step,
)

from boot_jax.objectives import Objective, draw_times
from boot_jax.sampling import many_steps

T_MIN = np.full(BATCH, 0.01)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def samples(steps, solver, power=1.0):
    x = EPS
    times = np.linspace(1, 0, steps + 1) ** power
    for index in range(steps):
        last = index == steps - 1
        ends = (np.full(BATCH, t) for t in times[index : index + 2])
        x = step(x, *ends, "ddim" if last else solver)
    return x


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("steps, power", [(1, 1.0), (4, 1.0), (3, 1.5)])
def test_the_loss_is_a_regression_on_the_sampler(solver, steps, power):
    options = {"solver": solver, "teacher_steps": steps, "grid_power": power}
    loss = bound("direct", mixture(), **options)
    value, metrics = loss(as_params(PARAMS), t=T_MIN)
    target = samples(steps, solver, power)
    expected = ((signal(PARAMS, EPS, T_MIN) - target) ** 2).mean()
    # The grid is of float32 where the sampler's is.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(metrics) == {"loss/regression"}
    teacher = mixture()
    sampler = many_steps(
        teacher.denoise,
        teacher.params,
        teacher.schedule,
        steps,
        solver=solver,
        power=power,
    )
    made = sampler(jnp.asarray(EPS), None)
    np.testing.assert_allclose(made, target, rtol=1e-4, atol=1e-5)


def test_known_targets_take_the_teachers_place():
    target = np.random.default_rng(1).normal(size=EPS.shape)

    def never(*args):
        raise AssertionError("the teacher was called")

    loss = bound("direct", dataclasses.replace(mixture(), denoise=never))
    value = loss(as_params(PARAMS), t=T_MIN, targets=jnp.asarray(target))[0]
    expected = ((signal(PARAMS, EPS, T_MIN) - target) ** 2).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_no_gradient_reaches_the_teacher():
    loss = bound("direct", mixture(), teacher_steps=3)
    own, teacher = jax.grad(lambda *a: loss(*a, t=T_MIN)[0], argnums=(0, 1))(
        as_params(PARAMS), mixture().params
    )
    for leaf in jax.tree.leaves(teacher):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    residual = signal(PARAMS, EPS, T_MIN) - samples(3, "heun")
    np.testing.assert_allclose(own["a"], (2 * residual * EPS).mean(), rtol=1e-4)


def factor(steps):
    """Of ``eps`` in the samples of the single Gaussian by DDIM: ``m + factor eps``."""
    product = 1.0
    times = np.linspace(1, 0, steps + 1)
    for t, s in itertools.pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels([t]), levels([s])
        gain = alpha_t * SCALE**2 / spread([t]) ** 2
        product = product * (alpha_s * gain + sigma_s / sigma_t * (1 - alpha_t * gain))
    return product


def test_the_exact_map_of_so_many_steps_is_the_only_fixed_point():
    for steps in (1, 4, 16):
        student = {"signal": lambda params, *rest: MEAN + params * rest[0]}
        options = {"solver": "ddim", "teacher_steps": steps}
        loss = bound("direct", gaussian(), student, **options)
        assert loss(jnp.asarray(factor(steps)), t=T_MIN)[0] < 1e-12
        # In the limit of many steps it is that of the data.
        off = abs(factor(steps) - SCALE)
        assert off < 1.0 / steps
        value = loss(jnp.asarray(SCALE), t=T_MIN)[0]
        np.testing.assert_allclose(value, ((off * EPS) ** 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(factor(4000), SCALE, rtol=1e-3)


def test_its_time_is_that_of_the_one_step_sample():
    objective = Objective(kind="direct", t_min=0.02)
    t = draw_times(objective, jax.random.key(0), 5)
    np.testing.assert_allclose(t, np.full(5, 0.02), rtol=1e-6)
