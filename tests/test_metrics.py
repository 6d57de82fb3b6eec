import math

import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from boot_jax.evaluation import neighbours
from boot_jax.evaluation.frechet import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
)
from boot_jax.evaluation.metrics import (
    equivalent_steps,
    normalized_error,
    variance_ratio,
)
from boot_jax.evaluation.neighbours import (
    density_coverage,
    mean_pairwise_distance,
    precision_recall,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def gaussian(mean, covariance) -> FeatureStatistics:
    return FeatureStatistics(np.asarray(mean, float), np.asarray(covariance, float), 10)


def random_covariance(rng: np.random.Generator, dim: int, rank: int) -> np.ndarray:
    factor = rng.normal(size=(dim, rank))
    return factor @ factor.T / rank


# --- statistics -------------------------------------------------------------------


def test_statistics_are_those_of_numpy(rng):
    features = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 3.0
    statistics = feature_statistics(features)
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(features, rowvar=False), rtol=1e-12, atol=1e-13
    )


def test_statistics_are_taken_in_float64(rng):
    features = (rng.normal(size=(100, 2)) + 1e3).astype(np.float32)
    statistics = feature_statistics(features)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    assert statistics.covariance.dtype == np.float64
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-9)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match=r"N at least 2.*\[1, 3\]"):
        feature_statistics(np.zeros((1, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = np.zeros((4, 3))
    features[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 4 images have NaN or infinity"):
        feature_statistics(features)


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (np.zeros(3), np.eye(2), 9, r"\[3\] and \[2, 2\]"),
        (np.zeros(2), np.eye(2), 1, "needs 2 samples, but there is 1"),
        (np.zeros(2), np.full((2, 2), np.nan), 9, "must be finite"),
    ],
)
def test_bad_statistics_are_refused(mean, covariance, count, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics(mean, covariance, count)


# --- Frechet distance -------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians():
    # |m|^2 + sum (sqrt a - sqrt b)^2 = (9 + 16) + (2 - 1)^2 + (3 - 5)^2
    a = gaussian([0, 0], np.diag([4.0, 9.0]))
    b = gaussian([3, 4], np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(30.0, abs=1e-12)


def test_frechet_distance_of_rotated_gaussians():
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = a @ b
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    actual = frechet_distance(gaussian([1, 1], a), gaussian([1, 1], b))
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [3, 20, 64])
def test_frechet_distance_is_that_of_scipys_square_root(rng, dim):
    a, b = random_covariance(rng, dim, 2 * dim), random_covariance(rng, dim, 2 * dim)
    mean_a, mean_b = rng.normal(size=(2, dim))
    root = np.real(np.asarray(scipy.linalg.sqrtm(a @ b)))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root)
    actual = frechet_distance(gaussian(mean_a, a), gaussian(mean_b, b))
    assert actual == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(gaussian(mean_b, b), gaussian(mean_a, a)) == pytest.approx(
        actual, rel=1e-9
    )


def test_frechet_distance_of_singular_covariances(rng):
    # In a subspace: the distance there is the distance in the whole space.
    a, b = random_covariance(rng, 5, 9), random_covariance(rng, 5, 9)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0][:, :5]
    inside = frechet_distance(gaussian(np.zeros(5), a), gaussian(np.zeros(5), b))
    whole = frechet_distance(
        gaussian(np.zeros(12), basis @ a @ basis.T),
        gaussian(np.zeros(12), basis @ b @ basis.T),
    )
    assert whole == pytest.approx(inside, rel=1e-6)


def test_frechet_distance_of_orthogonal_subspaces():
    a, b = gaussian([0, 0], np.diag([4.0, 0.0])), gaussian([0, 0], np.diag([0.0, 9.0]))
    assert frechet_distance(a, b) == pytest.approx(13.0, abs=1e-12)
    point = gaussian([1, 0], np.zeros((2, 2)))
    assert frechet_distance(a, point) == pytest.approx(5.0, abs=1e-12)


def test_frechet_distance_of_digits_with_constant_pixels():
    digits = load_digits(return_X_y=True)[0] / 8.0 - 1.0
    whole = feature_statistics(digits)
    few = feature_statistics(digits[:40])
    assert (np.diag(whole.covariance) == 0).any()
    assert 0.0 <= frechet_distance(whole, whole) < 1e-9
    assert 0.0 <= frechet_distance(few, few) < 1e-9
    shifted = FeatureStatistics(few.mean + 0.5, few.covariance, few.count)
    assert frechet_distance(few, shifted) == pytest.approx(64 * 0.25, rel=1e-9)


def test_frechet_distance_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match="dimensions 2 and 3"):
        frechet_distance(
            gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3))
        )


# --- precision and recall, density and coverage -----------------------------------


def brute_force_balls(centres: np.ndarray, points: np.ndarray, k: int) -> np.ndarray:
    """Whether each point lies in each ball, by scikit-learn: ``[points, centres]``."""
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(centres)
    radii = neighbours.kneighbors()[0][:, -1]  # without arguments: self is left out
    distances = np.linalg.norm(points[:, None] - centres[None, :], axis=-1)
    return distances <= radii[None, :]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block_rows", [7, 1024])
