"""What the photo encoder reads: maps of a frozen image network at two scales, and the photo's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

#: The blocks of EfficientNet-Lite0 whose outputs are taken: the last at 1/8 and the last used at 1/16.
FINE_BLOCK, COARSE_BLOCK = 4, 10
#: A photo's side over that of its small RGBA.
SHRINK = 4


class MapNetwork(Protocol):
    """A frozen image network whose inner features can be had (EfficientNetLite)."""

    def outputs_of(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]: ...


def stacked_maps(
    network: MapNetwork, images: Tensor, alphas: Tensor, background: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Photos [V, S, S, 3] with straight alpha [V, S, S] → features [V, 40, S/8, S/8] and [V, 112, S/16, S/16] of the
    photos over a grey background, float32.
    """
    composed = images * alphas[..., None] + (1 - alphas[..., None]) * background
    fine, coarse = network.outputs_of(composed.permute(0, 3, 1, 2), (FINE_BLOCK, COARSE_BLOCK))
    return fine.float(), coarse.float()


def small_rgba(images: Tensor, alphas: Tensor) -> Tensor:
    """Photos [V, S, S, 3] with straight alpha [V, S, S] → premultiplied colour and alpha [V, 4, S/4, S/4]."""
    premultiplied = torch.cat([images * alphas[..., None], alphas[..., None]], -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(premultiplied, SHRINK)
