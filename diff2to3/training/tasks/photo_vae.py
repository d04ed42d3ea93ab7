"""Training the 2to3-VAE in the photo frame: features on the voxels of photographs' frames in, renderings of the same
assets from their views out. Photographs turn and scale an asset, so the autoencoder meets each in several poses.

batch.tensors (photovoxels) ─▶ voxels with features ┐
batch.views, moved to the photo frame ──────────────┴─▶ VaeObjective
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_to_dict
from diff2to3.data.loader import LoaderConfig, TrainLoader
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.metrics.pairs import pair_values
from diff2to3.tensors import half_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.vae import DataConfig, StartConfig, on_white
from diff2to3.training.tasks.vae_objective import VaeLossConfig, VaeObjective
from diff2to3.types import Gaussians, SparseVoxels, Views
from diff2to3.vae.config import DecoderConfig, EncoderConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.principal import principal_axes, turn_latents
from diff2to3.vae.start import start_linear_paths, start_logvar
from diff2to3.views.photo_frame import moved_viewmats
from diff2to3.voxels.surface import STATISTICS, channels_of


@dataclass(frozen=True)
class PhotoVaeDataConfig(DataConfig):
    """``photovoxels``: name of the set; ``view_set``: of views in the asset's frame (loader.views says how many)."""

    photovoxels: str = "photo"
    view_set: str = "input"
    loader: LoaderConfig = field(
        default_factory=lambda: LoaderConfig(
            views={"input": 2}, max_assets_per_batch=4, max_voxels_per_batch=100_000_000
        )
    )


