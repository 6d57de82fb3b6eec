"""FID's InceptionV3 in PyTorch, compactly: the witness of the one in Flax.

Written from the paper's figures and the quirks that pytorch-fid documents, with the
names of its file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Unit(nn.Module):
    def __init__(self, inputs, outputs, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Branches(nn.Module):
    """Chains of units by name; ``paths`` says which follow which, on what pooling."""

    def __init__(self, units, paths):
        super().__init__()
        for name, arguments in units.items():
            self.add_module(name, Unit(*arguments))
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            y = x
            for step in path:
                if callable(step):
                    y = step(y)
                elif isinstance(step, tuple):
                    y = torch.cat([getattr(self, name)(y) for name in step], 1)
                else:
                    y = getattr(self, step)(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


def a(inputs, pool):
    return Branches(
        {
            "branch1x1": (inputs, 64),
            "branch5x5_1": (inputs, 48),
            "branch5x5_2": (48, 64, 5, 1, 2),
            "branch3x3dbl_1": (inputs, 64),
            "branch3x3dbl_2": (64, 96, 3, 1, 1),
            "branch3x3dbl_3": (96, 96, 3, 1, 1),
            "branch_pool": (inputs, pool),
        },
        [
            ["branch1x1"],
            ["branch5x5_1", "branch5x5_2"],
            ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
            [mean_pool, "branch_pool"],
        ],
    )


def b(inputs):
    return Branches(
        {
            "branch3x3": (inputs, 384, 3, 2),
            "branch3x3dbl_1": (inputs, 64),
            "branch3x3dbl_2": (64, 96, 3, 1, 1),
            "branch3x3dbl_3": (96, 96, 3, 2),
        },
        [
            ["branch3x3"],
            ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
            [lambda x: F.max_pool2d(x, 3, 2)],
        ],
    )


def c(inputs, inner):
    wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return Branches(
        {
            "branch1x1": (inputs, 192),
            "branch7x7_1": (inputs, inner),
            "branch7x7_2": (inner, inner, *wide),
            "branch7x7_3": (inner, 192, *tall),
            "branch7x7dbl_1": (inputs, inner),
            "branch7x7dbl_2": (inner, inner, *tall),
            "branch7x7dbl_3": (inner, inner, *wide),
            "branch7x7dbl_4": (inner, inner, *tall),
            "branch7x7dbl_5": (inner, 192, *wide),
            "branch_pool": (inputs, 192),
        },
        [
            ["branch1x1"],
            ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
            [f"branch7x7dbl_{i}" for i in range(1, 6)],
            [mean_pool, "branch_pool"],
        ],
    )


def d(inputs):
    return Branches(
        {
            "branch3x3_1": (inputs, 192),
            "branch3x3_2": (192, 320, 3, 2),
            "branch7x7x3_1": (inputs, 192),
            "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
            "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)),
            "branch7x7x3_4": (192, 192, 3, 2),
        },
        [
            ["branch3x3_1", "branch3x3_2"],
            [f"branch7x7x3_{i}" for i in range(1, 5)],
            [lambda x: F.max_pool2d(x, 3, 2)],
        ],
    )


def e(inputs, pool):
    wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return Branches(
        {
            "branch1x1": (inputs, 320),
            "branch3x3_1": (inputs, 384),
            "branch3x3_2a": (384, 384, *wide),
            "branch3x3_2b": (384, 384, *tall),
            "branch3x3dbl_1": (inputs, 448),
            "branch3x3dbl_2": (448, 384, 3, 1, 1),
            "branch3x3dbl_3a": (384, 384, *wide),
            "branch3x3dbl_3b": (384, 384, *tall),
            "branch_pool": (inputs, 192),
        },
        [
            ["branch1x1"],
            ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
            [
                "branch3x3dbl_1",
                "branch3x3dbl_2",
                ("branch3x3dbl_3a", "branch3x3dbl_3b"),
            ],
            [pool, "branch_pool"],
        ],
    )


class TorchInception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Unit(64, 80)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = a(192, 32), a(256, 64), a(288, 64)
        self.Mixed_6a = b(288)
        self.Mixed_6b, self.Mixed_6c = c(768, 128), c(768, 160)
        self.Mixed_6d, self.Mixed_6e = c(768, 160), c(768, 192)
        self.Mixed_7a = d(768)
        self.Mixed_7b = e(1280, mean_pool)
        self.Mixed_7c = e(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``x [N, 3, H, W]``, normalised; spatial features are in NHWC order."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pooled = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        logits = F.linear(pooled, self.fc.weight)
        return {"pooled": pooled, "spatial": spatial, "logits": logits}


def random_inception(seed: int = 0) -> TorchInception:
    """Random weights that keep the activations alive through all blocks."""
    torch.manual_seed(seed)
    model = TorchInception().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.6, 1.2)
            module.bias.normal_(0.0, 0.1)
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.6, 1.4)
    return model
