"""LPIPS (Zhang et al. 2018), version 0.1: a learnt distance between images, in the features of VGG-16 or AlexNet.

The published package (``lpips``) has had no release since 2021, needs torchvision and downloads its backbone by
itself; this is the same computation on weights from one safetensors file, made by
``eval/convert_weights.py lpips``:

    net.N.weight, net.N.bias     the backbone's convolutions, by their index in torchvision's ``features``
    lin.K.weight                 [1, C, 1, 1] >= 0, one for each of the five layers compared

Widths are those of the file, so a tiny one runs through the same code.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.metrics.image import check_pair
from diff2to3.metrics.weights import WeightsRecord, read_safetensors, record

#: Each network as torchvision numbers it: (index, kind, padding, stride) and, by "compare", where LPIPS looks.
_VGG = (
    (0, 2, "tap", "pool"),
    (5, 7, "tap", "pool"),
    (10, 12, 14, "tap", "pool"),
    (17, 19, 21, "tap", "pool"),
)
LAYERS: dict[str, tuple[str | tuple[int, int, int], ...]] = {
    "vgg": (
        *((i, 1, 1) if isinstance(i, int) else i for group in _VGG for i in group),
        *((24, 1, 1), (26, 1, 1), (28, 1, 1), "tap"),
    ),
    "alex": (
        *((0, 2, 4), "tap", "pool3", (3, 2, 1), "tap", "pool3"),
        *((6, 1, 1), "tap", (8, 1, 1), "tap", (10, 1, 1), "tap"),
    ),
}
ADVICE = (
    "make it with: python eval/convert_weights.py lpips --net vgg BACKBONE.pth LINEAR.pth OUT.safetensors"
)
#: Mean and deviation of the inputs, in the published code's own rounding, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """``Lpips.load(path)(images, targets)``: distances [V] of images [V, H, W, 3] in [0, 1]; differentiable.

    net  "vgg" (what TRELLIS trains with and, here, the paper's rows are compared with) or "alex"
    """

    record: WeightsRecord | None = None

    def __init__(self, weights: dict[str, Tensor], net: str = "vgg") -> None:
        super().__init__()
        if net not in LAYERS:
            raise InputError(f"net: expected one of {', '.join(LAYERS)}, got {net!r}")
        self.net = net
        taps = sum(layer == "tap" for layer in LAYERS[net])
        convolutions = [layer[0] for layer in LAYERS[net] if not isinstance(layer, str)]
        needed = {f"net.{i}.{part}" for i in convolutions for part in ("weight", "bias")}
        needed |= {f"lin.{k}.weight" for k in range(taps)}
        if missing := sorted(needed - set(weights)):
            raise InputError(
                f"lpips: the weights for {net} lack {missing[0]} ({len(missing)} in all); {ADVICE}"
            )
        for name in sorted(needed):
            self.register_buffer(name.replace(".", "_"), weights[name].float(), persistent=False)

    @classmethod
    def load(cls, path: str | Path, net: str = "vgg", device: torch.device | str = "cpu") -> Lpips:
        """From a safetensors file; InputError in one line where it is missing or does not fit."""
        made = cls(read_safetensors(path, "lpips", ADVICE), net).to(device)
        made.record = record(f"lpips-{net}", str(path), Path(path).expanduser(), "torch")
        return made

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances [V]; 0 for equal images."""
        check_pair(images, targets)
        distance = images.new_zeros(len(images))
        taps = zip(self.features(images), self.features(targets), strict=True)
        for k, (x, y) in enumerate(taps):
            difference = (_unit(x) - _unit(y)).square()
            distance = distance + F.conv2d(difference, getattr(self, f"lin_{k}_weight")).mean((1, 2, 3))
        return distance

    def features(self, images: Tensor) -> list[Tensor]:
        """The compared feature maps [V, C, h, w] of images [V, H, W, 3] in [0, 1]."""
        shift, scale = images.new_tensor(SHIFT), images.new_tensor(SCALE)
        x = ((2 * images - 1 - shift) / scale).permute(0, 3, 1, 2)
        taps = []
        for layer in LAYERS[self.net]:
            if layer == "tap":
                taps.append(x)
            elif isinstance(layer, str):
                x = F.max_pool2d(x, 3, 2) if layer == "pool3" else F.max_pool2d(x, 2, 2)
            else:
                index, padding, stride = layer
                weight, bias = getattr(self, f"net_{index}_weight"), getattr(self, f"net_{index}_bias")
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        return taps


def _unit(x: Tensor) -> Tensor:
    """Features of length 1 in each pixel; the published code's epsilon, outside the root."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
