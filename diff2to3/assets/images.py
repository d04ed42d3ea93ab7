"""Decoding texture images that come with untrusted files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from diff2to3.assets.limits import Limits
from diff2to3.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

#: Formats that textures really use. Pillow reads many more, with far less tested decoders.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")


class TextureBudget:
    """Counts what the textures of one asset take, so that many images cannot do what one may not."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self.notes: list[str] = []

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """uint8 [H, W, 4], sRGB with straight alpha, at most ``max_texture_size`` a side.

        Raises InputError for a format that is not read, a damaged image, or one over the limits.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                return self.to_pixels(image, name)
        except InputError:
            raise
        except Exception as error:  # decoders raise whatever the damage makes them meet
            kind = "KTX2, which is not read" if data[1:7] == b"KTX 20" else f"damaged or unknown ({error})"
            raise InputError(f"{name}: image is {kind}") from None

    def to_pixels(self, image: Image.Image, name: str) -> np.ndarray:
        """As :meth:`decode`, from an image that Pillow has opened and not yet decoded."""
        self.limits.check(f"pixels in {name}", image.width * image.height, "max_texture_pixels")
        pixels = self._to_rgba(image, name)
        self.count(pixels)
        return pixels

    def count(self, pixels: np.ndarray) -> None:
        """Take in what another texture holds. InputError where all together are over the limit."""
        self.num_bytes += pixels.nbytes
        self.limits.check("bytes of textures", self.num_bytes, "max_texture_bytes")

    @staticmethod
    def resized(values: np.ndarray, width: int, height: int) -> np.ndarray:
        """uint8 [H, W] at another size."""
        from PIL import Image

        return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))

    def _to_rgba(self, image: Image.Image, name: str) -> np.ndarray:
        from PIL import Image

        bound = self.limits.max_texture_size
        if image.format == "JPEG":
            image.draft("RGB", (bound, bound))  # decode at a smaller scale when that is still large enough
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            image = _from_deep_grey(image)
        rgba = image.convert("RGBA")
        if max(rgba.size) > bound:
            scale = bound / max(rgba.size)
            size = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
            self.notes.append(f"{name}: shrunk from {rgba.width} x {rgba.height} to {size[0]} x {size[1]}")
            rgba = rgba.resize(size, Image.Resampling.BOX)
        return np.array(rgba, np.uint8)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion clips it."""
    from PIL import Image

    values = np.asarray(image, np.float64)
    return Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8), "L")
