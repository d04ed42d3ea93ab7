"""Files as people have them: cases/ holds small files after public bug reports, and what each must give."""

from __future__ import annotations

import codecs
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diff2to3.assets import Limits, load_mesh
from diff2to3.assets.polygons import triangulate
from diff2to3.assets.specular_glossiness import convert_pixels, to_metallic
from diff2to3.errors import InputError
from diff2to3.types import Mesh

CASES = Path(__file__).parent / "cases"
GREY, BLUE, ORANGE = (0.8, 0.8, 0.8), (30, 60, 200), (200, 60, 30)
CUBE = (CASES / "obj_misc" / "bom.obj").read_bytes()[3:]
TEXTURED = (CASES / "mtl_subfolder" / "m.obj").read_bytes()
PYRAMID_AREA = 1 + 4 * np.sqrt(1.25) / 2


def area(mesh: Mesh) -> float:
    corners = mesh.triangles.astype(np.float64)
    return float(
        np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum()
        / 2
    )


def color_of(mesh: Mesh) -> tuple[float, ...]:
    """Linear factor of the first material, or the mean bytes of its texture."""
    material = mesh.materials[0]
    if material.base_color_texture is None:
        return tuple(round(x, 4) for x in material.base_color_factor[:3])
    assert material.base_color_factor == (1, 1, 1, 1)
    return tuple(material.base_color_texture.pixels[..., :3].reshape(-1, 3).mean(0).tolist())


#: file -> (area with the longest side 1, colour, part of a note or None for no note)
EXPECTED = {
    "concave_ngon/L.obj": (2 * 5 / 9 + 12 / 9, GREY, None),
    "mtl_subfolder/m.obj": (6, BLUE, None),
    "obj_abs_texture/backslash.obj": (6, BLUE, None),
    "obj_abs_texture/win.obj": (6, BLUE, None),
    "obj_abs_texture/gone.obj": (6, GREY, "no texture 'gone.png'"),
    "obj_bom/mtl_bom.obj": (6, BLUE, None),
    "obj_misc/bom.obj": (6, GREY, None),
    "obj_misc/bom_o.obj": (6, GREY, None),
    "obj_misc/cr.obj": (6, GREY, None),
    "obj_misc/crlf.obj": (6, GREY, None),
    "obj_misc/d_and_tr.obj": (6, (1, 0, 0), None),
    "obj_misc/d_halo.obj": (6, (1, 0, 0), None),
    "obj_misc/kd_spectral.obj": (6, GREY, "Kd is no colour"),
    "obj_misc/longnum.obj": (0.5 + 0.5 * np.sqrt(1 + 2e-6) + 1e-3, GREY, None),
    "obj_misc/missing_mtl.obj": (6, GREY, "nothere.mtl"),
    "obj_misc/missing_tex.obj": (6, GREY, "body.png"),
    "obj_misc/mtl_empty_d.obj": (6, (1, 0, 0), None),
    "obj_misc/neg.obj": (6, GREY, None),
    "obj_misc/o_spaces.obj": (6, GREY, None),
    "obj_misc/tab.obj": (6, GREY, None),
    "obj_misc/tr_vec.obj": (6, (1, 0, 0), None),
    "obj_misc/two_mtllib.obj": (6, (0, 0, 1), None),
    "obj_misc/upper.OBJ": (6, GREY, None),
    "obj_misc/vn_missing.obj": (6, GREY, "texture coordinates 4 of 0"),
    "obj_misc/vt3.obj": (6, GREY, None),
    "obj_missing_vt_vn/kitchen_style.obj": (6, GREY, "texture coordinates 8 of 0"),
    "obj_trailing_comment/face.obj": (6, GREY, None),
    "obj_trailing_comment/mat.obj": (6, (1, 0, 0), None),
    "obj_trailing_comment/mat2.obj": (6, (1, 0, 0), None),
    "obj_trailing_comment/v.obj": (6, GREY, None),
    "tr1_meshlab/m.obj": (6, ORANGE, "Tr 1"),
    "ply_binary_mixed/pyramid.ply": (PYRAMID_AREA, GREY, None),
    "ply_blank_lines/cube.ply": (6, GREY, None),
    "ply_crlf/ascii.ply": (6, GREY, None),
    "ply_crlf/binary.ply": (6, GREY, None),
    "ply_uv_no_texture/cube.ply": (6, (1, 1, 1), None),
    "glb_unpadded/json_mod0.glb": (6, (1, 1, 1), None),
    "glb_unpadded/json_mod1.glb": (6, (1, 1, 1), None),
    "glb_unpadded/json_mod3.glb": (6, (1, 1, 1), None),
    "gltf_misc/alphamode_lowercase.glb": (6, (1, 1, 1), None),
    "gltf_misc/cmyk_jpeg_texture.glb": (6, BLUE, None),
    "gltf_misc/empty_attributes_primitive.glb": (6, (1, 1, 1), "without positions"),
    "gltf_misc/hidden_node.glb": (6, (1, 1, 1), "not visible"),
    "gltf_misc/missing_metalrough.glb": (6, (1, 0, 0), "metallic-roughness"),
    "gltf_misc/missing_normalmap.glb": (6, (1, 0, 0), None),
    "gltf_misc/null_fields.glb": (6, (1, 1, 1), None),
    "gltf_misc/png16_texture.glb": (6, BLUE, None),
    "gltf_misc/quantized_interleaved.glb": (6, BLUE, None),
    "gltf_misc/root_listed_twice.glb": (6, (1, 1, 1), None),
    "gltf_misc/sampler_null.glb": (6, BLUE, None),
    "gltf_misc/second_scene.glb": (2 / 9 + 4 / 3, (1, 1, 1), None),
    "gltf_misc/webp.glb": (6, BLUE, None),
    "gltf_misc/wrap_clamp_to_border.glb": (6, BLUE, None),
    "specgloss/metalrough_gold.glb": (6, (1, 0.77, 0.34), None),
    "specgloss/specgloss_gold.glb": (6, (1, 0.77, 0.34), None),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_case(name):
    if name.startswith("gltf_misc/webp"):
        pytest.importorskip("PIL._webp")
    surface, color, note = EXPECTED[name]
    mesh = load_mesh(CASES / name)
    assert area(mesh) == pytest.approx(surface, rel=1e-4)
    np.testing.assert_allclose(color_of(mesh), color, atol=1e-4 if color[0] <= 1 else 2)
    if note is None:
        assert mesh.notes == ()
    else:
        assert any(note in line for line in mesh.notes), mesh.notes


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("obj_misc/comma.obj", "damaged: a face's corner is '1,0'"),
        ("gltf_misc/emissive_len2.glb", "emissiveFactor: expected 3 finite numbers"),
        ("gltf_misc/strip_restart.glb", "vertex index 65535 is past the 24 vertices"),
    ],
)
def test_refused_with_the_reason(name, reason):
    with pytest.raises(InputError, match=reason):
        load_mesh(CASES / name)


