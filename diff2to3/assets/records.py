"""What an asset of a catalogue is known by, and what every catalogue offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from diff2to3.assets.source import FileSource
from diff2to3.errors import InputError


@dataclass(frozen=True)
class AssetRecord:
    """One asset of a catalogue. Picklable, so that it can be sent to a worker.

    id         unique in the catalogue
    source     where its file is; None when it has not been fetched
    license    as the catalogue writes it, such as "CC0-1.0"; None when unknown
    split      "train", "val", ...; None when the catalogue has none
    sha256     of the file, where known; checked when it is loaded
    num_faces  triangles, where known
    metadata   everything else that the catalogue says
    """

    id: str
    source: FileSource | None
    license: str | None = None
    split: str | None = None
    sha256: str | None = None
    num_faces: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def aesthetic_score(self) -> float | None:
        """The score of published tables, where the record has one."""
        value = self.metadata.get("aesthetic_score")
        return None if value in (None, "") else float(value)


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch: downloads at a time, and a Python with bpy or a Blender that converts .blend files."""

    num_workers: int = 1
    blender: str = "blender"


#: What became of fetching an asset: (id, None), or (id, why not).
Outcome = tuple[str, str | None]


class Catalogue(Protocol):
    """What every catalogue offers. Iteration order does not change between runs."""

    name: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[AssetRecord]: ...

    def __getitem__(self, asset_id: str) -> AssetRecord:
        """The record with this id. InputError when there is none."""
        ...

    def fetch(self, records: Sequence[AssetRecord], options: FetchOptions | None = None) -> Iterator[Outcome]:
        """Bring files of ``records`` here; yields (id, None) or (id, why not) as each is done."""
        ...


class RecordList:
    """A catalogue over a list of records that are all there is. Base of the concrete ones."""

    name: str

    @cached_property
    def _records(self) -> list[AssetRecord]:
        records = self._read()
        seen: set[str] = set()
        for record in records:
            if record.id in seen:
                raise InputError(f"{self.name}: two assets are called {record.id!r}")
            seen.add(record.id)
        return records

    @cached_property
    def _by_id(self) -> dict[str, AssetRecord]:
        return {record.id: record for record in self._records}

    def _read(self) -> list[AssetRecord]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[AssetRecord]:
        return iter(self._records)

    def __getitem__(self, asset_id: str) -> AssetRecord:
        if asset_id not in self._by_id:
            raise InputError(f"{self.name}: no asset {asset_id!r}")
        return self._by_id[asset_id]
