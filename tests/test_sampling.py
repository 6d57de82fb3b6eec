"""Generation: an image depends on its seed and its number, on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from boot_jax import sampling
from boot_jax.config import ConfigError
from boot_jax.objectives import Objective
from boot_jax.schedules import get_schedule
from boot_jax.sharding import AXES, create_mesh
from boot_jax.solvers import sample_ode, time_grid
from boot_jax.teachers.mixture import gaussian_mixture

SHAPE = (2, 2, 1)
COSINE = get_schedule("cosine")
MEANS = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


def mixture(schedule=COSINE, labels=None):
    return gaussian_mixture(MEANS, [0.3, 0.5, 0.2], schedule, labels=labels)


def one_device_mesh():
    types = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), AXES, types, devices=jax.devices()[:1])


def noise(indices):
    return sampling.image_noise(5, indices, SHAPE)


def test_the_noise_of_an_image_is_its_own():
    key = jax.random.key(5)
    together = noise(np.arange(9))
    assert together.shape == (9, *SHAPE) and together.dtype == jnp.float32
    for index in (0, 4, 8):
        alone = jax.random.normal(jax.random.fold_in(key, index), SHAPE)
        np.testing.assert_array_equal(together[index], alone)
        np.testing.assert_array_equal(noise([index])[0], alone)
    assert not np.array_equal(together, sampling.image_noise(6, np.arange(9), SHAPE))


def test_the_noise_is_standard_normal():
    values = np.asarray(noise(np.arange(4000))).reshape(4000, -1)
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    correlation = np.corrcoef(values.T)
    assert np.abs(correlation - np.eye(4)).max() < 0.06
    # Neither do neighbours resemble one another.
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.06


@pytest.mark.parametrize("kind", ["student", "teacher", "conditional teacher"])
def test_an_image_depends_on_neither_batch_size_nor_devices(kind):
    teacher = mixture(labels=[0, 1, 2] if kind == "conditional teacher" else None)
    if kind == "student":

        def signal(params, eps, t, condition):
            bent = jnp.tanh(params["a"] * eps) + t[:, None, None, None]
            return bent + 0.1 * condition["label"][:, None, None, None].astype(t.dtype)

        params = {"a": jnp.asarray(0.7)}
        generator = sampling.one_step(signal, params, Objective())
    else:
        generator = sampling.many_steps(teacher.denoise, teacher.params, COSINE, 3)
    classes = None if kind == "teacher" else 3

    def condition(indices):
        return sampling.conditions_for(indices, classes)

    eight, one = create_mesh(), one_device_mesh()
    runs = [(11, 3, one), (11, 8, one), (11, 16, eight), (11, 3, eight), (5, 8, eight)]
    images = [
        sampling.generate(generator, noise, condition, num, size, mesh).images
        for num, size, mesh in runs
    ]
    assert [len(found) for found in images] == [11, 11, 11, 11, 5]
    assert len(np.unique(images[0].round(4), axis=0)) == 11
    for found in images[1:]:
        np.testing.assert_allclose(found, images[0][: len(found)], rtol=1e-5, atol=1e-5)


def test_batches_are_even_whole_and_timed(monkeypatch):
    sizes = []

    def generator(eps, condition):
        sizes.append(eps.shape[0])
        assert len(eps.sharding.device_set) == 8
        assert eps.addressable_shards[0].data.shape[0] == eps.shape[0] // 8
        return eps

    # Three batches of two seconds each.
    clock = iter([0.0, 2.0, 10.0, 12.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = sampling.generate(
        generator, noise, lambda indices: None, 21, 6, create_mesh()
    )
    # The first is run once more, before the clock, to compile.
    assert sizes == [8, 8, 8, 8]
    np.testing.assert_array_equal(found.images, noise(np.arange(21)))
    assert found.seconds_per_image == pytest.approx(6 / 24)


def test_fewer_images_than_a_batch_take_a_smaller_one():
    sizes = []

    def generator(eps, condition):
        sizes.append(eps.shape[0])
        return eps

    sampling.generate(generator, noise, lambda _: None, 3, 512, create_mesh())
    assert set(sizes) == {8}


def test_the_student_is_asked_for_its_image_at_t_min():
    asked = []

    def signal(params, eps, t, condition):
        asked.append((t.shape, t.dtype))
        return params * eps + t[:, None, None, None] + condition[:, None, None, None]

    call = sampling.one_step(signal, jnp.asarray(2.0), Objective(t_min=0.25))
    eps = noise(np.arange(3))
    found = call(eps, jnp.asarray([0.0, 10.0, 20.0]))
    told = 0.25 + np.asarray([0.0, 10.0, 20.0])[:, None, None, None]
    np.testing.assert_allclose(found, 2 * np.asarray(eps) + told, rtol=1e-6)
    call(eps, jnp.zeros(3))
    assert asked == [((3,), jnp.float32)]  # compiled once


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("name", ["cosine", "edm", "flow"])
def test_many_steps_follow_the_ode(name, solver):
    """Dispatched one by one, they are the steps of the solver."""
    schedule = get_schedule(name)
    teacher, eps = mixture(schedule), noise(np.arange(5))
    for num_steps, t_max in ((1, 1.0), (6, 1.0), (6, 0.9)):
        found = sampling.many_steps(
            teacher.denoise,
            teacher.params,
            schedule,
            num_steps,
            t_max=t_max,
            solver=solver,
        )(eps, None)
        expected = sample_ode(
            lambda x, t: teacher.denoise(teacher.params, x, t, None),
            schedule,
            eps,
            time_grid(num_steps, t_max),
            solver,
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_one_program_serves_every_number_of_steps():
    traced = []

    def denoise(params, x_t, t, condition):
        traced.append(None)
        return params * x_t

    for num_steps in (2, 5, 9):
        sampling.many_steps(denoise, jnp.asarray(0.5), COSINE, num_steps)(
            noise([0]), None
        )
    assert len(traced) == 1


def test_slerp_keeps_the_ends_the_norm_and_the_pace():
    start, end = noise([0])[0], noise([1])[0]
    start, end = (end_ / jnp.linalg.norm(end_) * 3 for end_ in (start, end))
    weights = jnp.linspace(0.0, 1.0, 7)
    path = np.asarray(sampling.slerp(start, end, weights))
    assert path.shape == (7, *SHAPE)
    np.testing.assert_allclose(path[0], start, atol=1e-5)
    np.testing.assert_allclose(path[-1], end, atol=1e-5)
    flat = path.reshape(7, -1)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 3.0, rtol=1e-5)
    steps = np.arccos(np.sum(flat[1:] * flat[:-1], axis=1) / 9)
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)
    # In one plane: the great circle.
    assert np.linalg.matrix_rank(flat, tol=1e-4) == 2


def test_slerp_of_equal_ends_stays():
    eps = noise([0])[0]
    path = sampling.slerp(eps, eps, jnp.asarray([0.0, 0.3, 1.0]))
    np.testing.assert_allclose(path, np.stack([eps] * 3), rtol=1e-3, atol=1e-5)


def test_conditions_take_every_class_in_turn_or_one():
    indices = np.arange(4, 9)
    assert sampling.conditions_for(indices, None) is None
    turn = sampling.conditions_for(indices, 3)
    assert list(turn) == ["label"] and turn["label"].dtype == np.int32
    np.testing.assert_array_equal(turn["label"], [1, 2, 0, 1, 2])
    one = sampling.conditions_for(indices, 3, label=2, guidance_scale=1.5)
    np.testing.assert_array_equal(one["label"], [2] * 5)
    np.testing.assert_array_equal(one["guidance_scale"], np.full(5, 1.5, np.float32))
    assert one["guidance_scale"].dtype == np.float32


@pytest.mark.parametrize("label", [3, -2, 100])
def test_a_class_that_is_not_there_is_refused(label):
    with pytest.raises(ConfigError, match=rf"sample.label is {label}.*0 to 2") as no:
        sampling.conditions_for(np.arange(2), 3, label=label)
    assert "\n" not in str(no.value)