@pytest.mark.parametrize("name", ["draco_u16_color/cube_color", "vertex_colors/u8", "vertex_colors/u16"])
def test_vertex_colours_count_to_their_types_top(name):
    if name.startswith("draco"):
        pytest.importorskip("DracoPy")
    colors = load_mesh(CASES / f"{name}.glb").colors
    assert colors is not None
    np.testing.assert_allclose(colors, [[1, 0.5, 0, 1]] * len(colors), atol=0.003)


# OBJ and MTL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_any_unicode_encoding(tmp_path, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "m.mtl").write_bytes(mark + "newmtl a\nKd 1 0 0\n".encode(encoding))
    text = "v 0 0 0\n" + CUBE.decode().split("\n", 1)[1]
    (tmp_path / "m.obj").write_bytes(mark + ("mtllib m.mtl\nusemtl a\n" + text).encode(encoding))
    mesh = load_mesh(tmp_path / "m.obj")
    assert area(mesh) == pytest.approx(6) and color_of(mesh) == (1, 0, 0)
    ply = (CASES / "ply_blank_lines" / "cube.ply").read_text().encode(encoding)
    assert load_mesh(mark + ply, file_type="ply").num_faces == 12
    writer_json = '{"asset": {"version": "2.0"}, "scenes": [{"nodes": []}]}'
    with pytest.raises(InputError, match="empty scene"):
        load_mesh(mark + writer_json.encode(encoding), file_type="gltf")


def test_damaged_utf16():
    with pytest.raises(InputError, match="a: damaged text: its first bytes say utf-16-le"):
        load_mesh(codecs.BOM_UTF16_LE + b"v", name="a", file_type="obj")


