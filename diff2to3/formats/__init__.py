"""3D Gaussians as files that open everywhere: one module a format, and a registry over them."""

from diff2to3.formats.frames import FRAMES
from diff2to3.formats.registry import (
    FORMATS,
    WRITABLE,
    Format,
    decode,
    encode,
    find_format,
    format_named,
    read,
    write,
)

__all__ = [
    "FORMATS",
    "FRAMES",
    "WRITABLE",
    "Format",
    "decode",
    "encode",
    "find_format",
    "format_named",
    "read",
    "write",
]
