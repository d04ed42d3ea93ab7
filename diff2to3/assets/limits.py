"""What a file from a stranger may cost: sizes that are checked early."""

from __future__ import annotations

from dataclasses import dataclass

from diff2to3.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Upper bounds for one asset. A file beyond one of them is an InputError that names the bound.

    max_file_bytes        size of one file, after unpacking from its zip
    max_faces             triangles after the scene graph is flattened (instances count each time)
    max_nodes             nodes of the scene graph
    max_texture_pixels    width x height of one image as stored
    max_texture_size      larger images are shrunk to this many pixels a side
    max_texture_bytes     all decoded textures together
    """

    max_file_bytes: int = 1 << 30
    max_faces: int = 4_000_000
    max_nodes: int = 100_000
    max_texture_pixels: int = 16384 * 8192
    max_texture_size: int = 2048
    max_texture_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    def check(self, what: str, value: int, bound: str) -> None:
        """Raise InputError when ``value`` of ``what`` is over the limit called ``bound``."""
        limit = getattr(self, bound)
        if value > limit:
            raise InputError(f"{value:,} {what} is over the limit of {limit:,} (raise {bound} to allow it)")
