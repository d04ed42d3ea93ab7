"""Training the sparse-structure VAE: dense occupancy in, its latents, occupancy out (TRELLIS, section 3.3).

batch.occupancy ─▶ turned at random about z ─▶ encoder ─▶ posterior ─▶ latents ─▶ decoder ─▶ logits ↔ occupancy
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import MISSING
from diff2to3.data.loader import LoaderConfig, TrainLoader
from diff2to3.data.store import AssetStore, occupancy
from diff2to3.errors import InputError
from diff2to3.tensors import half_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.task import Randomness
from diff2to3.vae.config import StructureConfig
from diff2to3.vae.posterior import Posterior
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder
from diff2to3.vae.structure_loss import cross_entropy, dice_loss, intersection_over_union, kl_by_grid

#: Standard deviations of noise that validation adds to the latents, as a share of theirs.
EXTRA_NOISE = 0.1


@dataclass(frozen=True)
class StructureDataConfig:
    """Where the grids are.

    root        prepared dataset
    resolution  R
    augment     turn and mirror each grid by one of the 8 symmetries of a square about z
    loader      size of batches; what they hold follows from the resolution
    """

    root: str = MISSING
    resolution: int = 64
    augment: bool = True
    loader: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass(frozen=True)
class StructureLossConfig:
    """Weights of dice loss, cross-entropy and KL, and that of active cells within the cross-entropy."""

    dice: float = 1.0
    cross_entropy: float = 0.0
    positive_weight: float = 1.0
    kl: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}: expected a weight of at least 0, got {value}")


@dataclass
class StructureVaeRunConfig:
    """A run of train/structure_vae.py."""

    data: StructureDataConfig = field(default_factory=StructureDataConfig)
    encoder: StructureConfig = field(default_factory=StructureConfig)
    decoder: StructureConfig = field(default_factory=lambda: StructureConfig(channels=[512, 128, 32]))
    loss: StructureLossConfig = field(default_factory=StructureLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.encoder.latent_channels != self.decoder.latent_channels:
            raise ValueError("decoder.latent_channels: differs from the encoder's")
        factors = [c.fold * 2 ** (len(c.channels) - 1) for c in (self.encoder, self.decoder)]
        if factors[0] != factors[1]:
            raise ValueError(f"decoder: enlarges by {factors[1]}, the encoder reduces by {factors[0]}")
        if self.data.resolution % factors[0]:
            raise ValueError(f"data.resolution: {self.data.resolution} is not a multiple of {factors[0]}")


def turned(grid: Tensor, symmetry: int) -> Tensor:
    """[…, X, Y, Z] under symmetry 0 (none) to 7 of a square: mirrored in x (1), in y (2), axes swapped (4)."""
    axes = [axis for bit, axis in ((1, -3), (2, -2)) if symmetry & bit]
    grid = grid.flip(axes) if axes else grid
    return grid.transpose(-3, -2) if symmetry & 4 else grid


class StructureObjective(nn.Module):
    """Both halves and the loss. forward(batch, randomness) → losses by name, each [B]."""

    def __init__(
        self, encoder: StructureEncoder, decoder: StructureDecoder, loss: StructureLossConfig, augment: bool
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.loss, self.augment = loss, augment

    def forward(self, batch: Any, randomness: Randomness) -> dict[str, Tensor]:
        (grids,) = batch.occupancy.values()
        generators = [randomness.generator(name) for name in batch.ids]
        if self.augment:
            picks = [int(torch.randint(8, (), generator=g)) for g in generators]
            grids = torch.stack([turned(grid, pick) for grid, pick in zip(grids, picks, strict=True)])
        wanted = grids[:, None].float()
        posterior: Posterior = self.encoder(wanted)
        shape = posterior.mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(wanted.device)
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * noise
        logits = self.decoder(latents)
        weights = self.loss
        out = {
            "dice": dice_loss(logits, wanted),
            "cross_entropy": cross_entropy(logits, wanted, weights.positive_weight),
            "kl": kl_by_grid(posterior),
        }
        out["loss"] = (
            weights.dice * out["dice"] + weights.cross_entropy * out["cross_entropy"] + weights.kl * out["kl"]
        )
        out["iou"] = intersection_over_union(logits.detach(), wanted)
        return out


class StructureVaeTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: StructureVaeRunConfig) -> None:
        self.config = config

    def objective(self) -> StructureObjective:
        encoder, decoder = StructureEncoder(self.config.encoder), StructureDecoder(self.config.decoder)
        objective = StructureObjective(encoder, decoder, self.config.loss, self.config.data.augment)
        objective.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return objective

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        halves = [objective.encoder, objective.decoder]
        return [block for half in halves for block in (*half.blocks, *half.middle_block)]  # type: ignore

    def loader(self, seed: int, rank: int, world_size: int) -> TrainLoader:
        data = self.config.data
        chosen = replace(data.loader, occupancy=[data.resolution])
        return TrainLoader(data.root, chosen, seed=seed, rank=rank, world_size=world_size)

    def grids(self, split: str, chunk: int = 16) -> Iterator[Tensor]:
        """Occupancy float32 [≤ chunk, 1, R, R, R] of all assets of a split."""
        r = self.config.data.resolution
        store = AssetStore(self.config.data.root, [f"voxels_{r}"])
        assets = store.assets(split)
        if not assets:
            raise InputError(f"{store.root}: no asset of split {split!r} has voxels_{r}")
        for start in range(0, len(assets), chunk):
            part = [occupancy(store.coords(a, r), r) for a in assets[start : start + chunk]]
            yield torch.stack(part)[:, None].float()

    @torch.no_grad()
    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        """Seen along x, y and z, the share of active cells: given above, decoded below."""
        wanted = next(self.grids("val", 8)).to(next(objective.parameters()).device)
        found = (decode(objective, encode(objective, wanted).mean) > 0).float()
        rows = []
        for grids in (wanted, found):
            views = [grids[:, 0].mean(axis).transpose(1, 2).flip(1) for axis in (1, 2, 3)]
            rows.append(torch.cat([torch.cat(list(view), 1) for view in views], 0))
        picture = torch.cat(rows, 0).sqrt().repeat_interleave(3, 0).repeat_interleave(3, 1)
        return {"projections": picture[..., None].expand(-1, -1, 3)}

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Mean IoU on ``val`` from the posteriors' means, from samples of them, and from noisy means."""
        scores = reconstruction_scores(objective, self.grids("val"))
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    def export(self, objective: nn.Module, folder: Path) -> None:
        """Both halves in float16, and the latents' statistics over ``train``."""
        latents = torch.cat([encode(objective, g).mean for g in self.grids("train")])
        rows = latents.double().movedim(1, -1).flatten(0, -2)
        settings = {
            "structure_latents": {"mean": rows.mean(0).tolist(), "std": rows.std(0).tolist()},
            "structure_resolution": self.config.data.resolution,
        }
        module: Any = objective
        halves: dict[str, Any] = {
            "structure_encoder": module.encoder,
            "structure_decoder": module.decoder,
        }
        networks = {
            name: NetworkEntry(type(half).__name__, asdict(half.config), f"{name}.safetensors")
            for name, half in halves.items()
        }
        tensors = {name: half_tensors(half.state_dict(), name) for name, half in halves.items()}
        save_bundle(folder, BundleInfo("structure-vae", networks, settings, license="MIT"), tensors)


