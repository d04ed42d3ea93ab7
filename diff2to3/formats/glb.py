""".glb with KHR_gaussian_splatting: a glTF mesh primitive of points whose attributes are the Gaussians.

    POSITION, KHR_gaussian_splatting:ROTATION (unit xyzw), :SCALE and :OPACITY (linear),
    :SH_DEGREE_n_COEF_m (three channels), and COLOR_0 for viewers that know only points (decoded to linear)

y is up. Metadata travels in ``asset.extras``. Source: the extension's text in KhronosGroup/glTF.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diff2to3.formats.arrays import SH_REST, Arrays, arrays_of, gaussians_of, need, parse_json, quantise
from diff2to3.gaussians.turn import turned
from diff2to3.types import Gaussians

EXTENSION = "KHR_gaussian_splatting"
EXTRAS = "diff2to3"
MAGIC, JSON_CHUNK, BIN_CHUNK = 0x46546C67, 0x4E4F534A, 0x004E4942
#: glTF's component types, and what its normalised integers are divided by.
TYPES = {5120: ("<i1", 127), 5121: ("<u1", 255), 5122: ("<i2", 32767), 5123: ("<u2", 65535),
         5125: ("<u4", 2**32 - 1), 5126: ("<f4", 0)}  # fmt: skip
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
MAX_DEPTH = 256


def write(gaussians: Gaussians, metadata: Mapping[str, Any]) -> bytes:
    a = arrays_of(gaussians)
    colors = quantise(np.concatenate((linear(a.colors.clip(0, 1)), a.opacities[:, None]), 1), 255)
    attributes: dict[str, np.ndarray] = {
        "POSITION": a.means.astype("<f4"),
        "COLOR_0": colors.astype("<u1"),
        f"{EXTENSION}:ROTATION": a.quats[:, [1, 2, 3, 0]].astype("<f4"),
        f"{EXTENSION}:SCALE": a.scales.astype("<f4"),
        f"{EXTENSION}:OPACITY": a.opacities.astype("<f4"),
    }
    for degree in range(a.degree + 1):
        for i in range(2 * degree + 1):
            attributes[f"{EXTENSION}:SH_DEGREE_{degree}_COEF_{i}"] = a.sh[:, degree**2 + i].astype("<f4")
    views: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []
    blob = b""
    for values in attributes.values():
        data = values.tobytes()
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(data), "target": 34962})
        bytes_only = values.dtype.itemsize == 1
        kind = {"SCALAR": 1} if values.ndim == 1 else {f"VEC{values.shape[1]}": 1}
        accessors.append(
            {
                "bufferView": len(accessors),
                "componentType": 5121 if bytes_only else 5126,
                "count": len(a),
                "type": next(iter(kind)),
                **({"normalized": True} if bytes_only else {}),
            }
        )
        blob += data + bytes(-len(data) % 4)
    need(len(a) > 0, "glb", "no Gaussians; glTF has no empty meshes")
    position = attributes["POSITION"]
    accessors[0] |= {"min": position.min(0).tolist(), "max": position.max(0).tolist()}
    splats = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display", "sortingMethod": "cameraDistance",
              "projection": "perspective"}  # fmt: skip
    primitive = {
        "attributes": {name: i for i, name in enumerate(attributes)},
        "mode": 0,
        "extensions": {EXTENSION: splats},
    }
    document = {
        "asset": {"version": "2.0", "generator": "diff2to3", "extras": {EXTRAS: dict(metadata)}},
        "extensionsUsed": [EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "buffers": [{"byteLength": len(blob)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    return container(document, blob)


def container(document: Mapping[str, Any], blob: bytes) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(blob)
    head = struct.pack("<III", MAGIC, 2, total) + struct.pack("<II", len(text), JSON_CHUNK)
    return head + text + struct.pack("<II", len(blob), BIN_CHUNK) + blob


def linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB-encoded [0, 1] to linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def read(data: bytes, name: str) -> tuple[Gaussians, dict[str, Any]]:
    document, blob = parse_container(data, name)
    found: list[Gaussians] = []
    notes: list[str] = []
    for mesh, matrix in placed_meshes(document, name):
        for primitive in items(mesh, "primitives"):
            extensions = primitive.get("extensions")
            if not isinstance(extensions, dict) or EXTENSION not in extensions:
                continue
            gaussians, more = primitive_gaussians(document, blob, primitive, name)
            found.append(moved(gaussians, matrix, name))
            notes += more
    need(bool(found), name, f"no mesh with the extension {EXTENSION}: a .glb without 3D Gaussians")
    need(len({g.sh.shape[1] for g in found}) == 1, name, "meshes whose spherical harmonics differ in degree")
    asset = document.get("asset")
    extras = asset.get("extras") if isinstance(asset, dict) else None
    note = extras.get(EXTRAS) if isinstance(extras, dict) else None
    metadata = dict(note) if isinstance(note, dict) else {}
    return Gaussians.cat(found), {**metadata, **({"notes": notes} if notes else {})}


def parse_container(data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    need(len(data) >= 20 and data[:4] == b"glTF", name, "not a .glb file")
    _, version, total, length, kind = struct.unpack_from("<IIIII", data)
    need(version == 2, name, f"glTF version {version}; this program reads 2")
    need(kind == JSON_CHUNK and total <= len(data) and 20 + length <= total, name, "truncated or damaged")
    document = parse_json(name, "its description", data[20 : 20 + length])
    need(isinstance(document, dict), name, "its description is no object; the file is damaged")
    at = 20 + length + -length % 4
    if at + 8 > total:
        return document, b""
    size, kind = struct.unpack_from("<II", data, at)
    need(kind == BIN_CHUNK and at + 8 + size <= total, name, "truncated or damaged")
    return document, data[at + 8 : at + 8 + size]


def items(holder: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects of the document; what is none counts as absent."""
    values = holder.get(key)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def item(document: Mapping[str, Any], key: str, index: Any, name: str) -> dict[str, Any]:
    values: Any = document.get(key)
    ok = isinstance(values, list) and type(index) is int and 0 <= index < len(values)
    need(
        ok and isinstance(values[index], dict), name, f"{key}[{index!r}] does not exist; the file is damaged"
    )
    return dict(values[index])


