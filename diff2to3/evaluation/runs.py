"""Every asset once: a run's folder, which a killed or repeated run continues and several processes share.

    run.json                what was asked for; a folder holds one run only
    results-RANK.jsonl      one line an asset, appended and forced to the disk as it is done
    features/HASH.safetensors   features of an asset, written before its line
    table.json, table.md    the result, written by whichever process finds all assets done

Process r of n takes assets r, r + n, … of the sorted list and leaves out those with a line, whoever wrote it. So
no process waits for another, and the number of processes may change between runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.tensors import read_tensors


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. ``open`` checks that it belongs to this run. Nothing here removes a result."""

    #: Of the lines; a folder with lines of another format is another run's.
    FORMAT: ClassVar[int] = 2

    path: Path

    @staticmethod
    def open(
        path: str | Path, settings: dict[str, Any], advice: str = "give another folder, or remove it"
    ) -> RunFolder:
        """Make or continue a run. InputError, with ``advice``, where the folder holds a run with other settings."""
        folder = RunFolder(Path(path))
        file = folder.path / "run.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        try:
            (folder.path / "features").mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                write_atomic(file, text)
            held = json.loads(file.read_text("utf-8"))
            if not isinstance(held, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be used as a run's folder: {error}") from error
        asked = json.loads(text)
        different = sorted(k for k in {*held, *asked} if held.get(k) != asked.get(k))
        if different:
            raise InputError(f"{folder.path}: holds a run with another {', '.join(different)}; {advice}")
        return folder

    def lines(self) -> dict[str, dict[str, Any]]:
        """The last line of every asset; one with scores comes before one with an error."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.path.glob("results-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the end of a killed run
                    continue
                if row["id"] not in found or "values" in row:
                    found[row["id"]] = row
        return found

    def append(self, rank: int, row: dict[str, Any]) -> None:
        """Add a line and force it to the disk; what a killed run left unfinished is cut off first."""
        path = self.path / f"results-{rank}.jsonl"
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - (1 << 16), 0))
            tail = file.read()
            file.truncate(size - (len(tail) - (tail.rfind(b"\n") + 1)))
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def save_features(self, asset_id: str, method: str, features: dict[str, tuple[Tensor, Tensor]]) -> None:
        """extractor → (ours, truth), of what a method shows of an asset."""
        if features:
            named = {
                f"{name}.{side}": t
                for name, pair in features.items()
                for side, t in zip("ab", pair, strict=True)
            }
            write_atomic(
                self._features(asset_id, method), save({k: v.contiguous() for k, v in named.items()})
            )

    def load_features(self, asset_id: str, method: str, extractor: str) -> tuple[Tensor, Tensor]:
        """(ours, truth), [V, C] each."""
        path = self._features(asset_id, method)
        try:
            held = read_tensors(path)
            return held[f"{extractor}.a"], held[f"{extractor}.b"]
        except (InputError, KeyError) as error:
            raise InputError(
                f"{path}: features of {asset_id} cannot be read ({error}); remove the folder"
            ) from error

    def _features(self, asset_id: str, method: str) -> Path:
        name = hashlib.sha256(f"{asset_id}\0{method}".encode()).hexdigest()[:32]
        return self.path / "features" / f"{name}.safetensors"


@contextmanager
def unfinished_run(out: Path, settings: dict[str, Any]) -> Iterator[RunFolder]:
    """``OUT.partial``: the folder of the run that OUT will be the result of. It is removed when the block ends without
    an error. InputError where it holds a run with other settings, which is left as it is.
    """
    path = out.with_name(out.name + ".partial")
    advice = (
        "the command that began it continues it; for another run give another --out, or remove that folder"
    )
    folder = RunFolder.open(path, {"format": RunFolder.FORMAT, **settings}, advice)
    yield folder
    shutil.rmtree(path)
