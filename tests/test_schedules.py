"""Schedules against numpy float64 re-derivations, scipy and PyTorch diffusers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from scipy.integrate import quad
from scipy.special import expit

from boot_jax.schedules import (
    DiscreteSchedule,
    NoiseSchedule,
    discrete_betas,
    from_diffusers,
    get_schedule,
    rescale_zero_terminal_snr,
)

# What stable diffusion has, at a tenth of its length.
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.0085, "beta_end": 0.12}
STEPS = {"num_train_timesteps": 100}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("cosine", {}),
    "cosine-shifted": ("cosine", {"shift": 2.5}),
    "linear_beta": ("linear_beta", {}),
    "edm": ("edm", {}),
    "edm-other": ("edm", {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 3.0}),
    "flow": ("flow", {}),
    "flow-shifted": ("flow", {"shift": 3.0}),
    "linear": ("discrete", {"beta_schedule": "linear"}),
    "scaled_linear": ("discrete", SCALED | STEPS),
    "squaredcos": ("discrete", {"beta_schedule": "squaredcos_cap_v2"} | STEPS),
    "zero-snr": ("discrete", SCALED | STEPS | {"rescale_betas_zero_snr": True}),
}
SCHEDULES = {key: get_schedule(name, **kw) for key, (name, kw) in OPTIONS.items()}
VARIANCE_EXPLODING = ("edm", "edm-other")
FLOWS = ("flow", "flow-shifted")
NO_TERMINAL_SIGNAL = ("cosine", "cosine-shifted", "flow", "flow-shifted", "zero-snr")

# Neither 0 nor 1 nor a discrete level (those are multiples of 0.001).
INSIDE = np.concatenate(
    [[3e-5, 4e-4, 0.0017], np.linspace(0.01, 0.99, 41) + 1.37e-4, [0.9984, 0.9997]]
)

each_schedule = pytest.mark.parametrize("name", list(SCHEDULES))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def both(schedule: NoiseSchedule, t: Any) -> tuple[np.ndarray, np.ndarray]:
    times = jnp.asarray(t)
    return np.asarray(schedule.alpha(times)), np.asarray(schedule.sigma(times))


def of_log_snr(log_snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance preserving ``alpha, sigma``: the sigmoid form of Kingma et al."""
    return np.sqrt(expit(log_snr)), np.sqrt(expit(-log_snr))


# --- formulas


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_cosine(float64, shift):
    # Hoogeboom et al., eqs. 3 and 5: logsnr = -2 log tan(pi t / 2) + 2 log(1 / shift).
    log_snr = -2 * np.log(np.tan(np.pi * INSIDE / 2)) + 2 * np.log(1 / shift)
    actual = both(get_schedule("cosine", shift=shift), INSIDE)
    np.testing.assert_allclose(actual, of_log_snr(log_snr), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"beta_min": 0.5, "beta_max": 8.0}])
