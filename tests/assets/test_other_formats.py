"""OBJ with MTL, PLY and STL."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diff2to3.assets import Limits, load_mesh
from diff2to3.errors import InputError

SQUARE = "v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\n"


def decode(byte: float) -> float:
    x = byte / 255
    return x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4


def test_obj_polygons_negative_indices_and_up():
    mesh = load_mesh((SQUARE + "f -4 -3 -2 -1\n").encode(), file_type="obj")
    assert mesh.num_faces == 2
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [1, 0, 0.5], atol=1e-6)  # y of the file is up
    assert mesh.materials[0].base_color_factor == (0.8, 0.8, 0.8, 1.0) and mesh.materials[0].double_sided
    z_up = load_mesh((SQUARE + "f 1 2 3 4\n").encode(), file_type="obj", up="z")
    np.testing.assert_allclose(np.ptp(z_up.vertices, axis=0), [1, 0.5, 0], atol=1e-6)


def test_obj_materials(tmp_path):
    Image.fromarray(np.full((2, 2, 3), 99, np.uint8)).save(tmp_path / "a texture.png")
    (tmp_path / "m.mtl").write_text(
        "newmtl plain\nKd 1 0.5 0.25\nd 0.5\nKe 0 0 2\n"
        "newmtl image one\nKd 0 0 0\nmap_Kd -s 1 1 1 -clamp on a texture.png\n"
    )
    (tmp_path / "m.obj").write_text(
        "mtllib m.mtl\n" + SQUARE + "vt 0.25 1\nvt 1 0\nvt 0 0.5\nvn 0 0 1\n"
        "usemtl plain\nf 1 2 3\nusemtl image one\nf 1/1/1 3/2/1 4/3/1\n"
    )
    mesh = load_mesh(tmp_path / "m.obj")
    plain, image = mesh.materials
    assert plain.base_color_factor == (1, 0.5, 0.25, 0.5) and plain.alpha_mode == "BLEND"
    assert plain.emissive_factor == (0, 0, 2)
    assert image.base_color_factor == (1, 1, 1, 1) and image.base_color_texture is not None
    assert (image.base_color_texture.pixels[..., :3] == 99).all()
    assert mesh.uvs is not None and mesh.normals is not None
    np.testing.assert_allclose(mesh.uvs[mesh.faces[1]], [[0.25, 0], [1, 1], [0, 0.5]])
    np.testing.assert_allclose(mesh.normals[mesh.faces[1]], [[0, -1, 0]] * 3)
    np.testing.assert_allclose(mesh.normals[mesh.faces[0]], 0)  # none in the file: flat


def test_obj_without_its_files(tmp_path):
    (tmp_path / "a.obj").write_text("mtllib gone.mtl\n" + SQUARE + "usemtl x\nf 1 2 3\n")
    assert any("drawn grey" in note for note in load_mesh(tmp_path / "a.obj").notes)
    for name in ("../lost.png", "lost.png"):
        (tmp_path / "gone.mtl").write_text(f"newmtl x\nmap_Kd {name}\n")
        mesh = load_mesh(tmp_path / "a.obj")
        assert mesh.materials[0].base_color_factor == (0.8, 0.8, 0.8, 1) and "lost.png" in mesh.notes[0]


def test_obj_vertex_colours():
    text = "v 0 0 0 1 0 0.5\nv 1 0 0 0 1 0\nv 0 1 0 0 0 1\nf 1 2 3\n"
    mesh = load_mesh(text.encode(), file_type="obj")
    assert mesh.colors is not None
    np.testing.assert_allclose(mesh.colors[mesh.faces[0, 0]], [1, 0, decode(127.5), 1], atol=1e-6)
    assert mesh.materials[0].base_color_factor == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v 0 0 0\nv 1 0 0\n", "no triangles: a point cloud"),
        ("# nothing\n", "no triangles: an empty file"),
        (SQUARE + "f 1 2 9\n", "a face refers to vertex 9 of 4"),
        (SQUARE + "f 1 2 0\n", "refers to nothing"),
        (SQUARE + "f 1 2 x\n", "damaged"),
    ],
)
def test_obj_errors(text, reason):
    with pytest.raises(InputError, match=f"thing: .*{reason}"):
        load_mesh(text.encode(), file_type="obj", name="thing")


def test_ply_and_stl(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.box((1, 2, 4))
    box.export(tmp_path / "a.stl")
    box.visual.face_colors = [[255, 0, 0, 255]] * 2 + [[0, 128, 0, 255]] * 10
    box.export(tmp_path / "a.ply")
    stl, ply = load_mesh(tmp_path / "a.stl"), load_mesh(tmp_path / "a.ply")
    for mesh in (stl, ply):
        assert mesh.num_faces == 12
        np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [0.25, 0.5, 1], atol=1e-6)  # z up already
    assert stl.colors is None and ply.colors is not None
    np.testing.assert_allclose(ply.colors[ply.faces[0]], [[1, 0, 0, 1]] * 3)
    np.testing.assert_allclose(ply.colors[ply.faces[5], 1], decode(128), rtol=1e-5)


def test_claims_are_checked_before_reading():
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 3\nelement face 10000000\nend_header\n"
    with pytest.raises(InputError, match="big: 10,000,000 triangles is over the limit"):
        load_mesh(header, name="big", file_type="ply")
    points = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n"
    with pytest.raises(InputError, match="a point cloud"):
        load_mesh(points, name="p", file_type="ply")
    stl = b"\0" * 80 + (20).to_bytes(4, "little") + b"\0" * 50 * 20
    with pytest.raises(InputError, match="20 triangles is over the limit of 10"):
        load_mesh(stl, name="s", file_type="stl", limits=Limits(max_faces=10))
    with pytest.raises(InputError, match="over the limit of 10"):
        load_mesh(SQUARE.encode() + b"f 1 2 3\n" * 11, name="o", file_type="obj", limits=Limits(max_faces=10))
