"""The PLY container: a header that names elements and their properties, then their values as text or binary.

Read here because trimesh takes binary faces of mixed sizes for triangles when their total size happens to fit, and
fails on blank lines. plyfile, which reads them, is under the GPL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from diff2to3.errors import InputError
from diff2to3.files import utf8

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "long": "i8", "int64": "i8",
    "ulong": "u8", "uint64": "u8", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass(frozen=True)
class Property:
    """A value of each row of an element; a list of them where ``count`` is the dtype of its length."""

    name: str
    dtype: np.dtype
    count: np.dtype | None = None


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths, one after the other: ``values`` [sum of sizes], ``sizes`` int64 [rows]."""

    values: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Element:
    """One kind of row: its properties in file order."""

    name: str
    count: int
    properties: list[Property] = field(default_factory=list)


@dataclass(frozen=True)
class Header:
    """What a file says that it holds. ``body`` is where the values start in ``data``, which is without a mark."""

    data: bytes
    body: int
    order: str
    elements: list[Element]
    comments: list[str]

    def element(self, name: str) -> Element | None:
        return next((element for element in self.elements if element.name == name), None)


#: {element: {property: values of its rows}}
Values = dict[str, dict[str, np.ndarray | Ragged]]


def read_header(data: bytes) -> Header:
    """Raises InputError for what is no PLY, and for types and formats that the format does not have."""
    data = utf8(data)
    end = re.search(rb"(?m)^[ \t]*end_header[ \t]*(\r\n|\n|\r|\Z)", data[: 1 << 20].replace(b"\r", b"\n"))
    if data[:3] != b"ply" or end is None:
        raise InputError("not a PLY file: no header")
    body = end.end()
    # A line may end in both marks, even where the header's others do not; in a header of bare returns it does not,
    # and what looks like the second is the first value.
    if data[body - 1 : body + 1] == b"\r\n" and not (data[3:4] == b"\r" and data[4:5] != b"\n"):
        body += 1
    order, elements, comments = None, [], []
    for line in data[3 : end.start()].replace(b"\r", b"\n").split(b"\n"):
        words = line.decode("utf-8", "replace").split()
        if words[:1] == ["format"] and len(words) > 1:
            order = _FORMATS.get(words[1])
        elif words[:1] == ["comment"]:
            comments.append(line.decode("utf-8", "replace").strip()[len("comment") :].strip())
        elif words[:1] == ["element"]:
            if len(words) != 3 or not words[2].isdigit():
                raise InputError(f"damaged PLY header: {' '.join(words)[:80]!r}")
            elements.append(Element(words[1], int(words[2])))
        elif words[:1] == ["property"]:
            if not elements:
                raise InputError("damaged PLY header: a property before the first element")
            elements[-1].properties.append(_property(words, order or ""))
    if order is None:
        raise InputError("not a PLY file: its format is none of " + ", ".join(_FORMATS))
    return Header(data, body, order, elements, comments)


def _property(words: list[str], order: str) -> Property:
    try:
        if words[1] == "list":
            count = np.dtype(order + _TYPES[words[2]])
            if count.kind == "f":
                raise KeyError
            return Property(words[4], np.dtype(order + _TYPES[words[3]]), count)
        return Property(words[2], np.dtype(order + _TYPES[words[1]]))
    except (KeyError, IndexError):
        raise InputError(f"damaged PLY header: {' '.join(words)[:80]!r}") from None


def read_values(header: Header, wanted: set[str]) -> Values:
    """The rows of the elements ``wanted``; what comes after the last of them is not looked at."""
    last = max((i for i, e in enumerate(header.elements) if e.name in wanted), default=-1)
    reader = _TextReader(header) if header.order == "" else _BinaryReader(header)
    values: Values = {}
    for element in header.elements[: last + 1]:
        found = reader.read(element) if element.properties and element.count else {}
        if element.name in wanted:
            values[element.name] = found
    return values


class _BinaryReader:
    def __init__(self, header: Header) -> None:
        self._bytes, self._order = header.data, header.order
        self._data = np.frombuffer(header.data, np.uint8)
        self._at = header.body

    def read(self, element: Element) -> dict[str, np.ndarray | Ragged]:
        lists = [p for p in element.properties if p.count is not None]
        sizes = self._first_sizes(element) if lists else []
        row = _row_type(element, sizes)
        if self._at + row.itemsize * element.count <= len(self._data):
            rows = np.ndarray((element.count,), row, self._data, self._at)
            if all((rows[f"{i} size"] == sizes[i]).all() for i in range(len(lists))):
                self._at += row.itemsize * element.count
                return _columns(element, rows)
        elif not lists:
            self._truncated(element)
        return self._read_mixed(element)

    def _first_sizes(self, element: Element) -> list[int]:
        sizes, at = [], self._at
        for p in element.properties:
            if p.count is not None:
                sizes.append(self._size(at, p.count, element))
                at += p.count.itemsize + sizes[-1] * p.dtype.itemsize
            else:
                at += p.dtype.itemsize
        return sizes

    def _size(self, at: int, dtype: np.dtype, element: Element) -> int:
        if at + dtype.itemsize > len(self._data):
            self._truncated(element)
        size = int(self._data[at : at + dtype.itemsize].view(dtype)[0])
        if not 0 <= size <= len(self._data):
            raise InputError(f"damaged PLY: a list of {size} in the element {element.name}")
        return size

    def _read_mixed(self, element: Element) -> dict[str, np.ndarray | Ragged]:
        """Rows of different lengths: one pass to find where each value starts, then one gather a length."""
        if element.count > len(self._data):
            self._truncated(element)
        starts = np.empty((element.count, len(element.properties)), np.int64)
        sizes = np.ones_like(starts)
        at, raw = self._at, self._bytes
        order: Literal["big", "little"] = "big" if self._order == ">" else "little"
        for row in range(element.count):
            for column, p in enumerate(element.properties):
                if p.count is not None:
                    width = p.count.itemsize
                    size = int.from_bytes(raw[at : at + width], order, signed=p.count.kind == "i")
                    if size < 0 or at + width > len(raw):
                        raise InputError(f"damaged or truncated PLY: a list in the element {element.name}")
                    at += width
                    sizes[row, column] = size
                else:
                    size = 1
                starts[row, column] = at
                at += size * p.dtype.itemsize
            if at > len(raw):
                self._truncated(element)
        self._at = at
        found: dict[str, np.ndarray | Ragged] = {}
        for column, p in enumerate(element.properties):
            values = _gather(self._data, starts[:, column], sizes[:, column], p.dtype)
            found[p.name] = values if p.count is None else Ragged(values, sizes[:, column])
        return found

    def _truncated(self, element: Element) -> None:
        raise InputError(f"truncated PLY: it ends within its {element.count:,} rows of {element.name}")


