"""Every file format of 3D Gaussians that this package knows, in one table; reading and writing by a file's ending.

Files are written in the frame that their viewers expect, say so where the format lets them, and are turned back when
they are read, so that in this package everything is z up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.formats import compressed_ply, glb, ksplat, ply, sog, splat, spz
from diff2to3.formats.frames import FRAMES, check_frame, frame_in, into_frame, out_of_frame
from diff2to3.formats.screen_filter import bake
from diff2to3.types import Gaussians

Reader = Callable[..., tuple[Gaussians, dict[str, Any]]]
Writer = Callable[[Gaussians, Mapping[str, Any]], bytes]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    name        as ``--format`` takes it: the ending without its first dot
    label       what people call it
    frame       in which files of it are, where they say nothing else: a name of FRAMES
    read        content and the file's name → Gaussians as they stand in the file, and metadata
    write       Gaussians, already in the file's frame, and metadata → content; None where only reading is provided
    media_type  as servers call it
    """

    name: str
    label: str
    frame: str
    read: Reader
    write: Writer | None
    media_type: str = "application/octet-stream"

    @property
    def ending(self) -> str:
        return f".{self.name}"


def _read_ply(
    data: bytes, name: str, means_dtype: torch.dtype = torch.float32
) -> tuple[Gaussians, dict[str, Any]]:
    return ply.parse_ply(data, Path(name), means_dtype)


#: By name; of endings that end alike the longer comes first.
FORMATS = {
    entry.name: entry
    for entry in (
        Format("compressed.ply", "PlayCanvas compressed .ply", "y-down", _read_ply, compressed_ply.write),
        Format("ply", "3DGS .ply", "y-down", _read_ply, ply.ply_bytes),
        Format("splat", ".splat", "y-down", splat.read, splat.write),
        Format("spz", ".spz (Niantic)", "y-up", spz.read, spz.write),
        Format("sog", ".sog (PlayCanvas)", "y-down", sog.read, sog.write),
        Format(
            "glb", ".glb (glTF, KHR_gaussian_splatting)", "y-up", glb.read, glb.write, "model/gltf-binary"
        ),
        Format("ksplat", ".ksplat", "y-down", ksplat.read, None),
    )
}
WRITABLE = tuple(sorted(name for name, entry in FORMATS.items() if entry.write))


def find_format(path: str | Path) -> Format:
    """The format of a file, by its ending in any case. InputError for an unknown one."""
    name = Path(path).name.lower()
    for entry in FORMATS.values():
        if name.endswith(entry.ending):
            return entry
    known = ", ".join(entry.ending for entry in FORMATS.values())
    raise InputError(f"{path}: unknown kind of 3D Gaussian file; known endings are {known}")


def format_named(name: str) -> Format:
    """A format to write, by its name. InputError where it is unknown or only read."""
    entry = FORMATS.get(name.strip().lower().removeprefix("."))
    if entry is None or entry.write is None:
        raise InputError(f"format: expected one of {', '.join(WRITABLE)}, got {name!r}")
    return entry


def read(
    path: str | Path, frame: str | None = None, *, means_dtype: torch.dtype = torch.float32
) -> tuple[Gaussians, dict[str, Any]]:
    """Gaussians, z up, and metadata of a file; ``metadata["notes"]``, a list of lines, where some were left out.

    Args:
        frame: in which the file is, for files that are not as they say, or do not say and are unusual.
        means_dtype: float64 keeps positions far from the origin apart, where the format (.ply) holds them so.

    Raises:
        InputError: it cannot be read, is of no known kind, or is damaged; the message says which.
    """
    entry = find_format(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return decode(data, entry, str(path), frame, means_dtype=means_dtype)


def decode(
    data: bytes,
    entry: Format,
    name: str,
    frame: str | None = None,
    *,
    means_dtype: torch.dtype = torch.float32,
) -> tuple[Gaussians, dict[str, Any]]:
    """The same of a file's content. ``name`` is for messages."""
    if frame is not None:
        check_frame(frame)
    options = {"means_dtype": means_dtype} if entry.read is _read_ply else {}
    gaussians, metadata = entry.read(data, name, **options)
    gaussians = out_of_frame(gaussians, frame or frame_in(metadata) or entry.frame)
    return gaussians, {**metadata, "frame": FRAMES["native"].text}


def encode(
    gaussians: Gaussians,
    entry: Format,
    metadata: Mapping[str, Any] | None = None,
    *,
    frame: str | None = None,
    bake_filter: bool = False,
) -> bytes:
    """A file's content.

    Args:
        gaussians: z up.
        metadata: what JSON can hold; kept where the format has a place for it.
        frame: "native", "y-down" or "y-up"; by default the one that viewers of the format expect.
        bake_filter: change the Gaussians so that they look right in viewers that blur by 0.3 px² without compensating
            opacities (``screen_filter.bake``).

    Raises:
        InputError: the format cannot hold them, or is only read.
        ValueError: values that are NaN or infinite.
    """
    if entry.write is None:
        raise InputError(f"{entry.ending}: this program reads such files and does not write them")
    note = dict(metadata or {})
    note.pop("notes", None)
    if bake_filter:
        gaussians, baked = bake(gaussians, float(note.get("screen_filter", 0.0)))
        note |= baked
    frame = check_frame(frame or entry.frame)
    return entry.write(into_frame(gaussians, frame), {**note, "frame": FRAMES[frame].text})


def write(
    path: str | Path, gaussians: Gaussians, metadata: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Write a file whose ending says its format; an existing one is replaced at once or not at all. Takes the options
    of ``encode``.

    Raises:
        InputError: as ``encode``; also where the file cannot be written.
    """
    content = encode(gaussians, find_format(path), metadata, **options)
    try:
        write_atomic(Path(path), content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written to: {error.strerror or error}") from error
