"""The stages that a trained bundle makes of the others: what flow models are trained on.

    latents_<name>     features, voxels -> latents.safetensors: mean, logvar float16 [N, C]
    structures_<name>  voxels           -> latents.safetensors: mean, logvar float16 [C, r, r, r]
    tokens_<name>      views            -> 000.safetensors, ...: latents float16 [C, h, w], one member a view (of the
                                           bundle's image_encoder)

Each notes the sums and squares of every channel, so that statistics over the dataset are at hand without
reading a shard. A bundle whose networks changed is another stage: give it another name, or delete the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from diff2to3.checkpoint import IMAGE_ENCODER, MODEL_FILE, NetworkEntry, read_bundle
from diff2to3.data.schema import DataConfig
from diff2to3.data.shards import Part
from diff2to3.errors import InputError
from diff2to3.files import file_sha256
from diff2to3.flow.framing import Framing, frame_views
from diff2to3.types import SparseVoxels, Views

if TYPE_CHECKING:
    from diff2to3.data.plan import PlannedAsset
    from diff2to3.data.store import StoredAsset

MEMBER = "latents.safetensors"


class BundleStage:
    """What the three share: one network of a bundle, in float32 on the CPU."""

    network_name = ""
    network: Any = None

    def __init__(self, bundle: str) -> None:
        self.folder = Path(bundle)

    def entry(self) -> NetworkEntry:
        info = read_bundle(self.folder)
        if self.network_name not in info.networks:
            raise InputError(f"{self.folder / MODEL_FILE}: no network {self.network_name!r}")
        return info.networks[self.network_name]

    def fingerprint(self) -> dict[str, Any]:
        """What the stage's bytes depend on in the bundle."""
        entry = self.entry()
        digest = entry.sha256 or file_sha256(self.folder / entry.file)
        return {"type": entry.type, "config": entry.config, "weights": digest}

    def setup(self, slot: int) -> None:
        # here, for it imports every network there is, which reading a data set need not wait for
        from diff2to3.networks import ENCODER_TYPES, frozen_network

        self.network = frozen_network(self.folder, self.network_name, self.entry(), ENCODER_TYPES)


class LatentStage(BundleStage):
    """Structured latents of the active voxels."""

    network_name = "encoder"

    def __init__(self, config: DataConfig, item: str) -> None:
        self.name, self.chosen = f"latents_{item}", config.latents[item]
        super().__init__(self.chosen.bundle)
        if not self.chosen.features:
            raise InputError(f"latents.{item}.features: name the feature sets that the encoder takes")
        self.sets = [name.partition(".") for name in self.chosen.features]
        resolutions = {config.features[s].resolution for s, _, _ in self.sets if s in config.features}
        unknown = [s for s, _, _ in self.sets if s not in config.features]
        if unknown or len(resolutions) != 1:
            raise InputError(
                f"latents.{item}.features: expected feature sets of one resolution, got {unknown or resolutions}"
            )
        self.resolution = resolutions.pop()
        features = dict.fromkeys(f"features_{s}" for s, _, _ in self.sets)
        self.inputs: tuple[str, ...] = (f"voxels_{self.resolution}", *features)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.latents)

    def settings(self) -> dict[str, Any]:
        return {
            "version": 1,
            "features": list(self.chosen.features),
            "resolution": self.resolution,
            "encoder": self.fingerprint(),
        }

    @torch.no_grad()
    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        with clock("read"):
            parts = []
            for name, _, mode in self.sets:
                stored = inputs[f"features_{name}"]
                parts.append(
                    stored.tensors(f"{mode or stored.info['modes'][0]}.safetensors")["feats"].float()
                )
            coords = inputs[f"voxels_{self.resolution}"].coords()
            packed = torch.nn.functional.pad(coords, (1, 0))
            voxels = SparseVoxels.from_coords(packed, torch.cat(parts, 1), self.resolution, 1)
        if voxels.feats.shape[1] != self.network.config.in_channels:
            raise InputError(
                f"features: {voxels.feats.shape[1]} channels, the encoder takes {self.network.config.in_channels}"
            )
        with clock("encode"):
            posterior = self.network(voxels)
        info = {"num_voxels": len(coords), "resolution": self.resolution, **moments(posterior.mean)}
        return Part({MEMBER: pack(mean=posterior.mean, logvar=posterior.logvar)}, info)


