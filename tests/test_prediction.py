"""Conversions between prediction types against PyTorch diffusers' schedulers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from boot_jax.prediction import (
    PREDICTION_TYPES,
    THRESHOLDING,
    clip,
    dynamic_threshold,
    expand,
    from_x_0,
    to_x_0,
)
from boot_jax.schedules import from_diffusers, get_schedule

SCHEDULES = {
    "cosine": get_schedule("cosine"),
    "shifted": get_schedule("cosine", shift=2.5),
    "linear_beta": get_schedule("linear_beta"),
    "edm": get_schedule("edm"),
    "flow": get_schedule("flow", shift=3.0),
    "discrete": get_schedule("discrete", num_train_timesteps=50),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X_0, EPS = normal(0, 5, 2, 3, 1), normal(1, 5, 2, 3, 1)
TIMES = np.array([0.01, 0.2, 0.5, 0.9, 0.99], np.float32)


def noised(schedule: Any, times: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    alpha_t, sigma_t = schedule.alpha(jnp.asarray(times)), schedule.sigma(times)
    wide = (..., None, None, None)
    x_t = np.asarray(alpha_t)[wide] * X_0 + np.asarray(sigma_t)[wide] * EPS
    return jnp.asarray(x_t), alpha_t, jnp.asarray(sigma_t)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_perfect_prediction_means_the_image(name, prediction_type):
    x_t, alpha_t, sigma_t = noised(SCHEDULES[name], TIMES)
    output = from_x_0(
        prediction_type, jnp.asarray(X_0), jnp.asarray(EPS), alpha_t, sigma_t
    )
    x_0 = to_x_0(prediction_type, output, x_t, alpha_t, sigma_t)
    # x_t is rounded to its own size, which alpha divides.
    size = np.abs(np.asarray(x_t)).max((1, 2, 3))
    error = np.abs(np.asarray(x_0) - X_0).max((1, 2, 3))
    divisor = {"epsilon": alpha_t, "flow_prediction": alpha_t + sigma_t}.get(
        prediction_type, jnp.hypot(alpha_t, sigma_t)
    )
    scale = np.maximum(size / np.asarray(divisor), 1.0)
    assert (error <= 4e-6 * scale).all()


def test_what_perfect_networks_predict():
    alpha, sigma = np.array([0.6], np.float32), np.array([0.8], np.float32)
    x_0, eps = np.array([[2.0]], np.float32), np.array([[-1.0]], np.float32)
    arrays = [jnp.asarray(a) for a in (x_0, eps, alpha, sigma)]
    wanted = {
        "epsilon": -1.0,
        "sample": 2.0,
        "v_prediction": 0.6 * -1 - 0.8 * 2,
        "flow_prediction": -3.0,
    }
    for prediction_type, value in wanted.items():
        actual = from_x_0(prediction_type, *arrays)
        np.testing.assert_allclose(actual, [[value]], rtol=1e-6)
    # With exploding variance, v is Karras' F: (x_0 - c_skip x_t) / c_out.
    sigma = np.array([5.0], np.float32)
    x_t = x_0 + 5 * eps
    skip, out = 1 / 26, -5 / 26**0.5
    arrays = [jnp.asarray(a) for a in (x_0, eps, np.ones(1, np.float32), sigma)]
    actual = from_x_0("v_prediction", *arrays)
    np.testing.assert_allclose(actual, (x_0 - skip * x_t) / out, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_discrete_teachers_are_read_as_diffusers_ddim_does(
    prediction_type, beta_schedule
):
    theirs = DDIMScheduler(
        num_train_timesteps=50,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        clip_sample=False,
    )
    theirs.set_timesteps(50)
    schedule = from_diffusers(theirs.config)
    for step in (0, 20, 49):
        t = jnp.full((5,), (step + 1) / 50)
        x_t, output = normal(step, 5, 2, 3, 1), normal(step + 1, 5, 2, 3, 1)
        expected = theirs.step(torch.tensor(output), step, torch.tensor(x_t))
        actual = to_x_0(
            prediction_type,
            jnp.asarray(output),
            jnp.asarray(x_t),
            schedule.alpha(t),
            schedule.sigma(t),
        )
        np.testing.assert_allclose(
            actual, expected.pred_original_sample.numpy(), rtol=2e-4, atol=1e-5
        )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_exploding_teachers_are_read_as_diffusers_euler_does(prediction_type):
    theirs = EulerDiscreteScheduler(
        prediction_type=prediction_type,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=80.0,
    )
    theirs.set_timesteps(6)
    schedule = get_schedule("edm")
    for index, timestep in enumerate(theirs.timesteps):
        x_t = theirs.sigmas[index].item() * normal(index, 5, 2, 3, 1)
        output = normal(index + 9, 5, 2, 3, 1)
        scaled = theirs.scale_model_input(torch.tensor(x_t), timestep)
        expected = theirs.step(torch.tensor(output), timestep, torch.tensor(x_t))
        t = jnp.full((5,), 1 - index / 5)
        np.testing.assert_allclose(
            expand(schedule.input_scale(t), x_t) * x_t,
            scaled.numpy(),
            rtol=1e-4,
            atol=1e-6,
        )
        actual = to_x_0(
            prediction_type,
            jnp.asarray(output),
            jnp.asarray(x_t),
            schedule.alpha(t),
            schedule.sigma(t),
        )
        np.testing.assert_allclose(
            actual, expected.pred_original_sample.numpy(), rtol=1e-3, atol=2e-3
        )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_no_type_but_epsilon_needs_a_signal(prediction_type):
    none = jnp.zeros((5,))
    x_0 = to_x_0(
        prediction_type,
        from_x_0(
            prediction_type, jnp.asarray(X_0), jnp.asarray(EPS), none, jnp.ones((5,))
        ),
        jnp.asarray(EPS),
        none,
        jnp.ones((5,)),
    )
    if prediction_type == "epsilon":
        assert not np.isfinite(x_0).any()
    else:
        np.testing.assert_allclose(x_0, X_0, atol=1e-6)


@pytest.mark.parametrize("convert", [to_x_0, from_x_0])
def test_an_unknown_type_is_refused(convert):
    arrays = [jnp.asarray(a) for a in (X_0, EPS, TIMES, TIMES)]
    message = "prediction type 'v' is not known; choose one of epsilon, sample, v_pred"
    with pytest.raises(ValueError, match=message):
        convert("v", *arrays)


def test_expand_appends_axes():
    assert expand(jnp.ones((5,)), X_0).shape == (5, 1, 1, 1)
    assert expand(jnp.ones((5, 2)), X_0).shape == (5, 2, 1, 1)


@pytest.mark.parametrize("ratio, max_value", [(0.995, 1.0), (0.9, 1.5), (0.5, 100.0)])
def test_dynamic_threshold_is_that_of_diffusers(ratio, max_value):
    theirs = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=max_value
    )
    # One image stays within [-1, 1], others reach beyond max_value.
    scale = np.array([0.2, 1.0, 1.4, 3.0, 30.0], np.float32)[:, None, None, None]
    x_0 = normal(3, 5, 4, 4, 3) * scale
    expected = theirs._threshold_sample(torch.tensor(x_0)).numpy()
    actual = dynamic_threshold(jnp.asarray(x_0), ratio, max_value)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_thresholding_by_name():
    x_0 = jnp.asarray([[-3.0, 0.5, 1.5]])
    np.testing.assert_array_equal(THRESHOLDING["none"](x_0), x_0)
    np.testing.assert_array_equal(THRESHOLDING["clip"](x_0), [[-1.0, 0.5, 1.0]])
    np.testing.assert_array_equal(clip(x_0, 2.0), [[-2.0, 0.5, 1.5]])
    # At diffusers' default of max_value = 1, it is clipping.
    np.testing.assert_array_equal(THRESHOLDING["dynamic"](x_0), [[-1.0, 0.5, 1.0]])