@pytest.mark.parametrize(
    ("named", "where"),
    [
        ("tex.png", "materials/tex.png"),  # relative to the MTL
        ("tex.png", "tex.png"),  # relative to the OBJ
        ("TEX.PNG", "materials/tex.png"),  # written on a system that does not tell cases apart
        ("/home/me/proj/tex.png", "textures/tex.png"),
        ("C:\\Users\\me\\tex.png", "textures/tex.png"),
        ("../textures/tex.png", "maps/tex.png"),
        ("a tex #2.png", "a tex #2.png"),
        ("tex.png # the paint", "materials/tex.png"),
        ('"tex.png"', "materials/tex.png"),
        ("-bm 1 -s 1 1 1 tex.png", "tex.png"),
    ],
)
def test_texture_is_found(tmp_path, named, where):
    (tmp_path / "materials").mkdir()
    (tmp_path / where).parent.mkdir(exist_ok=True)
    shutil.copy(CASES / "mtl_subfolder" / "materials" / "tex.png", tmp_path / where)
    (tmp_path / "materials" / "m.mtl").write_text(f"newmtl a\nmap_Kd {named}\n")
    (tmp_path / "m.obj").write_bytes(TEXTURED)
    assert color_of(load_mesh(tmp_path / "m.obj")) == BLUE


def test_texture_of_the_nearest_folder_and_never_outside(tmp_path):
    inside = tmp_path / "asset"
    for folder, value in ((tmp_path, 9), (inside / "a" / "skin", 1), (inside / "b" / "skin", 2)):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((1, 1, 3), value, np.uint8)).save(folder / "t.png")
    (inside / "m.obj").write_bytes(TEXTURED.replace(b"materials/m.mtl", b"m.mtl"))
    (inside / "m.mtl").write_text("newmtl a\nmap_Kd D:\\b\\skin\\t.png\n")
    assert color_of(load_mesh(inside / "m.obj")) == (2, 2, 2)
    shutil.rmtree(inside / "a")
    shutil.rmtree(inside / "b")
    (inside / "m.mtl").write_text("newmtl a\nmap_Kd ../t.png\n")
    assert color_of(load_mesh(inside / "m.obj")) == GREY


def test_texture_options_move_the_texture():
    mesh = load_mesh(CASES / "obj_map_options" / "m.obj")
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 4 + [0.5, 0]  # -s 4 4 1 -o 0.5 0 0, v up
    expected = {(u, 1 - v) for u, v in corner.tolist()}
    assert mesh.uvs is not None and {tuple(uv) for uv in mesh.uvs.tolist()} == expected
    assert mesh.materials[0].base_color_texture is not None


def test_clamp_and_ignored_options(tmp_path):
    shutil.copy(CASES / "tr1_meshlab" / "t.png", tmp_path / "t.png")
    (tmp_path / "m.mtl").write_text("newmtl a\nmap_Kd -clamp on -mm 0.1 0.9 t.png\n")
    (tmp_path / "m.obj").write_bytes(TEXTURED.replace(b"materials/m.mtl", b"m.mtl"))
    mesh = load_mesh(tmp_path / "m.obj")
    texture = mesh.materials[0].base_color_texture
    assert texture is not None and texture.wrap == ("clamp", "clamp")
    assert any("-mm" in note for note in mesh.notes)


def test_only_textures_in_use_are_read(tmp_path):
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 1 0 0\nnewmtl b\nmap_Kd broken.png\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    (tmp_path / "m.obj").write_bytes(b"mtllib m.mtl\nusemtl a\n" + CUBE)
    assert color_of(load_mesh(tmp_path / "m.obj")) == (1, 0, 0)


def test_names_with_a_hash(tmp_path):
    (tmp_path / "m.mtl").write_text("newmtl #FF0000\nKd 1 0 0\n")
    (tmp_path / "m.obj").write_bytes(b"mtllib m.mtl\nusemtl #FF0000\n" + CUBE)
    assert color_of(load_mesh(tmp_path / "m.obj")) == (1, 0, 0)


@pytest.mark.parametrize("scale", [1, 255])
def test_vertex_colours_to_one_or_to_255(scale):
    lines = CUBE.decode().splitlines()
    text = "\n".join(f"{x} {scale} {scale * 0.2:g} 0" if x.startswith("v ") else x for x in lines)
    colors = load_mesh(text.encode(), file_type="obj").colors
    assert colors is not None
    np.testing.assert_allclose(
        colors[:, :3], [[1, ((0.2 + 0.055) / 1.055) ** 2.4, 0]] * len(colors), atol=1e-6
    )


