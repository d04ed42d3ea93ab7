"""train/lookalikes.py: from a prepared data set to what each view's look-alikes are like, and to prototypes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from tqdm import tqdm

from diff2to3.config import load_config
from diff2to3.data.loader import chosen_assets
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.shards import Part, assemble, part_path, write_part
from diff2to3.data.store import AssetStore, occupancy
from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.flow.image_tower import PrototypeHead
from diff2to3.flow.tokens import ImageTokens
from diff2to3.training import resume
from diff2to3.training.distributed import World
from diff2to3.training.lookalikes import (
    Memory,
    Metric,
    begin_prototypes,
    expected_occupancy,
    families,
    learn_metric,
    look_alikes,
)
from diff2to3.training.task import seeded
from diff2to3.training.tasks.flow import FlowRunConfig, FlowTask
from diff2to3.training.tasks.flow_objective import FlowObjective


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lookalikes.py",
        description="Write the occupancy that each training view's look-alikes have as the stage that data.expected "
        "names, and a bundle with prototypes to begin stage 1 with to train.out.",
    )
    parser.add_argument("config", type=Path, help="YAML file of the run that is to follow")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that differ")
    parser.add_argument(
        "--steps", type=int, default=700, help="of learning the likeness (default: %(default)s)"
    )
    parser.add_argument(
        "--own-share",
        type=float,
        default=0.2,
        help="share of the asset's own occupancy in what is expected (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program; exit status 2 for bad input."""
    args = build_parser().parse_args(argv)
    try:
        config = load_config(FlowRunConfig, args.config, args.overrides)
        if config.data.expected is None or not config.model.coarse_prototypes:
            raise InputError(f"{args.config}: needs data.expected and model.coarse_prototypes")
        if args.steps < 1 or not 0 <= args.own_share <= 1:
            raise InputError("--steps, --own-share: expected a positive number, and a share from 0 to 1")
        make(config, args.steps, args.own_share)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(config: FlowRunConfig, steps: int, own_share: float) -> None:
    """All of it."""
    task = FlowTask(config)
    with seeded(config.train.seed):
        objective = task.objective()
    if config.train.init_from is not None:
        resume.initialize(objective, Path(config.train.init_from), World(0, 1, torch.device("cpu")))
    network: Any = objective.network
    head: PrototypeHead = network.coarse_head
    resolution = task.grid_resolution
    store = AssetStore(config.data.root, [config.data.tokens, f"voxels_{resolution}"])
    assets = chosen_assets(store, config.data.loader.split, config.data.loader.exclude)
    memory = read_memory(store, assets, objective, head, resolution)
    metric: Metric | None = None
    with tqdm(total=steps, desc="likeness", unit="step") as progress:
        for _, loss, latest in learn_metric(memory, head.resolution, steps, config.train.seed):
            metric = latest
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
            progress.update()
    assert metric is not None
    found, weights = look_alikes(memory, metric)
    assert config.data.expected is not None
    write_expected(store, assets, config.data.expected, memory, found, weights, own_share)
    begin_prototypes(head, memory, metric, found, weights, own_share, config.train.seed)
    task.export(objective, Path(config.train.out))


@torch.no_grad()
def read_memory(
    store: AssetStore,
    assets: Sequence[PlannedAsset],
    objective: FlowObjective,
    head: PrototypeHead,
    resolution: int,
) -> Memory:
    """All views of these assets."""
    descriptors, owner, grids = [], [], []
    for k, asset in enumerate(tqdm(assets, desc="views", unit="asset")):
        stored = store.open(asset, objective.stages.tokens)
        latents = torch.stack(
            [stored.tensors(name)["latents"].float() for name in sorted(stored.entry.members)]
        )
        image = ImageTokens.from_latents(objective.image(latents), objective.image_patch_size)
        descriptors.append(head.descriptor(image))
        owner += [k] * len(latents)
        grids.append(occupancy(store.coords(asset, resolution), resolution))
    ids = [asset.id for asset in assets]
    return Memory(torch.cat(descriptors), torch.tensor(owner), families(ids), torch.stack(grids))


def write_expected(
    store: AssetStore,
    assets: Sequence[PlannedAsset],
    stage: str,
    memory: Memory,
    found: torch.Tensor,
    weights: torch.Tensor,
    own_share: float,
) -> None:
    """The stage: a member a view, {occupancy: uint8 [R, R, R]}, of 255."""
    shards: dict[int, list[int]] = {}
    for k, asset in enumerate(assets):
        shards.setdefault(asset.shard, []).append(k)
    for shard, members in tqdm(shards.items(), desc=stage, unit="shard"):
        for k in members:
            rows = (memory.owner == k).nonzero()[:, 0]
            grids = expected_occupancy(memory, found[rows], weights[rows], memory.owner[rows], own_share)
            data = {
                f"{v:03d}.safetensors": save_tensors({"occupancy": (255 * grid).round().to(torch.uint8)})
                for v, grid in enumerate(grids)
            }
            path = part_path(store.root, stage, shard, assets[k].key)
            write_part(path, assets[k].key, Part(data, {"num_views": len(rows)}), stage)
        assemble(store.root, stage, shard, [(assets[k].id, assets[k].key, stage) for k in members])
    write_atomic(store.root / stage / "settings.json", "{}\n")
