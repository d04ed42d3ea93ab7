"""Training the flow models of both stages on stored latents: configuration, data, pictures, validation, bundle."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import (
    BundleInfo,
    NetworkEntry,
    read_bundle,
    read_json,
    save_bundle,
)
from diff2to3.config import MISSING, config_to_dict
from diff2to3.data.encodings import statistics
from diff2to3.data.loader import LoaderConfig, TrainLoader
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.flow.denoise import StageSettings
from diff2to3.flow.framing import Framing
from diff2to3.flow.matching import noised, squared_error, target_velocity
from diff2to3.flow.networks import FlowConfig, build_network, predict, velocity_of
from diff2to3.flow.normalization import Normalization, Statistics
from diff2to3.flow.samplers import SAMPLERS, guided, timesteps
from diff2to3.flow.tokens import ImageTokens
from diff2to3.tensors import half_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.flow_augment import AugmentConfig
from diff2to3.training.tasks.flow_objective import (
    BatchStages,
    FlowLossConfig,
    FlowObjective,
    Tensors,
    latent_member,
    point_member,
    view_member,
    voxel_member,
)
from diff2to3.training.tasks.flow_pictures import Judge
from diff2to3.types import SparseVoxels

#: Times at which validation measures the loss.
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class FlowDataConfig:
    """What is read, all of it made by ``diff2to3 data prepare``.

    root     a prepared dataset
    latents  stage of the latents to learn: structures_<name> or latents_<name>
    tokens   stage of the condition images' latents
    bundle   folder with the decoder of these latents, for pictures and scores, and with their statistics (else
             those of the training split are taken); null for neither
    augment  random changes of the condition images' latents while training; see :class:`AugmentConfig`
    points   stage latents: a stage points_<N>, for loss.render.surface; null without that
    validation_assets  how many of split ``val`` validation takes; spread evenly over the split
    """

    root: str = MISSING
    latents: str = MISSING
    tokens: str = MISSING
    bundle: str | None = None
    points: str | None = None
    validation_assets: int = 32
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class FlowRunConfig:
    """A training run of one stage.

    sampling  how the model is sampled by whoever loads its bundle, and in validation, which does without
              ``prune``
    """

    data: FlowDataConfig = field(default_factory=FlowDataConfig)
    model: FlowConfig = field(default_factory=FlowConfig)
    loss: FlowLossConfig = field(default_factory=FlowLossConfig)
    sampling: StageSettings = field(default_factory=lambda: StageSettings(guidance_scale=3.0))
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.loss.judges_occupancy and (self.model.stage == "latents" or not self.data.bundle):
            raise ValueError(
                "loss.dice, cross_entropy: need stage structure, and data.bundle with the decoder of its latents"
            )
        render = self.loss.render
        if render.weight and (self.model.stage == "structure" or not self.data.bundle):
            raise ValueError(
                "loss.render: needs stage latents, and data.bundle with the decoder of its latents"
            )
        if render.weight and render.view_set not in self.data.loader.views:
            raise ValueError(f"loss.render: needs data.loader.views with {render.view_set!r} among them")
        if render.surface and not self.data.points:
            raise ValueError("loss.render.surface: needs data.points, a stage of points on the surface")
        kind = "latents_" if self.model.stage == "latents" else "structures_"
        if not self.data.latents.startswith(kind) and self.data.latents != MISSING:
            raise ValueError(
                f"data.latents: stage {self.model.stage} learns {kind}<name>, got {self.data.latents!r}"
            )


class FlowTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: FlowRunConfig) -> None:
        self.config = config
        bundle, threshold = config.data.bundle, config.sampling.threshold
        self.judge = Judge(bundle, config.model.stage, threshold) if bundle else None

    def objective(self) -> FlowObjective:
        return FlowObjective(**self.parts())

    def parts(self) -> dict[str, Any]:
        """What a :class:`FlowObjective` is made of."""
        c = self.config
        return {
            "network": build_network(c.model),
            "loss": c.loss,
            "latents": Normalization(self.latent_statistics()),
            "image": Normalization(self.statistics(c.data.tokens)),
            "stages": BatchStages(c.data.latents, c.data.tokens, c.data.points),
            "resolution": c.model.resolution,
            "image_patch_size": c.model.image_patch_size,
            "decoder": self.judge.decoder if c.loss.decodes and self.judge else None,
            "augment": c.data.augment,
        }

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        network: Any = objective.network
        if hasattr(network, "double_blocks"):
            return [*network.double_blocks, *network.single_blocks]
        return list(network.blocks)

    def loader(self, seed: int, rank: int, world_size: int) -> TrainLoader:
        data = self.config.data
        names, grids = self.tensor_names(), []
        if self.config.loss.judges_occupancy:
            grids.append(self.grid_resolution)
        if self.config.loss.render.surface and data.points is not None:
            names.append(point_member(data.points))
        config = replace(data.loader, tensors=names, occupancy=grids)
        return TrainLoader(data.root, config, seed=seed, rank=rank, world_size=world_size)

    @property
    def grid_resolution(self) -> int:
        """Of the voxels that structure latents decode to."""
        assert self.judge is not None
        return self.judge.grid_resolution(self.config.model.resolution)

    def tensor_names(self) -> list[str]:
        """What is read of every asset."""
        data, model = self.config.data, self.config.model
        grid = [voxel_member(model.resolution)] if model.stage == "latents" else []
        return [latent_member(data.latents), view_member(data.tokens), *grid]

    def statistics(self, stage: str) -> Statistics:
        """Of every channel over the training split, from what the stage noted."""
        store = AssetStore(self.config.data.root, [stage])
        assets = store.assets(self.config.data.loader.split)
        if not assets:
            raise InputError(f"{self.config.data.root}: {stage} holds no asset to train on")
        return statistics([store.info(asset, stage) for asset in assets])

    def latent_statistics(self) -> Statistics:
        """Those saved with the autoencoder (P3.3), or the training split's."""
        data = self.config.data
        if data.bundle:
            name = "latents" if self.config.model.stage == "latents" else "structure_latents"
            saved = read_bundle(Path(data.bundle)).settings.get(name)
            if saved is not None:
                return {"mean": list(saved["mean"]), "std": list(saved["std"])}
        return self.statistics(data.latents)

    # ---- validation ----

    def validation(self, count: int) -> tuple[AssetStore, list[PlannedAsset]]:
        """The store, and ``count`` assets of the split ``val`` (or of those trained on, where it is empty)."""
        data = self.config.data
        stages = [name.partition("/")[0] for name in self.tensor_names()]
        truths = self.judge.stages(self.config.model.resolution) if self.judge else []
        store = AssetStore(data.root, list(dict.fromkeys([*stages, *truths])))
        assets = store.assets("val") or store.assets(data.loader.split)
        return store, spread(assets, count)

    def read(self, objective: FlowObjective, store: AssetStore, assets: list[PlannedAsset]) -> Tensors:
        """What a batch of these assets has, with one view an asset: another view for every asset."""
        device = next(objective.parameters()).device
        tensors: Tensors = {}
        for name in self.tensor_names():
            stage, _, pattern = name.partition("/")
            tensors[name] = []
            for k, asset in enumerate(assets):
                stored = store.open(asset, stage)
                members = sorted(fnmatch.filter(stored.entry.members, pattern))
                item = stored.tensors(members[k * 7 % len(members)])
                tensors[name].append({key: value.to(device) for key, value in item.items()})
        return tensors

    def generate(
        self, objective: FlowObjective, latents: Tensor | SparseVoxels, image: ImageTokens
    ) -> Tensor:
        """Latents (not normalised) for these images, from fixed noise; ``latents`` give shape and voxels."""
        c = self.config.sampling
        shape = latents.feats.shape if isinstance(latents, SparseVoxels) else latents.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(image.feats.device)
        absent = ImageTokens.none(image.batch_size, image.channels, image.feats.device)
        velocity = guided(
            velocity_of(objective.network, latents, image),
            velocity_of(objective.network, latents, absent),
            c.guidance_scale,
            c.guidance_interval,
        )
        z = SAMPLERS[c.sampler](velocity, noise, timesteps(c.num_steps, c.shift))
        return objective.latents.invert(z)

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        """Truth above what is generated from one view, for eight assets of the validation."""
        assert isinstance(objective, FlowObjective)
        if self.judge is None:
            return {}
        store, assets = self.validation(8)
        return {"generated": self.judge.picture(store, assets, *self.made(objective, store, assets))}

    def made(
        self, objective: FlowObjective, store: AssetStore, assets: list[PlannedAsset]
    ) -> tuple[Tensor | SparseVoxels, Tensor]:
        """What gives shape and voxels, and generated latents (not normalised), from one view of each asset."""
        tensors = self.read(objective, store, assets)
        latents = objective.data(tensors)
        return latents, self.generate(objective, latents, objective.images(tensors))

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Means over the validation's assets."""
        assert isinstance(objective, FlowObjective)
        store, assets = self.validation(self.config.data.validation_assets)
        numbers: dict[str, list[float]] = {}
        for start in range(0, len(assets), 16):
            for name, values in self.measure(objective, store, assets[start : start + 16]).items():
                numbers.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in numbers.items() if values}

    def measure(
        self, objective: FlowObjective, store: AssetStore, assets: list[PlannedAsset]
    ) -> dict[str, list[float]]:
        """For every asset the loss at fixed times and noise, and what the generated object scores."""
        tensors = self.read(objective, store, assets)
        latents, image = objective.data(tensors), objective.images(tensors)
        numbers = {f"loss_{t}": fixed_loss(objective, latents, image, t) for t in VALIDATION_TIMES}
        numbers["loss"] = [sum(values) / len(values) for values in zip(*numbers.values(), strict=True)]
        if self.judge is not None:
            made = self.generate(objective, latents, image)
            numbers |= self.judge.scores(store, assets, latents, made)
        return numbers

    def export(self, objective: nn.Module, folder: Path) -> None:
        """The network in float16, what normalises its inputs, and how it is sampled."""
        assert isinstance(objective, FlowObjective)
        network: Any = objective.network
        structure = self.config.model.stage == "structure"
        name, latents = objective.name, "structure_latents" if structure else "latents"
        config = config_to_dict(network.config)
        entry = NetworkEntry(type(network).__name__, config, f"{name}.safetensors")
        settings = {
            latents: objective.latents.statistics(),
            "image_latents": objective.image.statistics(),
            "condition": self.condition(),
            "samplers": {"structure" if structure else "latent": config_to_dict(self.config.sampling)},
        }
        info = BundleInfo("flow", {name: entry}, settings, license="MIT", source="trained by train/flow.py")
        save_bundle(folder, info, {name: half_tensors(network.state_dict(), name)})

    def condition(self) -> dict[str, Any]:
        """How the condition pictures were framed: generation does the same to photos."""
        settings = self.token_settings()
        return {f.name: settings[f.name] for f in fields(Framing) if settings.get(f.name) is not None}

    def token_settings(self) -> dict[str, Any]:
        """What the condition images' latents were made with."""
        return read_json(Path(self.config.data.root) / self.config.data.tokens / "settings.json")


def spread(assets: list[PlannedAsset], count: int) -> list[PlannedAsset]:
    """``count`` of them, evenly spaced."""
    count = min(count, len(assets))
    return [assets[i * len(assets) // count] for i in range(count)]


def fixed_loss(
    objective: FlowObjective, latents: Tensor | SparseVoxels, image: ImageTokens, t: float
) -> list[float]:
    """The loss of every item at time ``t``, always with the same noise."""
    data = latents.feats if isinstance(latents, SparseVoxels) else latents
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1)).to(data.device)
    z = noised(data, noise, torch.tensor(t))
    noisy = latents.with_feats(z) if isinstance(latents, SparseVoxels) else z
    times = torch.full((image.batch_size,), t, device=data.device)
    velocity = predict(objective.network, noisy, times, image)
    bounds = latents.cu_seqlens if isinstance(latents, SparseVoxels) else None
    values: list[float] = squared_error(velocity, target_velocity(data, noise), bounds).tolist()
    return values
