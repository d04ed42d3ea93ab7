"""Texture sampling for many points at once: all textures of a mesh in one buffer, with mip levels.

Filtering is done in linear light, as GPUs do it: texels are decoded before they are averaged (glTF 2.0
section 3.8.4 for wrapping and filters).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diff2to3.types import Texture

_ENCODED = np.arange(256) / 255
#: sRGB byte -> linear.
DECODE = np.where(_ENCODED <= 0.04045, _ENCODED / 12.92, ((_ENCODED + 0.055) / 1.055) ** 2.4).astype(
    np.float32
)
_ENCODE_STEPS = 1 << 16
_LINEAR = np.arange(_ENCODE_STEPS + 1) / _ENCODE_STEPS
_ENCODE = np.where(_LINEAR <= 0.0031308, 12.92 * _LINEAR, 1.055 * _LINEAR ** (1 / 2.4) - 0.055).astype(
    np.float32
)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear values, clipped to [0, 1], -> sRGB-encoded float32, from a table: off by at most 1e-4."""
    steps = np.clip(linear, 0, 1) * np.float32(_ENCODE_STEPS) + np.float32(0.5)
    return _ENCODE[steps.astype(np.int32)]


class TexturePack:
    """The textures of one mesh. ``sample`` reads any of them at any points in one vectorised call."""

    def __init__(self, textures: Sequence[Texture]) -> None:
        self._levels: list[
            tuple[int, int, int]
        ] = []  # (offset, height, width) of every level of every texture
        chunks, first, counts, offset = [], [], [], 0
        for texture in textures:
            levels = _mip_levels(texture.pixels) if texture.mip_filter != "none" else [texture.pixels]
            first.append(len(self._levels))
            counts.append(len(levels))
            for level in levels:
                self._levels.append((offset, *level.shape[:2]))
                chunks.append(np.ascontiguousarray(level).view(np.uint32).reshape(-1))
                offset += chunks[-1].size
        self._texels = np.concatenate(chunks) if chunks else np.zeros(0, np.uint32)
        self._table = np.array(self._levels, np.int64).reshape(-1, 3)
        self._first = np.array(first, np.int64)
        self._last = np.array(counts, np.int64) - 1
        self._sizes = np.sqrt(np.array([t.pixels.size / 4 for t in textures], np.float32))
        self._wraps = np.array([[_WRAP_CODES[w] for w in t.wrap] for t in textures], np.int8).reshape(-1, 2)
        self._nearest_mag = np.array([t.mag_filter == "nearest" for t in textures], bool)
        self._nearest_min = np.array([t.min_filter == "nearest" for t in textures], bool)
        self._nearest_mip = np.array([t.mip_filter != "linear" for t in textures], bool)

    def mean_size(self, index: np.ndarray) -> np.ndarray:
        """Square root of the number of texels of textures ``index`` [n]: float32 [n]."""
        return self._sizes[index]

    def sample(self, index: np.ndarray, uvs: np.ndarray, lods: np.ndarray) -> np.ndarray:
        """Linear RGBA, float32 [n, 4], of textures ``index`` [n] at ``uvs`` [n, 2] and levels of detail [n].

        A level of detail of 0 or less magnifies; k means that one sample covers 2^k texels a side.
        """
        out = np.empty((len(index), 4), np.float32)
        small = lods > 0
        if not small.all():
            rows = np.flatnonzero(~small)
            t = index[rows]
            out[rows] = self._level(self._first[t], t, uvs[rows], self._nearest_mag[t])
        if small.any():
            rows = np.flatnonzero(small)
            out[rows] = self._minify(index[rows], uvs[rows], lods[rows])
        return out

    def _minify(self, index: np.ndarray, uvs: np.ndarray, lods: np.ndarray) -> np.ndarray:
        last = self._last[index]
        lods = np.minimum(lods, last)
        lods = np.where(self._nearest_mip[index], np.rint(lods), lods)
        lower = np.minimum(np.floor(lods).astype(np.int64), last)
        fraction = (lods - lower).astype(np.float32)
        nearest = self._nearest_min[index]
        out = self._level(self._first[index] + lower, index, uvs, nearest)
        between = np.flatnonzero(fraction > 0)
        if len(between):
            t = index[between]
            coarser = self._level(self._first[t] + lower[between] + 1, t, uvs[between], nearest[between])
            out[between] += fraction[between, None] * (coarser - out[between])
        return out

    def _level(
        self, level: np.ndarray, index: np.ndarray, uvs: np.ndarray, nearest: np.ndarray
    ) -> np.ndarray:
        """Bilinear (or nearest) reading of one mip level a point: float32 [n, 4]."""
        offset, height, width = self._table[level].T
        # Far from zero float32 has no sub-texel bits left, and repeating textures may lie anywhere.
        u, v = uvs[:, 0].astype(np.float64) * width, uvs[:, 1].astype(np.float64) * height
        wrap_u, wrap_v = self._wraps[index].T
        if nearest.any():
            u, v = np.where(nearest, np.floor(u) + 0.5, u), np.where(nearest, np.floor(v) + 0.5, v)
        x0, y0 = np.floor(u - 0.5), np.floor(v - 0.5)
        fx, fy = (u - 0.5 - x0).astype(np.float32)[:, None], (v - 0.5 - y0).astype(np.float32)[:, None]
        xs = [_wrap(x0, width, wrap_u), _wrap(x0 + 1, width, wrap_u)]
        ys = [offset + width * _wrap(y, height, wrap_v) for y in (y0, y0 + 1)]
        top = self._decode(ys[0] + xs[0])
        top += fx * (self._decode(ys[0] + xs[1]) - top)
        bottom = self._decode(ys[1] + xs[0])
        bottom += fx * (self._decode(ys[1] + xs[1]) - bottom)
        return top + fy * (bottom - top)

    def _decode(self, texel: np.ndarray) -> np.ndarray:
        packed = self._texels[texel].view(np.uint8).reshape(-1, 4)
        rgba = DECODE[packed]
        rgba[:, 3] = packed[:, 3] * np.float32(1 / 255)
        return rgba


_WRAP_CODES = {"repeat": 0, "clamp": 1, "mirror": 2}


def _wrap(i: np.ndarray, size: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Whole texel coordinates (as float64) -> int64 in [0, size), by each point's wrap mode."""
    if not code.any():
        return np.asarray(np.mod(i, size).astype(np.int64))
    turn = np.mod(i, 2 * size)
    mirrored = np.where(turn < size, turn, 2 * size - 1 - turn)
    wrapped = np.where(code == 0, np.mod(i, size), np.where(code == 1, np.clip(i, 0, size - 1), mirrored))
    return np.asarray(wrapped.astype(np.int64))


def _mip_levels(pixels: np.ndarray) -> list[np.ndarray]:
    """The image and its halvings down to one texel, averaged in linear light: uint8 [h, w, 4] each."""
    from PIL import Image

    levels = [pixels]
    channels = [DECODE[pixels[..., c]] if c < 3 else pixels[..., 3] / np.float32(255) for c in range(4)]
    height, width = pixels.shape[:2]
    while height > 1 or width > 1:
        height, width = max(1, height // 2), max(1, width // 2)
        channels = [
            np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BOX)) for c in channels
        ]
        encoded = encode_srgb(np.stack([*channels[:3]], -1))
        level = np.concatenate([encoded, np.clip(channels[3], 0, 1)[..., None]], -1)
        levels.append((level * 255 + 0.5).astype(np.uint8))
    return levels
