import numpy as np
import pytest

from boot_jax.evaluation import nearest as module
from boot_jax.evaluation import neighbours
from boot_jax.evaluation.nearest import distances_among, nearest, show_samples


def naive(samples: np.ndarray, real: np.ndarray) -> np.ndarray:
    """All distances ``[n, N]``, one by one."""
    return np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in real] for a in samples])


@pytest.mark.parametrize("width", [3, 300])  # 300 have their distances expanded
@pytest.mark.parametrize("rows", [7, 1000])
def test_neighbours_are_those_of_the_definition(width, rows, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", rows)
    rng = np.random.default_rng(0)
    samples, real = rng.normal(size=(5, width)), rng.normal(size=(40, width))
    real[33] = real[4]  # twice the same
    real[:] += 100.0  # far from 0, where expansions lose digits
    samples[:] += 100.0
    samples[2] = real[33]
    distances = naive(samples, real)
    indices, found = nearest(samples, real, 6)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :6], rtol=1e-12)
    assert found[2, :2].tolist() == [0.0, 0.0] and indices[2, :2].tolist() == [4, 33]

    others = naive(real, real)
    np.fill_diagonal(others, np.inf)
    among = distances_among(real)
    np.testing.assert_allclose(among, others.min(axis=1), rtol=1e-12)
    assert among[4] == among[33] == 0.0


def test_there_are_no_more_neighbours_than_real_images():
    indices, distances = nearest(np.zeros((2, 1)), np.array([[3.0], [1.0]]), 5)
    assert indices.tolist() == [[1, 0]] * 2 and distances.tolist() == [[1.0, 3.0]] * 2


@pytest.mark.parametrize(
    ("samples", "real", "k", "words"),
    [
        (np.zeros((1, 2)), np.zeros((3, 2)), 0, "at least 1, but is 0"),
        (np.zeros((1, 2)), np.zeros((3, 4)), 1, "dimensions 2 and 4"),
        (np.full((1, 2), np.nan), np.zeros((3, 2)), 1, "must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(samples, real, k, words):
    with pytest.raises(ValueError, match=words):
        nearest(samples, real, k)


def test_samples_are_shown_with_images_distances_and_what_is_typical():
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (20, 2, 3, 1))
    rows = {"a": rng.uniform(-1, 1, (3, 2, 3, 1)), "b": images[5:8].copy()}

    def flat(given):
        return given.reshape(len(given), -1)

    asked = []

    def real_images(indices):
        asked.append(indices)
        return images[indices]

    features = {name: flat(given) for name, given in rows.items()}
    shown = show_samples(rows, features, flat(images), real_images, 4, ["x", "y", "z"])
    others = naive(flat(images), flat(images))
    np.fill_diagonal(others, np.inf)
    among = others.min(axis=1)
    for name, samples in shown.items():
        distances = naive(features[name], flat(images))
        for place, sample in enumerate(samples):
            assert sample.caption == "xyz"[place]
            np.testing.assert_array_equal(sample.image, rows[name][place])
            order = np.argsort(distances[place])[:4]
            assert [near.index for near in sample.neighbours] == order.tolist()
            for near in sample.neighbours:
                np.testing.assert_array_equal(near.image, images[near.index])
                assert near.distance == pytest.approx(distances[place, near.index])
            nearest_one = distances[place].min()
            assert sample.share == np.mean(among <= nearest_one)
            assert sample.typical == pytest.approx(
                np.quantile(among, [0.05, 0.5, 0.95])
            )
    assert [sample.share for sample in shown["b"]] == [0.0] * 3  # copies
    assert 0.0 < shown["a"][0].share <= 1.0
    assert all(len(np.unique(indices)) == len(indices) for indices in asked)
