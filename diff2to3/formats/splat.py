""".splat: 32 bytes a Gaussian and nothing else, the most prominent first.

    position 3 × float32, scale 3 × float32, colour and opacity 4 × uint8, rotation wxyz 4 × uint8 (128 + 128 q)

No header, no metadata, no view-dependent colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diff2to3.formats.arrays import SH_C0, Arrays, arrays_of, gaussians_of, need, quantise
from diff2to3.types import Gaussians

RECORD = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("quat", "u1", 4)])


def write(gaussians: Gaussians, metadata: Mapping[str, Any]) -> bytes:
    """The file's content. Viewers draw while they load, so volume × opacity decides the order."""
    a = arrays_of(gaussians)
    a = a.take(np.argsort(-a.scales.prod(1) * a.opacities, kind="stable"))
    rows = np.zeros(len(a), RECORD)
    rows["mean"], rows["scale"] = a.means, a.scales
    rows["color"] = quantise(np.concatenate((a.colors, a.opacities[:, None]), 1), 255)
    rows["quat"] = np.floor(a.quats * 128 + 128.5).clip(0, 255)
    return rows.tobytes()


def read(data: bytes, name: str) -> tuple[Gaussians, dict[str, Any]]:
    need(
        len(data) % 32 == 0,
        name,
        f"not a .splat file, or truncated: {len(data):,} bytes are no multiple of 32",
    )
    rows = np.frombuffer(data, RECORD)
    with np.errstate(invalid="ignore"):
        means, scales = rows["mean"].astype(np.float64), rows["scale"].astype(np.float64)
    color = rows["color"] / 255
    quats = (rows["quat"].astype(np.float64) - 128) / 128
    sh = ((color[:, :3] - 0.5) / SH_C0)[:, None]
    gaussians, notes = gaussians_of(name, Arrays(means, quats, scales, color[:, 3], sh))
    return gaussians, {"notes": notes} if notes else {}
