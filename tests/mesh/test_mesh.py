"""From Gaussians to a textured mesh: each step against something computed another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from diff2to3 import cli
from diff2to3.errors import InputError
from diff2to3.formats import write
from diff2to3.mesh import MESH_FORMATS, MeshSettings, to_mesh, write_mesh
from diff2to3.mesh.grid import fill_inside, opacity_grid
from diff2to3.mesh.surface import large_components, marching_tetrahedra, simplify, vertex_normals
from diff2to3.mesh.texture import bake, fill_gutters
from diff2to3.types import Gaussians

trimesh = pytest.importorskip("trimesh")
C0 = 0.28209479177387814
SMALL = MeshSettings(resolution=40, num_faces=1500, texture=128, num_views=8)


def shell(count: int = 3000, radius: float = 0.4) -> Gaussians:
    """A hollow ball, red above and blue below."""
    i = torch.arange(count) + 0.5
    z = 1 - 2 * i / count
    angle = np.pi * (1 + 5**0.5) * i
    ring = (1 - z * z).sqrt()
    means = radius * torch.stack((ring * angle.cos(), ring * angle.sin(), z), 1)
    color = torch.where(z[:, None] > 0, torch.tensor([0.9, 0.2, 0.2]), torch.tensor([0.2, 0.2, 0.9]))
    return Gaussians(
        means, torch.tensor([1.0, 0, 0, 0]).repeat(count, 1), torch.full((count, 3), 0.015), torch.full((count,), 0.95),
        ((color - 0.5) / C0)[:, None],
    )  # fmt: skip


def ball_grid(side: int = 32, radius: float = 10.3) -> np.ndarray:
    at = np.indices((side,) * 3) - (side - 1) / 2
    return radius - np.linalg.norm(at, axis=0)


def test_grid_is_the_opacity_of_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    gaussians = Gaussians(
        torch.rand(12, 3, generator=g) - 0.5,
        torch.randn(12, 4, generator=g),
        torch.rand(12, 3, generator=g) * 0.1 + 0.02,
        torch.rand(12, generator=g) * 0.9 + 0.05, torch.zeros(12, 1, 3),
    )  # fmt: skip
    grid = opacity_grid(gaussians, 24)
    at = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in grid.values.shape), indexing="ij"), -1
    ).reshape(-1, 3)
    points = grid.low + at.double() * grid.step
    through = torch.ones(len(points), dtype=torch.float64)
    tied = torch.zeros(len(points), dtype=torch.bool)
    for i in range(12):
        w, x, y, z = torch.nn.functional.normalize(gaussians.quats[i].double(), dim=0)
        r = torch.stack(
            [
                torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]),
                torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]),
                torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]),
            ]
        )
        covariance = r @ torch.diag(gaussians.scales[i].double() ** 2) @ r.T
        d = points - gaussians.means[i]
        square = torch.einsum("pi,ij,pj->p", d, torch.linalg.inv(covariance), d)
        # points on the edge of the box, as the grid's own first and last are, are rounding's to decide
        tied |= ((d.abs() - 3 * covariance.diagonal().sqrt()).abs() < 1e-6).any(1)
        within = (d.abs() <= 3 * covariance.diagonal().sqrt()).all(1)
        through *= 1 - gaussians.opacities[i] * torch.exp(-0.5 * square) * within
    got = grid.values.reshape(-1).double()
    border = (at == 0).any(1) | (at == torch.tensor(grid.values.shape) - 1).any(1)
    plain = ~border & ~tied
    assert plain.float().mean() > 0.6
    torch.testing.assert_close(got[plain], 1 - through[plain], atol=2e-5, rtol=1e-4)
    assert got[border].abs().max() == 0


@pytest.mark.parametrize("seed", range(4))
def test_surfaces_of_noise_are_closed_and_point_outwards(seed: int) -> None:
    """Noise holds every case of a cube, among them those that are ambiguous for marching cubes."""
    values = np.pad(np.random.default_rng(seed).random((9, 8, 7)), 1)
    vertices, faces = marching_tetrahedra(values, 0.5)
    edges = np.sort(np.concatenate((faces[:, :2], faces[:, 1:], faces[:, [2, 0]])), 1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent
    middle, normal = mesh.triangles_center, mesh.face_normals
    ahead, behind = (
        ndimage.map_coordinates(values, (middle + s * 0.05 * normal).T, order=1) for s in (1, -1)
    )
    assert (ahead < behind).mean() > 0.95  # between grid points values are only nearly linear


def test_a_balls_surface() -> None:
    vertices, faces = marching_tetrahedra(ball_grid(), 0.0)
    np.testing.assert_allclose(np.linalg.norm(vertices - 15.5, axis=1), 10.3, atol=0.04)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 10.3**3, rel=0.01) and mesh.euler_number == 2
    outward = (vertices - 15.5) / np.linalg.norm(vertices - 15.5, axis=1, keepdims=True)
    assert ((vertex_normals(vertices, faces) * outward).sum(1) > 0.95).all()


def test_inside_is_what_no_path_reaches() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((14, 12, 10))
    free = np.pad(values < 0.55, 1, constant_values=True)
    labels, _ = ndimage.label(free)
    closed = (free & (labels != labels[0, 0, 0]))[1:-1, 1:-1, 1:-1]
    assert closed.any()
    got = fill_inside(values, 0.55)
    np.testing.assert_array_equal(got >= 0.55, (values >= 0.55) | closed)


@pytest.mark.parametrize("seed", range(3))
def test_simplified_surfaces_stay_closed_with_two_triangles_an_edge(seed: int) -> None:
    """fast-simplification by itself leaves edges of four triangles in a surface with as many holes as noise has."""
    fast_simplification = pytest.importorskip("fast_simplification")
    values = np.pad(np.random.default_rng(seed).random((14, 13, 12)), 1)
    vertices, faces = marching_tetrahedra(values, 0.6)
    target = len(faces) // 6

    def triangles_per_edge(f: np.ndarray) -> np.ndarray:
        edges = np.sort(np.concatenate((f[:, :2], f[:, 1:], f[:, [2, 0]])), 1)
        return np.unique(edges, axis=0, return_counts=True)[1]

    raw = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=target
    )
    assert (triangles_per_edge(np.asarray(raw[1])) != 2).any()
    v, f = simplify(vertices, faces, target)
    assert (triangles_per_edge(f) == 2).all() and f.max() == len(v) - 1
    mesh = trimesh.Trimesh(v, f, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent
    before = trimesh.Trimesh(raw[0], raw[1], process=False)
    assert mesh.volume == pytest.approx(before.volume, rel=1e-6)


def test_small_parts_go() -> None:
    values = ball_grid()
    values[1:3, 1:3, 1:3] = 1.0
    vertices, faces = marching_tetrahedra(values, 0.0)
    kept = trimesh.Trimesh(*large_components(vertices, faces, 0.05), process=False)
    assert len(kept.split(only_watertight=False)) == 1 and kept.volume > 4000
    assert len(faces) > len(kept.faces)


def test_gutters_take_the_nearest_means() -> None:
    known = np.zeros((8, 8), bool)
    known[:4, :4] = True
    picture = np.zeros((8, 8, 3))
    picture[:4, :4] = (0.25, 0.5, 1.0)
    np.testing.assert_allclose(fill_gutters(picture, known), np.broadcast_to([0.25, 0.5, 1.0], (8, 8, 3)))


def test_a_baked_ramp_is_where_it_should_be() -> None:
    """Two triangles over the whole square whose colour is u and v at each point."""
    uvs = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])

    def shade(face: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.einsum("tc,tci->ti", weights, uvs[faces[face]])
        return np.concatenate((at, 0 * at[:, :1]), 1), np.ones(len(at))

    texture = bake(uvs, faces, 32, shade) / 255
    centres = (np.arange(32) + 0.5) / 32
    np.testing.assert_allclose(texture[..., 0], np.broadcast_to(centres, (32, 32)), atol=0.003)
    np.testing.assert_allclose(texture[..., 1], np.broadcast_to(1 - centres[:, None], (32, 32)), atol=0.003)


@pytest.fixture(scope="module")
def ball():
    pytest.importorskip("fast_simplification")
    pytest.importorskip("xatlas")
    return to_mesh(shell(), SMALL)


def test_a_hollow_ball_becomes_one_solid(ball) -> None:
    radius = np.linalg.norm(ball.vertices, axis=1)
    assert 0.38 < radius.min() and radius.max() < 0.46 and len(ball.faces) <= 1600
    merged = trimesh.Trimesh(ball.vertices, ball.faces, process=True, merge_tex=True, merge_norm=True)
    assert merged.is_watertight and merged.euler_number == 2 and 0.25 < merged.volume < 0.4
    assert np.isfinite(ball.vertices).all() and ball.uvs.min() >= 0 and ball.uvs.max() <= 1


def test_gaussians_flatter_than_a_cell_leave_no_holes() -> None:
    """Sampled as they are they make a sieve, which is open to its inside."""
    pytest.importorskip("fast_simplification")
    thick = shell()
    x, y, z = torch.nn.functional.normalize(thick.means, dim=1).unbind(1)
    facing = torch.nn.functional.normalize(torch.stack((1 + z, -y, x, 0 * x), 1), dim=1)  # turns z outwards
    flat = Gaussians(
        thick.means, facing, torch.tensor([0.02, 0.02, 0.0008]).repeat(3000, 1), thick.opacities, thick.sh
    )

    def volume(blur: float) -> float:
        settings = MeshSettings(resolution=40, blur=blur, num_faces=3000, texture=0, num_views=4)
        mesh = to_mesh(flat, settings)
        return float(trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume)

    assert volume(0.0) < 0.1 < 0.25 < volume(MeshSettings().blur) < 0.36


@pytest.mark.parametrize("kind", MESH_FORMATS)
def test_files_hold_the_shape_and_its_colours(ball, kind: str, tmp_path: Path) -> None:
    files = write_mesh(tmp_path / f"a.{kind}", ball)
    assert all(path.exists() for path in files)
    read = trimesh.load(tmp_path / f"a.{kind}", force="mesh")
    assert len(read.faces) == len(ball.faces) and read.volume == pytest.approx(0.3, abs=0.06)
    up = 1 if kind == "glb" else 2
    if kind == "stl":
        return
    if kind == "ply":
        colors, points = read.visual.vertex_colors[:, :3], read.vertices
    else:
        picture = np.asarray(
            read.visual.material.to_simple().image if kind == "glb" else read.visual.material.image
        )
        side = picture.shape[0]
        uv = read.visual.uv[read.faces].mean(1)
        x, y = (
            (uv[:, 0] * side).astype(int).clip(0, side - 1),
            ((1 - uv[:, 1]) * side).astype(int).clip(0, side - 1),
        )
        colors, points = picture[y, x, :3], read.triangles_center
    above, below = points[:, up] > 0.1, points[:, up] < -0.1
    np.testing.assert_allclose(colors[above].mean(0) / 255, [0.9, 0.2, 0.2], atol=0.05)
    np.testing.assert_allclose(colors[below].mean(0) / 255, [0.2, 0.2, 0.9], atol=0.05)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fast_simplification")
    write(tmp_path / "a.ply", shell(800))
    args = [
        "convert",
        str(tmp_path / "a.ply"),
        str(tmp_path / "m.stl"),
        "--mesh",
        "--faces",
        "500",
        "--texture",
        "0",
    ]
    assert cli.main(args) == 0 and "triangles" in capsys.readouterr().out
    assert len(trimesh.load(tmp_path / "m.stl").faces) <= 500
    assert cli.main(["convert", str(tmp_path / "a.ply"), str(tmp_path / "m.fbx"), "--mesh"]) == 2
    assert "unknown kind of mesh" in capsys.readouterr().err


def test_bad_settings_and_faint_objects_are_told() -> None:
    with pytest.raises(InputError, match="power of two"):
        MeshSettings(texture=1000)
    faint = shell(50)
    faint = Gaussians(faint.means, faint.quats, faint.scales, faint.opacities * 0.05, faint.sh)
    with pytest.raises(InputError, match="more opaque"):
        to_mesh(faint, SMALL)
