"""Several processes: the only module that uses ``torch.distributed`` or reads its environment variables.

Started by torchrun, a process finds its place in RANK, LOCAL_RANK and WORLD_SIZE; otherwise it is alone, and
everything here is a no-op. Small agreements between processes (counts, stop requests, checkpoints) go over
gloo on the CPU, gradients and sharded weights over NCCL on GPUs.
"""

from __future__ import annotations

import datetime
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diff2to3.errors import Diff2to3Error, InputError
from diff2to3.machine import best_device

#: Long enough for rank 0 to validate, or all to write a checkpoint, while the others wait.
_PATIENCE = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    control: Any = None  # gloo group of all, for the loop
    patient: Any = None  # gloo group of all, to wait for what takes longer than a step
    storage: Any = None  # gloo group of all, for checkpoints written in the background
    alone: Any = None  # gloo group of this process only
    mesh: DeviceMesh | None = None  # of the devices
    cpu_mesh: DeviceMesh | None = None  # the same processes, for shards copied to the CPU

    @property
    def main(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0


@contextmanager
def joined(device: str | None, timeout: float = 10.0) -> Iterator[World]:
    """The world of this process: joined on entering, left on leaving.

    timeout  minutes that a process waits for another within a step, over NCCL and gloo alike: a process that hangs
             ends the run after that. Only :func:`wait_for_all` and checkpoints have longer.
    """
    kind = device or best_device().type
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(kind if kind != "cuda" else f"cuda:{local_rank}")
    if place.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{local_rank + 1} processes on this machine, {torch.cuda.device_count()} GPUs: "
                "lower --nproc-per-node, or train.device=cpu"
            )
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(0, 1, place)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    prompt = datetime.timedelta(minutes=timeout)
    dist.init_process_group(backend, timeout=prompt)
    rank, size = dist.get_rank(), dist.get_world_size()
    control, patient, storage = [
        dist.new_group(backend="gloo", timeout=limit) for limit in (prompt, _PATIENCE, _PATIENCE)
    ]
    alone = [dist.new_group([r], backend="gloo") for r in range(size)][rank]
    mesh = init_device_mesh(place.type, (size,))
    cpu_mesh = mesh if place.type == "cpu" else init_device_mesh("cpu", (size,))
    yield World(rank, size, place, control, patient, storage, alone, mesh, cpu_mesh)
    dist.destroy_process_group()  # not after an error: it would wait for what the others will never send


def own_rank() -> int:
    """This process's rank, before or without joining the others."""
    return int(os.environ.get("RANK", 0))


def total(values: Sequence[float], world: World) -> list[float]:
    """The sums of ``values`` over all processes, in float64."""
    if world.size == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=world.control)
    return [float(value) for value in sums]


def wait_for_all(world: World) -> None:
    """Return when every process has come here, which may take the main one hours."""
    if world.size > 1:
        dist.all_reduce(torch.zeros(1), group=world.patient)


def from_main(value: Any, world: World, group: Any = None) -> Any:
    """The main process's ``value``, on all."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group or world.control)
    return box[0]


def gathered(value: Any, world: World, group: Any = None) -> list[Any]:
    """Every process's ``value``, in order of rank."""
    if world.size == 1:
        return [value]
    box: list[Any] = [None] * world.size
    dist.all_gather_object(box, value, group=group or world.control)
    return box


class ElsewhereError(Diff2to3Error, RuntimeError):
    """Another process failed, and says why."""


def together(action: Callable[[], None], world: World, group: Any = None) -> None:
    """Do ``action`` on every process; if it fails on some, these raise that and the others
    :class:`ElsewhereError`."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:
        problem = error
    others = [text for text in gathered(str(problem) if problem else None, world, group) if text]
    if problem is not None:
        raise problem
    if others:
        raise ElsewhereError(f"on another process: {others[0]}")


def parallelize(
    objective: nn.Module,
    blocks: Iterable[nn.Module],
    how: str,
    world: World,
    find_unused: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """``objective`` so that gradients are means over processes; sharded in place by fsdp2.

    A single process gets the objective itself. fsdp2 gathers the blocks' weights in ``dtype``, in which autocast would
    use them anyway, half as many bytes; all other weights, and the sums of gradients, stay in float32.
    """
    if world.size == 1:
        return objective
    if how == "ddp":
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        no_buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return DistributedDataParallel(
            objective, find_unused_parameters=find_unused, gradient_as_bucket_view=True, **no_buffers
        )
    _check_shardable(objective, world)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=gathered_in(dtype))
    fully_shard(objective, mesh=world.mesh)
    return objective


def gathered_in(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights in ``dtype``, gradients in float32; inputs as they are, so that the residual stream stays in float32."""
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def can_shard_on_cpu() -> bool:
    """Whether this torch has fsdp2 on CPUs, as torch 2.7 and later do."""
    return hasattr(torch.cpu.Stream, "record_event")


def _check_shardable(objective: nn.Module, world: World) -> None:
    if world.device.type == "cpu" and not can_shard_on_cpu():
        raise InputError(
            f"parallel=fsdp2: torch {torch.__version__} has it on GPUs only; use ddp, or torch 2.7"
        )
    for name, value in objective.named_parameters():
        if value.ndim == 0:
            raise InputError(f"parallel=fsdp2: {name} is a single number, which cannot be sharded; use ddp")


@contextmanager
def synchronized(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged between processes in backward passes only in the ``last`` part of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of ``tensor``."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(gradients: Sequence[Tensor], world: World) -> Tensor:
    """The norm of all gradients together, the same on every process."""
    if not gradients:
        return torch.zeros(())
    squares = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients])).square().sum()
    if any(is_sharded(gradient) for gradient in gradients):
        dist.all_reduce(squares)
    return squares.sqrt()


def full(tensor: Tensor, value: Tensor, world: World) -> Tensor:
    """All of a tensor laid out like ``tensor``, of which this process holds ``value``; on the CPU.

    To be called by all processes.
    """
    return _full(on_cpu(value, tensor, world))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_cpu(value: Tensor, like: Tensor, world: World) -> Tensor:
    """A copy on the CPU of the local ``value``, laid out over the processes like ``like``."""
    copy = value.detach().to("cpu", copy=True)
    if not isinstance(like, DTensor):
        return copy
    assert world.cpu_mesh is not None
    return DTensor.from_local(
        copy, world.cpu_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write tensors from :func:`on_cpu` with torch.distributed.checkpoint.

    Sharded ones are written by all processes, which all call this; whole ones by the main process alone.
    """
    sharded = any(is_sharded(value) for value in tensors.values())
    group = (world.storage if sharded else world.alone) if world.size > 1 else None
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), process_group=group)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors from :func:`on_cpu` from a folder that any number of processes wrote. All call this."""
    group = world.storage if world.size > 1 else None
    dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), process_group=group)


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a folder of :func:`write_tensors` holds."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(value.size) for name, value in metadata.items() if hasattr(value, "size")}
