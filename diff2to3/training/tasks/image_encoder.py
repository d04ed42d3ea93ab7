"""Training the mini image encoder: a small network that repeats TAEF2's latents on renderings.

    view over a grey or coloured background ─┬─▶ TAEF2's encoder (frozen) ─▶ latents ─┐
                                             └─▶ MiniEncoder ─▶ latents ─────────────┴─▶ squared difference

The teacher costs ten times what the student does, so its latents of a fixed pool of pictures are computed
once, when training begins, and the pool is gone through many times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import MISSING
from diff2to3.errors import InputError
from diff2to3.tensors import half_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.voxels.mini_encoder import STRIDE, MiniEncoder, MiniEncoderConfig
from diff2to3.voxels.providers import build_provider, weights_fingerprint
from diff2to3.voxels.taesd import load_taesd

#: Backgrounds: (share, grey level); what is left gets a random colour. Features are lifted over mid-grey.
BACKGROUNDS = ((0.5, 0.5), (0.15, 1.0), (0.1, 0.0))


@dataclass(frozen=True)
class DistillDataConfig:
    """The pictures that the teacher is asked about.

    root        prepared dataset
    view_sets   whose views are drawn, with equal chance
    num_train   pictures of the split ``train`` in the pool
    num_val     pictures of the split ``val`` for validation
    batch_size  pictures a step
    teacher     weights of TAEF2's encoder: local file or hub name; null for the published ones
    decoder     weights of its decoder (local file), for sample pictures and their PSNR; null for none
    cache       file that keeps the pool; null computes it again at every start
    """

    root: str = MISSING
    view_sets: list[str] = field(default_factory=lambda: ["input", "target"])
    num_train: int = 1600
    num_val: int = 96
    batch_size: int = 4
    teacher: str | None = None
    decoder: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not self.view_sets:
            raise ValueError("view_sets: expected at least one")


@dataclass(frozen=True)
class EncoderLossConfig:
    """background: weight of map cells that see nothing of the object, beside 1 for the others."""

    background: float = 0.3


@dataclass
class ImageEncoderRunConfig:
    """A run of train/image_encoder.py."""

    data: DistillDataConfig = field(default_factory=DistillDataConfig)
    model: MiniEncoderConfig = field(default_factory=MiniEncoderConfig)
    loss: EncoderLossConfig = field(default_factory=EncoderLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Pool:
    """P pictures with the teacher's latents.

    images   uint8 [P, 3, H, W]
    latents  float16 [P, C, H/8, W/8]
    seen     bool [P, H/8, W/8]  cells that the object touches
    """

    images: Tensor
    latents: Tensor
    seen: Tensor


@dataclass(frozen=True)
class DistillBatch:
    """B of a pool's pictures; images float32 in [0, 1]."""

    step: int
    ids: tuple[str, ...]
    images: Tensor
    latents: Tensor
    seen: Tensor
    state: dict[str, int]


