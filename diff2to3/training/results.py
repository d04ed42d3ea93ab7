"""What a run makes of its averaged weights on the way: pictures, validation numbers, bundles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diff2to3.files import sync_folder
from diff2to3.training import distributed
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World
from diff2to3.training.records import Records
from diff2to3.training.state import TrainState
from diff2to3.training.task import Randomness, Task, seeded


class Results:
    """Runs the task's ``samples``, ``validate`` and ``export`` when they are due."""

    def __init__(self, task: Task, config: TrainConfig, world: World, records: Records) -> None:
        self.task, self.config, self.world, self.records = task, config, world, records
        self.out = Path(config.out)

    def after_step(self, state: TrainState) -> None:
        """Whatever is due after ``state.step`` steps. All processes call this."""
        due = {
            name
            for name in ("sample", "validate", "export")
            if (every := getattr(self.config, f"{name}_every")) and state.step % every == 0
        }
        if due:
            self.make(state, due)

    def make(self, state: TrainState, what: set[str]) -> None:
        """Some of "sample", "validate", "export", on the main process while the others wait."""
        number = Randomness(self.config.seed, state.step).number("results")
        with averaged(state, self.task, self.config) as objective, seeded(number, self.world.device):
            if objective is not None:
                if "sample" in what:
                    self._sample(objective, state.step)
                if "validate" in what and (numbers := self.task.validate(objective)):
                    self.records.put("validate", state.step, numbers)
                if "export" in what:
                    export(self.task, objective, self.out / "bundle")
        distributed.wait_for_all(self.world)

    def _sample(self, objective: nn.Module, step: int) -> None:
        pictures = self.task.samples(objective, Randomness(self.config.seed, 0))
        folder = self.out / "samples"
        for name, picture in pictures.items():
            folder.mkdir(exist_ok=True)
            pixels = to_pixels(name, picture)
            temporary = folder / f".{name}.tmp"
            Image.fromarray(pixels).save(temporary, "PNG")
            os.replace(temporary, folder / f"step-{step:08d}-{name}.png")
            self.records.picture(name, step, pixels)


@contextmanager
def averaged(state: TrainState, task: Task, config: TrainConfig) -> Iterator[nn.Module | None]:
    """The objective with averaged weights, in eval mode without gradients, on the main process; None on
    others.

    Sharded weights are gathered into an objective of its own; otherwise they are exchanged in place.
    """
    world = state.world
    if any(distributed.is_sharded(value) for value in state.trained().values()):
        weights = gathered_weights(state)
        if not world.main:
            yield None
            return
        with seeded(config.seed):
            objective = task.objective()
        objective.load_state_dict(weights)
        objective.to(world.device).eval()
        with torch.no_grad():
            yield objective
        return
    if not world.main:
        yield None
        return
    was_training = state.objective.training
    state.objective.eval()
    try:
        with torch.no_grad():
            if state.averager is None:
                yield state.objective
            else:
                with state.averager.applied():
                    yield state.objective
    finally:
        state.objective.train(was_training)


def gathered_weights(state: TrainState) -> dict[str, Tensor]:
    """The whole averaged state dict on the CPU, from shards. All processes call this."""
    weights = {}
    for name, value in state.objective.state_dict().items():
        mine = distributed.local(value)
        if state.averager is not None:
            mine = state.averager.tensors.get(name, mine)
        weights[name] = distributed.full(value, mine, state.world)
    return weights


def export(task: Task, objective: nn.Module, folder: Path) -> None:
    """Write a bundle beside ``folder``, then put it in its place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        task.export(objective, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_pixels(name: str, picture: Tensor) -> np.ndarray:
    """[H, W, 3] in [0, 1] as uint8."""
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{name}: expected a picture [H, W, 3], got {list(picture.shape)}")
    return picture.detach().float().cpu().clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
