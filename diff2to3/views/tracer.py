"""The CPU renderer: samples -> nearest surfaces -> light -> pixels.

    rays of a tile -> first hits -> groups (one a pixel and face) -> light and colour -> pixels
         ^                               └─> fine samples -> colour, opacity ─────────────┘
         └── what shines through goes on, at most `max_layers` times

Visibility is found for every sample. Light, which is smooth, is computed once for all samples of a pixel that
fall on the same face (as multisampling does on a GPU), and so is colour, except where a texture has detail
below the pixel or opacity matters. A pixel inside a face then traces one set of shadow rays and not four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diff2to3.types import Mesh
from diff2to3.views.config import LightingConfig, RenderConfig
from diff2to3.views.lighting import Lights, SurfacePoints
from diff2to3.views.raycast import SURFACE_OFFSET, Hits, RayScene
from diff2to3.views.surface import Surface
from diff2to3.views.textures import encode_srgb

#: Samples worked on at once: bounds memory at about 200 bytes each.
_TILE_SAMPLES = 1 << 19
#: Meshes with more vertices are found in the image by their bounding box: looser, and faster.
_MAX_OUTLINE = 20_000
#: Light that is left below this is not followed any further.
_LEAST_LIGHT = 1 / 512


@dataclass(frozen=True)
class Camera:
    """One view. Rays are ``rotation^T ((x - cx)/fx, (y - cy)/fy, 1)``: distances along them are depths."""

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

    def across(self, xs: np.ndarray) -> np.ndarray:
        """The part of a ray's direction that depends on image x: float32 [..., 3]. Add :meth:`down`."""
        return (((xs - self.K[0, 2]) / self.K[0, 0])[..., None] * self.rotation[0]).astype(np.float32)

    def down(self, ys: np.ndarray) -> np.ndarray:
        """The part that depends on image y: float32 [..., 3]."""
        part = ((ys - self.K[1, 2]) / self.K[1, 1])[..., None] * self.rotation[1] + self.rotation[2]
        return np.asarray(part, np.float32)

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


class Frames:
    """Arrays for V views, filled one by one; see :class:`diff2to3.views.RenderedViews` for what they hold."""

    def __init__(self, num_views: int, height: int, width: int, outputs: tuple[str, ...]) -> None:
        shape = (num_views, height, width)
        self.images = np.zeros((*shape, 3), np.float32)
        self.alphas = np.zeros(shape, np.float32)
        self.depths = np.zeros(shape, np.float32) if "depths" in outputs else None
        self.normals = np.zeros((*shape, 3), np.float32) if "normals" in outputs else None
        self.points = np.zeros((*shape, 3), np.float32) if "points" in outputs else None
        self.triangle_ids = np.full(shape, -1, np.int32) if "triangle_ids" in outputs else None


