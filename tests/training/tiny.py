"""A training program small enough for tests: points of random curves, denoised by a few linear layers.

python tests/training/tiny.py tests/training/tiny.yaml train.out=FOLDER key=value ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.data.loader import Cursor, StepPacker
from diff2to3.training.config import TrainConfig
from diff2to3.training.run import main
from diff2to3.training.task import Randomness


@dataclass
class TinyConfig:
    width: int = 16
    depth: int = 3
    dropout: float = 0.0
    num_assets: int = 23
    batch_size: int = 4  # items a part
    bad_asset: str | None = None  # its loss is NaN
    sleep: float = 0.0  # seconds a batch takes
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class TinyBatch:
    step: int
    ids: tuple[str, ...]
    points: Tensor  # [B, 12]
    state: dict[str, Any]


class TinyLoader:
    def __init__(self, config: TinyConfig, seed: int, rank: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.points = torch.randn(config.num_assets, 3, 1, generator=generator) * torch.linspace(0, 1, 4)
        self.packer = StepPacker([1] * config.num_assets, config.batch_size, world_size, seed)
        self.rank, self.config, self.cursor = rank, config, Cursor()

    def __iter__(self) -> Iterator[TinyBatch]:
        while True:
            ranks, self.cursor = self.packer.next_step(self.cursor)
            time.sleep(self.config.sleep)
            picked = [asset for _, asset in ranks[self.rank]]
            points = self.points[picked].flatten(1)
            yield TinyBatch(
                self.cursor.step - 1, tuple(f"asset-{i}" for i in picked), points, self.state_dict()
            )

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.cursor))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = Cursor(**state)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Denoiser(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.first = nn.Linear(12, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.dropout) for _ in range(config.depth))
        self.last = nn.Linear(config.width, 12)
        self.register_buffer("center", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x - self.center)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Objective(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.bad_asset = config.bad_asset
        self.denoiser = Denoiser(config)

    def forward(self, batch: TinyBatch, randomness: Randomness) -> dict[str, Tensor]:
        noise = torch.stack([torch.randn(12, generator=randomness.generator(i, "noise")) for i in batch.ids])
        predicted = self.denoiser(batch.points + 0.3 * noise.to(batch.points.device))
        mse = (predicted - batch.points).square().mean(1)
        bad = torch.tensor([i == self.bad_asset for i in batch.ids], device=mse.device)
        return {"loss": torch.where(bad, torch.nan, mse), "l1": (predicted - batch.points).abs().mean(1)}


class TinyTask:
    def __init__(self, config: TinyConfig) -> None:
        self.config = config

    def objective(self) -> Objective:
        return Objective(self.config)

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        assert isinstance(objective, Objective)
        return list(objective.denoiser.blocks)

    def loader(self, seed: int, rank: int, world_size: int) -> TinyLoader:
        return TinyLoader(self.config, seed, rank, world_size)

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        return {"ramp": torch.linspace(0, 1, 4).expand(4, 4)[..., None].expand(4, 4, 3)}

    def validate(self, objective: nn.Module) -> dict[str, float]:
        assert isinstance(objective, Objective) and not objective.training
        return {"norm": float(objective.denoiser(torch.ones(1, 12)).norm())}

    def export(self, objective: nn.Module, folder: Path) -> None:
        assert isinstance(objective, Objective)
        entry = NetworkEntry("Denoiser", {"width": self.config.width}, "denoiser.safetensors")
        save_bundle(
            folder, BundleInfo("tiny", {"denoiser": entry}), {"denoiser": objective.denoiser.state_dict()}
        )


if __name__ == "__main__":
    sys.exit(main(TinyTask, TinyConfig))
