"""Reading a prepared dataset: any asset, any view, without unpacking or scanning shards."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from diff2to3.data.pictures import decode_depth, decode_image
from diff2to3.data.plan import PlannedAsset, read_plan
from diff2to3.data.shards import Entry, entry_from_line, index_path, read_index, tar_path
from diff2to3.errors import InputError
from diff2to3.types import SparseVoxels, Views

#: Files kept open at a time.
_MAX_OPEN_FILES = 128


class OpenFiles:
    """Reads byte ranges of files and keeps the latest of them open. Travels to other processes closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """``length`` bytes, fewer at the end of the file. Raises InputError when it cannot be opened."""
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
            if len(self._open) > _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return os.pread(self._open[path], length, offset)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()


@dataclass(frozen=True)
class StoredAsset:
    """One asset's members in one stage."""

    tar: Path
    entry: Entry
    files: OpenFiles

    @property
    def info(self) -> Mapping[str, Any]:
        """The small facts that the stage noted."""
        return self.entry.info

    def read(self, member: str) -> bytes:
        """The bytes of ``member``. Raises InputError when there is none, or the shard is shorter than its
        index."""
        place = self.entry.members.get(member)
        if place is None:
            known = ", ".join(sorted(self.entry.members)[:8])
            raise InputError(f"{self.tar}: {self.entry.id} has no {member!r}; it has {known}, ...")
        data = self.files.read(self.tar, *place)
        if len(data) != place[1]:
            raise InputError(
                f"{self.tar}: cut short at {self.entry.id}; run the preparation again to repair it"
            )
        return data

    def tensors(self, member: str) -> dict[str, Tensor]:
        """The tensors of a safetensors member."""
        try:
            return load_tensors(self.read(member))
        except SafetensorError as error:
            raise InputError(f"{self.tar}: {member} of {self.entry.id} is damaged: {error}") from error

    def views(self, index: Sequence[int] | None = None, depths: bool = False) -> Views:
        """The views ``index`` (all by default) of a views stage; with depth where wanted."""
        cameras = self.tensors("cameras.safetensors")
        viewmats, Ks = cameras["viewmats"], cameras["Ks"]
        rows = list(range(len(Ks))) if index is None else list(index)
        pictures = [decode_image(self.read(f"{i:03d}.webp")) for i in rows]
        stored = None
        if depths:
            pairs = [(self.read(f"{i:03d}.depth.png"), viewmats[i]) for i in rows]
            stored = torch.stack([decode_depth(data, viewmat) for data, viewmat in pairs])
        return Views(
            torch.stack([image for image, _ in pictures]),
            torch.stack([alpha for _, alpha in pictures]),
            viewmats[rows],
            Ks[rows],
            stored,
        )

    def coords(self) -> Tensor:
        """Active cells int32 [N, 3], of a voxels stage."""
        return self.tensors("coords.safetensors")["coords"].to(torch.int32)


def feature_stage(name: str) -> str:
    """The stage of the feature set that ``name`` (``set`` or ``set.mode``) asks for."""
    return f"features_{name.partition('.')[0]}"


