"""Resizing against Pillow, PyTorch, and TensorFlow 1's rule written out."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from boot_jax.evaluation.resizing import RESIZE_MODES, Resizer

SIZES = [(8, 8), (32, 20), (64, 70), (101, 45)]


def uint8_images(height, width, channels=3, num=2):
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (num, height, width, channels), dtype=np.uint8)


def resized(mode, pixels, size=37, round_uint8=True):
    images = jnp.asarray(pixels.astype(np.float32) / 127.5 - 1.0)
    made = Resizer(mode=mode, size=size, round_uint8=round_uint8)(images)
    middle = 127.5 if mode == "legacy_pytorch" else 128.0
    return np.asarray(made) * middle + middle


@pytest.mark.parametrize("shape", SIZES)
def test_clean_is_pillows_bicubic_of_floats(shape):
    pixels = uint8_images(*shape)
    for image, found in zip(pixels, resized("clean", pixels), strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            wanted = plane.resize((37, 37), Image.Resampling.BICUBIC)
            wanted = np.asarray(wanted).clip(0, 255)
            np.testing.assert_allclose(found[..., channel], wanted, atol=2e-4)


@pytest.mark.parametrize("shape", SIZES)
def test_legacy_pytorch_is_torchs_interpolation(shape):
    pixels = uint8_images(*shape)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(pixels).permute(0, 3, 1, 2).double(),
        size=(37, 37),
        mode="bilinear",
        align_corners=False,
    )
    found = resized("legacy_pytorch", pixels)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).numpy(), atol=2e-4)


@pytest.mark.parametrize("shape", SIZES)
def test_legacy_tensorflow_puts_pixels_at_their_corners(shape):
    pixels = uint8_images(*shape).astype(np.float64)
    found = resized("legacy_tensorflow", pixels.astype(np.uint8))
    for row, column in [(0, 0), (5, 17), (36, 36)]:
        y, x = row * shape[0] / 37, column * shape[1] / 37
        top, left = int(y), int(x)
        down, right = min(top + 1, shape[0] - 1), min(left + 1, shape[1] - 1)
        upper = pixels[:, top, left] * (1 - x + left) + pixels[:, top, right] * (
            x - left
        )
        lower = pixels[:, down, left] * (1 - x + left) + pixels[:, down, right] * (
            x - left
        )
        wanted = upper * (1 - y + top) + lower * (y - top)
        np.testing.assert_allclose(found[:, row, column], wanted, atol=2e-3)


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_the_right_size_stays_and_grey_is_repeated(mode):
    pixels = uint8_images(37, 37, channels=1)
    found = resized(mode, pixels)
    assert found.shape == (2, 37, 37, 3)
    np.testing.assert_allclose(found, np.repeat(pixels, 3, -1), atol=1e-4)


def test_rounding_is_by_choice_and_said():
    images = jnp.full((1, 4, 4, 3), 0.3)
    level = 0.3 * 127.5 + 127.5
    for round_uint8, wanted in ((True, 166.0), (False, level)):
        resizer = Resizer(mode="clean", size=4, round_uint8=round_uint8)
        np.testing.assert_allclose(resizer(images) * 128 + 128, wanted, rtol=1e-5)
    assert resizer.name == "clean resize, not rounded"
    assert Resizer(mode="clean", size=4, round_uint8=True).name.endswith("uint8")


def test_what_is_beyond_the_range_is_clipped():
    images = jnp.asarray([[-3.0, 3.0]]).reshape(1, 1, 2, 1)
    for round_uint8 in (True, False):
        resizer = Resizer(mode="legacy_pytorch", size=2, round_uint8=round_uint8)
        found = np.asarray(resizer(images))
        assert found.min() == -1.0 and found.max() == 1.0
