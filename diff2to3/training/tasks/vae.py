"""Training the 2to3-VAE (P3.1, P3.3): its configuration, data, pictures, validation and bundle."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import MISSING, config_to_dict
from diff2to3.data.loader import Batch, LoaderConfig, TrainLoader
from diff2to3.data.store import AssetStore, feature_stage
from diff2to3.errors import InputError
from diff2to3.gaussians.render import render_pictures
from diff2to3.metrics.lpips import Lpips
from diff2to3.metrics.pairs import pair_values
from diff2to3.tensors import half_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.vae_objective import VaeLossConfig, VaeObjective
from diff2to3.types import Gaussians, SparseVoxels, Views
from diff2to3.vae.config import DecoderConfig, EncoderConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.start import start_linear_paths, start_logvar
from diff2to3.voxels.surface import STATISTICS, channels_of


@dataclass(frozen=True)
class DataConfig:
    """Where the assets are and what is read of them.

    root      a prepared dataset (``diff2to3 data prepare``)
    view_set  the views that renderings are compared with; ``loader.views`` says how many of them a step takes
    validation_assets  how many of split ``val`` validation takes; spread evenly over the split
    """

    root: str = MISSING
    view_set: str = "target"
    validation_assets: int = 32
    loader: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass(frozen=True)
class StartConfig:
    """Where training begins.

    surface_paths  let the linear paths carry mean colour and mean surface point (needs the feature set
                   ``surface`` and ``linear_path`` in both networks)
    spread         the share of the Gaussians' initial spread that is then kept
    logvar         log-variance of the first posteriors
    """

    surface_paths: bool = False
    spread: float = 0.6
    logvar: float = 0.0


@dataclass(frozen=True)
class VaeRunConfig:
    """A training run of the 2to3-VAE.

    sizes  [[step, pixels], …]: from that step on, views are shrunk to so many pixels a side
    """

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: VaeLossConfig = field(default_factory=VaeLossConfig)
    start: StartConfig = field(default_factory=StartConfig)
    sizes: list[list[int]] = field(default_factory=list)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        encoder, decoder = self.encoder, self.decoder
        for name in ("resolution", "latent_channels"):
            if getattr(encoder, name) != getattr(decoder, name):
                raise ValueError(f"decoder.{name}: {getattr(decoder, name)} is not the encoder's")
        if self.data.view_set not in self.data.loader.views:
            raise ValueError(f"data.loader.views: expected {self.data.view_set!r} among them")
        if not self.data.loader.features:
            raise ValueError("data.loader.features: expected at least one feature set")
        if any(len(pair) != 2 or min(pair) < 0 for pair in self.sizes) or self.sizes != sorted(self.sizes):
            raise ValueError(f"sizes: expected [step, pixels] pairs with rising steps, got {self.sizes}")
        if self.start.surface_paths and "surface" not in self.data.loader.features:
            raise ValueError("start.surface_paths: needs the feature set 'surface' in data.loader.features")


class VaeTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: VaeRunConfig) -> None:
        self.config = config

    def objective(self) -> VaeObjective:
        c = self.config
        encoder, decoder = Encoder(c.encoder), Decoder(c.decoder)
        start_logvar(encoder, c.start.logvar)
        if c.start.surface_paths:
            first = self.first_channel("surface")
            color, point = (first + channels_of(name).start for name in ("color", "point"))
            factor = dict((name, f) for name, _, f in STATISTICS)["color"]
            start_linear_paths(encoder, decoder, color, point, factor, c.start.spread)
        loss = c.loss.with_what_is_there()
        if loss is not c.loss:
            print("loss.lpips: no loss.lpips_weights; the edge loss stands in for LPIPS", file=sys.stderr)
        perceptual = Lpips.load(loss.lpips_weights) if loss.lpips and loss.lpips_weights else None
        sizes = tuple((step, size) for step, size in c.sizes)
        return VaeObjective(encoder, decoder, loss, c.data.view_set, sizes, perceptual)

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        assert isinstance(objective, VaeObjective)
        return [*objective.encoder.blocks, *objective.decoder.blocks]

    def loader(self, seed: int, rank: int, world_size: int) -> TrainLoader:
        loader = TrainLoader(
            self.config.data.root, self.config.data.loader, seed=seed, rank=rank, world_size=world_size
        )
        found = sum(self.channels(name) for name in self.config.data.loader.features)
        if found != self.config.encoder.in_channels:
            raise InputError(
                f"encoder.in_channels: is {self.config.encoder.in_channels}, and the feature sets "
                f"{self.config.data.loader.features} of {self.config.data.root} have {found}"
            )
        return loader

    def example(self) -> tuple[Batch, tuple[int, int]]:
        """A made-up asset, a hollow ball, and the size of a whole batch: for estimates without a dataset.

        A real surface has about 5 R² voxels; the ball has a tenth of that, to be quick.
        """
        c, resolution = self.config, self.config.encoder.resolution
        axis = (torch.arange(resolution) + 0.5) / resolution - 0.5
        radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
        xyz = torch.nonzero((radius - 0.17).abs() < 0.6 / resolution)
        coords = torch.nn.functional.pad(xyz, (1, 0)).int()
        feats = torch.zeros(len(coords), c.encoder.in_channels)
        voxels = SparseVoxels.from_coords(coords, feats, resolution)
        count, size = c.data.loader.views[c.data.view_set], c.data.loader.view_size or 8 * resolution
        viewmat, K = torch.eye(4), torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
        viewmat[2, 3] = 2.0
        images, alphas = torch.ones(count, size, size, 3), torch.ones(count, size, size)
        views = Views(images, alphas, viewmat.repeat(count, 1, 1), K.repeat(count, 1, 1))
        batch = Batch(0, ("made-up",), voxels, {c.data.view_set: views}, {}, {}, {})
        most = c.data.loader.max_voxels_per_batch
        items = min(max(1, most // (5 * resolution**2)), c.data.loader.max_assets_per_batch or most)
        return batch, (items, min(most, items * 5 * resolution**2))

    def channels(self, name: str) -> int:
        """Channels of a feature set of the dataset."""
        stage = feature_stage(name)
        store = AssetStore(self.config.data.root, [stage])
        assets = store.assets()
        if not assets:
            raise InputError(f"{self.config.data.root}: {stage} holds no asset")
        return int(store.info(assets[0], stage)["channels"])

    def first_channel(self, wanted: str) -> int:
        """Where a feature set begins among the encoder's inputs."""
        names = self.config.data.loader.features
        return sum(self.channels(name) for name in names[: names.index(wanted)])

    def validation(self) -> tuple[AssetStore, list[Any]]:
        """The store, and the assets that validation takes."""
        data = self.config.data
        grid = f"voxels_{self.config.encoder.resolution}"
        stages = [feature_stage(name) for name in data.loader.features]
        store = AssetStore(data.root, [*stages, grid, f"views_{data.view_set}"])
        assets = store.assets("val")
        step = max(1, len(assets) // max(data.validation_assets, 1))
        return store, assets[::step][: data.validation_assets]

    @torch.no_grad()
    def reconstruct(self, objective: VaeObjective, voxels: SparseVoxels) -> Gaussians:
        """One object from the posterior's mean."""
        device = next(objective.parameters()).device
        voxels = voxels.to(device)
        posterior = objective.encoder(voxels)
        return objective.decoder(voxels.with_feats(posterior.mean))[0]

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        """Rows of target and rendering, for eight assets of the validation."""
        assert isinstance(objective, VaeObjective)
        store, assets = self.validation()
        rows = []
        for asset in assets[:: max(1, len(assets) // 8)][:8]:
            gaussians = self.reconstruct(objective, store.features(asset, self.config.data.loader.features))
            views = store.views(asset, self.config.data.view_set, [0, 1]).to(gaussians.means.device)
            pairs = torch.stack([views.composite(1.0), on_white(gaussians, views)], 1).flatten(0, 1)
            rows.append(torch.cat(list(pairs), 1))
        return {"reconstructions": torch.cat(rows, 0)} if rows else {}

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """PSNR over the image on white and over the foreground, and SSIM: means over assets of four views each."""
        assert isinstance(objective, VaeObjective)
        store, assets = self.validation()
        values: dict[str, list[float]] = {"psnr": [], "psnr_foreground": [], "ssim": []}
        for asset in assets:
            gaussians = self.reconstruct(objective, store.features(asset, self.config.data.loader.features))
            stored = store.open(asset, f"views_{self.config.data.view_set}")
            every = max(1, int(stored.info["num_views"]) // 4)
            views = stored.views(range(0, int(stored.info["num_views"]), every)).to(gaussians.means.device)
            found = pair_values(on_white(gaussians, views), views.composite(1.0), views.alphas, None)
            for name, of_assets in values.items():
                of_assets.append(found[name])
        return {name: sum(of_assets) / len(of_assets) for name, of_assets in values.items() if of_assets}

    def export(self, objective: nn.Module, folder: Path) -> None:
        """Encoder, decoder, statistics of the latents, and what features they were trained on."""
        assert isinstance(objective, VaeObjective)
        entries = {
            name: NetworkEntry(type(network).__name__, config_to_dict(network.config), f"{name}.safetensors")
            for name, network in (("encoder", objective.encoder), ("decoder", objective.decoder))
        }
        settings = {"latents": self.latent_statistics(objective), **self.data_settings()}
        info = BundleInfo("vae", entries, settings, license="MIT", source="trained by train/vae.py")
        halves = {name: half_tensors(getattr(objective, name).state_dict(), name) for name in entries}
        save_bundle(folder, info, halves)

    @torch.no_grad()
    def latent_statistics(self, objective: VaeObjective, num_assets: int = 256) -> dict[str, list[float]]:
        """Mean and standard deviation of each latent channel over the voxels of training assets: what the flow
        model normalises by (P3.3)."""
        data = self.config.data
        stages = [feature_stage(name) for name in data.loader.features]
        store = AssetStore(data.root, [*stages, f"voxels_{self.config.encoder.resolution}"])
        assets = store.assets(data.loader.split)
        count, total, squares = 0, torch.zeros(1), torch.zeros(1)
        device = next(objective.parameters()).device
        for asset in assets[:: max(1, len(assets) // num_assets)][:num_assets]:
            voxels = store.features(asset, data.loader.features).to(device)
            mean = objective.encoder(voxels).mean.double().cpu()
            count, total, squares = count + len(mean), total + mean.sum(0), squares + mean.square().sum(0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
        return {"mean": mean.tolist(), "std": std.tolist()}

    def data_settings(self) -> dict[str, Any]:
        """The feature sets and the views that they come from, as the dataset noted them."""
        features, views = [], {}
        root = Path(self.config.data.root)
        for name in self.config.data.loader.features:
            settings = json.loads((root / feature_stage(name) / "settings.json").read_bytes())
            view_set = json.loads((root / f"views_{settings['views']}" / "settings.json").read_bytes())
            views = {
                "name": settings["views"],
                "seed": view_set["seed"],
                **view_set["views"],
                "render": view_set["render"],
            }
            settings["mode"] = name.partition(".")[2] or settings["modes"][0]
            for key in ("version", "modes", "views"):
                settings.pop(key, None)
            features.append(settings)
        return {"features": features, "views": views}


def on_white(gaussians: Gaussians, views: Views) -> Tensor:
    """Pictures of ``gaussians`` from the cameras of ``views``: [V, H, W, 3]."""
    return render_pictures(gaussians, views.viewmats, views.Ks, views.width, views.height)[0]