class StructureStage(BundleStage):
    """Latents of the occupancy grid."""

    network_name = "structure_encoder"

    def __init__(self, config: DataConfig, item: str) -> None:
        self.name, self.chosen = f"structures_{item}", config.structures[item]
        super().__init__(self.chosen.bundle)
        self.inputs = (f"voxels_{self.chosen.resolution}",)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.structures)

    def settings(self) -> dict[str, Any]:
        return {"version": 1, "resolution": self.chosen.resolution, "encoder": self.fingerprint()}

    @torch.no_grad()
    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        from diff2to3.data.store import occupancy

        coords = inputs[self.inputs[0]].coords()
        with clock("encode"):
            grid = occupancy(coords, self.chosen.resolution).float()
            posterior = self.network(grid[None, None])
        mean, logvar = posterior.mean[0], posterior.logvar[0]
        info = {"num_voxels": len(coords), "resolution": int(mean.shape[-1]), **moments(mean.flatten(1).T)}
        return Part({MEMBER: pack(mean=mean, logvar=logvar)}, info)


class TokenStage(BundleStage):
    """Image latents of the condition views."""

    network_name = IMAGE_ENCODER

    def __init__(self, config: DataConfig, item: str) -> None:
        self.name, self.chosen = f"tokens_{item}", config.tokens[item]
        super().__init__(self.chosen.bundle)
        views = self.chosen.views
        if views not in config.view_sets:
            raise InputError(f"tokens.{item}.views: no view set {views!r}")
        self.size = self.chosen.size or config.view_sets[views].size
        self.inputs = (f"views_{views}",)

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.tokens)

    def settings(self) -> dict[str, Any]:
        return {
            "version": 1,
            "views": self.chosen.views,
            "num_views": self.chosen.num_views,
            "margin": self.chosen.margin,
            "size": self.size,
            "background": self.chosen.background,
            "encoder": self.fingerprint(),
        }

    @torch.no_grad()
    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        stored = inputs[self.inputs[0]]
        total = int(stored.info["num_views"])
        with clock("read"):
            views = stored.views(range(min(total, self.chosen.num_views or total)))
        with clock("encode"):
            images = self.pictures(views)
            latents = torch.cat([self.network(image) for image in images.split(8)])
        members = {f"{i:03d}.safetensors": pack(latents=latent) for i, latent in enumerate(latents)}
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        return Part(members, {"num_views": len(views), **moments(rows)})

    def pictures(self, views: Views) -> Tensor:
        """[V, 3, size, size] as the encoder sees them."""
        if self.chosen.margin is None:
            return views.composite(self.chosen.background).permute(0, 3, 1, 2)
        framing = Framing(self.size, self.chosen.margin, self.chosen.background)
        return frame_views(views.images, views.alphas, framing)


def pack(**tensors: Tensor) -> bytes:
    """A safetensors member in float16."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} is not finite")
    return save_tensors({name: value.to(torch.float16).contiguous() for name, value in tensors.items()})


def moments(rows: Tensor) -> dict[str, Any]:
    """[N, C] → how many, and the sum and sum of squares of every channel."""
    precise = rows.double()
    sums, squares = precise.sum(0), precise.square().sum(0)
    return {"count": len(rows), "sum": sums.tolist(), "squares": squares.tolist()}


def statistics(infos: list[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of every channel, from what the stages noted about assets."""
    if not infos:
        raise InputError("statistics: no asset")
    count = sum(int(info["count"]) for info in infos)
    mean = torch.tensor([info["sum"] for info in infos], dtype=torch.float64).sum(0) / count
    squares = torch.tensor([info["squares"] for info in infos], dtype=torch.float64).sum(0) / count
    std = (squares - mean.square()).clamp(min=1e-12).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist()}
