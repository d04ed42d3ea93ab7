"""Training stage 1 in the photo frame: the photo encoder with its camera, and the occupancy flow, together.

maps of a photograph ─▶ PhotoEncoder ─▶ features, lifted at a camera ─▶ OccupancyFlow ↔ occupancy of its photo frame
                             ├─▶ depth ↔ rendered depth
                             └─▶ camera ↔ true camera
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, read_bundle, save_bundle
from diff2to3.config import MISSING
from diff2to3.data.loader import LoaderConfig, TrainLoader
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.flow.matching import noised
from diff2to3.photo.encoder import PhotoEncoder, PhotoEncoderConfig, PhotoMaps, camera_loss, depth_loss
from diff2to3.photo.occupancy import OccupancyFlow, OccupancyFlowConfig
from diff2to3.tensors import half_tensors, read_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.photo_frame import Draws, ShownConfig, shown_cameras, shown_photos, shown_times
from diff2to3.training.tasks.vae_objective import sum_weighted

#: Probabilities above which a voxel counts as occupied when validation measures what one step from noise gives.
THRESHOLD = 0.35


@dataclass(frozen=True)
class OccupancyDataConfig:
    """Where photographs are, and how they are varied.

    root          a prepared dataset
    photographs   name of the set: stages photographs_<name> and maps_<name>
    bundle        folder of the bundle with the network ``photo_maps`` that made the maps; exported with the model
    most_lost     views of which more than this share of the voxels lie outside the cube are left out of the loss
    mirror        mirror a random half of the photographs
    color         largest change of a colour channel's gain
    gain          deviation of the log of the maps' gain
    validation_assets  how many of split ``val`` validation takes
    """

    root: str = MISSING
    photographs: str = "photo"
    bundle: str = "diff2to3/bundles/mini-photo"
    most_lost: float = 0.05
    mirror: bool = True
    color: float = 0.3
    gain: float = 0.15
    validation_assets: int = 64
    loader: LoaderConfig = field(
        default_factory=lambda: LoaderConfig(
            max_assets_per_batch=16, max_voxels_per_batch=100_000_000, num_workers=1
        )
    )


@dataclass(frozen=True)
class OccupancyLossConfig(ShownConfig):
    """Weights of the losses, and what the flow is shown.

    occupancy       cross-entropy of the occupancy, a voxel
    depth, camera   of the photo encoder
    predicted       share of the items lifted at the predicted camera, after a quarter of the steps
    """

    occupancy: float = 20.0
    depth: float = 0.25
    camera: float = 0.2
    predicted: float = 0.5


@dataclass(frozen=True)
class OccupancyRunConfig:
    """A run of train/occupancy.py."""

    data: OccupancyDataConfig = field(default_factory=OccupancyDataConfig)
    encoder: PhotoEncoderConfig = field(default_factory=PhotoEncoderConfig)
    flow: OccupancyFlowConfig = field(default_factory=OccupancyFlowConfig)
    loss: OccupancyLossConfig = field(default_factory=OccupancyLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        encoder, flow = self.encoder, self.flow
        for name, gives, takes in (
            ("plane_channels", encoder.plane_channels, flow.plane_channels),
            ("frustum_channels", encoder.frustum_channels, flow.frustum_channels),
            ("token_channels", encoder.widths[-1], flow.token_channels),
        ):
            if gives != takes:
                raise ValueError(f"flow.{name}: takes {takes} channels, the encoder gives {gives}")


@dataclass(frozen=True)
class Photographs:
    """A batch of photographs with what is true of them.

    maps        see :class:`PhotoMaps`
    occupancy   [B, 1, R, R, R], 0 or 1
    depth       [B, r, r], NaN where nothing is seen
    elevations, focals  radians and crop sides [B]
    weights     [B]: 0 for those that do not fit the cube
    """

    maps: PhotoMaps
    occupancy: Tensor
    depth: Tensor
    elevations: Tensor
    focals: Tensor
    weights: Tensor

    @staticmethod
    def of(
        photos: list[dict[str, Tensor]],
        maps: list[dict[str, Tensor]],
        deviations: Tensor,
        most_lost: float = 1.0,
    ) -> Photographs:
        """From the stored members of B photographs; ``deviations`` [2] of the fine and coarse maps."""

        def stack(items: list[dict[str, Tensor]], name: str) -> Tensor:
            parts = [item[name] for item in items]
            # float16 cannot be stacked under bfloat16 autocast on a CPU
            parts = [part.float() if part.dtype == torch.float16 else part for part in parts]
            return torch.stack(parts).to(deviations.device)

        packed = stack(photos, "occupancy").cpu().numpy()
        return Photographs(
            PhotoMaps(
                stack(maps, "fine") / deviations[0],
                stack(maps, "coarse") / deviations[1],
                stack(maps, "rgba").float() / 255,
            ),
            torch.from_numpy(np.unpackbits(packed, axis=-1)).float()[:, None].to(deviations.device),
            stack(photos, "depth"),
            stack(photos, "elevation")[:, 0],
            stack(photos, "focal")[:, 0],
            (stack(photos, "lost")[:, 0] <= most_lost).float(),
        )

    def mirrored(self, which: Tensor) -> Photographs:
        """Those that ``which`` bool [B] says in a mirror: x of the frame and of the pictures is turned around."""

        def choose(mirror: Tensor, plain: Tensor) -> Tensor:
            return torch.where(which.view(-1, *[1] * (plain.ndim - 1)), mirror, plain)

        m, other = self.maps, self.maps.mirrored()
        maps = PhotoMaps(
            choose(other.fine, m.fine), choose(other.coarse, m.coarse), choose(other.rgba, m.rgba)
        )
        occupancy = choose(self.occupancy.flip(2), self.occupancy)
        return replace(self, maps=maps, occupancy=occupancy, depth=choose(self.depth.flip(-1), self.depth))


class OccupancyObjective(nn.Module):
    """Both networks, named as in bundles, and the loss. forward(batch, randomness) → losses by name, each [B]."""

    deviations: Tensor

    def __init__(self, config: OccupancyRunConfig, deviations: Tensor) -> None:
        super().__init__()
        self.photo_encoder, self.occupancy_flow = PhotoEncoder(config.encoder), OccupancyFlow(config.flow)
        self.photo_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.occupancy_flow.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.config = config
        self.register_buffer("deviations", deviations)

    def adopt(self, settings: dict[str, Any]) -> None:
        """Divide maps by what a bundle's networks were trained with."""
        self.deviations.copy_(torch.tensor(settings["map_deviations"]))

    def forward(self, batch: Any, randomness: Randomness) -> dict[str, Tensor]:
        data, loss = self.config.data, self.config.loss
        photos, maps = (batch.tensors[name] for name in members(data.photographs))
        shots = Photographs.of(photos, maps, self.deviations, data.most_lost)
        draw = Draws(randomness, batch.ids, self.deviations.device)
        shots = self.varied(shots, draw)
        features = self.photo_encoder(shots.maps)
        elevations, focals = self.cameras(shots, features, draw, randomness.step)
        lifted = self.occupancy_flow.lift(features, shots.maps.rgba, elevations, focals)
        time = shown_times(loss, draw)
        noise = draw.normal("noise", *shots.occupancy.shape[1:])
        noisy = noised(2 * shots.occupancy - 1, noise, time.view(-1, 1, 1, 1, 1))
        logits = self.occupancy_flow(noisy, time, lifted.kept(shown_photos(loss, draw)))
        entropy = F.binary_cross_entropy_with_logits(logits, shots.occupancy, reduction="none")
        out = {
            "occupancy": entropy.mean((1, 2, 3, 4)) * shots.weights,
            "depth": depth_loss(features, shots.depth),
            "camera": camera_loss(features, shots.elevations, shots.focals),
        }
        return {"loss": sum_weighted(out, loss), **out}

    def varied(self, shots: Photographs, draw: Draws) -> Photographs:
        """Mirrored, with other colours and other gains of the maps."""
        data = self.config.data
        if data.mirror:
            shots = shots.mirrored(draw.uniform("mirror") < 0.5)
        maps = shots.maps
        gains = 1 + data.color * (2 * draw.uniform("color", 3) - 1)
        colors = (maps.rgba[:, :3] * gains[:, :, None, None]).clamp(0, 1)
        louder = torch.exp(data.gain * draw.normal("gain"))[:, None, None, None]
        rgba = torch.cat([colors, maps.rgba[:, 3:]], 1)
        return replace(shots, maps=PhotoMaps(maps.fine * louder, maps.coarse * louder, rgba))

    def cameras(self, shots: Photographs, features: Any, draw: Draws, step: int) -> tuple[Tensor, Tensor]:
        """What features are lifted at: the true camera, a noisy one, or the predicted one."""
        loss = self.config.loss
        elevations, focals = shown_cameras(loss, draw, shots.elevations, shots.focals)
        if step >= self.config.train.steps / 4:
            predicted = draw.uniform("predicted") < loss.predicted
            elevations = torch.where(predicted, features.elevations().detach(), elevations)
            focals = torch.where(predicted, features.focals().detach(), focals)
        return elevations, focals