def make_pool(config: DistillDataConfig, split: str, count: int, seed: int) -> Pool:
    """Draw pictures and ask the teacher. Everything follows from (seed, split).

    Raises:
        InputError: no such dataset, view set or weights.
    """
    from diff2to3.data.store import AssetStore

    teacher = build_provider("taef2", config.teacher)
    store = AssetStore(config.root, [f"views_{name}" for name in config.view_sets])
    assets = store.assets(split)
    if not assets:
        raise InputError(f"{config.root}: no asset of split {split!r} has views {config.view_sets}")
    draw = np.random.default_rng([seed, *split.encode()])
    order = np.concatenate([draw.permutation(len(assets)) for _ in range(-(-count // len(assets)))])
    images, latents, seen = [], [], []
    for index in order[:count]:
        stored = store.open(assets[index], f"views_{draw.choice(config.view_sets)}")
        views = stored.views([int(draw.integers(stored.info["num_views"]))])
        pixels = views.composite(background(draw)).permute(0, 3, 1, 2).mul(255).round().clamp(0, 255)
        images.append(pixels.to(torch.uint8))
        latents.append(teacher.encode(pixels.permute(0, 2, 3, 1) / 255).to(torch.float16))
        seen.append(F.max_pool2d(views.alphas[:, None], STRIDE)[:, 0] > 0)
    return Pool(*(torch.cat(parts).contiguous() for parts in (images, latents, seen)))


def background(draw: np.random.Generator) -> Tensor:
    """A colour [3]: one of :data:`BACKGROUNDS`, or any."""
    chance, color = draw.random(), torch.from_numpy(draw.random(3)).float()
    for share, grey in BACKGROUNDS:
        if chance < share:
            return torch.full((3,), grey)
        chance -= share
    return color


def cached_pool(config: DistillDataConfig, split: str, count: int, seed: int) -> Pool:
    """:func:`make_pool`, kept in the file ``config.cache``."""
    from safetensors import safe_open
    from safetensors.torch import save

    from diff2to3.files import write_atomic

    if config.cache is None:
        return make_pool(config, split, count, seed)
    path = Path(config.cache)
    path = path.with_name(f"{path.stem}_{split}.safetensors")
    what = json.dumps(
        [config.root, config.view_sets, split, count, seed, weights_fingerprint(config.teacher)]
    )
    if path.is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("what") == what:
                return Pool(*(file.get_tensor(name) for name in ("images", "latents", "seen")))
    pool = make_pool(config, split, count, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(vars(pool), {"what": what}))
    return pool


class PoolLoader:
    """Endless batches from a pool, shuffled anew every epoch; order from (seed, epoch)."""

    def __init__(self, config: DistillDataConfig, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if config.batch_size % world_size:
            raise InputError(
                f"data.batch_size: {config.batch_size} cannot be dealt in {world_size} equal parts"
            )
        if config.num_train < config.batch_size:
            raise InputError(
                f"data.num_train: {config.num_train} is less than a batch of {config.batch_size}"
            )
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        self.step = 0

    def __iter__(self) -> Iterator[DistillBatch]:
        pool = cached_pool(self.config, "train", self.config.num_train, self.seed)
        size = self.config.batch_size
        per_epoch = self.config.num_train // size
        order, order_epoch = np.zeros(0, np.int64), -1
        while True:
            epoch, place = divmod(self.step, per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.config.num_train)
                order_epoch = epoch
            rows = order[place * size : (place + 1) * size][self.rank :: self.world_size]
            step, self.step = self.step, self.step + 1
            yield DistillBatch(
                step,
                tuple(f"picture {row}" for row in rows),
                (pool.images[rows].float() / 255).contiguous(memory_format=torch.channels_last),
                pool.latents[rows].float(),
                pool.seen[rows],
                self.state_dict(),
            )

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises InputError if the state is of another seed."""
        if state["seed"] != self.seed:
            raise InputError(f"loader state: seed was {state['seed']}, is {self.seed}: not the same run")
        self.step = state["step"]


class ImageEncoderObjective(nn.Module):
    """The student and its loss. forward(batch, randomness) → {"loss", "mse"}, each [B]."""

    def __init__(self, encoder: MiniEncoder, loss: EncoderLossConfig) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(self, batch: DistillBatch, randomness: Any) -> dict[str, Tensor]:
        squared = (self.encoder(batch.images).float() - batch.latents).square().mean(1)  # [B, h, w]
        weight = torch.where(batch.seen, 1.0, self.loss.background)
        loss = (squared * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
        return {"loss": loss, "mse": squared.detach().flatten(1).mean(1)}


class ImageEncoderTask:
    """See :class:`diff2to3.training.task.Task`."""

    def __init__(self, config: ImageEncoderRunConfig) -> None:
        self.config = config
        self._val: Pool | None = None

    def objective(self) -> nn.Module:
        encoder = MiniEncoder(self.config.model)
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return ImageEncoderObjective(encoder, self.config.loss)

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        return [*objective.encoder.fine, *objective.encoder.coarse]  # type: ignore[union-attr, misc]

    def loader(self, seed: int, rank: int, world_size: int) -> PoolLoader:
        return PoolLoader(self.config.data, seed, rank, world_size)

    def samples(self, objective: nn.Module, randomness: Any) -> dict[str, Tensor]:
        """Columns: pictures, TAEF2's decoding of its own latents, and of the student's."""
        if self.config.data.decoder is None:
            return {}
        pool = self._val_pool()
        images = pool.images[:6].float() / 255
        student = predict(objective.encoder, images)  # type: ignore[arg-type]
        decoder = load_taesd(Path(self.config.data.decoder), "decoder")
        rows = [images, decoder(pool.latents[:6].float()), decoder(student)]
        return {"decoded": torch.cat([torch.cat(list(r), 1) for r in rows], 2).permute(1, 2, 0).clamp(0, 1)}

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """R² of the latents, and with a decoder the PSNR between the two decodings, on unseen assets."""
        pool = self._val_pool()
        images = pool.images.float() / 255
        student = predict(objective.encoder, images)  # type: ignore[arg-type]
        teacher = pool.latents.float()
        scores = agreement(student, teacher, pool.seen)
        if self.config.data.decoder is not None:
            decoder = load_taesd(Path(self.config.data.decoder), "decoder")
            scores["psnr_between_decodings"] = decoding_psnr(decoder, student[:16], teacher[:16])
        return scores

    def export(self, objective: nn.Module, folder: Path) -> None:
        encoder: MiniEncoder = objective.encoder  # type: ignore[assignment]
        save_bundle(folder, *bundle_part(encoder))

    def _val_pool(self) -> Pool:
        if self._val is None:
            data = self.config.data
            self._val = cached_pool(data, "val", data.num_val, self.config.train.seed)
        return self._val


def predict(encoder: nn.Module, images: Tensor, chunk: int = 8) -> Tensor:
    """The encoder's latents of many images [P, 3, H, W], without gradients."""
    with torch.no_grad():
        device = next(encoder.parameters()).device
        return torch.cat([encoder(part.to(device)).float().cpu() for part in images.split(chunk)])


def agreement(student: Tensor, teacher: Tensor, seen: Tensor) -> dict[str, float]:
    """Share of the teacher's variance that the student explains, mean over channels: over all cells, and over
    those ([P, h, w]) that the object touches."""
    both = torch.stack([student, teacher]).permute(0, 2, 1, 3, 4)  # [2, C, P, h, w]

    def r2(pair: Tensor) -> Tensor:
        return 1 - (pair[0] - pair[1]).square().mean(-1) / pair[1].var(-1)

    everywhere, objects = r2(both.flatten(2)), r2(both[:, :, seen])
    return {
        "r2": float(everywhere.mean()),
        "r2_object": float(objects.mean()),
        "r2_object_worst_channel": float(objects.min()),
    }


def decoding_psnr(decoder: nn.Module, student: Tensor, teacher: Tensor) -> float:
    """Mean PSNR in dB between pictures decoded from two sets of latents."""
    with torch.no_grad():
        values = [
            -10 * torch.log10((decoder(a).clamp(0, 1) - decoder(b).clamp(0, 1)).square().mean().clamp(1e-10))
            for a, b in zip(student.split(1), teacher.split(1), strict=True)
        ]
    return float(torch.stack(values).mean())


def bundle_part(encoder: MiniEncoder) -> tuple[BundleInfo, dict[str, dict[str, Tensor]]]:
    """What a bundle says of the encoder, and its weights in float16."""
    entry = NetworkEntry("MiniEncoder", asdict(encoder.config), "image_encoder.safetensors")
    source = "distilled from TAEF2 (madebyollin/taef2, MIT)"
    info = BundleInfo("image-encoder", {"image_encoder": entry}, license="MIT", source=source)
    return info, {"image_encoder": half_tensors(encoder.state_dict(), "image_encoder")}
