"""Fitting an asset to its photo, on scenes whose photo is a rendering of what the asset should become."""

import math

import pytest
import torch
from torch import Tensor

from diff2to3.gaussians.render import render
from diff2to3.pipeline.refine import Fit, RefineConfig, Refined, around, over, place_of, refine, shrunk
from diff2to3.types import Gaussians
from diff2to3.views.photo_frame import PhotoCamera

CAMERA = PhotoCamera(20.0, 2.0)
SIZE = 64
FAST = RefineConfig(steps=30, size=SIZE)


def ball(count: int = 1500, seed: int = 0) -> Gaussians:
    """Opaque Gaussians over a sphere, coloured by where they are."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    colors = 0.5 + 0.4 * torch.sin(7 * at)
    quats = torch.zeros(count, 4)
    quats[:, 0] = 1
    sh = (colors[:, None] - 0.5) / 0.28209479177387814
    return Gaussians(0.35 * at, quats, torch.full((count, 3), 0.018), torch.full((count,), 0.95), sh)


def painted(gaussians: Gaussians, color: float) -> Gaussians:
    sh = torch.full_like(gaussians.sh, (color - 0.5) / 0.28209479177387814)
    return Gaussians(gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, sh)


def photo_of(gaussians: Gaussians, camera: PhotoCamera = CAMERA, size: int = SIZE) -> tuple[Tensor, Tensor]:
    drawn = render(gaussians, camera.viewmat[None], camera.K(size)[None], size, size)
    alpha = drawn.alphas[0]
    return (drawn.colors[0] / alpha[..., None].clamp(min=1e-6)).clamp(0, 1), alpha


def psnr(refined: Refined, rgb: Tensor, alpha: Tensor) -> float:
    """At the camera that was found, over the object."""
    found, seen = photo_of(refined.gaussians, refined.camera)
    difference = (found * seen[..., None] - rgb * alpha[..., None])[alpha > 0.5]
    return float(-10 * difference.square().mean().log10())


def test_the_photo_is_shown_again_and_what_it_does_not_see_stays() -> None:
    rgb, alpha = photo_of(ball())
    grey = painted(ball(), 0.5)
    refined = refine(grey, rgb, alpha, CAMERA, FAST)
    assert psnr(refined, rgb, alpha) > 24 > psnr(Refined(grey, CAMERA, (0, 0)), rgb, alpha) + 8
    assert refined.error[1] < refined.error[0] / 10
    hidden = grey.means @ torch.tensor(CAMERA.eye) < -0.3
    assert hidden.sum() > 100
    # there are gaps between the Gaussians in front, through which some of those behind are seen a little
    assert (refined.gaussians.opacities - grey.opacities)[hidden].abs().max() < 0.05
    assert (refined.gaussians.means - grey.means).norm(dim=1).max() < 0.03


def test_nothing_moves_along_the_rays() -> None:
    rgb, alpha = photo_of(ball(seed=3))
    grey = painted(ball(), 0.5)
    fit = Fit(grey, CAMERA, FAST)
    photo = torch.cat([rgb, alpha[..., None]], -1)
    fit.see(photo)
    fit.run(photo, SIZE, 12, fit.paint, fit.everything())
    forward = torch.tensor(CAMERA.eye) / -CAMERA.focal
    moved = fit.moves().detach()
    assert moved.norm(dim=1).max() > 1e-3
    assert (moved @ forward).abs().max() < 1e-6


def test_what_is_beside_the_silhouette_turns_transparent() -> None:
    body = ball()
    rgb, alpha = photo_of(body)
    out = body.means.clone()
    out[:200] += torch.tensor([0.3, 0.0, 0.3])  # a lump that the photo does not have
    wrong = Gaussians(out, body.quats, body.scales, body.opacities, body.sh)
    refined = refine(wrong, rgb, alpha, CAMERA, RefineConfig(steps=45, size=SIZE))
    drawn = photo_of(refined.gaussians, refined.camera)[1]
    beside = alpha < 0.1
    before = photo_of(wrong)[1][beside].sum()
    assert drawn[beside].sum() < 0.5 * before


def test_a_camera_that_is_wrong_comes_nearer() -> None:
    body = ball()
    stretched = Gaussians(
        body.means * torch.tensor([1.0, 1.0, 0.4]), body.quats, body.scales, body.opacities, body.sh
    )
    rgb, alpha = photo_of(stretched)
    guess = PhotoCamera(CAMERA.elevation + 5, CAMERA.focal)
    refined = refine(stretched, rgb, alpha, guess, RefineConfig(steps=45, size=SIZE))
    assert abs(refined.camera.elevation - CAMERA.elevation) < 4


def test_the_differentiable_camera_is_the_photo_camera() -> None:
    """Elsewhere than at the start: depths are scaled, and pictures are the same."""
    body = ball()
    fit = Fit(body, PhotoCamera(10.0, 1.5), FAST)
    with torch.no_grad():
        fit.pose[0], fit.pose[1] = 1.5, -0.8
        camera = fit.camera()
        assert camera.elevation == pytest.approx(10 + 1.5 * 6) and camera.focal == pytest.approx(
            1.5 * math.exp(-0.8 * 0.25)
        )
        K = fit.start.K(SIZE)[None]
        drawn = render(body, fit.viewmat()[None], K, SIZE, SIZE).colors
        expected = render(body, camera.viewmat[None], camera.K(SIZE)[None], SIZE, SIZE).colors
    assert (drawn - expected).abs().mean() < 2e-3  # the order of depths and the footprints are the same


def test_no_steps_change_nothing_and_runs_repeat() -> None:
    body = ball(300)
    rgb, alpha = photo_of(ball(300, seed=1))
    same = refine(body, rgb, alpha, CAMERA, RefineConfig(steps=0, size=SIZE))
    assert same.camera == CAMERA and same.gaussians is body and same.error[0] == same.error[1]
    twice = [refine(body, rgb, alpha, CAMERA, RefineConfig(steps=6, size=SIZE)) for _ in range(2)]
    assert torch.equal(twice[0].gaussians.sh, twice[1].gaussians.sh) and twice[0].camera == twice[1].camera
    with torch.inference_mode():
        inside = refine(body, rgb, alpha, CAMERA, RefineConfig(steps=6, size=SIZE))
    assert torch.equal(inside.gaussians.sh, twice[0].gaussians.sh)


def test_changes_spread_to_what_is_near_and_no_further() -> None:
    means = torch.tensor([[0.0, 0.0, 0.0], [0.05, 0.0, 0.0], [0.45, 0.45, 0.45]]).repeat_interleave(20, 0)
    seen = torch.tensor([1.0, 0.0, 0.0]).repeat_interleave(20)
    change = torch.tensor([[0.2, 0.0, -0.1]]).repeat(60, 1)
    spread = around(means, change, seen)
    assert 0.1 < spread[20:40, 0].min() <= spread[20:40, 0].max() <= 0.2
    assert spread[40:].abs().max() < 0.01


def test_pictures_shrink_by_what_is_solid_in_them() -> None:
    photo = torch.zeros(4, 4, 4)
    photo[:, :2] = torch.tensor([0.8, 0.4, 0.2, 1.0])
    small = shrunk(photo, 2)
    torch.testing.assert_close(small[:, 0], torch.tensor([0.8, 0.4, 0.2, 1.0]).expand(2, 4))
    torch.testing.assert_close(over(small, 0.5)[:, 1], torch.full((2, 3), 0.5))
    assert shrunk(photo, 8) is photo
    torch.testing.assert_close(place_of(torch.zeros(1, 3), CAMERA), torch.tensor([[0.5, 0.5]]))


def test_wrong_shapes_and_numbers_are_named() -> None:
    rgb, alpha = photo_of(ball(50))
    with pytest.raises(ValueError, match="rgb, alpha: expected"):
        refine(ball(50), rgb, alpha[:32], CAMERA)
    with pytest.raises(ValueError, match="steps: expected no negative number"):
        RefineConfig(steps=-1)
    with pytest.raises(ValueError, match="size: expected at least 32"):
        RefineConfig(size=8)
