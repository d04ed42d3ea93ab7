"""Where records go: log.jsonl always; the console, TensorBoard and wandb as asked for."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.files import write_atomic


class Logger(Protocol):
    """Takes records, whose ``kind`` is "train", "validate" or "event" and whose values are numbers (events: also
    text), and pictures, uint8 [H, W, 3]."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None: ...

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line: {"step", "kind", "time", …}. Numbers that are not finite are null."""

    def __init__(self, path: Path, step: int) -> None:
        """Append to ``path``; records of steps after ``step``, from before an interruption, are dropped."""
        if path.exists():
            write_atomic(path, "".join(_kept(path, step)))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(known, allow_nan=False) + "\n")
        self._file.flush()

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Pictures are files of their own."""

    def close(self) -> None:
        self._file.close()


def _kept(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that the interruption cut short
    return kept


class Console:
    """A progress bar on a terminal; plain lines elsewhere."""

    def __init__(self, step: int, steps: int) -> None:
        from tqdm import tqdm

        self._steps = steps
        self._bar = tqdm(total=steps, initial=step, dynamic_ncols=True) if sys.stderr.isatty() else None

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        label = "" if kind == "train" else f"{kind}  "
        line = f"step {step:>{len(str(self._steps))}}/{self._steps}  {label}{shown}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Pictures are files of their own."""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class TensorBoard:
    """Event files in <out>/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError("tensorboard", "tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            else:
                self._writer.add_text(f"{kind}/{name}", str(value), step)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; offline runs are kept in <out>/wandb and sent later by ``wandb sync``."""

    def __init__(self, folder: Path, config: dict[str, Any], project: str, mode: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError("wandb", "wandb") from error
        id_file = folder / "wandb-id.txt"
        if not id_file.exists():
            write_atomic(id_file, os.urandom(8).hex() + "\n")
        try:
            self._run = wandb.init(
                project=project,
                id=id_file.read_text().strip(),
                resume="allow",
                mode="offline" if mode == "offline" else "online",
                dir=str(folder),
                name=folder.name,
                config=config,
            )
        except wandb.errors.UsageError as error:
            raise InputError(
                f"wandb: {error}; log in with `wandb login`, or set train.wandb_mode=offline"
            ) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        import wandb

        self._run.log({name: wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
