"""Scores in the frame of a photograph: the truth scores best, what is turned or shifted scores less."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diff2to3.errors import InputError
from diff2to3.evaluation.photo_frame import (
    TURNS,
    VIEW_SIZE,
    compared,
    in_photo_frame,
    part_of,
    summarised,
    truth_of,
    viewmats_around,
)
from diff2to3.evaluation.photo_frame_run import Run, tables
from diff2to3.gaussians.turn import turned
from diff2to3.pipeline import Result
from diff2to3.types import Gaussians, Material, Mesh, SparseVoxels
from diff2to3.views.photo_frame import transformed

R = 16


@pytest.fixture(scope="module")
def mesh():
    """A red box on the ground with a blue post at one corner, so that no two sides look alike."""
    trimesh = pytest.importorskip("trimesh", reason="needs the data extra")
    pytest.importorskip("embreex", reason="needs the data extra")
    base = trimesh.creation.box((1.0, 0.6, 0.3))
    post = trimesh.creation.box((0.2, 0.2, 0.8)).apply_translation((0.4, 0.2, 0.3))
    vertices = np.concatenate([base.vertices, post.vertices]).astype(np.float32)
    vertices -= (vertices.min(0) + vertices.max(0)) / 2
    vertices /= np.ptp(vertices, 0).max()
    faces = np.concatenate([base.faces, post.faces + len(base.vertices)]).astype(np.int32)
    ids = np.repeat(np.arange(2, dtype=np.int32), 12)
    materials = tuple(
        Material(n, (*c, 1.0)) for n, c in (("red", (0.8, 0.1, 0.1)), ("blue", (0.1, 0.1, 0.8)))
    )
    return Mesh(vertices.astype(np.float32), faces, ids, materials)


def on_surface(mesh: Mesh, count: int = 6000) -> Gaussians:
    """Small opaque Gaussians over the surface, in the material's colours."""
    from diff2to3.metrics.geometry import sample_surface

    points = sample_surface(mesh, count, np.random.default_rng(0))
    post = (points[:, 2] > points[:, 2].min() + 0.45).float()[:, None]
    colors = post * torch.tensor([0.35, 0.35, 0.9]) + (1 - post) * torch.tensor([0.9, 0.35, 0.35])
    quats = torch.tensor([1.0, 0, 0, 0]).expand(count, 4).contiguous()
    sh = ((colors - 0.5) / 0.28209479177387814)[:, None]
    return Gaussians(points.float(), quats, torch.full((count, 3), 0.012), torch.full((count,), 0.9), sh)


def result_of(gaussians, truth, frame="photo", coords=None):
    coords = truth.occupancy.nonzero().int() if coords is None else coords
    packed = torch.cat([torch.zeros(len(coords), 1, dtype=torch.int32), coords.int()], 1)
    latents = SparseVoxels.from_coords(packed, torch.zeros(len(coords), 4), R, 1)
    camera = truth.camera if frame == "photo" else None
    return Result(gaussians, latents, coords, 0, frame=frame, camera=camera)


@pytest.fixture(scope="module")
def truth(mesh):
    return truth_of(mesh, "a/box", R)


def test_a_photograph_is_always_the_same_and_within_its_range(mesh, truth):
    again = truth_of(mesh, "a/box", R)
    assert again.picture.tobytes() == truth.picture.tobytes() and torch.equal(again.views, truth.views)
    assert truth_of(mesh, "another", R).picture.tobytes() != truth.picture.tobytes()
    assert -8 < truth.camera.elevation < 48 and 1.1 < truth.camera.focal < 4.1
    assert truth.views.shape == (8, VIEW_SIZE, VIEW_SIZE, 3)
    # the first view is the photograph's own: their silhouettes agree
    alpha = torch.from_numpy(np.asarray(truth.picture)[..., 3].copy()).float()[None, None] / 255
    small = torch.nn.functional.interpolate(alpha, (VIEW_SIZE, VIEW_SIZE), mode="area")[0, 0] > 0.5
    seen = (truth.views[0] < 0.97).any(-1)
    assert float((small & seen).sum() / (small | seen).sum()) > 0.95


