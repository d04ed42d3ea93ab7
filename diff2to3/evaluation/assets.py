"""Which assets a program scores: folders and zips, of one split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diff2to3.assets import AssetRecord, FileSource, open_catalogue, read_ids
from diff2to3.assets.catalogue import MANIFEST_NAME, LocalCatalogue
from diff2to3.assets.records import Catalogue
from diff2to3.assets.source import open_zip
from diff2to3.errors import InputError


@dataclass(frozen=True)
class AssetList:
    """Chosen records, sorted by id, and what should be said about the choice."""

    records: list[AssetRecord]
    notes: list[str]

    def fingerprint(self) -> str:
        """A hash of ids and, where known, of the files' content."""
        lines = (f"{record.id} {record.sha256}" for record in self.records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def choose_assets(
    specs: Sequence[str],
    split: str | None = None,
    ids: str | None = None,
    limit: int | None = None,
) -> AssetList:
    """The assets of all of ``specs`` (folders, zips, 3D files, or published data sets as NAME:FOLDER).

    Args:
        split: only these; a zip without a manifest of its own may have one beside it that says.
        ids: a file with one id a line.
        limit: so many of what is left, those whose hash of the id is least, so that they are spread over packs.

    Raises:
        InputError: nothing there, an id twice, or no asset of that split.
    """
    records = find_records(specs, split)
    splits = Counter(record.split for record in records.values())
    notes = []
    if split is None and splits["train"] and len(splits) > 1:
        notes.append(
            f"{splits['train']} of {len(records)} assets are of the split train; --split val leaves them out"
        )
    if ids is not None:
        records = _only(records, read_ids(ids), ids)
    chosen = sorted(records.values(), key=lambda record: record.id)
    if limit is not None and limit < len(chosen):
        ranked = sorted(chosen, key=lambda record: hashlib.sha256(record.id.encode()).digest())
        chosen = sorted(ranked[:limit], key=lambda record: record.id)
        notes.append(f"{limit} of {len(records)} assets (--limit)")
    return AssetList(chosen, notes)


def find_records(specs: Sequence[str], split: str | None = None) -> dict[str, AssetRecord]:
    """All records by id, as :func:`choose_assets` finds them, in the order of the catalogues. InputError likewise."""
    records: dict[str, AssetRecord] = {}
    for spec in specs:
        for record in _records(spec):
            if record.id in records:
                raise InputError(
                    f"--assets: two assets are called {record.id!r}; give their folders one by one"
                )
            records[record.id] = record
    if not records:
        raise InputError(f"--assets {' '.join(specs)}: no 3D file (glb, gltf, obj, ply, stl) in there")
    if split is None:
        return records
    known = ", ".join(sorted({r.split for r in records.values() if r.split})) or "none (there is no manifest)"
    chosen = {i: record for i, record in records.items() if record.split == split}
    if not chosen:
        raise InputError(f"--split {split}: no asset is of this split; known are {known}")
    return chosen


def public_name(spec: str) -> str:
    """``toys4k:/data/toys4k`` → ``toys4k:toys4k``: the last part of the path says enough."""
    kind, colon, path = spec.rpartition(":")
    return f"{kind}{colon}{Path(path).expanduser().resolve().name}"


def pack_of(record: AssetRecord) -> str:
    """The pack that a catalogue names, else the first part of the id; "" where it has one part."""
    pack = record.metadata.get("pack")
    if pack:
        return str(pack)
    first, slash, _ = record.id.partition("/")
    return first if slash else ""


def _records(spec: str) -> Sequence[AssetRecord]:
    path = Path(spec)
    if path.suffix.lower() == ".zip" and path.is_file():
        manifest = path.parent / MANIFEST_NAME
        if manifest.is_file() and MANIFEST_NAME not in open_zip(path).namelist():
            here = path.resolve()
            listed = [r for r in LocalCatalogue(manifest) if _container(r.source) == here]
            if listed:
                return listed
    catalogue: Catalogue = open_catalogue(spec)
    return list(catalogue)


def _container(source: FileSource | None) -> Path | None:
    return None if source is None else Path(source.container).resolve()


def _only(records: dict[str, AssetRecord], wanted: Sequence[str], file: str) -> dict[str, AssetRecord]:
    missing = sorted(set(wanted) - set(records))
    if missing:
        raise InputError(f"{file}: {len(missing)} ids are not among the assets, first {missing[0]!r}")
    return {asset_id: records[asset_id] for asset_id in dict.fromkeys(wanted)}
