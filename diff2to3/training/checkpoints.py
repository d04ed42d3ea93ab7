"""Checkpoints of a run: written whole or not at all, verified before they are used, the oldest removed.

checkpoints/step-00001000/            complete, because only complete ones are ever given this name
    __0_0.distcp, .metadata           torch.distributed.checkpoint: any number of processes can read it
    checkpoint.json                   step, loader state, size and SHA-256 of every file

They are for resuming one's own runs: torch.distributed.checkpoint keeps its index as a pickle, so never resume
from a stranger's run folder. What is meant to be shared is the bundle.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diff2to3.checkpoint import read_json
from diff2to3.errors import Diff2to3Error, InputError
from diff2to3.files import file_sha256, sync_folder, write_atomic
from diff2to3.training import distributed
from diff2to3.training.distributed import World

_INFO = "checkpoint.json"
_VERSION = 1


class CheckpointError(Diff2to3Error, RuntimeError):
    """A checkpoint could not be written; the message names the last good one."""


class Checkpoints:
    """The checkpoints of one run folder. All processes make the same calls."""

    def __init__(self, folder: Path, world: World, keep: int = 3, keep_every: int | None = None) -> None:
        self.folder, self.world, self.keep, self.keep_every = folder, world, keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        names = (path.name for path in self.folder.glob("step-*") if (path / _INFO).is_file())
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], info: dict[str, Any], background: bool) -> None:
        """Write the checkpoint of ``step``; ``tensors`` are copies on the CPU (``distributed.on_cpu``).

        In the background, an error is raised by the next call of :meth:`save`, :meth:`check` or
        :meth:`finish`.
        """
        self.finish()

        def work() -> None:
            try:
                self._write(step, tensors, info)
            except BaseException as error:
                self._error = error

        if background:
            self._thread = threading.Thread(target=work, name="checkpoint")
            self._thread.start()
        else:
            work()
            self.check()

    def check(self) -> None:
        """Raise the error of a checkpoint that failed in the background."""
        if self._error is not None:
            error, self._error = self._error, None
            last = self.steps()
            kept = f"the last good one is {self.path(last[-1])}" if last else "there is none before it"
            raise CheckpointError(f"checkpoint not written: {_reason(error)}; {kept}") from error

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and raise its error."""
        self.wait()
        self.check()

    def _write(self, step: int, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> None:
        sharded = any(distributed.is_sharded(value) for value in tensors.values())
        if not (sharded or self.world.main):
            return
        group = self.world.storage if sharded else None
        world = self.world if sharded else World(0, 1, self.world.device)
        final, temporary = self.path(step), self.folder / f".step-{step:08d}.tmp"
        try:
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            distributed.together(lambda: _make_room(temporary, size) if world.main else None, world, group)
            distributed.write_tensors(temporary, tensors, self.world)
            own = sorted(temporary.glob(f"__{self.world.rank}_*.distcp"))
            parts = distributed.gathered(_fingerprints(own), world, group)
            if world.main:
                files = {name: value for part in parts for name, value in part.items()}
                files |= _fingerprints([temporary / ".metadata"])
                content = {"version": _VERSION, "step": step, **info, "files": files}
                write_atomic(temporary / _INFO, json.dumps(content, indent=1) + "\n")
                sync_folder(temporary)
                os.replace(temporary, final)
                sync_folder(self.folder)
                self._rotate()
        except BaseException:
            if world.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _rotate(self) -> None:
        """Remove what is neither among the newest nor a multiple of ``keep_every``."""
        for step in self.steps()[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.path(step), ignore_errors=True)

    def newest(self) -> dict[str, Any] | None:
        """The content of checkpoint.json of the newest undamaged checkpoint; None if there is none at all.

        Damaged ones are reported on stderr and renamed. InputError if all are damaged.
        """
        found = self._newest() if self.world.main else None
        found = distributed.from_main(found, self.world)
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _newest(self) -> dict[str, Any] | str | None:
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        steps = self.steps()
        for step in reversed(steps):
            try:
                return verified(self.path(step))
            except InputError as error:
                aside = self.path(step).with_name(f"damaged-{self.path(step).name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.path(step), aside)
                print(f"warning: {error}; moved to {aside.name}, using the one before it", file=sys.stderr)
        if steps:
            return f"{self.folder}: all checkpoints are damaged; to begin again, remove this folder"
        return None


def verified(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint, after comparing every file with it; InputError that says what is
    damaged."""
    info = read_json(folder / _INFO)
    if info.get("version") != _VERSION:
        raise InputError(f"{folder}: checkpoint version {info.get('version')!r} is not {_VERSION}")
    for name, (size, digest) in info["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing")
        if path.stat().st_size != size:
            raise InputError(f"{path}: damaged: {path.stat().st_size} bytes, not {size}")
        if file_sha256(path) != digest:
            raise InputError(f"{path}: damaged: its SHA-256 is not the one in {_INFO}")
    return info


def _fingerprints(paths: list[Path]) -> dict[str, tuple[int, str]]:
    return {path.name: (path.stat().st_size, file_sha256(path)) for path in paths}


def _make_room(temporary: Path, size: int) -> None:
    """An empty folder on a disk with ``size`` bytes free; OSError when there are fewer."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"disk full: it takes {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
            str(temporary),
        )


def _reason(error: BaseException) -> str:
    """The cause in one line; torch.distributed.checkpoint wraps it."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk ({error.strerror})"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
