"""LPIPS against a compact PyTorch version with the names of the package ``lpips``."""

import numpy as np
import pytest
import torch
from meshes import mesh_of
from safetensors.numpy import save_file
from torch_lpips import TorchLpips

from boot_jax.evaluation.features import FeatureError
from boot_jax.evaluation.lpips import Lpips
from boot_jax.models.weights import WeightsError


@pytest.fixture(scope="module", params=["alex", "vgg"])
def both(request, tmp_path_factory):
    theirs = TorchLpips(request.param)
    path = tmp_path_factory.mktemp("lpips") / f"{request.param}.safetensors"
    save_file(theirs.state_dict(), path)
    return request.param, theirs, path


def random_pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, *shape)).astype(np.float32)
    return a, (0.7 * a + 0.3 * b).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "devices"), [((3, 40, 35, 3), 1), ((3, 33, 33, 1), 2)]
)
def test_distances_are_those_of_pytorch(both, shape, devices):
    network, theirs, path = both
    a, b = random_pair(*shape)
    colours = (np.broadcast_to(x, (*shape[:3], 3)).copy() for x in (a, b))
    wanted = theirs(*(torch.tensor(x).permute(0, 3, 1, 2) for x in colours)).numpy()
    ours = Lpips.from_file(str(path), mesh_of(devices))
    assert ours.network == network and ours.name.startswith(f"LPIPS {network} (weig")
    assert wanted.min() > 1e-3
    np.testing.assert_allclose(ours(a, b), wanted, rtol=1e-4)
    np.testing.assert_allclose(ours(b, a), wanted, rtol=1e-4)
    np.testing.assert_allclose(ours(a, a), 0.0, atol=1e-12)


def test_small_images_are_refused_and_the_least_are_not(both):
    network, theirs, path = both
    least = {"alex": 31, "vgg": 16}[network]
    ours = Lpips.from_file(str(path), mesh_of(1))
    a, b = random_pair(1, least, least, 3)
    wanted = theirs(*(torch.tensor(x).permute(0, 3, 1, 2) for x in (a, b))).numpy()
    np.testing.assert_allclose(ours(a, b), wanted, rtol=1e-4)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        theirs(*(torch.zeros(1, 3, least - 1, least) for _ in range(2)))
    with pytest.raises(FeatureError, match=f"needs images of {least} pixels"):
        ours(a[:, 1:], b[:, 1:])
    with pytest.raises(FeatureError, match="grey or RGB images, but these have 4"):
        ours.check((64, 64, 4))


def test_other_weights_are_refused(both, tmp_path):
    _, theirs, _ = both
    tensors = theirs.state_dict()
    del tensors["lin3.model.1.weight"], tensors["lins.3.model.1.weight"]
    path = tmp_path / "part.safetensors"
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"lpips_weights: .* missing: lin3\.weight"):
        Lpips.from_file(str(path))
    with pytest.raises(FeatureError, match=r"there is no file .*package lpips"):
        Lpips.from_file(str(tmp_path / "none.safetensors"))
