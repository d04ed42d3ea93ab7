"""Variants of assets: other shapes and other colours out of the ones there are, for models that see few of them.

A variant is its asset stretched along the axes (each by up to :data:`MAX_STRETCH` against the others), with its
colour channels in another order, and, half of the time, mirrored. All of it is drawn from the variant's id alone, so
that a dataset can be made again, by any number of workers. It stays a plausible object: it still stands on the ground,
looks the same way, and has as many parts.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from diff2to3.types import Material, Mesh, Texture
from diff2to3.views.cameras import generator_for

#: What the id of a mirrored asset ends with.
MIRRORED = "~mirrored"
#: What the id of a variant ends with, before its number.
VARIANT = "~variant"
#: Longest axis over shortest, at most, of the box that a cube becomes.
MAX_STRETCH = 1.8
_VARIANT_SUFFIX = re.compile(f"{VARIANT}[0-9]+$")


def derived(asset_id: str, mirrored: bool, variants: int) -> list[str]:
    """The ids of what is made of one asset besides itself."""
    return [asset_id + MIRRORED] * mirrored + [f"{asset_id}{VARIANT}{k}" for k in range(1, variants + 1)]


def original(asset_id: str) -> str:
    """The id of the asset that ``asset_id`` is made of: its own, where it is no variant."""
    return _VARIANT_SUFFIX.sub("", asset_id.removesuffix(MIRRORED))


def is_variant(asset_id: str) -> bool:
    """Whether it is stretched and recoloured (a mirrored asset is not)."""
    return _VARIANT_SUFFIX.search(asset_id) is not None


def derive(mesh: Mesh, asset_id: str) -> Mesh:
    """What ``asset_id`` stands for, from the mesh of its original."""
    if asset_id.endswith(MIRRORED):
        return mesh.mirrored()
    if not is_variant(asset_id):
        return mesh
    generator = generator_for(0, "variant", asset_id)
    half = np.log(MAX_STRETCH) / 2
    factors = np.exp(generator.uniform(-half, half, 3))
    order = [int(channel) for channel in generator.permutation(3)]
    if generator.random() < 0.5:
        mesh = mesh.mirrored()
    return recoloured(stretched(mesh, factors), order)


def stretched(mesh: Mesh, factors: np.ndarray) -> Mesh:
    """Scaled along x, y and z by the positive ``factors`` [3], then as a whole, so that the longest side is 1 again."""
    extents = np.ptp(mesh.vertices.astype(np.float64), axis=0) * factors
    factors = np.asarray(factors, np.float64) / max(float(extents.max()), 1e-12)
    normals = mesh.normals
    if normals is not None:  # planes move with the inverse of what moves points
        moved = normals / factors
        normals = (moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return replace(
        mesh,
        vertices=(mesh.vertices * factors).astype(np.float32),
        normals=normals,
        transform=np.diag([*factors, 1.0]) @ mesh.transform,
    )


def recoloured(mesh: Mesh, order: list[int]) -> Mesh:
    """With red, green and blue taken from the channels ``order`` of before. Unlike other changes of hue this
    commutes with everything shading does: factors, textures and vertex colours are multiplied channel by channel.
    """
    rgba = [*order, 3]
    textures: dict[int, Texture] = {}

    def texture(before: Texture | None) -> Texture | None:
        if before is not None and id(before) not in textures:  # materials share textures
            textures[id(before)] = replace(before, pixels=np.ascontiguousarray(before.pixels[..., rgba]))
        return None if before is None else textures[id(before)]

    def material(before: Material) -> Material:
        base, emissive = before.base_color_factor, before.emissive_factor
        r, g, b = order
        return replace(
            before,
            base_color_factor=(base[r], base[g], base[b], base[3]),
            emissive_factor=(emissive[r], emissive[g], emissive[b]),
            base_color_texture=texture(before.base_color_texture),
            emissive_texture=texture(before.emissive_texture),
        )

    colors = None if mesh.colors is None else np.ascontiguousarray(mesh.colors[:, rgba])
    return replace(mesh, materials=tuple(material(m) for m in mesh.materials), colors=colors)
