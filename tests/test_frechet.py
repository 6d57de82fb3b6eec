"""Streamed moments, and what is derived of the Frechet distance's smoothness."""

import numpy as np
import pytest
import scipy.linalg

from boot_jax.evaluation.frechet import (
    Moments,
    extrapolated_distance,
    feature_statistics,
    frechet_distance,
    frechet_influences,
    rank_warning,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def features(rng) -> np.ndarray:
    return rng.normal(size=(101, 7)) @ rng.normal(size=(7, 7)) + 50.0


def streamed(features, sizes):
    moments = Moments()
    for batch in np.split(features, np.cumsum(sizes)):
        moments.update(batch)
    return moments.statistics()


@pytest.mark.parametrize("sizes", [(), (50,), (1,) * 100, (99, 1), (0, 64, 0, 32)])
def test_moments_do_not_depend_on_batches_or_order(rng, features, sizes):
    shuffled = rng.permutation(features)
    statistics = streamed(shuffled, sizes)
    assert statistics.count == 101
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(features, rowvar=False), rtol=1e-11, atol=1e-12
    )


def test_moments_keep_digits_where_the_mean_is_far(rng):
    features = rng.normal(size=(200, 3)) + 1e7
    expected = np.cov(features, rowvar=False)
    found = streamed(features, (17,) * 11).covariance
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


def test_moments_refuse_another_width_and_nothing():
    moments = Moments()
    with pytest.raises(ValueError, match="needs 2 samples, but there is 0"):
        moments.statistics()
    moments.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="4 wide, but those of the batches before"):
        moments.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="1 of 2 images"):
        moments.update([[0.0, 1.0, 2.0], [0.0, np.nan, 0.0]])


@pytest.mark.parametrize("count", [40, 400])
def test_distance_of_wide_features_is_that_of_scipy(rng, count):
    """The matrix part to 1e-6, with and without full rank, as FIDs have it.

    Without it scipy's root is inexact. There ``C_a^1/2 C_b^1/2`` has the singular
    values of the centred features' products, over ``N - 1``.
    """
    width = 96
    scales = np.geomspace(1e-3, 1.0, width)
    a, b = (rng.gamma(1.0, size=(count, width)) * scales for _ in range(2))
    own_a, own_b = feature_statistics(a), feature_statistics(b)
    if count > width:
        root = scipy.linalg.sqrtm(own_a.covariance @ own_b.covariance)
        cross = np.trace(np.real(root))
    else:
        products = (a - a.mean(0)) @ (b - b.mean(0)).T
        cross = scipy.linalg.svdvals(products).sum() / (count - 1)
    shift = np.sum((a.mean(0) - b.mean(0)) ** 2)
    spread = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    found = frechet_distance(own_a, own_b)
    assert found == pytest.approx(shift + spread, rel=1e-6)


def test_influences_are_the_derivative_by_an_images_weight(rng):
    real, own = rng.normal(size=(300, 5)), rng.normal(size=(200, 5)) * 1.3 + 0.4
    reference, statistics = feature_statistics(real), feature_statistics(own)
    influences = frechet_influences(reference, statistics, own)
    assert abs(influences.mean()) < 0.02 * influences.std()

    def distance(weights):
        mean = weights @ own
        centred = own - mean
        covariance = (weights[:, None] * centred).T @ centred
        changed = type(statistics)(mean, covariance, 200)
        return frechet_distance(reference, changed)

    even = np.full(200, 1 / 200)
    for image in (0, 17):
        step = 1e-5
        moved = (1 - step) * even
        moved[image] += step
        slope = (distance(moved) - distance(even)) / step
        # The covariance there is over N, here over N - 1.
        assert slope == pytest.approx(influences[image], rel=0.02, abs=0.02)


def test_influences_foretell_how_far_the_distance_scatters(rng):
    """Over fresh sets of images, whose spread the bootstrap is to find from one."""
    reference = feature_statistics(rng.normal(size=(5000, 4)))

    def fresh():
        return rng.normal(size=(1000, 4)) * [1.0, 1.2, 0.8, 1.0] + 0.2

    distances = []
    for _ in range(200):
        distances.append(frechet_distance(reference, feature_statistics(fresh())))
    own = fresh()
    influences = frechet_influences(reference, feature_statistics(own), own)
    predicted = influences.std() / np.sqrt(len(own))
    assert predicted == pytest.approx(np.std(distances), rel=0.2)


def test_influences_without_full_rank_are_finite(rng):
    real, own = rng.normal(size=(300, 40)), rng.normal(size=(20, 40))
    influences = frechet_influences(
        feature_statistics(real), feature_statistics(own), own
    )
    assert np.isfinite(influences).all() and influences.std() > 0


def test_extrapolation_takes_most_of_the_bias_away(rng):
    """The set's law is the reference's: at infinitely many images the distance is 0."""
    width = 12
    reference = feature_statistics(rng.normal(size=(100_000, width)))
    values, plain = [], []
    for seed in range(8):
        features = rng.normal(size=(600, width))
        found = extrapolated_distance(reference, features, seed=seed)
        values.append(found.value)
        plain.append(found.distances[-1])
        assert found.counts[0] == 120 and found.counts[-1] == 600
    assert found.distances[0] > 2 * found.distances[-1]
    assert np.mean(plain) > 0.05
    assert abs(np.mean(values)) < 0.2 * np.mean(plain)


def test_extrapolation_needs_images_and_points(rng):
    reference = feature_statistics(rng.normal(size=(50, 3)))
    with pytest.raises(ValueError, match="at least 20"):
        extrapolated_distance(reference, np.zeros((19, 3)))
    with pytest.raises(ValueError, match="2 points at least, not 1"):
        extrapolated_distance(reference, np.zeros((30, 3)), points=1)


def test_too_few_images_are_warned_of_with_the_number_needed():
    assert rank_warning("the samples", 65, 64) is None
    assert rank_warning("the reference", None, 2048) is None
    warning = rank_warning("the samples", 64, 64)
    assert warning is not None and "at least 65 images" in warning
    assert "the samples are 64" in warning
