"""The older glTF material model, specular-glossiness, as metallic-roughness.

Both say how much light a surface scatters and how much it mirrors. Equating the two (the extension's appendix
B; colours are linear, brightness is the Rec. 601 root of weighted squares) gives a quadratic in the metalness.
"""

from __future__ import annotations

import numpy as np

from diff2to3.assets.parts import decode_srgb, encode_srgb

#: What a surface that is no metal mirrors when looked at straight on: every metallic-roughness material has it.
DIELECTRIC = 0.04
_EPSILON = 1e-6
_ROWS = 256


def to_metallic(diffuse: np.ndarray, specular: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(base colour [n, 3], metalness [n]) of linear ``diffuse`` and ``specular`` [n, 3].

    A surface that mirrors no more than any other keeps its diffuse colour as it is.
    """
    kept = 1 - specular.max(1)
    d, s = _brightness(diffuse), _brightness(specular)
    b = d * kept / (1 - DIELECTRIC) + s - 2 * DIELECTRIC
    root = np.sqrt(np.maximum(b * b - 4 * DIELECTRIC * (DIELECTRIC - s), 0))
    metal = np.where(s <= DIELECTRIC, 0, np.clip((root - b) / (2 * DIELECTRIC), 0, 1))
    scattered = diffuse * (kept / (1 - DIELECTRIC) / np.maximum(1 - metal, _EPSILON))[:, None]
    mirrored = (specular - DIELECTRIC * (1 - metal[:, None])) / np.maximum(metal, _EPSILON)[:, None]
    weight = (metal * metal)[:, None]
    base = np.where(metal[:, None] > 0, scattered * (1 - weight) + mirrored * weight, diffuse)
    return np.clip(base, 0, 1), metal


def convert_pixels(
    diffuse: np.ndarray | None, specular: np.ndarray | None, factors: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, float]:
    """(base colour, uint8 [H, W, 4] with the diffuse alpha; mean metalness) of two textures, or of one.

    ``diffuse`` and ``specular`` are uint8 [h, w, 4], sRGB-encoded; the smaller is enlarged to the larger.
    ``factors`` are linear RGB, (diffuse, specular).
    """
    sizes = [image.shape[:2] for image in (diffuse, specular) if image is not None]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    images = [None if image is None else _resized(image, width, height) for image in (diffuse, specular)]
    out = np.full((height, width, 4), 255, np.uint8)
    if images[0] is not None:
        out[..., 3] = images[0][..., 3]
    total = 0.0
    for start in range(0, height, _ROWS):
        colors = []
        for image, factor in zip(images, factors, strict=True):
            block = np.ones((min(_ROWS, height - start), width, 3))
            if image is not None:
                block = decode_srgb(image[start : start + _ROWS, :, :3] / 255)
            colors.append(np.clip(block.reshape(-1, 3) * factor, 0, 1))
        base, metal = to_metallic(colors[0], colors[1])
        out[start : start + _ROWS, :, :3] = (encode_srgb(base) * 255 + 0.5).reshape(-1, width, 3)
        total += float(metal.sum())
    return out, total / (height * width)


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _brightness(colors: np.ndarray) -> np.ndarray:
    return np.sqrt((colors**2) @ np.array([0.299, 0.587, 0.114]))
