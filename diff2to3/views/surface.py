"""What a mesh looks like at a point of a face: colour, opacity, emission and normals. Linear light."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diff2to3.types import Material, Mesh, Texture
from diff2to3.views.textures import TexturePack

_OPAQUE, _MASK, _BLEND = 0, 1, 2
_ALPHA_CODES = {"OPAQUE": _OPAQUE, "MASK": _MASK, "BLEND": _BLEND}
_NO_TEXTURE = -1


class _Corners(NamedTuple):
    """Texture coordinates of the corners of faces, float32 [F, 3, 2], and how many of their units lie along a unit
    of length on the surface, float32 [F]."""

    uvs: np.ndarray
    density: np.ndarray


class Surface:
    """Tables by face, and lookups for n points at once: ``faces``, barycentric ``u`` and ``v``, each [n]."""

    def __init__(self, mesh: Mesh, smooth: bool = True) -> None:
        self.mesh = mesh
        corners = mesh.triangles
        self.origin = np.ascontiguousarray(corners[:, 0])
        self.edge_u = corners[:, 1] - corners[:, 0]
        self.edge_v = corners[:, 2] - corners[:, 0]
        cross = np.cross(self.edge_u.astype(np.float64), self.edge_v.astype(np.float64))
        self._doubled_area = np.linalg.norm(cross, axis=1)
        #: Geometric unit normals, on the side from which the face winds counter-clockwise: float32 [F, 3].
        self.normals = (cross / np.maximum(self._doubled_area, 1e-38)[:, None]).astype(np.float32)
        self._smooth = smooth and mesh.normals is not None
        self._read_materials(mesh.materials, mesh.material_ids)
        self._read_textures(mesh.materials, mesh.material_ids)

    def _read_materials(self, materials: tuple[Material, ...], ids: np.ndarray) -> None:
        self.factors = np.array([m.base_color_factor for m in materials], np.float32)[ids]
        self.emissive = np.array([m.emissive_factor for m in materials], np.float32)[ids]
        self._alpha_mode = np.array([_ALPHA_CODES[m.alpha_mode] for m in materials], np.int8)[ids]
        self._cutoff = np.array([m.alpha_cutoff for m in materials], np.float32)[ids]
        self.double_sided = np.array([m.double_sided for m in materials], bool)[ids]
        self.unlit = np.array([m.unlit for m in materials], bool)[ids]
        #: Faces that nothing shines through, anywhere.
        self.opaque = self._alpha_mode == _OPAQUE

    def _read_textures(self, materials: tuple[Material, ...], ids: np.ndarray) -> None:
        textures: list[Texture] = []
        rows = {}
        for slot in ("base_color_texture", "emissive_texture"):
            found = []
            for material in materials:
                texture: Texture | None = getattr(material, slot)
                known = next((i for i, t in enumerate(textures) if t is texture), None)
                if texture is not None and known is None:
                    known = len(textures)
                    textures.append(texture)
                found.append(_NO_TEXTURE if known is None else known)
            rows[slot] = np.array(found, np.int32)[ids]
        self._base_texture, self._emissive_texture = rows["base_color_texture"], rows["emissive_texture"]
        self._pack = TexturePack(textures)
        self.textured = self._base_texture >= 0
        self._has_emissive_texture = bool((self._emissive_texture >= 0).any())
        #: Faces whose colour changes from point to point.
        self.varying = self.textured | (self.mesh.colors is not None)
        self._uvs = self._emissive_uvs = None
        if textures:
            none = np.zeros((len(self.mesh.vertices), 2), np.float32)
            self._uvs = self._corners(none if self.mesh.uvs is None else self.mesh.uvs)
            own = self.mesh.emissive_uvs
            self._emissive_uvs = self._uvs if own is None else self._corners(own)
            self._texel_density = self._uvs.density * self._pack.mean_size(self._base_texture) * self.textured

    def _corners(self, uvs: np.ndarray) -> _Corners:
        corners = uvs[self.mesh.faces]  # [F, 3, 2]
        a, b, c = np.moveaxis(corners.astype(np.float64), 1, 0)
        area = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
        density = np.sqrt(area / np.maximum(self._doubled_area, 1e-38))
        return _Corners(corners, np.maximum(density, 1e-12).astype(np.float32))

    def positions(self, faces: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """float32 [n, 3]."""
        return self.origin[faces] + u[:, None] * self.edge_u[faces] + v[:, None] * self.edge_v[faces]

    def shading_normals(self, faces: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Unit normals, interpolated where the file has them: float32 [n, 3]."""
        flat = self.normals[faces]
        if not self._smooth or self.mesh.normals is None:
            return flat
        blend = _interpolate(self.mesh.normals, self.mesh.faces[faces], u, v)
        length = np.sqrt((blend * blend).sum(1, keepdims=True))
        return np.where(length > 1e-6, blend / np.maximum(length, 1e-6), flat)

    def base_colors(
        self, faces: np.ndarray, u: np.ndarray, v: np.ndarray, footprint: np.ndarray
    ) -> np.ndarray:
        """Linear RGBA with opacity resolved by alpha mode: float32 [n, 4].

        ``footprint`` [n] is the width of surface, in object units, that one sample stands for.
        """
        rgba = self.factors[faces]
        if self.varying.any():
            if self.mesh.colors is not None:
                rgba *= _interpolate(self.mesh.colors, self.mesh.faces[faces], u, v)
            rows = np.flatnonzero(self.textured[faces])
            if len(rows):
                f = faces[rows]
                rgba[rows] *= self._read(
                    self._base_texture[f], self._uvs, f, u[rows], v[rows], footprint[rows]
                )
        rgba[:, 3] = self._opacity(faces, rgba[:, 3])
        return rgba

    def is_minified(self, faces: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Whether more than one texel of the base colour lies under ``footprint`` [n]: bool [n]."""
        if not self.textured.any():
            return np.zeros(len(faces), bool)
        texels = self._texel_density[faces] * footprint
        return np.asarray(texels > 1)

    def opacities(self, faces: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Opacity alone, at full texture resolution, for shadows: float32 [n]."""
        return self.base_colors(faces, u, v, np.zeros(len(faces), np.float32))[:, 3]

    def emission(self, faces: np.ndarray, u: np.ndarray, v: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Linear RGB that the surface sends out by itself: float32 [n, 3]."""
        light = self.emissive[faces]
        if not self._has_emissive_texture:
            return light
        rows = np.flatnonzero(self._emissive_texture[faces] >= 0)
        if len(rows):
            f = faces[rows]
            texture = self._emissive_texture[f]
            read = self._read(texture, self._emissive_uvs, f, u[rows], v[rows], footprint[rows])
            light[rows] *= read[:, :3]
        return light

    def _read(
        self,
        textures: np.ndarray,
        where: _Corners | None,
        faces: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        footprint: np.ndarray,
    ) -> np.ndarray:
        assert where is not None
        corners = where.uvs[faces]
        uvs = corners[:, 0] + u[:, None] * (corners[:, 1] - corners[:, 0])
        uvs += v[:, None] * (corners[:, 2] - corners[:, 0])
        lods = np.log2(np.maximum(footprint, 1e-20) * where.density[faces] * self._pack.mean_size(textures))
        return self._pack.sample(textures, uvs, lods)

    def _opacity(self, faces: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        if self.opaque.all():
            return np.ones_like(alpha)
        mode = self._alpha_mode[faces]
        masked = (alpha >= self._cutoff[faces]).astype(np.float32)
        sheer = np.where(mode == _MASK, masked, np.clip(alpha, 0, 1))
        return np.where(mode == _OPAQUE, np.float32(1), sheer)


def _interpolate(values: np.ndarray, corners: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vertex ``values`` [P, k] at points of faces with vertex indices ``corners`` [n, 3]: [n, k]."""
    u, v = u[:, None], v[:, None]
    blend = values[corners[:, 0]] * (1 - u - v)
    blend += values[corners[:, 1]] * u
    blend += values[corners[:, 2]] * v
    return blend
