"""What a run will take, without running it: parameters, memory and speed on a GPU that need not be here.

Memory of weights and optimiser follows from the parameters. Activations and operations are counted in one
forward pass of a small batch on the CPU, which keeps nothing for a backward pass, and scaled to a whole batch
by its voxels (or items).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from diff2to3.data.loader import LoaderConfig
from diff2to3.errors import InputError
from diff2to3.kernels import sparse_conv as _registered  # noqa: F401  (torch.ops.diff2to3.sparse_conv)
from diff2to3.training.batches import tensors_in
from diff2to3.training.config import TrainConfig
from diff2to3.training.precision import autocast
from diff2to3.training.task import Randomness, Task, seeded


@dataclass(frozen=True)
class Gpu:
    """Memory in GB (10⁹ bytes); dense peak rates of matrix products in TFLOP/s, as the makers state them."""

    memory: float
    half: float
    single: float


GPUS = {
    "b200": Gpu(180, 2250, 75),
    "h200": Gpu(141, 989, 67),
    "h100": Gpu(80, 989, 67),
    "a100": Gpu(80, 312, 19.5),
    "a100-40gb": Gpu(40, 312, 19.5),
    "l40s": Gpu(48, 362, 91.6),
    "a6000": Gpu(48, 155, 38.7),
    "4090": Gpu(24, 165, 82.6),
    "3090": Gpu(24, 71, 35.6),
}
#: The share of the peak that estimates of speed assume.
EFFICIENCY = 0.35


@dataclass(frozen=True)
class Probe:
    """One forward pass: how much there was, what it keeps for the backward pass, and what it computes.

    saved          bytes kept
    blocks_saved   of those, kept within each block
    blocks_inputs  bytes that each block is given
    operations     floating-point operations of matrix products, convolutions and attention
    """

    items: int
    voxels: int
    saved: int
    blocks_saved: list[int]
    blocks_inputs: list[int]
    operations: int
    seconds: float
    precision: str

    def kept(self, recompute: bool) -> int:
        """Bytes of activations at their peak; with recomputation, the blocks' inputs and one block."""
        if not recompute or not self.blocks_saved:
            return self.saved
        return self.saved - sum(self.blocks_saved) + sum(self.blocks_inputs) + max(self.blocks_saved)


def report(task: Task, config: TrainConfig, gpu: str, num_gpus: int) -> str:
    """The text of ``--dry-run``."""
    with seeded(config.seed):
        objective = task.objective()
    objective.train()
    lines = ["parameters", *_parameter_lines(objective)]
    blocks = task.blocks(objective)
    sharded = config.parallel == "fsdp2" and num_gpus > 1
    fixed = _fixed_memory(objective, blocks, config, num_gpus if sharded else 1)
    lines += ["", f"memory of each of {num_gpus} {gpu.upper()}" + (", sharded (fsdp2)" if sharded else "")]
    lines += [_row(name, _bytes_text(size)) for name, size in fixed.items()]
    try:
        small, (items, voxels) = _batch(task, config)
        probe = measure(objective, blocks, small, config)
    except InputError as error:
        lines.append(f"  activations and speed are not estimated, for want of a batch: {error}")
        return "\n".join(lines)
    scale = voxels / probe.voxels if probe.voxels else items / probe.items
    activations = probe.kept(config.checkpoint_blocks) * scale
    total = sum(fixed.values()) + activations
    fits = "fits" if total < 0.9 * GPUS[gpu].memory * 1e9 else "does not fit"
    what = f"{items} items" + (f", {voxels:,} voxels" if voxels else "")
    lines += [
        _row(f"activations ({what})", _bytes_text(activations)),
        _row("in all", f"{_bytes_text(total)} of {GPUS[gpu].memory:g} GB: {fits}"),
        "  (counted in a forward pass on the CPU; the allocator's own share and temporary buffers come on top)",
        "",
        *_speed_lines(probe, scale, items, config, gpu, num_gpus),
    ]
    return "\n".join(lines)


def _parameter_lines(objective: nn.Module) -> list[str]:
    lines = []
    for name, child in objective.named_children():
        count = sum(p.numel() for p in child.parameters())
        trained = sum(p.numel() for p in child.parameters() if p.requires_grad)
        lines.append(_row(name, f"{count:,}" + ("" if trained == count else f" ({trained:,} trained)")))
    return [*lines, _row("in all", f"{sum(p.numel() for p in objective.parameters()):,}")]


