"""Teachers over continuous noise: Karras' and NCSN++'s, against PyTorch diffusers."""

import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
import torch
from diffusers import EDMEulerScheduler, ScoreSdeVePipeline, ScoreSdeVeScheduler

from boot_jax.sampling import many_steps, to_images
from boot_jax.schedules import NoiseSchedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, TeacherError
from boot_jax.teachers.continuous import GeometricSchedule, PreconditionedSchedule
from boot_jax.teachers.diffusers import load_teacher
from boot_jax.teachers.scheduler import read_scheduler

SHAPE = (3, 8, 8, 3)


def karras(
    folder: pathlib.Path, prediction_type: str
) -> tuple[Any, EDMEulerScheduler, Teacher]:
    """A network trained as by Karras et al.; diffusers has no pipeline of only that."""
    model = pipelines.unet(**pipelines.ONE_LEVEL)
    scheduler = EDMEulerScheduler(sigma_data=0.4, prediction_type=prediction_type)
    model.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Mine",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "EDMEulerScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return model, scheduler, load_teacher(str(folder))


def to_torch(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@torch.no_grad()
def denoised(model: Any, scheduler: Any, x: torch.Tensor, sigma: Any) -> torch.Tensor:
    """PyTorch's estimate for images ``x``, of one noise level."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32)
    time = scheduler.precondition_noise(sigma).expand(len(x))
    output = model(scheduler.precondition_inputs(x, sigma), time).sample
    return scheduler.precondition_outputs(x, output, sigma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_karras_sampler_equals_pytorch(prediction_type: str, tmp_path: pathlib.Path):
    model, scheduler, teacher = karras(tmp_path, prediction_type)
    eps = jax.random.normal(jax.random.key(0), SHAPE)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.numpy()[:-1]  # the very last step, to 0, is its own
    start = teacher.schedule.prior_scale(jnp.ones(1))[0]
    x = to_torch(eps * start * 0.4)
    for sigma, lower in itertools.pairwise(sigmas):
        x_0 = denoised(model, scheduler, x, sigma)
        x = x_0 + (x - x_0) * float(lower / sigma)
    sampler = many_steps(teacher.denoise, teacher.params, teacher.schedule, 7)
    actual = to_images(teacher.decoder, np.asarray(sampler(eps, None)))
    expected = x.permute(0, 2, 3, 1).numpy()
    assert 0.1 < expected.std() < 1
    np.testing.assert_allclose(actual, np.clip(expected, -1, 1), atol=1e-3)


def test_student_of_a_karras_teacher_starts_as_it(tmp_path: pathlib.Path):
    _, _, teacher = karras(tmp_path, "epsilon")
    student = create_student(teacher)
    eps, one = jax.random.normal(jax.random.key(0), SHAPE), jnp.ones(3)
    params = student.init(jax.random.key(1))
    y = jax.jit(student.signal)(params, eps, 0.5 * one, None)
    x_t = eps * teacher.schedule.prior_scale(one)[0]
    x_0 = jax.jit(teacher.denoise)(teacher.params, x_t, one, None)
    np.testing.assert_allclose(y, x_0, rtol=1e-4, atol=1e-4)


def test_score_based_teacher_equals_pytorch(tmp_path: pathlib.Path):
    model = pipelines.unet(**pipelines.ONE_LEVEL, time_embedding_type="fourier")
    scheduler = ScoreSdeVeScheduler(sigma_max=50.0)
    ScoreSdeVePipeline(model, scheduler).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    t = jnp.array([0.1, 0.6, 1.0])
    sigma = teacher.schedule.sigma(t)
    np.testing.assert_allclose(sigma, 0.01 * 5000 ** np.asarray(t), rtol=1e-5)
    x = jax.random.normal(jax.random.key(0), SHAPE) * sigma[:, None, None, None]
    with torch.no_grad():
        score = model(to_torch(x), torch.tensor(np.asarray(sigma))).sample
    # Tweedie's formula; the pipeline's images are in [0, 1].
    level = np.asarray(sigma)[:, None, None, None]
    expected = np.asarray(x) + level**2 * score.permute(0, 2, 3, 1).numpy()
    actual = jax.jit(teacher.denoise)(teacher.params, x, t, None)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
    images = to_images(teacher.decoder, np.array([0.0, 0.25, 1.0], "f").reshape(1, 3))
    np.testing.assert_allclose(images, [[-1.0, -0.5, 1.0]])


@pytest.mark.parametrize(
    "schedule", [GeometricSchedule(), PreconditionedSchedule(sigma_data=0.4)]
)
def test_schedules_are_consistent(schedule: NoiseSchedule):
    t = jnp.linspace(0, 1, 11)
    lambda_t = schedule.lambda_(t)
    np.testing.assert_allclose(schedule.t_from_lambda(lambda_t), t, atol=1e-5)
    np.testing.assert_allclose(jnp.log(schedule.sigma(t)), lambda_t, atol=1e-5)
    slope = jax.vmap(jax.grad(lambda t: schedule.lambda_(t)))(t)
    np.testing.assert_allclose(schedule.dt_dlambda(t), 1 / slope, rtol=1e-4)


def test_what_a_network_is_told():
    schedule = PreconditionedSchedule(0.002 / 0.4, 80 / 0.4, sigma_data=0.4)
    told = schedule.time_input(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(told, np.log([0.002, 80.0]) / 4, rtol=1e-5)
    sigma = GeometricSchedule().time_input(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(sigma, [0.01, 1348.0], rtol=1e-5)


def test_other_predictions_are_refused():
    config = {"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}
    with pytest.raises(TeacherError, match="'sample' is not supported; use 'epsilon'"):
        read_scheduler(config)
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0}
    with pytest.raises(TeacherError, match="EDMEulerScheduler cannot be used"):
        read_scheduler(config)
