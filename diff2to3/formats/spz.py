""".spz of Niantic, versions 2 to 4: 19 bytes a Gaussian and one for each higher coefficient, compressed.

    positions    3 × 24-bit fixed point          opacities  uint8          colours  3 × uint8 (0.15 · sh_0 + 0.5)
    log scales   3 × uint8, (x + 10) · 16        rotations  32 bits: which component is largest, three times sign and
    sh_1 …       uint8, 128 x + 128                         9 bits of the others; version 2: xyz as 3 × uint8

Versions 2 and 3 are one gzip stream with a header of 16 bytes. Version 4 is a header of 32 bytes and six Zstandard
streams with a table of their lengths; it needs the package zstandard. y is up. The format has a flag for models
trained with a screen filter and compensated opacities (mip-splatting), as ours are, and no place for other metadata.

Source: the format's README and its reference implementation (github.com/nianticlabs/spz).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.formats.arrays import (
    MAX_RATIO,
    SH_REST,
    SQRT_HALF,
    Arrays,
    arrays_of,
    gaussians_of,
    largest_apart,
    largest_back,
    need,
)
from diff2to3.types import Gaussians

MAGIC = 0x5053474E
HEADER = struct.Struct("<IIIBBBB")
HEADER_4 = struct.Struct("<IIIBBBBI12x")
ANTIALIASED = 1
COLOR_SCALE = 0.15
#: Steps of the coefficients of degree 1 and of higher degrees: 5 and 4 bits, as the reference writes them.
SH_STEPS = (8, 16)
MAX_FRACTION = 20
#: Zstandard has no bound as deflate has; this is the reference implementation's.
MAX_RATIO_ZSTD = 1024


def write(gaussians: Gaussians, metadata: Mapping[str, Any], version: int = 3) -> bytes:
    """The file's content.

    Raises:
        MissingDependencyError: version 4 without zstandard.
        InputError: positions beyond ±8,388,607, which the format cannot hold.
    """
    a = arrays_of(gaussians)
    largest = float(np.abs(a.means).max(initial=0))
    need(largest < (1 << 23) - 1, "spz", f"positions up to {largest:,.0f} do not fit the format")
    # 12 bits, the reference's choice, are 1/16,000 of the unit box's diagonal; bigger scenes get fewer
    fraction = 12
    while fraction and largest * (1 << fraction) > (1 << 23) - 1:
        fraction -= 1
    streams = packed(a, fraction)
    flags = ANTIALIASED if metadata.get("screen_filter") and metadata.get("antialiased", True) else 0
    if version == 4:
        return write_4(a, streams, fraction, flags)
    head = HEADER.pack(MAGIC, version, len(a), a.degree, fraction, flags, 0)
    # wbits 31: a gzip header without name and time, so that equal Gaussians give equal files
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(head + b"".join(streams)) + packer.flush()


def packed(a: Arrays, fraction: int) -> list[bytes]:
    """Positions, opacities, colours, scales, rotations and higher coefficients."""
    fixed = np.floor(a.means * (1 << fraction) + 0.5).astype("<i4")
    positions = fixed.view("u1").reshape(-1, 4)[:, :3]

    def byte(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.floor(x.clip(0, 255) + 0.5).astype(np.uint8))

    scales = byte((np.log(a.scales.clip(min=1e-30)) + 10) * 16)
    colors = byte(a.sh[:, 0] * (COLOR_SCALE * 255) + 127.5)
    higher = np.floor(a.sh[:, 1:] * 128 + 128.5)
    for where, step in ((slice(0, 3), SH_STEPS[0]), (slice(3, None), SH_STEPS[1])):
        higher[:, where] = np.floor((higher[:, where] + step // 2) / step) * step
    parts = (positions, byte(a.opacities * 255), colors, scales, pack_rotations(a.quats), higher.clip(0, 255))
    return [
        np.ascontiguousarray(x).astype(x.dtype if x.dtype.kind == "u" else np.uint8).tobytes() for x in parts
    ]


def pack_rotations(quats: np.ndarray) -> np.ndarray:
    """uint32 [G]; the format counts components xyzw."""
    which, three = largest_apart(quats[:, [1, 2, 3, 0]])
    bits = which.astype(np.uint32)
    for i in range(3):
        magnitude = np.floor(511 * np.abs(three[:, i]) / SQRT_HALF + 0.5).clip(0, 511).astype(np.uint32)
        bits = (bits << 10) | ((three[:, i] < 0).astype(np.uint32) << 9) | magnitude
    return bits.astype("<u4")


def write_4(a: Arrays, streams: list[bytes], fraction: int, flags: int) -> bytes:
    zstd = zstandard()
    full = [stream for stream in streams if stream]
    packer = zstd.ZstdCompressor(level=12)
    done = [packer.compress(stream) for stream in full]
    head = HEADER_4.pack(MAGIC, 4, len(a), a.degree, fraction, flags, len(full), HEADER_4.size)
    table = b"".join(struct.pack("<QQ", len(c), len(s)) for c, s in zip(done, full, strict=True))
    return head + table + b"".join(done)


def zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError("zstandard (for .spz version 4)", "spz") from error
    return zstandard


def read(data: bytes, name: str) -> tuple[Gaussians, dict[str, Any]]:
    if data[:4] == struct.pack("<I", MAGIC):
        header, streams = read_4(data, name)
    elif data[:2] == b"\x1f\x8b":
        header, streams = read_gzip(data, name)
    else:
        raise InputError(f"{name}: not a .spz file")
    version, count, degree, fraction, flags = header
    gaussians, notes = gaussians_of(name, unpacked(version, count, degree, fraction, streams))
    metadata: dict[str, Any] = {"antialiased": bool(flags & ANTIALIASED)}
    return gaussians, {**metadata, **({"notes": notes} if notes else {})}


def check_header(name: str, version: int, count: int, degree: int, fraction: int) -> list[int]:
    """Bytes of the six streams."""
    need(version in (2, 3, 4), name, f".spz version {version}; this program reads 2, 3 and 4")
    need(degree <= 3, name, f"spherical harmonics of degree {degree}; up to 3 are known")
    need(fraction <= MAX_FRACTION + 3, name, f"{fraction} fractional bits of 24; the file is damaged")
    return [count * size for size in (9, 1, 3, 3, 3 if version == 2 else 4, 3 * SH_REST[degree])]


def read_gzip(data: bytes, name: str) -> tuple[tuple[int, int, int, int, int], list[bytes]]:
    unpacker = zlib.decompressobj(31)
    try:
        head = unpacker.decompress(data, HEADER.size)
        need(len(head) == HEADER.size, name, "truncated in the header")
        magic, version, count, degree, fraction, flags, _ = HEADER.unpack(head)
        need(magic == MAGIC, name, "not a .spz file: a gzip file of something else")
        sizes = check_header(name, version, count, degree, fraction)
        need(version < 4, name, "version 4 inside gzip; the file is damaged")
        total = sum(sizes)
        need(
            total <= MAX_RATIO * len(data),
            name,
            f"claims {count:,} Gaussians in {len(data):,} bytes; it is damaged",
        )
        body = unpacker.decompress(unpacker.unconsumed_tail, total) if total else b""
    except zlib.error as error:
        raise InputError(f"{name}: damaged: {error}") from error
    need(
        len(body) == total,
        name,
        f"truncated: {count:,} Gaussians expected, {len(body):,} of {total:,} bytes found",
    )
    ends = np.cumsum([0, *sizes]).tolist()
    streams = [body[a:b] for a, b in pairwise(ends)]
    return (version, count, degree, fraction, flags), streams


def read_4(data: bytes, name: str) -> tuple[tuple[int, int, int, int, int], list[bytes]]:
    need(len(data) >= HEADER_4.size, name, "truncated in the header")
    _, version, count, degree, fraction, flags, num_streams, start = HEADER_4.unpack_from(data)
    sizes = check_header(name, version, count, degree, fraction)
    need(version == 4, name, f".spz version {version} without gzip; the file is damaged")
    expected = [size for size in sizes if size]
    need(
        num_streams == len(expected),
        name,
        f"{num_streams} streams, expected {len(expected)}; the file is damaged",
    )
    need(
        sum(sizes) <= MAX_RATIO_ZSTD * len(data), name,
        f"claims {count:,} Gaussians in {len(data):,} bytes; it is damaged",
    )  # fmt: skip
    need(start >= HEADER_4.size and start + 16 * num_streams <= len(data), name, "truncated in its table")
    table = [struct.unpack_from("<QQ", data, start + 16 * i) for i in range(num_streams)]
    at = start + 16 * num_streams
    zstd, found = zstandard(), []
    for (length, size), wanted in zip(table, expected, strict=True):
        need(
            size == wanted, name, f"a stream claims {size:,} bytes, expected {wanted:,}; the file is damaged"
        )
        need(at + length <= len(data), name, "truncated")
        try:
            # a stream, so that memory is bounded by what is asked for and not by what the frame claims
            with zstd.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
                data[at : at + length]
            ) as stream:
                found.append(stream.read(wanted))
        except zstd.ZstdError as error:
            raise InputError(f"{name}: damaged: {error}") from error
        need(len(found[-1]) == wanted, name, "truncated: a stream is too short")
        at += length
    streams = [found.pop(0) if size else b"" for size in sizes]
    return (version, count, degree, fraction, flags), streams


def unpacked(version: int, count: int, degree: int, fraction: int, streams: list[bytes]) -> Arrays:
    def rows(i: int, width: int) -> np.ndarray:
        return np.frombuffer(streams[i], np.uint8).reshape(count, width)

    fixed = np.zeros((count, 3, 4), np.uint8)
    fixed[:, :, 1:] = rows(0, 9).reshape(count, 3, 3)
    means = (fixed.view("<i4")[..., 0] >> 8) / float(1 << fraction)  # the shift extends the sign
    dc = (rows(2, 3) / 255 - 0.5) / COLOR_SCALE
    higher = (rows(5, 3 * SH_REST[degree]).astype(np.float64) - 128) / 128
    sh = np.concatenate((dc[:, None], higher.reshape(count, SH_REST[degree], 3)), 1)
    if version == 2:
        xyz = rows(4, 3) / 127.5 - 1
        w = np.sqrt((1 - (xyz**2).sum(1)).clip(min=0))
        quats = np.concatenate((w[:, None], xyz), 1)
    else:
        quats = unpack_rotations(np.frombuffer(streams[4], "<u4"))
    scales = np.exp(rows(3, 3) / 16 - 10.0)
    return Arrays(means, quats, scales, rows(1, 1)[:, 0] / 255, sh)


def unpack_rotations(bits: np.ndarray) -> np.ndarray:
    """wxyz [G, 4] of uint32 [G]."""
    three = np.empty((len(bits), 3))
    for i in range(3):
        part = (bits >> np.uint32(10 * (2 - i))) & np.uint32(1023)
        three[:, i] = (part & 511) / 511 * SQRT_HALF * np.where(part & 512, -1.0, 1.0)
    xyzw = largest_back((bits >> np.uint32(30)).astype(np.int64), three)
    return xyzw[:, [3, 0, 1, 2]]