def test_kd_in_xyz_and_to_255(tmp_path):
    (tmp_path / "m.mtl").write_text("newmtl a\nKd xyz 0.4124 0.2126 0.0193\nnewmtl b\nKd 255 0 51\n")
    (tmp_path / "m.obj").write_bytes(b"mtllib m.mtl\nusemtl a\n" + CUBE + b"usemtl b\nf 1 2 3\n")
    red, bytes_ = load_mesh(tmp_path / "m.obj").materials
    np.testing.assert_allclose(red.base_color_factor, [1, 0, 0, 1], atol=2e-3)
    np.testing.assert_allclose(bytes_.base_color_factor, [1, 0, 0.2, 1])


def textured(folder: Path, library: str, **pictures: np.ndarray) -> Mesh:
    """The textured cube with a material library that says ``library``, and pictures uint8 [H, W, 3 or 4]."""
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "m.mtl").write_text("newmtl a\n" + library)
    (folder / "m.obj").write_bytes(TEXTURED.replace(b"materials/m.mtl", b"m.mtl"))
    return load_mesh(folder / "m.obj")


def test_map_d_is_the_opacity_of_the_texture(tmp_path):
    color = np.zeros((4, 4, 3), np.uint8)
    color[:] = BLUE
    mask = np.zeros((4, 4, 3), np.uint8)
    mask[:, 2:] = 255
    material = textured(tmp_path, "map_Kd color.png\nmap_d mask.png\n", color=color, mask=mask).materials[0]
    pixels = material.base_color_texture.pixels
    np.testing.assert_array_equal(pixels[..., :3], color)
    np.testing.assert_array_equal(pixels[..., 3], mask[..., 0])
    assert material.alpha_mode == "BLEND"


@pytest.mark.parametrize(
    "option, expected",
    [("", 40), ("-imfchan r ", 200), ("-imfchan g ", 100), ("-imfchan m ", 40), ("-imfchan l ", 118)],
)
def test_the_channel_that_holds_opacity(tmp_path, option, expected):
    """Alpha where there is any, else brightness: 0.2126 · 200 + 0.7152 · 100 + 0.0722 · 50 = 117.7."""
    mask = np.zeros((2, 2, 4), np.uint8)
    mask[:] = (200, 100, 50, 40)
    material = textured(tmp_path, f"Kd 1 1 1\nmap_d {option}mask.png\n", mask=mask).materials[0]
    assert (material.base_color_texture.pixels[..., 3] == expected).all()
    opaque = textured(tmp_path, "Kd 1 1 1\nmap_d mask.png\n", mask=mask[..., :3]).materials[0]
    assert (opaque.base_color_texture.pixels[..., 3] == 118).all()


def test_map_d_of_another_size_is_resized_and_one_that_is_missing_left_out(tmp_path):
    color, mask = np.full((8, 8, 3), 90, np.uint8), np.full((2, 2, 3), 128, np.uint8)
    mesh = textured(tmp_path, "map_Kd color.png\nmap_d mask.png\n", color=color, mask=mask)
    assert (mesh.materials[0].base_color_texture.pixels[..., 3] == 128).all()
    mesh = textured(tmp_path, "map_Kd color.png\nmap_d gone.png\n")
    assert mesh.materials[0].alpha_mode == "OPAQUE"
    assert any("map_d is left out" in note for note in mesh.notes)
    mesh = textured(tmp_path, "map_Kd color.png\nmap_d -s 2 2 1 mask.png\n")
    assert any("map_d lies in another way" in note for note in mesh.notes)


def test_map_ke_glows_by_its_own_picture_and_coordinates(tmp_path):
    color, glow = np.full((2, 2, 3), 90, np.uint8), np.full((2, 2, 3), 200, np.uint8)
    mesh = textured(
        tmp_path, "map_Kd color.png\nKe 0 0 0\nmap_Ke -s 2 2 1 glow.png\n", color=color, glow=glow
    )
    material = mesh.materials[0]
    assert material.emissive_factor == (1.0, 1.0, 1.0)  # a Ke of 0 beside a picture is an exporter's default
    assert (material.emissive_texture.pixels[..., :3] == 200).all()
    # v is turned around on the way in: 1 - v of the scaled coordinates
    np.testing.assert_allclose(mesh.emissive_uvs[:, 0], 2 * mesh.uvs[:, 0], atol=1e-6)
    np.testing.assert_allclose(1 - mesh.emissive_uvs[:, 1], 2 * (1 - mesh.uvs[:, 1]), atol=1e-6)
    material = textured(tmp_path, "Ke 0.5 0.25 1\nmap_Ke glow.png\n").materials[0]
    assert material.emissive_factor == (0.5, 0.25, 1.0)
    missing = textured(tmp_path, "Kd 1 1 1\nKe 1 1 1\nmap_Ke gone.png\n")
    assert missing.materials[0].emissive_factor == (0.0, 0.0, 0.0)
    assert any("map_Ke is left out" in note for note in missing.notes)


