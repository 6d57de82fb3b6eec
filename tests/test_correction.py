"""The correction against closed forms: Gaussians, whose divergence is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from boot_jax.objectives import (
    LOSSES,
    Correction,
    Objective,
    auxiliary_loss,
    correction_loss,
    draw_renoising_times,
)
from boot_jax.objectives.base import TRAJECTORY_RESIDUAL
from boot_jax.schedules import get_schedule
from boot_jax.teachers.mixture import gaussian_mixture, mixture_denoiser

COSINE = get_schedule("cosine")
SHAPE = (1, 2, 1)
MEAN, SCALE = np.array([0.4, -0.3]), 0.7
R = 0.4


def gaussian(mean: Any, scale: Any) -> dict[str, Any]:
    """Parameters of the exact denoiser of one Gaussian."""
    return {
        "means": jnp.asarray(mean, jnp.float32).reshape(1, *SHAPE),
        "scales": jnp.asarray(scale, jnp.float32).reshape(1),
        "log_weights": jnp.zeros((1, 1)),
    }


TEACHER = gaussian_mixture(gaussian(MEAN, SCALE)["means"], [SCALE], COSINE)


def signal(params: Any, eps: Any, t: Any, condition: Any) -> Any:
    """A student whose samples are ``N(mean, scale^2)``."""
    del t, condition
    return params["mean"].reshape(1, *SHAPE) + params["scale"] * eps


def student(mean: Any, scale: float) -> dict[str, Any]:
    return {"mean": jnp.asarray(mean, jnp.float32), "scale": jnp.asarray(scale)}


def exact(params: Any) -> dict[str, Any]:
    """The auxiliary network that knows the student's samples exactly."""
    return gaussian(params["mean"], params["scale"])


def drawn(count: int, seed: Any = 0) -> list[Any]:
    keys = jax.random.split(jax.random.key(seed))
    return [jax.random.normal(key, (count, *SHAPE)) for key in keys]


def loss_of(
    params: Any,
    auxiliary_params: Any,
    teacher_params: Any = TEACHER.params,
    *,
    count: int = 64,
    strength: float = 1.0,
    residual: float = 1.0,
    r: float = R,
    seed: Any = 0,
) -> Any:
    eps, noise = drawn(count, seed)
    return correction_loss(
        params,
        auxiliary_params,
        teacher_params,
        eps,
        noise,
        jnp.full((count,), r),
        None,
        residual,
        signal=signal,
        denoise=TEACHER.denoise,
        auxiliary=mixture_denoiser(COSINE),
        schedule=COSINE,
        objective=Objective(correction=Correction(strength=strength)),
    )


def divergence(params: Any, r: float) -> Any:
    """``KL(q_r | p_r)`` of the student's and the teacher's noised Gaussians."""
    alpha, sigma = COSINE.alpha(jnp.asarray(r)), COSINE.sigma(jnp.asarray(r))
    own = (alpha * params["scale"]) ** 2 + sigma**2
    other = (alpha * SCALE) ** 2 + sigma**2
    offset = jnp.sum((alpha * (params["mean"] - jnp.asarray(MEAN, jnp.float32))) ** 2)
    return jnp.log(other / own) + own / other - 1 + offset / (2 * other)


@pytest.mark.parametrize("r", [0.15, 0.4, 0.8])
def test_the_gradient_is_that_of_the_divergence(r):
    """Eq. (2), sign and value, with the exact auxiliary network."""
    params = student([0.9, -0.1], 0.3)
    ratio = (COSINE.alpha(jnp.asarray(r)) / COSINE.sigma(jnp.asarray(r))) ** 2

    @jax.jit
    def gradient(index: Any) -> Any:
        """Of one batch, with what eq. (4) scales it by undone, and eq. (2)'s factor."""

        def loss(moved: Any) -> Any:
            return loss_of(moved, exact(params), count=1024, seed=index, r=r)

        found, metrics = jax.grad(loss, has_aux=True)(params)
        scale = metrics["correction/residual"] * ratio
        return jax.tree.map(lambda leaf: leaf * scale, found)

    batches = [gradient(index) for index in range(200)]
    found = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *batches)
    expected = jax.grad(divergence)(params, r)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=0.02, atol=2e-3)
    # Down the gradient the mean goes to the teacher's, and the samples spread.
    towards = MEAN - np.asarray(params["mean"])
    assert (np.sign(-np.asarray(found["mean"])) == np.sign(towards)).all()
    assert found["scale"] < 0


def test_too_wide_a_student_is_narrowed():
    params = student(MEAN, 1.1)
    gradient = jax.grad(lambda p: loss_of(p, exact(params), count=4096)[0])(params)
    assert gradient["scale"] > 0


