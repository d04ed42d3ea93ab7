"""Recognition: photos that are renderings of the assets are recognised; those of other assets are not."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.evaluation.recognition import (
    PICTURE_SIDE,
    SILHOUETTE_SIDE,
    Recognisable,
    box_normalised,
    cameras_around,
    colors_of,
    feature_scores,
    scored,
    share_first,
    silhouette,
    silhouette_scores,
    silhouettes_around,
    turned_about_z,
)
from diff2to3.evaluation.recognition_run import collected, generated, map_network, recognition_table
from diff2to3.formats import write
from diff2to3.gaussians.render import render_pictures
from diff2to3.types import Gaussians
from diff2to3.views.photo_frame import PhotoCamera


def solid(points: torch.Tensor, color: tuple[float, float, float]) -> Gaussians:
    """Small opaque Gaussians at points [N, 3] of one colour."""
    count = len(points)
    sh = (torch.tensor(color) - 0.5) / 0.28209479177387814
    return Gaussians(
        points.float(),
        torch.tensor([1.0, 0, 0, 0]).expand(count, 4).contiguous(),
        torch.full((count, 3), 0.02),
        torch.full((count,), 0.95),
        sh.expand(count, 1, 3).contiguous(),
    )


def block(extents: tuple[float, float, float], color: tuple[float, float, float]) -> Gaussians:
    axes = [torch.arange(-e / 2 + 0.02, e / 2, 0.03) for e in extents]
    return solid(torch.cartesian_prod(*axes), color)


CAMERA = PhotoCamera(15.0, 2.0)
ASSETS = {
    "post": block((0.2, 0.2, 0.8), (0.8, 0.2, 0.2)),
    "plate": block((0.8, 0.8, 0.1), (0.2, 0.7, 0.3)),
    "cube": block((0.5, 0.5, 0.5), (0.2, 0.3, 0.8)),
}


def photographed(gaussians: Gaussians) -> torch.Tensor:
    images, alphas = render_pictures(
        gaussians, CAMERA.viewmat[None], CAMERA.K(128)[None], 128, 128, background=0.0
    )
    straight = images[0] / alphas[0, ..., None].clamp(min=1e-3)
    return torch.cat([straight.clamp(0, 1), alphas[0, ..., None]], -1)


def items(shift: int = 0) -> list[Recognisable]:
    """Photos with their own assets, or with those ``shift`` places farther."""
    names = list(ASSETS)
    return [
        Recognisable(name, photographed(ASSETS[name]), ASSETS[names[(i + shift) % len(names)]], CAMERA)
        for i, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def network():
    return map_network()


def test_box_normalised_fills_the_square_along_the_longer_side_and_centres():
    picture = torch.zeros(100, 140, 4)
    picture[30:50, 60:100] = torch.tensor([1.0, 0.0, 0.0, 1.0])  # 40 wide, 20 high
    seen = box_normalised(picture, 64)
    expected = torch.zeros(64, 64)
    expected[16:48] = 1.0
    assert float((seen[..., 3] - expected).abs().mean()) < 0.02
    assert torch.allclose(seen[32, 32], torch.tensor([1.0, 0, 0, 1]), atol=1e-5)
    assert torch.allclose(seen[2, 2], torch.tensor([0.5, 0.5, 0.5, 0]), atol=1e-5)
    large = torch.nn.functional.interpolate(picture.permute(2, 0, 1)[None], scale_factor=9)[0].permute(
        1, 2, 0
    )
    torch.testing.assert_close(box_normalised(large, 64)[..., 3], seen[..., 3], atol=0.5, rtol=0)
    assert float((box_normalised(large, 64)[..., 3] - seen[..., 3]).abs().mean()) < 0.02
    with pytest.raises(InputError, match="half opaque"):
        box_normalised(torch.zeros(8, 8, 4), 64)


def test_scores_of_silhouettes_are_those_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    photos = torch.rand(3, SILHOUETTE_SIDE, SILHOUETTE_SIDE, generator=generator) > 0.5
    assets = [torch.rand(n, SILHOUETTE_SIDE, SILHOUETTE_SIDE, generator=generator) > 0.6 for n in (2, 5, 1)]
    scores, views = silhouette_scores(photos, assets)
    for p, photo in enumerate(photos.numpy()):
        for a, asset in enumerate(assets):
            each = [(photo & v).sum() / (photo | v).sum() for v in asset.numpy()]
            assert float(scores[p, a]) == pytest.approx(max(each), abs=1e-6)
            assert int(views[p, a]) == int(np.argmax(each))


def test_the_views_are_72_and_stand_where_they_should():
    viewmats, Ks = cameras_around()
    assert viewmats.shape == (72, 4, 4) and Ks.shape == (72, 3, 3)
    eyes = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
    torch.testing.assert_close(eyes.norm(dim=1), torch.full((72,), 3.0), atol=1e-4, rtol=0)
    assert len({tuple(np.round(eye.numpy(), 3)) for eye in eyes}) == 72
    assert float(eyes[0, 1]) == pytest.approx(-3.0, abs=1e-4)  # the photo's side first


def test_turning_the_camera_is_turning_the_object_back():
    viewmat, angle = CAMERA.viewmat, math.radians(30)
    point = torch.tensor([0.3, -0.2, 0.1])
    back = torch.tensor(
        [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
    )
    seen = turned_about_z(viewmat, 30)[:3, :3] @ point
    torch.testing.assert_close(seen, viewmat[:3, :3] @ (back @ point), atol=1e-6, rtol=0)


def test_the_share_counts_ties_as_lost():
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.9, 0.3], [0.9, 0.1, 0.2]])
    assert share_first(scores) == [0.0, 1.0, 0.0]


def test_likeness_is_the_cosine_of_standardised_features():
    generator = torch.Generator().manual_seed(1)
    photos, assets = torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator) + 5
    both = torch.cat([photos, assets]).double().numpy()
    rows = (both - both.mean(0)) / both.std(0, ddof=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(feature_scores(photos, assets).numpy(), rows[:3] @ rows[3:].T, atol=1e-5)


def test_own_assets_are_recognised_and_others_are_not(network):
    own = scored(items(), network)["summary"]
    for name in ("silhouette_first", "features_first", "features_first+30", "features_first-30"):
        assert own[name]["mean"] == 1.0
    assert own["silhouette_iou"]["mean"] > 0.9
    assert own["photo_iou"]["mean"] > 0.97 and own["photo_psnr"]["mean"] > 30
    assert own["color_difference"]["mean"] < 1.5
    other = scored(items(shift=1), network)["summary"]
    for name in ("silhouette_first", "features_first"):
        assert other[name]["mean"] == 0.0
    assert other["silhouette_iou"]["mean"] < own["silhouette_iou"]["mean"] - 0.1
    assert other["color_difference"]["mean"] > 20


def test_colours_differ_by_what_lab_says():
    red = torch.zeros(PICTURE_SIDE, PICTURE_SIDE, 4)
    red[..., 0], red[..., 3] = 1.0, 1.0
    assert colors_of(red, red)["color_difference"] == pytest.approx(0.0, abs=1e-6)
    grey = red.clone()
    grey[..., :3] = 0.5
    # the chroma of sRGB red is 104.55 in CIELAB (D65), that of grey 0
    assert colors_of(red, grey)["chroma_difference"] == pytest.approx(104.55, abs=0.1)


def test_an_asset_without_a_camera_is_seen_from_its_best_view(network):
    found = scored([Recognisable(i.name, i.photo, i.gaussians) for i in items()], network)
    assert "photo_psnr" not in found["summary"]
    assert found["summary"]["features_first"]["mean"] == 1.0
    assert all(row["photo_iou"] is None for row in found["assets"].values())


def test_an_empty_asset_scores_nothing_and_does_not_stop_the_others(network):
    empty = block((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    empty.opacities.fill_(0.0)
    assert not silhouettes_around(empty).any() and not silhouette(torch.zeros(9, 9)).any()
    chosen = items()
    chosen[0] = Recognisable("empty", chosen[0].photo, empty, CAMERA)
    rows = scored(chosen, network)["assets"]
    assert rows["empty"]["silhouette_iou"] == 0.0 and rows["empty"]["color_difference"] is None
    with pytest.raises(InputError, match="at least two"):
        scored(chosen[:1], network)


@pytest.fixture
def folders(tmp_path):
    """Photos, and what ``diff2to3 generate`` would have written for them."""
    photos, assets = tmp_path / "photos", tmp_path / "assets"
    photos.mkdir()
    for item in items():
        pixels = (item.photo.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels, "RGBA").save(photos / f"{item.name}.png")
        (assets / item.name).mkdir(parents=True)
        write(assets / item.name / f"{item.name}.ply", item.gaussians)
        camera = {"camera": {"elevation": CAMERA.elevation, "focal": CAMERA.focal}}
        (assets / item.name / "metadata.json").write_text(json.dumps(camera))
    (photos / "README.md").write_text("not a picture")
    return photos, assets


def test_what_generate_wrote_is_read(folders, network):
    photos, assets = folders
    found = collected(photos, assets, "auto")
    assert [item.name for item in found] == sorted(ASSETS)
    summary = scored(found, network)
    assert summary["summary"]["silhouette_first"]["mean"] == 1.0
    table = recognition_table({"model": "x", "photos": 3, **summary})
    assert "| silhouette_first | 1.000 | 1.000 |" in table and "| cube |" in table
    (assets / "cube" / "cube.ply").unlink()
    with pytest.raises(InputError, match=r"no asset of cube\.png"):
        collected(photos, assets, "auto")


def test_a_run_keeps_its_assets_and_refuses_those_of_another(folders, tmp_path, monkeypatch):
    photos, _ = folders
    made = []

    class Model:
        def __call__(self, image, *, seed, background_removal):
            made.append(seed)
            result = type("R", (), {})()
            result.camera, result.photos = CAMERA, [type("P", (), {"method": "alpha"})()]
            result.save = lambda path: write(path, ASSETS["cube"])
            return result

    monkeypatch.setattr(
        "diff2to3.evaluation.recognition_run.ImageTo3D.from_pretrained", lambda *a, **k: Model()
    )
    kept = tmp_path / "kept"
    first = generated(photos, "mine", kept, 5, "cpu", "auto")
    assert made == [5, 5, 5] and len(first) == 3 and first[0].camera == CAMERA
    (kept / "plate.json").unlink()
    generated(photos, "mine", kept, 5, "cpu", "auto")
    assert made == [5, 5, 5, 5]
    with pytest.raises(InputError, match="another run"):
        generated(photos, "mine", kept, 6, "cpu", "auto")
    with pytest.raises(InputError, match="at least two"):
        generated(kept, "mine", tmp_path / "other", 5, "cpu", "auto")
