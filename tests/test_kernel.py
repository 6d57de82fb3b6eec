"""Kernel distance, inception score and intervals against their definitions."""

import numpy as np
import pytest

from boot_jax.evaluation import kernel
from boot_jax.evaluation.classes import inception_score
from boot_jax.evaluation.intervals import bootstrap_interval
from boot_jax.evaluation.kernel import kernel_distance, subset_kernel_distances


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


def naive_kernel_distance(real, generated):
    def k(x, y):
        return (np.dot(x, y) / len(x) + 1.0) ** 3

    def mean_of_pairs(a):
        pairs = [k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
        return np.mean(pairs)

    cross = np.mean([k(x, y) for x in real for y in generated])
    return mean_of_pairs(real) + mean_of_pairs(generated) - 2 * cross


def test_kernel_distance_is_its_definition(rng, monkeypatch):
    real, generated = rng.normal(size=(23, 6)), rng.normal(size=(31, 6)) + 0.5
    expected = naive_kernel_distance(real, generated)
    assert kernel_distance(real, generated).value == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(kernel, "_BLOCK_ROWS", 7)
    shuffled = rng.permutation(real), rng.permutation(generated)
    assert kernel_distance(*shuffled).value == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_has_no_bias(rng):
    """Of two sets of one law its mean is 0, even of few images."""
    values = [kernel_distance(*rng.normal(size=(2, 20, 3))).value for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_subsets_agree_with_all_pairs(rng):
    real, generated = rng.normal(size=(200, 5)), rng.normal(size=(300, 5)) + 0.3
    whole = kernel_distance(real, generated).value
    parts = subset_kernel_distances(real, generated, num_subsets=60, subset_size=80)
    assert parts.shape == (60,)
    assert np.mean(parts) == pytest.approx(whole, abs=3 * parts.std() / np.sqrt(60))
    again = subset_kernel_distances(real, generated, num_subsets=60, subset_size=80)
    np.testing.assert_array_equal(parts, again)
    all_of_one = subset_kernel_distances(
        real[:50], generated[:50], num_subsets=1, subset_size=50
    )
    assert all_of_one[0] == pytest.approx(
        kernel_distance(real[:50], generated[:50]).value, rel=1e-10
    )


def test_kernel_influences_foretell_the_scatter(rng):
    real = rng.normal(size=(500, 3))
    values = [
        kernel_distance(real, rng.normal(size=(300, 3)) + 0.5).value for _ in range(150)
    ]
    influences = kernel_distance(real, rng.normal(size=(300, 3)) + 0.5).influences
    assert influences.mean() == pytest.approx(0.0, abs=1e-12)
    predicted = influences.std() / np.sqrt(300)
    assert predicted == pytest.approx(np.std(values), rel=0.25)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        ((1, 3), (5, 3), "at least 2"),
        ((5, 3), (5, 2), "dimensions 3 and 2"),
    ],
)
def test_kernel_distance_refuses(real, generated, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(np.zeros(real), np.zeros(generated))


def test_subsets_need_as_many_images(rng):
    with pytest.raises(ValueError, match="at least 30"):
        subset_kernel_distances(
            rng.normal(size=(29, 2)), rng.normal(size=(40, 2)), subset_size=30
        )


# --- inception score


def naive_inception_score(logits):
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    marginal = p.mean(0)
    return np.exp(np.mean([(q * np.log(q / marginal)).sum() for q in p]))


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_is_its_definition(rng, splits):
    logits = 2 * rng.normal(size=(40, 7)) + 300.0
    parts = [naive_inception_score(x - 300.0) for x in np.array_split(logits, splits)]
    found = inception_score(logits, splits)
    assert found.value == pytest.approx(np.mean(parts), rel=1e-11)
    assert found.deviation == pytest.approx(np.std(parts), rel=1e-9, abs=1e-12)
    assert found.influences.shape == (40,)


def test_inception_score_lies_between_one_and_the_classes():
    sure = 100 * np.eye(5)[np.arange(50) % 5]
    assert inception_score(sure, 1).value == pytest.approx(5.0)
    assert inception_score(np.ones((50, 5)), 1).value == pytest.approx(1.0)


def test_inception_scores_influences_foretell_its_scatter(rng):
    values = [
        inception_score(2 * rng.normal(size=(400, 5)), 1).value for _ in range(150)
    ]
    influences = inception_score(2 * rng.normal(size=(400, 5)), 1).influences
    predicted = influences.std() / np.sqrt(400)
    assert predicted == pytest.approx(np.std(values), rel=0.25)


def test_inception_score_refuses_fewer_images_than_parts():
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(np.zeros((9, 3)))
    with pytest.raises(ValueError, match="1 part at least, not 0"):
        inception_score(np.zeros((9, 3)), 0)


# --- bootstrap


def test_intervals_of_a_mean_are_those_of_its_standard_error(rng):
    terms = rng.normal(size=2000)
    low, high = bootstrap_interval(7.0, terms, resamples=4000)
    error = 1.96 * terms.std() / np.sqrt(2000)
    assert low == pytest.approx(7.0 - error, abs=0.1 * error)
    assert high == pytest.approx(7.0 + error, abs=0.1 * error)


def test_intervals_cover_the_truth_as_often_as_they_say(rng):
    covered = 0
    for seed in range(300):
        terms = rng.exponential(size=200)
        low, high = bootstrap_interval(
            terms.mean(), terms, resamples=300, seed=seed, level=0.9
        )
        covered += low <= 1.0 <= high
    assert 0.83 < covered / 300 < 0.95


def test_intervals_depend_on_the_seed_and_not_on_order(rng):
    terms = rng.normal(size=100)
    first = bootstrap_interval(0.0, terms, seed=3)
    assert first == bootstrap_interval(0.0, rng.permutation(terms), seed=3)
    assert first != bootstrap_interval(0.0, terms, seed=4)


def test_intervals_are_wider_of_fewer_images(rng):
    terms = rng.normal(size=1600)
    wide, narrow = (
        np.diff(bootstrap_interval(0.0, terms[:n], resamples=500)) for n in (100, 1600)
    )
    assert wide == pytest.approx(4 * narrow, rel=0.3)


@pytest.mark.parametrize(
    "changes", [{"terms": []}, {"resamples": 0}, {"level": 1.0}, {"terms": [[1.0]]}]
)
def test_intervals_refuse(changes):
    with pytest.raises(ValueError, match="a bootstrap needs terms"):
        bootstrap_interval(**({"value": 0.0, "terms": [1.0, 2.0]} | changes))
