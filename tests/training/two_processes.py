"""One of two processes that try what training does together. Argument: a file for what this one found, as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch

from diff2to3.errors import InputError
from diff2to3.training import distributed, run
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World

#: Seconds that a process waits for another within a step.
PATIENCE = 3.0


def weights_in_use(how: str, world: World) -> dict[str, Any]:
    """Dtypes of a block's weights and gradients in a step in bfloat16, and how much this process would save."""
    config = TrainConfig(out="", precision="bf16", parallel=how)
    state, module = run.build(tiny.TinyTask(tiny.TinyConfig()), config, world)
    block, last = state.objective.denoiser.blocks[0], state.objective.denoiser.last
    seen = {}
    block.up.register_forward_hook(lambda m, x, y: seen.update(block=str(m.weight.dtype)))
    block.register_forward_hook(lambda m, x, y: seen.update(stream=str(y.dtype)))
    last.register_forward_hook(lambda m, x, y: seen.update(last=str(m.weight.dtype)))
    points = torch.randn(4, 12, generator=torch.Generator().manual_seed(world.rank))
    with torch.autocast("cpu", torch.bfloat16):
        batch = tiny.TinyBatch(0, ("a", "b", "c", "d"), points, {})
        loss = module(batch, run_randomness())["loss"].sum()
    loss.backward()
    norm = distributed.gradient_norm([p.grad for p in state.trained().values()], world)
    seen["gradient"] = str(distributed.local(block.up.weight.grad).dtype)
    return {**seen, "norm": float(norm), "saved": len(state.tensors())}


def run_randomness() -> Any:
    from diff2to3.training.task import Randomness

    return Randomness(0, 0)


def kernels_missing_on_one(world: World) -> str:
    """What a process says where the other's compiler failed."""
    run.library_for = lambda device: None if world.rank else object()
    gpu = World(world.rank, world.size, torch.device("cuda"), world.control)
    try:
        distributed.together(lambda: run.check_kernels(TrainConfig(out=""), gpu), world)
    except (InputError, distributed.ElsewhereError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def waits(world: World) -> dict[str, float]:
    """Seconds that the first process waited for one that is slow with its results, and for one that hangs."""
    started = time.monotonic()
    if world.rank:
        time.sleep(PATIENCE + 2)
    distributed.wait_for_all(world)
    slow = time.monotonic() - started
    started = time.monotonic()
    if world.rank:
        time.sleep(PATIENCE + 4)
        return {"slow": slow}
    with contextlib.suppress(RuntimeError):
        distributed.total([1.0], world)
        return {"slow": slow, "hang": -1.0}
    return {"slow": slow, "hang": time.monotonic() - started}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.joined("cpu", PATIENCE / 60) as world:
        found: dict[str, Any] = {"kernels": kernels_missing_on_one(world)}
        found["ddp"] = weights_in_use("ddp", world)
        if distributed.can_shard_on_cpu():
            found["fsdp2"] = weights_in_use("fsdp2", world)
        found["waits"] = waits(world)  # last: a timeout ends the group
        Path(sys.argv[1]).write_text(json.dumps(found))
        os._exit(0)  # nobody to leave with