class Tracer:
    """Renders views of one mesh. Building it costs milliseconds (the ray tree, the texture levels)."""

    def __init__(self, mesh: Mesh, config: RenderConfig) -> None:
        self.mesh, self.config = mesh, config
        self.surface = Surface(mesh, config.smooth)
        self.scene = RayScene(mesh.vertices, mesh.faces)
        lit = config.lighting.mode != "unlit"
        self._lights = Lights(config.lighting, self.surface, self.scene, config.max_layers) if lit else None
        self._outline = mesh.vertices if len(mesh.vertices) < _MAX_OUTLINE else _box_corners(mesh.vertices)
        self._culls = config.back_faces == "cull" and not bool(self.surface.double_sided.all())
        #: Faces that a ray may pass, so that opacity is looked up sample by sample.
        self.sheer = ~self.surface.opaque | (self._culls & ~self.surface.double_sided)

    def relight(self, lighting: LightingConfig) -> None:
        """Render under this light from now on; see :meth:`diff2to3.views.lighting.Lights.relit`."""
        if self._lights is None:
            raise ValueError("lighting: this renderer is unlit")
        self._lights = self._lights.relit(lighting)

    def render(self, camera: Camera, out: Frames, view: int) -> None:
        """Render one view into row ``view`` of ``out``."""
        geometry = _Geometry(camera.height, camera.width) if self.config.outputs else None
        for x0, x1, y0, y1 in _tiles(camera.bounds(self._outline), self.config.supersample):
            tile = Tile(self, camera, x0, x1, y0, y1)
            colors, alphas = tile.shade()
            seen = np.flatnonzero(alphas > 0)
            images = np.zeros_like(colors)
            images[seen] = encode_srgb(colors[seen] / alphas[seen][:, None])
            out.images[view, y0:y1, x0:x1] = images.reshape(tile.rows, tile.columns, 3)
            out.alphas[view, y0:y1, x0:x1] = alphas.reshape(tile.rows, tile.columns)
            if geometry is not None:
                geometry.fill(tile)
        if geometry is not None:
            geometry.write(camera, self.surface, out, view)

    def first_hits(self, tile: Tile, start: np.ndarray) -> Hits:
        """What the samples of a tile see first; ``start`` [n, 3] is the eye, repeated."""
        return self.scene.nearest(start, tile.directions)

    def opacities(self, alpha: np.ndarray, faces: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """``alpha`` [n], but 0 on back faces that are culled."""
        if not self._culls:
            return alpha
        behind = dot(self.surface.normals[faces], directions) > 0
        return np.where(behind & ~self.surface.double_sided[faces], np.float32(0), alpha)

    def irradiance(self, camera: Camera, faces: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Light on a white surface at points of faces, seen from the camera: float32 [n]."""
        if self._lights is None:
            return np.ones(len(faces), np.float32)
        light = self._lights.irradiance(self._surface_points(camera, faces, u, v))
        light[self.surface.unlit[faces]] = 1
        return light

    def _surface_points(
        self, camera: Camera, faces: np.ndarray, u: np.ndarray, v: np.ndarray
    ) -> SurfacePoints:
        points = self.surface.positions(faces, u, v)
        flat = self.surface.normals[faces]
        away = dot(flat, camera.eye.astype(np.float32) - points) < 0
        flat[away] *= -1
        shading = self.surface.shading_normals(faces, u, v)
        # A shading normal belongs to the side of its face, not to that of the camera: near an outline it may
        # lean away from the viewer and still be right.
        shading[dot(shading, flat) < 0] *= -1
        return SurfacePoints(faces, away.astype(np.int8), u, v, points, flat, shading)


class Tile:
    """A rectangle of pixels in the making. Samples go by row, column, then row and column in the pixel."""

    def __init__(self, tracer: Tracer, camera: Camera, x0: int, x1: int, y0: int, y1: int) -> None:
        self.tracer, self.camera = tracer, camera
        self.x0, self.y0, self.rows, self.columns = x0, y0, y1 - y0, x1 - x0
        self.num_pixels, self.num_samples = self.rows * self.columns, tracer.config.supersample**2
        n = tracer.config.supersample
        inside = (np.arange(n) + 0.5) / n
        across = camera.across(np.arange(x0, x1)[:, None] + inside)  # [columns, n, 3]
        down = camera.down(np.arange(y0, y1)[:, None] + inside)  # [rows, n, 3]
        self.directions = (across[None, :, None] + down[:, None, :, None]).reshape(-1, 3)
        self.first: Hits | None = None
        self._light = np.ones(len(self.directions), np.float32)  # what has not been taken by a surface yet

    def shade(self) -> tuple[np.ndarray, np.ndarray]:
        """Premultiplied linear colour [pixels, 3] and alpha [pixels]."""
        count, eye = len(self.directions), self.camera.eye.astype(np.float32)
        colors = np.zeros((self.num_pixels, 3), np.float32)
        active = np.arange(count)
        start, travelled = np.broadcast_to(eye, (count, 3)).astype(np.float32), np.zeros(count, np.float32)
        for layer in range(self.tracer.config.max_layers):
            if layer == 0:
                hits = self.first = self.tracer.first_hits(self, start)
            else:
                hits = self.tracer.scene.nearest(start, self.directions[active])
            found = np.flatnonzero(hits.faces >= 0)
            rows, depth = active[found], travelled[found] + hits.t[found]
            self._shade_layer(rows, hits.faces[found], hits.u[found], hits.v[found], depth, colors)
            goes_on = np.flatnonzero(self._light[rows] > _LEAST_LIGHT)
            active = rows[goes_on]
            if not len(active):
                break
            travelled = depth[goes_on] + np.float32(SURFACE_OFFSET)
            start = eye + travelled[:, None] * self.directions[active]
        colors /= self.num_samples
        return colors, 1 - _sum_columns(self._light.reshape(self.num_pixels, -1)) / self.num_samples

    def _shade_layer(
        self,
        rows: np.ndarray,
        faces: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        depth: np.ndarray,
        colors: np.ndarray,
    ) -> None:
        """Add what the samples ``rows`` see to ``colors``, and take it from the light that is left."""
        tracer, surface = self.tracer, self.tracer.surface
        pixels = rows // self.num_samples
        groups, members = group_samples(pixels, faces)
        counts = np.bincount(members, minlength=len(groups))
        mean_u, mean_v, mean_depth = (
            (np.bincount(members, values, len(groups)) / counts).astype(np.float32)
            for values in (u, v, depth)
        )
        group_faces, group_pixels = faces[groups], pixels[groups]
        width = self._footprint(rows[groups], group_faces, mean_depth)
        fine = tracer.sheer[group_faces] | surface.is_minified(group_faces, width)
        lit = tracer.irradiance(self.camera, group_faces, mean_u, mean_v)

        # Smooth colour: once a group, weighted by the light of its samples.
        coarse = np.flatnonzero(~fine)
        weight = np.bincount(members, self._light[rows], len(groups)).astype(np.float32)[coarse]
        at = (group_faces[coarse], mean_u[coarse], mean_v[coarse], width[coarse])
        radiance = surface.base_colors(*at)[:, :3] * lit[coarse, None] + surface.emission(*at)
        _deposit(colors, group_pixels[coarse], weight[:, None] * radiance)
        if len(coarse) == len(groups):
            self._light[rows] = 0
            return
        # Detail and transparency: every sample by itself.
        is_fine = fine[members]
        self._light[rows[~is_fine]] = 0
        rows, f, members = rows[is_fine], faces[is_fine], members[is_fine]
        at = (f, u[is_fine], v[is_fine], width[members] / np.float32(tracer.config.supersample))
        rgba = surface.base_colors(*at)
        alpha = tracer.opacities(rgba[:, 3], f, self.directions[rows])
        share = self._light[rows] * alpha
        self._light[rows] -= share
        radiance = rgba[:, :3] * lit[members, None] + surface.emission(*at)
        _deposit(colors, pixels[is_fine], share[:, None] * radiance)

    def _footprint(self, rows: np.ndarray, faces: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Width of surface under a pixel: the geometric mean along and across the tilt, float32 [n]."""
        width = np.float32(self.camera.pixel_width()) * depth
        if not self.tracer.surface.textured.any():
            return width
        directions = self.directions[rows]
        cosine = np.abs(dot(self.tracer.surface.normals[faces], directions)) / np.sqrt(
            dot(directions, directions)
        )
        return width / np.sqrt(np.maximum(cosine, np.float32(0.1)))

    def center_hits(self) -> Hits:
        """The first at least half opaque surface on the ray through each pixel's centre.

        Where all samples of a pixel fall on one opaque face, so does its centre, and no ray is needed.
        """
        assert self.first is not None
        shape = (self.num_pixels, self.num_samples)
        first = self.first.faces.reshape(shape)
        same, any_hit = np.ones(self.num_pixels, bool), first[:, 0] >= 0
        for column in range(1, self.num_samples):
            same &= first[:, column] == first[:, 0]
            any_hit |= first[:, column] >= 0
        same &= any_hit & ~self.tracer.sheer[first[:, 0]]
        inner, rays = np.flatnonzero(same), self._center_rays()
        faces = np.full(self.num_pixels, -1, np.int32)
        u, v, depth = (np.zeros(self.num_pixels, np.float32) for _ in range(3))
        faces[inner] = first[inner, 0]
        for out, values in ((u, self.first.u), (v, self.first.v)):
            out[inner] = _sum_columns(values.reshape(shape)[inner]) / self.num_samples
        depth[inner] = self._depth_on_plane(faces[inner], rays[inner])
        self._trace_centers(np.flatnonzero(~same & any_hit), rays, Hits(faces, u, v, depth))
        return Hits(faces, u, v, depth)

    def _trace_centers(self, rows: np.ndarray, rays: np.ndarray, out: Hits) -> None:
        """Follow the rays of pixels ``rows`` to the first surface that is at least half opaque."""
        eye, surface = self.camera.eye.astype(np.float32), self.tracer.surface
        start, travelled = (
            np.broadcast_to(eye, (len(rows), 3)).astype(np.float32),
            np.zeros(len(rows), np.float32),
        )
        for _ in range(self.tracer.config.max_layers):
            hits = self.tracer.scene.nearest(start, rays[rows])
            hit = np.flatnonzero(hits.faces >= 0)
            rows, faces, u, v = rows[hit], hits.faces[hit], hits.u[hit], hits.v[hit]
            travelled = travelled[hit] + hits.t[hit]
            alpha = np.ones(len(rows), np.float32)
            sheer = np.flatnonzero(self.tracer.sheer[faces])
            if len(sheer):
                alpha[sheer] = surface.opacities(faces[sheer], u[sheer], v[sheer])
                alpha = self.tracer.opacities(alpha, faces, rays[rows])
            done = alpha >= 0.5
            at = rows[done]
            out.faces[at], out.u[at], out.v[at], out.t[at] = faces[done], u[done], v[done], travelled[done]
            rows, travelled = rows[~done], travelled[~done] + np.float32(SURFACE_OFFSET)
            if not len(rows):
                break
            start = eye + travelled[:, None] * rays[rows]

    def _center_rays(self) -> np.ndarray:
        xs = np.arange(self.x0, self.x0 + self.columns) + 0.5
        ys = np.arange(self.y0, self.y0 + self.rows) + 0.5
        return (self.camera.across(xs)[None] + self.camera.down(ys)[:, None]).reshape(-1, 3)

    def _depth_on_plane(self, faces: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Depths at which rays [n, 3] from the camera meet the planes of ``faces`` [n]."""
        normals = self.tracer.surface.normals[faces].astype(np.float64)
        along = dot(normals, rays)
        offset = self.tracer.surface.origin[faces] - self.camera.eye
        return np.asarray(dot(normals, offset) / np.where(np.abs(along) > 1e-12, along, 1e-12), np.float32)


class _Geometry:
    """Hits at pixel centres, gathered tile by tile, and the images made of them."""

    def __init__(self, height: int, width: int) -> None:
        shape = (height, width)
        self.faces = np.full(shape, -1, np.int32)
        self.u, self.v, self.depths = (np.zeros(shape, np.float32) for _ in range(3))

    def fill(self, tile: Tile) -> None:
        hits = tile.center_hits()
        window = np.s_[tile.y0 : tile.y0 + tile.rows, tile.x0 : tile.x0 + tile.columns]
        for image, values in zip((self.faces, self.u, self.v, self.depths), hits, strict=True):
            image[window] = values.reshape(tile.rows, tile.columns)

    def write(self, camera: Camera, surface: Surface, out: Frames, view: int) -> None:
        if out.depths is not None:
            out.depths[view] = self.depths
        if out.triangle_ids is not None:
            out.triangle_ids[view] = self.faces
        ys, xs = np.nonzero(self.faces >= 0)
        faces, u, v, depths = (image[ys, xs] for image in (self.faces, self.u, self.v, self.depths))
        rays = (
            camera.across(np.arange(camera.width) + 0.5)[xs] + camera.down(np.arange(camera.height) + 0.5)[ys]
        )
        if out.points is not None:
            out.points[view, ys, xs] = camera.eye.astype(np.float32) + depths[:, None] * rays
        if out.normals is not None:
            normals = surface.shading_normals(faces, u, v)
            normals[dot(surface.normals[faces], rays) > 0] *= -1
            out.normals[view, ys, xs] = normals


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows [n, 3] . rows [n, 3]; far faster than a sum over an axis of three."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def _sum_columns(values: np.ndarray) -> np.ndarray:
    """Sum of [n, k] over its few columns."""
    total = values[:, 0].copy()
    for column in range(1, values.shape[1]):
        total += values[:, column]
    return total


def _deposit(colors: np.ndarray, pixels: np.ndarray, light: np.ndarray) -> None:
    """colors[pixels] += light, where pixels repeat: [P, 3], [n], [n, 3]."""
    if len(pixels) == 0:
        return
    first, last = int(pixels[0]), int(pixels[-1])  # sorted, so only this range is touched
    for channel in range(3):
        colors[first : last + 1, channel] += np.bincount(pixels - first, light[:, channel], last + 1 - first)


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


def _box_corners(vertices: np.ndarray) -> np.ndarray:
    """The corners of the bounding box: [8, 3]."""
    ends = np.stack([vertices.min(0), vertices.max(0)])
    return np.stack([ends[[i >> k & 1 for k in range(3)], range(3)] for i in range(8)])


def _tiles(bounds: tuple[int, int, int, int], supersample: int) -> Iterator[tuple[int, int, int, int]]:
    x0, x1, y0, y1 = bounds
    if x1 <= x0 or y1 <= y0:
        return
    rows = max(1, _TILE_SAMPLES // (supersample**2 * (x1 - x0)))
    for top in range(y0, y1, rows):
        yield x0, x1, top, min(top + rows, y1)