@pytest.mark.parametrize(
    ("said", "alpha"),
    [("Tr 1", 1), ("Tr 1.0", 1), ("Tr 0", 1), ("Tr 0.25", 0.75), ("d 0.5\nTr 1", 0.5), ("d -halo 0.5", 0.5)],
)
def test_opacity(tmp_path, said, alpha):
    (tmp_path / "m.mtl").write_text(f"newmtl a\nKd 1 0 0\n{said}\n")
    (tmp_path / "m.obj").write_bytes(b"mtllib m.mtl\nusemtl a\n" + CUBE)
    assert load_mesh(tmp_path / "m.obj").materials[0].base_color_factor == (1, 0, 0, alpha)


def test_an_invisible_asset_is_refused(tmp_path, writer):
    (tmp_path / "m.mtl").write_text("newmtl a\nd 0\n")
    (tmp_path / "m.obj").write_bytes(b"mtllib m.mtl\nusemtl a\n" + CUBE)
    with pytest.raises(InputError, match=r"m\.obj: no visible surface"):
        load_mesh(tmp_path / "m.obj")
    image = writer.image(np.full((2, 2, 4), 100, np.uint8))
    writer.add("textures", {"source": image})
    uvs = writer.accessor(np.zeros((3, 2), "f4"))
    pbr = {"baseColorTexture": {"index": 0}}
    for mode, cutoff in (("MASK", 0.5), ("MASK", 0.3), ("BLEND", 0.5)):
        writer.json["materials"] = [{"pbrMetallicRoughness": pbr, "alphaMode": mode, "alphaCutoff": cutoff}]
        writer.json["meshes"] = []
        glb = writer.scene({"mesh": writer.mesh(material=0, attributes={"TEXCOORD_0": uvs})}).glb()
        if (mode, cutoff) == ("MASK", 0.5):
            with pytest.raises(InputError, match="no visible surface"):
                load_mesh(glb)
        else:
            load_mesh(glb)


# polygons ---------------------------------------------------------------------------------------------------


def outline(rng: np.random.Generator) -> np.ndarray:
    """A simple polygon seen from its middle: [n, 2], counter-clockwise."""
    n = int(rng.integers(5, 40))
    angles = (np.arange(n) + rng.uniform(0, 0.9, n)) * 2 * np.pi / n
    return np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.1, 1, (n, 1))


def shoelace(points: np.ndarray) -> float:
    x, y = points.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


@pytest.mark.parametrize("seed", range(5))
def test_polygons_are_covered_once(seed):
    """As many triangles as a polygon has, all wound as it is, whose areas add up to its own: no overlap, no gap."""
    rng = np.random.default_rng(seed)
    outlines = [outline(rng) for _ in range(30)]
    turned = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in outlines]
    placed = [np.c_[p, np.zeros(len(p))] @ q.T + 5 for p, q in zip(outlines, turned, strict=True)]
    sizes = np.array([len(p) for p in outlines])
    points = np.concatenate(placed)
    triangles, polygon, num_fans = triangulate(points, sizes)
    assert num_fans == 0 and (np.bincount(polygon) == sizes - 2).all()
    corners = points[triangles]
    crosses = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    for i, (flat, rotation) in enumerate(zip(outlines, turned, strict=True)):
        normal = rotation[:, 2] * np.linalg.det(rotation)
        signed = crosses[polygon == i] @ normal * np.linalg.det(rotation)
        signed *= np.sign(signed.sum())
        assert signed.min() > -1e-9 and signed.sum() == pytest.approx(shoelace(flat), rel=1e-9)


def test_polygon_with_a_hole_joined_by_an_edge():
    square, hole = [(0, 0), (4, 0), (4, 4), (0, 4)], [(1, 1), (1, 3), (3, 3), (3, 1)]
    flat = np.array([*square, square[0], *hole, hole[0]], float)
    points = np.c_[flat, np.zeros(len(flat))]
    triangles, _, _ = triangulate(points, np.array([len(points)]))
    corners = points[triangles]
    z = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    assert z.min() >= 0 and z.sum() == pytest.approx(12)


def test_convex_polygons_stay_fans_and_degenerate_ones_do_no_harm():
    angles = np.arange(7) * 2 * np.pi / 7
    points = np.c_[np.cos(angles), np.sin(angles), np.zeros(7)]
    triangles, _, _ = triangulate(points, np.array([7]))
    np.testing.assert_array_equal(triangles, [[0, i, i + 1] for i in range(1, 6)])
    triangles, polygon, _ = triangulate(np.zeros((9, 3)), np.array([2, 5, 1, 1]))
    assert len(triangles) == 3 and set(polygon) == {1}


