"""The Blender renderer: Cycles in a process of its own, fed with our mesh, as every renderer is.

Colour and alpha come from Cycles; depths, normals, points and triangle ids, where asked for, from the ray
caster with the same mesh and cameras.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diff2to3.blender import run_script
from diff2to3.errors import InputError
from diff2to3.types import Material, Mesh, Texture
from diff2to3.views.config import LightingConfig, RenderConfig
from diff2to3.views.rendered import RaycastRenderer, RenderedViews, check_cameras

_SCRIPT = Path(__file__).with_name("blender_script.py")


class BlenderRenderer:
    """Renders by Cycles; a call costs the start of Blender (about 2 s) besides the views."""

    def __init__(self, mesh: Mesh, config: RenderConfig) -> None:
        self._mesh, self._config = mesh, config

    def render(self, viewmats: Tensor, Ks: Tensor, width: int, height: int) -> RenderedViews:
        check_cameras(viewmats, Ks, width, height)
        with tempfile.TemporaryDirectory(prefix="diff2to3-blender-") as name:
            folder = Path(name)
            job = self._job(folder, viewmats, Ks, width, height)
            try:
                result = run_script(
                    self._config.blender.python, _SCRIPT, job, folder, self._config.blender.seconds
                )
            except InputError as error:
                raise InputError(f"{self._mesh.name}: {error}") from error
            rgba = np.stack([_read_png(folder / file) for file in result["files"]])
        if rgba.shape != (len(viewmats), height, width, 4):
            raise InputError(f"{self._mesh.name}: Blender wrote images of shape {rgba.shape}")
        values = torch.from_numpy(rgba)
        views = RenderedViews(
            images=values[..., :3] * (values[..., 3:] > 0),
            alphas=values[..., 3],
            viewmats=viewmats.cpu().float(),
            Ks=Ks.cpu().float(),
            renderer=f"blender {result['version']} cycles {self._config.blender.look}",
        )
        if not self._config.outputs:
            return views
        unlit = dataclasses.replace(self._config.lighting, mode="unlit")
        geometry = RaycastRenderer(self._mesh, dataclasses.replace(self._config, lighting=unlit))
        found = geometry.render(viewmats, Ks, width, height)
        extra = {key: getattr(found, key) for key in self._config.outputs}
        return dataclasses.replace(views, **extra)

    def _job(self, folder: Path, viewmats: Tensor, Ks: Tensor, width: int, height: int) -> dict[str, Any]:
        mesh = self._mesh
        arrays: dict[str, Any] = {
            "vertices": mesh.vertices,
            "faces": mesh.faces,
            "material_ids": mesh.material_ids,
        }
        arrays |= {"viewmats": viewmats.cpu().double().numpy(), "Ks": Ks.cpu().double().numpy()}
        optional = {"normals": mesh.normals, "uvs": mesh.uvs, "colors": mesh.colors}
        optional["emissive_uvs"] = mesh.emissive_uvs
        materials = [_material(material, folder, i) for i, material in enumerate(mesh.materials)]
        if not self._config.smooth:
            optional["normals"] = None
        arrays |= {key: array for key, array in optional.items() if array is not None}
        np.savez(folder / "scene.npz", **arrays)
        return {
            "width": width,
            "height": height,
            "blender": dataclasses.asdict(self._config.blender),
            "has_colors": mesh.colors is not None,
            "lights": _lights(self._config.lighting),
            "materials": [{**m, "has_emissive_uvs": mesh.emissive_uvs is not None} for m in materials],
            "max_layers": self._config.max_layers,
        }


def _lights(config: LightingConfig) -> dict[str, Any]:
    """The studio in Blender's terms: radiance ``level + slope z`` of the world, and a sun."""
    base, slope = (1 + config.dome_ground) / 2, (1 - config.dome_ground) / 2
    scale = config.dome_intensity / (base + 2 / 3 * slope)
    return {
        "mode": config.mode,
        "dome_level": scale * base,
        "dome_slope": scale * slope,
        "key_strength": np.pi * config.key_intensity,
        "key_direction": list(config.key_direction),
        "key_angle": 2 * np.radians(config.key_angle),
        "shadows": config.shadows,
    }


def _material(material: Material, folder: Path, index: int) -> dict[str, Any]:
    values = {
        field.name: getattr(material, field.name)
        for field in dataclasses.fields(material)
        if not field.name.endswith("_texture")
    }
    for slot in ("base_color_texture", "emissive_texture"):
        values[slot] = _texture(getattr(material, slot), folder, f"{slot}_{index}.png")
    return values


def _texture(texture: Texture | None, folder: Path, name: str) -> dict[str, Any] | None:
    if texture is None:
        return None
    from PIL import Image

    Image.fromarray(texture.pixels, "RGBA").save(folder / name)
    return {"file": name, "wrap": texture.wrap[0], "filter": texture.mag_filter}


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGBA"), np.float32) / 255
