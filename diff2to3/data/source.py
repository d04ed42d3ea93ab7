"""The assets that a configuration names: listed once, loaded one at a time in the workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from diff2to3.assets.catalogue import AssetFilter, load_asset, open_catalogue, read_ids
from diff2to3.assets.limits import Limits
from diff2to3.assets.records import AssetRecord, Catalogue
from diff2to3.data.schema import DataConfig
from diff2to3.data.variants import derive, derived, original
from diff2to3.errors import InputError
from diff2to3.types import Mesh

#: One asset in so many validates.
_VAL_EVERY = 20


def split_by_id(records: Sequence[AssetRecord]) -> list[AssetRecord]:
    """``records`` with splits that follow from their ids: "val" where the first eight hex digits of the id's SHA-256
    are a multiple of 20, "train" elsewhere. So an asset stays where it is when a folder grows. Where that leaves
    one of the two empty and there are two assets, the id with the least hash goes there.
    """
    if not records:
        return []
    hashes = {record.id: hashlib.sha256(record.id.encode()).hexdigest() for record in records}
    splits = {key: "train" if int(h[:8], 16) % _VAL_EVERY else "val" for key, h in hashes.items()}
    least = min(hashes, key=lambda key: hashes[key])
    if len(set(splits.values())) == 1:
        only = splits[least]
        if only == "val" or len(records) > 1:
            splits[least] = "train" if only == "val" else "val"
    return [replace(record, split=splits[record.id]) for record in records]


class AssetSource:
    """The source of a configuration, opened at first use: workers that need no mesh never open it."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @cached_property
    def catalogue(self) -> Catalogue:
        """Raises InputError when the source does not exist or cannot be read."""
        return open_catalogue(self.config.source)

    @cached_property
    def records(self) -> Sequence[AssetRecord]:
        """All assets of the source, each with a split: the catalogue's, or :func:`split_by_id`'s where it has none
        at all (a plain folder)."""
        records = list(self.catalogue)
        return records if any(record.split for record in records) else split_by_id(records)

    def list(self) -> list[tuple[str, str, str]]:
        """(id, split, license) of every asset that passes the filters, in the catalogue's order, then of what
        is made of them. Raises InputError for a split that the source has not.
        """
        chosen = self.config.filter
        records = AssetFilter(
            ids=None if chosen.ids is None else read_ids(chosen.ids),
            licenses=chosen.licenses,
            splits=chosen.splits,
            min_faces=chosen.min_faces,
            max_faces=chosen.max_faces,
            min_aesthetic=chosen.min_aesthetic,
            limit=chosen.limit,
        ).apply(self.catalogue, self.records)
        listed = [(record.id, record.split or "", record.license or "") for record in records]
        config = self.config
        self.check_splits([*config.mirror, *config.variants])
        made = [
            (new, split, terms)
            for id, split, terms in listed
            for new in derived(id, split in config.mirror, config.variants.get(split, 0))
        ]
        return [*listed, *made]

    def check_splits(self, splits: Sequence[str]) -> None:
        """Raises InputError for one that no asset of the source is in."""
        known = {record.split for record in self.records} if splits else set()
        for split in splits:
            if split not in known:
                names = ", ".join(sorted(name for name in known if name)) or "none"
                raise InputError(
                    f"mirror, variants: the source has no split {split!r}; its splits are {names}"
                )

    def load(self, asset_id: str) -> Mesh:
        """The mesh of an asset. Raises InputError, which begins with the id, when it cannot be had."""
        limits = self.config.limits
        bounds = Limits(max_file_bytes=limits.max_file_mib << 20, max_faces=limits.max_faces)
        return derive(load_asset(self.catalogue[original(asset_id)], bounds), asset_id)
