"""The plan: which asset goes to which shard under which key. Made once, extended at the end, never reordered.

``plan.jsonl`` has one line an asset. The assignment depends on the order of the source alone, so it is the
same for any number of workers, and a shard always means the same assets. When a source has grown, its new
assets go to new shards behind the old ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diff2to3.errors import InputError
from diff2to3.files import write_atomic

FILENAME = "plan.jsonl"


@dataclass(frozen=True)
class PlannedAsset:
    """An asset's place: ``shard`` and ``key`` (its name inside the shard), with what readers filter by."""

    shard: int
    key: str
    id: str
    split: str = ""
    license: str = ""


def asset_key(asset_id: str) -> str:
    """A name for tar members: the readable part of the id, and enough of its hash to be unique. Holds no dot,
    because WebDataset ends the key at the first one."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", asset_id).strip("-")[-48:]
    return f"{readable}-{hashlib.sha256(asset_id.encode()).hexdigest()[:10]}"


def extend_plan(
    plan: Sequence[PlannedAsset], assets: Iterable[tuple[str, str, str]], shard_size: int
) -> list[PlannedAsset]:
    """``plan`` with those of ``assets`` (id, split, license) that it lacks appended in new shards.

    Raises InputError when an id comes twice.
    """
    planned = {asset.id for asset in plan}
    first = plan[-1].shard + 1 if plan else 0
    new: list[PlannedAsset] = []
    seen: set[str] = set()
    for asset_id, split, license_name in assets:
        if asset_id in seen:
            raise InputError(f"asset id {asset_id!r} occurs twice in the source")
        seen.add(asset_id)
        if asset_id not in planned:
            shard = first + len(new) // shard_size
            new.append(PlannedAsset(shard, asset_key(asset_id), asset_id, split, license_name))
    return [*plan, *new]


def read_plan(root: Path) -> list[PlannedAsset]:
    """The plan of a dataset, [] when it has none yet. Raises InputError when it is damaged."""
    path = root / FILENAME
    if not path.is_file():
        return []
    plan = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            plan.append(PlannedAsset(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: line {number} is damaged: {error}") from error
    return plan


def write_plan(root: Path, plan: Sequence[PlannedAsset]) -> None:
    """Replace the plan, unless it already has these bytes: jobs of one array write the same plan."""
    text = "".join(json.dumps(asdict(asset), ensure_ascii=False) + "\n" for asset in plan)
    path = root / FILENAME
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def shards_of(plan: Sequence[PlannedAsset], part: tuple[int, int] = (0, 1)) -> dict[int, list[PlannedAsset]]:
    """Shard number -> its assets, of every n-th shard beginning with the i-th for ``part`` = (i, n)."""
    shards: dict[int, list[PlannedAsset]] = {}
    for asset in plan:
        if asset.shard % part[1] == part[0]:
            shards.setdefault(asset.shard, []).append(asset)
    return shards
