"""Lifting features onto voxels: a cube with six colours traced analytically, and sampling against plain
loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diff2to3.types import Views
from diff2to3.voxels.aggregate import aggregate_features, project, sample_bilinear
from diff2to3.voxels.providers import RgbFeatures
from diff2to3.voxels.voxelise import voxelise

HALF = 0.35
#: One colour a face, in the order -x, -y, -z, +x, +y, +z.
FACE_COLORS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1], [0.1, 0.9, 0.9], [0.9, 0.1, 0.9]]
)


def look_at_origin(eyes: Tensor) -> Tensor:
    """World -> camera (x right, y down, z forward) from eyes [V, 3] to the origin, z up."""
    forward = -eyes / eyes.norm(dim=-1, keepdim=True)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(eyes)
    right = torch.linalg.cross(forward, up)
    right = right / right.norm(dim=-1, keepdim=True)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], 1)
    viewmats = torch.eye(4).repeat(len(eyes), 1, 1)
    viewmats[:, :3, :3] = rotation
    viewmats[:, :3, 3] = -torch.einsum("vij,vj->vi", rotation, eyes)
    return viewmats


def cube_views(num_views: int = 14, size: int = 160) -> Views:
    """The coloured cube seen from a spiral on the sphere, by slab intersection: hard edges, exact depth."""
    i = torch.arange(num_views) + 0.5
    z, phi = 1 - 2 * i / num_views, i * 2.399963
    eyes = 2.2 * torch.stack([(1 - z * z).sqrt() * phi.cos(), (1 - z * z).sqrt() * phi.sin(), z], -1)
    viewmats = look_at_origin(eyes)
    focal = 1.15 * size
    Ks = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]]).repeat(num_views, 1, 1)
    v, u = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    rays = torch.stack([(u - size / 2) / focal, (v - size / 2) / focal, torch.ones_like(u)], -1)
    rays = torch.einsum("vji,hwj->vhwi", viewmats[:, :3, :3], rays)  # z in the camera frame has length 1
    origin = eyes[:, None, None]
    near = torch.minimum((-HALF - origin) / rays, (HALF - origin) / rays)
    far = torch.maximum((-HALF - origin) / rays, (HALF - origin) / rays)
    enter, axis = near.max(-1)
    hit = enter < far.min(-1).values
    side = (
        rays.gather(-1, axis[..., None])[..., 0] < 0
    ).long()  # entering against an axis: its positive face
    images = FACE_COLORS[axis + 3 * side] * hit[..., None]
    return Views(images, hit.float(), viewmats, Ks, enter * hit)


def cube_voxels(resolution: int) -> tuple[Tensor, Tensor]:
    """Voxels of the cube, and the face each belongs to: -1 within two voxels of an edge."""
    corners = np.array([[x, y, z] for x in (-HALF, HALF) for y in (-HALF, HALF) for z in (-HALF, HALF)])
    quads = [[0, 1, 3, 2], [0, 1, 5, 4], [0, 2, 6, 4], [4, 5, 7, 6], [2, 3, 7, 6], [1, 3, 7, 5]]
    faces = [t for a, b, c, d in quads for t in ([a, b, c], [a, c, d])]
    coords = torch.from_numpy(voxelise(corners[faces], resolution))
    centers = (coords + 0.5) / resolution - 0.5
    distance = torch.cat([(centers + HALF).abs(), (centers - HALF).abs()], -1) * resolution  # [N, 6]
    nearest = distance.argmin(-1)
    alone = (distance < 2.0).sum(-1) == 1
    return coords, torch.where(alone, nearest, -1)


class TestCube:
    @pytest.mark.parametrize("resolution", [32, 64])
    def test_visible_features_are_the_face_s_own_and_back_faces_do_not_leak(self, resolution: int) -> None:
        coords, face = cube_voxels(resolution)
        views = cube_views()
        out = aggregate_features(views, coords, resolution, RgbFeatures(), mode="visible")
        inner = face >= 0
        assert set(face[inner].tolist()) == set(range(6))
        assert (out.num_views[inner] > 0).all()
        torch.testing.assert_close(out.feats[inner], FACE_COLORS[face[inner]], rtol=0, atol=1e-5)

    def test_the_plain_mean_does_leak(self) -> None:
        coords, face = cube_voxels(32)
        out = aggregate_features(cube_views(), coords, 32, RgbFeatures(), mode="mean")
        inner = face >= 0
        assert ((out.feats[inner] - FACE_COLORS[face[inner]]).abs().amax(-1) > 0.1).all()
        assert (out.num_views == 14).all()

    def test_the_chunk_size_changes_nothing(self) -> None:
        coords, _ = cube_voxels(16)
        views = cube_views(num_views=7, size=64)
        one, all_at_once = (
            aggregate_features(views, coords, 16, RgbFeatures(), view_chunk=c).feats for c in (1, 7)
        )
        torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-6)

    def test_unseen_voxels_fall_back_to_the_mean(self) -> None:
        views = cube_views()
        coords = torch.tensor([[16, 16, 16]])  # the centre of the cube
        seen = aggregate_features(views, coords, 32, RgbFeatures(), mode="visible")
        mean = aggregate_features(views, coords, 32, RgbFeatures(), mode="mean")
        assert seen.num_views.tolist() == [0] and torch.equal(seen.feats, mean.feats)

    def test_a_voxel_outside_every_image_takes_the_border(self) -> None:
        views = cube_views(num_views=3, size=32)
        zoomed = Views(
            views.images, views.alphas, views.viewmats, views.Ks * torch.tensor([9.0, 9.0, 1.0])[:, None]
        )
        zoomed.Ks[:, :2, 2] = 16.0
        out = aggregate_features(zoomed, torch.tensor([[0, 0, 0]]), 32, RgbFeatures(), mode="mean")
        assert torch.isfinite(out.feats).all() and out.num_views.tolist() == [0]


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_a_ramp_reads_back_each_voxel_s_own_pixel_position(stride: int) -> None:
    # A box filter and bilinear sampling keep a linear ramp exactly, at any stride, if both agree on pixel
    # centres.
    views = cube_views(num_views=1, size=64)
    ramp = (torch.arange(64) + 0.5) / 64
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)], -1)[None]
    views = Views(images, torch.ones(1, 64, 64), views.viewmats, views.Ks)
    coords, _ = cube_voxels(16)
    feats = aggregate_features(views, coords, 16, RgbFeatures(stride), mode="mean").feats
    pixels, _ = project((coords + 0.5) / 16 - 0.5, views.viewmats, views.Ks)
    inner = ((pixels[0] > stride) & (pixels[0] < 64 - stride)).all(-1)
    assert inner.float().mean() > 0.9
    torch.testing.assert_close(feats[inner, :2], pixels[0, inner] / 64, rtol=0, atol=1e-5)


def test_projection_matches_homogeneous_coordinates() -> None:
    views = cube_views(num_views=5, size=64)
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    pixels, depths = project(points, views.viewmats, views.Ks)
    for v in range(5):
        for n in range(20):
            camera = views.viewmats[v].double() @ torch.cat([points[n], torch.ones(1)]).double()
            image = views.Ks[v].double() @ camera[:3]
            torch.testing.assert_close(pixels[v, n].double(), image[:2] / image[2], rtol=1e-5, atol=1e-4)
            assert abs(float(depths[v, n]) - float(camera[2])) < 1e-5


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_bilinear_sampling_against_a_loop(stride: int) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 3, 4, 5, generator=generator)
    height, width = 4 * stride, 5 * stride
    pixels = torch.rand(2, 30, 2, generator=generator) * torch.tensor([width + 4.0, height + 4.0]) - 2
    got = sample_bilinear(maps, pixels, height, width)
    for v in range(2):
        for n in range(30):
            x = min(max(float(pixels[v, n, 0]) / stride - 0.5, 0.0), 4.0)
            y = min(max(float(pixels[v, n, 1]) / stride - 0.5, 0.0), 3.0)
            x0, y0 = min(int(x), 3), min(int(y), 2)
            fx, fy = x - x0, y - y0
            top = maps[v, :, y0, x0] * (1 - fx) + maps[v, :, y0, x0 + 1] * fx
            bottom = maps[v, :, y0 + 1, x0] * (1 - fx) + maps[v, :, y0 + 1, x0 + 1] * fx
            torch.testing.assert_close(got[v, n], top * (1 - fy) + bottom * fy, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named() -> None:
    views = cube_views(num_views=2, size=16)
    blind = Views(views.images, views.alphas, views.viewmats, views.Ks)
    coords = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="mode"):
        aggregate_features(views, coords, 8, RgbFeatures(), mode="median")
    with pytest.raises(ValueError, match="depths"):
        aggregate_features(blind, coords, 8, RgbFeatures(), mode="visible")
    with pytest.raises(ValueError, match="coords"):
        aggregate_features(views, torch.zeros(1, 4), 8, RgbFeatures())
    empty = aggregate_features(views, torch.zeros(0, 3, dtype=torch.int32), 8, RgbFeatures())
    assert empty.feats.shape == (0, 3)
