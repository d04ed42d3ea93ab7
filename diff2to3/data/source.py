"""The assets that a configuration names: listed once, loaded one at a time in the workers."""

from __future__ import annotations

from pathlib import Path

from diff2to3.assets.limits import Limits
from diff2to3.data.schema import DataConfig
from diff2to3.types import Mesh


class AssetSource:
    """The source of a configuration, opened at first use: workers that need no mesh never open it."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def open(self) -> None:
        import json

        self.rows = {}
        for line in (Path(self.config.source) / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            self.rows[row["id"]] = row

    def list(self) -> list[tuple[str, str, str]]:
        """(id, split, license) of every asset that passes the filters, in the source's order."""
        self.open()
        rows = list(self.rows.values())[: self.config.filter.limit]
        return [(r["id"], r["split"], r["license"]) for r in rows]

    def load(self, asset_id: str) -> Mesh:
        """The mesh of an asset. Raises InputError with the reason when it cannot be had."""
        from diff2to3.assets.load import load_mesh
        from diff2to3.assets.source import FileSource

        row = self.rows[asset_id]
        limits = Limits(
            max_file_bytes=self.config.limits.max_file_mib << 20, max_faces=self.config.limits.max_faces
        )
        return load_mesh(
            FileSource(f"{self.config.source}/{row['pack']}.zip", row["file"]), name=asset_id, limits=limits
        )
