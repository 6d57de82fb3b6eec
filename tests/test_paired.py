"""The judge, judged: on a teacher whose trajectories are known exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from scipy.integrate import solve_ivp

from boot_jax.config import default_config
from boot_jax.evaluation import paired
from boot_jax.evaluation.features import get_features
from boot_jax.evaluation.over_time import error_over_time
from boot_jax.evaluation.reference import measure
from boot_jax.evaluation.teacher_side import (
    Targets,
    has_teacher_side,
    read_teacher_side,
    write_teacher_side,
)
from boot_jax.objectives import Objective
from boot_jax.schedules import get_schedule
from boot_jax.sharding import create_mesh
from boot_jax.teachers.base import as_sampled
from boot_jax.teachers.mixture import gaussian_mixture, sample_mixture

COSINE = get_schedule("cosine")
SHAPE = (1, 1, 2)
MEAN, SCALE = np.asarray([0.6, -0.3], np.float32), 0.5
OBJECTIVE = Objective(t_min=0.005)
OPTIONS = default_config().evaluation.to_dict() | {
    "num_images": 256,
    "batch_size": 128,
    "ddim_steps": (1, 2, 4, 8),
    "ode_steps": 48,
    "error_times": 6,
    "error_images": 64,
    "grid_images": 5,
    "neighbours": 3,
    "seed": 7,
}


def exact_signal(params, eps, t, condition):
    """One Gaussian: ``x = alpha m + sqrt(alpha^2 s^2 + sigma^2) eps`` at all times.

    It keeps its place in the Gaussian of every time; divided as the signal is,
    ``y = m + (sqrt(alpha^2 s^2 + sigma^2) - sigma) / alpha eps``. Multiplied out, so
    that it is exact where alpha is 0.
    """
    alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
    deviation = jnp.sqrt(alpha**2 * SCALE**2 + sigma**2)
    gain = alpha * SCALE**2 / (deviation + sigma)
    return MEAN.reshape(1, *SHAPE) + gain[:, None, None, None] * eps


def pair_of(signal, params=None, **changes):
    teacher = gaussian_mixture(MEAN.reshape(1, *SHAPE), [SCALE], COSINE)
    options = {
        "signal": signal,
        "params": params,
        "denoise": teacher.denoise,
        "teacher": teacher,
        "objective": OBJECTIVE,
    }
    return paired.Pair(**(options | changes))


def scoring_of(features, reference, **changes):
    mine = {"options": OPTIONS, "mesh": create_mesh()} | changes
    return paired.Scoring(features=features, reference=reference, **mine)


@pytest.fixture(scope="module")
def exact():
    pair = pair_of(exact_signal)
    real = np.asarray(sample_mixture(pair.teacher, jax.random.key(0), 2000))
    told, features = [], get_features("pixels", SHAPE)
    reference = measure(np.split(real, 4), features, "the mixture")
    results, rows = paired.compare(
        pair, scoring_of(features, reference, progress=told.append)
    )
    return results, rows, told


def test_the_exact_map_solves_the_ode():
    """The witness itself, by scipy on the image-space ODE."""
    eps = np.asarray([0.8, -1.1])

    def slope(t, x):
        # dx/dt by finite differences of the closed forms in float64.
        alpha, sigma = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
        d_alpha, d_sigma = -np.pi / 2 * sigma, np.pi / 2 * alpha
        variance = alpha**2 * SCALE**2 + sigma**2
        x_0 = MEAN + alpha * SCALE**2 / variance * (x - alpha * MEAN)
        return d_alpha * x_0 + d_sigma * (x - alpha * x_0) / sigma

    end = OBJECTIVE.t_min
    x = solve_ivp(slope, (1.0, end), eps, rtol=1e-9, atol=1e-10).y[:, -1]
    alpha, sigma = np.cos(np.pi * end / 2), np.sin(np.pi * end / 2)
    found = exact_signal(
        None,
        jnp.asarray(eps, jnp.float32).reshape(1, *SHAPE),
        jnp.full((1,), end),
        None,
    )
    np.testing.assert_allclose(
        np.ravel(found), (x - sigma * eps) / alpha, rtol=1e-4, atol=1e-5
    )


def test_an_exact_student_makes_no_error(exact):
    results, _, _ = exact
    student, ddim = results["student"], results["teacher"]["ddim"]
    assert student["normalized_error"] < 2e-3
    assert student["normalized_error"] < ddim["8"]["normalized_error"]
    assert student["variance_ratio"] == pytest.approx(1.0, abs=0.15)
    errors = [scores["normalized_error"] for scores in ddim.values()]
    assert errors == sorted(errors, reverse=True)
    # One step of DDIM from pure noise gives the mean of the data: all of the variance.
    assert errors[0] == pytest.approx(1.0, abs=0.1)
    assert ddim["1"]["recall"] == 0.0 and student["recall"] > 0.8


def test_an_exact_student_is_worth_more_than_the_teachers_steps(exact):
    results, _, _ = exact
    assert results["ddim_equivalent_steps"] == 8.0
    assert results["ddim_equivalent_steps_censored"] == "above"


def test_the_error_of_an_exact_student_is_small_at_every_time(exact):
    curve = exact[0]["error_over_time"]
    assert len(curve["times"]) == len(curve["student"]) == OPTIONS["error_times"] + 1
    np.testing.assert_allclose(
        curve["times"], np.linspace(1.0, OBJECTIVE.t_min, 7), rtol=1e-5
    )
    assert max(curve["student"]) < 1e-3


def test_results_are_json_with_what_the_report_reads(exact):
    results, rows, told = exact
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    scores = {"frechet_distance", "normalized_error", "precision", "recall"}
    per_sampler = scores | {"seconds_per_image", "intervals"}
    assert set(results["student"]) == per_sampler | {"variance_ratio"}
    assert list(results["teacher"]["ddim"]) == ["1", "2", "4", "8"]
    for found in results["teacher"]["ddim"].values():
        assert set(found) == per_sampler
        assert set(found["intervals"]) == scores
        assert found["seconds_per_image"] > 0
    ode = results["teacher"]["ode"]
    assert ode["network_calls"] == 2 * 48 - 1 and "48" in ode["name"]
    assert results["num_images"] == 256 and results["features"].startswith("pixels")
    assert list(rows) == ["teacher, 1 step", "teacher, 8 steps", "student, 1 step"]
    assert {images.shape for images in rows.values()} == {(5, *SHAPE)}
    assert told[0].startswith("teacher's ODE") and "student, 1 step" in told


def test_without_real_images_the_ode_is_the_reference():
    options = OPTIONS | {"num_images": 64, "batch_size": 64, "ddim_steps": (1, 4)}
    features = get_features("pixels", SHAPE)
    results, _ = paired.compare(
        pair_of(exact_signal), scoring_of(features, None, options=options)
    )
    ode = results["teacher"]["ode"]
    assert ode["frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert ode["precision"] == ode["recall"] == 1.0
    assert results["student"]["frechet_distance"] < 1e-2


@pytest.mark.parametrize("devices, batch_size", [(1, 104), (2, 256), (8, 56)])
def test_figures_do_not_depend_on_devices_and_batches(exact, devices, batch_size):
    """The last batch is filled up and cut."""
    real = np.asarray(sample_mixture(pair_of(None).teacher, jax.random.key(0), 2000))
    features = get_features("pixels", SHAPE)
    changes = {"batch_size": batch_size, "ddim_steps": (1,), "grid_images": 3}
    results, rows = paired.compare(
        pair_of(exact_signal),
        scoring_of(
            features,
            measure(np.split(real, [7, 900]), features, "the mixture"),
            options=OPTIONS | changes,
            mesh=mesh_of(devices),
        ),
    )
    for name, expected in exact[0]["student"].items():
        found = results["student"][name]
        if name == "intervals":
            for key, ends in expected.items():
                np.testing.assert_allclose(found[key], ends, rtol=1e-4, atol=1e-6)
        elif name != "seconds_per_image":
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert rows["student, 1 step"].shape == (3, *SHAPE)


def test_a_wrong_student_is_measured_as_wrong_as_it_is():
    """Shifted by c, its error is ``|c|^2`` over the variance of the images."""

    def shifted(params, eps, t, condition):
        return exact_signal(None, eps, t, condition) + 0.4

    curve = error_over_time(pair_of(shifted), OPTIONS, create_mesh())
    eps = np.asarray(pair_of(shifted).noise(7)(np.arange(64))).reshape(64, 2)
    ends = exact_signal(
        None,
        jnp.asarray(eps.reshape(64, *SHAPE)),
        jnp.full((64,), OBJECTIVE.t_min),
        None,
    )
    variance = np.asarray(ends).reshape(64, 2).var(axis=0).mean()
    np.testing.assert_allclose(curve["student"], 0.4**2 / variance, rtol=0.05)


def test_student_and_teacher_get_the_same_labels_and_scale():
    labels = [0, 1]
    means = np.stack([MEAN, -MEAN]).reshape(2, *SHAPE)
    teacher = gaussian_mixture(means, [SCALE] * 2, COSINE, labels=labels)
    null = {"label": jnp.full((1,), 2, jnp.int32)}
    denoise = as_sampled(teacher.denoise, null_condition=null, guidance_scale=None)
    pair = pair_of(exact_signal, teacher=teacher, denoise=denoise, guidance_scale=1.0)
    condition = pair.condition(np.arange(4))
    np.testing.assert_array_equal(condition["label"], [0, 1, 0, 1])
    np.testing.assert_array_equal(condition["guidance_scale"], np.ones(4, np.float32))
    eps = pair.noise(0)(np.arange(4))
    # A scale of 1 is the class alone, whose trajectories are exact.
    found = pair.sampler(48, "heun")(eps, condition)
    sign = np.asarray([1, -1, 1, -1], np.float32).reshape(4, 1, 1, 1)
    expected = sign * MEAN.reshape(1, *SHAPE) + SCALE * np.asarray(eps)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_teacher_measured_once_scores_students_as_in_one_pass(tmp_path):
    """On two batches, the last one cut, through the files and back."""
    real = np.asarray(sample_mixture(pair_of(None).teacher, jax.random.key(0), 300))
    features = get_features("pixels", SHAPE)
    reference = measure([real], features, "the mixture")
    asked = ("precision_recall", "diversity", "kernel_distance")
    options = OPTIONS | {
        "num_images": 100,
        "batch_size": 64,
        "ddim_steps": (1, 3),
        "ode_steps": 8,
        "metrics": asked,
    }
    for real_images in (reference, None):
        scoring = scoring_of(features, real_images, options=options)
        together, rows = paired.compare(pair_of(exact_signal), scoring)
        folder = tmp_path / str(real_images is None)
        folder.mkdir()
        targets = Targets(folder, (100, *SHAPE))
        side = paired.measure_teacher(pair_of(None), scoring, targets.write)
        assert not has_teacher_side(folder)
        write_teacher_side(folder, side, {"of": "a test"})
        assert has_teacher_side(folder)
        side, targets = read_teacher_side(folder, features), Targets(folder)
        apart, rows_apart = paired.score_student(
            pair_of(exact_signal), scoring, side, targets.read
        )
        for results in (together, apart):
            for scores in (results["student"], *results["teacher"]["ddim"].values()):
                assert scores.pop("seconds_per_image") > 0
        assert apart == together
        assert list(rows_apart) == list(rows)
        for name, images in rows.items():
            np.testing.assert_array_equal(rows_apart[name], images)
