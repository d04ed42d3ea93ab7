"""The stages of the preparation. A stage turns one asset, and what earlier stages wrote about it, into
members.

    views_<set>      mesh          -> 000.webp, 000.depth.png, ..., cameras.safetensors: viewmats, Ks
    voxels_<R>       mesh          -> coords.safetensors: coords uint8 [N, 3]
    points_<N>       mesh          -> points.safetensors: points float16 [N, 3], on the surface
    features_<name>  views, voxels -> <mode>.safetensors: feats float16 [N, C], num_views int16 [N]

Every view set, grid and feature set is a stage of its own, so that one can be added to a dataset, or dropped
by deleting its folder, without touching the others. A further kind is a class of the same shape and a line in
:data:`KINDS`. What trained encoders make of these (latents) is in encodings.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as save_tensors

from diff2to3.config import config_to_dict
from diff2to3.data.encodings import LatentStage, StructureStage, TokenStage
from diff2to3.data.photo_voxels import PhotoLatentStage, PhotoVoxelStage
from diff2to3.data.photographs import MapStage, PhotographStage
from diff2to3.data.pictures import encode_depth, encode_image
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.schema import DataConfig
from diff2to3.data.shards import Part
from diff2to3.data.source import AssetSource
from diff2to3.data.store import StoredAsset
from diff2to3.data.variants import is_variant
from diff2to3.errors import InputError
from diff2to3.machine import best_device
from diff2to3.voxels.providers import SURFACE


class Clock:
    """Seconds by name: ``with clock("load"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Stage(Protocol):
    """One step of the preparation; made once where the run is steered, and once in each worker.

    name      of its folder
    inputs    names of the earlier stages it reads
    """

    name: str
    inputs: tuple[str, ...]

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        """What a configuration has of this kind; the stages are called <kind>_<item>."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that its bytes depend on, besides the source and its inputs. Cheap; loads no model."""
        ...

    def setup(self, slot: int) -> None:
        """Get ready in a worker (load models). Raises InputError when the run cannot work at all."""
        ...

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        """The members of one asset. Raises InputError with the reason when there can be none."""
        ...


#: Less rounds to nothing in the stored pictures.
_LEAST_ALPHA = 0.5 / 255


class ViewStage:
    """One view set, with cameras drawn for each asset from (seed, asset id, name of the set)."""

    inputs: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, item: str) -> None:
        self.config, self.item, self.name = config, item, f"views_{item}"
        self.view_set = config.view_sets[item]
        self.source = AssetSource(config)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.view_sets)

    def settings(self) -> dict[str, Any]:
        whole = config_to_dict(self.config)
        render = whole["render"]
        render.pop("outputs")  # what is stored is decided by the view set
        if self.config.render.renderer != "blender":
            render.pop("blender")
        chosen = {"seed": self.config.seed, "render": render, "views": whole["view_sets"][self.item]}
        return {"version": 1, **chosen}

    def setup(self, slot: int) -> None:
        len(self.source.catalogue)  # a source that cannot be read is no asset's fault

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        from diff2to3.views.cameras import generator_for, sample_cameras
        from diff2to3.views.render import render_views

        with clock("load"):
            mesh = self.source.load(asset.id)
        size = self.view_set.size
        generator = generator_for(self.config.seed, asset.id, self.item)
        cameras = self.view_set.cameras
        if is_variant(asset.id):  # more shapes teach more than more views of one
            cameras = replace(cameras, num_views=max(1, cameras.num_views // 2))
        viewmats, Ks = sample_cameras(cameras, size, size, generator)
        config = replace(self.config.render, outputs=("depths",) if self.view_set.depths else ())
        with clock("render"):
            views = render_views(mesh, viewmats, Ks, size, size, config)
        if not bool((views.alphas > _LEAST_ALPHA).any()):
            raise InputError(f"nothing of it can be seen: all {len(views)} views are blank")
        members: dict[str, bytes] = {}
        with clock("encode"):
            for i in range(len(views)):
                members[f"{i:03d}.webp"] = encode_image(views.images[i], views.alphas[i])
                if self.view_set.depths and views.depths is not None:
                    members[f"{i:03d}.depth.png"] = encode_depth(views.depths[i], viewmats[i])
        members["cameras.safetensors"] = save_tensors({"viewmats": viewmats, "Ks": Ks})
        info = {
            "num_views": len(views),
            "faces": mesh.num_faces,
            "renderer": views.renderer,
            "transform": [float(x) for x in mesh.transform.flatten()],
            "notes": list(mesh.notes),
        }
        return Part(members, info)


class VoxelStage:
    """The cells of one grid that the surface crosses."""

    inputs: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, item: str) -> None:
        self.resolution, self.name = int(item), f"voxels_{item}"
        self.source = AssetSource(config)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return [str(resolution) for resolution in config.resolutions]

    def settings(self) -> dict[str, Any]:
        return {"version": 1, "resolution": self.resolution}

    def setup(self, slot: int) -> None:
        len(self.source.catalogue)

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        from diff2to3.voxels.voxelise import voxelise

        with clock("load"):
            triangles = self.source.load(asset.id).triangles
        with clock("voxelise"):
            coords = torch.from_numpy(voxelise(triangles, self.resolution))
        stored = coords.to(torch.uint8).contiguous()  # R is at most 256
        return Part({"coords.safetensors": save_tensors({"coords": stored})}, {"num_voxels": len(coords)})


class PointStage:
    """Points spread evenly over the surface, drawn for each asset from (seed, asset id)."""

    inputs: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, item: str) -> None:
        self.count, self.name, self.seed = int(item), f"points_{item}", config.seed
        self.source = AssetSource(config)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return [str(count) for count in config.points]

    def settings(self) -> dict[str, Any]:
        return {"version": 1, "seed": self.seed, "count": self.count}

    def setup(self, slot: int) -> None:
        len(self.source.catalogue)

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        from diff2to3.metrics.geometry import sample_surface
        from diff2to3.views.cameras import generator_for

        with clock("load"):
            mesh = self.source.load(asset.id)
        with clock("sample"):
            try:
                points = sample_surface(mesh, self.count, generator_for(self.seed, asset.id, "points"))
            except ValueError as error:
                raise InputError(str(error)) from error
        stored = points.half()  # 2e-4 of the asset's longest side
        return Part({"points.safetensors": save_tensors({"points": stored})}, {"num_points": len(points)})