def test_linear_beta_integrates_its_rate(float64, options):
    low, high = options.get("beta_min", 0.1), options.get("beta_max", 20.0)
    decay = [quad(lambda s: low + (high - low) * s, 0, t)[0] for t in INSIDE]
    alpha = np.exp(-np.array(decay) / 2)
    expected = alpha, np.sqrt(-np.expm1(-np.array(decay)))
    actual = both(get_schedule("linear_beta", **options), INSIDE)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_edm_has_the_spacing_of_karras_in_diffusers():
    theirs = EulerDiscreteScheduler(
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=80.0,
        final_sigmas_type="sigma_min",
    )
    theirs.set_timesteps(18)
    alpha, sigma = both(get_schedule("edm"), np.linspace(1, 0, 18, dtype=np.float32))
    np.testing.assert_allclose(sigma, theirs.sigmas[:-1].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(alpha, np.ones(18))


def test_edm_is_equation_5_of_karras(float64):
    low, high, rho, count = 0.01, 20.0, 3.0, 9
    index = np.arange(count)
    first, last = high ** (1 / rho), low ** (1 / rho)
    root = first + index / (count - 1) * (last - first)
    _, sigma = both(SCHEDULES["edm-other"], 1 - index / (count - 1))
    np.testing.assert_allclose(sigma, root**rho, rtol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_has_the_shift_of_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    times = np.arange(1000, 0, -1, dtype=np.float32) / 1000
    alpha, sigma = both(get_schedule("flow", shift=shift), times)
    np.testing.assert_allclose(sigma, theirs.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(alpha, 1 - theirs.sigmas.double().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "linear", "beta_end": 0.01},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
        {"trained_betas": [0.01, 0.03, 0.02, 0.5]},
    ],
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_levels_are_those_of_diffusers(options, zero_snr):
    theirs = DDPMScheduler(**options, rescale_betas_zero_snr=zero_snr)
    ours = from_diffusers(theirs.config)
    count = len(ours.betas)
    times = np.arange(1, count + 1, dtype=np.float32) / np.float32(count)
    alpha, sigma = (part.astype(np.float64) for part in both(ours, times))
    for scheduler in (theirs, DDIMScheduler.from_config(theirs.config)):
        levels = scheduler.alphas_cumprod.double().numpy()
        # They multiply in float32: off by up to a thousand roundings.
        np.testing.assert_allclose(alpha**2, levels, atol=2e-6)
        np.testing.assert_allclose(sigma**2, 1 - levels, atol=2e-6)
    told = np.asarray(ours.time_input(jnp.asarray(times)))
    np.testing.assert_allclose(told, np.arange(count), atol=1e-4)


def test_discrete_levels_in_float64(float64):
    betas = discrete_betas("scaled_linear", 1000, 0.00085, 0.012)
    assert betas.dtype == np.float64
    levels = np.cumprod(1 - betas)
    schedule = DiscreteSchedule(betas=tuple(betas.tolist()))
    alpha, sigma = both(schedule, np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(alpha, np.sqrt(levels), rtol=1e-10)
    np.testing.assert_allclose(sigma, np.sqrt(1 - levels), rtol=1e-10)


@pytest.mark.parametrize("name", ["linear", "squaredcos", "zero-snr"])
def test_discrete_runs_along_chords_between_levels(float64, name):
    schedule = SCHEDULES[name]
    assert isinstance(schedule, DiscreteSchedule)
    count = len(schedule.betas)
    for index in (0, 1, count // 2, count - 1):
        ends = np.stack(both(schedule, np.array([index, index + 1]) / count))
        for share in (0.25, 0.5, 0.9):
            chord = (1 - share) * ends[:, 0] + share * ends[:, 1]
            expected = chord / np.linalg.norm(chord)
            actual = both(schedule, (index + share) / count)
            np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_zero_terminal_snr_keeps_the_first_level():
    betas = discrete_betas("linear")
    rescaled = np.cumprod(1 - rescale_zero_terminal_snr(betas))
    # Algorithm 1 of Lin et al., on the square roots.
    root = np.sqrt(np.cumprod(1 - betas))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    np.testing.assert_allclose(rescaled, expected, atol=1e-14)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(1 - betas[0], rel=1e-12)


# --- what holds for all


@each_schedule
def test_lambda_and_log_snr_are_the_logarithms(float64, name):
    schedule = SCHEDULES[name]
    alpha, sigma = both(schedule, INSIDE)
    t = jnp.asarray(INSIDE)
    np.testing.assert_allclose(
        schedule.lambda_(t), np.log(sigma / alpha), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(
        schedule.log_snr(t), np.log(alpha**2 / sigma**2), rtol=1e-10, atol=1e-12
    )
    assert (np.diff(schedule.lambda_(t)) > 0).all()


@each_schedule
def test_variance_preserving_says_the_truth(float64, name):
    schedule = SCHEDULES[name]
    alpha, sigma = both(schedule, INSIDE)
    gap = np.abs(alpha**2 + sigma**2 - 1).max()
    assert schedule.variance_preserving == (gap < 1e-13)
    assert schedule.variance_preserving == (name not in (*VARIANCE_EXPLODING, *FLOWS))
    scale = schedule.prior_scale(jnp.asarray(INSIDE))
    np.testing.assert_allclose(scale, np.sqrt(alpha**2 + sigma**2), rtol=1e-12)
    if name in FLOWS:
        np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-12)


@each_schedule
def test_time_comes_back_from_lambda_in_float64(float64, name):
    schedule, t = SCHEDULES[name], jnp.asarray(INSIDE)
    back = schedule.t_from_lambda(schedule.lambda_(t))
    np.testing.assert_allclose(back, INSIDE, rtol=0, atol=1e-12)
    back = schedule.t_from_log_snr(schedule.log_snr(t))
    np.testing.assert_allclose(back, INSIDE, rtol=0, atol=1e-12)


@each_schedule
def test_time_comes_back_from_lambda_in_float32(name):
    schedule = SCHEDULES[name]
    t = jnp.asarray(np.concatenate([[0], INSIDE, [1]]), jnp.float32)
    back = schedule.t_from_lambda(schedule.lambda_(t))
    assert back.dtype == jnp.float32
    np.testing.assert_allclose(back, t, rtol=0, atol=1e-6)


@each_schedule
def test_lambda_beyond_the_ends_is_clipped(name):
    schedule = SCHEDULES[name]
    far = jnp.asarray([-jnp.inf, -200.0, 200.0, jnp.inf])
    np.testing.assert_allclose(schedule.t_from_lambda(far), [0, 0, 1, 1], atol=1e-6)
    beyond = schedule.t_from_lambda(schedule.lambda_(jnp.ones(1)) + 0.5)
    assert (np.asarray(beyond) <= 1).all()


@each_schedule
def test_both_ends_are_exact_in_float32(name):
    schedule = SCHEDULES[name]
    ends = jnp.asarray([0.0, 1.0])
    alpha, sigma = both(schedule, ends)
    lambda_t, slope = schedule.lambda_(ends), schedule.dt_dlambda(ends)
    assert alpha.dtype == sigma.dtype == lambda_t.dtype == slope.dtype == jnp.float32
    assert alpha[0] == 1
    assert np.isfinite([alpha, sigma, slope]).all()
    assert (alpha[1] == 0) == (name in NO_TERMINAL_SIGNAL)
    assert (sigma[0] == 0) == (name not in VARIANCE_EXPLODING)
    assert np.isneginf(lambda_t[0]) == (sigma[0] == 0)
    assert np.isposinf(lambda_t[1]) == (alpha[1] == 0)
    assert not np.isnan(lambda_t).any()
    assert (slope[0] == 0) == (sigma[0] == 0)
    assert (slope[1] == 0) == (alpha[1] == 0)
    if name not in VARIANCE_EXPLODING and alpha[1] == 0:
        assert sigma[1] == 1


@each_schedule
def test_float32_is_accurate_close_to_the_ends(name):
    schedule = SCHEDULES[name]
    small = np.geomspace(1e-6, 0.5, 30).astype(np.float32)
    times = np.concatenate([small, 1 - small])
    alpha, sigma = both(schedule, times)
    slope = np.asarray(schedule.dt_dlambda(jnp.asarray(times)))
    with jax.enable_x64(True):
        exact = jnp.asarray(times.astype(np.float64))
        wanted = (
            schedule.alpha(exact),
            schedule.sigma(exact),
            schedule.dt_dlambda(exact),
        )
    # On the last chord of a discrete schedule, alpha hangs on the rounding of ``N t``.
    tolerance = {"zero-snr": 5e-2, "squaredcos": 3e-4}.get(name, 3e-5)
    for actual, expected in zip((alpha, sigma, slope), wanted, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance)
    np.testing.assert_allclose(sigma[:30], wanted[1][:30], rtol=2e-5)


@each_schedule
def test_dt_dlambda_is_the_inverse_slope(float64, name):
    schedule = SCHEDULES[name]
    t = jnp.asarray(INSIDE)
    actual = schedule.dt_dlambda(t)
    slope = jax.vmap(jax.grad(schedule.lambda_))(t)
    np.testing.assert_allclose(actual, 1 / np.asarray(slope), rtol=1e-8)
    step = 1e-5
    lambda_t = schedule.lambda_(t)
    before, after = (schedule.t_from_lambda(lambda_t + h) for h in (-step, step))
    np.testing.assert_allclose(actual, (after - before) / (2 * step), rtol=1e-4)


@each_schedule
def test_every_method_keeps_dtype_and_shape(float64, name):
    schedule = SCHEDULES[name]
    methods = "alpha sigma lambda_ dt_dlambda log_snr prior_scale input_scale"
    methods += " time_input t_from_lambda t_from_log_snr"
    for dtype in (jnp.float32, jnp.float64):
        for shape in ((), (3,), (2, 3)):
            t = jax.ShapeDtypeStruct(shape, dtype)
            for method in methods.split():
                value = jax.eval_shape(getattr(schedule, method), t)
                assert (value.shape, value.dtype) == (shape, dtype), method


@each_schedule
def test_schedules_are_static_arguments_and_jit(name):
    schedule, t = SCHEDULES[name], jnp.asarray(INSIDE, jnp.float32)
    hash(schedule)
    kind, options = OPTIONS[name]
    assert schedule == get_schedule(kind, **options)
    compiled = jax.jit(lambda s, t: s.lambda_(t), static_argnums=0)(schedule, t)
    np.testing.assert_allclose(compiled, schedule.lambda_(t), rtol=1e-4, atol=1e-5)


def test_what_a_network_is_told():
    t = jnp.asarray([0.0, 0.25, 1.0])
    for name in ("cosine", "linear_beta", "edm", "flow"):
        np.testing.assert_allclose(SCHEDULES[name].time_input(t), [0, 250, 1000])
    np.testing.assert_allclose(
        SCHEDULES["squaredcos"].time_input(t), [-1, 24, 99], atol=1e-5
    )
    for name in set(SCHEDULES) - set(VARIANCE_EXPLODING):
        np.testing.assert_array_equal(SCHEDULES[name].input_scale(t), np.ones(3))
    # Karras et al., table 1: c_in = 1 / sqrt(sigma^2 + sigma_data^2).
    scale = SCHEDULES["edm"].input_scale(jnp.asarray([0.0, 1.0]))
    expected = 1 / np.sqrt(1 + np.array([0.002, 80.0]) ** 2)
    np.testing.assert_allclose(scale, expected, rtol=1e-5)


# --- refusals


def test_an_unknown_schedule_is_refused():
    message = r"schedule 'cosin' is not known; choose one of \['cosine', 'discrete'"
    with pytest.raises(ValueError, match=message):
        get_schedule("cosin")


@pytest.mark.parametrize(
    "name, option", [("flow", "shifft"), ("edm", "sigma"), ("discrete", "beta_shedule")]
)
def test_an_unknown_option_is_refused(name, option):
    with pytest.raises(ValueError, match=f"{name}.*has no such option.*{option}"):
        get_schedule(name, **{option: 2.0})


def test_an_unknown_beta_schedule_is_refused():
    with pytest.raises(ValueError, match=r"'sigmoid' is not known; choose linear, sca"):
        get_schedule("discrete", beta_schedule="sigmoid")


def test_a_scheduler_config_may_say_more_than_is_read():
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SCALED, **STEPS}
    assert from_diffusers(config) == SCHEDULES["scaled_linear"]
