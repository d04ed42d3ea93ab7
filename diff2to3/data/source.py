"""The assets that a configuration names: listed once, loaded one at a time in the workers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from diff2to3.assets.catalogue import AssetFilter, load_asset, open_catalogue, read_ids
from diff2to3.assets.limits import Limits
from diff2to3.assets.records import Catalogue
from diff2to3.data.schema import DataConfig
from diff2to3.data.variants import derive, derived, original
from diff2to3.errors import InputError
from diff2to3.types import Mesh


class AssetSource:
    """The source of a configuration, opened at first use: workers that need no mesh never open it."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @cached_property
    def catalogue(self) -> Catalogue:
        """Raises InputError when the source does not exist or cannot be read."""
        return open_catalogue(self.config.source)

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
        ).apply(self.catalogue)
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
        known = {record.split for record in self.catalogue} if splits else set()
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
