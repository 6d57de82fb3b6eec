"""LPIPS against a compact PyTorch version with the names of the package ``lpips``."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from meshes import mesh_of
from safetensors.numpy import save_file
from torch import nn

from boot_jax.evaluation.features import FeatureError
from boot_jax.evaluation.lpips import Lpips
from boot_jax.models.weights import WeightsError

# torchvision's ``features``, and those behind whose last the activations are tapped.
VGG = "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512"
SLICES = {"vgg": (4, 9, 16, 23, 30), "alex": (2, 5, 8, 10, 12)}


def features(network: str) -> list[nn.Module]:
    if network == "vgg":
        layers, inputs = [], 3
        for width in VGG.split():
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(inputs, int(width), 3, padding=1), nn.ReLU()]
                inputs = int(width)
        return layers
    return [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


class TorchLpips:
    def __init__(self, network: str):
        torch.manual_seed(0)
        self.layers, self.ends = features(network), SLICES[network]
        widths, width = [], 0
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=0.1)
                width = layer.out_channels
            if index + 1 in self.ends:
                widths.append(width)
        self.lins = [torch.rand(1, width, 1, 1) for width in widths]

    def state_dict(self) -> dict[str, np.ndarray]:
        tensors = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
        starts = (0, *self.ends)
        for number, (start, end) in enumerate(zip(starts, self.ends, strict=False)):
            for index in range(start, end):
                for name, tensor in self.layers[index].state_dict().items():
                    tensors[f"net.slice{number + 1}.{index}.{name}"] = tensor
        for number, weight in enumerate(self.lins):
            tensors[f"lin{number}.model.1.weight"] = weight
            tensors[f"lins.{number}.model.1.weight"] = weight
        return {k: v.numpy().copy() for k, v in tensors.items()}

    @torch.no_grad()
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
        a, b = ((x - shift) / scale for x in (a, b))
        total = torch.zeros(len(a))
        lins = iter(self.lins)
        for index, layer in enumerate(self.layers):
            a, b = layer(a), layer(b)
            if index + 1 in self.ends:
                difference = F.normalize(a, eps=1e-10) - F.normalize(b, eps=1e-10)
                total += (difference**2 * next(lins)).sum(1).mean((1, 2))
        return total


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