@dataclass(frozen=True)
class PhotoVaeRunConfig:
    """A run of train/photo_vae.py; see :class:`diff2to3.training.tasks.vae.VaeRunConfig`.

    principal_axes  exports latents in their principal axes (diff2to3.vae.principal)
    """

    data: PhotoVaeDataConfig = field(default_factory=PhotoVaeDataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: VaeLossConfig = field(default_factory=VaeLossConfig)
    start: StartConfig = field(default_factory=StartConfig)
    sizes: list[list[int]] = field(default_factory=list)
    principal_axes: bool = True
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("resolution", "latent_channels"):
            if getattr(self.encoder, name) != getattr(self.decoder, name):
                raise ValueError(f"decoder.{name}: {getattr(self.decoder, name)} is not the encoder's")
        if self.data.view_set not in self.data.loader.views:
            raise ValueError(f"data.loader.views: expected {self.data.view_set!r} among them")


class PhotoVaeObjective(VaeObjective):
    """The loss of the 2to3-VAE on one photograph's frame an asset."""

    photovoxels: str = ""
    resolution: int = 0

    def forward(self, batch: Any, randomness: Randomness) -> dict[str, Tensor]:
        items = batch.tensors[self.photovoxels]
        device = next(self.parameters()).device
        views: Views = batch.views[self.view_set]
        moved = replace(
            batch,
            voxels=voxels_of(items, self.resolution).to(device),
            views={self.view_set: in_photo_frames(views, [item["transform"] for item in items])},
        )
        return super().forward(moved, randomness)


def voxels_of(items: Sequence[dict[str, Tensor]], resolution: int) -> SparseVoxels:
    """Stored coordinates and features of B photographs as one batch."""
    coords = [torch.nn.functional.pad(item["coords"].int(), (1, 0), value=b) for b, item in enumerate(items)]
    feats = torch.cat([item["feats"].float() for item in items])
    return SparseVoxels.from_coords(torch.cat(coords), feats, resolution, len(items))


def in_photo_frames(views: Views, transforms: Sequence[Tensor]) -> Views:
    """The same views, as many an asset, seen from the frames that the ``transforms`` [4, 4] lead to."""
    count = len(views) // len(transforms)
    parts = [
        moved_viewmats(part, transform.cpu().numpy())[0]
        for part, transform in zip(views.viewmats.split(count), transforms, strict=True)
    ]
    return Views(views.images, views.alphas, torch.cat(parts), views.Ks)


class PhotoVaeTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: PhotoVaeRunConfig) -> None:
        self.config = config
        self.stage = f"photovoxels_{config.data.photovoxels}"

    @property
    def member(self) -> str:
        return f"{self.stage}/*.safetensors"

    def objective(self) -> PhotoVaeObjective:
        c = self.config
        encoder, decoder = Encoder(c.encoder), Decoder(c.decoder)
        start_logvar(encoder, c.start.logvar)
        if c.start.surface_paths:
            first = self.first_channel_of_surface()
            color, point = (first + channels_of(name).start for name in ("color", "point"))
            factor = dict((name, f) for name, _, f in STATISTICS)["color"]
            start_linear_paths(encoder, decoder, color, point, factor, c.start.spread)
        sizes = tuple((step, size) for step, size in c.sizes)
        objective = PhotoVaeObjective(encoder, decoder, c.loss.with_what_is_there(), c.data.view_set, sizes)
        objective.photovoxels, objective.resolution = self.member, c.encoder.resolution
        return objective

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        assert isinstance(objective, VaeObjective)
        return [*objective.encoder.blocks, *objective.decoder.blocks]

    def loader(self, seed: int, rank: int, world_size: int) -> TrainLoader:
        data = self.config.data
        chosen = replace(data.loader, tensors=[self.member])
        loader = TrainLoader(data.root, chosen, seed=seed, rank=rank, world_size=world_size)
        channels = int(loader.store.info(loader.assets[0], self.stage)["channels"])
        if channels != self.config.encoder.in_channels:
            raise InputError(
                f"encoder.in_channels: is {self.config.encoder.in_channels}, and {self.stage} has {channels}"
            )
        return loader

    def settings(self) -> dict[str, Any]:
        """What the data set notes of the features."""
        return dict(json.loads((Path(self.config.data.root) / self.stage / "settings.json").read_bytes()))

    def first_channel_of_surface(self) -> int:
        names = [chosen["provider"] for chosen in self.settings()["features"]]
        if names[0] != "surface":
            raise InputError(f"start.surface_paths: {self.stage} has to begin with surface, it has {names}")
        return 0

    def validation(self, count: int) -> tuple[AssetStore, list[Any]]:
        """The store, and ``count`` assets of split ``val``, spread evenly over it."""
        data = self.config.data
        store = AssetStore(data.root, [self.stage, f"views_{data.view_set}"])
        assets = store.assets("val")
        count = min(count, len(assets))
        return store, [assets[i * len(assets) // count] for i in range(count)]

    @torch.no_grad()
    def reconstructed(
        self, objective: VaeObjective, store: AssetStore, asset: Any
    ) -> tuple[Gaussians, Views]:
        """An asset in the frame of its first photograph, and four of its views in that frame."""
        stored = store.open(asset, self.stage)
        item = stored.tensors(sorted(stored.entry.members)[0])
        device = next(objective.parameters()).device
        voxels = voxels_of([item], self.config.encoder.resolution).to(device)
        views = store.views(asset, self.config.data.view_set, range(4))
        (gaussians,) = objective.decoder(voxels.with_feats(objective.encoder(voxels).mean))
        return gaussians, in_photo_frames(views, [item["transform"]]).to(device)

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        """Rows of target and rendering, for eight assets of the validation."""
        assert isinstance(objective, VaeObjective)
        store, assets = self.validation(8)
        rows = []
        for asset in assets:
            gaussians, views = self.reconstructed(objective, store, asset)
            pairs = torch.stack([views.composite(1.0), on_white(gaussians, views)], 1).flatten(0, 1)
            rows.append(torch.cat(list(pairs), 1))
        return {"reconstructions": torch.cat(rows, 0)} if rows else {}

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """PSNR over the image on white and over the foreground, and SSIM: means over assets of four views each."""
        assert isinstance(objective, VaeObjective)
        store, assets = self.validation(self.config.data.validation_assets)
        values: dict[str, list[float]] = {"psnr": [], "psnr_foreground": [], "ssim": []}
        for asset in assets:
            gaussians, views = self.reconstructed(objective, store, asset)
            found = pair_values(on_white(gaussians, views), views.composite(1.0), views.alphas, None)
            for name, numbers in values.items():
                numbers.append(found[name])
        return {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}

    def export(self, objective: nn.Module, folder: Path) -> None:
        """Encoder and decoder, the latents' statistics, and what the features were made of."""
        assert isinstance(objective, VaeObjective)
        c = self.config
        encoder, decoder = Encoder(c.encoder), Decoder(c.decoder)
        encoder.load_state_dict(objective.encoder.state_dict())
        decoder.load_state_dict(objective.decoder.state_dict())
        means = self.means(encoder)
        if c.principal_axes:
            axes = principal_axes(means)
            turn_latents(encoder, decoder, axes)
            means = means.double() @ axes
        networks = {
            name: NetworkEntry(type(network).__name__, config_to_dict(network.config), f"{name}.safetensors")
            for name, network in (("encoder", encoder), ("decoder", decoder))
        }
        settings = {
            "latents": {"mean": means.mean(0).tolist(), "std": means.std(0).tolist()},
            **self.data_settings(),
        }
        info = BundleInfo("vae", networks, settings, license="MIT", source="trained by train/photo_vae.py")
        halves = {
            name: half_tensors(network.state_dict(), name)
            for name, network in (("encoder", encoder), ("decoder", decoder))
        }
        save_bundle(folder, info, halves)

    @torch.no_grad()
    def means(self, encoder: Encoder, count: int = 200) -> Tensor:
        """Latents [N, C] of ``count`` photographs of the training split."""
        store = AssetStore(self.config.data.root, [self.stage])
        assets = store.assets("train")
        device, found = next(encoder.parameters()).device, []
        for asset in assets[:: max(1, len(assets) // count)][:count]:
            stored = store.open(asset, self.stage)
            item = stored.tensors(sorted(stored.entry.members)[0])
            found.append(encoder(voxels_of([item], encoder.config.resolution).to(device)).mean.cpu())
        return torch.cat(found)

    def data_settings(self) -> dict[str, Any]:
        """The feature sets and the views that they come from, as a bundle notes them."""
        features = self.settings()["features"]
        name = features[0]["views"]
        view_set = json.loads((Path(self.config.data.root) / f"views_{name}" / "settings.json").read_bytes())
        noted = [
            {**{k: v for k, v in chosen.items() if k not in ("views", "modes")}, "mode": chosen["modes"][0]}
            for chosen in features
        ]
        views = {"name": name, "seed": view_set["seed"], **view_set["views"], "render": view_set["render"]}
        return {"features": noted, "views": views}