def placed_meshes(document: Mapping[str, Any], name: str) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Meshes with the matrix [4, 4] that puts each into the scene; all meshes, unmoved, where there is no scene."""
    nodes = document.get("nodes")
    scenes = items(document, "scenes")
    number = document.get("scene", 0)
    if not isinstance(nodes, list) or not scenes:
        return [(mesh, np.eye(4)) for mesh in items(document, "meshes")]
    scene = scenes[number] if type(number) is int and 0 <= number < len(scenes) else scenes[0]
    roots = scene.get("nodes")
    todo = [(index, np.eye(4), 0) for index in (roots if isinstance(roots, list) else [])]
    found, visits = [], 0
    while todo:
        index, above, depth = todo.pop()
        visits += 1
        need(depth < MAX_DEPTH and visits <= len(nodes), name, "its nodes form a circle; the file is damaged")
        node = item(document, "nodes", index, name)
        matrix = above @ node_matrix(node, name)
        if "mesh" in node:
            found.append((item(document, "meshes", node["mesh"], name), matrix))
        children = node.get("children")
        todo += [(child, matrix, depth + 1) for child in (children if isinstance(children, list) else [])]
    return found


def node_matrix(node: Mapping[str, Any], name: str) -> np.ndarray:
    def numbers(key: str, default: list[float]) -> np.ndarray:
        try:
            values = np.array(node.get(key, default), dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            values = np.zeros(0)
        need(
            values.shape == (len(default),) and bool(np.isfinite(values).all()),
            name,
            f"a node's {key} is damaged",
        )
        return values

    if "matrix" in node:
        return np.asarray(numbers("matrix", [0.0] * 16).reshape(4, 4).T)
    x, y, z, w = numbers("rotation", [0.0, 0, 0, 1])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * numbers("scale", [1.0, 1, 1])
    matrix[:3, 3] = numbers("translation", [0.0, 0, 0])
    return matrix


def moved(gaussians: Gaussians, matrix: np.ndarray, name: str) -> Gaussians:
    """Gaussians under a rotation, a uniform scale and a shift. InputError under anything else."""
    if np.array_equal(matrix, np.eye(4)):
        return gaussians
    linear_part, shift = matrix[:3, :3], matrix[:3, 3]
    determinant = float(np.linalg.det(linear_part))
    scale = math.copysign(abs(determinant) ** (1 / 3), determinant)
    rotation = linear_part / scale if scale else linear_part
    rigid = scale > 1e-12 and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3)
    need(
        rigid and bool(np.isfinite(matrix).all()),
        name,
        "a node stretches or mirrors its Gaussians; apply its transform first",
    )
    r = turned(gaussians, torch.from_numpy(rotation))
    means = (r.means.double() * scale + torch.from_numpy(shift)).float()
    scales = (r.scales.double() * scale).float()
    ok = bool(means.isfinite().all() and scales.isfinite().all())
    need(ok, name, "a node moves its Gaussians out of all bounds")
    return Gaussians(means, r.quats, scales, r.opacities, r.sh)


def primitive_gaussians(
    document: Mapping[str, Any], blob: bytes, primitive: Mapping[str, Any], name: str
) -> tuple[Gaussians, list[str]]:
    given = primitive.get("attributes")
    attributes: dict[str, Any] = given if isinstance(given, dict) else {}

    def values(attribute: str, kind: str) -> np.ndarray:
        key = attribute if attribute == "POSITION" else f"{EXTENSION}:{attribute}"
        need(key in attributes, name, f"its Gaussians have no attribute {key}")
        return accessor(document, blob, attributes[key], kind, name)

    splats = primitive["extensions"][EXTENSION]
    space = splats.get("colorSpace", "srgb_rec709_display") if isinstance(splats, dict) else None
    need(space == "srgb_rec709_display", name, f"colours in {space!r}; only srgb_rec709_display is known")
    means = values("POSITION", "VEC3")
    degree = 0
    while degree < 3 and f"{EXTENSION}:SH_DEGREE_{degree + 1}_COEF_0" in attributes:
        degree += 1
    sh = [values(f"SH_DEGREE_{n}_COEF_{i}", "VEC3") for n in range(degree + 1) for i in range(2 * n + 1)]
    assert len(sh) == 1 + SH_REST[degree]
    parts = (
        values("ROTATION", "VEC4")[:, [3, 0, 1, 2]],
        values("SCALE", "VEC3"),
        values("OPACITY", "SCALAR")[:, 0],
    )
    need(
        len({len(x) for x in (means, *parts, *sh)}) == 1,
        name,
        "attributes of different lengths; the file is damaged",
    )
    return gaussians_of(name, Arrays(means, *parts, np.stack(sh, 1)))


def accessor(document: Mapping[str, Any], blob: bytes, index: Any, kind: str, name: str) -> np.ndarray:
    """float64 [count, width]."""
    entry = item(document, "accessors", index, name)
    need("sparse" not in entry, name, "sparse accessors are not supported")
    need(entry.get("type") == kind, name, f"an accessor of {entry.get('type')!r}, expected {kind}")
    need(
        entry.get("componentType") in TYPES, name, f"componentType {entry.get('componentType')!r} is unknown"
    )
    code, divisor = TYPES[entry["componentType"]]
    view = item(document, "bufferViews", entry.get("bufferView"), name)
    need(view.get("buffer", 0) == 0, name, "buffers outside the file are not supported")

    def number(holder: Mapping[str, Any], key: str, default: int | None = None) -> int:
        value: Any = holder.get(key, default)
        need(type(value) is int and 0 <= value < 1 << 40, name, f"{key} is {value!r}; the file is damaged")
        return int(value)

    count, width, size = number(entry, "count"), WIDTHS[kind], np.dtype(code).itemsize
    start = number(view, "byteOffset", 0) + number(entry, "byteOffset", 0)
    stride = number(view, "byteStride", 0) or width * size
    need(stride >= width * size, name, "byteStride is too small; the file is damaged")
    end = start + (count - 1) * stride + width * size if count else start
    need(end <= len(blob), name, f"truncated: an accessor of {count:,} ends at byte {end:,} of {len(blob):,}")
    raw = np.ndarray((count, width), code, blob, start, (stride, size)) if count else np.zeros((0, width))
    with np.errstate(invalid="ignore"):
        values = raw.astype(np.float64)
    if divisor and entry.get("normalized") is True:
        values = (values / divisor).clip(min=-1)
    return values
