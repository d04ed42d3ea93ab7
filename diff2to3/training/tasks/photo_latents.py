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
from diff2to3.flow.smdit import LatentSMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.tensors import half_tensors, read_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.types import SparseVoxels
from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.voxels.lift_photo import lift_photo

#: What a batch has of each photograph, the key of its statistics in a bundle.
NORMALISED = {"mean": "latents", "image": "image_latents", "fine": "fine_maps", "coarse": "coarse_maps"}
#: Times at which validation measures the loss.
VALIDATION_TIMES = (1.0, 0.7, 0.4)
LEAST_FOCAL, LEAST_VOXELS = 0.6, 30


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
class PhotoLatentLossConfig:
    """What the flow is shown.

    time_mean, time_std  logit-normal times (P3.3)
    pure_noise           share of the items at times between 0.96 and 1, where a sampler starts
    dropout              share of the items without their photo, for guidance
    elevation_noise, focal_noise  deviations of the camera that features are lifted at: degrees, log
    exact_camera         share of the items without that noise
    """

    time_mean: float = 0.6
    time_std: float = 1.2
    pure_noise: float = 0.12
    dropout: float = 0.1
    elevation_noise: float = 4.0
    focal_noise: float = 0.15
    exact_camera: float = 0.25


@dataclass(frozen=True)
class PhotoLatentRunConfig:
    """A run of train/photo_latents.py."""

    data: PhotoLatentDataConfig = field(default_factory=PhotoLatentDataConfig)
    model: LatentSMDiTConfig = field(default_factory=LatentSMDiTConfig)
    loss: PhotoLatentLossConfig = field(default_factory=PhotoLatentLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class PhotoLatentObjective(nn.Module):
    """The network and its loss. forward(batch, randomness) → losses by name, each [B]."""

    def __init__(self, config: PhotoLatentRunConfig, known: dict[str, dict[str, list[float]]]) -> None:
        super().__init__()
        self.config, self.known = config, known
        self.member = f"photolatents_{config.data.photolatents}/*.safetensors"
        self.network = LatentSMDiT(config.model)
        for name, values in known.items():
            for key in ("mean", "std"):
                self.register_buffer(f"{name}_{key}", torch.tensor(values[key]), persistent=False)

    def forward(self, batch: Any, randomness: Randomness) -> dict[str, Tensor]:
        loss, items = self.config.loss, batch.tensors[self.member]
        generators = [randomness.generator(i) for i in batch.ids]
        chosen = [self.varied(item, g) for item, g in zip(items, generators, strict=True)]
        cameras = [self.camera(item, g) for item, g in zip(items, generators, strict=True)]
        draws = torch.stack([torch.rand(3, generator=g) for g in generators])
        normal = torch.stack([torch.randn((), generator=g) for g in generators])
        t = torch.sigmoid(loss.time_mean + loss.time_std * normal)
        t = torch.where(draws[:, 0] < loss.pure_noise, 1 - 0.04 * draws[:, 1], t)
        latents, image, lifted = self.inputs(chosen, cameras, draws[:, 2] >= loss.dropout)
        noise = torch.cat([torch.randn(len(i["coords"]), latents.feats.shape[1], generator=g) for i, g in
                           zip(chosen, generators, strict=True)])  # fmt: skip
        return {"loss": self.errors(latents, image, lifted, t, noise.to(latents.feats))}

    def errors(
        self, latents: SparseVoxels, image: ImageTokens, lifted: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """‖v − u‖² · ((1 − t)² + t²) of every item [B]. The weight makes errors of what the network adds to the best
        linear guess (diff2to3.flow.matching.precondition) count alike at all times."""
        t = t.to(noise)
        rows = torch.repeat_interleave(t, latents.cu_seqlens.diff().long())[:, None]
        noisy = latents.with_feats(noised(latents.feats, noise, rows))
        velocity = self.network(noisy, t, image, lifted=lifted)
        error = squared_error(velocity, target_velocity(latents.feats, noise), latents.cu_seqlens)
        return error * ((1 - t).square() + t.square())

    def inputs(
        self, items: Sequence[dict[str, Tensor]], cameras: Sequence[PhotoCamera], kept: Tensor
    ) -> tuple[SparseVoxels, ImageTokens, Tensor]:
        """Latents, image tokens and lifted features of a batch; nothing of the photo where ``kept`` [B] is false."""
        model, device = self.config.model, next(self.network.parameters()).device
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
        shape = (-1,) if values.ndim == 2 else (-1, 1, 1)
        mean, std = (getattr(self, f"{name}_{key}").view(shape) for key in ("mean", "std"))
        normal: Tensor = (values.float() - mean) / std
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
            kept = torch.rand(len(coords), generator=generator) > 0.15
        if int(kept.sum()) < LEAST_VOXELS:
            return item
        return {**item, "coords": item["coords"][kept], "mean": item["mean"][kept]}

    def camera(self, item: dict[str, Tensor], generator: torch.Generator) -> PhotoCamera:
        """The photograph's, or one as wrong as a predicted one."""
        loss = self.config.loss
        exact = float(torch.rand((), generator=generator)) < loss.exact_camera
        elevation, focal = (0.0 if exact else x for x in torch.randn(2, generator=generator).tolist())
        degrees = math.degrees(float(item["elevation"])) + loss.elevation_noise * elevation
        length = float(item["focal"]) * math.exp(loss.focal_noise * focal)
        return PhotoCamera(min(max(degrees, -80.0), 80.0), max(length, LEAST_FOCAL))


class PhotoLatentTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: PhotoLatentRunConfig) -> None:
        self.config = config
        self.stage = f"photolatents_{config.data.photolatents}"

    def objective(self) -> PhotoLatentObjective:
        return PhotoLatentObjective(self.config, self.statistics())

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Mean and deviation of every channel over the training split, by their keys in a bundle."""
        store = AssetStore(self.config.data.root, [self.stage])
        assets = store.assets("train")
        if not assets:
            raise InputError(f"{store.root}: no asset of split 'train' has {self.stage}")
        infos = [store.info(asset, self.stage) for asset in assets]
        return {key: statistics([info[name] for info in infos]) for name, key in NORMALISED.items()}

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        network: Any = objective.network
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
            camera = PhotoCamera(math.degrees(float(item["elevation"])), float(item["focal"]))
            latents, image, lifted = objective.inputs([item], [camera], torch.ones(1, dtype=torch.bool))
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
                "LatentSMDiT", config_to_dict(objective.network.config), "latent_flow.safetensors"
            ),
            IMAGE_ENCODER: replace(entry, file=f"{IMAGE_ENCODER}.safetensors"),
        }
        tensors = {
            "latent_flow": half_tensors(objective.network.state_dict(), "latent_flow"),
            IMAGE_ENCODER: read_tensors(place / entry.file),
        }
        settings = {"frame": "photo", **objective.known}
        save_bundle(folder, BundleInfo("flow", networks, settings, license="MIT"), tensors)
