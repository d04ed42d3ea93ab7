"""How a cut-out object is laid into the square condition picture: one function for training and generation.

A photo says nothing of how far the camera was, so neither may the pictures that the generator learns from:
both are cropped to the object's box in the picture, with the same margin, over the same background. (TRELLIS
crops its training views so, too.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels at least this opaque say where the object is.
SOLID_ALPHA = 0.8


@dataclass(frozen=True)
class Framing:
    """The condition picture.

    size        pixels a side
    margin      side of the picture over the longer side of the object's box
    background  grey level behind the object, sRGB-encoded
    """

    size: int = 256
    margin: float = 1.2
    background: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected a positive number, got {self.size}")
        if not 1 <= self.margin <= 16:
            raise ValueError(f"margin: expected a number from 1 to 16, got {self.margin}")
        if not 0 <= self.background <= 1:
            raise ValueError(f"background: expected a grey level from 0 to 1, got {self.background}")


def object_box(alpha: Tensor) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) in pixel edges of what is solid in alpha [H, W]; None where nothing is."""
    solid = alpha >= SOLID_ALPHA
    rows, columns = solid.any(1).nonzero()[:, 0], solid.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def frame(image: Tensor, alpha: Tensor, framing: Framing) -> Tensor:
    """sRGB [H, W, 3] with straight alpha [H, W], both in [0, 1] -> [3, size, size] over the background.

    Resized with premultiplied alpha (triangle filter, widened when shrinking). A picture in which nothing is
    solid becomes plain background.
    """
    square, size = crop_square(image, alpha, framing.margin), framing.size
    if square is None:
        return image.new_full((3, size, size), framing.background)
    small = resized(square[None], size)[0]
    return (small[:3] + (1 - small[3:]) * framing.background).clamp(0, 1)


def crop_square(image: Tensor, alpha: Tensor, margin: float) -> Tensor | None:
    """sRGB [H, W, 3] with straight alpha [H, W] -> premultiplied colour and alpha [4, side, side] of the square around
    the object's box, ``margin`` times its longer side; transparent outside the picture. None where nothing is solid.
    """
    box = object_box(alpha)
    if box is None:
        return None
    left, top, right, bottom = box
    side = max(round(max(right - left, bottom - top) * margin), 1)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    height, width = alpha.shape
    premultiplied = torch.cat([image * alpha[..., None], alpha[..., None]], -1).permute(2, 0, 1)
    kept = premultiplied[:, max(y, 0) : y + side, max(x, 0) : x + side]
    return F.pad(kept, (max(-x, 0), max(x + side - width, 0), max(-y, 0), max(y + side - height, 0)))


def resized(pictures: Tensor, size: int) -> Tensor:
    """[V, C, H, W] -> [V, C, size, size] (triangle filter, widened when shrinking)."""
    return F.interpolate(pictures, (size, size), mode="bilinear", align_corners=False, antialias=True)


def frame_views(images: Tensor, alphas: Tensor, framing: Framing) -> Tensor:
    """Views [V, H, W, 3] with alphas [V, H, W] -> [V, 3, size, size]."""
    return torch.stack([frame(i, a, framing) for i, a in zip(images, alphas, strict=True)])
