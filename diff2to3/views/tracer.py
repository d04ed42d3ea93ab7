"""The CPU renderer: samples -> nearest surfaces -> light -> pixels.

    rays of a tile -> first hit -> opacity ─┬─> groups (one a pixel and face) -> irradiance ─┐
         ^                                  └─> base colour, a sample ───────────────────────┴─> pixels
         └───────── what shines through goes on, at most `max_layers` times

Visibility and colour are evaluated for every sample; light, which is smooth, once for all samples of a pixel
that fall on the same face (as multisampling does on a GPU), so that a pixel inside a face traces one set of shadow
rays and not four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diff2to3.types import Mesh
from diff2to3.views.config import RenderConfig
from diff2to3.views.lighting import Lights
from diff2to3.views.raycast import SURFACE_OFFSET, Hits, RayScene
from diff2to3.views.surface import Surface
from diff2to3.views.textures import encode_srgb

#: Samples worked on at once: bounds memory at about 200 bytes each.
_TILE_SAMPLES = 1 << 19
#: Light that is left below this is not followed any further.
_LEAST_LIGHT = 1 / 512


@dataclass(frozen=True)
class Camera:
    """One view. Rays are ``rotation^T ((x - cx)/fx, (y - cy)/fy, 1)``, so that distances along them are depths."""

    rotation: np.ndarray  # [3, 3] world -> camera
    eye: np.ndarray  # [3]
    K: np.ndarray  # [3, 3]
    width: int
    height: int

    @staticmethod
    def of(viewmat: np.ndarray, K: np.ndarray, width: int, height: int) -> Camera:
        viewmat, K = np.asarray(viewmat, np.float64), np.asarray(K, np.float64)
        rotation = viewmat[:3, :3]
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4):
            raise ValueError("viewmats: expected rotations and translations only")
        if abs(K[0, 1]) > 1e-9 or abs(K[1, 0]) > 1e-9 or K[0, 0] <= 0 or K[1, 1] <= 0:
            raise ValueError("Ks: expected positive focal lengths and no skew")
        return Camera(rotation, -rotation.T @ viewmat[:3, 3], K, width, height)

    def rays(self, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
        """Directions through image points, float32 [len(ys), len(xs), 3]: sums of a column and a row part."""
        across = ((xs - self.K[0, 2]) / self.K[0, 0])[:, None] * self.rotation[0]
        down = ((ys - self.K[1, 2]) / self.K[1, 1])[:, None] * self.rotation[1] + self.rotation[2]
        return across.astype(np.float32)[None] + down.astype(np.float32)[:, None]

    def pixel_width(self) -> float:
        """Width of a pixel at depth 1."""
        return float(1 / np.sqrt(self.K[0, 0] * self.K[1, 1]))

    def bounds(self, vertices: np.ndarray) -> tuple[int, int, int, int]:
        """(x0, x1, y0, y1): the pixels outside which no vertex is seen."""
        seen = (vertices.astype(np.float64) - self.eye) @ self.rotation.T
        if float(seen[:, 2].min()) < 1e-3:
            return 0, self.width, 0, self.height
        limits = []
        for axis, size in ((0, self.width), (1, self.height)):
            at = seen[:, axis] / seen[:, 2] * self.K[axis, axis] + self.K[axis, 2]
            low, high = np.floor(at.min()) - 1, np.ceil(at.max()) + 1
            limits += [int(np.clip(low, 0, size)), int(np.clip(high, 0, size))]
        return limits[0], limits[1], limits[2], limits[3]


@dataclass(frozen=True)
class Frame:
    """One rendered view; see :class:`diff2to3.views.RenderedViews` for what the arrays hold."""

    images: np.ndarray
    alphas: np.ndarray
    depths: np.ndarray | None
    normals: np.ndarray | None
    points: np.ndarray | None
    triangle_ids: np.ndarray | None


class Tracer:
    """Renders views of one mesh. Building it costs milliseconds (the ray tree, the texture levels)."""

    def __init__(self, mesh: Mesh, config: RenderConfig) -> None:
        self.mesh, self.config = mesh, config
        self.surface = Surface(mesh, config.smooth)
        self.scene = RayScene(mesh.vertices, mesh.faces)
        lit = config.lighting.mode != "unlit"
        self._lights = Lights(config.lighting, self.surface, config.max_layers) if lit else None
        self._culls = config.back_faces == "cull" and not bool(self.surface.double_sided.all())
        self._all_opaque = bool(self.surface.opaque.all()) and not self._culls

    def render(self, camera: Camera) -> Frame:
        """One view."""
        height, width, wanted = camera.height, camera.width, self.config.outputs
        colors = np.zeros((height, width, 3), np.float32)
        alphas = np.zeros((height, width), np.float32)
        geometry = _Geometry(height, width) if wanted else None
        for x0, x1, y0, y1 in _tiles(camera.bounds(self.mesh.vertices), self.config.supersample):
            tile = _Tile(self, camera, x0, x1, y0, y1)
            colors[y0:y1, x0:x1], alphas[y0:y1, x0:x1] = tile.shade()
            if geometry is not None:
                geometry.fill(tile)
        seen = alphas > 0
        images = np.zeros_like(colors)
        images[seen] = encode_srgb(colors[seen] / alphas[seen][:, None])
        arrays = geometry.arrays(camera, self.surface, wanted) if geometry is not None else {}
        return Frame(
            images, alphas, *(arrays.get(k) for k in ("depths", "normals", "points", "triangle_ids"))
        )

    def opacities(self, colors: np.ndarray, faces: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Alpha of shaded samples, 0 on culled back faces: float32 [n]."""
        alpha = colors[:, 3]
        if not self._culls:
            return alpha
        behind = (self.surface.normals[faces] * directions).sum(1) > 0
        return np.where(behind & ~self.surface.double_sided[faces], np.float32(0), alpha)

    def irradiance(self, camera: Camera, faces: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Light on a white surface at points of faces, seen from the camera: float32 [n]."""
        if self._lights is None:
            return np.ones(len(faces), np.float32)
        points = self.surface.positions(faces, u, v)
        facing, shading = self.facing_normals(camera, points, faces, u, v)
        light = self._lights.irradiance(points, facing, shading)
        light[self.surface.unlit[faces]] = 1
        return light

    def facing_normals(
        self, camera: Camera, points: np.ndarray, faces: np.ndarray, u: np.ndarray, v: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(geometric, shading) unit normals on the side of the camera: float32 [n, 3] each."""
        flat = self.surface.normals[faces]
        shading = self.surface.shading_normals(faces, u, v)
        to_eye = camera.eye.astype(np.float32) - points
        flat = np.where(((flat * to_eye).sum(1) < 0)[:, None], -flat, flat)
        # A shading normal belongs to the side of its face, not to that of the camera: near an outline it may
        # lean away from the viewer and still be right.
        shading = np.where(((shading * flat).sum(1) < 0)[:, None], -shading, shading)
        return flat, shading


class _Tile:
    """A rectangle of pixels while it is rendered. Samples go by row, column, then row and column in the pixel."""

    def __init__(self, tracer: Tracer, camera: Camera, x0: int, x1: int, y0: int, y1: int) -> None:
        self.tracer, self.camera = tracer, camera
        self.x0, self.y0, self.rows, self.columns = x0, y0, y1 - y0, x1 - x0
        n = tracer.config.supersample
        self.num_samples = n * n
        inside = (np.arange(n) + 0.5) / n
        xs = (np.arange(x0, x1)[:, None] + inside).reshape(-1)
        ys = (np.arange(y0, y1)[:, None] + inside).reshape(-1)
        grid = camera.rays(xs, ys).reshape(self.rows, n, self.columns, n, 3)
        self.directions = np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(-1, 3)
        self.first: Hits | None = None
        self.solid: np.ndarray | None = None  # bool [n]: the first hit is at least half opaque

    def shade(self) -> tuple[np.ndarray, np.ndarray]:
        """Premultiplied linear colour [rows, columns, 3] and alpha [rows, columns]."""
        count = len(self.directions)
        color, light = np.zeros((count, 3), np.float32), np.ones(count, np.float32)
        active = np.arange(count)
        start = np.broadcast_to(self.camera.eye.astype(np.float32), (count, 3)).copy()
        travelled = np.zeros(count, np.float32)
        for layer in range(self.tracer.config.max_layers):
            hits = self.tracer.scene.nearest(start, self.directions[active])
            found = np.flatnonzero(hits.faces >= 0)
            rows = active[found]
            faces, u, v = hits.faces[found], hits.u[found], hits.v[found]
            depth = travelled[found] + hits.t[found]
            alpha = self._shade_layer(rows, faces, u, v, depth, color, light)
            if layer == 0:
                self.first, self.solid = hits, np.zeros(count, bool)
                self.solid[rows] = alpha >= 0.5
            goes_on = light[rows] > _LEAST_LIGHT
            active = rows[goes_on]
            if not len(active):
                break
            travelled = depth[goes_on] + np.float32(SURFACE_OFFSET)
            start = self.camera.eye.astype(np.float32) + travelled[:, None] * self.directions[active]
        pixels = (self.rows * self.columns, self.num_samples)
        mean = color.reshape(*pixels, 3).mean(1).reshape(self.rows, self.columns, 3)
        return mean, 1 - light.reshape(pixels).mean(1).reshape(self.rows, self.columns)

    def _shade_layer(
        self,
        rows: np.ndarray,
        faces: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        depth: np.ndarray,
        color: np.ndarray,
        light: np.ndarray,
    ) -> np.ndarray:
        """Add what these samples see to ``color`` and take it from ``light``; returns their alpha [n]."""
        tracer, surface = self.tracer, self.tracer.surface
        footprint = self._footprint(rows, faces, depth)
        rgba = surface.base_colors(faces, u, v, footprint)
        alpha = tracer.opacities(rgba, faces, self.directions[rows])
        if tracer._all_opaque:
            seen: slice | np.ndarray = slice(None)
        else:
            seen = np.flatnonzero(alpha > 0)
        r, f = rows[seen], faces[seen]
        groups, members = group_samples(r // self.num_samples, f)
        counts = np.bincount(members, minlength=len(groups)).astype(np.float32)
        mean_u = (np.bincount(members, u[seen], len(groups)) / counts).astype(np.float32)
        mean_v = (np.bincount(members, v[seen], len(groups)) / counts).astype(np.float32)
        lit = tracer.irradiance(self.camera, f[groups], mean_u, mean_v)
        radiance = rgba[seen, :3] * lit[members][:, None]
        glowing = np.flatnonzero(surface.glows[f])
        if len(glowing):
            g = np.arange(len(faces))[seen][glowing]
            radiance[glowing] += surface.emission(faces[g], u[g], v[g], footprint[g])
        share = light[r] * alpha[seen]
        color[r] += share[:, None] * radiance
        light[r] -= share
        return alpha

    def _footprint(self, rows: np.ndarray, faces: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Width of surface a sample covers: the geometric mean along and across the tilt, float32 [n]."""
        tracer = self.tracer
        width = np.float32(self.camera.pixel_width() / tracer.config.supersample) * depth
        if not tracer.surface.textured.any():
            return width
        directions = self.directions[rows]
        cosine = np.abs((tracer.surface.normals[faces] * directions).sum(1))
        cosine /= np.sqrt((directions * directions).sum(1))
        return width / np.sqrt(np.maximum(cosine, np.float32(0.1)))

    def center_hits(self) -> Hits:
        """The first at least half opaque surface on the ray through each pixel's centre.

        Where all samples of a pixel fall on one face, so does its centre, and no ray is needed.
        """
        assert self.first is not None and self.solid is not None
        shape = (self.rows * self.columns, self.num_samples)
        first, solid = self.first.faces.reshape(shape), self.solid.reshape(shape)
        same = (first == first[:, :1]).all(1) & solid.all(1)
        faces = np.where(same, first[:, 0], -1).astype(np.int32)
        u, v = self.first.u.reshape(shape).mean(1), self.first.v.reshape(shape).mean(1)
        rays = self._center_rays()
        rows = np.flatnonzero(~same & (first >= 0).any(1))
        depth = self._depth_on_plane(faces, rays)
        start = np.broadcast_to(self.camera.eye.astype(np.float32), (len(rows), 3)).copy()
        travelled = np.zeros(len(rows), np.float32)
        for _ in range(self.tracer.config.max_layers):
            hits = self.tracer.scene.nearest(start, rays[rows])
            hit = hits.faces >= 0
            rows, f, hu, hv = rows[hit], hits.faces[hit], hits.u[hit], hits.v[hit]
            travelled = travelled[hit] + hits.t[hit]
            rgba = self.tracer.surface.base_colors(f, hu, hv, np.zeros(len(f), np.float32))
            done = self.tracer.opacities(rgba, f, rays[rows]) >= 0.5
            at = rows[done]
            faces[at], u[at], v[at], depth[at] = f[done], hu[done], hv[done], travelled[done]
            rows, travelled = rows[~done], travelled[~done] + np.float32(SURFACE_OFFSET)
            if not len(rows):
                break
            start = self.camera.eye.astype(np.float32) + travelled[:, None] * rays[rows]
        return Hits(faces, u.astype(np.float32), v.astype(np.float32), depth)

    def _center_rays(self) -> np.ndarray:
        xs = np.arange(self.x0, self.x0 + self.columns) + 0.5
        ys = np.arange(self.y0, self.y0 + self.rows) + 0.5
        return self.camera.rays(xs, ys).reshape(-1, 3)

    def _depth_on_plane(self, faces: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Depth at which rays from the camera meet the planes of ``faces`` [n]; 0 where a face is -1."""
        depth = np.zeros(len(faces), np.float32)
        rows = np.flatnonzero(faces >= 0)
        normals = self.tracer.surface.normals[faces[rows]].astype(np.float64)
        offset = self.tracer.surface.origin[faces[rows]] - self.camera.eye
        along = (normals * rays[rows]).sum(1)
        depth[rows] = (normals * offset).sum(1) / np.where(np.abs(along) > 1e-12, along, 1e-12)
        return depth


class _Geometry:
    """Hits at pixel centres, gathered tile by tile, and the images made of them."""

    def __init__(self, height: int, width: int) -> None:
        shape = (height, width)
        self.faces = np.full(shape, -1, np.int32)
        self.u, self.v, self.depths = (np.zeros(shape, np.float32) for _ in range(3))

    def fill(self, tile: _Tile) -> None:
        hits = tile.center_hits()
        window = np.s_[tile.y0 : tile.y0 + tile.rows, tile.x0 : tile.x0 + tile.columns]
        shape = (tile.rows, tile.columns)
        self.faces[window], self.u[window] = hits.faces.reshape(shape), hits.u.reshape(shape)
        self.v[window], self.depths[window] = hits.v.reshape(shape), hits.t.reshape(shape)

    def arrays(self, camera: Camera, surface: Surface, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {"depths": self.depths, "triangle_ids": self.faces}
        seen = self.faces >= 0
        if "points" in wanted or "normals" in wanted:
            height, width = seen.shape
            rays = camera.rays(np.arange(width) + 0.5, np.arange(height) + 0.5)
            points = np.zeros((height, width, 3), np.float32)
            points[seen] = camera.eye.astype(np.float32) + self.depths[seen][:, None] * rays[seen]
            arrays["points"] = points
        if "normals" in wanted:
            faces, u, v = self.faces[seen], self.u[seen], self.v[seen]
            normals = surface.shading_normals(faces, u, v)
            away = (surface.normals[faces] * rays[seen]).sum(1) > 0
            arrays["normals"] = np.zeros((*seen.shape, 3), np.float32)
            arrays["normals"][seen] = np.where(away[:, None], -normals, normals)
        return {key: arrays[key] for key in wanted}


def group_samples(pixels: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group samples by (pixel, face); ``pixels`` [n] is sorted.

    Returns (first sample of each group [G], group of each sample [n]).
    """
    n = len(pixels)
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # Runs of one pixel are short, so each sample looks for its face among the few before it.
    starts = np.flatnonzero(np.concatenate([[True], pixels[1:] != pixels[:-1]]))
    position = np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))
    leader = np.arange(n)
    for back in range(int(position.max()), 0, -1):
        rows = np.flatnonzero(position >= back)
        same = faces[rows] == faces[rows - back]
        leader[rows[same]] = np.minimum(leader[rows[same]], rows[same] - back)
    is_leader = leader == np.arange(n)
    return np.flatnonzero(is_leader), (np.cumsum(is_leader) - 1)[leader]


def _tiles(bounds: tuple[int, int, int, int], supersample: int) -> Iterator[tuple[int, int, int, int]]:
    x0, x1, y0, y1 = bounds
    if x1 <= x0 or y1 <= y0:
        return
    rows = max(1, _TILE_SAMPLES // (supersample**2 * (x1 - x0)))
    for top in range(y0, y1, rows):
        yield x0, x1, top, min(top + rows, y1)
