"""Solvers against scipy's ODE solver and PyTorch diffusers' DDIM, in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.integrate import solve_ivp

from boot_jax.prediction import expand, to_x_0
from boot_jax.schedules import get_schedule
from boot_jax.solvers import (
    SOLVERS,
    add_noise,
    ddim_step,
    heun_step,
    sample_ode,
    signal_step,
    signal_target,
    step_fraction,
    time_grid,
)
from boot_jax.teachers.mixture import gaussian_mixture

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.0085, "beta_end": 0.12}
SCHEDULES = {
    "cosine": get_schedule("cosine"),
    "cosine-shifted": get_schedule("cosine", shift=2.5),
    "linear_beta": get_schedule("linear_beta"),
    "edm": get_schedule("edm"),
    "flow": get_schedule("flow"),
    "flow-shifted": get_schedule("flow", shift=3.0),
    "discrete": get_schedule("discrete", num_train_timesteps=100, **SCALED),
    "zero-snr": get_schedule(
        "discrete", num_train_timesteps=100, rescale_betas_zero_snr=True, **SCALED
    ),
}
STEPS = {"ddim": ddim_step, "heun": heun_step}

MEANS = np.array([[-1.0, 0.5], [0.3, -0.7], [1.5, 1.0]]).reshape(3, 1, 2, 1)
SCALES = np.array([0.5, 0.4, 0.6])
EPS = np.random.default_rng(0).normal(size=(4, 1, 2, 1))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def mixture(schedule: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    teacher = gaussian_mixture(MEANS, SCALES, schedule)
    return lambda x_t, t: teacher.denoise(teacher.params, x_t, t, None)


def full(time: float) -> jax.Array:
    return jnp.full((len(EPS),), time)


# --- signal space is image space


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_signal_steps_are_image_steps(name, solver):
    schedule = SCHEDULES[name]
    denoise = mixture(schedule)
    eps = jnp.asarray(EPS)
    times = [0.97, 0.8, 0.45, 0.2, 0.03]
    x = expand(schedule.prior_scale(full(0.97)), eps) * jnp.asarray(EPS[::-1] + 0.3)
    alpha, sigma = schedule.alpha(full(0.97)), schedule.sigma(full(0.97))
    y = (x - expand(sigma, eps) * eps) / expand(alpha, eps)

    @jax.jit
    def step(y: Any, x: Any, t: Any, s: Any) -> Any:
        y = signal_step(denoise, schedule, solver, y, eps, t, s)
        image = add_noise(schedule, y, eps, s)
        return y, image, STEPS[solver](denoise, schedule, x, t, s)

    for t, s in zip(map(full, times[:-1]), map(full, times[1:]), strict=True):
        y, image, x = step(y, x, t, s)
        # Exploding variance: x is as large as sigma, and rounded so.
        np.testing.assert_allclose(image, x, rtol=1e-11, atol=1e-11)
    assert np.abs(np.asarray(x)).max() < 10


@pytest.mark.parametrize("name", ["cosine", "flow", "zero-snr"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_step_from_pure_noise(name, solver):
    """There the signal is not known yet: the step goes to the estimate itself."""
    schedule, eps = SCHEDULES[name], jnp.asarray(EPS)
    denoise = mixture(schedule)
    t, s = full(1.0), full(0.9)
    np.testing.assert_array_equal(step_fraction(schedule, t, s), np.ones(4))
    any_signal = jnp.asarray(EPS) * 3 + 1
    y = signal_step(denoise, schedule, solver, any_signal, eps, t, s)
    x = STEPS[solver](denoise, schedule, eps, t, s)
    np.testing.assert_allclose(add_noise(schedule, y, eps, s), x, atol=1e-12)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_step_fraction_is_the_ratio_of_the_paper(name):
    schedule = SCHEDULES[name]
    t, s = jnp.linspace(0.1, 0.99, 7), jnp.linspace(0.05, 0.9, 7)
    alpha_t, sigma_t = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    alpha_s, sigma_s = np.asarray(schedule.alpha(s)), np.asarray(schedule.sigma(s))
    expected = 1 - alpha_t * sigma_s / (sigma_t * alpha_s)
    np.testing.assert_allclose(step_fraction(schedule, t, s), expected, rtol=1e-9)


def test_a_step_goes_a_fraction_of_the_way_to_its_target():
    schedule, eps = SCHEDULES["cosine"], jnp.asarray(EPS)
    t, s = full(0.7), full(0.5)
    y = jnp.asarray(EPS[::-1] * 0.4)
    fraction = 1 - np.tan(np.pi * 0.25) / np.tan(np.pi * 0.35)
    for solver in SOLVERS:
        target = signal_target(mixture(schedule), schedule, solver, y, eps, t, s)
        moved = signal_step(mixture(schedule), schedule, solver, y, eps, t, s)
        np.testing.assert_allclose(moved, y + fraction * (target - y), rtol=1e-12)


# --- the ODE, by scipy


def cosine(t: float) -> tuple[float, float, float, float]:
    angle = np.pi / 2 * t
    slope = np.pi / 2
    return np.cos(angle), np.sin(angle), -slope * np.sin(angle), slope * np.cos(angle)


def flow(t: float) -> tuple[float, float, float, float]:
    return 1 - t, t, -1.0, 1.0


def linear_beta(t: float) -> tuple[float, float, float, float]:
    alpha = np.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)
    slope = -alpha * (0.1 + 19.9 * t) / 2
    sigma = np.sqrt(1 - alpha**2)
    return alpha, sigma, slope, -alpha * slope / sigma


def posterior_mean(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """The mixture's denoiser in numpy: ``x [B, 2]``."""
    means = MEANS.reshape(3, 2)
    variance = alpha**2 * SCALES**2 + sigma**2
    offset = x[:, None] - alpha * means
    log_p = -(offset**2).sum(-1) / (2 * variance) - np.log(variance)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    components = means + (alpha * SCALES**2 / variance)[:, None] * offset
    return (p[..., None] * components).sum(1)


