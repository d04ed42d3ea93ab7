"""Training stage 2 in the photo frame: SMDiT as a flow on the latents of a photograph's voxels, which also sees what
the photograph says of each voxel.

batch.tensors (photolatents) ─▶ latents z_0 on voxels, some left out ─▶ z_t ─┐
      image, fine, coarse, rgba ─▶ image tokens ─────────────────────────────┼─ LatentSMDiT ─▶ v ↔ ε - z_0
                                └▶ lifted at a camera that is a little wrong ┘
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.checkpoint import IMAGE_ENCODER, BundleInfo, NetworkEntry, read_bundle, save_bundle
from diff2to3.config import MISSING, config_to_dict
from diff2to3.data.encodings import statistics
from diff2to3.data.loader import LoaderConfig, TrainLoader
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.flow.config import LatentSMDiTConfig
from diff2to3.flow.matching import noised, squared_error, target_velocity
from diff2to3.flow.normalization import Normalization, Statistics
from diff2to3.flow.smdit import LatentSMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.tensors import half_tensors, read_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.photo_frame import Draws, ShownConfig, shown_cameras, shown_photos, shown_times
from diff2to3.types import SparseVoxels
from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.voxels.lift_photo import lift_photo

#: What a batch has of each photograph, the key of its statistics in a bundle.
NORMALISED = {"mean": "latents", "image": "image_latents", "fine": "fine_maps", "coarse": "coarse_maps"}
#: Times at which validation measures the loss.
VALIDATION_TIMES = (1.0, 0.7, 0.4)
#: Fewer voxels than these are not left by a hole.
LEAST_VOXELS = 30


@dataclass(frozen=True)
class PhotoLatentDataConfig:
    """Where the latents are, and how they are varied.

    root          a prepared dataset
    photolatents  name of the set
    bundle        folder of the bundle whose networks made it
    holes         share of the items that some voxels are taken out of, as stage 1 misses some
    validation_assets  how many of split ``val`` validation takes
    """

    root: str = MISSING
    photolatents: str = "photo"
    bundle: str = "diff2to3/bundles/mini-photo"
    holes: float = 0.3
    validation_assets: int = 32
    loader: LoaderConfig = field(
        default_factory=lambda: LoaderConfig(
            max_assets_per_batch=8, max_voxels_per_batch=100_000_000, num_workers=1
        )
    )


@dataclass(frozen=True)
class PhotoLatentLossConfig(ShownConfig):
    """What the flow is shown."""

    time_mean: float = 0.6
    pure_noise: float = 0.12
    pure_from: float = 0.96
    exact_camera: float = 0.25


@dataclass(frozen=True)
class PhotoLatentRunConfig:
    """A run of train/photo_latents.py."""

    data: PhotoLatentDataConfig = field(default_factory=PhotoLatentDataConfig)
    model: LatentSMDiTConfig = field(default_factory=LatentSMDiTConfig)
    loss: PhotoLatentLossConfig = field(default_factory=PhotoLatentLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class PhotoLatentObjective(nn.Module):
    """The network, by its name in a bundle, and its loss. forward(batch, randomness) → losses by name, each [B]."""

    def __init__(self, config: PhotoLatentRunConfig, known: dict[str, Statistics]) -> None:
        super().__init__()
        self.config = config
        self.member = f"photolatents_{config.data.photolatents}/*.safetensors"
        self.latent_flow = LatentSMDiT(config.model)
        self.normalizations = nn.ModuleDict({name: Normalization(values) for name, values in known.items()})

    def adopt(self, settings: dict[str, Any]) -> None:
        """Normalise as a bundle's network was trained with."""
        for name, own in self.normalizations.items():
            own.load_state_dict(Normalization(settings[name]).state_dict())

    def forward(self, batch: Any, randomness: Randomness) -> dict[str, Tensor]:
        loss, items = self.config.loss, batch.tensors[self.member]
        draw = Draws(randomness, batch.ids, next(self.parameters()).device)
        chosen = [
            self.varied(item, draw.generator(i, "holes")) for i, item in zip(batch.ids, items, strict=True)
        ]
        true = (torch.cat([item[name] for item in items]).to(draw.device) for name in ("elevation", "focal"))
        cameras = cameras_of(*shown_cameras(loss, draw, *true))
        latents, image, lifted = self.inputs(chosen, cameras, shown_photos(loss, draw))
        noise = draw.rows("noise", [len(item["coords"]) for item in chosen], latents.feats.shape[1])
        return {"loss": self.errors(latents, image, lifted, shown_times(loss, draw), noise)}

    def errors(
        self, latents: SparseVoxels, image: ImageTokens, lifted: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """‖v − u‖² · ((1 − t)² + t²) of every item [B]. The weight makes errors of what the network adds to the best
        linear guess (diff2to3.flow.matching.precondition) count alike at all times."""
        t = t.to(noise)
        rows = torch.repeat_interleave(t, latents.cu_seqlens.diff().long())[:, None]
        noisy = latents.with_feats(noised(latents.feats, noise, rows))
        velocity = self.latent_flow(noisy, t, image, lifted=lifted)
        error = squared_error(velocity, target_velocity(latents.feats, noise), latents.cu_seqlens)
        return error * ((1 - t).square() + t.square())

    def inputs(
        self, items: Sequence[dict[str, Tensor]], cameras: Sequence[PhotoCamera], kept: Tensor
    ) -> tuple[SparseVoxels, ImageTokens, Tensor]:
        """Latents, image tokens and lifted features of a batch; nothing of the photo where ``kept`` [B] is false."""
        model, device = self.config.model, next(self.parameters()).device
        coords, feats, maps, lifted = [], [], [], []
        for b, item in enumerate(items):
            coords.append(F.pad(item["coords"].int(), (1, 0), value=b).to(device))
            feats.append(self.normalised(item["mean"].to(device), "latents"))
            image, fine, coarse = (
                self.normalised(item[name].to(device), NORMALISED[name])
                for name in ("image", "fine", "coarse")
            )
            maps.append(torch.cat([F.pixel_unshuffle(image, 2), coarse]))
            if not bool(kept[b]):
                lifted.append(feats[-1].new_zeros(len(feats[-1]), model.lifted_channels))
                continue
            rgba = item["rgba"].to(device).float() / 255
            rgb = (rgba[:3] / rgba[3:].clamp(min=1 / 255)).clamp(0, 1).permute(1, 2, 0)
            lifted.append(
                lift_photo((image, fine), rgba[3], rgb, cameras[b], coords[-1][:, 1:], model.resolution)
            )
        tokens = ImageTokens.from_latents(torch.stack(maps), model.image_patch_size)
        if not bool(kept.all()):
            tokens = tokens.drop(~kept)
        latents = SparseVoxels.from_coords(torch.cat(coords), torch.cat(feats), model.resolution, len(items))
        return latents, tokens, torch.cat(lifted)

    def normalised(self, values: Tensor, name: str) -> Tensor:
        """Rows [N, C] or a map [C, h, w] of about unit variance, float32."""
        normal: Tensor = self.normalizations[name](values.float(), 1 if values.ndim == 2 else 0)
        return normal

    def varied(self, item: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Without some of the voxels: all in a ball, or some here and there."""
        holes, ball, radius, where = torch.rand(4, generator=generator).tolist()
        coords = item["coords"].float()
        if holes >= self.config.data.holes:
            return item
        if ball < 0.7:
            centre = coords[min(int(where * len(coords)), len(coords) - 1)]
            kept = (coords - centre).norm(dim=1) >= 2 + 5 * radius
        else:
            kept = (torch.rand(len(coords), generator=generator) > 0.15).to(coords.device)
        if int(kept.sum()) < LEAST_VOXELS:
            return item
        return {**item, "coords": item["coords"][kept], "mean": item["mean"][kept]}


def cameras_of(elevations: Tensor, focals: Tensor) -> list[PhotoCamera]:
    """Of B photographs; radians and crop sides [B]."""
    pairs = zip(elevations.tolist(), focals.tolist(), strict=True)
    return [PhotoCamera(math.degrees(elevation), focal) for elevation, focal in pairs]


class PhotoLatentTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: PhotoLatentRunConfig) -> None:
        self.config = config
        self.stage = f"photolatents_{config.data.photolatents}"

    def objective(self) -> PhotoLatentObjective:
        return PhotoLatentObjective(self.config, self.statistics())

    def statistics(self) -> dict[str, Statistics]:
        """Mean and deviation of every channel over the training split, by their keys in a bundle."""
        store = AssetStore(self.config.data.root, [self.stage])
        assets = store.assets("train")
        if not assets:
            raise InputError(f"{store.root}: no asset of split 'train' has {self.stage}")
        infos = [store.info(asset, self.stage) for asset in assets]
        return {key: statistics([info[name] for info in infos]) for name, key in NORMALISED.items()}

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        network: Any = objective.latent_flow
        return [*network.double_blocks, *network.single_blocks]

    def loader(self, seed: int, rank: int, world_size: int) -> TrainLoader:
        data = self.config.data
        chosen = replace(data.loader, tensors=[f"{self.stage}/*.safetensors"])
        return TrainLoader(data.root, chosen, seed=seed, rank=rank, world_size=world_size)

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def validate(self, objective: nn.Module) -> dict[str, float]:
        """The loss at fixed times and noise, at the true cameras."""
        assert isinstance(objective, PhotoLatentObjective)
        store = AssetStore(self.config.data.root, [self.stage])
        assets = store.assets("val")
        count = min(self.config.data.validation_assets, len(assets))
        found: dict[str, list[float]] = {}
        for i in range(count):
            stored = store.open(assets[i * len(assets) // count], self.stage)
            item = stored.tensors(sorted(stored.entry.members)[0])
            cameras = cameras_of(item["elevation"], item["focal"])
            latents, image, lifted = objective.inputs([item], cameras, torch.ones(1, dtype=torch.bool))
            noise = torch.randn(latents.feats.shape, generator=torch.Generator().manual_seed(i))
            for t in VALIDATION_TIMES:
                error = objective.errors(latents, image, lifted, torch.tensor([t]), noise.to(latents.feats))
                found.setdefault(f"loss_{t}", []).append(float(error))
        return {name: sum(values) / len(values) for name, values in found.items()}

    def export(self, objective: nn.Module, folder: Path) -> None:
        """The network in float16, the image encoder, and the statistics that normalise what goes in."""
        assert isinstance(objective, PhotoLatentObjective)
        place = Path(self.config.data.bundle)
        info = read_bundle(place)
        if IMAGE_ENCODER not in info.networks:
            raise InputError(f"{place}: no network {IMAGE_ENCODER!r}, of which the image latents were made")
        entry = info.networks[IMAGE_ENCODER]
        networks = {
            "latent_flow": NetworkEntry(
                "LatentSMDiT", config_to_dict(objective.latent_flow.config), "latent_flow.safetensors"
            ),
            IMAGE_ENCODER: replace(entry, file=f"{IMAGE_ENCODER}.safetensors"),
        }
        tensors = {
            "latent_flow": half_tensors(objective.latent_flow.state_dict(), "latent_flow"),
            IMAGE_ENCODER: read_tensors(place / entry.file),
        }
        known: Any = objective.normalizations
        settings = {"frame": "photo", **{name: own.statistics() for name, own in known.items()}}
        save_bundle(folder, BundleInfo("flow", networks, settings, license="MIT"), tensors)