def test_manifold_metrics_are_those_of_brute_force(rng, monkeypatch, k, block_rows):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", block_rows)
    real = rng.normal(size=(60, 4))
    generated = 0.7 * rng.normal(size=(45, 4)) + 0.8
    in_real = brute_force_balls(real, generated, k)
    in_generated = brute_force_balls(generated, real, k)

    precision, recall = precision_recall(real, generated, k)
    assert precision == pytest.approx(in_real.any(axis=1).mean())
    assert recall == pytest.approx(in_generated.any(axis=1).mean())
    assert 0.05 < recall < 0.95  # the example tells something

    density, coverage = density_coverage(real, generated, k)
    assert density == pytest.approx(in_real.sum() / (k * 45))
    assert coverage == pytest.approx(in_real.any(axis=0).mean())


def test_identical_sets_are_precise_and_recalled(rng):
    features = rng.normal(size=(50, 3))
    assert precision_recall(features, features[::-1]) == (1.0, 1.0)
    density, coverage = density_coverage(features, features[::-1])
    # Each ball holds its centre and k neighbours, the farthest just on its surface.
    assert density == pytest.approx((5 + 1) / 5)
    assert coverage == 1.0


def test_disjoint_sets_have_neither(rng):
    features = rng.normal(size=(50, 3))
    assert precision_recall(features, features + 100.0) == (0.0, 0.0)
    assert density_coverage(features, features + 100.0) == (0.0, 0.0)


def test_a_collapsed_generator_is_precise_without_recall(rng):
    real = rng.normal(size=(200, 2))
    collapsed = 1e-3 * rng.normal(size=(200, 2))
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0
    assert recall < 0.02
    constant = np.tile(real[:1], (200, 1))
    assert precision_recall(real, constant) == (1.0, 1 / 200)


def test_a_point_on_the_surface_of_a_ball_is_inside():
    # Radii at k = 1: 1, 1, 2 around 0, 1, 3; so -1 lies on the ball around 0.
    real = np.array([[0.0], [1.0], [3.0]])
    assert precision_recall(real, np.array([[-1.0], [-1.5]]), k=1).precision == 0.5


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_manifold_metrics_refuse_what_they_cannot_compare(metric, rng):
    features = rng.normal(size=(10, 3))
    with pytest.raises(ValueError, match=r"N at least 4.*\[3, 3\]"):
        metric(features, features[:3], k=3)
    with pytest.raises(ValueError, match="dimensions 3 and 2"):
        metric(features, features[:, :2], k=3)
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        metric(features, features, k=0)


# --- errors -----------------------------------------------------------------------


def test_normalized_error_is_one_for_the_mean_image(rng):
    reference = rng.normal(size=(40, 4, 4, 1)) + 2.0
    mean = np.broadcast_to(reference.mean(0), reference.shape)
    assert normalized_error(mean, reference) == pytest.approx(1.0, rel=1e-12)
    assert normalized_error(reference, reference) == 0.0
    # Halfway between the mean image and the reference: a quarter.
    halfway = (mean + reference) / 2
    assert normalized_error(halfway, reference) == pytest.approx(0.25, rel=1e-12)


def test_normalized_error_is_one_minus_the_coefficient_of_determination(rng):
    from sklearn.metrics import r2_score

    reference = rng.normal(size=(30, 12)) * np.arange(1, 13)
    images = reference + rng.normal(size=(30, 12))
    r2 = r2_score(reference, images, multioutput="variance_weighted")
    shape = (30, 2, 2, 3)
    actual = normalized_error(images.reshape(shape), reference.reshape(shape))
    assert actual == pytest.approx(1.0 - r2, rel=1e-10)


def test_variance_ratio_ignores_means_and_numbers(rng):
    reference = rng.normal(size=(50, 2, 2, 1))
    shrunk = np.tile(0.5 * reference + 3.0, (2, 1, 1, 1))
    assert variance_ratio(shrunk, reference) == pytest.approx(0.25, rel=1e-12)
    expected = reference[:20].var(0).sum() / reference.var(0).sum()
    assert variance_ratio(reference[:20], reference) == pytest.approx(expected)


def test_float32_images_are_summed_in_float64(rng):
    reference = (rng.normal(size=(64, 8)) + 1e4).astype(np.float32)
    exact = normalized_error(reference.astype(float) + 1, reference.astype(float))
    assert normalized_error(reference + np.float32(1), reference) == pytest.approx(
        exact, rel=1e-9
    )


@pytest.mark.parametrize("metric", [normalized_error, variance_ratio])
def test_errors_refuse_shapes_and_constant_references(metric, rng):
    images = rng.normal(size=(5, 2, 2, 1))
    with pytest.raises(ValueError, match=r"\[5, 2, 2, 1\] and \[5, 2, 2, 3\]"):
        metric(images, np.zeros((5, 2, 2, 3)))
    with pytest.raises(ValueError, match="total variance is 0"):
        metric(images, np.ones((5, 2, 2, 1)))


