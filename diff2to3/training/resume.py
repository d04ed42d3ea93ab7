"""Beginning from something: the same run again, or another run's weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from diff2to3.checkpoint import MODEL_FILE, load_strictly, read_bundle
from diff2to3.config import config_to_dict
from diff2to3.errors import InputError
from diff2to3.tensors import read_tensors
from diff2to3.training import distributed
from diff2to3.training.checkpoints import Checkpoints, verified
from diff2to3.training.distributed import World

#: Options of ``train`` that a resumed run may have otherwise.
MAY_CHANGE = {
    "out", "steps", "init_from", "accumulate", "parallel", "find_unused", "checkpoint_blocks", "compile",
    "conv_backend", "attention_backend", "device", "kernels", "timeout", "threads", "save_every",
    "keep", "keep_every", "save_in_background", "log_every", "sample_every",
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


@contextmanager
def only_process(out: Path, world: World) -> Iterator[None]:
    """The run folder, made if need be and locked: InputError if another program is training in it."""
    lock = None

    def take() -> None:
        nonlocal lock
        if not world.main:
            return
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        try:
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"{out}: another process is training here; stop it, or use another train.out"
            ) from error
        except OSError:  # a file system without locks
            pass

    distributed.together(take, world)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


@torch.no_grad()
def initialize(objective: nn.Module, source: Path, world: World) -> None:
    """Weights from a bundle's networks of the same names, and what normalises their inputs there; or a run's averages.
    All processes call this.
    """
    if (source / MODEL_FILE).is_file():
        _from_bundle(objective, source)
    elif (source / "checkpoints").is_dir():
        _from_run(objective, source, world)
    else:
        raise InputError(f"train.init_from: {source} is neither a bundle nor a run folder")


def _from_bundle(objective: nn.Module, folder: Path) -> None:
    networks = dict(objective.named_children())
    info = read_bundle(folder)
    shared = [name for name in info.networks if name in networks]
    if not shared:
        raise InputError(
            f"{folder}: none of its networks ({', '.join(info.networks)}) is one of {', '.join(networks)}"
        )
    for name in shared:
        path = folder / info.networks[name].file
        load_strictly(networks[name], read_tensors(path), path)
    if hasattr(objective, "adopt"):
        try:
            objective.adopt(info.settings)  # type: ignore[operator]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder / MODEL_FILE}: settings do not fit this run: {error}") from error


def _from_run(objective: nn.Module, folder: Path, world: World) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", world)
    steps = checkpoints.steps()
    if not steps:
        raise InputError(f"{folder}: the run has no checkpoint yet")
    path = checkpoints.path(steps[-1])
    verified(path)
    stored = distributed.stored_tensors(path)
    model = objective.state_dict()
    source = {name: f"ema.{name}" if f"ema.{name}" in stored else f"model.{name}" for name in model}
    for name, value in model.items():
        if stored.get(source[name]) != tuple(value.shape):
            raise InputError(f"{path}: has no tensor {name} of {list(value.shape)}")
    read = {source[name]: value.clone() for name, value in model.items()}
    distributed.read_tensors(path, read, world)
    for name, value in model.items():
        value.copy_(read[source[name]])
