"""The exact teacher against numerical quadrature, and its samples' moments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from boot_jax.schedules import get_schedule
from boot_jax.teachers.mixture import gaussian_mixture, sample_mixture

MEANS_1D = np.array([-1.0, 0.3, 2.0])
MEANS_2D = np.array([[-1.0, 0.5], [0.3, -0.7], [1.5, 1.0]])
SCALES = np.array([0.3, 0.15, 0.6])
WEIGHTS = np.array([0.2, 0.5, 0.3])
LABELS = [0, 1, 0]
SCHEDULES = {
    "cosine": get_schedule("cosine"),
    "linear_beta": get_schedule("linear_beta"),
    "edm": get_schedule("edm"),
    "flow": get_schedule("flow", shift=3.0),
    "discrete": get_schedule("discrete", num_train_timesteps=50),
}
each_schedule = pytest.mark.parametrize("name", list(SCHEDULES))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(x: Any, mean: Any, deviation: Any) -> Any:
    return np.exp(-(((x - mean) / deviation) ** 2) / 2) / deviation


def teacher_of(means: np.ndarray, schedule: Any, **options: Any) -> Any:
    images = means.reshape(len(means), 1, -1, 1)
    return gaussian_mixture(images, SCALES, schedule, weights=WEIGHTS, **options)


def posterior_mean(x_t: float, alpha: float, sigma: float, weights: Any) -> float:
    """``E[x_0 | x_t]`` of the 1-D mixture: two integrals over x_0."""

    def joint(x: float) -> float:
        prior = (weights * normal(x, MEANS_1D, SCALES)).sum()
        return float(prior * np.exp(-(((x_t - alpha * x) / sigma) ** 2) / 2))

    # Where it may be narrow: at the components and at what x_t itself says.
    points = np.unique(np.clip([*MEANS_1D, x_t / alpha], -5.9, 5.9))
    options = {"limit": 500, "points": points, "epsabs": 1e-14, "epsrel": 1e-11}
    total = quad(joint, -6, 6, **options)[0]
    return quad(lambda x: x * joint(x), -6, 6, **options)[0] / total


@each_schedule
def test_denoiser_is_the_posterior_mean_in_one_dimension(float64, name):
    schedule = SCHEDULES[name]
    teacher = teacher_of(MEANS_1D, schedule)
    t = np.array([0.15, 0.4, 0.7, 0.95])
    alpha, sigma = (
        np.asarray(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma)
    )
    x_t = alpha * np.array([0.8, -0.4, 1.0, -1.2]) + sigma * np.array([0.1, 1, -1, 0.3])
    images = jnp.asarray(x_t).reshape(4, 1, 1, 1)
    actual = jax.jit(teacher.denoise)(teacher.params, images, jnp.asarray(t), None)
    given = zip(x_t, alpha, sigma, strict=True)
    expected = [posterior_mean(*one, WEIGHTS) for one in given]
    np.testing.assert_allclose(actual.ravel(), expected, rtol=1e-6, atol=1e-7)


def test_denoiser_is_the_posterior_mean_in_two_dimensions(float64):
    schedule = SCHEDULES["cosine"]
    teacher = teacher_of(MEANS_2D, schedule)
    assert teacher.sample_shape == (1, 2, 1)
    alpha, sigma = np.cos(np.pi * 0.6 / 2), np.sin(np.pi * 0.6 / 2)
    x_t = np.array([0.3, -0.5])
    axis = np.linspace(-6, 6, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    prior = sum(
        weight * np.prod(normal(grid, mean, scale), -1)
        for weight, mean, scale in zip(WEIGHTS, MEANS_2D, SCALES, strict=True)
    )
    joint = prior * np.prod(normal(x_t, alpha * grid, sigma), -1)
    expected = (joint[..., None] * grid).sum((0, 1)) / joint.sum()
    actual = jax.jit(teacher.denoise)(
        teacher.params, jnp.asarray(x_t).reshape(1, 1, 2, 1), jnp.full((1,), 0.6), None
    )
    np.testing.assert_allclose(actual.ravel(), expected, rtol=1e-9)


def test_labels_choose_among_the_components(float64):
    schedule = SCHEDULES["cosine"]
    teacher = teacher_of(MEANS_1D, schedule, labels=LABELS)
    assert teacher.num_classes == 2
    alpha, sigma = np.cos(np.pi * 0.55 / 2), np.sin(np.pi * 0.55 / 2)
    label = jnp.asarray([0, 1, 2], jnp.int32)
    x_t = jnp.full((3, 1, 1, 1), 0.4)
    t = jnp.full((3,), 0.55)
    actual = jax.jit(teacher.denoise)(teacher.params, x_t, t, {"label": label})
    expected = [
        posterior_mean(0.4, alpha, sigma, WEIGHTS * np.array(member))
        for member in ([1, 0, 1], [0, 1, 0], [1, 1, 1])
    ]
    np.testing.assert_allclose(actual.ravel(), expected, rtol=1e-7)
    without = jax.jit(teacher.denoise)(teacher.params, x_t[:1], t[:1], None)
    np.testing.assert_allclose(without.ravel(), expected[2:], rtol=1e-7)


@each_schedule
def test_float32_at_both_ends(name):
    """Large images of far components, where densities under- and overflow."""
    schedule = SCHEDULES[name]
    rng = np.random.default_rng(0)
    means = 2 * rng.normal(size=(3, 32, 32, 3))
    teacher = gaussian_mixture(means, SCALES, schedule, weights=WEIGHTS, labels=LABELS)
    x_0 = means + SCALES[:, None, None, None] * rng.normal(size=means.shape)
    label = jnp.asarray([2, 1, 0], jnp.int32)
    for time in (0.0, 1e-4, 0.999, 1.0):
        t = jnp.full((3,), time)
        alpha, sigma = float(schedule.alpha(t)[0]), float(schedule.sigma(t)[0])
        x_t = alpha * x_0 + sigma * rng.normal(size=means.shape)
        f = jax.jit(teacher.denoise)(
            teacher.params, jnp.asarray(x_t, jnp.float32), t, {"label": label}
        )
        assert f.dtype == jnp.float32
        assert np.isfinite(f).all()
        if time == 0:
            # Next to no noise: the image itself (EDM's is 0.002).
            np.testing.assert_allclose(f, x_0, atol=6 * sigma + 1e-5)
        if alpha == 0:
            # Nothing is known: the mean of the data, or of the class. Weights carry the
            # rounding of a sum of 3072 squares.
            of_class = WEIGHTS[[0, 2]] @ means[[0, 2]].reshape(2, -1) / 0.5
            np.testing.assert_allclose(f[2].ravel(), of_class, atol=5e-4)
            everything = WEIGHTS @ means.reshape(3, -1)
            np.testing.assert_allclose(f[0].ravel(), everything, atol=5e-4)


def test_gradients_are_finite_for_classes_without_a_component():
    """Components outside the class have a log weight of minus infinity."""
    teacher = teacher_of(MEANS_1D, SCHEDULES["cosine"], labels=LABELS)

    def total(x_t: Any, t: Any) -> Any:
        condition = {"label": jnp.asarray([0, 1], jnp.int32)}
        return jnp.sum(jax.jit(teacher.denoise)(teacher.params, x_t, t, condition))

    gradients = jax.jit(jax.grad(total, (0, 1)))(
        jnp.ones((2, 1, 1, 1)), jnp.asarray([0.5, 1.0])
    )
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_samples_have_the_moments_of_the_mixture():
    teacher = teacher_of(MEANS_2D, SCHEDULES["cosine"], labels=LABELS)
    num = 20_000
    samples = sample_mixture(teacher, jax.random.key(0), num)
    assert samples.shape == (num, 1, 2, 1)
    points = np.asarray(samples).reshape(num, 2)
    mean = WEIGHTS @ MEANS_2D
    second = np.einsum("k,ki,kj->ij", WEIGHTS, MEANS_2D, MEANS_2D)
    covariance = second + (WEIGHTS @ SCALES**2) * np.eye(2) - np.outer(mean, mean)
    np.testing.assert_allclose(points.mean(0), mean, atol=5 / num**0.5)
    np.testing.assert_allclose(np.cov(points.T), covariance, atol=8 / num**0.5)
    nearest = np.linalg.norm(points[:, None] - MEANS_2D, axis=-1).argmin(1)
    share = np.bincount(nearest, minlength=3) / num
    np.testing.assert_allclose(share, WEIGHTS, atol=0.03)


def test_weights_need_not_be_normalised_and_default_to_equal():
    schedule = SCHEDULES["cosine"]
    images, x_t = MEANS_1D.reshape(3, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    given = [
        gaussian_mixture(images, SCALES, schedule, weights=weights)
        for weights in (None, [2.0, 2.0, 2.0])
    ]
    f = [
        jax.jit(teacher.denoise)(teacher.params, x_t, jnp.ones((1,)), None)
        for teacher in given
    ]
    np.testing.assert_allclose(f, MEANS_1D.mean(), rtol=1e-5)


def test_fingerprint_tells_teachers_apart():
    teacher = teacher_of(MEANS_1D, SCHEDULES["cosine"])
    again = teacher_of(MEANS_1D.copy(), get_schedule("cosine"))
    assert teacher.fingerprint() == again.fingerprint()
    moved = jax.tree.map(lambda leaf: leaf, teacher.params)
    moved["means"] = moved["means"].at[1, 0, 0, 0].add(1e-3)
    others = [
        dataclasses.replace(teacher, params=moved),
        dataclasses.replace(teacher, schedule=get_schedule("cosine", shift=2.0)),
        dataclasses.replace(teacher, prediction_type="epsilon"),
        dataclasses.replace(teacher, num_classes=2),
    ]
    prints = {other.fingerprint() for other in [teacher, *others]}
    assert len(prints) == 5
