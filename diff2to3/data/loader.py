"""Feeding a prepared dataset to a training loop.

    assets of the split -> shuffled a epoch -> packed to steps under a voxel budget -> one batch a rank ->
    decoded ahead

Everything follows from (seed, epoch, place in the epoch): the order of assets, which go to which rank, and
which of their views are taken. So a run that resumes, or that resumes with another number of ranks, goes on
with the assets that have not been seen in this epoch, and never with others.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diff2to3.data.pictures import PackedViews, pack_views, shrink, unpack_views
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.store import AssetStore, feature_stage, occupancy
from diff2to3.errors import InputError
from diff2to3.types import SparseVoxels, Views


@dataclass(frozen=True)
class LoaderConfig:
    """What a batch holds and how large it is.

    split                 of the assets; null for all
    exclude               assets whose ids match this are left out: "*~variant*" for no variants
    features              sets ("taef2", or "taef2.mean" for a mode) to lay side by side as ``Batch.voxels``
    views                 view set -> random views an asset
    view_size             pixels a side that views are shrunk to (a divisor of theirs); null as stored
    depths                read depth with the views, where it is stored (not together with view_size)
    occupancy             resolutions of dense occupancy grids
    tensors               "stage/member" to read as it is, for stages this module does not know; of several
                          members ("stage/*.safetensors") a random one an asset, the same of every stage that
                          is asked for with the same pattern and has the same members
    max_voxels_per_batch  voxels a rank and step at most
    max_assets_per_batch  assets a rank and step at most; null for no limit
    max_voxels_per_asset  larger assets are left out, and counted; null for the batch's limit
    num_workers           decoding processes a rank; 0 decodes in the loop
    prefetch              batches a worker keeps ready
    """

    split: str | None = "train"
    exclude: str | None = None
    features: list[str] = field(default_factory=list)
    views: dict[str, int] = field(default_factory=dict)
    view_size: int | None = None
    depths: bool = False
    occupancy: list[int] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    max_voxels_per_batch: int = 32768
    max_assets_per_batch: int | None = None
    max_voxels_per_asset: int | None = None
    num_workers: int = 2
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("max_voxels_per_batch", "max_assets_per_batch", "max_voxels_per_asset", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name, count in self.views.items():
            if count < 1:
                raise ValueError(f"views.{name}: expected a positive number, got {count}")
        if self.depths and self.view_size is not None:
            raise ValueError("depths: cannot be shrunk; leave out view_size")


@dataclass(frozen=True)
class Batch:
    """B assets.

    step       steps before this one since the start of training
    ids        B asset ids
    voxels     features on the active voxels, if asked for
    views      set -> n views an asset, [B * n, ...]: views i*n to (i+1)*n belong to asset i
    occupancy  resolution -> bool [B, R, R, R]
    tensors    "stage/member" -> B dicts of tensors
    state      the loader's state after this batch
    """

    step: int
    ids: tuple[str, ...]
    voxels: SparseVoxels | None
    views: dict[str, Views]
    occupancy: dict[int, Tensor]
    tensors: dict[str, list[dict[str, Tensor]]]
    state: dict[str, int]


@dataclass(frozen=True)
class Cursor:
    """A place in the endless sequence of assets: ``position`` assets of ``epoch`` are behind it."""

    step: int = 0
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of a step: (epoch, asset) pairs, and where the sequence stands after the step."""

    step: int
    items: tuple[tuple[int, int], ...]
    after: Cursor


class StepPacker:
    """Deals an endless shuffled sequence of assets to steps and ranks.

    Each asset goes to the rank that has the fewest voxels so far, if it fits there; the first that fits
    nowhere opens the next step. So every rank has at least one asset, none has more than ``budget`` voxels,
    and their loads differ by at most the largest asset.
    """

    def __init__(
        self, sizes: Sequence[int], budget: int, world_size: int, seed: int, max_assets: int | None = None
    ) -> None:
        """``sizes``: voxels an asset. Raises InputError when there is none, or one exceeds the budget."""
        if not len(sizes):
            raise InputError("no assets to load")
        if max(sizes) > budget:
            raise InputError(f"an asset has {max(sizes)} voxels, more than max_voxels_per_batch = {budget}")
        self.sizes, self.budget, self.world_size = sizes, budget, world_size
        self.seed, self.max_assets = seed, max_assets
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def order(self, epoch: int) -> np.ndarray:
        """The assets in the order of ``epoch``."""
        if self._order[0] != epoch:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
            self._order = (epoch, shuffled)
        return self._order[1]

    def next_step(self, cursor: Cursor) -> tuple[list[list[tuple[int, int]]], Cursor]:
        """The (epoch, asset) pairs of each rank for the step at ``cursor``, and the cursor after it."""
        ranks: list[list[tuple[int, int]]] = [[] for _ in range(self.world_size)]
        loads = [0] * self.world_size
        epoch, position = cursor.epoch, cursor.position
        while True:
            asset = int(self.order(epoch)[position])
            rank = self._rank_for(self.sizes[asset], loads, ranks)
            if rank is None:
                return ranks, Cursor(cursor.step + 1, epoch, position)
            ranks[rank].append((epoch, asset))
            loads[rank] += self.sizes[asset]
            position += 1
            if position == len(self.sizes):
                epoch, position = epoch + 1, 0

    def _rank_for(self, size: int, loads: list[int], ranks: list[list[tuple[int, int]]]) -> int | None:
        """The rank with the lowest load that has room for an asset of ``size``."""
        open_ranks = [
            r
            for r in range(self.world_size)
            if loads[r] + size <= self.budget and (self.max_assets is None or len(ranks[r]) < self.max_assets)
        ]
        return min(open_ranks, key=lambda r: (loads[r], r), default=None)


