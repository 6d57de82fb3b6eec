"""FID's network and its features against PyTorch, with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from flax.serialization import msgpack_serialize
from meshes import mesh_of
from safetensors.numpy import save_file
from torch_inception import random_inception

from boot_jax.evaluation.features import FeatureError, get_features
from boot_jax.evaluation.frechet import feature_statistics, frechet_distance
from boot_jax.evaluation.inception import (
    CLASSES,
    POOLED,
    SPATIAL,
    InceptionV3,
    inception_params,
)
from boot_jax.evaluation.inception_features import InceptionFeatures
from boot_jax.evaluation.resizing import Resizer
from boot_jax.models.weights import WeightsError, read_tensors

SHAPE = (24, 20, 3)


@pytest.fixture(scope="module")
def model():
    return random_inception()


@pytest.fixture(scope="module")
def tensors(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Two small sets of smooth images, of which one is darker."""
    rng = np.random.default_rng(3)
    coarse = rng.uniform(-1, 1, (2, 4, 6, 5, 3))
    images = coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)
    return images[0], images[1] * 0.6 - 0.3


def witness(model, images: np.ndarray) -> dict[str, np.ndarray]:
    """As pytorch-fid does it: uint8, bilinear, ``2 x - 1``."""
    pixels = np.rint(images.astype(np.float64) * 127.5 + 127.5).clip(0, 255) / 255
    resized = torch.nn.functional.interpolate(
        torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2),
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    )
    with torch.no_grad():
        return {k: v.numpy() for k, v in model(2 * resized - 1).items()}


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert found.shape == wanted.shape and np.std(wanted) > 0.05
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.fixture(scope="module")
def described(weights, sets):
    extractor = InceptionFeatures.from_file(
        str(weights), image_shape=SHAPE, resize="legacy_pytorch", mesh=mesh_of(1)
    )
    return extractor, [extractor.describe(images) for images in sets]


@pytest.mark.slow
def test_features_and_fid_are_those_of_pytorch(model, sets, described):
    extractor, ours = described
    theirs = [witness(model, images) for images in sets]
    for found, wanted in zip(ours, theirs, strict=True):
        assert found.features.shape == (4, POOLED)
        assert found.spatial.shape == (4, SPATIAL)
        assert found.logits.shape == (4, CLASSES)
        assert_close(found.features, wanted["pooled"], 1e-4)
        assert_close(found.spatial, wanted["spatial"], 1e-4)
        assert_close(found.logits, wanted["logits"], 1e-4)
    a, b = (part["pooled"].astype(np.float64) for part in theirs)
    products = (a - a.mean(0)) @ (b - b.mean(0)).T / (len(a) - 1)
    spread = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    cross = 2 * scipy.linalg.svdvals(products).sum()
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + spread - cross
    statistics = [feature_statistics(part.features) for part in ours]
    assert frechet_distance(*statistics) == pytest.approx(wanted, rel=1e-3)
    assert extractor.distance_name == "FID"


def test_the_name_says_all_that_an_fid_depends_on(described):
    name = described[0].name
    assert "legacy_pytorch resize, uint8" in name and "pool3 2048" in name
    assert any(len(word.strip("(),")) == 12 for word in name.split())


def test_the_network_alone_is_that_of_pytorch_at_other_sizes(model, tensors):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        wanted = model(images)
    network = jax.jit(InceptionV3().apply)
    params = inception_params(tensors)
    found = network({"params": params}, images.permute(0, 2, 3, 1).numpy())
    for name, tensor in wanted.items():
        assert_close(np.asarray(getattr(found, name)), tensor.numpy(), 1e-4)


@pytest.mark.slow
def test_features_do_not_depend_on_batches_devices_or_order(weights, sets, described):
    images = np.concatenate(sets)[:7]
    expected = np.concatenate([part.features for part in described[1]])[:7]
    for count in (2, 8):
        extractor = InceptionFeatures.from_file(
            str(weights),
            image_shape=SHAPE,
            resize="legacy_pytorch",
            mesh=mesh_of(count),
        )
        order = np.random.default_rng(count).permutation(7)
        parts = [extractor.describe(images[order][:4]).features]
        parts.append(extractor.describe(images[order][4:]).features)
        assert_close(np.concatenate(parts), expected[order], 1e-5)


def test_grey_images_are_three_equal_channels(tensors):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 9, 9, 1)).astype(np.float32)
    resizer = Resizer(mode="clean", size=75, round_uint8=True)
    grey, colour = resizer(jnp.asarray(images)), resizer(jnp.repeat(images, 3, -1))
    np.testing.assert_array_equal(grey, colour)


# --- files


def test_weights_are_read_of_three_formats(tensors, weights, tmp_path):
    np.savez(tmp_path / "w.npz", **tensors)
    packed = msgpack_serialize(inception_params(tensors))
    (tmp_path / "w.msgpack").write_bytes(packed)
    wanted = inception_params(read_tensors(weights))
    for name in ("w.npz", "w.msgpack"):
        found = inception_params(read_tensors(tmp_path / name))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"a program")
    with pytest.raises(WeightsError, match=r"may be a pickle.*weights_only=True") as e:
        InceptionFeatures.from_file(str(path), image_shape=SHAPE)
    assert "pt_inception-2015-12-05-6726825d.safetensors" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_command_that_converts_a_pickle_works(model, tensors, tmp_path):
    """Run as it is printed, on a small pickle of PyTorch."""
    import subprocess
    import sys

    path = tmp_path / "small.pth"
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)}, path)
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    program = str(error.value).split('python -c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    found = read_tensors(path.with_suffix(".safetensors"))
    np.testing.assert_array_equal(found["a"], np.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize("path", ["", "nowhere/inception.safetensors"])
def test_missing_weights_are_named_with_where_to_get_them(path):
    options = {"weights": path, "resize": "clean", "round_uint8": True}
    with pytest.raises(FeatureError, match="mseitzer/pytorch-fid") as error:
        get_features("inception", SHAPE, options)
    text = str(error.value)
    assert "evaluation.features='pixels', whose distance is not an FID" in text
    assert "\n" not in text and (path or "evaluation.weights is empty") in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AuxLogits.fc.weight": np.zeros(2, np.float32)}, "torchvision's Inception"),
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, r"fc.weight is \(1000,"),
        ({"other": np.zeros(2, np.float32)}, "unexpected: other"),
    ],
)
def test_other_networks_are_refused(tensors, change, message):
    with pytest.raises(WeightsError, match=message):
        inception_params(tensors | change)


def test_damaged_and_unknown_files_are_refused(tmp_path):
    for name in ("a.npz", "a.safetensors", "a.msgpack"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
        with pytest.raises(WeightsError, match="cannot be read as"):
            read_tensors(tmp_path / name)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"should be a \.safetensors, .npz or"):
        read_tensors(tmp_path / "a.h5")


def test_images_of_other_shapes_are_refused(described, weights):
    with pytest.raises(ValueError, match=r"images \[24, 20, 3\]"):
        described[0].describe(np.zeros((1, 24, 24, 3), np.float32))
    with pytest.raises(FeatureError, match="1 or 3 channels, but these have 4"):
        InceptionFeatures.from_file(str(weights), image_shape=(8, 8, 4))
