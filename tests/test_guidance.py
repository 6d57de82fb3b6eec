"""Guidance against two separate calls, and the order of guiding and thresholding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
)
from scipy.stats import kstest

from boot_jax.guidance import (
    NEGATIVE_KEY,
    SCALE_KEY,
    draw_guidance_scale,
    guide,
    of_student,
    rescaling,
)
from boot_jax.prediction import to_x_0
from boot_jax.schedules import CosineSchedule
from boot_jax.teachers.base import as_sampled

BATCH, SHAPE = 3, (2, 2, 1)
X_T = jax.random.normal(jax.random.key(0), (BATCH, *SHAPE))
T = jnp.asarray([0.1, 0.5, 0.9])
PARAMS = {"scale": jnp.asarray(1.7)}
LABEL = jnp.asarray([0, 1, 2], jnp.int32)
NULL = {"label": jnp.full((1,), 3, jnp.int32)}


class Denoiser:
    """A nonlinear denoiser that remembers the shapes it was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, params, x_t, t, condition):
        self.calls.append((x_t.shape, t.shape, jax.tree.map(jnp.shape, condition)))
        towards = jnp.cos(condition["label"].astype(x_t.dtype) + t)
        return jnp.tanh(params["scale"] * x_t + towards[:, None, None, None])


def by_two_calls(label: Any, null: Any, scale: np.ndarray) -> np.ndarray:
    """The formula in numpy, an image at a time."""
    images = []
    for index in range(BATCH):
        halves = []
        for which in (label[index], null[index]):
            towards = np.cos(float(which) + float(T[index]))
            halves.append(np.tanh(1.7 * np.asarray(X_T[index]) + towards))
        given, without = halves
        images.append(without + scale[index] * (given - without))
    return np.stack(images)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_equals_two_calls(scale):
    guided = guide(Denoiser(), NULL, scale)
    actual = guided(PARAMS, X_T, T, {"label": LABEL})
    expected = by_two_calls(LABEL, [3, 3, 3], np.full(BATCH, scale))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_is_one_call_of_twice_the_batch():
    denoise = Denoiser()
    condition = {"label": LABEL, SCALE_KEY: jnp.ones((BATCH,))}
    jax.jit(guide(denoise, NULL))(PARAMS, X_T, T, condition)
    # The wrapped denoiser is never shown the scale.
    assert denoise.calls == [((6, *SHAPE), (6,), {"label": (6,)})]


def test_no_guidance_is_the_conditional_denoiser():
    denoise = Denoiser()
    actual = guide(denoise, NULL, 1.0)(PARAMS, X_T, T, {"label": LABEL})
    plain = denoise(PARAMS, X_T, T, {"label": LABEL})
    np.testing.assert_allclose(actual, plain, rtol=1e-6, atol=1e-6)


def test_every_image_may_have_its_own_scale():
    scale = np.array([0.5, 1.0, 9.0], np.float32)
    condition = {"label": LABEL, SCALE_KEY: jnp.asarray(scale)}
    actual = guide(Denoiser(), NULL)(PARAMS, X_T, T, condition)
    expected = by_two_calls(LABEL, [3, 3, 3], scale)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    # A scale of the wrapper's own wins over the condition's.
    actual = guide(Denoiser(), NULL, 2.0)(PARAMS, X_T, T, condition)
    expected = by_two_calls(LABEL, [3, 3, 3], np.full(BATCH, 2.0))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_image_may_have_its_own_negative_prompt():
    negative = jnp.asarray([2, 0, 1], jnp.int32)
    guided = guide(Denoiser(), {"label": negative}, 3.0)
    actual = guided(PARAMS, X_T, T, {"label": LABEL})
    expected = by_two_calls(LABEL, negative, np.full(BATCH, 3.0))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [1, BATCH])
def test_null_conditions_may_have_several_leaves_of_any_rank(leading):
    def denoise(params, x_t, t, condition):
        text = jnp.mean(condition["text"], axis=(1, 2)) * condition["pooled"][:, 0]
        return x_t * text[:, None, None, None]

    keys = jax.random.split(jax.random.key(1), 4)
    given = {
        "text": jax.random.normal(keys[0], (BATCH, 4, 5)),
        "pooled": jax.random.normal(keys[1], (BATCH, 2)),
    }
    null = {
        "text": jax.random.normal(keys[2], (leading, 4, 5)),
        "pooled": jax.random.normal(keys[3], (leading, 2)),
    }
    actual = guide(denoise, null, 4.0)({}, X_T, T, given)

    def factor(condition: Any) -> np.ndarray:
        text, pooled = (np.asarray(condition[key]) for key in ("text", "pooled"))
        return (text.mean((1, 2)) * pooled[:, 0])[:, None, None, None]

    factors = factor(null) + 4 * (factor(given) - factor(null))
    np.testing.assert_allclose(actual, factors * np.asarray(X_T), rtol=1e-4, atol=1e-5)


