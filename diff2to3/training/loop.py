"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.training import distributed, faults
from diff2to3.training.batches import to_device
from diff2to3.training.checkpoints import Checkpoints
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World
from diff2to3.training.faults import StopRequest
from diff2to3.training.precision import autocast
from diff2to3.training.records import Records
from diff2to3.training.results import Results
from diff2to3.training.schedules import rate_factor
from diff2to3.training.state import TrainState
from diff2to3.training.task import Loader, Randomness, seeded

#: Seconds after a failure of the loader in which our own signal may still arrive.
_GRACE = 0.5


class Trainer:
    """One run in one process: ``fit`` goes from the state's step to the last one."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        module: nn.Module,
        loaders: list[Loader],
        world: World,
        checkpoints: Checkpoints,
        records: Records,
        results: Results,
        stop: StopRequest,
    ) -> None:
        """``module`` is the state's objective as :func:`distributed.parallelize` returned it; ``loaders`` are
        of this process's parts of every step."""
        self.config, self.state, self.module = config, state, module
        self.loaders, self.world, self.checkpoints = loaders, world, checkpoints
        self.records, self.results, self.stop = records, results, stop
        self.parameters = list(state.trained().values())

    def fit(self, after_step: Callable[[], None] | None = None) -> bool:
        """Train to the last step; False if it stopped before that because it was asked to."""
        config, state = self.config, self.state
        parts = [iter(loader) for loader in self.loaders]
        saved = state.step
        while state.step < config.steps:
            batches, num_items = self._next_batches(parts)
            if batches is None:
                break
            self._step(batches, num_items)
            if after_step is not None:
                after_step()
            if state.step % config.save_every == 0:
                self.save(config.save_in_background)
                saved = state.step
            self.checkpoints.check()
            self.results.after_step(state)
        if saved != state.step:
            self.save(background=False)
        self.checkpoints.finish()
        return state.step >= config.steps

    def _next_batches(self, parts: list[Iterator[Any]]) -> tuple[list[Any] | None, int]:
        """This process's parts of the next step and the items of all processes' parts; None to stop."""
        batches: list[Any] = []
        failure: BaseException | None = None
        if not self.stop.requested:
            try:
                batches = [next(part) for part in parts]
            except Exception as error:  # the loader's workers get a group's SIGTERM too, and die of it
                failure = error
                time.sleep(0.0 if self.stop.requested else _GRACE)
        failed = failure is not None and not self.stop.requested
        items, stops, failures = distributed.total(
            [sum(len(batch.ids) for batch in batches), self.stop.requested, failed], self.world
        )
        if failure is not None and failed:
            raise failure
        if failures:
            raise distributed.ElsewhereError("the loader of another process failed")
        return (None, 0) if stops else (batches, int(items))

    def _step(self, batches: list[Any], num_items: int) -> None:
        """Accumulate, check, clip, update, average, log."""
        config, state = self.config, self.state
        started = time.perf_counter()
        try:
            losses = self._accumulate(batches, num_items)
        except torch.OutOfMemoryError as error:
            raise MemoryError(_out_of_memory(state.step, batches)) from error
        norm = distributed.gradient_norm([p.grad for p in self.parameters if p.grad is not None], self.world)
        norm_value = float(norm) / state.scale.value
        loss = distributed.total([sum(float(part["loss"].sum()) for part in losses)], self.world)[0]
        if not math.isfinite(loss) or not (math.isfinite(norm_value) or state.scale.enabled):
            faults.stop_not_finite(Path(config.out), state, batches, losses, norm_value, self.world.rank)
        rate = config.lr * rate_factor(
            config.schedule,
            state.step,
            config.steps,
            warmup=config.warmup,
            decay=config.decay,
            floor=config.min_lr,
        )
        scale = state.scale.value
        if state.scale.accepts(norm_value):
            self._update(rate, norm, scale)
        for parameter in self.parameters:
            parameter.grad = None
        state.step += 1
        state.loader = self.loaders[0].state_dict()
        self.records.add(losses, num_items, norm_value, rate, time.perf_counter() - started)
        if state.step % config.log_every == 0 or state.step == config.steps:
            self.records.write(state.step)
        self.records.advance(state.step)

    def _accumulate(self, batches: list[Any], num_items: int) -> list[dict[str, Tensor]]:
        """Gradients of the mean loss over the items of all processes, times the loss scale."""
        config, state = self.config, self.state
        randomness = Randomness(config.seed, state.step)
        factor = state.scale.value * self.world.size / num_items  # gradients become means over processes
        losses = []
        for i, batch in enumerate(batches):
            part = self.world.rank * len(batches) + i
            moved = to_device(batch, self.world.device)
            with (
                distributed.synchronized(self.module, last=i == len(batches) - 1),
                seeded(randomness.number("part", part), self.world.device),
            ):
                with (
                    autocast(config.precision, self.world.device)
                    if config.precision != "fp32"
                    else nullcontext()
                ):
                    found = self.module(moved, randomness)
                _check_losses(found, len(batch.ids))
                (found["loss"].float().sum() * factor).backward()
            losses.append({name: value.detach().float() for name, value in found.items()})
        return losses

    @torch.no_grad()
    def _update(self, rate: float, norm: Tensor, scale: float) -> None:
        """Unscale and clip the gradients, step, average."""
        config, state = self.config, self.state
        gradients = [distributed.local(p.grad) for p in self.parameters if p.grad is not None]
        factor = torch.full_like(norm, 1 / scale)
        if config.clip is not None:
            factor = factor * (config.clip / (norm / scale + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        if state.averager is not None:
            state.averager.update(state.updates)
        state.updates += 1

    def save(self, background: bool) -> None:
        """Checkpoint the state as it is now."""
        info = self.state.numbers() | {"parts": self.world.size * self.config.accumulate}
        self.checkpoints.save(self.state.step, self.state.tensors(), info, background)


def _check_losses(losses: dict[str, Tensor], num_items: int) -> None:
    """ValueError unless there is a loss, and every value has one number an item."""
    if "loss" not in losses:
        raise ValueError(f"objective: expected 'loss' among its values, got {', '.join(losses) or 'none'}")
    for name, value in losses.items():
        if value.shape != (num_items,):
            raise ValueError(f"objective: {name}: expected shape [{num_items}], got {list(value.shape)}")


def _out_of_memory(step: int, batches: list[Any]) -> str:
    voxels = [len(v) for batch in batches if (v := getattr(batch, "voxels", None)) is not None]
    what = f"parts of {', '.join(str(len(batch.ids)) for batch in batches)} items"
    what += f" ({', '.join(f'{n:,}' for n in voxels)} voxels)" if voxels else ""
    return (
        f"step {step}: out of GPU memory with {what}; make parts smaller (data.loader.max_voxels_per_batch) and "
        "train.accumulate larger, or set train.checkpoint_blocks=true or train.parallel=fsdp2"
    )
