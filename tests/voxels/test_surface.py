"""Surface statistics against brute force over pixels, and against planes whose colours are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diff2to3.types import Views
from diff2to3.voxels.lift import lift_features
from diff2to3.voxels.surface import CHANNELS, STATISTICS, channels_of, locate, surface_statistics

R = 8


def plane_views(size: int = 64, height: float = 0.05) -> Views:
    """Two views from above of the plane z = height, coloured by position: red = x + 0.5, green = y + 0.5."""
    viewmats, images, depths = [], [], []
    K = torch.tensor([[70.0, 0, size / 2], [0, 70.0, size / 2], [0, 0, 1]])
    for x0 in (0.0, 0.15):
        viewmat = torch.eye(4)
        viewmat[:3, :3] = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])  # looks down
        viewmat[:3, 3] = -viewmat[:3, :3] @ torch.tensor([x0, 0, 1.5])
        y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
        z = 1.5 - height
        world_x, world_y = x0 + (x - size / 2) / 70 * z, -(y - size / 2) / 70 * z
        on = (world_x.abs() < 0.5) & (world_y.abs() < 0.5)
        color = torch.stack([world_x + 0.5, world_y + 0.5, torch.full_like(world_x, 0.25)], -1).clamp(0, 1)
        viewmats.append(viewmat)
        images.append(color * on[..., None])
        depths.append(torch.where(on, z, 0.0))
    depth = torch.stack(depths)
    return Views(torch.stack(images), (depth > 0).float(), torch.stack(viewmats), K.expand(2, 3, 3), depth)


def plane_coords() -> torch.Tensor:
    x, y = torch.meshgrid(torch.arange(R), torch.arange(R), indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.full((R * R,), R // 2)], 1).int()


def test_a_coloured_plane() -> None:
    views, coords = plane_views(), plane_coords()
    found = surface_statistics(views, coords, R)
    assert found.feats.shape == (R * R, CHANNELS) and bool((found.num_views > 0).all())
    by_name = {n: found.feats[:, channels_of(n)] / f for n, _, f in STATISTICS}
    centers = (coords[:, :2] + 0.5) / R
    # pixels do not fill a voxel evenly: colour and point are off by the same fraction of it
    off_centre = by_name["point"][:, :2] / R
    assert torch.allclose(by_name["color"][:, :2] + 0.5, centers + off_centre, atol=1e-5)
    assert torch.allclose(by_name["color"][:, 2] + 0.5, torch.tensor(0.25), atol=1e-5)
    assert torch.allclose(by_name["point"][:, 2], torch.tensor(0.05 * R - 0.5), atol=1e-4)
    assert float(by_name["normal"][:, 2].min()) > 0.8
    # red varies with x as x does, in units of a voxel: covariance(red, x) = variance(x) / R
    variance = by_name["point_covariance"][:, 0]
    assert torch.allclose(by_name["color_by_point"][:, 0], variance / R, atol=1e-5)
    assert torch.allclose(by_name["color_spread"][:, 0], variance.clamp(min=0).sqrt() / R, atol=1e-3)
    assert float(by_name["color_by_point"][:, 6:].abs().max()) < 1e-5


def test_agrees_with_a_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    views = plane_views(24)
    noisy = torch.rand(views.images.shape, generator=generator)
    bumpy = torch.where(
        views.depths > 0, views.depths + 0.1 * torch.rand(views.depths.shape, generator=generator), 0
    )
    views = Views(noisy, views.alphas, views.viewmats, views.Ks, bumpy)
    everywhere = torch.stack(torch.meshgrid(*[torch.arange(R)] * 3, indexing="ij"), -1).reshape(-1, 3).int()
    found = surface_statistics(views, everywhere, R)
    pixels: dict[tuple[int, ...], list[np.ndarray]] = {}
    for v in range(2):
        pose = np.linalg.inv(views.viewmats[v].double().numpy())
        K = views.Ks[v].double().numpy()
        for y, x in np.argwhere(views.depths[v].numpy() > 0):
            ray = np.linalg.inv(K) @ [x + 0.5, y + 0.5, 1.0]
            point = pose[:3, :3] @ (ray * float(views.depths[v, y, x])) + pose[:3, 3]
            towards = pose[:3, 3] - point
            cell = np.floor((point + 0.5) * R)
            offset = (point + 0.5) * R - cell - 0.5
            row = [*(noisy[v, y, x].double().numpy() - 0.5), *offset, *(towards / np.linalg.norm(towards))]
            if (cell >= 0).all() and (cell < R).all():
                pixels.setdefault(tuple(cell.astype(int)), []).append(np.array(row))
    assert int((found.num_views > 0).sum()) == len(pixels)
    for cell, rows in pixels.items():
        data = np.stack(rows)
        color, point, normal = data[:, :3], data[:, 3:6], data[:, 6:]
        cov = np.cov(np.concatenate([color, point], 1).T, bias=True) if len(data) > 1 else np.zeros((6, 6))
        shape = cov[3:, 3:]
        expected = np.concatenate([
            color.mean(0), point.mean(0), normal.mean(0), np.sqrt(np.diag(cov)[:3]),
            [shape[0, 0], shape[1, 1], shape[2, 2], shape[0, 1], shape[0, 2], shape[1, 2]],
            cov[:3, 3:].flatten(), [np.log1p(len(data)) - 3],
        ])  # fmt: skip
        row = (cell[0] * R + cell[1]) * R + cell[2]
        factors = np.concatenate([[f] * n for _, n, f in STATISTICS])
        got = found.feats[row].numpy() / factors
        assert np.allclose(got, expected, atol=2e-3), cell


def test_points_on_a_cells_face_go_to_the_active_neighbour() -> None:
    coords = torch.tensor([[3, 3, 3]], dtype=torch.int32)
    side = 1 / R
    low = 3 * side - 0.5
    points = torch.tensor([[low + 0.5 * side] * 3, [low - 0.05 * side, low + 0.5 * side, low + 0.5 * side],
                           [low - 0.2 * side, low + 0.5 * side, low + 0.5 * side], [0.7, 0.7, 0.7]])  # fmt: skip
    rows, offsets = locate(points, coords, R)
    assert rows.tolist() == [0, 0, -1, -1]
    assert torch.allclose(offsets[1], torch.tensor([-0.55, 0, 0]), atol=1e-4)


def test_unseen_voxels_and_wrong_arguments() -> None:
    views = plane_views()
    hidden = surface_statistics(views, torch.tensor([[0, 0, 0]], dtype=torch.int32), R)
    assert int(hidden.num_views[0]) == 0 and float(hidden.feats[0, :-1].abs().max()) == 0
    with pytest.raises(ValueError, match="depths"):
        surface_statistics(Views(views.images, views.alphas, views.viewmats, views.Ks), plane_coords(), R)
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        surface_statistics(views, torch.zeros(2, 4), R)
    with pytest.raises(ValueError, match="only 'visible'"):
        lift_features(views, plane_coords(), R, None, ["mean"])
    with pytest.raises(ValueError, match="unknown statistic"):
        channels_of("colour")
