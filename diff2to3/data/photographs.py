"""Photographs of assets as people take them, each with the occupancy of its own photo frame.

    photographs_<name>  mesh        -> NNN.webp, and NNN.safetensors: elevation, focal [1], transform [4, 4] (object
                                       frame -> photo frame), viewmat [4, 4] (object frame), depth float16
                                       [R, R] (NaN: nothing is seen), occupancy uint8 [R, R, R / 8]
    maps_<name>         photographs -> NNN.safetensors: fine, coarse float16, rgba uint8

Both are read one photograph at a time, so that a training step takes a random one of each asset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from diff2to3.config import config_to_dict
from diff2to3.data.encodings import BundleStage
from diff2to3.data.pictures import decode_image, encode_image
from diff2to3.data.shards import Part
from diff2to3.data.source import AssetSource
from diff2to3.errors import InputError

if TYPE_CHECKING:
    from diff2to3.data.plan import PlannedAsset
    from diff2to3.data.schema import DataConfig, PhotographConfig
    from diff2to3.data.store import StoredAsset
    from diff2to3.types import Mesh
    from diff2to3.views.photo_frame import Photograph


class PhotographStage:
    """Photographs, their cameras, and the occupancy that each should lead to."""

    inputs: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, item: str) -> None:
        self.config, self.item, self.name = config, item, f"photographs_{item}"
        self.chosen = config.photographs[item]
        self.source = AssetSource(config)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.photographs)

    def settings(self) -> dict[str, Any]:
        whole = config_to_dict(self.config)
        render = whole["render"]
        render.pop("outputs")
        render.pop("blender")
        chosen = whole["photographs"][self.item]
        return {"version": 1, "seed": self.config.seed, "render": render, "photographs": chosen}

    def setup(self, slot: int) -> None:
        if self.config.render.renderer != "raycast":
            raise InputError(
                "render.renderer: photographs vary the light, which renderer raycast alone can do"
            )
        len(self.source.catalogue)  # a source that cannot be read is no asset's fault

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        from diff2to3.views.cameras import generator_for
        from diff2to3.views.tracer import Camera, Frames, Tracer

        chosen, size = self.chosen, self.chosen.size
        with clock("load"):
            mesh = self.source.load(asset.id)
        generator = generator_for(self.config.seed, "photographs", asset.id, self.item)
        tracer = Tracer(mesh, replace(self.config.render, outputs=("depths",)))
        members: dict[str, bytes] = {}
        lost: list[float] = []
        for shot in take_photographs(mesh, chosen, generator):
            lighting = self.lighting(shot, generator)
            if lighting is not None and self.config.render.lighting.mode != "unlit":
                tracer.relight(lighting)
            frames = Frames(1, size, size, ("depths",))
            with clock("render"):
                K = shot.camera.K(size).numpy()
                tracer.render(Camera.of(shot.viewmat.numpy(), K, size, size), frames, 0)
            assert frames.depths is not None
            if not (frames.depths > 0).any():
                continue
            shot = shot.placed(frames.depths[0])
            with clock("voxelise"):
                found = photo_occupancy(mesh, shot, chosen.resolution)
            if found is None:
                continue
            grid, outside = found
            depth = surface_depth(torch.from_numpy(frames.depths[0]) * shot.scale, shot, chosen.resolution)
            number = f"{len(lost):03d}"
            with clock("encode"):
                members[f"{number}.webp"] = encode_image(
                    torch.from_numpy(frames.images[0]), torch.from_numpy(frames.alphas[0])
                )
            tensors = {
                "elevation": torch.tensor([math.radians(shot.camera.elevation)]),
                "focal": torch.tensor([shot.camera.focal]),
                "transform": torch.from_numpy(shot.transform),
                "viewmat": shot.viewmat,
                "depth": depth.half(),
                "occupancy": torch.from_numpy(np.packbits(grid, -1)),
                "lost": torch.tensor([outside]),
            }
            members[f"{number}.safetensors"] = save_tensors(tensors)
            lost.append(outside)
        if not lost:
            raise InputError("no photograph shows anything of it")
        return Part(members, {"num_views": len(lost), "lost": lost, "notes": list(mesh.notes)})

    def lighting(self, shot: Photograph, generator: np.random.Generator) -> Any:
        """The light of one photograph: the studio's, or a key light on the camera's side."""
        base = self.config.render.lighting
        if generator.random() < self.chosen.studio_share:
            return base
        eye = -shot.viewmat[:3, :3].T.numpy() @ shot.viewmat[:3, 3].numpy()
        angle = math.atan2(eye[1], eye[0]) + math.radians(generator.uniform(-110, 110))
        height = math.radians(generator.uniform(15, 80))
        key = float(generator.uniform(0.1, 0.6))
        direction = (
            math.cos(angle) * math.cos(height),
            math.sin(angle) * math.cos(height),
            math.sin(height),
        )
        dome = base.dome_intensity * (1.1 - key) / 0.75 * float(generator.uniform(0.8, 1.1))
        return replace(base, key_direction=direction, key_intensity=key, dome_intensity=dome)


def take_photographs(
    mesh: Mesh, config: PhotographConfig, generator: np.random.Generator
) -> list[Photograph]:
    """Cameras around ``mesh``; those that would stand inside the object are left out."""
    from diff2to3.views.photo_frame import photograph

    start, step, shots = generator.uniform(0, 360), 360 / config.num_views, []
    low, high = config.elevation_range
    for view in range(config.num_views):
        azimuth = start + step * (view + generator.uniform(-0.4, 0.4))
        uniform = generator.uniform(low, high)
        usual = float(np.clip(generator.normal(*config.usual_elevation), low, high))
        elevation = uniform if generator.random() < config.unusual_share else usual
        focal = float(np.exp(generator.uniform(*np.log(config.focal_range))))
        try:
            shots.append(photograph(mesh.vertices, azimuth, elevation, focal))
        except ValueError:
            continue
    return shots


def photo_occupancy(mesh: Mesh, shot: Photograph, resolution: int) -> tuple[np.ndarray, float] | None:
    """Voxels bool [R, R, R] of the photo frame that the surface crosses, and the share of them outside the cube.

    None where the surface reaches farther out than a grid of MAX_RESOLUTION cells: a long object that is seen along
    its length, of which the cube holds next to nothing.
    """
    from diff2to3.views.photo_frame import transformed
    from diff2to3.voxels.voxelise import MAX_RESOLUTION, voxelise

    triangles = transformed(mesh.triangles, shot.transform)
    # The surface may leave the cube, so it is voxelised in a larger one whose cells are the same.
    reach = float(np.abs(triangles).max())
    side = resolution + 2 * max(0, math.ceil(reach * resolution - resolution / 2))
    if side > MAX_RESOLUTION:
        return None
    cells = voxelise((triangles * (resolution / side)).astype(np.float32), side) - (side - resolution) // 2
    inside = ((cells >= 0) & (cells < resolution)).all(1)
    grid = np.zeros((resolution,) * 3, bool)
    grid[tuple(cells[inside].T)] = True
    return grid, float(1 - inside.mean()) if len(cells) else 0.0


def surface_depth(depths: Tensor, shot: Photograph, resolution: int) -> Tensor:
    """Depths [S, S] from the camera, in the photo frame's units → those of the nearest surface in each of R² squares of
    pixels, relative to the origin's: [R, R]; NaN where there is none.
    """
    far = torch.where(depths > 0, depths, torch.inf)
    nearest = -torch.nn.functional.max_pool2d(-far[None, None], depths.shape[0] // resolution)[0, 0]
    return torch.where(nearest.isfinite(), nearest - shot.camera.focal, torch.nan)


class MapStage(BundleStage):
    """The frozen image network's maps of photographs, and their pixels at a quarter of the side."""

    network_name = "photo_maps"

    def __init__(self, config: DataConfig, item: str) -> None:
        self.name, self.chosen = f"maps_{item}", config.maps[item]
        super().__init__(self.chosen.bundle)
        if self.chosen.photographs not in config.photographs:
            raise InputError(f"maps.{item}.photographs: no set {self.chosen.photographs!r}")
        self.inputs: tuple[str, ...] = (f"photographs_{self.chosen.photographs}",)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.maps)

    def settings(self) -> dict[str, Any]:
        return {
            "version": 1,
            "photographs": self.chosen.photographs,
            "background": self.chosen.background,
            "encoder": self.fingerprint(),
        }

    @torch.no_grad()
    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        from diff2to3.photo.maps import small_rgba, stacked_maps

        stored = inputs[self.inputs[0]]
        count = int(stored.info["num_views"])
        with clock("read"):
            pictures = [decode_image(stored.read(f"{i:03d}.webp")) for i in range(count)]
            images = torch.stack([image for image, _ in pictures])
            alphas = torch.stack([alpha for _, alpha in pictures])
        with clock("encode"):
            fine, coarse = stacked_maps(self.network, images, alphas, self.chosen.background)
            rgba = small_rgba(images, alphas)
        members = {}
        for i in range(count):
            tensors = {
                "fine": fine[i].half().contiguous(),
                "coarse": coarse[i].half().contiguous(),
                "rgba": (rgba[i] * 255).round().to(torch.uint8).contiguous(),
            }
            members[f"{i:03d}.safetensors"] = save_tensors(tensors)
        squares = [float(part.double().square().mean()) for part in (fine, coarse)]
        return Part(members, {"num_views": count, "squares": squares})