def _gather(data: np.ndarray, starts: np.ndarray, sizes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values of type ``dtype`` at bytes ``starts``, ``sizes`` of each, one after the other."""
    firsts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), dtype)
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        if size:
            where = starts[rows, None] + np.arange(size * dtype.itemsize)
            found = np.ascontiguousarray(data[where]).view(dtype)
            out[(firsts[rows, None] + np.arange(size)).reshape(-1)] = found.reshape(-1)
    return out


def _row_type(element: Element, sizes: list[int]) -> np.dtype:
    """A row whose lists have ``sizes``; fields are called by their place, for names may repeat."""
    fields: list[Any] = []
    lengths = iter(sizes)
    number = 0
    for place, p in enumerate(element.properties):
        if p.count is None:
            fields.append((f"{place}", p.dtype))
        else:
            fields += [(f"{number} size", p.count), (f"{place}", (p.dtype, (next(lengths),)))]
            number += 1
    return np.dtype(fields)


def _columns(element: Element, rows: np.ndarray) -> dict[str, np.ndarray | Ragged]:
    found: dict[str, np.ndarray | Ragged] = {}
    for place, p in enumerate(element.properties):
        column = rows[f"{place}"]
        if p.count is None:
            found[p.name] = column
        else:
            found[p.name] = Ragged(column.reshape(-1), np.full(len(rows), column.shape[1], np.int64))
    return found


class _TextReader:
    """A row is a line, and what a line has beyond its properties does not count. Blank lines do no harm. Where there
    are too few lines, or one is too short, rows are taken from word to word, wherever lines end."""

    def __init__(self, header: Header) -> None:
        self._lines = [
            line for line in header.data[header.body :].splitlines() if line and not line.isspace()
        ]
        self._words: list[bytes] | None = None

    def read(self, element: Element) -> dict[str, np.ndarray | Ragged]:
        if self._words is None and element.count <= len(self._lines):
            rows = [line.split() for line in self._lines[: element.count]]
            ends = np.cumsum([len(row) for row in rows])
            numbers = _floats([word for row in rows for word in row])
            found = _split_rows(element, numbers, ends - [len(row) for row in rows], ends)
            if found is not None:
                del self._lines[: element.count]
                return found
        if self._words is None:
            self._words = b"\n".join(self._lines).split()
        starts = self._starts(element, self._words)
        numbers = _floats(self._words[: starts[-1]])
        found = _split_rows(element, numbers, starts[:-1], starts[1:])
        if found is None:
            raise InputError(f"damaged PLY: a list of negative length in the element {element.name}")
        del self._words[: starts[-1]]
        return found

    def _starts(self, element: Element, words: list[bytes]) -> np.ndarray:
        """Where each row starts among the words, and where the last ends: int64 [rows + 1]."""
        kinds = [p.count is not None for p in element.properties]
        if element.count * len(kinds) > len(words):
            self._truncated(element)
        at, found = 0, [0]
        for _ in range(element.count):
            for is_list in kinds:
                if at >= len(words):
                    self._truncated(element)
                at += 1 + max(int(_floats([words[at]])[0]), 0) if is_list else 1
            found.append(at)
        if at > len(words):
            self._truncated(element)
        return np.array(found, np.int64)

    def _truncated(self, element: Element) -> None:
        raise InputError(f"truncated PLY: it ends within its {element.count:,} rows of {element.name}")


def _split_rows(
    element: Element, numbers: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> dict[str, np.ndarray | Ragged] | None:
    """Properties of rows that lie at ``starts`` to ``ends`` of ``numbers``; None where one is too short."""
    at = starts.astype(np.int64)
    found: dict[str, np.ndarray | Ragged] = {}
    for p in element.properties:
        if (at >= ends).any():
            return None
        if p.count is None:
            found[p.name] = numbers[at]
            at = at + 1
            continue
        lengths = numbers[at]
        if not ((lengths >= 0) & (at + 1 + lengths <= ends)).all():
            return None
        sizes = lengths.astype(np.int64)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        values = Ragged(numbers[np.repeat(at + 1, sizes) + within], sizes)
        found[p.name] = values
        at = at + 1 + sizes
    return found


def _floats(words: list[bytes]) -> np.ndarray:
    try:
        return np.array(list(map(float, words)))
    except ValueError as error:
        raise InputError(f"damaged PLY: a value is no number ({error})") from None
