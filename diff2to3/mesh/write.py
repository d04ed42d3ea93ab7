"""Meshes as files: .glb, .obj with its material, .stl, .ply."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.formats.glb import container, linear
from diff2to3.mesh.surface import TexturedMesh, vertex_normals

MESH_FORMATS = ("glb", "obj", "stl", "ply")


def write_mesh(path: str | Path, mesh: TexturedMesh) -> list[Path]:
    """Write a mesh by the file's ending; returns all files. glTF is y up, the others keep z up.

    Raises:
        InputError: an unknown ending, or a file that cannot be written.
    """
    path = Path(path)
    kind = check_mesh_name(path)
    contents: dict[Path, bytes] = {}
    if kind == "obj":
        contents = obj_files(path, mesh)
    else:
        contents[path] = {"glb": glb_bytes, "stl": stl_bytes, "ply": ply_bytes}[kind](mesh)
    try:
        for name, content in contents.items():
            write_atomic(name, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written to: {error.strerror or error}") from error
    return list(contents)


def check_mesh_name(path: Path) -> str:
    """The kind of mesh that a file's ending names. InputError for an unknown one."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in MESH_FORMATS:
        raise InputError(f"{path}: unknown kind of mesh; known endings are .{', .'.join(MESH_FORMATS)}")
    return kind


def png(texture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(texture).save(out, "PNG")
    return out.getvalue()


def glb_bytes(mesh: TexturedMesh) -> bytes:
    """A binary glTF whose material is unlit, since the colours hold their light already."""
    x, y, z = mesh.vertices.astype("<f4").T
    positions = np.ascontiguousarray(np.stack((x, z, -y), 1))
    parts: list[tuple[bytes, dict[str, object]]] = [
        (positions.tobytes(), {"componentType": 5126, "count": len(positions), "type": "VEC3",
                               "min": positions.min(0).tolist(), "max": positions.max(0).tolist()}),
        (mesh.faces.astype("<u4").tobytes(), {"componentType": 5125, "count": mesh.faces.size, "type": "SCALAR"}),
    ]  # fmt: skip
    attributes, pictures = {"POSITION": 0}, {}
    material: dict[str, object] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    if mesh.uvs is not None and mesh.texture is not None:
        uvs = np.stack((mesh.uvs[:, 0], 1 - mesh.uvs[:, 1]), 1).astype("<f4")
        attributes["TEXCOORD_0"] = len(parts)
        parts.append((uvs.tobytes(), {"componentType": 5126, "count": len(uvs), "type": "VEC2"}))
        material["baseColorTexture"] = {"index": 0}
        pictures = {
            "images": [{"bufferView": len(parts), "mimeType": "image/png"}],
            "textures": [{"source": 0, "sampler": 0}],
            "samplers": [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}],
        }
    else:
        light = np.round(linear(mesh.colors / 255) * 65535).astype("<u2")
        light = np.concatenate((light, np.full((len(light), 1), 65535, "<u2")), 1)
        attributes["COLOR_0"] = len(parts)
        parts.append(
            (
                light.tobytes(),
                {"componentType": 5123, "normalized": True, "count": len(light), "type": "VEC4"},
            )
        )
    blob, views, accessors = b"", [], []
    for data, accessor in parts:
        target = 34963 if accessor["type"] == "SCALAR" else 34962
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(data), "target": target})
        accessors.append({"bufferView": len(views) - 1, **accessor})
        blob += data + bytes(-len(data) % 4)
    if pictures:
        picture = png(mesh.texture)  # type: ignore[arg-type]
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(picture)})
        blob += picture + bytes(-len(picture) % 4)
    document = {
        "asset": {"version": "2.0", "generator": "diff2to3"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": 1, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": material, "extensions": {"KHR_materials_unlit": {}}}],
        **pictures,
        "buffers": [{"byteLength": len(blob)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    return container(document, blob)


def obj_files(path: Path, mesh: TexturedMesh) -> dict[Path, bytes]:
    """The .obj, and its .mtl and .png where there is a texture; vertex colours behind the positions."""
    files: dict[Path, bytes] = {}
    lines = []
    textured = mesh.uvs is not None and mesh.texture is not None
    if textured:
        picture, library = path.with_suffix(".png"), path.with_suffix(".mtl")
        files[picture] = png(mesh.texture)  # type: ignore[arg-type]
        text = f"newmtl surface\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {picture.name}\n"
        files[library] = text.encode("utf-8")
        lines += [f"mtllib {library.name}", "usemtl surface"]
    for p, c in zip(mesh.vertices.tolist(), (mesh.colors / 255).tolist(), strict=True):
        lines.append("v {:.6f} {:.6f} {:.6f} {:.4f} {:.4f} {:.4f}".format(*p, *c))
    if mesh.uvs is not None:
        lines += [f"vt {u:.6f} {v:.6f}" for u, v in mesh.uvs.tolist()]
    corner = "{0}/{0}" if mesh.uvs is not None else "{0}"
    lines += ["f " + " ".join(corner.format(i + 1) for i in face) for face in mesh.faces.tolist()]
    files[path] = ("\n".join(lines) + "\n").encode("utf-8")
    return files


def stl_bytes(mesh: TexturedMesh) -> bytes:
    """Binary STL: shape only."""
    record = np.zeros(
        len(mesh.faces), np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("zero", "<u2")])
    )
    corners = mesh.vertices[mesh.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    record["normal"] = normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-20)
    record["corners"] = corners
    return b"diff2to3".ljust(80) + struct.pack("<I", len(record)) + record.tobytes()


def ply_bytes(mesh: TexturedMesh) -> bytes:
    """Binary .ply with normals and vertex colours."""
    vertex = np.zeros(
        len(mesh.vertices), np.dtype([("at", "<f4", 3), ("normal", "<f4", 3), ("color", "u1", 3)])
    )
    vertex["at"], vertex["color"] = mesh.vertices, mesh.colors
    vertex["normal"] = vertex_normals(mesh.vertices, mesh.faces)
    face = np.zeros(len(mesh.faces), np.dtype([("n", "u1"), ("i", "<i4", 3)]))
    face["n"], face["i"] = 3, mesh.faces
    names = [f"property float {n}" for n in ("x", "y", "z", "nx", "ny", "nz")]
    names += [f"property uchar {n}" for n in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertex)}", *names,
              f"element face {len(face)}", "property list uchar int vertex_indices", "end_header", ""]  # fmt: skip
    return "\n".join(header).encode("ascii") + vertex.tobytes() + face.tobytes()