def test_the_fixed_point_is_the_teachers_distribution():
    """Gradient steps alone lead to it from afar; there the residual is none."""
    params = student([2.0, 1.5], 0.15)
    step = jax.jit(
        lambda params, key, rate: jax.tree.map(
            lambda leaf, slope: leaf - rate * slope,
            params,
            jax.grad(of_key)(params, key),
        )
    )

    def of_key(params: Any, key: Any) -> Any:
        keys = jax.random.split(key, 3)
        eps, noise = (jax.random.normal(k, (512, *SHAPE)) for k in keys[:2])
        correction = Correction(strength=1.0)
        return correction_loss(
            params,
            jax.lax.stop_gradient(exact(params)),
            TEACHER.params,
            eps,
            noise,
            draw_renoising_times(correction, keys[2], 512),
            None,
            1.0,
            signal=signal,
            denoise=TEACHER.denoise,
            auxiliary=mixture_denoiser(COSINE),
            schedule=COSINE,
            objective=Objective(correction=correction),
        )[0]

    for index in range(300):
        params = step(params, jax.random.key(index), 0.1 * 0.98**index)
    np.testing.assert_allclose(params["mean"], MEAN, atol=0.02)
    np.testing.assert_allclose(params["scale"], SCALE, atol=0.02)
    perfect = student(MEAN, SCALE)
    gradient, metrics = jax.grad(loss_of, has_aux=True)(perfect, exact(perfect))
    # Two equal networks differ by nothing, which is not scaled up.
    assert float(metrics["correction/residual"]) < 1e-6
    assert all((np.abs(leaf) < 1e-5).all() for leaf in jax.tree.leaves(gradient))


def test_the_gradient_reaches_the_student_alone():
    params, own = student([0.9, -0.1], 0.3), gaussian([0.5, 0.5], 0.4)
    gradients = jax.grad(lambda *args: loss_of(*args)[0], argnums=(0, 1, 2))(
        params, own, TEACHER.params
    )
    assert all((np.asarray(leaf) != 0).all() for leaf in jax.tree.leaves(gradients[0]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients[1:]))
    # Nor does it pass through the noised sample: eq. (4) has a constant target.
    eps, noise = drawn(64)
    y = signal(params, eps, None, None)
    x_r = COSINE.alpha(jnp.asarray(R)) * y + COSINE.sigma(jnp.asarray(R)) * noise
    r = jnp.full((64,), R)
    difference = mixture_denoiser(COSINE)(own, x_r, r, None) - TEACHER.denoise(
        TEACHER.params, x_r, r, None
    )
    scale = 1 / jnp.mean(jnp.sqrt(jnp.mean(difference**2, axis=(1, 2, 3))))
    by_hand = jax.grad(
        lambda p: 2 * jnp.mean(signal(p, eps, None, None) * scale * difference)
    )(params)
    for name in params:
        np.testing.assert_allclose(gradients[0][name], by_hand[name], rtol=1e-4)


@pytest.mark.parametrize("strength, residual", [(0.3, 2.0), (1.0, 0.01), (2.0, 1.0)])
def test_the_strength_is_relative_to_the_trajectories(strength, residual):
    params = student([0.9, -0.1], 0.3)
    loss, metrics = loss_of(params, exact(params), strength=strength, residual=residual)
    # Written out in numpy.
    eps, noise = (np.asarray(array, np.float64) for array in drawn(64))
    alpha, sigma = np.cos(np.pi / 2 * R), np.sin(np.pi / 2 * R)
    y = np.asarray(params["mean"]).reshape(SHAPE) + 0.3 * eps

    def denoised(x: Any, mean: Any, scale: float) -> Any:
        gain = alpha * scale**2 / ((alpha * scale) ** 2 + sigma**2)
        return mean.reshape(SHAPE) + gain * (x - alpha * mean.reshape(SHAPE))

    x_r = alpha * y + sigma * noise
    difference = denoised(x_r, np.asarray(params["mean"]), 0.3)
    difference = difference - denoised(x_r, MEAN, SCALE)
    norms = np.sqrt((difference**2).mean(axis=(1, 2, 3)))
    scale = strength * residual / norms.mean()
    np.testing.assert_allclose(metrics["correction/residual"], norms.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, ((scale * difference) ** 2).mean(), rtol=1e-5)
    assert loss == metrics["loss/correction"]
    rows = y.reshape(64, -1)
    apart = np.sqrt(((rows[:, None] - rows[None]) ** 2).mean(-1))
    np.testing.assert_allclose(
        metrics["correction/diversity"], apart.sum() / (64 * 63), rtol=1e-4
    )
    variance = rows.var(axis=0, ddof=1).mean()
    np.testing.assert_allclose(metrics["correction/variance"], variance, rtol=1e-4)


# --- what it is measured by


