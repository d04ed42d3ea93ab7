"""From Gaussians to a textured mesh: opacity grid, surface, components, simplification, unwrapping, texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diff2to3.errors import InputError
from diff2to3.mesh.grid import fill_inside, opacity_grid
from diff2to3.mesh.surface import (
    TexturedMesh,
    large_components,
    marching_tetrahedra,
    simplify,
    vertex_normals,
)
from diff2to3.mesh.texture import bake, colors_at, take_pictures
from diff2to3.types import Gaussians


@dataclass(frozen=True)
class MeshSettings:
    """
    resolution   points of the grid along the object's longest side
    blur         of the Gaussians, in cells of the grid
    level        opacity of the surface
    inset        cells by which the surface is moved inwards: blurred Gaussians reach that far beyond what they show
    num_faces    triangles at most, about
    texture      texels a side, a power of two; 0 for vertex colours only
    num_views    pictures that colours are taken from
    small_part   parts with a smaller share of the largest part's surface are left out
    """

    resolution: int = 96
    blur: float = 0.7
    level: float = 0.8
    inset: float = 0.5
    num_faces: int = 20000
    texture: int = 1024
    num_views: int = 24
    small_part: float = 0.01

    def __post_init__(self) -> None:
        if not 16 <= self.resolution <= 512:
            raise InputError(f"mesh: resolution: expected 16 to 512, got {self.resolution}")
        if not 0 < self.level < 1:
            raise InputError(f"mesh: level: expected a number between 0 and 1, got {self.level}")
        if self.texture and (not 16 <= self.texture <= 8192 or self.texture & (self.texture - 1)):
            raise InputError(
                f"mesh: texture: expected 0 or a power of two from 16 to 8192, got {self.texture}"
            )


def to_mesh(gaussians: Gaussians, settings: MeshSettings | None = None) -> TexturedMesh:
    """A mesh of Gaussians, z up.

    Without the package xatlas the mesh has vertex colours and no texture.

    Raises:
        InputError: no Gaussians, or nothing as opaque as ``level``.
        MissingDependencyError: scipy or fast-simplification is not installed.
    """
    s = settings or MeshSettings()
    if not len(gaussians):
        raise InputError("mesh: there are no Gaussians")
    grid = opacity_grid(gaussians, s.resolution, s.blur)
    values = fill_inside(grid.values.numpy(), s.level)
    if float(values.max()) < s.level:
        raise InputError(f"mesh: nothing is more opaque than {values.max():.2f}; the level is {s.level}")
    vertices, faces = marching_tetrahedra(values, s.level)
    vertices, faces = large_components(vertices, faces, s.small_part)
    vertices, faces = simplify(vertices, faces, s.num_faces)
    vertices = vertices - s.inset * vertex_normals(vertices, faces)
    vertices = grid.low.numpy() + vertices * grid.step
    low, high = vertices.min(0), vertices.max(0)
    size = float(np.linalg.norm(high - low)) / 2**0.5
    pictures = take_pictures(gaussians, s.num_views, torch.from_numpy((low + high) / 2), size)
    normals = vertex_normals(vertices, faces)

    def shade(points: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at, n = (torch.from_numpy(x).float() for x in (points, directions))
        colors, trust = colors_at(pictures, at, torch.nn.functional.normalize(n, dim=1), size)
        return colors.double().numpy(), trust.double().numpy()

    vertex_colors = np.round(shade(vertices, normals)[0] * 255).astype(np.uint8)
    unwrapped = unwrap(vertices, faces) if s.texture else None
    if unwrapped is None:
        return TexturedMesh(vertices.astype(np.float32), faces.astype(np.int32), vertex_colors)
    origin, new_faces, uvs = unwrapped

    def shade_texels(face: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        corners = origin[new_faces[face]]
        return shade(
            np.einsum("tc,tci->ti", weights, vertices[corners]),
            np.einsum("tc,tci->ti", weights, normals[corners]),
        )

    texture = bake(uvs, new_faces, s.texture, shade_texels)
    return TexturedMesh(
        vertices[origin].astype(np.float32), new_faces.astype(np.int32), vertex_colors[origin], uvs, texture
    )


def unwrap(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Charts on the unit square: the vertex [M] that each new one copies, faces [F, 3], uvs [M, 2]. None
    without xatlas.
    """
    try:
        import xatlas
    except ImportError:
        return None
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_iterations = 1
    pack.padding, pack.bruteForce, pack.resolution = 2, False, 1024
    atlas.generate(chart_options=charts, pack_options=pack)
    origin, new_faces, uvs = atlas[0]
    return origin.astype(np.int64), new_faces.astype(np.int64), uvs.astype(np.float64)