def exact_end(coefficients: Callable[[float], Any], t_end: float) -> np.ndarray:
    """The probability-flow ODE in the form of dx/dt, from noise to ``t_end``."""

    def slope(t: float, x: np.ndarray) -> np.ndarray:
        alpha, sigma, alpha_slope, sigma_slope = coefficients(t)
        x = x.reshape(-1, 2)
        x_0 = posterior_mean(x, alpha, sigma)
        return (alpha_slope * x_0 + sigma_slope * (x - alpha * x_0) / sigma).ravel()

    alpha, sigma, *_ = coefficients(1.0)
    start = np.hypot(alpha, sigma) * EPS.ravel()
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-12}
    return solve_ivp(slope, (1.0, t_end), start, **options).y[:, -1].reshape(EPS.shape)


@pytest.mark.parametrize("solver, ratio", [("ddim", 2), ("heun", 4)])
@pytest.mark.parametrize(
    "name, coefficients",
    [("cosine", cosine), ("flow", flow), ("linear_beta", linear_beta)],
)
def test_order_of_convergence(name, coefficients, solver, ratio):
    schedule, t_end = SCHEDULES[name], 0.2
    exact = exact_end(coefficients, t_end)
    errors = []
    for num_steps in (32, 64, 128):
        times = time_grid(num_steps, 1.0, t_end)
        end = sample_ode(mixture(schedule), schedule, jnp.asarray(EPS), times, solver)
        errors.append(np.sqrt(np.mean((np.asarray(end) - exact) ** 2)))
    ratios = np.divide(errors[:-1], errors[1:])
    assert (0.8 * ratio < ratios).all() and (ratios < 1.25 * ratio).all(), ratios
    assert errors[-1] < {"ddim": 0.02, "heun": 2e-3}[solver]


def test_the_last_step_to_the_data_is_the_estimate():
    schedule = SCHEDULES["flow"]
    exact = exact_end(flow, 1e-4)
    end = sample_ode(
        mixture(schedule), schedule, jnp.asarray(EPS), time_grid(200), "heun"
    )
    assert np.isfinite(end).all()
    np.testing.assert_allclose(end, exact, atol=2e-3)


