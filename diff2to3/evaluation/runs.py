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
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diff2to3.config import config_to_dict
from diff2to3.errors import InputError
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.scores import AssetScore, Scorer
from diff2to3.evaluation.sources import Source, Subject
from diff2to3.files import write_atomic


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. ``open`` checks that it belongs to this run."""

    path: Path

    @staticmethod
    def open(path: str | Path, settings: dict[str, Any]) -> RunFolder:
        """Make or continue a run. InputError where the folder holds a run with other settings."""
        folder = RunFolder(Path(path))
        file = folder.path / "run.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        try:
            (folder.path / "features").mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                write_atomic(file, text)
            held = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be used as a run's folder: {error}") from error
        asked = json.loads(text)
        different = sorted(k for k in {*held, *asked} if held.get(k) != asked.get(k))
        if different:
            raise InputError(
                f"{folder.path}: holds a run with another {', '.join(different)}; give another folder, or remove it"
            )
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

    def save_features(self, asset_id: str, features: dict[str, tuple[Tensor, Tensor]]) -> None:
        if features:
            named = {
                f"{name}.{side}": t
                for name, pair in features.items()
                for side, t in zip("ab", pair, strict=True)
            }
            write_atomic(self._features(asset_id), save({k: v.contiguous() for k, v in named.items()}))

    def load_features(self, asset_id: str, extractor: str) -> tuple[Tensor, Tensor]:
        """(ours, truth), [V, C] each."""
        path = self._features(asset_id)
        try:
            held = load_file(path)
            return held[f"{extractor}.a"], held[f"{extractor}.b"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{path}: features of {asset_id} cannot be read ({error}); remove the folder"
            ) from error

    def _features(self, asset_id: str) -> Path:
        return self.path / "features" / f"{hashlib.sha256(asset_id.encode()).hexdigest()[:32]}.safetensors"


def run_settings(
    rules: Protocol, method: Source, truth: Source, scorer: Scorer, ids: Sequence[str]
) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {
        "protocol": config_to_dict(rules),
        "method": {"name": method.name, "sha256": method.fingerprint()},
        "truth": {"name": truth.name, "sha256": truth.fingerprint()},
        "weights": scorer.describe(),
        "assets": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }


def run_assets(
    folder: RunFolder,
    scorer: Scorer,
    method: Source,
    truth: Source,
    ids: Sequence[str],
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str, str | None], None] | None = None,
) -> bool:
    """Score this process's share of ``ids`` that has no scores yet. An asset that fails gets a line with its error
    and is tried again in the next run.

    Returns whether every asset of the run, of all processes, now has a line.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    done = {asset_id for asset_id, row in folder.lines().items() if "values" in row}
    for asset_id in list(ids)[rank::world_size]:
        if asset_id in done:
            continue
        error = None
        try:
            subject = Subject(asset_id, scorer.rules, truth, device)
            score = scorer.score(subject, method, truth)
            folder.save_features(asset_id, score.features)
            folder.append(rank, {"id": asset_id, "values": _plain(score)})
        except InputError as caught:
            error = str(caught).splitlines()[0]
            folder.append(rank, {"id": asset_id, "error": error})
        if progress is not None:
            progress(asset_id, error)
    return set(ids) <= set(folder.lines())


def _plain(score: AssetScore) -> dict[str, float | None]:
    """JSON has no NaN or infinity: null is a metric that is not defined for this asset."""
    return {name: value if math.isfinite(value) else None for name, value in score.values.items()}
