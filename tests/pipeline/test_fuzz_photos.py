"""Damaged picture files: one clear error or a picture, whatever the bytes; no hang, bounded memory."""

from __future__ import annotations

import io
import random
import resource
import time
from pathlib import Path

import icc
import numpy as np
import pytest
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.pipeline.photo_files import open_photo

#: Seconds of fuzzing, split over the kinds; executions of each are printed.
BUDGET = 120.0


def seeds() -> dict[str, bytes]:
    """A small file of each kind that people have."""
    y, x = np.mgrid[:20, :24]
    rgb = Image.fromarray(np.stack([x * 10, y * 12, x + y], -1).astype(np.uint8))
    grey = rgb.convert("L")
    profile = icc.rgb_profile(icc.DISPLAY_P3, 2.2)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "png": (rgb, {"icc_profile": profile}),
        "palette.png": (rgb.quantize(8), {"transparency": 0}),
        "deep.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
        "jpg": (rgb, {"exif": exif, "icc_profile": profile}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "tif": (Image.fromarray(np.asarray(grey).astype(np.float32) / 255), {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw", "icc_profile": profile}),
        "webp": (rgb, {"exif": exif}),
        "gif": (rgb.quantize(8), {}),
        "bmp": (rgb, {}),
        "tga": (rgb, {}),
    }
    files = {}
    for name, (image, options) in pictures.items():
        stream = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name.rsplit(".")[-1], name.rsplit(".")[-1].upper())
        image.save(stream, kind, **options)
        files[name] = stream.getvalue()
    return files


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(out), 200) if rng.random() < 0.5 else len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\x01\0\0")
            )
        elif kind == 2:
            del out[at : at + rng.randint(1, 40)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randint(1, 20))
        else:
            del out[rng.randrange(1, len(out) + 1) :]
        if not out:
            return b""
    return bytes(out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", seeds())
def test_damaged_pictures(tmp_path: Path, name: str) -> None:
    data, rng = seeds()[name], random.Random(name)
    path = tmp_path / f"a.{name}"
    end = time.perf_counter() + BUDGET / len(seeds())
    runs, opened, slowest = 0, 0, 0.0
    while time.perf_counter() < end:
        path.write_bytes(mutated(data, rng))
        before = time.process_time()
        try:
            image = open_photo(path)
            assert image.mode in ("RGB", "RGBA") and max(image.size) <= 4096
            opened += 1
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        slowest = max(slowest, time.process_time() - before)
        runs += 1
    print(f"{name}: {runs} runs, {opened} opened, slowest {slowest:.2f} s")
    assert runs > 50 and slowest < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB
