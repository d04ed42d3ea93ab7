"""The standard 3DGS ``.ply``: one vertex a Gaussian, as written by the original code and read by every
viewer.

    x y z  nx ny nz  f_dc_0..2  f_rest_0..3(K−1)−1  opacity  scale_0..2  rot_0..3

Stored before activation: opacity is a logit, scales are logarithms, rot is a quaternion wxyz (any length),
f_rest holds the higher spherical-harmonic coefficients channel by channel. Normals are zero. Metadata
travels in comment lines (``comment diff2to3 {"frame": …}``), which other programs skip.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.formats import compressed_ply
from diff2to3.formats.comments import COMMENT, comment_line
from diff2to3.types import Gaussians

#: Opacities are kept this far from 0 and 1, so that their logits are finite.
OPACITY_MARGIN = 1e-6
SMALLEST_SCALE = 1e-12
MAX_HEADER = 1 << 16
WORD = re.compile(rb"\s*\S+")

PLY_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
BASE = ("x", "y", "z", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
DC = ("f_dc_0", "f_dc_1", "f_dc_2")


def write_ply(path: str | Path, gaussians: Gaussians, metadata: Mapping[str, Any] | None = None) -> None:
    """Write ``gaussians`` and JSON-serialisable ``metadata``; an existing file is replaced at once or not at
    all.

    Raises:
        ValueError: values that are NaN or infinite.
        OSError: the file cannot be written.
    """
    write_atomic(Path(path), ply_bytes(gaussians, metadata))


def ply_bytes(gaussians: Gaussians, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The file's content."""
    columns = ply_columns(gaussians)
    bad = [name for name, values in columns.items() if not np.isfinite(values).all()]
    if bad:
        raise ValueError(f"gaussians: NaN or infinite values in {', '.join(bad)}")
    header = ["ply", "format binary_little_endian 1.0", comment_line(metadata or {})]
    header += [f"element vertex {len(gaussians)}"]
    header += [f"property float {name}" for name in columns]
    header += ["end_header", ""]
    table = np.stack(list(columns.values()), 1).astype("<f4") if len(gaussians) else np.zeros((0, 1), "<f4")
    return "\n".join(header).encode("ascii") + table.tobytes()


def ply_columns(g: Gaussians) -> dict[str, np.ndarray]:
    """Property name → values [G], in the file's order."""

    def numpy(x: Tensor) -> np.ndarray:
        return x.detach().to("cpu", torch.float64).numpy()

    opacity = numpy(g.opacities).clip(OPACITY_MARGIN, 1 - OPACITY_MARGIN)
    scales = np.log(numpy(g.scales).clip(min=SMALLEST_SCALE))
    num_rest = 3 * (g.sh.shape[1] - 1)
    rest = numpy(g.sh[:, 1:]).transpose(0, 2, 1).reshape(len(g), num_rest)
    columns = dict(zip("xyz", numpy(g.means).T, strict=True))
    columns |= {name: np.zeros(len(g)) for name in ("nx", "ny", "nz")}
    columns |= dict(zip(DC, numpy(g.sh[:, 0]).T, strict=True))
    columns |= {f"f_rest_{i}": rest[:, i] for i in range(num_rest)}
    columns["opacity"] = np.log(opacity) - np.log1p(-opacity)
    columns |= {f"scale_{i}": scales[:, i] for i in range(3)}
    columns |= {f"rot_{i}": values for i, values in enumerate(numpy(g.quats).T)}
    return columns


def read_ply(
    path: str | Path, *, means_dtype: torch.dtype = torch.float32
) -> tuple[Gaussians, dict[str, Any]]:
    """Gaussians and metadata (of files of other programs: {}). Reads binary (both orders) and ASCII files.

    Rows with NaN or infinite values are left out; ``metadata["notes"]``, a list of lines, then says how many. An
    infinite logit or logarithm is no such value where its activation is finite: opacities 0 and 1, scales of 0.

    Args:
        means_dtype: float64 keeps the positions of georeferenced files, which are far from the origin, apart.

    Raises:
        InputError: no such file, not a .ply, not one of 3D Gaussians, truncated, or without a row that can be
            used.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_ply(data, path, means_dtype)


def parse_ply(
    data: bytes, path: Path, means_dtype: torch.dtype = torch.float32
) -> tuple[Gaussians, dict[str, Any]]:
    """The same of a file's content. ``path`` is for messages."""
    header, start = parse_header(path, data)
    columns = read_vertices(path, header, data, start)
    if header.compressed:
        chunks, sh = (element_columns(path, header, data, start, name) for name in ("chunk", "sh"))
        gaussians, lines = compressed_ply.decode(chunks, columns, sh, str(path))
    else:
        gaussians, note = gaussians_from_columns(path, columns, means_dtype)
        lines = [note] if note else []
    return gaussians, {**header.metadata, **({"notes": lines} if lines else {})}


@dataclass
class Element:
    """``properties``: (name, numpy type without byte order), of lists (name, types of the length and of the
    values).
    """

    name: str
    count: int
    properties: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Header:
    """``before`` and ``after``: the elements that come before the vertices, and those that follow."""

    order: str
    before: tuple[Element, ...]
    vertex: Element
    after: tuple[Element, ...]
    metadata: dict[str, Any]

    @property
    def compressed(self) -> bool:
        """PlayCanvas's compressed layout."""
        return any(name == "packed_position" for name, *_ in self.vertex.properties)


def parse_header(path: Path, data: bytes) -> tuple[Header, int]:
    """The header, and where the first element starts."""
    if not data.startswith((b"ply\n", b"ply\r\n")):
        raise InputError(f"{path}: not a .ply file")
    end = data.find(b"end_header", 0, MAX_HEADER)
    newline = data.find(b"\n", end)
    if end < 0 or newline < 0:
        raise InputError(f"{path}: the header has no end; the file is truncated or damaged")
    orders = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "ascii"}
    order, metadata = "", {}
    elements: list[Element] = []
    for line in data[:end].decode("ascii", "replace").splitlines()[1:]:
        words = line.split()
        match words:
            case ["format", name, *_]:
                order = orders.get(name, "")
            case ["comment", tag, *_] if tag == COMMENT:
                metadata = parse_metadata(line.split(COMMENT, 1)[1])
            case ["element", name, count] if count.isdigit() and len(count) < 16:
                elements.append(Element(name, int(count)))
            case ["property", *kinds, name] if elements:
                elements[-1].properties.append((name, *kinds))
    if not order:
        raise InputError(f"{path}: unknown .ply format; expected binary or ascii")
    names = [element.name for element in elements]
    if "vertex" not in names:
        raise InputError(f"{path}: no vertices; it holds the elements {', '.join(names) or 'none'}")
    at = names.index("vertex")
    vertex = elements[at]
    if any(kinds[:1] == ["list"] for _, *kinds in vertex.properties):
        raise InputError(f"{path}: not a .ply of 3D Gaussians: the vertices hold lists")
    for element in elements[: at + 1]:
        element.properties = [typed(path, element.name, *words) for words in element.properties]
    return Header(order, tuple(elements[:at]), vertex, tuple(elements[at + 1 :]), metadata), newline + 1


def typed(path: Path, element: str, name: str, *kinds: str) -> tuple[str, ...]:
    """A property with numpy's names of its types."""
    types = kinds[1:] if kinds[:1] == ("list",) else kinds
    if len(types) != 1 + (kinds[:1] == ("list",)) or any(kind not in PLY_TYPES for kind in types):
        raise InputError(
            f"{path}: unsupported .ply layout: property {name!r} of {element}: {' '.join(kinds)}"
        )
    return (name, *(PLY_TYPES[kind] for kind in types))


def parse_metadata(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def read_vertices(path: Path, header: Header, data: bytes, start: int) -> dict[str, np.ndarray]:
    """Property name → float64 values [G]."""
    names = [name for name, *_ in header.vertex.properties]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a property occurs twice")
    count = header.vertex.count
    if not names:
        raise InputError(f"{path}: the vertices have no properties")
    if header.order == "ascii":
        words = ascii_words(path, header, data[start:])
        if len(words) < count * len(names):
            raise InputError(
                f"{path}: truncated: {count} vertices expected, {len(words) // len(names)} found"
            )
        try:
            table = np.array(words, dtype=np.float64).reshape(count, len(names))
        except ValueError as error:
            raise InputError(f"{path}: a vertex is not a row of numbers") from error
        return {name: table[:, i] for i, name in enumerate(names)}
    for element in header.before:
        start = end_of(path, element, header.order, data, start)
    layout = np.dtype([(name, header.order + kind) for name, kind in header.vertex.properties])
    found = max(len(data) - start, 0) // max(layout.itemsize, 1)
    if found < count or start > len(data):
        raise InputError(f"{path}: truncated: {count} vertices expected, {found} found")
    rows = np.frombuffer(data, layout, count, start)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return {name: rows[name].astype(np.float64) for name in names}


def element_columns(path: Path, header: Header, data: bytes, start: int, name: str) -> dict[str, np.ndarray]:
    """Property name → values of an element of plain numbers in a compressed file; empty where there is none."""
    if header.order == "ascii":
        raise InputError(f"{path}: a compressed splat file as text, which no program writes")
    for element in (*header.before, header.vertex, *header.after):
        if element.name == name:
            if element in header.after:
                element.properties = [typed(path, name, *words) for words in element.properties]
            if any(len(kinds) > 1 for _, *kinds in element.properties):
                raise InputError(f"{path}: the element {name} holds lists; the file is damaged")
            names = [word for word, *_ in element.properties]
            if len(set(names)) < len(names):
                raise InputError(f"{path}: a property of {name} occurs twice")
            if not names:
                raise InputError(f"{path}: the element {name} has no properties; the file is damaged")
            layout = np.dtype([(word, header.order + kind) for word, kind in element.properties])
            if start + layout.itemsize * element.count > len(data):
                raise InputError(f"{path}: truncated in the element {name}")
            rows = np.frombuffer(data, layout, element.count, start)
            with np.errstate(invalid="ignore"):
                return {word: rows[word].astype(np.float64) for word in names}
        if element in header.after:
            element.properties = [typed(path, element.name, *words) for words in element.properties]
        start = end_of(path, element, header.order, data, start)
    return {}


def end_of(path: Path, element: Element, order: str, data: bytes, start: int) -> int:
    """Where a binary element ends that begins at ``start``."""
    if all(len(kinds) == 1 for _, *kinds in element.properties):
        size = sum(np.dtype(kind).itemsize for _, kind in element.properties)
        return start + element.count * size
    for _ in range(element.count):
        for _, *kinds in element.properties:
            length = 1
            if len(kinds) == 2:
                size = np.dtype(kinds[0]).itemsize
                if start + size > len(data):
                    raise InputError(f"{path}: truncated in the element {element.name}")
                length = int(np.frombuffer(data, order + kinds[0], 1, start)[0])
                start += size
            start += max(length, 0) * np.dtype(kinds[-1]).itemsize
    return start


def ascii_words(path: Path, header: Header, text: bytes) -> list[bytes]:
    """The words of the vertices, with none left over: fewer where the file is truncated."""
    at = 0
    for element in header.before:
        if all(len(kinds) == 1 for _, *kinds in element.properties):
            at = after_words(text, at, element.count * len(element.properties))
            continue
        for _ in range(element.count):
            for _, *kinds in element.properties:
                first = at
                at = after_words(text, at, 1)
                if len(kinds) == 2:
                    length = text[first:at].strip()
                    if not length.isdigit():
                        raise InputError(f"{path}: truncated in the element {element.name}")
                    at = after_words(text, at, int(length))
    # a word takes two bytes, which bounds what a lying header can ask for
    wanted = min(header.vertex.count * len(header.vertex.properties), len(text))
    return text[at:].split(None, wanted)[:wanted]


def after_words(text: bytes, at: int, count: int) -> int:
    """Where ``count`` words have ended; the text's end where there are fewer."""
    for _ in range(min(count, len(text))):
        match = WORD.match(text, at)
        if match is None:
            return len(text)
        at = match.end()
    return at


def gaussians_from_columns(
    path: Path, columns: dict[str, np.ndarray], means_dtype: torch.dtype = torch.float32
) -> tuple[Gaussians, str]:
    """The Gaussians of the rows that can be used, and a note where some cannot. InputError where none can."""
    missing = [name for name in (*BASE, *DC) if name not in columns]
    if missing:
        raise InputError(f"{path}: not a .ply of 3D Gaussians: no property {', '.join(missing)}")
    num_rest = sum(name.startswith("f_rest_") for name in columns)
    per_channel = num_rest // 3
    rest_names = [f"f_rest_{i}" for i in range(num_rest)]
    if num_rest not in (0, 9, 24, 45) or any(name not in columns for name in rest_names):
        raise InputError(f"{path}: {num_rest} properties f_rest_*; expected 0, 9, 24 or 45, numbered from 0")

    def stack(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([columns[n] for n in names], -1))

    num = len(columns["x"])
    dc = stack(*DC)[:, None]
    rest = stack(*rest_names).reshape(num, 3, per_channel).transpose(1, 2) if num_rest else dc[:, :0]
    values = (
        stack("x", "y", "z").to(means_dtype),
        stack("rot_0", "rot_1", "rot_2", "rot_3").float(),
        stack("scale_0", "scale_1", "scale_2").exp().float(),
        torch.sigmoid(stack("opacity")[:, 0]).float(),
        torch.cat([dc, rest], 1).float(),
    )
    names = ("positions", "rotations", "scales", "opacities", "colours")
    fine = [value.isfinite().view(num, math.prod(value.shape[1:])).all(1) for value in values]
    keep = torch.stack(fine).all(0)
    if keep.all():
        return Gaussians(*values), ""
    bad = ", ".join(name for name, ok in zip(names, fine, strict=True) if not bool(ok.all()))
    dropped = num - int(keep.sum())
    if dropped == num:
        raise InputError(f"{path}: NaN or infinite {bad} in every one of its {num:,} Gaussians")
    note = f"{path.name}: {dropped:,} of {num:,} Gaussians left out: NaN or infinite {bad}"
    return Gaussians(*(value[keep] for value in values)), note