def test_a_huge_polygon_becomes_a_fan_with_a_note(monkeypatch):
    monkeypatch.setattr("diff2to3.assets.polygons._MAX_TESTS", 1)
    notch = b"v 0 0 0\nv 4 0 0\nv 4 4 0\nv 3 1 0\nv 2 3 0\nv 1 1 0\nv 0 4 0\nf 1 2 3 4 5 6 7\n"
    assert any("drawn as fans" in note for note in load_mesh(notch, file_type="obj").notes)


# PLY --------------------------------------------------------------------------------------------------------


def ply(faces: list[list[int]], order: str = "<", positions: np.ndarray | None = None) -> bytes:
    """A binary PLY with an element before the vertices and a list among the faces' other properties."""
    if positions is None:
        positions = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.5, 1]])
    name = {"<": "little", ">": "big"}[order]
    header = (
        f"ply\nformat binary_{name}_endian 1.0\nelement camera 1\nproperty list uchar float pose\n"
        f"element vertex {len(positions)}\nproperty double x\nproperty double y\nproperty double z\n"
        f"element face {len(faces)}\nproperty uchar flags\nproperty list ushort int vertex_index\n"
        "property list uchar float weights\nend_header\n"
    )
    body = struct.pack(order + "B3f", 3, 1, 2, 3) + positions.astype(order + "f8").tobytes()
    for i, face in enumerate(faces):
        body += struct.pack(f"{order}BH{len(face)}iB{i % 3}f", 7, len(face), *face, i % 3, *[0.5] * (i % 3))
    return header.encode() + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_ply_of_mixed_polygons(order):
    faces = [[0, 3, 2, 1], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]]
    mesh = load_mesh(ply(faces, order), file_type="ply")
    assert mesh.num_faces == 6 and area(mesh) == pytest.approx(PYRAMID_AREA)


def test_ply_of_mixed_polygons_that_fill_as_much_as_triangles():
    """Lists of 2, 3 and 4 take the bytes of three lists of 3."""
    positions = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    header = (
        "ply\nformat binary_little_endian 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 3\nproperty list uchar int vertex_indices\nend_header\n"
    )
    body = positions.astype("<f4").tobytes()
    for face in ([0, 1], [0, 1, 2], [0, 1, 2, 3]):
        body += struct.pack(f"<B{len(face)}i", len(face), *face)
    mesh = load_mesh(header.encode() + body, file_type="ply")
    assert area(mesh) == pytest.approx(0.5 + 1)


def test_ply_strips_and_face_colours():
    text = (
        "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
        "element tristrips 1\nproperty list int int vertex_indices\nend_header\n"
        "0 0 0\n1 0 0\n0 1 0\n1 1 0\n8 0 1 2 3 -1 0 1 2\n"
    )
    mesh = load_mesh(text.encode(), file_type="ply")
    corners = mesh.triangles
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert mesh.num_faces == 3 and (normals[:, 2] > 0).all()
    colored = (
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices\nproperty float red\nproperty float green\n"
        "property float blue\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2 1 0.5 0\n"
    )
    colors = load_mesh(colored.encode(), file_type="ply").colors
    np.testing.assert_allclose(colors, [[1, ((0.5 + 0.055) / 1.055) ** 2.4, 0, 1]] * 3, atol=1e-6)


def test_ply_rows_are_lines_where_they_can_be():
    header = (
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices\nproperty uchar flags\nend_header\n"
    )
    longer = "0 0 0 9 9\n\n1 0 0 9 9\n0 1 0 9 9\n3 0 1 2 7 5 5 5\n"  # more than the header says
    wrapped = "0 0\n0 1 0 0\n0 1 0\n3 0 1\n2 7\n"
    for body in (longer, wrapped):
        mesh = load_mesh((header + body).encode(), file_type="ply")
        assert area(mesh) == pytest.approx(0.5)
    for body in ("0 0 0\n1 0 0\n0 1 0\n", "0 0 0\n1 0 0\n0 1 0\n3 0 1\n"):
        with pytest.raises(InputError, match="truncated PLY: it ends within its 1 rows of face"):
            load_mesh((header + body).encode(), file_type="ply")
    with pytest.raises(InputError, match=r"negative length|truncated"):
        load_mesh((header + "0 0 0\n1 0 0\n0 1 0\n-3 0 1 2 7\n").encode(), file_type="ply")


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r", b"only the last"])
def test_ply_header_lines(ends):
    """A body may begin with the byte of a line feed; here x of the first vertex is 10 in float64's last byte."""
    positions = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0.5, 1]]).astype("<f8")
    positions[0, 0] = np.frombuffer(b"\n" + bytes(7), "<f8")[0]
    data = ply([[0, 3, 2, 1], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]], positions=positions)
    head, body = data.split(b"end_header\n")
    head = head.replace(b"element camera 1\nproperty list uchar float pose\n", b"")
    body = body[13:]
    assert body.startswith(b"\n")
    end = b"\r\n" if ends == b"only the last" else ends
    head = head if ends == b"only the last" else head.replace(b"\n", ends)
    assert area(load_mesh(head + b"end_header" + end + body, file_type="ply")) == pytest.approx(PYRAMID_AREA)