def test_guidance_of_another_prediction_is_the_same():
    """Of x_0 or of eps: both halves share the affine map between them."""
    alpha, sigma = 0.6, 0.8
    guided = guide(Denoiser(), NULL, 5.0)(PARAMS, X_T, T, {"label": LABEL})
    denoise, x_t = Denoiser(), np.asarray(X_T)
    null = {"label": jnp.full((BATCH,), 3, jnp.int32)}
    eps = [
        (x_t - alpha * np.asarray(denoise(PARAMS, X_T, T, condition))) / sigma
        for condition in ({"label": LABEL}, null)
    ]
    eps = eps[1] + 5.0 * (eps[0] - eps[1])
    np.testing.assert_allclose(guided, (x_t - sigma * eps) / alpha, atol=1e-4)


def test_drawn_scales_are_uniform():
    scale = np.asarray(draw_guidance_scale(jax.random.key(0), 1000, 2.0, 6.0))
    assert scale.shape == (1000,)
    assert 2 <= scale.min() <= scale.max() < 6
    assert kstest((scale - 2) / 4, "uniform").pvalue > 1e-3


def test_the_negative_half_may_come_with_the_condition():
    condition = {"label": LABEL, NEGATIVE_KEY: {"label": jnp.asarray([3, 1, 0])}}
    denoise = Denoiser()
    actual = guide(denoise, NEGATIVE_KEY, 4.0)(PARAMS, X_T, T, condition)
    expected = by_two_calls(LABEL, [3, 1, 0], np.full(BATCH, 4.0))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    # The student never sees it.
    assert of_student(condition).keys() == {"label"}
    assert of_student(None) is None


def test_outside_of_its_interval_it_does_not_guide():
    guided = guide(Denoiser(), NULL, 4.0, interval=(0.4, 0.8))
    actual = guided(PARAMS, X_T, T, {"label": LABEL})  # t is 0.1, 0.5, 0.9
    expected = by_two_calls(LABEL, [3, 3, 3], np.asarray([1.0, 4.0, 1.0]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("factor", [0.7, 1.0])
def test_rescaling_is_that_of_diffusers(prediction_type, factor):
    """Of what the network predicts: there, and turned into an image here."""
    schedule = CosineSchedule()
    alpha, sigma = schedule.alpha(T), schedule.sigma(T)
    keys = jax.random.split(jax.random.key(3), 2)
    outputs = [jax.random.normal(key, X_T.shape) * 1.5 for key in keys]

    def denoise(params, x_t, t, condition):
        both = jnp.concatenate([outputs[1], outputs[0]])
        a, s = jnp.tile(alpha, 2), jnp.tile(sigma, 2)
        return to_x_0(prediction_type, both, x_t, a, s)

    rescale = rescaling(prediction_type, schedule, factor)
    guided = guide(denoise, NULL, 5.0, rescale=rescale)
    actual = guided(PARAMS, X_T, T, {"label": LABEL})
    given, without = (torch.from_numpy(np.array(output)) for output in outputs)
    theirs = rescale_noise_cfg(without + 5 * (given - without), given, factor)
    expected = to_x_0(prediction_type, jnp.asarray(theirs.numpy()), X_T, alpha, sigma)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


# --- the teacher as its sampler runs it


def test_guidance_comes_before_thresholding():
    denoise = as_sampled(
        Denoiser(), null_condition=NULL, guidance_scale=8.0, thresholding="clip"
    )
    actual = denoise(PARAMS, X_T, T, {"label": LABEL})
    guided = by_two_calls(LABEL, [3, 3, 3], np.full(BATCH, 8.0))
    assert np.abs(guided).max() > 2
    np.testing.assert_allclose(actual, np.clip(guided, -1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("switch", [{"guidance_scale": 1.0}, {"null_condition": None}])
def test_no_guidance_costs_one_call_of_the_batch(switch):
    plain = Denoiser()
    options = {"null_condition": NULL, "guidance_scale": 3.0} | switch
    as_sampled(plain, **options)(PARAMS, X_T, T, {"label": LABEL})
    assert plain.calls == [((BATCH, *SHAPE), (BATCH,), {"label": (BATCH,)})]


def test_unknown_thresholding_is_refused():
    message = r"thresholding is 'static'; choose one of \['clip', 'dynamic', 'none'\]"
    with pytest.raises(ValueError, match=message):
        as_sampled(Denoiser(), thresholding="static")
