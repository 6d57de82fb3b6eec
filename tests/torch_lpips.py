"""LPIPS in PyTorch, compactly, with the names of the package ``lpips``."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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