class FeatureStage:
    """One feature set: a view set's image features lifted onto a grid, in each of its modes."""

    def __init__(self, config: DataConfig, item: str) -> None:
        self.config, self.item, self.name = config, item, f"features_{item}"
        self.chosen = config.features[item]
        self.inputs = (f"views_{self.chosen.views}", f"voxels_{self.chosen.resolution}")
        self.provider: Any = None

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.features)

    def settings(self) -> dict[str, Any]:
        from diff2to3.voxels.providers import weights_fingerprint

        chosen = config_to_dict(self.chosen)
        for key in ("device", "offline", "view_chunk"):  # where and how, not what
            del chosen[key]
        return {
            "version": 1,
            **chosen,
            "weights": weights_fingerprint(self.config.weights_of(self.item), self.chosen.provider),
        }

    def setup(self, slot: int) -> None:
        from diff2to3.voxels.providers import build_provider

        if self.chosen.provider == SURFACE:  # no network: pixels go straight to voxels
            return
        self.provider = build_provider(
            self.chosen.provider,
            self.config.weights_of(self.item),
            device=_device(self.chosen.device, slot),
            dtype=getattr(torch, self.chosen.dtype),
            offline=self.chosen.offline,
            stride=self.chosen.stride,
        )

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        from diff2to3.voxels.lift import lift_features

        chosen = self.chosen
        with clock("read"):
            views = inputs[self.inputs[0]].views(depths="visible" in chosen.modes)
            coords = inputs[self.inputs[1]].coords()
        with clock("lift"):
            lifted = lift_features(
                views,
                coords,
                chosen.resolution,
                self.provider,
                chosen.modes,
                depth_tolerance=chosen.depth_tolerance,
                background=chosen.background,
                view_chunk=chosen.view_chunk,
            )
        members = {}
        for mode, features in zip(chosen.modes, lifted, strict=True):
            if not bool(torch.isfinite(features.feats).all()):
                raise InputError("features are not finite")
            num_views = features.num_views.clamp(max=32767).to(torch.int16)
            stored = {"feats": features.feats.to(torch.float16), "num_views": num_views}
            members[f"{mode}.safetensors"] = save_tensors(stored)
        channels = int(lifted[0].feats.shape[1])
        return Part(members, {"resolution": chosen.resolution, "channels": channels, "modes": chosen.modes})


#: kind -> class of (DataConfig, item)
KINDS: dict[str, Any] = {
    "views": ViewStage,
    "voxels": VoxelStage,
    "points": PointStage,
    "features": FeatureStage,
    "latents": LatentStage,
    "structures": StructureStage,
    "tokens": TokenStage,
    "photographs": PhotographStage,
    "maps": MapStage,
    "photovoxels": PhotoVoxelStage,
    "photolatents": PhotoLatentStage,
}


def make_stage(config: DataConfig, name: str) -> Stage:
    """The stage called <kind>_<item>. Raises InputError when the configuration has no such thing."""
    kind, _, item = name.partition("_")
    if kind not in KINDS or item not in KINDS[kind].items(config):
        known = [f"{k}_{i}" for k in KINDS for i in KINDS[k].items(config)]
        raise InputError(f"stages: unknown stage {name!r}; known are {', '.join([*KINDS, *known])}")
    stage: Stage = KINDS[kind](config, item)
    return stage


def make_stages(config: DataConfig) -> list[Stage]:
    """The stages of ``config`` in order: all of a kind, or one by its full name. Raises InputError for
    unknown names and for inputs that come too late."""
    made: list[Stage] = []
    for entry in config.stages:
        names = [f"{entry}_{item}" for item in KINDS[entry].items(config)] if entry in KINDS else [entry]
        made += [make_stage(config, name) for name in names]
    for number, stage in enumerate(made):
        known = [earlier.name for earlier in made[:number]]
        for needed in stage.inputs:
            if needed not in known and not (Path(config.out) / needed / "settings.json").is_file():
                raise InputError(f"stages: {stage.name} needs {needed}, before it or prepared earlier")
    return made


def _device(name: str, slot: int) -> torch.device:
    """The device of worker ``slot``; several GPUs are dealt in turn."""
    if name == "auto":
        return best_device(slot, mps=False)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device: cuda was asked for, and there is no GPU")
        return torch.device("cuda", slot % torch.cuda.device_count())
    return torch.device(name)
