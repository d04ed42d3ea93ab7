"""Photos as people have them, made into the square picture of one object on black that the models were
trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diff2to3.errors import InputError, MissingDependencyError

MAX_PIXELS = 100_000_000
#: A pixel belongs to the object above this alpha (of 255).
SOLID_ALPHA = 0.8 * 255
#: The crop's side over the longer side of the object's box.
CROP_MARGIN = 1.2
#: Longest side of a photo that goes into background removal.
MAX_REMOVAL_SIDE = 1024


def open_photo(path: str | Path) -> Image.Image:
    """Decode an image file that Pillow reads: RGBA if it has transparency, else RGB; turned as its EXIF says.

    Raises:
        InputError: no such file, not an image, damaged, or more than 100 million pixels.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path}: {image.width} × {image.height} pixels are too many; at most 10⁸")
            image.load()
            return to_8_bit(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # decoders raise whatever the damage makes them meet
        raise InputError(f"{path}: not an image that can be read ({error})") from error


def to_8_bit(image: Image.Image) -> Image.Image:
    """RGB or RGBA, 8 bits a channel."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def prepare_photo(image: Image.Image, size: int = 518) -> Image.Image:
    """As TRELLIS prepares its input: the object cut out, centred in 1.2 times its box, resized,
    premultiplied on black.

    Transparency says what the object is; an opaque image goes through background removal (rembg).

    Raises:
        InputError: nothing in the image is opaque, or the object is a single pixel.
        MissingDependencyError: an opaque image, and rembg is not installed.
    """
    cut_out = image if has_transparency(image) else remove_background(image)
    alpha = np.asarray(cut_out)[:, :, 3]
    rows, columns = np.nonzero(alpha > SOLID_ALPHA)
    if not len(rows):
        raise InputError("image: no object: nothing in it is more than 80 % opaque")
    left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
    half = int(max(right - left, bottom - top) * CROP_MARGIN) // 2
    if half < 1:
        raise InputError("image: the object is smaller than two pixels")
    x, y = (left + right) / 2, (top + bottom) / 2
    cropped = cut_out.crop((x - half, y - half, x + half, y + half))
    pixels = np.asarray(cropped.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    premultiplied = pixels[:, :, :3] * pixels[:, :, 3:]
    return Image.fromarray((premultiplied * 255).astype(np.uint8))


def has_transparency(image: Image.Image) -> bool:
    return image.mode == "RGBA" and bool((np.asarray(image)[:, :, 3] < 255).any())


def remove_background(image: Image.Image) -> Image.Image:
    """RGBA by rembg's u2net, as TRELLIS does it; large photos are first shrunk to 1024 pixels."""
    try:
        import rembg
    except ImportError as error:
        hint = 'pip install "rembg[cpu]" (or give a PNG whose background is transparent)'
        raise MissingDependencyError("rembg, which cuts objects out of photos,", hint=hint) from error
    image = image.convert("RGB")
    scale = min(1.0, MAX_REMOVAL_SIDE / max(image.size))
    if scale < 1:
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)
    result: Any = rembg.remove(image, session=rembg.new_session("u2net"))
    return result


def to_tensor(images: list[Image.Image], size: int) -> Tensor:
    """[B, 3, size, size] in [0, 1]."""
    arrays = [np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)) for i in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
