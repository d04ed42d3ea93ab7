"""From a file to pixels: axes, colours and transparency survive the whole way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from diff2to3.assets import FileSource, load_mesh
from diff2to3.views import (
    CameraConfig,
    LightingConfig,
    RenderConfig,
    intrinsics,
    look_at,
    render_views,
    sample_cameras,
)
from diff2to3.views.config import OUTPUTS

pytest.importorskip("embreex")


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem + "_helpers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


views_meshes = load_module(Path(__file__).with_name("conftest.py"))
GlbWriter = load_module(Path(__file__).parents[1] / "assets" / "conftest.py").GlbWriter


@pytest.mark.parametrize("textured", [False, True])
def test_red_green_blue_cube(textured):
    """A GLB whose +x, +y and +z sides are red, green and blue: its right, top and front, in glTF's axes."""
    writer = GlbWriter()
    nodes = []
    for normal, color in zip(views_meshes.SIDES, views_meshes.COLORS, strict=True):
        right = np.roll(normal, 1)
        corners = views_meshes.quad(normal, right, np.cross(normal, right)).reshape(-1, 3)
        pbr: dict = {"baseColorFactor": [*color, 1]}
        attributes = {}
        if textured:
            image = writer.image(np.full((4, 4, 3), color * 255, np.uint8))
            pbr = {"baseColorTexture": {"index": writer.add("textures", {"source": image})}}
            attributes = {"TEXCOORD_0": writer.accessor(np.random.default_rng(0).random((6, 2)).astype("f4"))}
        material = writer.add("materials", {"pbrMetallicRoughness": pbr})
        mesh_id = writer.mesh(corners, range(6), material=material, attributes=attributes)
        nodes.append({"mesh": mesh_id, "translation": [7, 8, 9], "scale": [3, 3, 3]})
    mesh = load_mesh(writer.scene(*nodes).glb(), name="cube")
    unlit = RenderConfig(lighting=LightingConfig(mode="unlit"), outputs=OUTPUTS)
    Ks = intrinsics(np.radians(40), 64, 64)
    file_to_object = {"right": (2, 0, 0), "top": (0, 0, 2), "front": (0, -2, 0)}
    for (side, eye), color in zip(file_to_object.items(), np.eye(3), strict=True):
        views = render_views(mesh, look_at([eye]), Ks, 64, 64, unlit)
        face = views.alphas[0] == 1
        assert int(face.sum()) == 58**2, side  # 64 / (2 tan 20 degrees x 1.5) pixels wide
        assert float((views.images[0][face] - views.images.new_tensor(color)).abs().max()) <= 2 / 255, side
    views = render_views(mesh, look_at([(1.4, -1.6, 1.2)]), Ks, 64, 64, unlit)
    pixels = views.images[0][views.alphas[0] == 1].numpy()
    areas = [int((np.abs(pixels - color) <= 2 / 255).all(1).sum()) for color in views_meshes.COLORS]
    assert min(areas[0], areas[2], areas[4]) > 150  # red, green and blue from above, right and in front
    assert max(areas[1], areas[3], areas[5]) == 0


def test_fixtures_render(shared: Path):
    """Every 60th model: centred, inside the view, opaque where solid, and nearer surfaces face the camera."""
    rows = [json.loads(line) for line in (shared / "assets" / "manifest.jsonl").read_text().splitlines()]
    for row in rows[::60]:
        source = FileSource(str(shared / "assets" / f"{row['pack']}.zip"), row["file"])
        mesh = load_mesh(source, name=row["id"])
        viewmats, Ks = sample_cameras(CameraConfig("fitted", num_views=3), 64, 64, np.random.default_rng(0))
        views = render_views(mesh, viewmats, Ks, 64, 64, RenderConfig(outputs=OUTPUTS))
        seen = views.triangle_ids >= 0
        assert seen.any(), row["id"]
        assert not (views.alphas[:, [0, -1]] > 0).any() and not (views.alphas[:, :, [0, -1]] > 0).any(), row[
            "id"
        ]
        assert float(views.points[seen].abs().max()) <= 0.5 + 1e-4, row["id"]
        eyes = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
        toward = ((eyes[:, None, None] - views.points) * views.normals).sum(-1)[seen]
        assert float((toward > 0).float().mean()) > 0.97, row[
            "id"
        ]  # smoothed normals may lean away at outlines
        assert float(views.images.min()) >= 0 and float(views.images.max()) <= 1