class TrainLoader:
    """An endless iterator of batches for one rank, which knows where it stands.

    loader = TrainLoader("data/mini", LoaderConfig(features=["taef2"], views={"target": 1}), seed=0)
    for batch in loader:
        ...
        checkpoint["loader"] = batch.state      # or loader.state_dict()
    """

    def __init__(
        self, root: str | Path, config: LoaderConfig, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises InputError when the dataset lacks what ``config`` asks for."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size, got {rank} of {world_size}")
        self.config, self.seed, self.rank = config, seed, rank
        stages, grid = _stages(Path(root), config)
        self.store = AssetStore(root, stages)
        assets, sizes, self.num_left_out = _choose(self.store, config, grid)
        self.assets = assets
        self.packer = StepPacker(
            sizes, config.max_voxels_per_batch, world_size, seed, config.max_assets_per_batch
        )
        self.cursor = Cursor()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the loader stands; the state moves as they are taken, not as they are read
        ahead."""
        workers = self.config.num_workers
        batches: DataLoader[Batch] = DataLoader(
            _BatchReader(self.store, self.assets, self.config, self.seed),
            batch_size=None,
            sampler=_Steps(self.packer, self.cursor, self.rank),
            num_workers=workers,
            prefetch_factor=self.config.prefetch if workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or it would draw its workers' seeds from the global one
            worker_init_fn=_leave_interrupts if workers else None,
            multiprocessing_context=_start_method() if workers else None,
        )
        for batch in batches:
            self.load_state_dict(batch.state)
            yield replace(batch, views={name: unpack_views(views) for name, views in batch.views.items()})

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: plain numbers, the same on all ranks."""
        return _state(self.cursor, self.seed, len(self.assets))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state. Raises InputError if it is of another seed or set of assets."""
        for name, now in (("seed", self.seed), ("num_assets", len(self.assets))):
            if state[name] != now:
                raise InputError(f"loader state: {name} was {state[name]}, is {now}: not the same run")
        self.cursor = Cursor(state["step"], state["epoch"], state["position"])


def _state(cursor: Cursor, seed: int, num_assets: int) -> dict[str, int]:
    return {**vars(cursor), "seed": seed, "num_assets": num_assets}


class _Steps(Sampler[StepPlan]):
    """One rank's step plans, from a cursor on, without end."""

    def __init__(self, packer: StepPacker, cursor: Cursor, rank: int) -> None:
        self.packer, self.cursor, self.rank = packer, cursor, rank

    def __iter__(self) -> Iterator[StepPlan]:
        cursor = self.cursor
        while True:
            ranks, after = self.packer.next_step(cursor)
            yield StepPlan(cursor.step, tuple(ranks[self.rank]), after)
            cursor = after