def _bytes_text(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _row(name: str, value: str) -> str:
    return f"  {name:<44} {value}"


def _fixed_memory(
    objective: nn.Module, blocks: Sequence[nn.Module], config: TrainConfig, shards: int
) -> dict[str, float]:
    """Bytes a GPU holds all the time, by kind; everything in float32."""
    every = sum(p.numel() for p in objective.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    sizes = {
        "weights": 4 * every / shards,
        "gradients": 4 * trained / shards,
        "AdamW": 8 * trained / shards,
        "average (EMA)": 4 * trained / shards if config.ema else 0.0,
    }
    if shards > 1:  # two blocks are whole at a time: the current one and the next
        whole = sorted(sum(p.numel() for p in block.parameters()) for block in blocks)
        rest = every - sum(whole)
        sizes["gathered blocks"] = 4.0 * (sum(whole[-2:]) + rest)
    return sizes


def _batch(task: Task, config: TrainConfig) -> tuple[Any, tuple[int, int]]:
    """A small batch to compute with, and how many items and voxels a whole one has to scale to.

    Without the data, a task's ``example`` makes both up, if it has one.
    """
    try:
        full = next(iter(task.loader(config.seed, 0, 1)))
    except InputError:
        example = getattr(task, "example", None)
        if example is None:
            raise
        return example()
    data: Any = getattr(task.config, "data", None)
    if not isinstance(getattr(data, "loader", None), LoaderConfig):
        return full, _size(full)
    # Tasks on a prepared dataset: one asset.
    loader = dataclasses.replace(data.loader, max_assets_per_batch=1, num_workers=0)
    smaller = dataclasses.replace(task.config, data=dataclasses.replace(data, loader=loader))
    make: Callable[[Any], Task] = type(task)
    return next(iter(make(smaller).loader(config.seed, 0, 1))), _size(full)


def _size(batch: Any) -> tuple[int, int]:
    """Items and voxels of a batch."""
    voxels = getattr(batch, "voxels", None)
    return len(batch.ids), len(voxels) if voxels is not None else 0


def measure(objective: nn.Module, blocks: Sequence[nn.Module], batch: Any, config: TrainConfig) -> Probe:
    """One forward pass on the CPU. A precision that the CPU lacks for some layer gives way to float32."""
    try:
        return _measure(objective, blocks, batch, config.precision)
    except RuntimeError:
        if config.precision == "fp32":
            raise
        return _measure(objective, blocks, batch, "fp32")


def _measure(objective: nn.Module, blocks: Sequence[nn.Module], batch: Any, precision: str) -> Probe:
    counter = SavedBytes(objective, blocks)
    flops = FlopCounterMode(
        display=False, custom_mapping={torch.ops.diff2to3.sparse_conv: _sparse_conv_flops}
    )
    started = time.perf_counter()
    with flops, counter.counting(), seeded(0), autocast(precision, torch.device("cpu")):
        objective(batch, Randomness(0, 0))
    seconds = time.perf_counter() - started
    items, voxels = _size(batch)
    operations = int(flops.get_total_flops())
    return Probe(items, voxels, counter.total, counter.within, counter.inputs, operations, seconds, precision)


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, without keeping them."""

    def __init__(self, objective: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.blocks = list(blocks)
        self.total = 0
        self.within = [0] * len(self.blocks)
        self.inputs = [0] * len(self.blocks)
        self._current: int | None = None
        self._seen: dict[int, StorageWeakRef] = {}
        self._weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    @contextmanager
    def counting(self) -> Iterator[None]:
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._enter(i)))
            handles.append(block.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, i: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._current = i
            self.inputs[i] += sum(_bytes(t) for t in tensors_in(inputs).values() if t.requires_grad)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._current = None

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        known = self._seen.get(place)
        if place in self._weights or (known is not None and not known.expired()):
            return
        self._seen[place] = StorageWeakRef(storage)
        self.total += storage.nbytes()
        if self._current is not None:
            self.within[self._current] += storage.nbytes()

    def _unpack(self, nothing: None) -> Tensor:
        raise RuntimeError("nothing was kept for a backward pass")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sparse_conv_flops(
    feats: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, *rest: Any, **named: Any
) -> int:
    """Two operations for each (neighbour that is there, input channel, output channel)."""
    pairs = int((table >= 0).sum())
    return 2 * pairs * weight.shape[-1] * weight.shape[0]


_sparse_conv_flops._get_raw = True  # type: ignore[attr-defined]  # tensors, not only their shapes


def _speed_lines(
    probe: Probe, scale: float, items: int, config: TrainConfig, gpu: str, num_gpus: int
) -> list[str]:
    passes = 4 if config.checkpoint_blocks else 3  # forward, twice that for backward, forward again
    operations = probe.operations * scale * passes * config.accumulate
    peak = (GPUS[gpu].single if config.precision == "fp32" else GPUS[gpu].half) * 1e12
    seconds = operations / (peak * EFFICIENCY)
    per_second = items * config.accumulate * num_gpus / seconds if seconds else float("inf")
    days = config.steps * seconds / 86400
    return [
        f"speed, if {EFFICIENCY:.0%} of the peak of {peak / 1e12:g} TFLOP/s is reached (rendering is not counted)",
        _row("operations a step and GPU", f"{operations / 1e12:.3g} TFLOP"),
        _row("time a step", f"{seconds * 1e3:.3g} ms"),
        _row("throughput", f"{per_second:.4g} items/s"),
        _row(f"{config.steps:,} steps", f"{days:.2g} days" if days > 1 else f"{days * 24:.2g} hours"),
        f"  (the forward pass of {probe.items} items took {probe.seconds:.2f} s on this CPU in {probe.precision})",
    ]