def test_the_truth_scores_best(mesh, truth):
    right = in_photo_frame(on_surface(mesh), truth.transform)
    scores = compared(result_of(right, truth), truth)
    assert scores["voxel_iou"] == 1.0 and scores["elevation_error"] == 0.0 and scores["psnr"] > 17
    angle = torch.tensor(0.6)
    spin = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1.0]])
    for wrong in (turned(right, spin), replace(right, means=right.means + 0.1)):
        worse = compared(result_of(wrong, truth), truth)
        assert worse["psnr"] < scores["psnr"] - 1 and worse["ssim"] < scores["ssim"]
    half = truth.occupancy.nonzero()[::2]
    assert compared(result_of(right, truth, coords=half), truth)["voxel_iou"] == pytest.approx(0.5, abs=0.01)


def test_a_model_of_the_objects_frame_is_given_the_photographs_frame(mesh, truth):
    """Gaussians on the asset in its own frame score as those that were made in the photo frame."""
    own = on_surface(mesh)
    points = transformed(own.means.numpy().astype(np.float64), truth.transform)
    np.testing.assert_allclose(in_photo_frame(own, truth.transform).means.numpy(), points, atol=1e-5)
    scale = np.linalg.norm(truth.transform[:3, 0])
    by_hand = replace(own, means=torch.from_numpy(points).float(), scales=own.scales * float(scale))
    there = compared(result_of(by_hand, truth), truth)  # round Gaussians: how they are turned does not matter
    here = compared(result_of(own, truth, frame="object"), truth)
    assert here["voxel_iou"] is None and here["elevation_error"] is None
    assert here["psnr"] == pytest.approx(there["psnr"], abs=1e-3)


def test_views_stand_around_the_photographs_camera(truth):
    viewmats = viewmats_around(truth.camera)
    eyes = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
    torch.testing.assert_close(eyes[0], torch.tensor(truth.camera.eye), atol=1e-5, rtol=0)
    assert torch.allclose(eyes[:, 2], eyes[0, 2], atol=1e-5)
    azimuths = torch.rad2deg(torch.atan2(eyes[:, 1], eyes[:, 0]))
    steps = torch.remainder(azimuths - azimuths[0], 360)
    assert torch.allclose(
        torch.remainder(steps - torch.tensor(TURNS) + 180, 360), torch.full((8,), 180.0), atol=1e-2
    )


def test_thirds_are_thirds_and_stay():
    parts = [part_of(f"pack/asset-{i}") for i in range(3000)]
    assert all(900 < parts.count(part) < 1100 for part in range(3))
    assert part_of("kaykit-furniture-bits/bed-double-a") == 0


def test_a_run_goes_on_and_refuses_the_lines_of_another(mesh, truth, tmp_path, monkeypatch):
    from diff2to3.evaluation import photo_frame_run
    from tests.data.conftest import colored_box, write_source

    source = write_source(
        tmp_path / "source", {f"box{i}.glb": colored_box((1.0, 0.5, 0.6), i) for i in range(3)}
    )
    calls = []

    class Model:
        networks = type("N", (), {"latent_flow": type("F", (), {"config": type("C", (), {"resolution": R})})})

        def __call__(self, picture, seed):
            calls.append(seed)
            if len(calls) == 2:
                raise InputError("the structure stage generated no voxel")
            return result_of(block(), truth)

    def block():
        points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 0.5
        quats = torch.tensor([1.0, 0, 0, 0]).expand(500, 4).contiguous()
        return Gaussians(
            points, quats, torch.full((500, 3), 0.03), torch.full((500,), 0.8), torch.zeros(500, 1, 3)
        )

    monkeypatch.setattr(photo_frame_run.ImageTo3D, "from_pretrained", lambda *a, **k: Model())
    run = Run("mini-photo", 0, "cpu", tmp_path / "out" / "x.jsonl")
    first = run.over([str(source)], None, "all", 2)
    assert len(first) == 2 and [("error" in row) for row in first] == [False, True]
    rows = run.over([str(source)], None, "all", None)
    assert len(rows) == 3 and len(calls) == 3 and rows[:2] == first
    table = tables(tmp_path / "out" / "x.json", rows, run.settings(), "all")
    assert "2 assets (all), 1 failed" in table and "| psnr |" in table
    stored = json.loads((tmp_path / "out" / "x.json").read_text())
    assert stored["summary"]["psnr"]["count"] == 2 and len(stored["failed"]) == 1
    mean = np.mean([row["psnr"] for row in rows if "error" not in row])
    assert stored["summary"]["psnr"]["mean"] == pytest.approx(mean)
    with pytest.raises(InputError, match="another run"):
        Run("mini-photo", 1, "cpu", tmp_path / "out" / "x.jsonl").over([str(source)], None, "all", None)
    assert summarised([]) == {}
