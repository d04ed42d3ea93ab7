"""Meshes in PLY files: polygons or triangle strips, colours of vertices or faces, and MeshLab's textures."""

from __future__ import annotations

import numpy as np

from diff2to3.assets.images import TextureBudget
from diff2to3.assets.limits import Limits
from diff2to3.assets.mtl import are_bytes
from diff2to3.assets.parts import NO_MATERIAL, Part, decode_srgb
from diff2to3.assets.ply_file import Element, Header, Ragged, read_header, read_values
from diff2to3.assets.polygons import triangulate
from diff2to3.assets.source import Resolver
from diff2to3.errors import InputError
from diff2to3.types import Material, Texture

_COLOR_NAMES = (("red", "green", "blue", "alpha"), ("r", "g", "b", "a"))
_COLOR_PREFIXES = ("", "diffuse_")
_UV_NAMES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texture_s", "texture_t"))
_INDEX_NAMES = ("vertex_indices", "vertex_index")

Columns = dict[str, np.ndarray | Ragged]


def read_ply(data: bytes, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    """One part a texture, in file coordinates, and notes; see :func:`load_mesh`."""
    header = read_header(data)
    faces, strips = header.element("face"), header.element("tristrips")
    vertex = header.element("vertex")
    if not (faces and faces.count) and not (strips and strips.count):
        holds = "Gaussians" if _names(vertex) >= {"f_dc_0", "opacity"} else "a point cloud"
        raise InputError(f"no triangles: {holds}, not a surface")
    # Vertices are allocated from the header too; more than three a face cannot all be used, where the claim is
    # over the limit.
    claimed = max(faces.count if faces else 0, (vertex.count if vertex else 0) // 3)
    limits.check("triangles", claimed, "max_faces")
    values = read_values(header, {"vertex", "face", "tristrips"})
    vertices, rows = values.get("vertex", {}), values.get("face", {})
    try:
        positions = np.stack([_numbers(vertices, axis) for axis in "xyz"], 1).astype(np.float64)
    except KeyError as error:
        raise InputError(f"the vertices lack the property {error}") from None
    polygons = _polygons(rows, values.get("tristrips", {}))
    num_triangles = int(np.maximum(polygons.sizes - 2, 0).sum())
    limits.check("triangles", num_triangles, "max_faces")
    if num_triangles == 0:
        raise InputError("no triangles: every face has fewer than three corners")
    indices = polygons.values.astype(np.int64)
    if int(indices.min()) < 0 or int(indices.max()) >= len(positions):
        bad = int(indices.min()) if int(indices.min()) < 0 else int(indices.max())
        raise InputError(f"a face refers to vertex {bad} of {len(positions)}")
    return _parts(header, vertices, rows, positions, Ragged(indices, polygons.sizes), resolve, limits)


def _parts(
    header: Header,
    vertices: Columns,
    rows: Columns,
    positions: np.ndarray,
    polygons: Ragged,
    resolve: Resolver,
    limits: Limits,
) -> tuple[list[Part], list[str]]:
    """Triangles with what their corners have. Corners are welded unless faces have values of their own."""
    corners, owner, num_fans = triangulate(positions[polygons.values], polygons.sizes)
    vertex_of = polygons.values[corners.reshape(-1)]
    notes = []
    if num_fans:
        notes.append(f"{num_fans} polygons that are not convex have too many corners and are drawn as fans")
    colors, face_colors = _colors(header.element("vertex"), vertices), _colors(header.element("face"), rows)
    textures = _textures(header, resolve, limits, notes)
    uvs = _vertex_uvs(vertices) if textures else None
    wedge_uvs = _wedge_uvs(rows, polygons) if textures else None
    if textures and uvs is None and wedge_uvs is None:
        textures, notes = [], [*notes, "a texture is named and no vertex has texture coordinates"]
    faces, normals = vertex_of.reshape(-1, 3), _normals(vertices)
    by_face = colors is None and face_colors is not None and len(face_colors) == int(owner.max()) + 1
    if wedge_uvs is not None or by_face:
        positions = positions[vertex_of]
        normals = None if normals is None else normals[vertex_of]
        colors = None if colors is None else colors[vertex_of]
        if by_face and face_colors is not None:
            colors = np.repeat(face_colors[owner], 3, axis=0)
        uvs = uvs[vertex_of] if uvs is not None else None
        uvs = wedge_uvs[corners.reshape(-1)] if wedge_uvs is not None else uvs
        faces = np.arange(len(vertex_of)).reshape(-1, 3)
    number = np.zeros(len(faces), np.int64)
    if len(textures) > 1 and isinstance(rows.get("texnumber"), np.ndarray):
        number = np.clip(_numbers(rows, "texnumber").astype(np.int64)[owner], 0, len(textures) - 1)
    plain = NO_MATERIAL if colors is None and not textures else (1.0, 1.0, 1.0, 1.0)
    parts = []
    for n in np.unique(number):
        texture = textures[n] if textures else None
        material = Material("", plain, texture, double_sided=True)
        parts.append(Part(positions, faces[number == n], material, normals, uvs, colors))
    return parts, notes


def _polygons(rows: Columns, strips: Columns) -> Ragged:
    """Vertex indices of faces, or of strips as triangles that all wind alike."""
    lists = {name: found for name, found in rows.items() if isinstance(found, Ragged)}
    for name in (*_INDEX_NAMES, *lists):
        if name in lists and (name in _INDEX_NAMES or lists[name].values.dtype.kind in "iu"):
            return lists[name]
    for found in strips.values():
        if isinstance(found, Ragged):
            return _unroll(found)
    raise InputError("the faces have no list of vertex_indices")


def _unroll(strips: Ragged) -> Ragged:
    indices = strips.values.astype(np.int64)
    ends = np.cumsum(strips.sizes)
    triangles: list[np.ndarray] = []
    for start, end in zip(ends - strips.sizes, ends, strict=True):
        row = indices[start:end]
        for strip in np.split(row, np.flatnonzero(row < 0)):  # -1 starts a new strip
            strip = strip[strip >= 0]
            if len(strip) > 2:
                triple = np.stack([strip[:-2], strip[1:-1], strip[2:]], 1)
                triple[1::2, :2] = triple[1::2, 1::-1]
                triangles.append(triple)
    flat = np.concatenate(triangles).reshape(-1) if triangles else np.zeros(0, np.int64)
    return Ragged(flat, np.full(len(flat) // 3, 3, np.int64))


def _colors(element: Element | None, rows: Columns) -> np.ndarray | None:
    """Linear RGBA [n, 4] of sRGB-encoded colours. Integers count to their type's top, floats to 1 (or 255)."""
    types = {p.name: p.dtype for p in element.properties} if element else {}
    for prefix in _COLOR_PREFIXES:
        for names in _COLOR_NAMES:
            named = [prefix + name for name in names]
            if all(isinstance(rows.get(name), np.ndarray) for name in named[:3]):
                found = [_unit(_numbers(rows, name), types[name]) for name in named if name in rows]
                rgba = np.stack([*found, np.ones_like(found[0])][:4], 1)
                return np.concatenate([decode_srgb(rgba[:, :3]), rgba[:, 3:]], 1).astype(np.float32)
    return None


def _unit(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "iu":
        top = 255 if dtype.itemsize > 2 else np.iinfo(dtype).max
    else:
        top = 255 if are_bytes(values) else 1
    return np.clip(values.astype(np.float64) / top, 0, 1)


def _normals(vertices: Columns) -> np.ndarray | None:
    if not all(isinstance(vertices.get(name), np.ndarray) for name in ("nx", "ny", "nz")):
        return None
    return np.stack([_numbers(vertices, name) for name in ("nx", "ny", "nz")], 1).astype(np.float64)


def _vertex_uvs(vertices: Columns) -> np.ndarray | None:
    for u, v in _UV_NAMES:
        if isinstance(vertices.get(u), np.ndarray) and isinstance(vertices.get(v), np.ndarray):
            return _flipped(np.stack([_numbers(vertices, u), _numbers(vertices, v)], 1))
    return None


def _wedge_uvs(rows: Columns, polygons: Ragged) -> np.ndarray | None:
    """Texture coordinates of every corner, float32 [C, 2], where each face has a list of them."""
    found = rows.get("texcoord")
    if not isinstance(found, Ragged) or not (found.sizes == 2 * polygons.sizes).all():
        return None
    return _flipped(found.values.reshape(-1, 2))


def _flipped(uvs: np.ndarray) -> np.ndarray:
    """PLY's v points up."""
    return np.stack([uvs[:, 0], 1 - uvs[:, 1]], 1).astype(np.float32)


def _textures(header: Header, resolve: Resolver, limits: Limits, notes: list[str]) -> list[Texture]:
    """The images that MeshLab's comments name, each read from beside the file."""
    budget, found = TextureBudget(limits), []
    for comment in header.comments:
        words = comment.split(None, 1)
        if len(words) == 2 and words[0].lower() == "texturefile":
            try:
                path, data = resolve.find(words[1])
            except InputError as error:
                notes.append(f"texture not found, drawn grey: {error}")
                return []
            found.append(Texture(budget.decode(data, path)))
    notes += budget.notes
    return found


def _numbers(columns: Columns, name: str) -> np.ndarray:
    found = columns[name]
    if isinstance(found, Ragged):
        raise KeyError(name)
    return found


def _names(element: Element | None) -> set[str]:
    return {p.name for p in element.properties} if element else set()
