""".ksplat of GaussianSplats3D, read only: sections of buckets, in three levels of compression.

    level 0   float32                    level 1   16-bit positions within a bucket, float16
    level 2   as 1, with higher coefficients as bytes between two limits

Colours and opacities are bytes in all. y is down.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from diff2to3.formats.arrays import SH_C0, SH_REST, Arrays, gaussians_of, need
from diff2to3.types import Gaussians

HEADER, SECTION = 4096, 1024
#: Types of position, scale, rotation and higher coefficients by level.
LEVELS = (("<f4", "<f4", "<f4", "<f4"), ("<u2", "<f2", "<f2", "<f2"), ("<u2", "<f2", "<f2", "<u1"))
DEFAULT_RANGE = 32767


@dataclass(frozen=True)
class Section:
    """``capacity`` Gaussians may follow, ``count`` do; buckets are full, or as large as ``partial`` says."""

    count: int
    capacity: int
    bucket_size: int
    num_buckets: int
    block: float
    bucket_bytes: int
    limit: int
    full: int
    partial: int
    degree: int


def read(data: bytes, name: str) -> tuple[Gaussians, dict[str, Any]]:
    need(len(data) >= HEADER, name, "not a .ksplat file, or truncated")
    major, minor = data[0], data[1]
    need(major == 0 and minor >= 1, name, f".ksplat version {major}.{minor}; this program reads 0.1")
    num_sections, count = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 16)[0]
    level = struct.unpack_from("<H", data, 20)[0]
    need(level <= 2, name, f"compression level {level}; expected 0, 1 or 2")
    low, high = struct.unpack_from("<ff", data, 36)
    limits = (low or -1.5, high or 1.5)
    at = HEADER + SECTION * num_sections
    need(at <= len(data), name, f"truncated: {num_sections:,} sections expected")
    sections = [section(data, HEADER + SECTION * i) for i in range(num_sections)]
    degree = max((s.degree for s in sections if s.count), default=0)
    need(degree <= 3, name, f"spherical harmonics of degree {degree}; up to 3 are known")
    found = []
    for s in sections:
        need(s.degree <= 3, name, "a section is damaged")
        arrays, at = section_arrays(data, at, s, level, limits, name)
        if not s.count:
            continue
        more = ((0, 0), (0, SH_REST[degree] - SH_REST[s.degree]), (0, 0))
        found.append(
            Arrays(*(arrays.means, arrays.quats, arrays.scales, arrays.opacities), np.pad(arrays.sh, more))
        )
    total = sum(len(a) for a in found)
    need(
        total == count and total > 0,
        name,
        f"claims {count:,} Gaussians, its sections hold {total:,}; it is damaged",
    )
    whole = Arrays(
        *(
            np.concatenate([getattr(a, key) for a in found])
            for key in ("means", "quats", "scales", "opacities", "sh")
        )
    )
    gaussians, notes = gaussians_of(name, whole)
    return gaussians, {"notes": notes} if notes else {}


def section(data: bytes, at: int) -> Section:
    count, capacity, bucket_size, num_buckets, block = struct.unpack_from("<IIIIf", data, at)
    bucket_bytes, limit = (
        struct.unpack_from("<H", data, at + 20)[0],
        struct.unpack_from("<I", data, at + 24)[0],
    )
    full, partial, degree = struct.unpack_from("<IIH", data, at + 32)
    return Section(
        count,
        capacity,
        bucket_size,
        num_buckets,
        block,
        bucket_bytes,
        limit or DEFAULT_RANGE,
        full,
        partial,
        degree,
    )


def section_arrays(
    data: bytes, at: int, s: Section, level: int, limits: tuple[float, float], name: str
) -> tuple[Arrays, int]:
    """The section's Gaussians, and where the next section's data start."""
    position, scale, rotation, rest = LEVELS[level]
    num_rest = 3 * SH_REST[s.degree]
    record = np.dtype(
        [
            ("mean", position, 3),
            ("scale", scale, 3),
            ("quat", rotation, 4),
            ("color", "u1", 4),
            ("sh", rest, num_rest),
        ]
    )
    centres = at + 4 * s.partial
    start = centres + s.bucket_bytes * s.num_buckets
    end = start + record.itemsize * s.capacity
    need(
        s.count <= s.capacity and end <= len(data),
        name,
        f"truncated: {s.capacity:,} Gaussians expected in a section",
    )
    rows = np.frombuffer(data, record, s.count, start)
    with np.errstate(invalid="ignore", over="ignore"):
        means = rows["mean"].astype(np.float64)
        if level:
            fits = s.num_buckets == 0 or s.bucket_bytes >= 12
            need(fits and s.full + s.partial <= s.num_buckets, name, "a section's buckets are damaged")
            bucket = bucket_of(s, np.frombuffer(data, "<u4", s.partial, at).astype(np.int64), name)
            table = np.ndarray((s.num_buckets, 3), "<f4", data, centres, (s.bucket_bytes, 4))
            means = (means - s.limit) * (s.block / 2 / s.limit) + table.astype(np.float64)[bucket]
        sh = rows["sh"].astype(np.float64)
        if level == 2:
            sh = limits[0] + sh / 255 * (limits[1] - limits[0])
        color = rows["color"] / 255
        dc = (color[:, :3] - 0.5) / SH_C0
        higher = higher_coefficients(sh, s.degree)
        arrays = Arrays(
            means,
            rows["quat"].astype(np.float64),
            rows["scale"].astype(np.float64),
            color[:, 3],
            np.concatenate((dc[:, None], higher), 1),
        )
    return arrays, end


def higher_coefficients(sh: np.ndarray, degree: int) -> np.ndarray:
    """[G, K−1, 3] of the file's order: each degree on its own, channel after channel."""
    parts, at = [np.zeros((len(sh), 0, 3))], 0
    for n in range(1, degree + 1):
        width = 2 * n + 1
        parts.append(sh[:, at : at + 3 * width].reshape(len(sh), 3, width).transpose(0, 2, 1))
        at += 3 * width
    return np.concatenate(parts, 1)


def bucket_of(s: Section, partial: np.ndarray, name: str) -> np.ndarray:
    """Which bucket each Gaussian [count] is in."""
    sizes = np.concatenate((np.full(s.full, s.bucket_size, np.int64), partial))
    ends = np.cumsum(np.minimum(sizes, s.count))
    need(
        s.count == 0 or (len(ends) > 0 and int(ends[-1]) >= s.count),
        name,
        "a section's buckets hold too few Gaussians",
    )
    return np.asarray(np.searchsorted(ends, np.arange(s.count), side="right"))