def members(photographs: str) -> tuple[str, str]:
    """What a loader reads: a random photograph of each asset, and its maps."""
    return f"photographs_{photographs}/*.safetensors", f"maps_{photographs}/*.safetensors"


class OccupancyTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: OccupancyRunConfig) -> None:
        self.config = config

    def objective(self) -> OccupancyObjective:
        return OccupancyObjective(self.config, self.deviations())

    def deviations(self) -> Tensor:
        """Of the fine and coarse maps over the training split [2]."""
        stage = f"maps_{self.config.data.photographs}"
        store = AssetStore(self.config.data.root, [stage])
        squares = [store.info(asset, stage)["squares"] for asset in store.assets("train")]
        if not squares:
            raise InputError(f"{store.root}: no asset of split 'train' has {stage}")
        return torch.tensor(squares).mean(0).sqrt()

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        encoder: Any = objective.photo_encoder
        flow: Any = objective.occupancy_flow
        planes = (
            encoder.fine_down, encoder.half_down, encoder.quarter_blocks, encoder.token_blocks, encoder.half_up,
            encoder.fine_up,
        )  # fmt: skip
        volumes = (flow.fine_down, flow.coarse_blocks, flow.token_blocks, flow.fine_up)
        return [block for group in (*planes, *volumes) for block in group]

    def loader(self, seed: int, rank: int, world_size: int) -> TrainLoader:
        data = self.config.data
        chosen = replace(data.loader, tensors=list(members(data.photographs)))
        return TrainLoader(data.root, chosen, seed=seed, rank=rank, world_size=world_size)

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        """Voxels of photographs seen along y (as in the photo), x and z: the true ones above, what is found below."""
        shots = self.validation(objective, 8)
        likely = one_step(objective, shots)
        rows = []
        for grid in (shots.occupancy, likely):
            flat = grid[:, 0]
            seen = [flat.amax(axis).transpose(1, 2).flip(1) for axis in (2, 1, 3)]
            rows.append(torch.cat([torch.cat(list(view), 1) for view in seen], 0))
        return {"occupancy": torch.cat(rows, 0)[..., None].expand(-1, -1, 3)}

    @torch.no_grad()
    def validate(self, objective: nn.Module) -> dict[str, float]:
        """IoU of one step from noise at the predicted camera, and the camera's median error in degrees and in log."""
        module: Any = objective
        shots = self.validation(objective, self.config.data.validation_assets)
        likely = one_step(objective, shots) > THRESHOLD
        true = shots.occupancy > 0.5
        both, either = (likely & true).flatten(1).sum(1), (likely | true).flatten(1).sum(1)
        features = module.photo_encoder(shots.maps)
        return {
            "iou": float((both / either.clamp(min=1)).mean()),
            "elevation_error": float((features.elevations() - shots.elevations).abs().rad2deg().median()),
            "focal_error": float((features.focals().log() - shots.focals.log()).abs().median()),
        }

    def validation(self, objective: nn.Module, count: int) -> Photographs:
        """The first photograph of ``count`` assets of split ``val``, spread evenly over it."""
        data = self.config.data
        stages = [name.partition("/")[0] for name in members(data.photographs)]
        store = AssetStore(data.root, stages)
        assets = store.assets("val")
        if not assets:
            raise InputError(f"{data.root}: no asset of split 'val' has photographs")
        chosen = [assets[i * len(assets) // min(count, len(assets))] for i in range(min(count, len(assets)))]
        parts = [
            [store.open(asset, stage).tensors("000.safetensors") for asset in chosen] for stage in stages
        ]
        module: Any = objective
        return Photographs.of(parts[0], parts[1], module.deviations)

    def export(self, objective: nn.Module, folder: Path) -> None:
        """Both networks in float16, the frozen map network, and what sampling needs to know."""
        module: Any = objective
        data = self.config.data
        source = read_bundle(Path(data.bundle))
        if "photo_maps" not in source.networks:
            raise InputError(f"{data.bundle}: no network 'photo_maps', of which the maps were made")
        entry = source.networks["photo_maps"]
        tensors = {"photo_maps": read_tensors(Path(data.bundle) / entry.file)}
        networks = {"photo_maps": replace(entry, file="photo_maps.safetensors")}
        for name, network in (
            ("photo_encoder", module.photo_encoder),
            ("occupancy_flow", module.occupancy_flow),
        ):
            networks[name] = NetworkEntry(
                type(network).__name__, asdict(network.config), f"{name}.safetensors"
            )
            tensors[name] = half_tensors(network.state_dict(), name)
        settings = {"frame": "photo", "map_deviations": [float(value) for value in module.deviations]}
        save_bundle(
            folder, BundleInfo("occupancy", networks, settings, license="MIT AND Apache-2.0"), tensors
        )


@torch.no_grad()
def one_step(objective: nn.Module, shots: Photographs) -> Tensor:
    """Probabilities of occupancy [B, 1, R, R, R] from pure noise at the predicted camera, an item at a time."""
    module: Any = objective
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(len(shots.focals)):
        maps = PhotoMaps(*(part[i : i + 1] for part in (shots.maps.fine, shots.maps.coarse, shots.maps.rgba)))
        features = module.photo_encoder(maps)
        lifted = module.occupancy_flow.lift(features, maps.rgba, features.elevations(), features.focals())
        noise = torch.randn(shots.occupancy[i : i + 1].shape, generator=generator).to(maps.rgba)
        found.append(module.occupancy_flow(noise, torch.ones(1, device=noise.device), lifted).sigmoid())
    return torch.cat(found)
