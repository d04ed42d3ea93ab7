"""The Inception-v3 of FID: its pooled features, straight from a state dict.

The network is that of the 2015 TensorFlow graph, as its PyTorch ports name it (torchvision's names; published
as ``pt_inception-2015-12-05-6726825d.pth``). It differs from torchvision's in its average pools, which leave
padding out, and in the last block, which pools by maximum. Widths are those of the weights, so a narrow one runs
through the same code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError

FIRST, LAST = "Conv2d_1a_3x3", "Mixed_7c.branch_pool"
#: Convolutions of stride 1 that do not pad; all others of stride 1 keep the size.
UNPADDED = ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
EPSILON = 1e-3  # of its batch normalisation
SIDE = 299


class InceptionV3(nn.Module):
    """Images [N, 3, 299, 299] in [-1, 1] → pooled features [N, 2048]."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name in (FIRST, LAST):
            if f"{name}.conv.weight" not in weights:
                raise InputError(f"inception: the weights lack {name}.conv.weight: not FID's Inception-v3")
        self.names: dict[str, str] = {}
        for name, value in weights.items():
            if name.split(".")[0].startswith(("Conv2d", "Mixed")) and value.is_floating_point():
                self.names[name] = name.replace(".", "_")
                self.register_buffer(self.names[name], value.float(), persistent=False)

    def _get(self, name: str) -> Tensor:
        if name not in self.names:
            raise InputError(f"inception: the weights lack {name}: not FID's Inception-v3")
        return self.get_buffer(self.names[name])

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """Convolution, batch normalisation, ReLU; the shape is that of the weights."""
        weight = self._get(f"{name}.conv.weight")
        same = stride == 1 and name not in UNPADDED
        x = F.conv2d(x, weight, None, stride, tuple(k // 2 for k in weight.shape[2:]) if same else 0)
        mean, var, scale, bias = (
            self._get(f"{name}.bn.{part}") for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, scale, bias, eps=EPSILON))

    def chain(self, x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = self.conv(x, f"{block}.{name}")
        return x

    def branches(self, x: Tensor, block: str, *branches: tuple[str, ...], pool: str = "avg") -> Tensor:
        """Chains of convolutions and a pooled one, side by side."""
        parts = [self.chain(x, block, *branch) for branch in branches]
        return torch.cat([*parts, self.conv(_pool(x, pool), f"{block}.branch_pool")], 1)

    def reduction(self, x: Tensor, block: str, *branches: tuple[str, ...]) -> Tensor:
        """Chains whose last convolution halves the grid, and a maximum pool."""
        parts = [
            self.conv(self.chain(x, block, *branch[:-1]), f"{block}.{branch[-1]}", 2) for branch in branches
        ]
        return torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)

    def expanded(self, x: Tensor, block: str, pool: str) -> Tensor:
        """The last blocks: their 3x3 convolutions split into 1x3 beside 3x1."""
        middle = self.conv(x, f"{block}.branch3x3_1")
        double = self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        parts = [
            self.conv(x, f"{block}.branch1x1"),
            *(self.conv(middle, f"{block}.branch3x3_2{part}") for part in "ab"),
            *(self.conv(double, f"{block}.branch3x3dbl_3{part}") for part in "ab"),
            self.conv(_pool(x, pool), f"{block}.branch_pool"),
        ]
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x, FIRST, 2)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3")
        x = self.conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3"), 3, 2)
        double: tuple[str, ...] = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.branches(x, block, ("branch1x1",), ("branch5x5_1", "branch5x5_2"), double)
        x = self.reduction(x, "Mixed_6a", ("branch3x3",), double)
        seven: tuple[str, ...] = tuple(f"branch7x7_{i}" for i in (1, 2, 3))
        double = tuple(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.branches(x, block, ("branch1x1",), seven, double)
        seven = tuple(f"branch7x7x3_{i}" for i in (1, 2, 3, 4))
        x = self.reduction(x, "Mixed_7a", ("branch3x3_1", "branch3x3_2"), seven)
        x = self.expanded(x, "Mixed_7b", "avg")
        x = self.expanded(x, "Mixed_7c", "max")
        return x.mean((2, 3))


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == "max":
        return F.max_pool2d(x, 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