class _BatchReader(Dataset[Batch]):
    """Reads and decodes the batch of a step plan; runs in the loader's workers."""

    def __init__(
        self, store: AssetStore, assets: Sequence[PlannedAsset], config: LoaderConfig, seed: int
    ) -> None:
        self.store, self.assets, self.config, self.seed = store, assets, config, seed

    def __getitem__(self, plan: StepPlan) -> Batch:
        config = self.config
        assets = [self.assets[index] for _, index in plan.items]
        voxels = None
        if config.features:
            voxels = SparseVoxels.cat([self.store.features(asset, config.features) for asset in assets])
        grids = {
            r: torch.stack([occupancy(self.store.coords(a, r), r) for a in assets]) for r in config.occupancy
        }
        tensors = {name: [self._tensors(item, name) for item in plan.items] for name in config.tensors}
        views: dict[str, Any] = {name: self._views(plan, name, count) for name, count in config.views.items()}
        ids = tuple(asset.id for asset in assets)
        state = _state(plan.after, self.seed, len(self.assets))
        return Batch(plan.step, ids, voxels, views, grids, tensors, state)

    def _views(self, plan: StepPlan, name: str, count: int) -> Views | PackedViews:
        """``count`` random views an asset, without repetition, drawn from (seed, epoch, asset, set) alone.

        Packed to 8 bits a channel unless they were shrunk: they go to the loop through shared memory, of which a
        container has 64 MB, and one step's views in float32 can take more.
        """
        picked, whole = [], True
        for epoch, index in plan.items:
            stored = self.store.open(self.assets[index], f"views_{name}")
            total = int(stored.info["num_views"])
            if count > total:
                raise InputError(f"views.{name}: {count} were asked for, {total} are stored")
            salt = [ord(c) for c in name]
            generator = np.random.default_rng([self.seed, epoch, index, *salt])
            chosen = generator.choice(total, count, replace=False).tolist()
            views = stored.views(chosen, self.config.depths)
            small = shrink(views, self.config.view_size or views.width)
            whole = whole and small is views
            picked.append(small)
        together = Views(
            torch.cat([v.images for v in picked]),
            torch.cat([v.alphas for v in picked]),
            torch.cat([v.viewmats for v in picked]),
            torch.cat([v.Ks for v in picked]),
            torch.cat([v.depths for v in picked if v.depths is not None]) if self.config.depths else None,
        )
        return pack_views(together) if whole else together

    def _tensors(self, item: tuple[int, int], name: str) -> dict[str, Tensor]:
        """A member, or one of those that match, drawn from (seed, epoch, asset, pattern) alone."""
        epoch, index = item
        stage, _, member = name.partition("/")
        stored = self.store.open(self.assets[index], stage)
        if "*" in member:
            members = sorted(fnmatch.filter(stored.entry.members, member))
            if not members:
                raise InputError(f"{stored.tar}: {stored.entry.id} has no member {member!r}")
            salt = [ord(c) for c in member]
            member = str(np.random.default_rng([self.seed, epoch, index, *salt]).choice(members))
        return stored.tensors(member)


def _stages(root: Path, config: LoaderConfig) -> tuple[list[str], str]:
    """The stages that a loader reads, and the grid that batches are balanced by: the features', else the
    finest of those it reads, else the finest there is."""
    prepared = sorted(path.parent.name for path in root.glob("*/settings.json"))
    stages = [feature_stage(name) for name in config.features]
    stages += [f"voxels_{resolution}" for resolution in config.occupancy]
    stages += [f"views_{name}" for name in config.views]
    stages += [name.partition("/")[0] for name in config.tensors]
    for name in stages:
        if name not in prepared:
            raise InputError(f"{root}: no stage {name}; prepared are {', '.join(prepared) or 'none'}")
    if config.features:
        settings = json.loads((root / stages[0] / "settings.json").read_bytes())
        grid = f"voxels_{settings['resolution']}"
    else:
        stored = [int(name.removeprefix("voxels_")) for name in prepared if name.startswith("voxels_")]
        if not stored:
            raise InputError(f"{root}: no voxels to balance batches by; prepare the stage voxels")
        read = [int(s.removeprefix("voxels_")) for s in stages if s.startswith("voxels_")]
        grid = f"voxels_{max(read or stored)}"
    return list(dict.fromkeys([*stages, grid])), grid


def chosen_assets(store: AssetStore, split: str | None, exclude: str | None) -> list[PlannedAsset]:
    """The complete assets of a split without those whose id is like ``exclude``. InputError where none is left."""
    assets = store.assets(split)
    if not assets:
        splits = sorted({asset.split for asset in store.plan})
        raise InputError(f"{store.root}: no asset of split {split!r} is complete; splits are {splits}")
    if exclude is not None:
        assets = [asset for asset in assets if not fnmatch.fnmatchcase(asset.id, exclude)]
        if not assets:
            raise InputError(f"{store.root}: no asset is left without those like {exclude!r}")
    return assets


def _choose(store: AssetStore, config: LoaderConfig, grid: str) -> tuple[list[PlannedAsset], list[int], int]:
    """The assets that are complete and small enough, their voxel counts, and how many were too large."""
    candidates = chosen_assets(store, config.split, config.exclude)
    largest = config.max_voxels_per_asset or config.max_voxels_per_batch
    sizes = [int(store.info(asset, grid)["num_voxels"]) for asset in candidates]
    kept = [(asset, size) for asset, size in zip(candidates, sizes, strict=True) if 0 < size <= largest]
    if not kept:
        raise InputError(f"{store.root}: every asset has more than {largest} voxels")
    return [a for a, _ in kept], [s for _, s in kept], len(candidates) - len(kept)


def _start_method() -> str:
    """Forked workers would inherit the locks of this process's threads; spawned ones, ended with batches
    still in their queue, abort noisily, as the interpreter tears down a thread inside torch. The fork server
    has neither."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches a terminal's whole group; what happens then is for the training loop to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