@pytest.mark.parametrize("wedge", [False, True])
def test_ply_with_a_texture(tmp_path, wedge):
    shutil.copy(CASES / "tr1_meshlab" / "t.png", tmp_path / "skin.png")
    vertex_uv = "" if wedge else "property float s\nproperty float t\n"
    face_uv = "property list uchar float texcoord\n" if wedge else ""
    rows = ["0 0 0", "1 0 0", "0 1 0"] if wedge else ["0 0 0 0 0", "1 0 0 0.5 0", "0 1 0 0 1"]
    face = "3 0 1 2" + (" 6 0 0 0.5 0 0 1" if wedge else "")
    (tmp_path / "m.ply").write_text(
        "ply\nformat ascii 1.0\ncomment TextureFile skin.png\nelement vertex 3\nproperty float x\nproperty float y\n"
        f"property float z\n{vertex_uv}element face 1\nproperty list uchar int vertex_indices\n{face_uv}end_header\n"
        + "\n".join([*rows, face])
        + "\n"
    )
    mesh = load_mesh(tmp_path / "m.ply")
    assert color_of(mesh) == ORANGE and mesh.uvs is not None
    np.testing.assert_allclose(mesh.uvs[mesh.faces[0]], [[0, 1], [0.5, 1], [0, 0]])
    (tmp_path / "skin.png").unlink()
    gone = load_mesh(tmp_path / "m.ply")
    assert color_of(gone) == GREY and any("texture not found" in note for note in gone.notes)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"double x", b"quad x", "damaged PLY header"),
        (b"double z", b"double w", "the vertices lack the property 'z'"),
        (b"binary_little_endian", b"binary_middle_endian", "its format is none of"),
        (b"element vertex 5", b"element vertex 500", "truncated PLY"),
        (b"element face 5", b"element face 6", "truncated"),
        (b"end_header", b"end", "no header"),
    ],
)
def test_damaged_ply(old, new, reason):
    data = ply([[0, 3, 2, 1], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])
    with pytest.raises(InputError, match=reason):
        load_mesh(data.replace(old, new), file_type="ply")
    with pytest.raises(InputError, match="refers to vertex 9 of 5"):
        load_mesh(ply([[0, 1, 9]]), file_type="ply")
    with pytest.raises(InputError, match="over the limit of 3"):
        load_mesh(ply([[0, 1, 2, 3]] * 2), file_type="ply", limits=Limits(max_faces=3))
    splats = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float f_dc_0\nproperty float opacity\n"
    splats += b"end_header\n0 0\n"
    with pytest.raises(InputError, match="no triangles: Gaussians"):
        load_mesh(splats, file_type="ply")


# glTF -------------------------------------------------------------------------------------------------------


