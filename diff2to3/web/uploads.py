"""Pictures that arrive over the network: decoded from memory, within limits, by few well-tested decoders."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from diff2to3.errors import InputError
from diff2to3.pipeline.cutout import MAX_REMOVAL_SIDE, shrunk
from diff2to3.pipeline.photo_files import MIN_SIDE, to_8_bit

#: What photos are: Pillow tries no other decoder on what a stranger sends.
DECODERS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
MAX_PIXELS = 50_000_000


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB or RGBA, turned as its EXIF says, at most 1024 pixels a side.

    Raises:
        InputError: not a picture, damaged, too small, or more than ``max_pixels``.
    """
    image = opened(data, max_pixels)
    if min(image.size) < MIN_SIDE:
        raise InputError(
            f"photo: {image.width} × {image.height} pixels are too few; at least {MIN_SIDE} a side"
        )
    try:
        image.draft("RGB", (MAX_REMOVAL_SIDE, MAX_REMOVAL_SIDE))
        image.load()
        return shrunk(to_8_bit(ImageOps.exif_transpose(image)), MAX_REMOVAL_SIDE)
    except Exception as error:  # decoders raise whatever the damage makes them meet
        raise damaged(error) from error


def decode_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """A mask of one channel (L) and of exactly this size; InputError otherwise."""
    image = opened(data, size[0] * size[1])
    if image.size != size:
        raise InputError(
            f"mask: expected {size[0]} × {size[1]} pixels, as the photo, got {image.width} × {image.height}"
        )
    try:
        return image.convert("L")
    except Exception as error:
        raise damaged(error) from error


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """The header, checked before any pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(io.BytesIO(data), formats=DECODERS)
    except Exception as error:
        raise damaged(error) from error
    if image.width * image.height > max_pixels:
        raise InputError(
            f"photo: {image.width} × {image.height} pixels are too many; at most {max_pixels:,} are taken"
        )
    return image


def damaged(error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "BytesIO" in reason:  # Pillow's word for data that no decoder knows
        reason = "PNG, JPEG, WebP, AVIF, BMP, GIF and TIFF are"
    return InputError(f"photo: not an image that can be read ({reason})")