class AssetStore:
    """The assets of a prepared dataset and where each stage's results are.

    Only the plan and the indexes are read, and of the indexes only a few numbers an asset are kept.
    """

    def __init__(self, root: str | Path, stages: Sequence[str] | None = None) -> None:
        """``stages``: those to open; None for all there are. Raises InputError where one was never
        prepared."""
        self.root = Path(root)
        self.files = OpenFiles()
        self.plan = read_plan(self.root)
        if not self.plan:
            raise InputError(f"{self.root}: not a prepared dataset (no plan.jsonl)")
        if stages is None:
            stages = sorted(p.parent.name for p in self.root.glob("*/settings.json"))
        self._lines: dict[str, dict[str, tuple[Path, int, int]]] = {}
        self._info: dict[str, dict[str, Mapping[str, Any]]] = {}
        self.failures: dict[str, dict[str, str]] = {}
        for stage in stages:
            self._scan(stage)

    @property
    def stages(self) -> list[str]:
        return list(self._lines)

    def assets(self, split: str | None = None, stages: Sequence[str] | None = None) -> list[PlannedAsset]:
        """Assets of ``split`` (any by default) for which all of ``stages`` (the open ones) succeeded."""
        needed = self.stages if stages is None else stages
        return [
            asset
            for asset in self.plan
            if (split is None or asset.split == split) and all(asset.key in self._info[s] for s in needed)
        ]

    def info(self, asset: PlannedAsset, stage: str) -> Mapping[str, Any]:
        """What ``stage`` noted about an asset, without touching its shard."""
        return self._info[stage][asset.key]

    def open(self, asset: PlannedAsset, stage: str) -> StoredAsset:
        """An asset's members in ``stage``. Raises InputError, with the recorded reason, if it failed or is
        absent."""
        if asset.key not in self._lines.get(stage, {}):
            reason = self.failures.get(stage, {}).get(asset.key, "not prepared")
            raise InputError(f"{asset.id}: {stage}: {reason}")
        path, offset, length = self._lines[stage][asset.key]
        line = self.files.read(path, offset, length)
        return StoredAsset(path.with_suffix(".tar"), entry_from_line(line), self.files)

    def views(
        self, asset: PlannedAsset, view_set: str, index: Sequence[int] | None = None, depths: bool = False
    ) -> Views:
        """The views ``index`` (all by default) of a set; with depth where wanted and stored."""
        return self.open(asset, f"views_{view_set}").views(index, depths)

    def coords(self, asset: PlannedAsset, resolution: int) -> Tensor:
        """Active cells int32 [N, 3] of the R³ grid."""
        return self.open(asset, f"voxels_{resolution}").coords()

    def features(self, asset: PlannedAsset, names: Sequence[str]) -> SparseVoxels:
        """Feature sets of one resolution side by side, float32, on the voxels of one asset.

        A name is that of a set, for its first mode, or ``set.mode``. Raises InputError when there is no such
        thing.
        """
        parts, resolutions = [], []
        for name in names:
            stored = self.open(asset, feature_stage(name))
            mode = name.partition(".")[2] or stored.info["modes"][0]
            parts.append(stored.tensors(f"{mode}.safetensors")["feats"].float())
            resolutions.append(int(stored.info["resolution"]))
        if len(set(resolutions)) != 1:
            raise InputError(f"features {list(names)}: expected one resolution, got {resolutions}")
        coords = self.coords(asset, resolutions[0])
        batch = torch.zeros(len(coords), 1, dtype=torch.int32)
        packed = torch.cat([batch, coords], 1)
        return SparseVoxels.from_coords(packed, torch.cat(parts, 1), resolutions[0], 1)

    def _scan(self, stage: str) -> None:
        folder = self.root / stage
        if not (folder / "settings.json").is_file():
            raise InputError(f"{self.root}: stage {stage!r} was never prepared here")
        lines, infos, failures = {}, {}, {}
        for path in sorted(folder.glob("[0-9]*.json")):
            for offset, line in _lines_with_offsets(path):
                try:
                    raw = json.loads(line)
                    if "failed" in raw:
                        failures[raw["key"]] = raw["failed"]
                    else:
                        lines[raw["key"]] = (path, offset, len(line))
                        infos[raw["key"]] = raw["info"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path}: damaged index: {error}") from error
        self._lines[stage], self._info[stage], self.failures[stage] = lines, infos, failures


def open_in_shard(root: Path, stage: str, shard: int, key: str, files: OpenFiles) -> StoredAsset:
    """One asset's members, from its shard's index alone. Raises InputError if it failed or is not there."""
    path = index_path(root, stage, shard)
    for entry in read_index(path).entries:
        if entry.key == key:
            if entry.failed is not None:
                raise InputError(f"failed in {stage}: {entry.failed}")
            return StoredAsset(tar_path(root, stage, shard), entry, files)
    raise InputError(f"{path}: has no asset {key}")


def occupancy(coords: Tensor, resolution: int) -> Tensor:
    """Active cells int [N, 3] -> bool [R, R, R]."""
    grid = torch.zeros((resolution,) * 3, dtype=torch.bool)
    x, y, z = coords.long().unbind(-1)
    grid[x, y, z] = True
    return grid


def _lines_with_offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, text without the separating comma) of each asset's line of an index."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number > 0 and not line.startswith(b"]"):
                yield offset, line.rstrip(b",\n")
            offset += len(line)
