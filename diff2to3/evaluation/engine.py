"""The engine: every asset of a run once, for every method; in this process, in several, or under torchrun.

A :class:`Plan` is all that a process needs. Its sources and metrics are words until they load, so that it can be sent
to worker processes. Results go to a run's folder asset by asset (runs.py), so a run that was stopped continues.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diff2to3.errors import InputError
from diff2to3.evaluation.parallel import run_items
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.runs import RunFolder
from diff2to3.evaluation.scores import Metric
from diff2to3.evaluation.subjects import Pictures, Source, Subject


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    methods   their results are kept under ``key``: (key, source)
    features  the run's folder, where features of sets are kept; "" for none
    """

    rules: Protocol
    truth: Source
    methods: tuple[tuple[str, Source], ...]
    metrics: tuple[Metric, ...]
    device: str = "cpu"
    features: str = ""

    def load(self) -> None:
        """Load everything, so that what is wrong is found before any work."""
        for part in (self.truth, *(source for _, source in self.methods), *self.metrics):
            part.load()

    def describe_weights(self) -> dict[str, Any]:
        """Which weights the metrics have, for the result."""
        return {name: held for metric in self.metrics for name, held in metric.describe().items()}

    def subject(self, asset_id: str) -> Subject:
        """An asset, as methods get it."""
        return Subject(asset_id, self.rules, self.truth, torch.device(self.device))


def run_settings(plan: Plan, ids: Sequence[str]) -> dict[str, Any]:
    """What makes two runs of one method the same run."""
    ((_, method),) = plan.methods
    return {
        "format": RunFolder.FORMAT,
        "protocol": plan.rules.to_dict(),
        "method": {"name": method.name, "sha256": method.fingerprint()},
        "truth": {"name": plan.truth.name, "sha256": plan.truth.fingerprint()},
        "weights": plan.describe_weights(),
        "assets": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }


def run_plan(
    folder: RunFolder | None,
    plan: Plan,
    ids: Sequence[str],
    *,
    label: str,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, dict[str, Any]]:
    """Score what process ``rank`` of ``world_size`` has to of ``ids``, without those that ``folder`` has scores of.

    workers: processes; 0 for this one. An asset that fails gets its error and is tried again in the next run.

    Returns:
        asset → its line so far, whichever process wrote it: {"values": {method: numbers}, "remarks": …} or {"error": …}
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    items = [(asset_id, asset_id) for asset_id in list(ids)[rank::world_size]]
    name = label if world_size == 1 else f"{label} [{rank}]"
    done = run_items(folder, score_asset, plan, items, workers=workers, label=name, rank=rank)
    lines = done if folder is None else folder.lines()
    return {asset_id: lines[asset_id] for asset_id in ids if asset_id in lines}


def score_asset(plan: Plan, asset_id: str) -> dict[str, Any]:
    """{"values": {method: {metric: number or None}}, "remarks": {method: …}} of one asset, for :func:`run_items`.

    InputError where the asset cannot be read or a method fails.
    """
    subject = plan.subject(asset_id)
    values, remarks = {}, {}
    for key, source in plan.methods:
        shown = source.pictures(subject, subject.cameras)
        if shown.images.shape != subject.truth.images.shape:
            raise InputError(
                f"{asset_id}: {source.name} has pictures {list(shown.images.shape)}, "
                f"{plan.truth.name} {list(subject.truth.images.shape)}"
            )
        try:
            numbers = score(plan.metrics, subject, source, shown)
            features = {k: v for m in plan.metrics for k, v in m.features(subject, shown).items()}
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{asset_id}: {source.name}: {error}") from error
        values[key] = plain({**numbers, **shown.facts})
        if shown.remarks:
            remarks[key] = dict(shown.remarks)
        if plan.features:
            RunFolder(Path(plan.features)).save_features(asset_id, key, features)
    return {"values": values, "remarks": remarks}


def score(metrics: Sequence[Metric], subject: Subject, source: Source, shown: Pictures) -> dict[str, float]:
    """All numbers of what a source shows of a subject."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric.over_draws and shown.draws:
            several = [metric.values(subject, source, one) for one in shown.draws]
            found |= {k: float(np.nanmean([values[k] for values in several])) for k in several[0]}
        else:
            found |= metric.values(subject, source, shown)
    return found


def plain(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN or infinity: null is a number that is not defined for this asset."""
    return {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}


def finished(lines: Mapping[str, Any], ids: Sequence[str], out: Path) -> bool:
    """Whether every asset of the run has a line; says so where other processes have some left."""
    if set(ids) <= set(lines):
        return True
    print(f"{out}: this process is done; others have assets left", file=sys.stderr)
    return False