@torch.no_grad()
def encode(objective: nn.Module, grids: Tensor) -> Posterior:
    """The posterior of grids [B, 1, R, R, R], on their device in float32."""
    posterior: Posterior = objective.encoder(grids)  # type: ignore[operator]
    return Posterior(posterior.mean.float(), posterior.logvar.float())


@torch.no_grad()
def decode(objective: nn.Module, latents: Tensor) -> Tensor:
    """Logits [B, 1, R, R, R]."""
    logits: Tensor = objective.decoder(latents)  # type: ignore[operator]
    return logits


def reconstruction_scores(objective: nn.Module, parts: Iterator[Tensor]) -> dict[str, Any]:
    """How well grids come back.

    iou, iou_worst          from posterior means: mean over grids, and the worst grid
    iou_sampled, iou_noisy  from samples of the posteriors, and from means with noise of 0.1 times the latents'
                            standard deviation
    kl, latent_std, posterior_std   of the posteriors; latent_stds lists the deviation of each channel
    """
    device = next(objective.parameters()).device
    grids = [part.to(device) for part in parts]
    posteriors = [encode(objective, part) for part in grids]
    mean = torch.cat([p.mean for p in posteriors])
    stds = mean.movedim(1, -1).flatten(0, -2).std(0)
    generator = torch.Generator().manual_seed(0)
    scores: dict[str, list[Tensor]] = {"iou": [], "iou_sampled": [], "iou_noisy": []}
    for wanted, posterior in zip(grids, posteriors, strict=True):
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        noisy = posterior.mean + EXTRA_NOISE * stds[:, None, None, None] * noise
        kinds = {"iou": posterior.mean, "iou_sampled": posterior.sample(generator), "iou_noisy": noisy}
        for name, latents in kinds.items():
            scores[name].append(intersection_over_union(decode(objective, latents), wanted))
    spread = torch.cat([(0.5 * p.logvar).exp().flatten() for p in posteriors])
    return {
        **{name: float(torch.cat(values).mean()) for name, values in scores.items()},
        "iou_worst": float(torch.cat(scores["iou"]).min()),
        "kl": float(torch.cat([kl_by_grid(p) for p in posteriors]).mean()),
        "latent_std": float(stds.mean()),
        "posterior_std": float(spread.mean()),
        "latent_stds": stds.tolist(),
    }
