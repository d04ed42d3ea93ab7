"""Beginning from something: the same run again, or another run's weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from diff2to3.checkpoint import MODEL_FILE, load_strictly, read_bundle, read_tensors
from diff2to3.config import config_to_dict
from diff2to3.errors import InputError
from diff2to3.training import distributed
from diff2to3.training.checkpoints import Checkpoints, verified
from diff2to3.training.state import TrainState

#: Options of ``train`` that a resumed run may have otherwise.
MAY_CHANGE = {
    "out", "steps", "init_from", "accumulate", "parallel", "find_unused", "checkpoint_blocks", "compile",
    "device", "threads", "save_every", "keep", "keep_every", "save_in_background", "log_every", "sample_every",
    "validate_every", "export_every", "loggers", "wandb_project", "wandb_mode",
}  # fmt: skip
#: Last parts of keys, anywhere, that do not change what is trained.
MAY_CHANGE_ANYWHERE = {"root", "num_workers", "prefetch", "max_assets_per_batch", "max_voxels_per_batch"}


def check_config(out: Path, config: Any, allow_changes: bool) -> None:
    """Compare with the configuration that the run in ``out`` was started with.

    InputError that names what differs and may not, unless changes are allowed: then a warning.
    """
    path = out / "config.yaml"
    if not path.exists() or not any((out / "checkpoints").glob("step-*")):
        return
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _flat(config_to_dict(config))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key)
    ]
    if changed and not allow_changes:
        raise InputError(
            f"{out}: holds a run with another configuration: {'; '.join(changed)}. Use the old values, another "
            "train.out, or --allow-changes"
        )
    if changed:
        print(f"warning: going on with a changed configuration: {'; '.join(changed)}", file=sys.stderr)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return parts[-1] in MAY_CHANGE_ANYWHERE or (parts[0] == "train" and parts[1] in MAY_CHANGE)


@torch.no_grad()
def initialize(state: TrainState, source: Path) -> None:
    """Weights (and averages) from a bundle's networks of the same names, or from a run's averages."""
    if (source / MODEL_FILE).is_file():
        _from_bundle(state, source)
    elif (source / "checkpoints").is_dir():
        _from_run(state, source)
    else:
        raise InputError(f"train.init_from: {source} is neither a bundle nor a run folder")
    if state.averager is not None:
        for name, value in state.trained().items():
            state.averager.tensors[name].copy_(distributed.local(value))


def _from_bundle(state: TrainState, folder: Path) -> None:
    networks = dict(state.objective.named_children())
    info = read_bundle(folder)
    shared = [name for name in info.networks if name in networks]
    if not shared:
        raise InputError(
            f"{folder}: none of its networks ({', '.join(info.networks)}) is one of {', '.join(networks)}"
        )
    if any(distributed.is_sharded(value) for value in state.trained().values()):
        raise InputError("train.init_from: a bundle cannot be loaded into a sharded model yet")
    for name in shared:
        path = folder / info.networks[name].file
        load_strictly(networks[name], read_tensors(path), path)


def _from_run(state: TrainState, folder: Path) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", state.world)
    steps = checkpoints.steps()
    if not steps:
        raise InputError(f"{folder}: the run has no checkpoint yet")
    path = checkpoints.path(steps[-1])
    verified(path)
    stored = distributed.stored_tensors(path)
    model = state.objective.state_dict()
    source = {name: f"ema.{name}" if f"ema.{name}" in stored else f"model.{name}" for name in model}
    for name, value in model.items():
        if stored.get(source[name]) != tuple(value.shape):
            raise InputError(f"{path}: has no tensor {name} of {list(value.shape)}")
    read = {
        source[name]: distributed.on_cpu(distributed.local(value), value, state.world)
        for name, value in model.items()
    }
    distributed.read_tensors(path, read, state.world)
    for name, value in model.items():
        distributed.local(value).copy_(distributed.local(read[source[name]]))
