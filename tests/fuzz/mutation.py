"""Changes of files: bytes anywhere, and bytes within what a container packs, whose checksums are then right again."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
NUMBERS = (
    b"0", b"-1", b"1", b"2", b"255", b"256", b"65535", b"65536", b"1e9", b"2147483648", b"-2147483649",
    b"4294967296", b"99999999999999999999", b"1e39", b"-1e400", b"nan", b"inf", b"0.5", b"1,5", b"1.#QNAN", b"",
)  # fmt: skip
LARGEST = 1 << 20  # bytes of an input

Change = Callable[[bytes], bytes]
Rewrite = Callable[[bytes, Change, Random], bytes]


def changed(data: bytes, rng: Random, words: Sequence[bytes], pool: Sequence[bytes]) -> bytes:
    """``data`` with one to six places changed. ``pool``: files to splice with."""
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        bound = min(len(data), 200) if rng.random() < 0.3 else len(data)  # headers more often
        at = rng.randrange(bound + 1)
        end = min(len(data), at + rng.choice((1, 1, 4, 16, 64)))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:at] + rng.randbytes(end - at) + data[end:]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] * rng.choice((2, 3, 50)) + data[end:]
        elif kind in (3, 4):
            word = rng.choice(words)
            data = data[:at] + word + data[at + rng.choice((0, len(word))) :]
        elif kind == 5:
            place = NUMBER.search(data, at) or NUMBER.search(data)
            if place:
                data = data[: place.start()] + rng.choice(NUMBERS) + data[place.end() :]
        elif kind == 6:
            other = rng.choice(pool)
            data = data[:at] + other[rng.randrange(len(other)) :]
        else:
            data = data[:at] if rng.random() < 0.3 else data + rng.choice(pool)
    return data[:LARGEST]


def plain(data: bytes, change: Change, rng: Random) -> bytes:
    return change(data)


def glb(data: bytes, change: Change, rng: Random) -> bytes:
    """The description of a .glb, whose lengths are right again."""
    length = struct.unpack_from("<I", data, 12)[0]
    text = change(data[20 : 20 + length].rstrip())
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + data[20 + length :]
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def gzipped(data: bytes, change: Change, rng: Random) -> bytes:
    return gzip.compress(change(gzip.decompress(data)), 1, mtime=0)


def zipped(data: bytes, change: Change, rng: Random) -> bytes:
    """One file of an archive, most often its description."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = "meta.json" if rng.random() < 0.7 else rng.choice(sorted(files))
    files[name] = change(files[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def spz_4(data: bytes, change: Change, rng: Random) -> bytes:
    """The header, or one of the Zstandard streams, whose length in the table is right again."""
    import zstandard

    num, start = data[15], struct.unpack_from("<I", data, 16)[0]
    if rng.random() < 0.4:
        return change(data[: start + 16 * num]) + data[start + 16 * num :]
    table = [struct.unpack_from("<QQ", data, start + 16 * i) for i in range(num)]
    at, streams = start + 16 * num, []
    for length, _ in table:
        streams.append(data[at : at + length])
        at += length
    i = rng.randrange(num)
    content = change(zstandard.ZstdDecompressor().decompress(streams[i]))
    streams[i] = zstandard.ZstdCompressor().compress(content)
    table[i] = (len(streams[i]), len(content) if rng.random() < 0.5 else table[i][1])
    return data[:start] + b"".join(struct.pack("<QQ", *row) for row in table) + b"".join(streams)


def png(data: bytes, change: Change, rng: Random) -> bytes:
    """One chunk of a .png, whose length and checksum are right again. Other pictures: anywhere."""
    if not data.startswith(b"\x89PNG"):
        return change(data)
    at, chunks = 8, []
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    packed = kind == b"IDAT" and rng.random() < 0.5
    content = zlib.compress(change(zlib.decompress(content)), 1) if packed else change(content)
    chunks[i] = (kind, content)
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(parts)
