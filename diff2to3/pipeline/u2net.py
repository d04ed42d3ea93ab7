"""U²-Net-p, the small salient-object network: which pixels of a photo are its subject.

    image [B, 3, 320, 320] ──▶ 6 encoder stages, halved in between ──▶ 5 decoder stages ──▶ saliency [B, 1, 320, 320]

After Qin et al., "U²-Net: Going Deeper with Nested U-Structure for Salient Object Detection" (2020): every stage is a
small U-Net itself. The published weights (Apache-2.0) are in bundles/u2netp, with batch normalisation folded into the
convolutions.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diff2to3.checkpoint import load_strictly
from diff2to3.tensors import read_tensors

#: Where the weights are.
FOLDER = Path(__file__).resolve().parents[1] / "bundles" / "u2netp"
#: Pixels a side that the network was trained on.
SIDE = 320
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH, INNER = 64, 16
#: Levels of each stage's own U; 0: four levels without pooling, dilated instead.
ENCODER, DECODER = (7, 6, 5, 4, 0, 0), (0, 4, 5, 6, 7)


class Stage(nn.Module):
    """A U-Net of ``levels`` [B, in_width, h, w] → [B, 64, h, w], added to its first convolution's output.

    Convolutions stand in the order in which they run: the first, the way down, the bottom, the way up.
    """

    def __init__(self, in_width: int, levels: int) -> None:
        super().__init__()
        self.pools = levels > 0
        depth = levels or 4
        down = [1] * (depth - 1) + [2] if self.pools else [1, 2, 4, 8]
        up = [1] * (depth - 1) if self.pools else [4, 2, 1]
        widths = [(in_width, WIDTH, 1), (WIDTH, INNER, down[0])]
        widths += [(INNER, INNER, dilation) for dilation in down[1:]]
        widths += [(2 * INNER, INNER, dilation) for dilation in up[:-1]] + [(2 * INNER, WIDTH, up[-1])]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=d, dilation=d) for a, b, d in widths)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.convs[0](x).relu()
        seen: list[Tensor] = []
        for i in range(1, self.depth + 1):
            if self.pools and 1 < i < self.depth:
                x = halved(x)
            x = self.convs[i](x).relu()
            seen.append(x)
        for conv, beside in zip(self.convs[self.depth + 1 :], seen[-2::-1], strict=True):
            x = conv(torch.cat([like(x, beside), beside], 1)).relu()
        return x + first


class U2NetP(nn.Module):
    """[B, 3, H, W], normalised by :data:`MEAN` and :data:`STD` → saliency [B, 1, H, W] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Stage(WIDTH if i else 3, n) for i, n in enumerate(ENCODER))
        self.decoder = nn.ModuleList(Stage(2 * WIDTH, n) for n in DECODER)
        self.sides = nn.ModuleList(nn.Conv2d(WIDTH, 1, 3, padding=1) for _ in ENCODER)
        self.join = nn.Conv2d(len(ENCODER), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for i, stage in enumerate(self.encoder):
            x = stage(halved(x) if i else x)
            seen.append(x)
        outs = [x]
        for stage, beside in zip(self.decoder, seen[-2::-1], strict=True):
            x = stage(torch.cat([like(x, beside), beside], 1))
            outs.append(x)
        maps = [side(out) for side, out in zip(self.sides, reversed(outs), strict=True)]
        return self.join(torch.cat([like(m, maps[0]) for m in maps], 1)).sigmoid()


def halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` enlarged to the other's height and width."""
    if x.shape[2:] == other.shape[2:]:
        return x
    return F.interpolate(x, other.shape[2:], mode="bilinear", align_corners=False)


@lru_cache(maxsize=1)
def network() -> U2NetP:
    """With the package's weights."""
    path = FOLDER / "u2netp.safetensors"
    net = U2NetP()
    load_strictly(net, {name: value.float() for name, value in read_tensors(path).items()}, path)
    return net.eval().requires_grad_(False)


def saliency(image: Image.Image) -> np.ndarray:
    """Of a photo (RGB), at the network's size: float32 [320, 320] in [0, 1], 1 at its most salient."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(small, np.float32))
    pixels = pixels / pixels.max().clamp_min(1)
    normal = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.inference_mode():
        found = network()(normal.permute(2, 0, 1)[None])[0, 0].numpy()
    return np.asarray((found - found.min()) / max(float(found.max() - found.min()), 1e-6))
