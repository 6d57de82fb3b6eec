"""What is read out of a scheduler's config, against PyTorch diffusers' schedulers."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from boot_jax.prediction import Thresholding
from boot_jax.teachers.base import TeacherError
from boot_jax.teachers.scheduler import DISCRETE, Spacing, read_scheduler

diffusers = importlib.import_module("diffusers")


def config_of(name: str, **options: Any) -> dict[str, Any]:
    return dict(getattr(diffusers, name)(**options).config) | {"_class_name": name}


@pytest.mark.parametrize("steps", [1, 7, 20, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_times_are_those_of_ddim(spacing: str, steps: int):
    options = {"timestep_spacing": spacing, "steps_offset": 1}
    scheduler = DDIMScheduler(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(steps)
    spaced = read_scheduler(config_of("DDIMScheduler", **options)).spacing
    assert spaced is not None
    t, s = spaced(steps)
    asked = scheduler.timesteps.numpy()
    np.testing.assert_allclose(t * 1000 - 1, asked, atol=1e-3)
    # Where a step leads does not show in PyTorch's state, only in its step.
    before = asked - 1000 // steps
    np.testing.assert_allclose(s * 1000 - 1, np.maximum(before, -1), atol=1e-3)
    assert (t.shape, s.shape, t.dtype) == ((steps,), (steps,), np.float32)


def test_the_last_step_may_end_at_training_step_0():
    _, ends = Spacing(100, "leading", ends_clean=False)(10)
    np.testing.assert_allclose(ends[-2:], [0.01, 0.01])
    _, ends = Spacing(100, "leading")(10)
    np.testing.assert_allclose(ends[-2:], [0.01, 0.0])


def test_as_many_steps_as_were_trained_at_most():
    with pytest.raises(ValueError, match="11 steps are not within 1 to 10"):
        Spacing(10)(11)


@pytest.mark.parametrize("name", DISCRETE)
def test_levels_are_those_of_each_scheduler(name: str):
    options = {"beta_schedule": "scaled_linear", "num_train_timesteps": 50}
    config = config_of(name, **options)
    schedule = read_scheduler(config).schedule
    t = (jnp.arange(50) + 1) / 50
    expected = getattr(diffusers, name)(**options).alphas_cumprod
    # PyTorch sums in float32.
    np.testing.assert_allclose(schedule.alpha(t) ** 2, expected, rtol=2e-5)
    np.testing.assert_allclose(schedule.time_input(t), np.arange(50), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 30},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_levels_of_other_betas(options: dict[str, Any]):
    schedule = read_scheduler(config_of("DDIMScheduler", **options)).schedule
    expected = DDIMScheduler(**options).alphas_cumprod.numpy()
    t = (jnp.arange(len(expected)) + 1) / len(expected)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("DDIMScheduler", {}, Thresholding("clip")),
        ("DDPMScheduler", {}, Thresholding("clip")),
        ("DDPMScheduler", {"clip_sample_range": 2.0}, Thresholding("clip", 2.0)),
        ("DDIMScheduler", {"clip_sample": False}, Thresholding()),
        ("PNDMScheduler", {}, Thresholding()),
        (
            "DPMSolverMultistepScheduler",
            {"thresholding": True, "dynamic_thresholding_ratio": 0.9},
            Thresholding("dynamic", 1.0, 0.9),
        ),
        (
            "DDPMScheduler",
            {"thresholding": True, "sample_max_value": 1.5},
            Thresholding("dynamic", 1.5),
        ),
    ],
)
def test_thresholding(name: str, options: dict[str, Any], expected: Thresholding):
    assert read_scheduler(config_of(name, **options)).thresholding == expected


def test_dynamic_thresholding_is_that_of_pytorch():
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=1.5)
    x_0 = 2 * np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    expected = scheduler._threshold_sample(torch.tensor(x_0)).numpy()
    actual = Thresholding("dynamic", 1.5)(jnp.asarray(x_0))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_config_that_says_little_has_the_defaults_of_its_class():
    ddpm = read_scheduler({"_class_name": "DDPMScheduler"})
    assert ddpm.spacing == Spacing(1000, "leading")
    euler = read_scheduler({"_class_name": "EulerDiscreteScheduler"})
    assert euler.spacing == Spacing(1000, "linspace")
    assert euler.prediction_type == "epsilon"
    old = {"_class_name": "DDPMScheduler", "predict_epsilon": False}
    assert read_scheduler(old).prediction_type == "sample"


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "scheduler None has no ODE"),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler has no ODE.*DDIMScheduler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"trained_betas": ["a"]}, "betas of EulerDiscreteScheduler cannot be used"),
    ],
)
def test_what_has_no_ode_is_refused(config: dict[str, Any], message: str):
    named = config and {"_class_name": "EulerDiscreteScheduler"} | config
    with pytest.raises(TeacherError, match=message):
        read_scheduler(named)
