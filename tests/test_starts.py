"""Starts below t_max: against the exact map of a Gaussian, and the losses they extend.

Of data ``N(m, s^2)`` the ODE is known from any point: ``(x_t - alpha_t m) / v_t`` stays
the same, with ``v^2 = alpha^2 s^2 + sigma^2``.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import MIXTURE, command, write_config
from scipy.stats import kstest

from boot_jax.objectives import (
    LOSSES,
    Objective,
    StartedSchedule,
    choose_starts,
    draw_starts,
    started_loss,
)
from boot_jax.sampling import few_steps, one_step
from boot_jax.schedules import get_schedule
from boot_jax.solvers import add_noise, signal_step
from boot_jax.teachers.mixture import gaussian_mixture

MEAN, SCALE = 0.4, 0.7
SHAPE, BATCH = (1, 2, 1), 8
EPS = np.random.default_rng(0).normal(size=(BATCH, *SHAPE))
U = np.array([0.5, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0, 1.0])
T = np.linspace(0.1, 0.95, BATCH) * U


def expand(t: Any) -> Any:
    return t[:, None, None, None]


def exact_jump(schedule: Any) -> Any:
    """``y_t`` as seen from ``x_u``, solved from the point that is reached."""

    def jump(params: Any, x_u: Any, u: Any, t: Any, condition: Any) -> Any:
        del condition
        alpha_t, sigma_t, alpha_u, sigma_u = (
            expand(f(time)) for time in (t, u) for f in (schedule.alpha, schedule.sigma)
        )
        v_t, v_u = (
            jnp.hypot(SCALE * alpha, sigma)
            for alpha, sigma in ((alpha_t, sigma_t), (alpha_u, sigma_u))
        )
        x_t = alpha_t * MEAN + v_t * (x_u - alpha_u * MEAN) / v_u
        apart = alpha_t - alpha_u * sigma_t / sigma_u
        return (x_t - x_u * sigma_t / sigma_u) / apart + params * expand(u - t)

    return jump


def teacher_of(schedule: Any) -> Any:
    return gaussian_mixture(jnp.full((1, *SHAPE), MEAN), [SCALE], schedule)


def loss_of(schedule: Any, off: float, **options: Any) -> Any:
    teacher = teacher_of(schedule)
    objective = Objective(start_times=(0.4, 0.9), boundary_weight=0.0, **options)
    dtype = jnp.asarray(0.0).dtype
    loss, metrics = started_loss(
        jnp.asarray(off, dtype),
        teacher.params,
        jnp.asarray(EPS, dtype),
        jnp.asarray(U, dtype),
        jnp.asarray(T, dtype),
        None,
        jump=exact_jump(schedule),
        denoise=teacher.denoise,
        schedule=schedule,
        objective=objective,
    )
    assert set(metrics) == {"loss/trajectory"}
    return float(loss)


@pytest.mark.parametrize("name, options", [("cosine", {}), ("flow", {"shift": 2.0})])
def test_the_exact_map_is_a_fixed_point_from_any_start(name, options):
    schedule = get_schedule(name, **options)
    with jax.enable_x64(True):
        for kind in ("continuous", "pid"):
            assert loss_of(schedule, 0.0, kind=kind) < 1e-20
            assert loss_of(schedule, 0.1, kind=kind) > 1e-4
        for solver, order in (("ddim", 1), ("heun", 2)):
            losses = [
                loss_of(schedule, 0.0, kind="boot", solver=solver, delta=delta)
                for delta in (0.02, 0.01, 0.005)
            ]
            falls = np.log2(np.divide(losses[:-1], losses[1:])) / 2
            np.testing.assert_allclose(falls, order, atol=0.25)


def test_a_step_of_the_started_signal_is_a_step_of_ddim():
    schedule, teacher = get_schedule("cosine"), teacher_of(get_schedule("cosine"))
    u, t, s = (jnp.full((BATCH,), time) for time in (0.7, 0.5, 0.4))
    x_u, y_t = (jnp.asarray(EPS + shift, jnp.float32) for shift in (0.0, 0.3))
    seen = StartedSchedule(schedule, u, 1.0)
    noise = x_u / expand(schedule.sigma(u))

    def closed(x: Any, t: Any) -> Any:
        return teacher.denoise(teacher.params, x, t, None)

    x_t = add_noise(seen, y_t, noise, t)
    eps_hat = (x_t - expand(schedule.alpha(t)) * closed(x_t, t)) / expand(
        schedule.sigma(t)
    )
    expected = add_noise(schedule, closed(x_t, t), eps_hat, s)
    y_s = signal_step(closed, seen, "ddim", y_t, noise, t, s)
    np.testing.assert_allclose(add_noise(seen, y_s, noise, s), expected, rtol=1e-5)


def test_a_started_schedule_is_one():
    for name in ("cosine", "flow", "linear_beta", "edm"):
        base = get_schedule(name)
        u = jnp.asarray([0.9, 0.6, 1.0])
        seen = StartedSchedule(base, u, 1.0)
        t = jnp.asarray([0.5, 0.59, 0.7])
        slope = jax.jvp(seen.lambda_, (t,), (jnp.ones_like(t),))[1]
        np.testing.assert_allclose(seen.dt_dlambda(t) * slope, 1.0, rtol=2e-3)
        np.testing.assert_allclose(seen.t_from_lambda(seen.lambda_(t)), t, rtol=1e-3)
        assert seen.dt_dlambda(u)[0] == seen.alpha(u)[0] == 0
        last = [f(t)[2] for f in (seen.alpha, seen.lambda_, seen.dt_dlambda)]
        assert last == [f(t)[2] for f in (base.alpha, base.lambda_, base.dt_dlambda)]


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_without_a_start_below_it_is_the_loss_it_extends(kind):
    schedule, teacher = get_schedule("cosine"), teacher_of(get_schedule("cosine"))
    objective = Objective(kind=kind, start_times=(0.4, 0.9))
    eps, t = jnp.asarray(EPS, jnp.float32), jnp.asarray(T, jnp.float32)
    shared: Any = {"denoise": teacher.denoise, "schedule": schedule}
    shared["objective"] = objective
    one = jnp.ones((BATCH,))

    def jump(params: Any, x_u: Any, u: Any, t: Any, condition: Any) -> Any:
        return jnp.tanh(x_u) * expand(u) + params * expand(t)

    def signal(params: Any, eps: Any, t: Any, condition: Any) -> Any:
        return jump(params, eps, jnp.ones_like(t), t, condition)

    off = jnp.asarray(0.2)
    expected = LOSSES[kind](off, teacher.params, eps, t, None, signal=signal, **shared)
    actual = started_loss(off, teacher.params, eps, one, t, None, jump=jump, **shared)
    for name in ("loss/trajectory", "loss/boundary"):
        np.testing.assert_allclose(actual[1][name], expected[1][name], rtol=1e-5)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)


def test_the_gradient_does_not_reach_the_points_to_start_from():
    """A student that is right from every start but errs at u itself has no gradient."""
    schedule, teacher = get_schedule("cosine"), teacher_of(get_schedule("cosine"))
    exact = exact_jump(schedule)

    def jump(params: Any, x_u: Any, u: Any, t: Any, condition: Any) -> Any:
        y = exact(jnp.asarray(0.0), x_u, u, t, condition)
        # Only the call that makes the points has so few images.
        return y + params if x_u.shape[0] == 2 else y

    def loss(params: Any) -> Any:
        return started_loss(
            params,
            teacher.params,
            jnp.asarray(EPS, jnp.float32),
            jnp.asarray(U, jnp.float32),
            jnp.asarray(T, jnp.float32),
            None,
            jump=jump,
            denoise=teacher.denoise,
            schedule=schedule,
            objective=Objective(start_times=(0.4, 0.9), boundary_weight=0.0),
        )[0]

    assert jax.grad(loss)(jnp.asarray(0.3)) == 0


def test_starts_are_every_nth_and_times_lie_below_them():
    objective = Objective(start_times=(0.3, 0.9), t_min=0.02, delta=0.05)
    drawn = [
        choose_starts(objective, *draw_starts(objective, jax.random.key(n), 64))
        for n in range(40)
    ]
    u, t = (np.asarray(jnp.stack(part)) for part in zip(*drawn, strict=True))
    assert (u[:, np.arange(64) % 4 != 0] == 1).all()
    starts = u[:, ::4]
    assert kstest((starts.ravel() - 0.3) / 0.6, "uniform").pvalue > 1e-3
    assert (t <= u + 1e-6).all() and t.min() >= 0.07 - 1e-6
    share = (t[:, ::4] - 0.07) / (starts - 0.07)
    assert kstest(share.ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("renoise", ["fresh", "along"])
def test_steps_of_an_exact_student_give_exact_samples(renoise):
    schedule, objective = get_schedule("cosine"), Objective(t_min=1e-4)
    eps = jax.random.normal(jax.random.key(4), (2048, *SHAPE))
    jump = exact_jump(schedule)
    ends = [
        few_steps(jump, jnp.asarray(0.0), schedule, objective, steps, renoise)(
            eps, None
        )
        for steps in (1, 2, 4)
    ]
    for end in ends:
        assert kstest((np.ravel(end) - MEAN) / SCALE, "norm").pvalue > 1e-3
    if renoise == "along":
        np.testing.assert_allclose(ends[1], ends[0], atol=1e-3)
        np.testing.assert_allclose(ends[2], ends[0], atol=1e-3)
    else:
        # What the first step did is forgotten, image by image and not by the batch.
        assert abs(np.corrcoef(np.ravel(ends[2]), np.ravel(ends[0]))[0, 1]) < 0.9
        few = few_steps(jump, jnp.asarray(0.0), schedule, objective, 4, renoise)
        np.testing.assert_array_equal(few(eps[5:7], None), ends[2][5:7])

    def signal(params: Any, eps: Any, t: Any, condition: Any) -> Any:
        return jump(params, eps, jnp.ones_like(t), t, condition)

    once = one_step(signal, jnp.asarray(0.0), objective)(eps, None)
    np.testing.assert_allclose(ends[0], once, rtol=1e-5, atol=1e-5)


def test_an_unknown_way_between_steps_is_refused():
    with pytest.raises(ValueError, match=r"renoise is 'none'; choose one of \('fresh'"):
        few_steps(exact_jump(None), 0.0, get_schedule("cosine"), Objective(), 2, "none")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start_times": (0.5,)}, r"start_times is \(0.5,\), but must be \(u_min, u_m"),
        ({"start_times": (0.01, 0.5)}, r"between 0.05 and t_max = 1, or empty"),
        ({"start_times": (0.5, 1.5)}, r"start_times is \(0.5, 1.5\), but must be"),
        (
            {"start_times": (0.5, 0.9), "kind": "direct"},
            "but direct starts anywhere; start_times is for boot, continuous, pid",
        ),
        ({"start_share": 0.0}, "start_share is 0.0, but must lie in"),
    ],
)
def test_starts_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_a_run_that_starts_anywhere_is_scored_and_sampled_in_a_few_steps(
    tmp_path, capsys
):
    flags = (
        write_config(tmp_path, MIXTURE),
        f"--workdir={tmp_path / 'run'}",
        "--config.objective.start_times=(0.3, 1.0)",
        "--config.evaluation.student_steps=(2, 1)",
    )
    assert command(*flags) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["student_steps"]) == {"2"}
    two, one = results["student_steps"]["2"], results["student"]
    assert two["frechet_distance"] != one["frechet_distance"]
    assert set(two) == set(one)
    assert "student, 2 steps" in (tmp_path / "run" / "report.html").read_text()
    assert "student, 2 steps" in capsys.readouterr().out
    more = ("--mode=sample", "--num=3", "--config.sample.steps=2")
    assert command(*flags, *more) == 0
    folder = tmp_path / "run" / "samples" / "seed_0_steps_2_along"
    assert np.load(folder / "samples.npy").shape == (3, 1, 1, 2)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.sample.steps=2", "sample.steps is 2, but the student only learned"),
        (
            "--config.evaluation.student_steps=(0,)",
            "evaluation.student_steps is (0,), but must be positive numbers",
        ),
        ("--config.sample.renoise=none", "sample.renoise is 'none', but must be one"),
    ],
)
def test_steps_that_make_no_sense_are_refused(tmp_path, capsys, flag, message):
    config = write_config(tmp_path, MIXTURE)
    assert command(config, f"--workdir={tmp_path / 'run'}", flag) == 2
    assert message in capsys.readouterr().err
