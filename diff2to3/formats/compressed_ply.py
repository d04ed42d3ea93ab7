"""PlayCanvas's compressed .ply: 16 bytes a Gaussian, and the ranges of every 256 of them.

    element chunk    min and max of x y z, log scale and colour
    element vertex   packed_position 11+10+11 bits, packed_rotation 2+3·10, packed_scale 11+10+11, packed_color 4·8
    element sh       f_rest_* as uint8, only for higher degrees

Gaussians are sorted along a space-filling curve first, so that a chunk's ranges are narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diff2to3.formats.arrays import (
    SH_C0,
    SH_REST,
    SQRT_HALF,
    Arrays,
    arrays_of,
    gaussians_of,
    largest_apart,
    largest_back,
    morton_order,
    need,
    quantise,
    rest_by_channel,
    rest_from_channels,
)
from diff2to3.formats.comments import comment_line
from diff2to3.types import Gaussians

CHUNK = 256
RANGES = [f"{end}_{group}{axis}" for group, axes in (("", "xyz"), ("scale_", "xyz"), ("", "rgb"))
          for end in ("min", "max") for axis in axes]  # fmt: skip
PACKED = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
#: Higher coefficients are held within ±4.
SH_RANGE = 8.0


def write(gaussians: Gaussians, metadata: Mapping[str, Any]) -> bytes:
    a = arrays_of(gaussians)
    a = a.take(morton_order(a.means))
    groups = (a.means, np.log(a.scales.clip(min=1e-30)).clip(-20, 20), a.colors)
    ranges, parts = [], []
    starts = np.arange(0, len(a), CHUNK)
    chunk = np.arange(len(a)) // CHUNK
    for values in groups:
        low = np.minimum.reduceat(values, starts).astype("<f4") if len(a) else np.zeros((0, 3), "<f4")
        high = np.maximum.reduceat(values, starts).astype("<f4") if len(a) else np.zeros((0, 3), "<f4")
        ranges += [low, high]
        span = np.where(high > low, high.astype(np.float64) - low, 1)
        parts.append((values - low[chunk]) / span[chunk])
    which, three = largest_apart(a.quats)
    rotation: np.ndarray = which.astype(np.uint32)
    for i in range(3):
        rotation = (rotation << 10) | quantise(three[:, i] * SQRT_HALF + 0.5, 1023).astype(np.uint32)
    color = quantise(np.concatenate((parts[2], a.opacities[:, None]), 1), 255).astype(np.uint32)
    table = np.stack(
        (
            pack_11_10_11(parts[0]),
            rotation,
            pack_11_10_11(parts[1]),
            color[:, 0] << 24 | color[:, 1] << 16 | color[:, 2] << 8 | color[:, 3],
        ),
        1,
    )
    rest = rest_by_channel(a.sh)
    header = ["ply", "format binary_little_endian 1.0", comment_line(metadata)]
    header += [f"element chunk {len(starts)}", *(f"property float {name}" for name in RANGES)]
    header += [f"element vertex {len(a)}", *(f"property uint {name}" for name in PACKED)]
    if rest.shape[1]:
        header += [f"element sh {len(a)}", *(f"property uchar f_rest_{i}" for i in range(rest.shape[1]))]
    head = "\n".join([*header, "end_header", ""]).encode("ascii")
    levels = np.floor((rest / SH_RANGE + 0.5) * 256).clip(0, 255).astype(np.uint8)
    return head + np.concatenate(ranges, 1).tobytes() + table.astype("<u4").tobytes() + levels.tobytes()


def pack_11_10_11(x: np.ndarray) -> np.ndarray:
    """uint32 [G] of [G, 3] in [0, 1]."""
    a, b, c = (quantise(x[:, i], levels).astype(np.uint32) for i, levels in enumerate((2047, 1023, 2047)))
    return np.asarray(a << 21 | b << 11 | c)


def unpack_11_10_11(bits: np.ndarray) -> np.ndarray:
    parts = np.stack((bits >> 21, bits >> 11 & 1023, bits & 2047), 1)
    return np.asarray(parts / np.array([2047.0, 1023, 2047]))


def decode(
    chunks: Mapping[str, np.ndarray],
    vertices: Mapping[str, np.ndarray],
    sh: Mapping[str, np.ndarray],
    name: str,
) -> tuple[Gaussians, list[str]]:
    """Gaussians of the columns of the three elements (``sh`` empty without higher degrees), and notes."""
    missing = [p for p in PACKED if p not in vertices] + [r for r in RANGES[:12] if r not in chunks]
    need(not missing, name, f"not a compressed .ply of 3D Gaussians: no property {', '.join(missing)}")
    count, num_chunks = len(vertices["packed_position"]), len(chunks["min_x"])
    need(
        num_chunks == -(-count // CHUNK),
        name,
        f"{num_chunks} chunks for {count:,} Gaussians; the file is damaged",
    )
    need(len(sh) in [3 * n for n in SH_REST], name, f"{len(sh)} properties of sh; expected 9, 24 or 45")
    packed = {key: vertices[key].astype(np.int64) for key in PACKED}
    chunk = np.arange(count) // CHUNK

    def between(group: str, axes: str, t: np.ndarray) -> np.ndarray:
        low, high = (np.stack([chunks[f"{e}_{group}{x}"] for x in axes], 1)[chunk] for e in ("min", "max"))
        return np.asarray(low * (1 - t) + high * t)

    color = np.stack([packed["packed_color"] >> shift & 255 for shift in (24, 16, 8, 0)], 1) / 255
    rgb = between("", "rgb", color[:, :3]) if all(r in chunks for r in RANGES[12:]) else color[:, :3]
    bits = packed["packed_rotation"]
    three = np.stack([bits >> shift & 1023 for shift in (20, 10, 0)], 1) / 1023
    dc = (rgb - 0.5) / SH_C0
    names = [f"f_rest_{i}" for i in range(len(sh))]
    need(all(n in sh and len(sh[n]) == count for n in names), name, "the element sh is damaged")
    rest = np.stack([sh[n] for n in names], 1).astype(np.float64) if names else np.zeros((count, 0))
    level = np.where(rest == 0, 0, np.where(rest == 255, 1, (rest + 0.5) / 256))
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = Arrays(
            between("", "xyz", unpack_11_10_11(packed["packed_position"])),
            largest_back(bits >> 30 & 3, (three - 0.5) / SQRT_HALF),
            np.exp(between("scale_", "xyz", unpack_11_10_11(packed["packed_scale"]))),
            color[:, 3],
            rest_from_channels(dc, (level - 0.5) * SH_RANGE),
        )
        return gaussians_of(name, arrays)