@pytest.mark.parametrize(
    "kind, options",
    [
        ("continuous", {}),
        ("continuous", {"adaptive_power": 1.0}),
        ("boot", {"weighting": "x0", "solver": "ddim"}),
        ("boot", {"weighting": "uniform"}),
        ("boot", {"distance": lambda a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))}),
    ],
)
def test_the_residual_is_the_pull_at_the_output(kind, options):
    """Whatever the distance and the weights: the gradient in the student's output."""
    eps, t = drawn(8)[0], jnp.linspace(0.1, 1.0, 8)
    params = student([0.9, -0.1], 0.3)
    objective = Objective(
        kind=kind, boundary_weight=0.0, correction=Correction(strength=1.0), **options
    )

    def of_offset(offset: Any) -> Any:
        def moved(params: Any, eps: Any, t: Any, condition: Any) -> Any:
            own_time = t[:, None, None, None]
            return offset + signal(params, eps, t, condition) * (1 - own_time / 2)

        return LOSSES[kind](
            params,
            TEACHER.params,
            eps,
            t,
            None,
            signal=moved,
            denoise=TEACHER.denoise,
            schedule=COSINE,
            objective=objective,
        )

    pull, metrics = jax.grad(of_offset, has_aux=True)(jnp.zeros((8, *SHAPE)))
    # The mean over 8 images of the squared error has a derivative of 2 / (8 * 2).
    expected = np.sqrt((np.asarray(pull) ** 2).mean(axis=(1, 2, 3))).mean() * 8
    np.testing.assert_allclose(metrics[TRAJECTORY_RESIDUAL], expected, rtol=1e-4)


# --- the auxiliary network


def test_the_auxiliary_loss_is_least_for_the_students_own_denoiser():
    params = student([0.9, -0.1], 0.3)
    eps, noise = drawn(20_000)
    r = draw_renoising_times(Correction(), jax.random.key(3), 20_000)

    def loss(own: Any, params: Any = params) -> Any:
        return auxiliary_loss(
            own,
            params,
            eps,
            noise,
            r,
            None,
            signal=signal,
            auxiliary=mixture_denoiser(COSINE),
            schedule=COSINE,
            objective=Objective(),
        )[0]

    gradient = jax.jit(jax.grad(loss))
    at_best, elsewhere = gradient(exact(params)), gradient(TEACHER.params)
    for name in ("means", "scales"):
        assert np.abs(at_best[name]).max() < 0.05 * np.abs(elsewhere[name]).max()
    # It is worth the same in x_0 as a prediction of v: eq. (3).
    alpha, sigma = (np.asarray(f(r))[:, None, None, None] for f in _levels())
    y = signal(params, eps, None, None)
    x_r = alpha * y + sigma * noise
    x_0 = TEACHER.denoise(TEACHER.params, x_r, r, None)
    v = (alpha * x_r - x_0) / sigma - (alpha * noise - sigma * y)
    np.testing.assert_allclose(loss(TEACHER.params), (v**2).mean(), rtol=1e-4)
    # The student learns nothing by it.
    of_student = jax.grad(lambda p: loss(TEACHER.params, p))(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_student))


def _levels() -> Any:
    return COSINE.alpha, COSINE.sigma


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_are_distributed_as_they_should(kind):
    correction = Correction(
        time_range=(0.1, 0.9), time_distribution=kind, time_mean=0.8, time_scale=0.6
    )
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = jax.vmap(lambda key: draw_renoising_times(correction, key, 5))(keys)
    share = (np.asarray(drawn, np.float64) - 0.1) / 0.8
    assert share.min() >= 0 and share.max() <= 1
    for column in share.T:
        if kind == "uniform":
            assert kstest(column, "uniform").pvalue > 1e-3
        else:
            inside = column[(column > 0) & (column < 1)]
            logits = np.log(inside / (1 - inside))
            assert kstest(logits, "norm", args=(0.8, 0.6)).pvalue > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": -1.0}, "correction.strength is -1.0, but must be at least 0"),
        ({"share": 0.75}, r"correction.share is 0.75, but must be in \(0, 0.5\]"),
        ({"trajectory_weight": -1.0}, "trajectory_weight is -1.0, but must be at le"),
        ({"time_range": (0.0, 0.5)}, r"time_range is \(0.0, 0.5\), but must be \(low"),
        ({"time_distribution": "beta"}, "is 'beta', but must be one of .'uniform'"),
        ({"time_scale": 0.0}, "correction.time_scale is 0.0, but must be positive"),
        ({"guidance_interval": (0.5,)}, r"is \(0.5,\), but must be \(t_low, t_high"),
        ({"updates": 0}, "correction.updates is 0, but must be at least 1"),
        ({"auxiliary_share": 0.0}, r"auxiliary_share is 0.0, but must be in \(0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but must be positive"),
        ({"decay": "linear"}, "correction.decay is 'linear', but must be one of"),
        ({"b1": 1.0}, r"correction.b1 is 1.0, but must be in \[0, 1\)"),
        ({"b2": -0.1}, r"correction.b2 is -0.1, but must be in \[0, 1\)"),
        ({"lora_rank": -1}, "correction.lora_rank is -1, but must be at least 0"),
    ],
)
def test_a_correction_without_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Correction(**options)
