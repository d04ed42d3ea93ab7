"""Photos as people have them, made into the square picture of one object that the models were trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.flow.framing import Framing, frame
from diff2to3.pipeline.cutout import EMPTY, CutOut, cut_out
from diff2to3.pipeline.photo_files import to_8_bit

#: A pixel belongs to the object above this alpha (of 255).
SOLID_ALPHA = 0.8 * 255
#: A pixel up to this alpha shows nothing.
FAINT_ALPHA = 0.05 * 255
#: The crop's side over the longer side of the object's box, in TRELLIS.
CROP_MARGIN = 1.2

#: A cut-out (RGBA) to the condition picture [3, size, size] in [0, 1].
Framer = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Photo:
    """A photo that is ready for a model: ``picture`` [3, size, size] in [0, 1], how its background was removed, what
    looks wrong with it, and the object on transparency (RGBA) before it was framed.
    """

    picture: Tensor
    method: str = "none"
    notes: tuple[str, ...] = ()
    cut_out: Image.Image | None = None


def prepare(image: Image.Image, framer: Framer, method: str = "auto", *, offline: bool = False) -> Photo:
    """Cut the object out (:func:`diff2to3.pipeline.cutout.cut_out`) and frame it.

    Raises:
        InputError: there is no object to be seen.
        MissingDependencyError: rembg was asked for and is not installed.
    """
    found: CutOut = cut_out(to_8_bit(image), method, offline=offline)
    solid = made_solid(found.image)
    return Photo(framer(solid), found.method, found.notes, solid)


def made_solid(image: Image.Image) -> Image.Image:
    """An object that is nowhere solid, such as glass, with alpha raised until its most opaque tenth is: the models know
    no others. Any other picture (RGBA) as it is.
    """
    alpha = np.asarray(image)[:, :, 3]
    seen = alpha[alpha > FAINT_ALPHA]
    if not len(seen) or float((alpha > SOLID_ALPHA).mean()) >= EMPTY:
        return image
    top = float(np.quantile(seen, 0.9))
    raised = np.clip(alpha * (255 / top) + 0.5, 0, 255).astype(np.uint8)
    return Image.merge("RGBA", (*image.split()[:3], Image.fromarray(raised)))


# ---- framing ----


def frame_cut_out(image: Image.Image, framing: Framing) -> Tensor:
    """As our models are trained (:func:`diff2to3.flow.framing.frame`)."""
    check_object(np.asarray(image)[:, :, 3])
    pixels = torch.from_numpy(np.array(image, np.float32)) / 255
    return frame(pixels[:, :, :3], pixels[:, :, 3], framing)


def frame_like_trellis(image: Image.Image, size: int) -> Tensor:
    """As TRELLIS prepares its input: centred in 1.2 times its box, resized, premultiplied on black, rounded down to
    bytes.
    """
    left, top, right, bottom = check_object(np.asarray(image)[:, :, 3])
    half = max(int(max(right - left, bottom - top) * CROP_MARGIN) // 2, 1)
    x, y = (left + right) / 2, (top + bottom) / 2
    cropped = image.crop((x - half, y - half, x + half, y + half))
    pixels = np.asarray(cropped.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    premultiplied = (pixels[:, :, :3] * pixels[:, :, 3:] * 255).astype(np.uint8)
    return torch.from_numpy(premultiplied).permute(2, 0, 1).float() / 255


def check_object(alpha: np.ndarray) -> tuple[int, int, int, int]:
    """Inclusive bounds (left, top, right, bottom) of what is solid in uint8 [H, W]; InputError if nothing is."""
    solid = alpha > SOLID_ALPHA
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if not len(rows):
        raise InputError("image: no object: all of it is transparent")
    if max(rows[-1] - rows[0], columns[-1] - columns[0]) < 2:
        raise InputError("image: the object is smaller than three pixels")
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def as_it_is(image: Image.Image, size: int, background: float) -> Tensor:
    """A picture that is framed already: only resized, and laid over the background where it is transparent."""
    rgba = np.array(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    pixels = rgba[:, :, :3] * rgba[:, :, 3:] + background * (1 - rgba[:, :, 3:])
    return torch.from_numpy(pixels).permute(2, 0, 1)
