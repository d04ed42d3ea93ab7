"""The stages of the preparation. A stage turns one asset, and what earlier stages wrote about it, into
members.

    render    mesh          -> <set>_<i>.webp, <set>_<i>.depth.png, cameras.safetensors
    voxels    mesh          -> voxels_<R>.safetensors: coords uint8 [N, 3]
    features  views, voxels -> <name>.safetensors: feats float16 [N, C], num_views int16 [N]

A further stage (latents) is a class of the same shape and a line in :data:`STAGES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as save_tensors

from diff2to3.config import config_to_dict
from diff2to3.data.pictures import encode_depth, encode_image
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.schema import DataConfig, FeatureSetConfig
from diff2to3.data.shards import Part
from diff2to3.data.source import AssetSource
from diff2to3.data.store import StoredAsset
from diff2to3.errors import InputError
from diff2to3.voxels.aggregate import VoxelFeatures, lift, weigh_views


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
    """One step of the preparation, in one worker process.

    name      of its folder
    inputs    earlier stages it reads
    """

    name: str
    inputs: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """Everything that its bytes depend on, besides the source and its inputs. Cheap; loads no model."""
        ...

    def setup(self, slot: int) -> None:
        """Get ready in a worker (load models). Raises InputError when the run cannot work at all."""
        ...

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        """The members of one asset. Raises InputError with the reason when there can be none."""
        ...


class RenderStage:
    """All view sets of a mesh, with cameras drawn for this asset from the dataset's seed."""

    name = "render"
    inputs: tuple[str, ...] = ()

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.source = AssetSource(config)

    def settings(self) -> dict[str, Any]:
        whole = config_to_dict(self.config)
        chosen = {"version": 1, **{k: whole[k] for k in ("seed", "render", "view_sets")}}
        if self.config.render.renderer != "blender":
            del chosen["render"]["blender"]
        chosen["render"].pop("outputs")  # what is stored is decided by the view sets
        return chosen

    def setup(self, slot: int) -> None:
        if not self.config.view_sets:
            raise InputError("view_sets: the render stage needs at least one")
        len(self.source.catalogue)  # a source that cannot be read is no asset's fault

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        from diff2to3.views.cameras import generator_for, sample_cameras
        from diff2to3.views.render import make_renderer

        with clock("load"):
            mesh = self.source.load(asset.id)
        members: dict[str, bytes] = {}
        cameras: dict[str, torch.Tensor] = {}
        renderers: set[str] = set()
        depths = any(view_set.depths for view_set in self.config.view_sets.values())
        with clock("start renderer"):  # one for all sets: what light does to the mesh is worked out once
            renderer = make_renderer(mesh, replace(self.config.render, outputs=("depths",) if depths else ()))
        for name, view_set in self.config.view_sets.items():
            generator = generator_for(self.config.seed, asset.id, name)
            size = view_set.size
            viewmats, Ks = sample_cameras(view_set.cameras, size, size, generator)
            with clock(f"views {name}"):
                views = renderer.render(viewmats, Ks, size, size)
            renderers.add(views.renderer)
            with clock("encode"):
                for i in range(len(views)):
                    members[f"{name}_{i:03d}.webp"] = encode_image(views.images[i], views.alphas[i])
                    if view_set.depths and views.depths is not None:
                        members[f"{name}_{i:03d}.depth.png"] = encode_depth(views.depths[i], viewmats[i])
            cameras |= {f"{name}.viewmats": viewmats, f"{name}.Ks": Ks}
        members["cameras.safetensors"] = save_tensors(cameras)
        info = {
            "view_sets": {name: v.cameras.num_views for name, v in self.config.view_sets.items()},
            "faces": mesh.num_faces,
            "renderer": ", ".join(sorted(renderers)),
            "transform": [float(x) for x in mesh.transform.flatten()],
            "notes": list(mesh.notes),
        }
        return Part(members, info)


class VoxelStage:
    """The cells that the surface crosses, at every resolution asked for."""

    name = "voxels"
    inputs: tuple[str, ...] = ()

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.source = AssetSource(config)

    def settings(self) -> dict[str, Any]:
        return {"version": 1, "resolutions": list(self.config.resolutions)}

    def setup(self, slot: int) -> None:
        len(self.source.catalogue)  # a source that cannot be read is no asset's fault

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        from diff2to3.voxels.voxelise import voxelise

        with clock("load"):
            triangles = self.source.load(asset.id).triangles
        members, counts = {}, {}
        for resolution in self.config.resolutions:
            with clock(f"voxels {resolution}"):
                coords = torch.from_numpy(voxelise(triangles, resolution)).to(torch.uint8)
            counts[str(resolution)] = len(coords)
            members[f"voxels_{resolution}.safetensors"] = save_tensors({"coords": coords.contiguous()})
        return Part(members, {"num_voxels": counts})