def test_emissive_texture_has_its_own_coordinates(writer):
    """Two images side by side on one triangle: colour at UV set 0, light at UV set 1 through its transform."""
    from diff2to3.views.surface import Surface

    base, light = np.zeros((1, 2, 3), np.uint8), np.zeros((1, 2, 3), np.uint8)
    base[0, 0] = (0, 0, 255)
    light[0, 1] = (255, 0, 0)
    for pixels in (base, light):
        writer.add("textures", {"source": writer.image(pixels), "sampler": 0})
    writer.add("samplers", {"magFilter": 9728, "minFilter": 9728})
    shift = {"KHR_texture_transform": {"offset": [0.5, 0]}}
    emissive = {"index": 1, "texCoord": 1, "extensions": shift}
    writer.add(
        "materials",
        {
            "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}},
            "emissiveTexture": emissive,
            "emissiveFactor": [1, 1, 1],
        },
    )
    uv = {f"TEXCOORD_{i}": writer.accessor(np.full((3, 2), (0.25, 0.5), "f4")) for i in range(2)}
    mesh = load_mesh(writer.scene({"mesh": writer.mesh(material=0, attributes=uv)}).glb())
    assert mesh.uvs is not None and mesh.emissive_uvs is not None and mesh.notes == ()
    np.testing.assert_allclose(mesh.emissive_uvs, [[0.75, 0.5]] * 3)
    surface = Surface(mesh)
    at = (
        np.array([0]),
        np.array([0.3], np.float32),
        np.array([0.3], np.float32),
        np.array([1e-3], np.float32),
    )
    np.testing.assert_allclose(surface.base_colors(*at)[0, :3], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(surface.emission(*at)[0], [1, 0, 0], atol=1e-6)


def test_emissive_case_is_not_white():
    mesh = load_mesh(CASES / "emissive_own_uv" / "texcoord1.glb")
    control = load_mesh(CASES / "emissive_own_uv" / "same_uv_control.glb")
    for found in (mesh, control):
        texture = found.materials[0].emissive_texture
        assert texture is not None and texture.pixels[..., :3].mean() < 40
    assert mesh.emissive_uvs is not None and control.emissive_uvs is None


@pytest.mark.parametrize("pad_length", [False, True])
@pytest.mark.parametrize("num_spaces", range(4))
def test_glb_with_any_padding(writer, num_spaces, pad_length):
    glb = writer.scene({"mesh": writer.mesh()}).glb()
    length = struct.unpack_from("<I", glb, 12)[0]
    text, rest = glb[20 : 20 + length].rstrip() + b" " * num_spaces, glb[20 + length :]
    claimed = len(text) + (-len(text) % 4 if pad_length else 0)
    text += b" " * (-len(text) % 4) if pad_length else b""
    body = struct.pack("<I4s", claimed, b"JSON") + text + rest
    assert load_mesh(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body).num_faces == 1


def test_hidden_nodes_hide_their_children(writer):
    hide = {"KHR_node_visibility": {"visible": False}}
    child = writer.add("nodes", {"mesh": writer.mesh()})
    shown = {"mesh": 0, "translation": [5, 0, 0]}
    writer.json["extensionsRequired"] = ["KHR_node_visibility"]
    assert load_mesh(writer.scene({"children": [child], "extensions": hide}, shown).glb()).num_faces == 1


# specular-glossiness ------------------------------------------------------------------------------------------


def test_specular_glossiness_round_trip():
    """A metallic-roughness surface written in the other model's terms comes back."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.1, 1, (200, 3))
    metal = np.repeat([0.0, 1.0], 100)
    diffuse = base * (1 - metal)[:, None]
    specular = 0.04 * (1 - metal)[:, None] + base * metal[:, None]
    found, metalness = to_metallic(diffuse, specular)
    np.testing.assert_allclose(metalness, metal, atol=1e-9)
    np.testing.assert_allclose(found, base, atol=1e-6)


def test_specular_textures(writer):
    """Left half paint, right half gold: one image for each model."""
    gold = np.array([255, 196, 85])
    diffuse, specular = np.zeros((1, 4, 4), np.uint8), np.full((1, 2, 4), 255, np.uint8)
    diffuse[0, :2], diffuse[0, 2:] = (200, 30, 60, 128), (0, 0, 0, 255)
    specular[0, 0, :3], specular[0, 1, :3] = 0, gold
    pixels, metal = convert_pixels(diffuse, None, (np.ones(3), np.zeros(3)))
    np.testing.assert_array_equal(pixels, diffuse)
    assert metal == 0
    for image in (diffuse, np.repeat(specular, 2, axis=1)):
        writer.add("textures", {"source": writer.image(image)})
    old = {"diffuseTexture": {"index": 0}, "specularGlossinessTexture": {"index": 1}}
    writer.add("materials", {"extensions": {"KHR_materials_pbrSpecularGlossiness": old}})
    uvs = writer.accessor(np.zeros((3, 2), "f4"))
    mesh = load_mesh(writer.scene({"mesh": writer.mesh(material=0, attributes={"TEXCOORD_0": uvs})}).glb())
    texture = mesh.materials[0].base_color_texture
    assert texture is not None and mesh.materials[0].metallic_factor == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_allclose(texture.pixels[0, :, :3], [(200, 30, 60)] * 2 + [tuple(gold)] * 2, atol=1)
    np.testing.assert_array_equal(texture.pixels[0, :, 3], [128, 128, 255, 255])
