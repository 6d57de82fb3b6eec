"""Progressive distillation: one step of the student is two of its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_students import (
    BATCH,
    EPS,
    IMAGES,
    PARAMS,
    as_params,
    bound,
    ddim,
    denoise,
    levels,
    mixture,
    teach,
)

from boot_jax.objectives import Objective, draw_times

#: The teacher makes 16 steps, the student 8.
T = np.arange(1, BATCH + 1) / BATCH
OPTIONS = {"teacher_steps": 2 * BATCH}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def two_steps(t=T, power=1.0):
    """Where the teacher's two steps lead: start, end, and the end's time."""
    alpha, sigma = levels(t)
    x_t = alpha * IMAGES + sigma * EPS
    index = np.arange(1, BATCH + 1)
    half, s = ((2 * index - 1) / (2 * BATCH)) ** power, ((index - 1) / BATCH) ** power
    x_half = ddim(x_t, teach(x_t, t), t, half)
    return x_t, ddim(x_half, teach(x_half, half), half, s), s


def target(x_t, x_s, t, s):
    """Algorithm 2 of the paper, its last lines but one."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(t), levels(s)
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_loss_is_algorithm_2(power):
    t = T**power
    x_t, x_s, s = two_steps(t, power)
    alpha, sigma = levels(t)
    weight = np.maximum((alpha / sigma) ** 2, 1)
    error = (denoise(PARAMS, x_t, t) - target(x_t, x_s, t, s)) ** 2
    loss = bound("progressive", mixture(), grid_power=power, **OPTIONS)
    value, metrics = loss(as_params(PARAMS), t=t)
    np.testing.assert_allclose(value, (weight * error).mean(), rtol=1e-9)
    assert set(metrics) == {"loss/progressive"}
    assert (weight > 1).any() and (weight == 1).any()


def test_the_target_leads_in_one_step_where_two_of_the_teacher_do():
    x_t, x_s, s = two_steps()
    reached = ddim(x_t, target(x_t, x_s, T, s), T, s)
    np.testing.assert_allclose(reached, x_s, rtol=1e-12, atol=1e-12)
    # And the loss agrees that it is the target: nothing else makes it zero.
    known = jnp.asarray(target(x_t, x_s, T, s))
    student = {"student_denoise": lambda params, *rest: known + params}
    loss = bound("progressive", mixture(), student, **OPTIONS)
    assert loss(jnp.asarray(0.0), t=T)[0] < 1e-20
    assert loss(jnp.asarray(0.1), t=T)[0] > 1e-2


def test_no_gradient_reaches_the_teacher():
    x_t, x_s, s = two_steps()
    known = jnp.asarray(target(x_t, x_s, T, s))
    alpha, sigma = levels(T)
    weight = np.maximum((alpha / sigma) ** 2, 1)

    def by_hand(params):
        x_0 = denoise(params, jnp.asarray(x_t), jnp.asarray(T))
        return jnp.mean(weight * (x_0 - known) ** 2)

    loss = bound("progressive", mixture(), **OPTIONS)
    own, teacher = jax.grad(lambda *a: loss(*a, t=T)[0], argnums=(0, 1))(
        as_params(PARAMS), mixture().params
    )
    expected = jax.grad(by_hand)(as_params(PARAMS))
    for name, leaf in own.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-9)
    for leaf in jax.tree.leaves(teacher):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("steps", [2, 16])
def test_times_are_the_points_of_the_students_grid(steps, power):
    objective = Objective(
        kind="progressive", teacher_steps=steps, grid_power=power, t_max=0.9
    )
    keys = jax.random.split(jax.random.key(0), 50)
    t = np.asarray(jax.vmap(lambda key: draw_times(objective, key, 16))(keys))
    points = 0.9 * (np.arange(1, steps // 2 + 1) / (steps // 2)) ** power
    nearest = np.abs(t.ravel()[:, None] - points).argmin(1)
    np.testing.assert_allclose(t.ravel(), points[nearest], rtol=1e-5)
    counts = np.bincount(nearest, minlength=len(points))
    np.testing.assert_allclose(counts, t.size / len(points), rtol=0.1)


def test_the_last_stage_knows_the_noise_alone():
    """At ``alpha = 0`` the data is not seen, and one step leads to it."""
    ones = np.ones(BATCH)
    loss = bound("progressive", mixture(), teacher_steps=2)
    values = [
        loss(as_params(PARAMS), t=ones, images=jnp.asarray(images))[0]
        for images in (IMAGES, 1 - IMAGES)
    ]
    half = np.full(BATCH, 0.5)
    x_half = ddim(EPS, teach(EPS, ones), ones, half)
    end = teach(x_half, half)
    expected = ((denoise(PARAMS, EPS, ones) - end) ** 2).mean()
    np.testing.assert_allclose(values, [expected, expected], rtol=1e-6)