class FeatureStage:
    """Image features lifted onto the voxels, one set after the other."""

    name = "features"
    inputs: tuple[str, ...] = ("render", "voxels")

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.providers: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        from diff2to3.voxels.providers import weights_fingerprint

        sets = config_to_dict(self.config)["features"]
        for name, chosen in sets.items():
            for key in ("device", "offline", "view_chunk"):  # where and how, not what
                del chosen[key]
            chosen["weights"] = weights_fingerprint(self.config.weights_of(name))
        return {"version": 1, "features": sets}

    def setup(self, slot: int) -> None:
        from diff2to3.voxels.providers import build_provider

        if not self.config.features:
            raise InputError("features: the features stage needs at least one set")
        for name, chosen in self.config.features.items():
            self.providers[name] = build_provider(
                chosen.provider,
                self.config.weights_of(name),
                device=_device(chosen.device, slot),
                dtype=getattr(torch, chosen.dtype),
                offline=chosen.offline,
                stride=chosen.stride,
            )

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Clock) -> Part:
        lifted: dict[str, VoxelFeatures] = {}
        for names in self._groups():
            lifted |= self._lift(names, inputs, clock)
        members = {}
        for name in self.config.features:
            feats, num_views = lifted[name].feats, lifted[name].num_views
            if not bool(torch.isfinite(feats).all()):
                raise InputError(f"features {name}: not finite")
            stored = {"feats": feats.to(torch.float16), "num_views": num_views.to(torch.int16)}
            members[f"{name}.safetensors"] = save_tensors(stored)
        resolutions = {name: chosen.resolution for name, chosen in self.config.features.items()}
        return Part(members, {"resolution": resolutions})

    def _groups(self) -> list[list[str]]:
        """Names of the sets that need the same images encoded in the same way."""
        groups: dict[FeatureSetConfig, list[str]] = {}
        for name, chosen in self.config.features.items():
            encoding = replace(
                chosen, resolution=0, mode="mean", depth_tolerance=0.0, weights=self.config.weights_of(name)
            )
            groups.setdefault(encoding, []).append(name)
        return list(groups.values())

    def _lift(
        self, names: list[str], inputs: Mapping[str, StoredAsset], clock: Clock
    ) -> dict[str, VoxelFeatures]:
        sets = [self.config.features[name] for name in names]
        first = sets[0]
        with clock("read"):
            depths = any(chosen.mode == "visible" for chosen in sets)
            views = inputs["render"].views(first.views, depths=depths)
            coords = [inputs["voxels"].coords(chosen.resolution) for chosen in sets]
        with clock(f"features {', '.join(names)}"):
            weightings = [
                weigh_views(views, c, chosen.resolution, chosen.mode, chosen.depth_tolerance)
                for c, chosen in zip(coords, sets, strict=True)
            ]
            feats = lift(views, self.providers[names[0]], weightings, first.background, first.view_chunk)
        return {
            name: VoxelFeatures(f, w.num_views) for name, f, w in zip(names, feats, weightings, strict=True)
        }


#: name -> class of (DataConfig)
STAGES: dict[str, Callable[[DataConfig], Stage]] = {
    "render": RenderStage,
    "voxels": VoxelStage,
    "features": FeatureStage,
}


def build_stages(config: DataConfig) -> list[Stage]:
    """The stages of ``config``, in order. Raises InputError for unknown names and inputs that come too
    late."""
    made: list[Stage] = []
    for name in config.stages:
        if name not in STAGES:
            raise InputError(f"stages: unknown stage {name!r}; known are {', '.join(STAGES)}")
        stage = STAGES[name](config)
        known = [s.name for s in made]
        for needed in stage.inputs:
            if needed not in known and not (Path(config.out) / needed / "settings.json").is_file():
                raise InputError(f"stages: {name} needs {needed}, before it or prepared earlier")
        made.append(stage)
    return made


def _device(name: str, slot: int) -> torch.device:
    """The device of worker ``slot``; several GPUs are dealt in turn."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device: cuda was asked for, and there is no GPU")
        return torch.device("cuda", slot % torch.cuda.device_count())
    return torch.device(name)
