"""Files that cannot be used: each is refused by name and reason, and nothing else happens."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diff2to3.assets import FileSource, Limits, load_mesh
from diff2to3.errors import InputError


def refused(data, reason: str, **options) -> None:
    """``data`` is refused with a one-line message that starts with the name."""
    with pytest.raises(InputError, match=reason) as caught:
        load_mesh(data, name="pack/asset", **options)
    assert str(caught.value).startswith("pack/asset: ") and "\n" not in str(caught.value)


def test_truncated_and_foreign_bytes(triangle_glb):
    refused(triangle_glb[:10], "truncated GLB header")
    refused(triangle_glb[:-8], "truncated file")
    refused(b"glTF" + struct.pack("<II", 1, 20) + b"\0" * 8, "GLB version 1")
    refused(b"not a model at all", "type 'unknown' are not read")
    refused(b"{", "JSON cannot be read", file_type="gltf")
    refused(b"[]", "not an object", file_type="gltf")
    refused(b'{"asset": {"version": "1.0"}}', "glTF version 1.0", file_type="gltf")
    refused(triangle_glb, "type 'fbx' are not read", file_type="fbx")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.glb: cannot read .*No such file"):
        load_mesh(tmp_path / "gone.glb")


def test_not_finite(writer):
    corners = np.array([[0, 0, 0], [np.nan, 0, 0], [0, np.inf, 0]], np.float32)
    refused(writer.scene({"mesh": writer.mesh(corners)}).glb(), "2 of 3 vertices are not finite")


def test_unused_vertices_may_be_anything(writer):
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [np.nan] * 3], np.float32)
    mesh = load_mesh(writer.scene({"mesh": writer.mesh(corners)}).glb())
    assert len(mesh.vertices) == 3 and mesh.num_faces == 1


def test_empty_scene(writer):
    refused(writer.scene({"name": "nothing"}).glb(), "no triangles: an empty scene")


def test_point_cloud(writer):
    refused(writer.scene({"mesh": writer.mesh(mode=0)}).glb(), "no triangles: a point cloud")


def test_no_extent_and_no_area(writer):
    mesh = writer.mesh(np.ones((3, 3), np.float32))
    refused(writer.scene({"mesh": mesh}).glb(), "all vertices lie on one point")
    line = writer.mesh(np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]], np.float32))
    refused(writer.scene({"mesh": line}).glb(), "no triangle has an area")


def test_faces_without_area_are_dropped_and_noted(writer):
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [2, 0, 0]], np.float32)
    mesh = load_mesh(writer.scene({"mesh": writer.mesh(corners, [0, 1, 2, 0, 1, 3, 1, 1, 2])}).glb())
    assert mesh.num_faces == 1 and mesh.notes == ("2 triangles without area are dropped",)


def test_over_the_face_limit_without_reading_it(writer):
    writer.json["accessors"] += [
        {"componentType": 5126, "type": "VEC3", "count": 30_000_000},
    ]
    writer.add("meshes", {"primitives": [{"attributes": {"POSITION": 0}}]})
    refused(writer.scene({"mesh": 0}).glb(), r"10,000,000 triangles is over the limit of 4,000,000")


def test_instances_count_towards_the_limit(writer):
    mesh = writer.mesh()
    data = writer.scene(*({"mesh": mesh} for _ in range(11))).glb()
    refused(data, "11 triangles is over the limit of 10 .raise max_faces", limits=Limits(max_faces=10))


def test_huge_accessor_is_not_allocated(writer):
    normals = {"componentType": 5126, "type": "VEC3", "count": 1 << 40}
    writer.json["accessors"].append(normals)
    mesh = writer.mesh(attributes={"NORMAL": 0})
    refused(writer.scene({"mesh": mesh}).glb(), "is over the limit")


def test_node_cycles_and_bad_references(writer):
    writer.json["nodes"] = [{"children": [1]}, {"children": [0]}]
    writer.json["scenes"] = [{"nodes": [0]}]
    refused(writer.glb(), "two parents or is its own ancestor")
    writer.json["nodes"] = [{"mesh": 7}]
    refused(writer.glb(), r"meshes\[7\] is referred to and missing")


def test_bad_indices(writer):
    refused(
        writer.scene({"mesh": writer.mesh(indices=[0, 1, 9])}).glb(), "vertex index 9 is past the 3 vertices"
    )


def test_accessor_past_its_view(writer):
    mesh = writer.mesh()
    writer.json["accessors"][0]["count"] = 300
    refused(writer.scene({"mesh": mesh}).glb(), "truncated or damaged")


def test_unknown_required_extension(writer):
    writer.json["extensionsRequired"] = ["EXT_nobody_knows"]
    refused(writer.scene({"mesh": writer.mesh()}).glb(), "requires the glTF extension EXT_nobody_knows")


def with_image(writer, data: bytes) -> bytes:
    image = writer.add("images", {"bufferView": writer.view(data), "mimeType": "image/png"})
    texture = writer.add("textures", {"source": image})
    material = writer.add("materials", {"pbrMetallicRoughness": {"baseColorTexture": {"index": texture}}})
    uvs = writer.accessor(np.zeros((3, 2), "f4"))
    mesh = writer.mesh(material=material, attributes={"TEXCOORD_0": uvs})
    return writer.scene({"mesh": mesh}).glb()


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, (width, height), 0).save(stream, "PNG")
    return stream.getvalue()


def test_images(writer):
    data = with_image(writer, png(300, 200))
    refused(data, "60,000 pixels in .* is over the limit", limits=Limits(max_texture_pixels=50_000))
    refused(data, "bytes of textures", limits=Limits(max_texture_bytes=100_000))
    mesh = load_mesh(data, limits=Limits(max_texture_size=150))
    texture = mesh.materials[0].base_color_texture
    assert texture is not None and texture.pixels.shape == (100, 150, 4)
    assert any("shrunk from 300 x 200 to 150 x 100" in note for note in mesh.notes)


def test_damaged_images(writer):
    refused(with_image(writer, b"\x89PNG\r\n\x1a\n broken"), r"images\[0\]: image is damaged")


def test_ktx2_is_named(writer):
    refused(with_image(writer, b"\xabKTX 20\xbb\r\n\x1a\n" + b"\0" * 80), "image is KTX2")


def test_sixteen_bit_grey_keeps_its_range(writer):
    from PIL import Image

    stream = io.BytesIO()
    ramp = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(ramp).save(stream, "PNG")
    texture = load_mesh(with_image(writer, stream.getvalue())).materials[0].base_color_texture
    assert texture is not None
    np.testing.assert_array_equal(texture.pixels[0, :, 0], [0, 100, 255])
    np.testing.assert_array_equal(texture.pixels[0, :, 3], 255)


def test_zip_that_lies(tmp_path, triangle_glb):
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.glb", b"\0" * 1_000_000)
        archive.writestr("../evil.glb", triangle_glb)
        archive.writestr("good.glb", triangle_glb)
    source = str(path)
    assert load_mesh(FileSource(source, "good.glb")).num_faces == 1
    refused(FileSource(source, "../evil.glb"), "leaves its folder or archive")
    refused(FileSource(source, "no.glb"), "has no member 'no.glb'")
    refused(FileSource(source, "big.glb"), "1,000,000 bytes", limits=Limits(max_file_bytes=1000))
    content = bytearray(path.read_bytes())
    at = content.find(triangle_glb[:20])
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("good.glb", triangle_glb)
    content = bytearray(damaged.read_bytes())
    at = content.find(triangle_glb[:20])
    content[at + 30] ^= 0xFF
    damaged.write_bytes(content)
    refused(FileSource(str(damaged), "good.glb"), "cannot unpack 'good.glb'.*CRC")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_escapes_as_another_error(triangle_glb, data):
    """Bytes changed, cut or inserted anywhere give a mesh or an InputError."""
    damaged = bytearray(triangle_glb)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged
    try:
        mesh = load_mesh(bytes(damaged), name="a", file_type="glb")
    except InputError as error:
        assert str(error).startswith("a: ")
    else:
        assert np.isfinite(mesh.vertices).all() and mesh.num_faces > 0


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="vtnf /-.0123456789\nusemtl#e", max_size=200))
def test_any_obj_text(text):
    try:
        load_mesh(text.encode(), name="a", file_type="obj")
    except InputError as error:
        assert str(error).startswith("a: ")
