""".sog version 2 of PlayCanvas: a zip of lossless WebP pictures, a pixel a Gaussian, and meta.json.

    means_l, means_u   low and high bytes of 16 bits between mins and maxs of sign(x) ln(1 + |x|)
    quats              three smallest components as bytes, and 252 + the index (wxyz) of the largest
    scales             three indices into 256 logarithms of scales
    sh0                three indices into 256 values of sh_0, and the opacity
    shN_labels         16 bits: which row of shN_centroids; only for higher degrees
    shN_centroids      64 entries a row, indices into 256 values

The 256 values are found by k-means in one dimension. Metadata travels in ``asset`` of meta.json.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features

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
    morton_order,
    need,
    parse_json,
    quantise,
    rest_by_channel,
    rest_from_channels,
)
from diff2to3.types import Gaussians

ENTRIES = 256
EXTRAS = "diff2to3"
#: Centroids a row of the picture that holds those of the higher coefficients, and as many as 16-bit labels reach.
CENTROIDS_PER_ROW, MAX_CENTROIDS = 64, 1 << 16
#: A picture may have this many pixels more for each byte of it than there are Gaussians.
PIXELS_PER_BYTE = 2000
MAX_PIXELS = 1 << 26
MAX_META = 1 << 24


def write(gaussians: Gaussians, metadata: Mapping[str, Any]) -> bytes:
    if not features.check("webp"):
        raise MissingDependencyError("Pillow with WebP", hint="pip install --upgrade pillow")
    a = arrays_of(gaussians)
    need(len(a) > 0, "sog", "no Gaussians; the format has no empty files")
    a = a.take(morton_order(a.means))
    logs = np.sign(a.means) * np.log1p(np.abs(a.means))
    low, high = logs.min(0), logs.max(0)
    means = quantise((logs - low) / np.where(high > low, high - low, 1), 65535)
    which, three = largest_apart(a.quats)
    scale_book, scale_labels = codebook(np.log(a.scales.clip(min=1e-30)))
    color_book, color_labels = codebook(a.sh[:, 0])
    tags = (252 + which)[:, None]
    pictures = {
        "means_l": means & 255,
        "means_u": means >> 8,
        "quats": np.concatenate((quantise(three * SQRT_HALF + 0.5, 255), tags), 1),
        "scales": scale_labels,
        "sh0": np.concatenate((color_labels, quantise(a.opacities, 255)[:, None]), 1),
    }
    width = max(math.ceil(math.sqrt(len(a)) / 4) * 4, 4)
    files = {f"{key}.webp": webp(pixels, width) for key, pixels in pictures.items()}
    meta: dict[str, Any] = {
        "version": 2,
        "asset": {"generator": "diff2to3", EXTRAS: dict(metadata)},
        "count": len(a),
        "means": {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": scale_book, "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": color_book, "files": ["sh0.webp"]},
    }
    if metadata.get("screen_filter") and metadata.get("antialiased", True):
        meta["model"] = "antialiased"
    if a.degree:
        meta["shN"] = write_higher(a, width, files)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for file, content in {**files, "meta.json": json.dumps(meta, separators=(",", ":")).encode()}.items():
            archive.writestr(
                zipfile.ZipInfo(file), content
            )  # without the time: equal Gaussians give equal files
    return out.getvalue()


def write_higher(a: Arrays, width: int, files: dict[str, bytes]) -> dict[str, Any]:
    """Adds the pictures of the higher coefficients; returns their entry of meta.json."""
    rest = rest_by_channel(a.sh)
    centroids, labels = cluster(rest, palette_size(len(a)))
    book, indices = codebook(centroids)
    num = SH_REST[a.degree]
    rows = -(-len(centroids) // CENTROIDS_PER_ROW)
    grid = np.zeros((rows * CENTROIDS_PER_ROW, num, 3), np.int64)
    grid[: len(centroids)] = indices.reshape(len(centroids), 3, num).transpose(0, 2, 1)
    files["shN_centroids.webp"] = webp(grid.reshape(-1, 3), CENTROIDS_PER_ROW * num)
    files["shN_labels.webp"] = webp(np.stack((labels & 255, labels >> 8, 0 * labels), 1), width)
    names = ["shN_centroids.webp", "shN_labels.webp"]
    return {"count": len(centroids), "bands": a.degree, "codebook": book, "files": names}


def palette_size(count: int) -> int:
    """How many different sets of higher coefficients a file of ``count`` Gaussians keeps."""
    return count if count <= 4096 else min(MAX_CENTROIDS, 1 << int(math.log2(count / 4)))


def webp(pixels: np.ndarray, width: int) -> bytes:
    """A lossless picture of [G, 3 or 4] bytes, ``width`` wide, its end filled up with zeros."""
    height = max(-(-len(pixels) // width), 1)
    full = np.zeros((height * width, 4), np.uint8)
    full[:, 3] = 255
    full[: len(pixels), : pixels.shape[1]] = pixels
    if pixels.shape[1] == 4:
        full[len(pixels) :, 3] = 0
    out = io.BytesIO()
    # "exact" keeps the colours of transparent pixels, which are numbers here
    picture = Image.fromarray(full.reshape(height, width, 4))
    picture.save(out, "WEBP", lossless=True, quality=100, method=4, exact=True)
    return out.getvalue()


def codebook(values: np.ndarray, rounds: int = 30) -> tuple[list[float], np.ndarray]:
    """256 values, ascending, and the index of the nearest for each of ``values``: k-means in one dimension.

    Starts from the quantiles of the best quantiser for smooth densities, which are those of the density's cube root;
    each round is exact, since in one dimension the cells are intervals of the sorted values.
    """
    order = np.sort(values, axis=None)
    if len(np.unique(order)) <= ENTRIES:
        book = np.unique(order)
        book = np.concatenate((book, np.full(ENTRIES - len(book), book[-1])))
    else:
        sums = np.concatenate(([0.0], np.cumsum(order)))
        counts, edges = np.histogram(order, 128)
        mass = np.concatenate(([0.0], np.cumsum(np.cbrt(counts))))
        book = np.interp((np.arange(ENTRIES) + 0.5) / ENTRIES * mass[-1], mass, edges)
        for _ in range(rounds):
            ends = np.searchsorted(order, (book[1:] + book[:-1]) / 2)
            first, last = np.concatenate(([0], ends)), np.concatenate((ends, [len(order)]))
            size = last - first
            new = np.where(size > 0, (sums[last] - sums[first]) / np.maximum(size, 1), book)
            if np.array_equal(new, book):
                break
            book = new
    book = book.astype(np.float32).astype(np.float64)
    labels = np.searchsorted((book[1:] + book[:-1]) / 2, values)
    return [float(x) for x in book], labels


def cluster(rows: np.ndarray, size: int, rounds: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """k-means: centroids [size, D] and the label [G] of each row [G, D]; the rows themselves where they are few."""
    if len(rows) <= size:
        return rows, np.arange(len(rows))
    x = torch.from_numpy(rows).float()
    generator = torch.Generator().manual_seed(0)
    centroids = x[torch.randperm(len(x), generator=generator)[:size]].clone()
    labels = torch.zeros(len(x), dtype=torch.int64)
    for turn in range(rounds):
        half = 0.5 * (centroids**2).sum(1)
        for start in range(0, len(x), 4096):
            labels[start : start + 4096] = (half - x[start : start + 4096] @ centroids.T).argmin(1)
        if turn < rounds - 1:
            count = torch.bincount(labels, minlength=size)
            sums = torch.zeros_like(centroids).index_add_(0, labels, x)
            centroids = torch.where(count[:, None] > 0, sums / count[:, None].clamp_min(1), centroids)
    return centroids.double().numpy(), labels.numpy()


def read(data: bytes, name: str) -> tuple[Gaussians, dict[str, Any]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # zipfile raises whatever the damage makes it meet
        raise InputError(f"{name}: not a .sog file, or damaged: {error}") from error
    with archive:
        return Reader(archive, name, len(data)).all()


class Reader:
    """Reads one archive. ``size``: its bytes."""

    def __init__(self, archive: zipfile.ZipFile, name: str, size: int) -> None:
        self.archive, self.name, self.size = archive, name, size

    def file(self, name: str, limit: int) -> bytes:
        """A member's content; InputError where it is missing or larger than its compressed bytes explain."""
        need(name in self.archive.namelist(), self.name, f"no {name!r} in it; the file is damaged")
        info = self.archive.getinfo(name)
        bound = min(limit, MAX_RATIO * self.size)
        need(
            info.file_size <= bound, self.name, f"{name} claims {info.file_size:,} bytes; the file is damaged"
        )
        try:
            with self.archive.open(info) as file:
                return file.read(bound)
        except Exception as error:  # zipfile and its decoders raise whatever the damage makes them meet
            raise InputError(f"{self.name}: {name} in it is damaged: {error}") from error

    def all(self) -> tuple[Gaussians, dict[str, Any]]:
        meta = parse_json(self.name, "meta.json", self.file("meta.json", MAX_META))
        need(isinstance(meta, dict), self.name, "meta.json is no object; the file is damaged")
        need(
            meta.get("version") == 2, self.name, f".sog version {meta.get('version')!r}; this program reads 2"
        )
        count = meta.get("count")
        need(
            type(count) is int and 0 < count <= MAX_PIXELS,
            self.name,
            f"claims {count!r} Gaussians; it is damaged",
        )
        low, high = self.numbers(meta, "means", "mins", 3), self.numbers(meta, "means", "maxs", 3)
        means_l, means_u = (self.pixels(meta, "means", i, count) for i in range(2))
        logs = low + (high - low) * ((means_l | means_u << 8)[:, :3] / 65535)
        quats = self.pixels(meta, "quats", 0, count)
        which = quats[:, 3] - 252
        good = (which >= 0)[:, None]  # the reference gives other tags no rotation
        rotations = largest_back(which.clip(0), (quats[:, :3] / 255 - 0.5) / SQRT_HALF)
        scales = self.look_up(meta, "scales", self.pixels(meta, "scales", 0, count)[:, :3])
        sh0 = self.pixels(meta, "sh0", 0, count)
        dc = self.look_up(meta, "sh0", sh0[:, :3])
        rest = self.higher(meta, count) if isinstance(meta.get("shN"), dict) else np.zeros((count, 0))
        with np.errstate(over="ignore", invalid="ignore"):
            arrays = Arrays(
                np.sign(logs) * np.expm1(np.abs(logs)),
                np.where(good, rotations, np.array([1.0, 0, 0, 0])),
                np.exp(scales),
                sh0[:, 3] / 255,
                rest_from_channels(dc, rest),
            )
            gaussians, notes = gaussians_of(self.name, arrays)
        asset = meta.get("asset")
        note = asset.get(EXTRAS) if isinstance(asset, dict) else None
        metadata = dict(note) if isinstance(note, dict) else {}
        if meta.get("model") == "antialiased":
            metadata.setdefault("antialiased", True)
        return gaussians, {**metadata, **({"notes": notes} if notes else {})}

    def part(self, meta: Mapping[str, Any], key: str) -> dict[str, Any]:
        part = meta.get(key)
        need(isinstance(part, dict), self.name, f"meta.json has no {key}; the file is damaged")
        return part  # type: ignore[return-value]

    def numbers(self, meta: Mapping[str, Any], key: str, field: str, length: int) -> np.ndarray:
        try:
            values = np.array(self.part(meta, key).get(field), dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            values = np.zeros(0)
        need(values.shape == (length,), self.name, f"{key}.{field} of meta.json: expected {length} numbers")
        return values

    def look_up(self, meta: Mapping[str, Any], key: str, labels: np.ndarray) -> np.ndarray:
        return np.asarray(self.numbers(meta, key, "codebook", ENTRIES)[labels])

    def pixels(self, meta: Mapping[str, Any], key: str, number: int, count: int) -> np.ndarray:
        """The first ``count`` pixels [count, 4], int64."""
        picture = self.picture(meta, key, number, count)
        have = picture.shape[0] * picture.shape[1]
        need(
            have >= count,
            self.name,
            f"{key} has {have:,} pixels for {count:,} Gaussians; truncated or damaged",
        )
        return picture.reshape(-1, 4)[:count].astype(np.int64)

    def picture(self, meta: Mapping[str, Any], key: str, number: int, count: int) -> np.ndarray:
        """uint8 [H, W, 4]. Its size is read and judged before its pixels are."""
        names = self.part(meta, key).get("files")
        ok = isinstance(names, list) and len(names) > number and isinstance(names[number], str)
        need(ok, self.name, f"{key}.files of meta.json is damaged")
        data = self.file(names[number], 1 << 31)  # type: ignore[index]
        try:
            with Image.open(io.BytesIO(data), formats=("WEBP", "PNG")) as image:
                width, height = image.size
                bound = min(2 * count + 4096 * CENTROIDS_PER_ROW + PIXELS_PER_BYTE * len(data), MAX_PIXELS)
                need(
                    width * height <= bound, self.name,
                    f"{key} claims {width} × {height} pixels; the file is damaged",
                )  # fmt: skip
                return np.asarray(image.convert("RGBA"))
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.name}: the picture of {key} is damaged: {error}") from error

    def higher(self, meta: Mapping[str, Any], count: int) -> np.ndarray:
        """Higher coefficients [count, 3(K−1)] channel after channel."""
        part = self.part(meta, "shN")
        bands: Any = part.get("bands")
        need(type(bands) is int and 1 <= bands <= 3, self.name, f"shN.bands is {bands!r}; expected 1, 2 or 3")
        num = SH_REST[bands]
        centroids = self.picture(meta, "shN", 0, count)
        wanted = CENTROIDS_PER_ROW * num
        need(
            centroids.shape[1] == wanted,
            self.name,
            f"shN: a picture {centroids.shape[1]} wide, expected {wanted}",
        )
        table = self.look_up(meta, "shN", centroids[..., :3].reshape(-1, num, 3)).transpose(0, 2, 1)
        labels = self.pixels(meta, "shN", 1, count)
        label = labels[:, 0] | labels[:, 1] << 8
        known = label < len(table)  # the reference gives others no higher coefficients
        rest = table[label.clip(0, len(table) - 1)] * known[:, None, None]
        return np.asarray(rest.reshape(count, 3 * num))
