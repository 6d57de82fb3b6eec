"""The student at its start, against its teacher; what it tells its network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boot_jax.guidance import SCALE_KEY
from boot_jax.models.dit import DiT
from boot_jax.models.layers import AddedEmbeddings
from boot_jax.objectives import LOSSES, Objective
from boot_jax.schedules import get_schedule
from boot_jax.student import create_student
from boot_jax.teachers.base import Teacher, TeacherError, network_denoiser
from boot_jax.teachers.mixture import gaussian_mixture

COSINE = get_schedule("cosine")
LINEAR = get_schedule("linear_beta")
EDM = get_schedule("edm")
SHAPE = (4, 4, 1)
EPS = jax.random.normal(jax.random.key(0), (3, *SHAPE))
T = jnp.asarray([0.1, 0.5, 1.0])
LABEL = {"label": jnp.asarray([0, 1, 2], jnp.int32)}


class Network(nn.Module):
    """The smallest network of the shape of those in boot_jax.models."""

    added_embeddings: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        label = nn.Embed(3, 8, name="label")(condition["label"])
        extra = AddedEmbeddings(self.added_embeddings, 8, name="added_embeddings")
        waves = jnp.cos(time[:, None] / 1000 * jnp.arange(1.0, 9.0)[None])
        h = nn.Dense(8, name="image")(x.reshape(len(x), -1)) + label + waves
        h = jnp.tanh(h + extra(added)).astype(self.dtype).astype(jnp.float32)
        return nn.Dense(16, name="out")(h).reshape(x.shape)


NETWORK = Network()


def teacher_of(
    schedule: Any = COSINE, prediction_type: str = "v_prediction", dtype: Any = "f"
) -> Teacher:
    """A teacher of random parameters."""
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(1), EPS, T, LABEL)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), dtype), shapes
    )
    return Teacher(
        denoise=network_denoiser(NETWORK, schedule, prediction_type),
        params=params,
        schedule=schedule,
        sample_shape=SHAPE,
        num_classes=2,
        network=NETWORK,
        prediction_type=prediction_type,
    )


def start_of(teacher: Teacher, t_max: float) -> np.ndarray:
    """``f(x, t_max)`` at ``x = prior_scale * eps``."""
    t = jnp.full((3,), t_max)
    alpha, sigma = teacher.schedule.alpha(t)[0], teacher.schedule.sigma(t)[0]
    x_t = np.hypot(alpha, sigma) * np.asarray(EPS)
    f = jax.jit(teacher.denoise)(teacher.params, jnp.asarray(x_t), t, LABEL)
    return np.asarray(f)


@pytest.mark.parametrize(
    "schedule, prediction_type, t_max",
    [
        (COSINE, "v_prediction", 1.0),
        (COSINE, "sample", 0.9),
        (LINEAR, "epsilon", 1.0),
        (EDM, "v_prediction", 1.0),
        (get_schedule("flow"), "flow_prediction", 1.0),
    ],
)
def test_starts_as_the_teachers_estimate_at_every_time(
    schedule, prediction_type, t_max
):
    teacher = teacher_of(schedule, prediction_type)
    student = create_student(teacher, t_max=t_max)
    params = student.init(jax.random.key(2))
    expected = start_of(teacher, t_max)
    assert np.abs(expected).max() > 0.1
    signal = jax.jit(student.signal)
    for time in (0.01, 0.4, t_max):
        actual = signal(params, EPS, jnp.full((3,), time), LABEL)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["boot", "continuous"])
def test_boundary_loss_starts_at_zero(kind):
    teacher = teacher_of()
    student = create_student(teacher, t_max=0.95)
    loss = jax.jit(
        lambda params, frozen: LOSSES[kind](
            params,
            frozen,
            EPS,
            jnp.asarray([0.3, 0.5, 0.9]),
            LABEL,
            signal=student.signal,
            denoise=teacher.denoise,
            schedule=COSINE,
            objective=Objective(kind=kind, t_max=0.95),
        )
    )
    _, metrics = loss(student.init(jax.random.key(2)), teacher.params)
    assert metrics["loss/boundary"] < 1e-11
    assert metrics["loss/trajectory"] > 1e-4


def test_target_time_matters_once_its_last_layer_moves():
    student = create_student(teacher_of())
    params = student.init(jax.random.key(2))
    new = params["added_embeddings"]
    paths = jax.tree_util.tree_leaves_with_path(new)
    zero = {jax.tree_util.keystr(path): not np.any(leaf) for path, leaf in paths}
    assert all(zero[name] for name in zero if "linear_2" in name)
    assert not all(zero.values())
    params["added_embeddings"] = jax.tree.map(lambda leaf: leaf + 0.3, new)
    signals = [
        np.asarray(student.signal(params, EPS, jnp.full((3,), time), LABEL))
        for time in (0.2, 0.6)
    ]
    assert (np.abs(signals[1] - signals[0]).max((1, 2, 3)) > 1e-4).all()


def test_parameters_are_copies_that_may_be_given_away():
    teacher = teacher_of()
    student = create_student(teacher)
    params = student.init(jax.random.key(2))
    for name, branch in teacher.params.items():
        jax.tree.map(np.testing.assert_array_equal, params[name], branch)
    inherited = {name: params[name] for name in teacher.params}
    jax.tree.map(lambda copy, leaf: copy.fill(7), inherited, teacher.params)
    for name, branch in teacher.params.items():
        for leaf in jax.tree.leaves(branch):
            assert not (np.asarray(leaf) == 7).all(), name
    assert np.isfinite(start_of(teacher, 1.0)).all()


def test_parameters_are_float32_whatever_the_teachers_are():
    teacher = teacher_of(dtype=jnp.bfloat16)
    params = create_student(teacher).init(jax.random.key(2))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for name, branch in teacher.params.items():
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_array_equal(
                ours, theirs.astype(jnp.float32)
            ),
            params[name],
            branch,
        )


def test_reused_time_input_is_the_target_time():
    teacher = teacher_of()
    student = create_student(teacher, time_conditioning="reused")
    params = student.init(jax.random.key(2))
    assert jax.tree.structure(params) == jax.tree.structure(teacher.params)
    output = teacher.network.apply({"params": teacher.params}, EPS, 1000 * T, LABEL)
    # At alpha = 0, v is -x_0.
    actual = jax.jit(student.signal)(params, EPS, T, LABEL)
    np.testing.assert_allclose(actual, -np.asarray(output), rtol=1e-5, atol=1e-5)


def test_overrides_change_the_network_alone():
    student = create_student(teacher_of(), dtype=jnp.bfloat16)
    assert student.network.dtype == jnp.bfloat16
    assert NETWORK.dtype == jnp.float32
    actual = student.signal(student.init(jax.random.key(2)), EPS, T, LABEL)
    assert actual.dtype == jnp.float32
    gap = np.abs(actual - start_of(teacher_of(), 1.0)).max()
    assert 1e-5 < gap < 0.05


# --- the guidance scale


class Recorder(nn.Module):
    """A network that notes what it is told."""

    added_embeddings: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Any, time: Any, condition: Any = None, added: Any = None):
        factor = self.param("factor", nn.initializers.ones, ())
        TOLD.append((time, condition, added))
        return factor * x


TOLD: list[Any] = []


@pytest.mark.parametrize("time_conditioning", ["added", "reused"])
def test_guidance_scale_reaches_the_student_and_not_its_networks_condition(
    time_conditioning,
):
    teacher = gaussian_mixture(
        np.zeros((2, *SHAPE), "f"), [1.0, 1.0], LINEAR, labels=[0, 1]
    )
    student = create_student(
        teacher,
        t_max=0.9,
        network=Recorder(),
        guidance_range=(2.0, 6.0),
        time_conditioning=time_conditioning,
    )
    TOLD.clear()
    condition = LABEL | {SCALE_KEY: jnp.asarray([2.0, 3.0, 6.0])}
    params = {"factor": jnp.ones(())}
    student.signal(params, EPS, T, condition)
    (time, told, added), *more = TOLD
    assert not more
    assert told.keys() == {"label"}
    np.testing.assert_allclose(added[SCALE_KEY], [0, 0.25, 1], rtol=1e-6)
    if time_conditioning == "added":
        assert student.network.added_embeddings == ("target_time", SCALE_KEY)
        np.testing.assert_allclose(time, [900] * 3)
        np.testing.assert_array_equal(added["target_time"], T)
    else:
        assert student.network.added_embeddings == (SCALE_KEY,)
        np.testing.assert_allclose(time, 1000 * np.asarray(T))
        assert set(added) == {SCALE_KEY}
    # The caller's condition is as it was.
    assert set(condition) == {"label", SCALE_KEY}


def test_a_range_of_one_scale_is_no_division_by_zero():
    student = create_student(
        gaussian_mixture(np.zeros((1, *SHAPE), "f"), [1.0], LINEAR),
        network=Recorder(),
        guidance_range=(3.0, 3.0),
    )
    TOLD.clear()
    scale = {SCALE_KEY: jnp.full((3,), 3.0)}
    student.signal({"factor": jnp.ones(())}, EPS, T, scale)
    np.testing.assert_array_equal(TOLD[0][2][SCALE_KEY], np.zeros(3))


def test_guided_student_starts_as_its_teacher_for_every_scale():
    teacher = teacher_of()
    student = create_student(teacher, guidance_range=(1.0, 4.0))
    params = student.init(jax.random.key(2))
    condition = LABEL | {SCALE_KEY: jnp.asarray([1.0, 2.0, 4.0])}
    actual = jax.jit(student.signal)(params, EPS, T, condition)
    np.testing.assert_allclose(actual, start_of(teacher, 1.0), rtol=1e-5, atol=1e-5)


# --- teachers without a network, and refusals


def test_a_teacher_without_a_network_takes_a_given_one():
    teacher = gaussian_mixture(np.zeros((1, *SHAPE), "f"), [1.0], LINEAR)
    network = DiT(1, patch_size=4, hidden_size=8, num_layers=1, num_heads=1)
    student = create_student(teacher, network=network)
    params = student.init(jax.random.key(2))
    actual = jax.jit(student.signal)(params, EPS, T, None)
    # The network starts at zero: v = 0 means x_0 = alpha x_t.
    alpha = np.exp(-(0.1 + 19.9 / 2) / 2)
    np.testing.assert_allclose(actual, alpha * np.asarray(EPS), rtol=1e-4, atol=1e-7)


def test_a_given_network_does_not_take_the_teachers_weights():
    teacher = teacher_of()
    student = create_student(teacher, network=teacher.network)
    params = student.init(jax.random.key(2))
    ours, theirs = (tree["out"]["kernel"] for tree in (params, teacher.params))
    assert (np.asarray(ours) != np.asarray(theirs)).all()


def test_a_teacher_without_a_network_is_refused():
    teacher = gaussian_mixture(np.zeros((1, *SHAPE), "f"), [1.0], COSINE)
    with pytest.raises(TeacherError, match=r"no network .* give one as `network`"):
        create_student(teacher)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_epsilon_without_signal_is_refused(name):
    teacher = teacher_of(get_schedule(name), "epsilon")
    with pytest.raises(TeacherError, match=r"t_max = 1.0, where alpha is 0; .* 0\.99"):
        create_student(teacher)
    assert create_student(teacher, t_max=0.99)
    # With a network of its own, the student predicts v.
    assert create_student(teacher, network=teacher.network)


def test_unknown_time_conditioning_is_refused():
    with pytest.raises(ValueError, match=r"'concat'; choose one of \('added', 'reused"):
        create_student(teacher_of(), time_conditioning="concat")


def test_a_noisy_image_is_the_signal_and_the_noise_of_its_time():
    """alpha_t y_t + sigma_t eps is the network's output again, whatever the time."""
    teacher = teacher_of()
    plain = create_student(teacher, t_max=0.98)
    noisy = create_student(teacher, t_max=0.98, output="noisy_image")
    params = plain.init(jax.random.key(2))
    times = np.asarray([0.01, 0.4, 0.98])
    t = jnp.asarray(times, jnp.float32)
    output = np.asarray(plain.signal(params, EPS, t, LABEL), np.float64)
    alpha, sigma = (
        part(np.pi / 2 * times)[:, None, None, None] for part in (np.cos, np.sin)
    )
    expected = (output - sigma * np.asarray(EPS, np.float64)) / alpha
    actual = jax.jit(noisy.signal)(params, EPS, t, LABEL)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_noisy_image_needs_some_signal_at_t_max():
    with pytest.raises(TeacherError, match=r"where alpha is 0; .* such as t_max=0\.98"):
        create_student(teacher_of(), output="noisy_image")
    with pytest.raises(ValueError, match="output is 'x_t'; choose one of"):
        create_student(teacher_of(), output="x_t")
