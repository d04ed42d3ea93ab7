"""glTF features, one file each, against what the specification says; and real files against trimesh."""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diff2to3.assets import FileSource, Limits, load_mesh
from diff2to3.errors import InputError
from diff2to3.types import Mesh

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
UVS = np.array([[0, 0], [1, 0], [0, 1]], np.float32)


def in_file_frame(mesh: Mesh) -> np.ndarray:
    """Corners of all triangles in the coordinates of the file: [F, 3, 3]."""
    back = np.linalg.inv(mesh.transform)
    return mesh.triangles.astype(np.float64) @ back[:3, :3].T + back[:3, 3]


def same_triangles(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal up to the order of triangles and which corner comes first; winding counts."""

    def key(triangles: np.ndarray) -> np.ndarray:
        rounded = np.round(np.asarray(triangles, np.float64) / tolerance / 10) * 10
        rolled = [min(np.roll(t, -k, 0).tolist() for k in range(3)) for t in rounded]
        return np.array(sorted(rolled)) * tolerance

    assert found.shape == wanted.shape
    np.testing.assert_allclose(key(found), key(wanted), atol=30 * tolerance)


def test_normalised_to_the_object_frame(writer):
    corners = np.array([[1, 2, 3], [5, 2, 3], [1, 10, 5]], np.float32)
    mesh = load_mesh(writer.scene({"mesh": writer.mesh(corners)}).glb(), name="x")
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    np.testing.assert_allclose(high + low, 0, atol=1e-6)
    np.testing.assert_allclose(high - low, [4 / 8, 2 / 8, 1], atol=1e-6)  # x, -z, y of the file
    moved = corners @ mesh.transform[:3, :3].T + mesh.transform[:3, 3]
    same_triangles(mesh.triangles, moved[None])
    assert mesh.name == "x" and mesh.vertices.dtype == np.float32
    # the file's up (y) is our up (z), its front (z) our -y
    np.testing.assert_allclose(mesh.transform[:3, :3] @ [0, 8, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(mesh.transform[:3, :3] @ [0, 0, 8], [0, -1, 0], atol=1e-12)


def test_nested_transforms(writer):
    mesh = writer.mesh()
    child = {"mesh": mesh, "translation": [0, 0, 2], "scale": [1, 3, 1]}
    writer.add("nodes", child)
    half = math.sqrt(0.5)
    root = {"rotation": [0, 0, half, half], "translation": [10, 0, 0], "children": [0]}
    writer.add("nodes", root)
    writer.json["scenes"] = [{"nodes": [1]}]
    # scale y by 3, move by z 2, turn a quarter around z: (x, y) -> (-y, x), move by x 10
    wanted = [[[10, 0, 2], [10, 1, 2], [7, 0, 2]]]
    same_triangles(in_file_frame(load_mesh(writer.glb())), np.array(wanted, float))


def test_matrix_nodes_and_mirroring_keep_faces_outward(writer):
    matrix = np.diag([-2.0, 1, 1, 1])
    matrix[:3, 3] = 4, 5, 6
    normals = np.tile(np.array([0, 0, 1], np.float32), (3, 1))
    mesh_id = writer.mesh(attributes={"NORMAL": writer.accessor(normals)})
    mesh = load_mesh(writer.scene({"mesh": mesh_id, "matrix": matrix.T.reshape(-1).tolist()}).glb())
    corners = in_file_frame(mesh)[0]
    facing = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    assert facing[2] > 0
    np.testing.assert_allclose(mesh.normals, [[0, -1, 0]] * 3, atol=1e-6)  # the file's +z


def test_normals_follow_the_inverse_transpose(writer):
    normal = np.array([1, 1, 0], np.float32) / np.sqrt(2).astype(np.float32)
    mesh_id = writer.mesh(attributes={"NORMAL": writer.accessor(np.tile(normal, (3, 1)).astype("f4"))})
    mesh = load_mesh(writer.scene({"mesh": mesh_id, "scale": [1, 4, 2]}).glb())
    wanted = np.array([1, 1 / 4, 0]) / np.linalg.norm([1, 1 / 4, 0])  # then x, -z, y
    np.testing.assert_allclose(mesh.normals, np.tile(wanted[[0, 2, 1]], (3, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "indices", "faces"),
    [
        (4, [0, 1, 2, 0, 2, 3], [[0, 1, 2], [0, 2, 3]]),
        (5, [0, 1, 2, 3], [[0, 1, 2], [1, 3, 2]]),
        (6, [0, 1, 2, 3], [[0, 1, 2], [0, 2, 3]]),
        (4, None, [[0, 1, 2]]),
    ],
)
def test_primitive_modes(writer, mode, indices, faces):
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
    mesh = load_mesh(writer.scene({"mesh": writer.mesh(corners, indices, mode=mode)}).glb())
    same_triangles(in_file_frame(mesh), corners[np.array(faces)])


def test_sparse_strided_and_quantised_accessors(writer):
    positions = np.zeros(3, [("xyz", "<f4", 3), ("pad", "<f4", 1)])
    positions["xyz"] = TRIANGLE
    view = writer.view(positions.tobytes(), byteStride=16)
    spec = {"bufferView": view, "componentType": 5126, "type": "VEC3", "count": 3}
    indices = writer.view(np.array([1], "u2").tobytes())
    values = writer.view(np.array([[7, 0, 0]], "f4").tobytes())
    spec["sparse"] = {
        "count": 1,
        "indices": {"bufferView": indices, "componentType": 5123},
        "values": {"bufferView": values},
    }
    writer.json["accessors"].append(spec)
    writer.add("meshes", {"primitives": [{"attributes": {"POSITION": 0}}]})
    quantised = np.array([[0, 0, 0], [32767, 0, 0], [0, -32767, 0]], "i2")
    padded = np.zeros((3, 4), "i2")
    padded[:, :3] = quantised
    view = writer.view(padded.tobytes(), byteStride=8)
    writer.json["accessors"].append(
        {"bufferView": view, "componentType": 5122, "type": "VEC3", "count": 3, "normalized": True}
    )
    writer.add("meshes", {"primitives": [{"attributes": {"POSITION": 1}}]})
    writer.json["extensionsRequired"] = ["KHR_mesh_quantization"]
    mesh = load_mesh(writer.scene({"mesh": 0}, {"mesh": 1}).glb())
    wanted = [[[0, 0, 0], [7, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 0], [0, -1, 0]]]
    same_triangles(in_file_frame(mesh), np.array(wanted, float))


def test_skin_is_posed_by_its_joints(writer):
    joints = np.array([[0, 1, 0, 0]] * 3, "u1")
    weights = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]], np.float32)
    bind = np.stack([np.eye(4), np.linalg.inv(_moved(0, 1, 0))]).astype(np.float32)
    skin = {"joints": [1, 2], "inverseBindMatrices": writer.accessor(bind.transpose(0, 2, 1))}
    mesh_id = writer.mesh(
        attributes={"JOINTS_0": writer.accessor(joints), "WEIGHTS_0": writer.accessor(weights)}
    )
    writer.add("skins", skin)
    # The mesh node's own transform does not count under a skin; the second joint has moved by (5, 2, 0).
    writer.add("nodes", {"mesh": mesh_id, "skin": 0, "translation": [100, 0, 0]})
    writer.add("nodes", {"children": [2]})
    writer.add("nodes", {"translation": [5, 3, 0]})
    writer.json["scenes"] = [{"nodes": [0, 1]}]
    shift = np.array([5, 2, 0])
    wanted = TRIANGLE + np.array([[0], [0.5], [1]]) * shift
    same_triangles(in_file_frame(load_mesh(writer.glb())), wanted[None])


def _moved(x: float, y: float, z: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix


def test_morph_targets_and_instancing(writer):
    target = writer.accessor(np.array([[0, 0, 0], [2, 0, 0], [0, 0, 0]], "f4"))
    mesh_id = writer.mesh(targets=[{"POSITION": target}])
    offsets = writer.accessor(np.array([[0, 0, 0], [0, 0, 9]], "f4"))
    node = {
        "mesh": mesh_id,
        "weights": [0.5],
        "extensions": {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": offsets}}},
    }
    mesh = load_mesh(writer.scene(node).glb())
    one = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0]], float)
    same_triangles(in_file_frame(mesh), np.stack([one, one + np.array([0, 0, 9])]))


def textured(writer, info: dict, uvs: np.ndarray = UVS, sampler: dict | None = None) -> Mesh:
    image = writer.image(np.zeros((4, 4, 3), np.uint8))
    texture = {"source": image}
    if sampler is not None:
        texture["sampler"] = writer.add("samplers", sampler)
    info = {"index": writer.add("textures", texture), **info}
    material = writer.add("materials", {"pbrMetallicRoughness": {"baseColorTexture": info}})
    attributes = {"TEXCOORD_0": writer.accessor(uvs), "TEXCOORD_1": writer.accessor(uvs + 10)}
    mesh_id = writer.mesh(material=material, attributes=attributes)
    return load_mesh(writer.scene({"mesh": mesh_id}).glb())


def test_texture_transform_matches_the_extensions_example(writer):
    # The lower left quadrant of the image, turned clockwise by 90 degrees.
    transform = {"offset": [0, 1], "rotation": math.pi / 2, "scale": [0.5, 0.5]}
    corners = np.array(
        [[0, 0], [1, 0], [0, 1]], np.float32
    )  # top left, top right, bottom left of the surface
    mesh = textured(writer, {"extensions": {"KHR_texture_transform": transform}}, corners)
    # v is down, so the image's bottom left is (0, 1): the surface's top left shows that, its top right the left
    # edge half way up, its bottom left the bottom edge half way right.
    np.testing.assert_allclose(mesh.uvs, [[0, 1], [0, 0.5], [0.5, 1]], atol=1e-6)


def test_second_uv_set_and_sampler(writer):
    sampler = {"wrapS": 33071, "wrapT": 33648, "magFilter": 9728, "minFilter": 9985}
    mesh = textured(writer, {"texCoord": 1}, sampler=sampler)
    np.testing.assert_allclose(mesh.uvs, UVS + 10)
    texture = mesh.materials[0].base_color_texture
    assert texture is not None
    assert texture.wrap == ("clamp", "mirror")
    assert (texture.mag_filter, texture.min_filter, texture.mip_filter) == ("nearest", "linear", "nearest")


def test_texture_transform_can_choose_the_uv_set(writer):
    mesh = textured(writer, {"texCoord": 0, "extensions": {"KHR_texture_transform": {"texCoord": 1}}})
    np.testing.assert_allclose(mesh.uvs, UVS + 10)


def test_material_values(writer):
    writer.add(
        "materials",
        {
            "name": "glass",
            "pbrMetallicRoughness": {"baseColorFactor": [0.1, 0.2, 0.3, 0.4], "metallicFactor": 0.25},
            "alphaMode": "MASK",
            "alphaCutoff": 0.3,
            "doubleSided": True,
            "emissiveFactor": [1, 0.5, 0],
            "extensions": {
                "KHR_materials_emissive_strength": {"emissiveStrength": 2},
                "KHR_materials_unlit": {},
            },
        },
    )
    old = {"diffuseFactor": [0.5, 0.6, 0.7, 0.8], "glossinessFactor": 0.75}
    writer.add(
        "materials", {"extensions": {"KHR_materials_pbrSpecularGlossiness": old}, "alphaMode": "BLEND"}
    )
    meshes = [writer.mesh(material=0), writer.mesh(TRIANGLE + 1, material=1), writer.mesh(TRIANGLE + 2)]
    mesh = load_mesh(writer.scene(*({"mesh": m} for m in meshes)).glb())
    glass, gloss, default = mesh.materials
    assert glass.base_color_factor == (0.1, 0.2, 0.3, 0.4) and glass.emissive_factor == (2, 1, 0)
    assert (glass.alpha_mode, glass.alpha_cutoff, glass.double_sided, glass.unlit) == (
        "MASK",
        0.3,
        True,
        True,
    )
    assert (glass.metallic_factor, glass.roughness_factor) == (0.25, 1)
    assert gloss.base_color_factor == (0.5, 0.6, 0.7, 0.8) and gloss.alpha_mode == "BLEND"
    assert (gloss.metallic_factor, gloss.roughness_factor) == (0, 0.25)
    assert default.base_color_factor == (1, 1, 1, 1) and not default.double_sided
    assert mesh.material_ids.tolist() == [0, 1, 2]


def test_vertex_colours_are_linear_and_may_lack_alpha(writer):
    colors = np.array([[255, 0, 0, 255], [0, 51, 0, 255], [0, 0, 255, 0]], "u1")
    first = writer.mesh(attributes={"COLOR_0": writer.accessor(colors, normalized=True)})
    rgb = np.array([[1, 0.25, 0]] * 3, "f4")
    second = writer.mesh(TRIANGLE + 1, attributes={"COLOR_0": writer.accessor(rgb)})
    third = writer.mesh(TRIANGLE + 2)
    mesh = load_mesh(writer.scene({"mesh": first}, {"mesh": second}, {"mesh": third}).glb())
    assert mesh.colors is not None
    np.testing.assert_allclose(mesh.colors[mesh.faces[0]], colors / 255, atol=1e-6)
    np.testing.assert_allclose(mesh.colors[mesh.faces[1]], [[1, 0.25, 0, 1]] * 3)
    np.testing.assert_allclose(mesh.colors[mesh.faces[2]], 1)


def cube_arrays() -> tuple[np.ndarray, np.ndarray]:
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.icosphere(subdivisions=2)
    return box.vertices.astype(np.float32), box.faces.astype(np.uint32)


def test_draco(writer):
    draco = pytest.importorskip("DracoPy")
    positions, faces = cube_arrays()
    data = draco.encode(positions.astype(np.float64), faces, quantization_bits=20, preserve_order=True)
    found = draco.decode(data)
    unique = next(a["unique_id"] for a in found.attributes if a["attribute_type"] == 0)
    count = len(found.points)
    writer.json["accessors"] += [
        {"componentType": 5126, "type": "VEC3", "count": count},
        {"componentType": 5125, "type": "SCALAR", "count": faces.size},
    ]
    packed = {"bufferView": writer.view(data), "attributes": {"POSITION": unique}}
    body = {"attributes": {"POSITION": 0}, "indices": 1}
    body["extensions"] = {"KHR_draco_mesh_compression": packed}
    writer.add("meshes", {"primitives": [body]})
    writer.json["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    mesh = load_mesh(writer.scene({"mesh": 0}).glb())
    same_triangles(in_file_frame(mesh), positions[faces], tolerance=1e-4)
    damaged = bytearray(writer.glb())
    start = damaged.find(b"DRACO")
    damaged[start : start + 40] = b"\xff" * 40
    with pytest.raises(InputError, match="x: damaged Draco data"):
        load_mesh(bytes(damaged), name="x")


def test_meshopt(writer):
    meshopt = pytest.importorskip("meshoptimizer")
    positions, faces = cube_arrays()
    padded = np.zeros((len(positions), 4), np.float32)
    padded[:, :3] = positions
    vertex_data = bytes(meshopt.encode_vertex_buffer(padded, len(padded), 16))
    index_data = bytes(meshopt.encode_index_buffer(faces.reshape(-1), faces.size, len(positions)))
    for data, count, stride, mode in (
        (vertex_data, len(padded), 16, "ATTRIBUTES"),
        (index_data, faces.size, 2, "TRIANGLES"),
    ):
        writer.view(data)
        packed = dict(writer.json["bufferViews"].pop(), byteStride=stride, count=count, mode=mode)
        view = {"buffer": 1, "byteLength": count * stride, "extensions": {"EXT_meshopt_compression": packed}}
        if mode == "ATTRIBUTES":
            view["byteStride"] = stride
        writer.json["bufferViews"].append(view)
    writer.json["accessors"] += [
        {"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": len(positions)},
        {"bufferView": 1, "componentType": 5123, "type": "SCALAR", "count": faces.size},
    ]
    writer.add("meshes", {"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]})
    writer.json["extensionsRequired"] = ["EXT_meshopt_compression"]
    mesh = load_mesh(writer.scene({"mesh": 0}).glb())
    same_triangles(in_file_frame(mesh), positions[faces])


@pytest.mark.parametrize("extension", ["KHR_draco_mesh_compression", "EXT_meshopt_compression"])
def test_missing_decoder_is_named(writer, extension, monkeypatch):
    from diff2to3.assets import codecs
    from diff2to3.errors import MissingDependencyError

    monkeypatch.setitem(__import__("sys").modules, "DracoPy", None)
    monkeypatch.setitem(__import__("sys").modules, "meshoptimizer", None)
    extra = "data" if extension.startswith("KHR") else "meshopt"
    with pytest.raises(MissingDependencyError, match=rf"pip install .diff2to3\[{extra}\]"):
        if extension.startswith("KHR"):
            codecs.decode_draco(b"", {})
        else:
            codecs.decode_meshopt(b"", {"count": 1, "byteStride": 4, "mode": "ATTRIBUTES"})


def test_files_beside_the_document(writer, tmp_path):
    writer.scene({"mesh": writer.mesh()})
    (tmp_path / "sub").mkdir()
    (tmp_path / "a b.bin").write_bytes(writer.data)
    (tmp_path / "sub" / "scene.gltf").write_bytes(writer.gltf("../a%20b.bin"))
    source = FileSource(str(tmp_path), "sub/scene.gltf")
    assert load_mesh(source).num_faces == 1
    with pytest.raises(InputError, match="leaves its folder"):  # the file alone is not told of the parent
        load_mesh(tmp_path / "sub" / "scene.gltf")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.write(tmp_path / "a b.bin", "a b.bin")
        archive.write(tmp_path / "sub" / "scene.gltf", "sub/scene.gltf")
    assert load_mesh(FileSource(str(tmp_path / "pack.zip"), "sub/scene.gltf")).num_faces == 1


@pytest.mark.parametrize(
    "uri", ["../../secret.bin", "/etc/passwd", "file:///etc/passwd", "https://x.org/a.bin"]
)
def test_escaping_uris_are_refused(writer, tmp_path, uri):
    (tmp_path / "inner").mkdir()
    writer.scene({"mesh": writer.mesh()})
    (tmp_path / "secret.bin").write_bytes(writer.data)
    (tmp_path / "inner" / "a.gltf").write_bytes(writer.gltf(uri))
    with pytest.raises(InputError, match=r"a\.gltf: .*(refused|only files beside)"):
        load_mesh(tmp_path / "inner" / "a.gltf")


def test_links_out_of_the_folder_are_refused(writer, tmp_path):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    writer.scene({"mesh": writer.mesh()})
    (outer / "a.bin").write_bytes(writer.data)
    (inner / "link").symlink_to(outer)
    (inner / "a.gltf").write_bytes(writer.gltf("link/a.bin"))
    with pytest.raises(InputError, match="refused"):
        load_mesh(inner / "a.gltf")


def test_data_uri(writer):
    import base64

    writer.scene({"mesh": writer.mesh()})
    uri = "data:application/octet-stream;base64," + base64.b64encode(writer.data).decode()
    assert load_mesh(writer.gltf(uri), file_type="gltf").num_faces == 1


def test_animations_and_lines_are_noted(writer):
    lines = writer.mesh(mode=1)
    writer.json["animations"] = [{"channels": [], "samplers": []}]
    mesh = load_mesh(writer.scene({"mesh": writer.mesh()}, {"mesh": lines}).glb())
    assert mesh.num_faces == 1
    assert any("animations" in note for note in mesh.notes) and any("line" in note for note in mesh.notes)


def test_real_files_agree_with_trimesh(shared: Path):
    """Geometry, winding and colours of every twentieth fixture, by an independent reader."""
    trimesh = pytest.importorskip("trimesh")
    rows = [json.loads(line) for line in (shared / "assets" / "manifest.jsonl").read_text().splitlines()]
    for row in rows[::20]:
        source = FileSource(str(shared / "assets" / f"{row['pack']}.zip"), row["file"])
        mesh = load_mesh(source, name=row["id"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = trimesh.load(io.BytesIO(source.read(Limits())), file_type="glb", force="scene")
        wanted = np.concatenate([g.triangles for g in other.dump()])
        found = in_file_frame(mesh)
        area = np.linalg.norm(np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0]), axis=1)
        other_area = np.linalg.norm(
            np.cross(wanted[:, 1] - wanted[:, 0], wanted[:, 2] - wanted[:, 0]), axis=1
        )
        np.testing.assert_allclose(area.sum(), other_area.sum(), rtol=1e-5, err_msg=row["id"])
        # area-weighted centroid and second moments tell any flip, shift or lost part
        for power in (1, 2):
            ours = (area[:, None] * found.mean(1) ** power).sum(0)
            theirs = (other_area[:, None] * wanted.mean(1) ** power).sum(0)
            scale = np.abs(theirs).max() + area.sum() * np.abs(wanted).max()
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5, err_msg=row["id"])
