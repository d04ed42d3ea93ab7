"""Photos as people have them, made into the square picture of one object that the models were trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.flow.framing import Framing, frame
from diff2to3.pipeline.cutout import CutOut, cut_out, shrunk

MAX_PIXELS = 100_000_000
MIN_SIDE = 8
#: Photos are shrunk to this side when they are opened.
MAX_SIDE = 4096
#: Formats whose further frames are an animation, rather than pages, thumbnails or depth maps.
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")
#: A pixel belongs to the object above this alpha (of 255).
SOLID_ALPHA = 0.8 * 255
#: The crop's side over the longer side of the object's box, in TRELLIS.
CROP_MARGIN = 1.2

#: A cut-out (RGBA) to the condition picture [3, size, size] in [0, 1].
Framer = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Photo:
    """A photo that is ready for a model: ``picture`` [3, size, size] in [0, 1], how its background was removed, and
    what looks wrong with it.
    """

    picture: Tensor
    method: str = "none"
    notes: tuple[str, ...] = ()

    def mirrored(self) -> Photo:
        """Left and right exchanged: what a mirrored object looks like to a mirrored camera."""
        return replace(self, picture=self.picture.flip(-1))


def prepare(image: Image.Image, framer: Framer, method: str = "auto", *, offline: bool = False) -> Photo:
    """Cut the object out (:func:`diff2to3.pipeline.cutout.cut_out`) and frame it.

    Raises:
        InputError: there is no object to be seen.
        MissingDependencyError: rembg was asked for and is not installed.
    """
    found: CutOut = cut_out(to_8_bit(image), method, offline=offline)
    return Photo(framer(found.image), found.method, found.notes)


# ---- reading ----


def open_photo(path: str | Path) -> Image.Image:
    """Decode an image file that Pillow reads: RGBA if it has transparency, else RGB; turned as its EXIF says;
    shrunk to at most 4096 pixels a side.

    Raises:
        InputError: no such file, not an image, damaged, an animation, too small, or more than 100 million pixels.
    """
    with opened(path) as image:
        try:
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # decodes large JPEGs at a fraction of their size
            image.load()
            # a palette has no colours between its own, so shrinking comes after the conversion
            return shrunk(to_8_bit(ImageOps.exif_transpose(image)), MAX_SIDE)
        except Exception as error:  # decoders raise whatever the damage makes them meet
            raise unreadable(Path(path), error) from error


def check_photo(path: str | Path) -> None:
    """What can be told without decoding the pixels; InputError as :func:`open_photo`."""
    opened(path).close()


def opened(path: str | Path) -> Image.Image:
    """The file's header, checked."""
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below says it better
            image = Image.open(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: has too many pixels; at most 10⁸ can be read, shrink it first") from error
    except Exception as error:
        raise unreadable(path, error) from error
    problem = ""
    if image.width * image.height > MAX_PIXELS:
        problem = (
            f"{image.width} × {image.height} pixels are too many; at most 10⁸ can be read, shrink it first"
        )
    elif min(image.size) < MIN_SIDE:
        problem = f"{image.width} × {image.height} pixels are too few; at least {MIN_SIDE} a side"
    elif image.format in ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1:
        problem = "an animation, not a photo; save one of its frames as a picture"
    if problem:
        image.close()
        raise InputError(f"{path}: {problem}")
    return image


def unreadable(path: Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: not an image that can be read ({reason})")


def to_8_bit(image: Image.Image) -> Image.Image:
    """RGB or RGBA, 8 bits a channel."""
    if image.mode in ("RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        scaled = np.clip(np.nan_to_num(values.astype(np.float32)) * (255 / top) + 0.5, 0, 255)
        image = Image.fromarray(scaled.astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


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
        raise InputError("image: no object: nothing in it is more than 80 % opaque")
    if max(rows[-1] - rows[0], columns[-1] - columns[0]) < 2:
        raise InputError("image: the object is smaller than three pixels")
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def as_it_is(image: Image.Image, size: int, background: float) -> Tensor:
    """A picture that is framed already: only resized, and laid over the background where it is transparent."""
    rgba = np.array(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    pixels = rgba[:, :, :3] * rgba[:, :, 3:] + background * (1 - rgba[:, :, 3:])
    return torch.from_numpy(pixels).permute(2, 0, 1)
