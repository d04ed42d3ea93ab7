"""What a task is, and the randomness that its losses draw from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diff2to3.training.config import TrainConfig


@dataclass(frozen=True)
class Randomness:
    """The source of all randomness of a training step.

    Every draw follows from (seed, step, asset, salt), so a loss depends neither on how the assets of a step
    are dealt to processes nor on what was drawn before, and a run needs no generator state to resume.
    """

    seed: int
    step: int

    def number(self, *parts: object) -> int:
        """A number in [0, 2⁶³) that follows from the seed, the step and ``parts``."""
        text = "\0".join(str(part) for part in (self.seed, self.step, *parts))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def generator(self, asset_id: str, salt: str = "") -> torch.Generator:
        """A generator on the CPU; another ``salt`` gives an independent one for the same asset."""
        return torch.Generator().manual_seed(self.number(asset_id, salt))


class Loader(Protocol):
    """An endless iterable of batches (with ``step``, ``ids`` and ``state``) that knows where it stands."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunConfig(Protocol):
    """A run's configuration: a dataclass with the task's own fields and ``train``."""

    train: TrainConfig


class Task(Protocol):
    """What is trained: networks, data and loss. The engine does the rest. Built as ``Task(config)``."""

    config: Any

    def objective(self) -> nn.Module:
        """The networks with their loss, on the CPU.

        Called with the global generator seeded from ``train.seed``. ``forward(batch, randomness)`` returns
        losses an item: name -> [B]. "loss" is minimised, the others are logged. Its networks have their names
        in bundles, so that ``init_from`` finds them; an optional ``adopt(settings)`` takes over what else of a
        bundle they depend on.
        """
        ...

    def blocks(self, objective: nn.Module) -> list[nn.Module]:
        """The units that are sharded, checkpointed and compiled, each called through its ``forward``."""
        ...

    def loader(self, seed: int, rank: int, world_size: int) -> Loader:
        """Part ``rank`` of ``world_size`` equal parts of every step's batch.

        The engine deals a step in (processes x accumulate) parts, so that a batch is the same however they
        are spread.
        """
        ...

    def samples(self, objective: nn.Module, randomness: Randomness) -> dict[str, Tensor]:
        """Pictures [H, W, 3] in [0, 1] for the run folder, from the averaged weights; may be empty."""
        ...

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Numbers on assets that are not trained on, from the averaged weights; may be empty."""
        ...

    # Optional: example() -> (batch, (items, voxels)), a small batch of made-up data, and the size of a whole one,
    # for estimates where the data is not at hand.

    def export(self, objective: nn.Module, folder: Path) -> None:
        """Write the averaged weights as a plain bundle (``diff2to3.checkpoint.save_bundle``)."""
        ...


@contextmanager
def seeded(number: int, device: torch.device | None = None) -> Iterator[None]:
    """The global generators (CPU, and ``device``'s if it is a CUDA device) seeded here and restored after.

    For layers that draw from them: initialisation and dropout.
    """
    before = torch.get_rng_state()
    gpu = device if device is not None and device.type == "cuda" else None
    before_gpu = torch.cuda.get_rng_state(gpu) if gpu is not None else None
    torch.set_rng_state(torch.Generator().manual_seed(number).get_state())
    if gpu is not None:
        torch.cuda.set_rng_state(torch.Generator(gpu).manual_seed(number).get_state(), gpu)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if gpu is not None and before_gpu is not None:
            torch.cuda.set_rng_state(before_gpu, gpu)
