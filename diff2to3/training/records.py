"""Means over the steps between two records of the log."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diff2to3.training import distributed
from diff2to3.training.distributed import World
from diff2to3.training.loggers import Console, Logger


class Records:
    """Gathers what steps report and writes it to the loggers (on the main process)."""

    def __init__(self, loggers: list[Logger], world: World) -> None:
        self.loggers, self.world = loggers, world
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Any] = {}
        self._items = self._steps = 0
        self._norm = self._rate = self._busy = 0.0
        self._started = time.perf_counter()

    def add(self, losses: list[dict[str, Tensor]], items: int, norm: float, rate: float, busy: float) -> None:
        """A step: this process's losses an item, the items of all processes, gradient norm, learning rate,
        seconds in the step (the rest was waiting for data, or saving)."""
        for part in losses:
            for name, value in part.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.sum()
        self._items += items
        self._steps += 1
        self._norm, self._rate = self._norm + norm, rate
        self._busy += busy

    def write(self, step: int) -> None:
        """One training record: means since the last. All processes call this."""
        names = sorted(self._sums)
        sums = distributed.total([float(self._sums[name]) for name in names], self.world)
        seconds = time.perf_counter() - self._started
        values: dict[str, Any] = {n: s / self._items for n, s in zip(names, sums, strict=True)}
        values = {"loss": values.pop("loss"), **values}
        values["lr"] = self._rate
        values["grad_norm"] = self._norm / self._steps
        values["items_per_s"] = round(self._items / seconds, 3)
        values["s_per_step"] = round(seconds / self._steps, 4)
        values["busy"] = round(self._busy / seconds, 3)
        if self.world.device.type == "cuda":
            values["peak_gb"] = round(torch.cuda.max_memory_allocated(self.world.device) / 1e9, 3)
        self.put("train", step, values)
        self._begin()

    def put(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """A record of another kind."""
        for logger in self.loggers:
            logger.write(kind, step, values)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        for logger in self.loggers:
            logger.picture(name, step, pixels)

    def advance(self, step: int) -> None:
        for logger in self.loggers:
            if isinstance(logger, Console):
                logger.advance(step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
