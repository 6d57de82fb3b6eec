import jax.numpy as jnp
import numpy as np
import pytest
import torch

from boot_jax.evaluation.features import get_features, pixel_features


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape)


def test_small_images_are_their_own_features():
    images = random_images(5, 8, 8, 1)
    extractor = pixel_features((8, 8, 1))
    features = extractor(images)
    assert extractor.name == "pixels 8x8x1"
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, images.reshape(5, 64))


@pytest.mark.parametrize(
    ("shape", "factor", "name"),
    [
        ((32, 32, 3), 4, "pixels 8x8x3 (4x4 means of 32x32)"),
        ((28, 28, 1), 4, "pixels 7x7x1 (4x4 means of 28x28)"),
        # Edges that the factor does not divide: the last cells are smaller.
        ((9, 5, 2), 2, "pixels 5x3x2 (2x2 means of 9x5)"),
        ((30, 13, 3), 4, "pixels 8x4x3 (4x4 means of 30x13)"),
    ],
)
def test_pooling_is_that_of_torch(shape, factor, name):
    images = random_images(4, *shape)
    extractor = pixel_features(shape)
    pooled = torch.nn.functional.avg_pool2d(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        factor,
        ceil_mode=True,
        count_include_pad=False,
    )
    expected = pooled.permute(0, 2, 3, 1).reshape(4, -1).numpy()
    assert extractor.name == name
    np.testing.assert_allclose(extractor(images), expected, rtol=0, atol=1e-14)


def test_max_size_sets_the_pooling():
    assert pixel_features((32, 32, 3), max_size=16).factor == 2
    assert pixel_features((32, 32, 3), max_size=32).name == "pixels 32x32x3"
    assert pixel_features((8, 8, 1), max_size=1)(random_images(3, 8, 8, 1)).shape == (
        3,
        1,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jax_images_of_any_float_are_taken(dtype):
    images = jnp.asarray(random_images(3, 8, 8, 1), dtype)
    features = pixel_features((8, 8, 1))(images)
    assert features.dtype == np.float64
    np.testing.assert_array_equal(
        features[0], np.asarray(images[0], np.float64).ravel()
    )


def test_no_pixel_feature_is_called_fid():
    features = get_features("pixels", (16, 16, 3))
    assert "fid" not in (features.name + features.distance_name).lower()
    description = features.describe(random_images(2, 16, 16, 3))
    assert description.spatial is None and description.logits is None


def test_known_features_are_found_by_name():
    assert get_features("pixels", (16, 16, 3)) == pixel_features((16, 16, 3))


def test_unknown_features_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'inception'"):
        get_features("inceptoin", (8, 8, 1))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (8, 8, 1), (2, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"images \[8, 8, 1\]"):
        pixel_features((8, 8, 1))(random_images(*shape))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"uint8: divide uint8 images by 127.5"):
        pixel_features((8, 8, 1))(np.zeros((2, 8, 8, 1), np.uint8))


@pytest.mark.parametrize(("shape", "size"), [((8, 8, 1), 0), ((0, 8, 1), 8)])
def test_nothing_is_left_to_pool(shape, size):
    with pytest.raises(ValueError, match="max_size of at least 1"):
        pixel_features(shape, max_size=size)
