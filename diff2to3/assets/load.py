"""Load one 3D file into a :class:`Mesh`: glTF, OBJ and PLY by readers of our own, STL through trimesh."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diff2to3.assets.gltf import Gltf
from diff2to3.assets.gltf_scene import read_parts
from diff2to3.assets.limits import Limits
from diff2to3.assets.parts import Part, assemble
from diff2to3.assets.source import FileSource, NoFiles, Resolver
from diff2to3.errors import InputError
from diff2to3.types import Mesh

#: File types that are read, and which axis points up in each by convention.
UP_AXIS = {"glb": "y", "gltf": "y", "obj": "y", "ply": "z", "stl": "z"}

#: Less opacity than this shows in no image of eight bits.
_LEAST_ALPHA = 1 / 512

#: What damaged bytes can make a parser raise. Anything else is a bug here and is not caught.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def load_mesh(
    source: str | os.PathLike[str] | FileSource | bytes,
    *,
    name: str | None = None,
    file_type: str | None = None,
    up: str = "auto",
    limits: Limits | None = None,
) -> Mesh:
    """Read a glb, gltf, obj, ply or stl file as one mesh in the object frame (z up, centred, longest side 1).

    source     a path, a :class:`FileSource` (file in a folder or zip), or the bytes of a self-contained file
    name       how errors and the mesh call it; the path where none is given
    file_type  needed for bytes other than glb; otherwise taken from the path's extension
    up         "y", "z", or "auto": y for glTF and OBJ, z for PLY and STL
    limits     what the file may cost; the default :class:`Limits` otherwise

    Raises InputError, which names the asset and the reason, for anything about the file that prevents a mesh,
    and MissingDependencyError when a package that the format needs is not installed.
    """
    limits = limits or Limits()
    resolve: Resolver = NoFiles()
    if isinstance(source, bytes):
        data, label = source, name or "bytes"
        file_type = file_type or ("glb" if source[:4] == b"glTF" else None)
    else:
        where = source if isinstance(source, FileSource) else FileSource.of(source)
        label = name or str(where)
        file_type = file_type or Path(where.member).suffix[1:]
        data, resolve = b"", where.resolver(limits)
    try:
        kind = _checked_type(file_type)
        if not isinstance(source, bytes):
            data = where.read(limits)
        limits.check("bytes", len(data), "max_file_bytes")
        if up not in ("auto", "y", "z"):
            raise ValueError(f"up: expected auto, y or z, got {up!r}")
        with np.errstate(all="ignore"):  # numbers that are not finite are found and reported below
            parts, notes = _READERS[kind](data, kind, resolve, limits)
            mesh = assemble(parts, UP_AXIS[kind] if up == "auto" else up, label, notes)
            _check_visible(mesh)
            return mesh
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(f"{label}: damaged or not a {file_type} file ({reason})") from error


def _check_visible(mesh: Mesh) -> None:
    """InputError for a mesh of which nothing can be seen: its views would be blank."""
    for index in np.unique(mesh.material_ids):
        material = mesh.materials[index]
        if material.alpha_mode == "OPAQUE":
            return
        alpha = material.base_color_factor[3]
        if material.base_color_texture is not None:
            alpha *= float(material.base_color_texture.pixels[..., 3].max()) / 255
        if mesh.colors is not None:
            faces = mesh.faces[mesh.material_ids == index]
            alpha *= float(mesh.colors[faces.reshape(-1), 3].max())
        if alpha >= (material.alpha_cutoff if material.alpha_mode == "MASK" else _LEAST_ALPHA):
            return
    raise InputError("no visible surface: every material is transparent")


def _checked_type(file_type: str | None) -> str:
    kind = (file_type or "").lower().lstrip(".")
    if kind not in UP_AXIS:
        known = ", ".join(UP_AXIS)
        raise InputError(f"files of type {kind or 'unknown'!r} are not read; convert to one of {known}")
    return kind


def _read_gltf(data: bytes, kind: str, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    return read_parts(Gltf(data, resolve, limits))


def _read_obj(data: bytes, kind: str, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    from diff2to3.assets.obj import read_obj

    return read_obj(data, resolve, limits)


def _read_ply(data: bytes, kind: str, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    from diff2to3.assets.ply_mesh import read_ply

    return read_ply(data, resolve, limits)


def _read_stl(data: bytes, kind: str, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    from diff2to3.assets.stl import read_stl

    return read_stl(data, limits)


_READERS: dict[str, Callable[[bytes, str, Resolver, Limits], tuple[list[Part], list[str]]]] = {
    "glb": _read_gltf,
    "gltf": _read_gltf,
    "obj": _read_obj,
    "ply": _read_ply,
    "stl": _read_stl,
}
