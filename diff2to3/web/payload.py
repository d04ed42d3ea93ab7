"""Gaussians as the pages of this package read them (``decodePayload`` in static/splats.js): small and close.

Everything is little-endian and deflated (zlib) as a whole. A column of b-byte numbers is stored as b planes of one byte
each, low bytes first.

    magic "D2V1", uint32 G, uint32 K, uint32 bytes of a coordinate (2 or 3)
    float32 [9]: the box's lowest corner, its sides, the screen filter in px², least logarithm of a scale, its step
    means     3 columns of 2 or 3 bytes: share of the box
    scales    3 columns of 2 bytes: (logarithm − least) / step
    quats     3 columns of 2 bytes: p = (x, y, z) / (1 + w) of the unit quaternion with w ≥ 0, −1 at 0, 1 at 65534;
              w = (1 − p²) / (1 + p²), and (x, y, z) = 2 p / (1 + p²)
    opacity   1 column of 2 bytes: 1 at 65535
    sh        3 K columns of float16, coefficient by coefficient, each red, green, blue
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from diff2to3.gaussians.render import EPS2D
from diff2to3.types import Gaussians

MAGIC = b"D2V1"
#: Coordinates have 2 bytes where the error is at most this share of a small Gaussian's size.
POSITION_SLACK = 0.05


def pack(gaussians: Gaussians, screen_filter: float = EPS2D) -> bytes:
    """The bytes that ``decodePayload`` takes."""
    means, scales = _numpy(gaussians.means), np.log(_numpy(gaussians.scales).clip(1e-12))
    count = len(means)
    low = means.min(0, initial=np.inf) if count else np.zeros(3)
    sides = means.max(0, initial=-np.inf) - low if count else np.zeros(3)
    small = float(np.exp(np.quantile(scales, 0.05))) if count else 1.0
    planes = 2 if float(sides.max()) / 65535 <= POSITION_SLACK * small else 3
    least = float(scales.min(initial=0.0)) if not count else float(scales.min())
    step = max((float(scales.max()) - least) / 65535, 1e-9) if count else 1e-9
    # what the reader works with are float32 numbers, so the codes are for those
    box = np.array([*low, *sides, screen_filter, least, step], "<f4")
    low32, sides32, least32, step32 = (
        box[:3].astype(float),
        box[3:6].astype(float),
        float(box[7]),
        float(box[8]),
    )

    quats = _numpy(torch.nn.functional.normalize(gaussians.quats.double(), dim=-1))
    quats = np.where(quats[:, :1] < 0, -quats, quats)
    turns = quats[:, 1:] / (1 + quats[:, :1])
    top = 2 ** (8 * planes) - 1
    position = np.round((means - low32) / np.where(sides32 > 0, sides32, 1) * top).clip(0, top)
    body = [
        struct.pack("<4sIII", MAGIC, count, gaussians.sh.shape[1], planes),
        box.tobytes(),
        *(_column(position[:, k], planes) for k in range(3)),
        *(_column(np.round((scales[:, k] - least32) / step32).clip(0, 65535), 2) for k in range(3)),
        *(_column(np.round(turns[:, k] * 32767).clip(-32767, 32767) + 32767, 2) for k in range(3)),
        _column(np.round(_numpy(gaussians.opacities).clip(0, 1) * 65535), 2),
    ]
    sh = _numpy(gaussians.sh).clip(-65504, 65504).astype("<f2").view("<u2")
    body += [_column(sh[:, k, c], 2) for k in range(sh.shape[1]) for c in range(3)]
    return zlib.compress(b"".join(body), 9)


def _numpy(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().to("cpu", torch.float64).numpy())


def _column(values: np.ndarray, planes: int) -> bytes:
    """Whole numbers [G], plane by plane."""
    codes = values.astype("<u4")
    return b"".join(((codes >> (8 * p)) & 255).astype(np.uint8).tobytes() for p in range(planes))
