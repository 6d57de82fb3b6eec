import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from boot_jax.conditions import Conditions
from boot_jax.guidance import SCALE_KEY


def test_nothing_is_drawn_without_classes():
    conditions = Conditions()
    assert conditions.draw(jax.random.key(0), 8) is None
    assert conditions.null() is None


def test_labels_are_uniform_over_the_classes():
    condition = Conditions(num_classes=7).draw(jax.random.key(0), 7000)
    assert set(condition) == {"label"}
    assert condition["label"].dtype == jnp.int32
    counts = np.bincount(condition["label"], minlength=7)
    assert len(counts) == 7  # Neither the null label nor any beyond it.
    assert chisquare(counts).pvalue > 1e-3


def test_the_null_label_is_the_one_after_the_last():
    null = Conditions(num_classes=7).null()
    np.testing.assert_array_equal(null["label"], [7])
    assert null["label"].dtype == jnp.int32


@pytest.mark.parametrize("low, high", [(1.0, 4.0), (2.0, 2.0)])
def test_guidance_scales_are_uniform_in_their_range(low, high):
    conditions = Conditions(num_classes=3, guidance_range=(low, high))
    condition = conditions.draw(jax.random.key(1), 2000)
    scale = np.asarray(condition[SCALE_KEY])
    assert scale.shape == (2000,)
    assert low <= scale.min() <= scale.max() <= high
    if high > low:
        assert kstest((scale - low) / (high - low), "uniform").pvalue > 1e-3
        # The labels say nothing about the scales: two streams out of one key.
        correlation = np.corrcoef(scale, np.asarray(condition["label"]))[0, 1]
        assert abs(correlation) < 0.1
    # Guidance is towards the class from the null label, which carries no scale.
    assert set(conditions.null()) == {"label"}


def test_given_labels_are_kept():
    conditions = Conditions(num_classes=9, guidance_range=(1.0, 2.0))
    label = jnp.asarray([8, 0, 3], jnp.uint8)
    condition = conditions.of_labels(label, jax.random.key(0))
    np.testing.assert_array_equal(condition["label"], [8, 0, 3])
    assert condition["label"].dtype == jnp.int32
    assert condition[SCALE_KEY].shape == (3,)


def test_draws_are_a_function_of_the_key_also_under_jit():
    conditions = Conditions(num_classes=5, guidance_range=(1.0, 3.0))
    drawn = conditions.draw(jax.random.key(3), 32)
    compiled = jax.jit(conditions.draw, static_argnums=1)(jax.random.key(3), 32)
    other = conditions.draw(jax.random.key(4), 32)
    for name in ("label", SCALE_KEY):
        np.testing.assert_allclose(compiled[name], drawn[name], rtol=1e-6)
        assert (np.asarray(other[name]) != np.asarray(drawn[name])).any()
