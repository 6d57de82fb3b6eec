"""What objectives say they cost, against the calls that are really made."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from boot_jax.objectives import (
    LOSSES,
    Correction,
    Objective,
    auxiliary_loss,
    correction_loss,
    started_loss,
)
from boot_jax.objectives.calls import calls_before, calls_of, sampling_calls
from boot_jax.schedules import get_schedule

BATCH = 8


class Counted:
    """A network that knows on how many images it was called."""

    def __init__(self):
        self.images = 0

    def __call__(self, params: Any, x: Any, t: Any, condition: Any) -> Any:
        del condition
        self.images += x.shape[0]
        return params * x * t[:, None, None, None]


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_points_to_start_from_are_counted(kind):
    options: Any = {"kind": kind, "derivative": "finite_difference"}
    objective = Objective(**options, start_times=(0.3, 0.9), start_share=0.25)
    student = Counted()
    with jax.disable_jit():
        started_loss(
            jnp.asarray(0.5),
            jnp.asarray(0.5),
            jnp.ones((BATCH, 2, 2, 1)),
            jnp.asarray([0.8, 1.0, 1.0, 1.0] * 2),
            jnp.linspace(0.1, 0.7, BATCH),
            None,
            jump=lambda params, x, u, t, condition: student(params, x, t, condition),
            denoise=Counted(),
            schedule=get_schedule("cosine"),
            objective=objective,
        )
    assert calls_of(objective).student * BATCH == student.images
    plain = calls_of(Objective(**options))
    assert calls_of(objective).student == plain.student + 0.25


@pytest.mark.parametrize(
    "options, tangents",
    [
        ({"kind": "boot", "solver": "ddim"}, 0),
        ({"kind": "boot", "solver": "heun", "boundary_share": 0.25}, 0),
        ({"kind": "boot", "boundary_weight": 0.0}, 0),
        ({"kind": "boot", "target_network": "ema"}, 0),
        ({"kind": "continuous"}, 1),
        ({"kind": "continuous", "derivative": "finite_difference"}, 0),
        ({"kind": "continuous", "target_network": "ema", "boundary_weight": 0.0}, 1),
        ({"kind": "pid", "boundary_share": 0.5}, 1),
        ({"kind": "pid", "derivative": "finite_difference"}, 0),
        ({"kind": "direct", "solver": "ddim", "teacher_steps": 5}, 0),
        ({"kind": "direct", "solver": "heun", "teacher_steps": 5}, 0),
        ({"kind": "direct", "stored_samples": 100}, 0),
        ({"kind": "progressive"}, 0),
        ({"kind": "consistency", "solver": "ddim"}, 0),
        ({"kind": "consistency", "solver": "heun", "target_network": "ema"}, 0),
    ],
)
def test_calls_are_those_that_are_made(options, tangents):
    objective, teacher, student = Objective(**options), Counted(), Counted()
    images = jnp.full((BATCH, 2, 2, 1), 0.5)
    loss = LOSSES[objective.kind]
    if objective.needs_images:
        loss = functools.partial(loss, student_denoise=student, images=images)
    if objective.reads_stored:
        loss = functools.partial(loss, targets=images)
    with jax.disable_jit():
        loss(
            jnp.asarray(0.5),
            jnp.asarray(0.5),
            jnp.ones((BATCH, 2, 2, 1)),
            jnp.linspace(0.1, 0.9, BATCH),
            None,
            signal=student,
            denoise=teacher,
            schedule=get_schedule("cosine"),
            objective=objective,
            target_params=jnp.asarray(0.4)
            if objective.target_network == "ema"
            else None,
        )
    calls = calls_of(objective)
    assert calls.teacher * BATCH == teacher.images
    assert calls.student * BATCH == student.images + tangents * BATCH
    assert calls.images * BATCH == (images.shape[0] if objective.needs_images else 0)
    assert calls.total == calls.teacher + calls.student
    guided = calls_of(objective, guided=True)
    if objective.kind != "progressive":
        assert guided.teacher == 2 * calls.teacher
    assert guided.student == calls.student


def test_only_the_first_stage_has_a_teacher_that_is_guided():
    objective = Objective(kind="progressive", teacher_steps=8)
    guided = calls_of(objective, guided=True)
    # Four evaluations in one stage of three, two in each other.
    assert guided.teacher == pytest.approx((4 + 2 + 2) / 3)


def test_a_stored_set_is_paid_before():
    options: dict[str, Any] = {"kind": "direct", "teacher_steps": 4}
    stored = Objective(**options, solver="heun", stored_samples=100)
    assert calls_of(stored).teacher == 0
    assert calls_before(stored) == 100 * 7
    assert calls_before(stored, guided=True) == 100 * 14
    anew = Objective(**options, solver="ddim")
    assert calls_before(anew) == 0
    assert calls_of(anew).teacher == sampling_calls(anew) == 4
    other = Objective(kind="boot", stored_samples=100)
    assert calls_before(other) == 0


@pytest.mark.parametrize(
    "share, updates, auxiliary_share", [(0.25, 1, 1.0), (0.5, 3, 0.5)]
)
@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_a_correction_is_counted(kind, share, updates, auxiliary_share):
    """Its share of the batch leaves the trajectories that much less."""
    correction = Correction(
        strength=1.0, share=share, updates=updates, auxiliary_share=auxiliary_share
    )
    objective = Objective(kind=kind, boundary_weight=0.0, correction=correction)
    teacher, student, auxiliary = Counted(), Counted(), Counted()
    half = jnp.asarray(0.5)
    shared: Any = {
        "signal": student,
        "schedule": get_schedule("cosine"),
        "objective": objective,
    }

    def batch(count: float) -> Any:
        images = int(count)
        return jnp.ones((images, 2, 2, 1)), jnp.linspace(0.1, 0.9, images)

    with jax.disable_jit():
        eps, t = batch(BATCH * (1 - share))
        LOSSES[kind](half, half, eps, t, None, denoise=teacher, **shared)
        eps, r = batch(BATCH * share)
        correction_loss(
            half,
            half,
            half,
            eps,
            eps,
            r,
            None,
            1.0,
            denoise=teacher,
            auxiliary=auxiliary,
            **shared,
        )
        for _ in range(updates):
            eps, r = batch(BATCH * auxiliary_share)
            auxiliary_loss(half, half, eps, eps, r, None, auxiliary=auxiliary, **shared)
    calls = calls_of(objective)
    tangents = BATCH * (1 - share) if kind == "continuous" else 0
    assert calls.teacher * BATCH == teacher.images
    assert calls.student * BATCH == student.images + tangents
    assert calls.auxiliary * BATCH == auxiliary.images
    assert calls.total == calls.teacher + calls.student + calls.auxiliary
    assert calls_of(objective, guided=True).teacher == 2 * calls.teacher
