"""Everything that training changes: weights, optimiser, averages, loss scale, place in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.training import distributed
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World
from diff2to3.training.ema import Averager
from diff2to3.training.precision import LossScale

_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(weights: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on tensors with two or more axes alone."""
    decayed = [value for value in weights.values() if value.ndim >= 2]
    others = [value for value in weights.values() if value.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = all(value.device.type == "cuda" for value in weights.values())
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=fused or None,
    )


@dataclass
class TrainState:
    """The state of a run after ``step`` steps."""

    objective: nn.Module
    optimizer: torch.optim.AdamW
    averager: Averager | None
    scale: LossScale
    world: World
    step: int = 0
    updates: int = 0  # steps whose gradients were finite: all, except with fp16
    loader: dict[str, Any] = field(default_factory=dict)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that have gradients, by name."""
        return {n: p for n, p in self.objective.named_parameters() if p.requires_grad}

    def _places(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name in a checkpoint -> (the tensor's local part, a tensor laid out like it)."""
        places = {f"model.{n}": (distributed.local(v), v) for n, v in self.objective.state_dict().items()}
        for name, weight in self.trained().items():
            if self.averager is not None:
                places[f"ema.{name}"] = (self.averager.tensors[name], weight)
            moments = self.optimizer.state.get(weight) or {}
            for moment in _MOMENTS if moments else ():
                places[f"{moment}.{name}"] = (distributed.local(moments[moment]), weight)
        return places

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of what this process takes part in writing: whole tensors are the main process's."""
        places = self._places()
        sharded = any(distributed.is_sharded(like) for _, like in places.values())
        if not (sharded or self.world.main):
            return {}
        return {n: distributed.on_cpu(v, like, self.world) for n, (v, like) in places.items()}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {"updates": self.updates, "loader": self.loader, "scale": self.scale.state_dict()}

    @torch.no_grad()
    def load(self, folder: Path, info: dict[str, Any]) -> None:
        """Take everything from a checkpoint, written by any number of processes."""
        self.updates = info["updates"]
        if self.updates:
            self._prepare_moments()
        places = self._places()
        _check_shapes(folder, places)
        read = {n: distributed.on_cpu(v, like, self.world) for n, (v, like) in places.items()}
        distributed.read_tensors(folder, read, self.world)
        for name, (value, _) in places.items():
            value.copy_(distributed.local(read[name]))
        self.step, self.loader = info["step"], info["loader"]
        self.scale.load_state_dict(info["scale"])

    def _prepare_moments(self) -> None:
        """AdamW's state as it is after ``updates`` updates, with moments still to be filled."""
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                at = weight.device if group["fused"] else torch.device("cpu")
                state = self.optimizer.state[weight]
                state["step"] = torch.tensor(float(self.updates), dtype=torch.float32, device=at)
                for moment in _MOMENTS:
                    state[moment] = torch.zeros_like(weight)


def _check_shapes(folder: Path, places: dict[str, tuple[Tensor, Tensor]]) -> None:
    """InputError unless the checkpoint has exactly these tensors."""
    stored = distributed.stored_tensors(folder)
    wanted = {name: tuple(like.shape) for name, (_, like) in places.items()}
    problems = [f"no tensor {name}" for name in wanted if name not in stored]
    problems += [f"unexpected tensor {name}" for name in stored if name not in wanted]
    problems += [
        f"{name} is {list(stored[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if stored.get(name, shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{folder}: does not fit this run: {problems[0]}{more}")