# --- the sampler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_that_of_diffusers(prediction_type):
    """From the same noise through the same network, every step and the whole."""
    theirs = DDIMScheduler(
        num_train_timesteps=100,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
        **SCALED,
    )
    theirs.set_timesteps(10)
    # Their table is float32; with the float64 one what is left is arithmetic.
    betas = torch.linspace(0.0085**0.5, 0.12**0.5, 100, dtype=torch.float64) ** 2
    theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    schedule = SCHEDULES["discrete"]

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        output = jnp.tanh(x_t) + expand(schedule.time_input(t), x_t) / 100
        return to_x_0(
            prediction_type, output, x_t, schedule.alpha(t), schedule.sigma(t)
        )

    x = torch.tensor(EPS)
    for step in theirs.timesteps.tolist():
        before = jnp.asarray(x.numpy())
        x = theirs.step(torch.tanh(x) + step / 100, step, x, eta=0.0).prev_sample
        t, s = full((step + 1) / 100), full((step - 9) / 100)
        ours = ddim_step(denoise, schedule, before, t, s)
        np.testing.assert_allclose(ours, x.numpy(), rtol=1e-9, atol=1e-9)
    assert step == 9
    whole = sample_ode(denoise, schedule, jnp.asarray(EPS), time_grid(10))
    np.testing.assert_allclose(whole, x.numpy(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_compiled_sampler_is_a_loop(name, solver, num_steps):
    schedule = SCHEDULES[name]
    denoise, eps = mixture(schedule), jnp.asarray(EPS)
    times = np.linspace(1, 0.1, num_steps + 1)
    scale = np.hypot(
        *(np.asarray(f(full(1.0)))[0] for f in (schedule.alpha, schedule.sigma))
    )
    x = scale * EPS
    for index in range(num_steps):
        pair = []
        for time in times[index : index + 2]:
            pair.append(
                (
                    float(schedule.alpha(full(time))[0]),
                    float(schedule.sigma(full(time))[0]),
                )
            )
        (alpha_t, sigma_t), (alpha_s, sigma_s) = pair
        f = posterior_mean(x.reshape(-1, 2), alpha_t, sigma_t).reshape(x.shape)
        moved = alpha_s * f + sigma_s * (x - alpha_t * f) / sigma_t
        if solver == "heun" and index < num_steps - 1:
            second = posterior_mean(moved.reshape(-1, 2), alpha_s, sigma_s)
            f = (f + second.reshape(x.shape)) / 2
            moved = alpha_s * f + sigma_s * (x - alpha_t * f) / sigma_t
        x = moved
    compiled = jax.jit(
        lambda eps: sample_ode(denoise, schedule, eps, jnp.asarray(times), solver)
    )
    np.testing.assert_allclose(compiled(eps), x, rtol=1e-8, atol=1e-10)


def test_time_grid_is_diffusers_trailing_spacing():
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(8)
    grid = np.asarray(time_grid(8))
    np.testing.assert_allclose(
        grid[:-1] * 1000 - 1, theirs.timesteps.numpy(), atol=1e-9
    )
    assert (grid[0], grid[-1]) == (1, 0)


def test_time_grid_crowds_towards_the_end():
    grid = np.asarray(time_grid(4, 0.9, 0.1, power=2.0))
    np.testing.assert_allclose(grid, [0.9, 0.55, 0.3, 0.15, 0.1], rtol=1e-12)


@pytest.mark.parametrize("name", ["sample", "step", "target"])
def test_an_unknown_solver_is_refused(name):
    schedule, eps = SCHEDULES["cosine"], jnp.asarray(EPS)
    denoise, t, s = mixture(schedule), full(0.5), full(0.4)
    calls = {
        "sample": lambda: sample_ode(denoise, schedule, eps, time_grid(2), "euler"),
        "step": lambda: signal_step(denoise, schedule, "euler", eps, eps, t, s),
        "target": lambda: signal_target(denoise, schedule, "euler", eps, eps, t, s),
    }
    with pytest.raises(
        ValueError, match=r"'euler' is not known; choose one of \('ddim"
    ):
        calls[name]()
