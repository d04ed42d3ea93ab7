"""Kaolin and Blender behind the same interface: their conventions with stand-ins, and the real ones where they are."""

from __future__ import annotations

import os
import stat
import sys
import types

import numpy as np
import pytest
import torch

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.views import BlenderConfig, LightingConfig, RenderConfig, intrinsics, look_at, render_views
from diff2to3.views.config import OUTPUTS

pytest.importorskip("embreex")

CAMERAS = (look_at([[1.1, -1.2, 0.8], [-0.5, 1.5, -1.0]]), intrinsics(np.full(2, 0.7), 40, 32), 40, 32)


def kaolin_rasterize(height, width, face_vertices_z, face_vertices_image, face_features, **_):
    """What Kaolin documents: x right, y up in [-1, 1]; pixel centres; z linear in the image; the greatest wins."""
    z, corners = face_vertices_z[0].double(), face_vertices_image[0].double()
    y, x = torch.meshgrid(
        1 - (2 * torch.arange(height, dtype=torch.float64) + 1) / height,
        (2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1,
        indexing="ij",
    )
    best = torch.full((height, width), -torch.inf, dtype=torch.float64)
    faces = torch.full((height, width), -1)
    for index, ((a, b, c), (az, bz, cz)) in enumerate(zip(corners, z, strict=True)):
        w = [(q[0] - x) * (r[1] - y) - (q[1] - y) * (r[0] - x) for q, r in ((b, c), (c, a), (a, b))]
        total = sum(w)
        w = [v / total for v in w]
        depth = w[0] * az + w[1] * bz + w[2] * cz
        wins = (w[0] >= 0) & (w[1] >= 0) & (w[2] >= 0) & (depth > best)
        best, faces = torch.where(wins, depth, best), torch.where(wins, index, faces)
    return face_features.new_zeros(1, height, width, 1), faces[None]


@pytest.fixture
def kaolin_stand_in(monkeypatch):
    package = types.ModuleType("kaolin")
    package.__version__ = "0.0-test"
    package.render = types.SimpleNamespace(mesh=types.SimpleNamespace(rasterize=kaolin_rasterize))
    monkeypatch.setitem(sys.modules, "kaolin", package)


def test_kaolin_agrees_with_the_ray_caster(kaolin_stand_in, soup):
    from diff2to3.views.kaolin import KaolinRenderer

    mesh = soup(40, 1)
    config = RenderConfig(renderer="kaolin", outputs=OUTPUTS)
    found = KaolinRenderer(mesh, config, device="cpu").render(*CAMERAS)
    wanted = render_views(mesh, *CAMERAS, RenderConfig(outputs=OUTPUTS))
    assert found.renderer.startswith("kaolin 0.0-test, raycast")
    same = found.triangle_ids == wanted.triangle_ids
    assert same.float().mean() > 0.998
    torch.testing.assert_close(found.depths[same], wanted.depths[same], atol=1e-4, rtol=0)
    difference = (found.images - wanted.images).abs()[same]
    assert difference.mean() < 1e-3 and difference.quantile(0.99) < 5e-3


def test_kaolin_leaves_what_it_cannot_clip_to_the_ray_caster(kaolin_stand_in, cube):
    from diff2to3.views.kaolin import KaolinRenderer

    inside = (look_at([[0.1, 0, 0]]), intrinsics(1.5, 24, 24), 24, 24)
    config = RenderConfig(outputs=OUTPUTS, lighting=LightingConfig(mode="unlit"))
    found = KaolinRenderer(cube, config, device="cpu").render(*inside)
    assert torch.equal(found.triangle_ids, render_views(cube, *inside, config).triangle_ids)


def test_missing_kaolin_is_named(cube, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaolin", None)
    with pytest.raises(MissingDependencyError, match="kaolin"):
        render_views(cube, *CAMERAS, RenderConfig(renderer="kaolin"))


FAKE_BLENDER = """#!{python}
# Stands in for an interpreter with bpy: checks what it is given and writes one colour a view.
import json, os, sys
sys.path[:0] = {path!r}
import numpy as np
from PIL import Image
script, folder = sys.argv[-2:]
job = json.load(open(os.path.join(folder, "job.json")))
scene = np.load(os.path.join(folder, "scene.npz"))
mode = {mode!r}
if mode == "no bpy":
    sys.exit("ModuleNotFoundError: No module named 'bpy'")
if mode == "crash":
    sys.exit("Error: out of patience")
if mode == "sleep":
    import time
    time.sleep(60)
assert os.path.basename(script) == "blender_script.py" and sys.argv[1] == "-I"
assert scene["viewmats"].shape[1:] == (4, 4) and scene["faces"].shape[1] == 3
assert job["materials"][0]["base_color_factor"] == [1.0, 0.0, 0.0, 1.0]
assert job["blender"]["samples"] == 5 and job["lights"]["mode"] == "studio"
files = []
for index in range(len(scene["viewmats"])):
    files.append(f"{{index}}.png")
    pixels = np.full((job["height"], job["width"], 4), 50 * (index + 1), np.uint8)
    Image.fromarray(pixels, "RGBA").save(os.path.join(folder, files[-1]))
json.dump({{"version": "9.9", "files": files}}, open(os.path.join(folder, "result.json"), "w"))
"""


@pytest.fixture
def stand_in(tmp_path):
    def make(mode: str = "", seconds: float = 60) -> RenderConfig:
        program = tmp_path / "interpreter"
        program.write_text(FAKE_BLENDER.format(python=sys.executable, path=sys.path, mode=mode))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        options = BlenderConfig(python=str(program), samples=5, seconds=seconds)
        return RenderConfig(renderer="blender", blender=options, outputs=("depths", "triangle_ids"))

    return make


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script with a #! line")
def test_blender_protocol(cube, stand_in):
    views = render_views(cube, *CAMERAS, stand_in())
    assert views.renderer == "blender 9.9 cycles published" and views.images.shape == (2, 32, 40, 3)
    torch.testing.assert_close(views.alphas[1], torch.full((32, 40), 100 / 255))
    other = render_views(cube, *CAMERAS, RenderConfig(outputs=OUTPUTS))
    assert torch.equal(views.depths, other.depths) and torch.equal(views.triangle_ids, other.triangle_ids)
    assert views.points is None


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script with a #! line")
def test_blender_failures(cube, stand_in):
    with pytest.raises(InputError, match="Blender failed: Error: out of patience"):
        render_views(cube, *CAMERAS, stand_in("crash"))
    with pytest.raises(InputError, match=r"took longer than the limit of 0\.5 s"):
        render_views(cube, *CAMERAS, stand_in("sleep", seconds=0.5))
    with pytest.raises(MissingDependencyError, match=r"bpy .*pip install bpy"):
        render_views(cube, *CAMERAS, stand_in("no bpy"))
    nowhere = RenderConfig(renderer="blender", blender=BlenderConfig(python="/no/such/program"))
    with pytest.raises(MissingDependencyError, match="no program '/no/such/program'"):
        render_views(cube, *CAMERAS, nowhere)


@pytest.mark.slow
def test_real_blender_agrees_without_light(soup):
    """With an interpreter that has bpy in DIFF2TO3_TEST_BLENDER: same shapes, colours and cameras as the ray caster."""
    program = os.environ.get("DIFF2TO3_TEST_BLENDER")
    if not program:
        pytest.skip("DIFF2TO3_TEST_BLENDER names no interpreter with bpy")
    unlit = LightingConfig(mode="unlit")
    Ks = CAMERAS[1].clone()
    Ks[:, 0, 2] += 3  # off centre, and the image is not square
    Ks[:, 1, 2] -= 2
    options = BlenderConfig(python=program, samples=64, denoise="none")
    mesh = soup(60, 2)
    found = render_views(
        mesh, CAMERAS[0], Ks, 40, 32, RenderConfig(renderer="blender", blender=options, lighting=unlit)
    )
    wanted = render_views(mesh, CAMERAS[0], Ks, 40, 32, RenderConfig(lighting=unlit, supersample=8))
    assert (found.alphas - wanted.alphas).abs().mean() < 0.01
    solid = (wanted.alphas == 1) & (found.alphas == 1)
    assert (found.images - wanted.images).abs()[solid].mean() < 0.01
