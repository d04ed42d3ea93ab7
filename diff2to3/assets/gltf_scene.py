"""The scene of a glTF document as flat triangle parts in world coordinates (y up, as stored)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diff2to3.assets import codecs
from diff2to3.assets.gltf import Gltf, Json
from diff2to3.assets.gltf_materials import MaterialReader
from diff2to3.assets.parts import Part
from diff2to3.errors import InputError

_TRIANGLE_MODES = {4: "triangles", 5: "strip", 6: "fan"}


@dataclass(frozen=True)
class Instance:
    """One drawing of a mesh: the node that holds it and its world matrix (float64 [4, 4])."""

    node: Json
    matrix: np.ndarray


def read_parts(document: Gltf) -> tuple[list[Part], list[str]]:
    """All triangles that the default scene draws, and notes on what is left out.

    Skins are posed by the nodes as they are stored and morph targets by their stored weights; animations are
    not played. Raises InputError when there is nothing to draw or a limit is passed.
    """
    reader, notes = MaterialReader(document), []
    worlds, shown = _world_matrices(document)
    instances = list(_instances(document, {i: m for i, m in worlds.items() if i in shown}))
    num_faces, num_other, num_empty = _count_faces(document, instances)
    document.limits.check("triangles", num_faces, "max_faces")
    if num_faces == 0:
        what = "a point cloud or wireframe, not a surface" if num_other else "an empty scene"
        raise InputError(f"no triangles: {what}")
    if num_other:
        notes.append(f"{num_other} point or line primitives are not drawn")
    if num_empty:
        notes.append(f"{num_empty} primitives without positions are not drawn")
    num_hidden = sum("mesh" in document.nodes[i] for i in worlds.keys() - shown)
    if num_hidden:
        notes.append(f"{num_hidden} meshes on nodes that are not visible are not drawn")
    if document.json.get("animations"):
        notes.append("animations are not played: the asset is posed as its nodes are stored")
    parts = []
    for instance in instances:
        mesh = document.item("meshes", instance.node["mesh"])
        for primitive in mesh.get("primitives", []):
            if primitive.get("mode", 4) in _TRIANGLE_MODES and "POSITION" in primitive.get("attributes", {}):
                parts.append(_read_primitive(document, reader, instance, mesh, primitive, worlds))
    return parts, notes + reader.notes + reader.budget.notes


def _world_matrices(document: Gltf) -> tuple[dict[int, np.ndarray], set[int]]:
    """World matrix of every node that the default scene reaches: {node index: float64 [4, 4]}.

    With the nodes among them that KHR_node_visibility does not hide, themselves or by a parent.
    """
    nodes = document.nodes
    scenes = document.json.get("scenes", [])
    if scenes:
        roots = document.item("scenes", document.json.get("scene", 0)).get("nodes", [])
    else:
        children = {child for node in nodes for child in node.get("children", [])}
        roots = [i for i in range(len(nodes)) if i not in children]
    worlds: dict[int, np.ndarray] = {}
    shown: set[int] = set()
    stack = [(root, np.eye(4), True) for root in dict.fromkeys(roots)]
    while stack:
        index, parent, visible = stack.pop()
        if index in worlds:
            raise InputError(f"nodes[{index}] has two parents or is its own ancestor")
        node = document.item("nodes", index)
        worlds[index] = parent @ _local_matrix(node)
        visible &= bool(node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible", True))
        if visible:
            shown.add(index)
        stack.extend((child, worlds[index], visible) for child in node.get("children", []))
    return worlds, shown


def _local_matrix(node: Json) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    translation, rotation, scale = (
        np.array(node.get(key, default), np.float64)
        for key, default in (("translation", (0, 0, 0)), ("rotation", (0, 0, 0, 1)), ("scale", (1, 1, 1)))
    )
    return compose(translation[None], rotation[None], scale[None])[0]


def compose(translation: np.ndarray, rotation: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[N, 3], xyzw quaternions [N, 4] and [N, 3] -> matrices [N, 4, 4] that scale, then rotate, then move."""
    norm = np.linalg.norm(rotation, axis=-1, keepdims=True)
    x, y, z, w = np.moveaxis(rotation / np.where(norm > 0, norm, 1), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix = np.zeros((len(translation), 4, 4))
    matrix[:, :3, :3] = np.moveaxis(np.array(rows), -1, 0) * scale[:, None, :]
    matrix[:, :3, 3] = translation
    matrix[:, 3, 3] = 1
    return matrix


def _instances(document: Gltf, worlds: dict[int, np.ndarray]) -> Iterator[Instance]:
    num_instances = 0
    for index in sorted(worlds):
        node = document.nodes[index]
        if "mesh" not in node:
            continue
        matrices = [worlds[index]]
        spread = node.get("extensions", {}).get("EXT_mesh_gpu_instancing", {}).get("attributes")
        if spread:
            matrices = list(worlds[index] @ _instancing_matrices(document, spread))
        num_instances += len(matrices)
        document.limits.check("mesh instances", num_instances, "max_nodes")
        for matrix in matrices:
            yield Instance(node, matrix)


def _instancing_matrices(document: Gltf, attributes: Json) -> np.ndarray:
    found = {key: document.accessor(index).astype(np.float64) for key, index in attributes.items()}
    count = len(next(iter(found.values())))
    document.limits.check("mesh instances", count, "max_nodes")
    return compose(
        found.get("TRANSLATION", np.zeros((count, 3))),
        found.get("ROTATION", np.tile([0.0, 0, 0, 1], (count, 1))),
        found.get("SCALE", np.ones((count, 3))),
    )


def _count_faces(document: Gltf, instances: list[Instance]) -> tuple[int, int, int]:
    """(triangles, point and line primitives, primitives without positions), from the accessors' counts: nothing is
    decoded yet."""
    num_faces = num_other = num_empty = 0
    for instance in instances:
        for primitive in document.item("meshes", instance.node["mesh"]).get("primitives", []):
            mode = primitive.get("mode", 4)
            attributes = primitive.get("attributes", {})
            if "POSITION" not in attributes:
                num_empty += 1
                continue
            if mode not in _TRIANGLE_MODES:
                num_other += 1
                continue
            accessor = primitive.get("indices", attributes["POSITION"])
            count = int(document.item("accessors", accessor).get("count", 0))
            num_faces += count // 3 if mode == 4 else max(count - 2, 0)
    return num_faces, num_other, num_empty


def _read_primitive(
    document: Gltf,
    reader: MaterialReader,
    instance: Instance,
    mesh: Json,
    primitive: Json,
    worlds: dict[int, np.ndarray],
) -> Part:
    indices, attributes = _geometry(document, primitive)
    positions = attributes["POSITION"].astype(np.float64)
    normals = attributes["NORMAL"].astype(np.float64) if "NORMAL" in attributes else None
    weights: list[float] = instance.node.get("weights") or mesh.get("weights", [])
    positions, normals = _morph(document, primitive, weights, positions, normals)
    matrices = _pose(document, instance, attributes, len(positions), worlds)
    positions = _transform(matrices, positions)
    if normals is not None:
        normals = _transform_normals(matrices, normals)
    faces = _assemble(indices, primitive.get("mode", 4), len(positions))
    if matrices.ndim == 2 and np.linalg.det(matrices[:3, :3]) < 0:
        faces = faces[:, ::-1]  # a mirroring matrix turns the winding over
    material, uv_map, emissive_map = reader.material(primitive.get("material"))
    uvs = attributes.get(f"TEXCOORD_{uv_map.uv_set}")
    has_texture = material.base_color_texture is not None or material.emissive_texture is not None
    if has_texture and uvs is None:
        reader.notes.append(f"material {material.name!r}: texture without coordinates, read at (0, 0)")
    emissive_uvs = None
    if emissive_map is not None:
        emissive_uvs = attributes.get(f"TEXCOORD_{emissive_map.uv_set}", np.zeros((len(positions), 2)))
    return Part(
        positions=positions,
        faces=faces,
        material=material,
        normals=normals,
        uvs=uv_map.apply(uvs) if has_texture and uvs is not None else None,
        colors=_linear_colors(attributes.get("COLOR_0")),
        emissive_uvs=emissive_map.apply(emissive_uvs) if emissive_map and emissive_uvs is not None else None,
    )


def _geometry(document: Gltf, primitive: Json) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(indices [n], {attribute: [P, k]}), from accessors or from a Draco payload."""
    names: dict[str, int] = primitive["attributes"]
    wanted = {k: v for k, v in names.items() if k.split("_")[0] in _USED_ATTRIBUTES}
    draco = primitive.get("extensions", {}).get("KHR_draco_mesh_compression")
    if draco is not None:
        packed = {k: v for k, v in draco["attributes"].items() if k in wanted}
        payload = document.view_bytes(draco["bufferView"])[0].tobytes()
        indices, raw = codecs.decode_draco(payload, packed)
        document.limits.check("triangles", len(indices) // 3, "max_faces")
        found = {k: document.typed(v, document.item("accessors", wanted[k])) for k, v in raw.items()}
        found |= {k: document.accessor(v) for k, v in wanted.items() if k not in packed}
    else:
        found = {k: document.accessor(v) for k, v in wanted.items()}
        count = len(found["POSITION"])
        indices = document.accessor(primitive["indices"]) if "indices" in primitive else np.arange(count)
    lengths = {k: len(v) for k, v in found.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"vertex attributes differ in length: {lengths}")
    return indices, found


_USED_ATTRIBUTES = ("POSITION", "NORMAL", "TEXCOORD", "COLOR", "JOINTS", "WEIGHTS")


def _assemble(indices: np.ndarray, mode: int, num_vertices: int) -> np.ndarray:
    """int64 [F, 3] from a list, strip or fan of indices."""
    indices = indices.reshape(-1).astype(np.int64)
    if len(indices) and int(indices.max()) >= num_vertices:
        raise InputError(f"vertex index {int(indices.max())} is past the {num_vertices} vertices")
    if mode == 4:
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    count = max(len(indices) - 2, 0)
    steps = np.arange(count)
    if mode == 6:
        return np.stack([indices[1:-1], indices[2:], np.repeat(indices[:1], count)], 1)
    odd = steps % 2  # every other triangle of a strip winds the other way
    return np.stack([indices[steps], indices[steps + 1 + odd], indices[steps + 2 - odd]], 1)


def _morph(
    document: Gltf,
    primitive: Json,
    weights: list[float],
    positions: np.ndarray,
    normals: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    for target, weight in zip(primitive.get("targets", []), weights, strict=False):
        if weight and "POSITION" in target:
            positions = positions + float(weight) * document.accessor(target["POSITION"])
        if weight and "NORMAL" in target and normals is not None:
            normals = normals + float(weight) * document.accessor(target["NORMAL"])
    return positions, normals


def _pose(
    document: Gltf,
    instance: Instance,
    attributes: dict[str, np.ndarray],
    num_vertices: int,
    worlds: dict[int, np.ndarray],
) -> np.ndarray:
    """Object-to-world matrix: [4, 4], or one a vertex [P, 4, 4] under a skin (glTF 2.0 section 3.7.3)."""
    if "skin" not in instance.node or "JOINTS_0" not in attributes:
        return instance.matrix
    skin = document.item("skins", instance.node["skin"])
    missing = [joint for joint in skin["joints"] if joint not in worlds]
    if missing:
        raise InputError(f"skin joints {missing[:5]} are outside the scene")
    joints = np.stack([worlds[joint] for joint in skin["joints"]])
    if "inverseBindMatrices" in skin:
        inverse = document.accessor(skin["inverseBindMatrices"]).astype(np.float64)
        if len(inverse) < len(joints):
            raise InputError(f"{len(inverse)} inverse bind matrices for {len(joints)} joints")
        joints = joints @ inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
    blended, total = np.zeros((num_vertices, 4, 4)), np.zeros(num_vertices)
    for group in range(2):
        if f"JOINTS_{group}" not in attributes or f"WEIGHTS_{group}" not in attributes:
            break
        ids, weights = attributes[f"JOINTS_{group}"], _unit_range(attributes[f"WEIGHTS_{group}"])
        if ids.size and int(ids.max()) >= len(joints):
            raise InputError(f"joint {int(ids.max())} is past the {len(joints)} joints of the skin")
        for column in range(ids.shape[1]):
            blended += joints[ids[:, column]] * weights[:, column, None, None]
            total += weights[:, column]
    blended[total <= 0] = joints[0]  # an unweighted vertex follows the first joint
    return blended / np.where(total > 0, total, 1)[:, None, None]


def _transform(matrices: np.ndarray, points: np.ndarray) -> np.ndarray:
    return _rotate(matrices[..., :3, :3], points) + matrices[..., :3, 3]


def _rotate(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """[3, 3] or [P, 3, 3] times [P, 3], written out: a matrix product's rounding depends on the machine."""
    columns = [matrices[..., :, k] * vectors[:, k, None] for k in range(3)]
    return np.asarray(columns[0] + columns[1] + columns[2])


def _transform_normals(matrices: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Normals follow the cofactor matrix, which unlike the inverse exists for flattening scales too."""
    a = matrices[..., :3, :3]
    cofactor = np.stack(
        [
            np.cross(a[..., 1, :], a[..., 2, :]),
            np.cross(a[..., 2, :], a[..., 0, :]),
            np.cross(a[..., 0, :], a[..., 1, :]),
        ],
        -2,
    )
    cofactor = cofactor * np.sign(np.linalg.det(a))[..., None, None]
    return _rotate(cofactor, normals)


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Weights and colours stored as integers mean [0, 1], even where a file forgets the normalised flag."""
    if values.dtype.kind in "iu":
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    return values


def _linear_colors(colors: np.ndarray | None) -> np.ndarray | None:
    """COLOR_0 (linear, RGB or RGBA) as float32 [P, 4]."""
    if colors is None:
        return None
    colors = _unit_range(colors).astype(np.float32)
    if colors.shape[1] == 3:
        colors = np.concatenate([colors, np.ones((len(colors), 1), np.float32)], 1)
    return np.clip(colors, 0, 1)