def test_normalized_error_refuses_sets_that_are_not_paired(rng):
    images = rng.normal(size=(5, 2, 2, 1))
    with pytest.raises(ValueError, match="paired"):
        normalized_error(images, images[:4])


def test_wide_features_agree_with_the_naive_definition(rng):
    """They are compared by products, and points at just a ball's radius still count."""
    real, generated = rng.normal(size=(60, 300)) + 5.0, rng.normal(size=(50, 300)) + 5.0
    generated[:20] = real[:20]  # memorised: each at distance 0, or at a ball's radius

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(a, k):
        return np.sort(distances(a, a), axis=1)[:, k]

    between = distances(generated, real)
    slack = 1e-7
    inside = between <= radii(real, 3)[None] + slack
    recalled = between <= radii(generated, 3)[:, None] + slack
    found = precision_recall(real, generated, 3)
    assert found == (inside.any(1).mean(), recalled.any(0).mean())
    inside = between <= radii(real, 5)[None] + slack
    density, coverage = density_coverage(real, generated, 5)
    assert density == pytest.approx(inside.sum() / 5 / 50)
    assert coverage == pytest.approx(inside.any(0).mean())
    expected = distances(real, real).sum() / 60 / 59
    assert mean_pairwise_distance(real) == pytest.approx(expected, rel=1e-9)


def test_mean_pairwise_distance_is_that_of_all_pairs(rng):
    features = rng.normal(size=(30, 4))
    pairs = [
        np.linalg.norm(a - b)
        for i, a in enumerate(features)
        for j, b in enumerate(features)
        if i != j
    ]
    assert mean_pairwise_distance(features) == pytest.approx(np.mean(pairs), rel=1e-12)


# --- equivalent steps -------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "value", "censored"),
    [
        (8.0, 1.0, "none"),
        (2.0, 4.0, "none"),
        (0.5, 16.0, "none"),
        (4.0, 2.0, "none"),  # halfway from 8 to 2 in logarithms: halfway from 1 to 4
        (1.0, 8.0, "none"),
        (8.0 / 2**0.5, 4.0**0.25, "none"),
        (8.1, 1.0, "below"),
        (0.49, 16.0, "above"),
        (0.0, 16.0, "above"),
    ],
)
def test_equivalent_steps_by_hand(distance, value, censored):
    actual = equivalent_steps([1, 4, 16], [8.0, 2.0, 0.5], distance)
    assert actual.value == pytest.approx(value, rel=1e-12)
    assert actual.censored == censored


def test_equivalent_steps_sort_the_curve():
    assert equivalent_steps([16, 1, 4], [0.5, 8.0, 2.0], 4.0).value == pytest.approx(2)


@pytest.mark.parametrize(
    ("distance", "value"),
    [(3.0, 2.0), (4.0, 1.0), (1.0, 16.0), (3.0**0.5, math.sqrt(8 * 16))],
)
def test_equivalent_steps_on_a_curve_that_rises_again(distance, value):
    # Its running minimum is 4, 3, 3, 3, 1: a plateau counts as its first entry.
    actual = equivalent_steps([1, 2, 4, 8, 16], [4.0, 3.0, 3.5, 5.0, 1.0], distance)
    assert actual.value == pytest.approx(value, rel=1e-12)
    assert actual.censored == "none"


def test_equivalent_steps_at_a_curve_that_ends_rising():
    steps, distances = [1, 2, 4], [4.0, 1.0, 2.0]
    assert equivalent_steps(steps, distances, 1.0) == (2.0, "none")
    assert equivalent_steps(steps, distances, 0.9) == (4.0, "above")


def test_equivalent_steps_next_to_a_distance_of_zero():
    actual = equivalent_steps([1, 2], [1.0, 0.0], 0.5)
    assert 1.0 < actual.value < 2.0
    assert equivalent_steps([1, 2], [1.0, 0.0], 0.0) == (2.0, "none")


@pytest.mark.parametrize(
    ("text", "distance"), [("2", 4.0), ("1.2", 6.4), ("> 16", 0.1), ("< 1", 9.0)]
)
def test_equivalent_steps_say_where_they_are_censored(text, distance):
    assert str(equivalent_steps([1, 4, 16], [8.0, 2.0, 0.5], distance)) == text


@pytest.mark.parametrize(
    ("steps", "distances", "distance", "message"),
    [
        ([1, 2], [1.0], 1.0, "one distance for each"),
        ([], [], 1.0, "one distance for each"),
        ([2, 2], [1.0, 0.5], 1.0, "each once"),
        ([0, 2], [1.0, 0.5], 1.0, "at least 1"),
        ([1, 2], [1.0, -0.5], 1.0, "at least 0"),
        ([1, 2], [1.0, 0.5], float("nan"), "finite"),
    ],
)
def test_equivalent_steps_refuse_bad_curves(steps, distances, distance, message):
    with pytest.raises(ValueError, match=message):
        equivalent_steps(steps, distances, distance)
