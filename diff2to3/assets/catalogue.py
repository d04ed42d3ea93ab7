"""Catalogues: which assets there are, under which licence, and where their files lie.

    open_catalogue("models/")            a folder or zip of 3D files, with a manifest.jsonl or without
    open_catalogue("abo:data/abo")       a published data set, in its published layout (see published.py)

Every catalogue is a sequence of :class:`AssetRecord` in a fixed order; nothing is read from the 3D files
until one is loaded with :func:`load_asset`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diff2to3.assets.limits import Limits
from diff2to3.assets.load import UP_AXIS, load_mesh
from diff2to3.assets.records import AssetRecord, Catalogue, FetchOptions, Outcome, RecordList
from diff2to3.assets.source import FileSource, open_zip
from diff2to3.errors import InputError
from diff2to3.files import read_text, utf8
from diff2to3.types import Mesh

MANIFEST_NAME = "manifest.jsonl"


def open_catalogue(spec: str | os.PathLike[str]) -> Catalogue:
    """The catalogue that ``spec`` names: a path, or ``NAME:FOLDER`` with NAME a published data set.

    Raises InputError for a path that does not exist or an unknown name.
    """
    from diff2to3.assets.published import PUBLISHED, open_published

    text = os.fspath(spec)
    name, colon, folder = text.partition(":")
    if colon and name.lower() in PUBLISHED:
        return open_published(name.lower(), folder)
    if not os.path.exists(text):
        known = ", ".join(PUBLISHED)
        raise InputError(
            f"{text}: no such file or folder (and none of the known data sets NAME:FOLDER: {known})"
        )
    return LocalCatalogue(text)


def load_asset(record: AssetRecord, limits: Limits | None = None, *, verify: bool = True) -> Mesh:
    """Load an asset's mesh; see :func:`diff2to3.assets.load_mesh`.

    ``verify`` compares the file with the record's checksum. Raises InputError that names the asset.
    """
    if record.source is None:
        raise InputError(f"{record.id}: not fetched yet; run: diff2to3 data fetch")
    limits = limits or Limits()
    if verify and record.sha256:
        try:
            found = hashlib.sha256(record.source.read(limits)).hexdigest()
        except InputError as error:
            raise InputError(f"{record.id}: {error}") from error
        if found != record.sha256:
            raise InputError(
                f"{record.id}: checksum differs from the catalogue's: {record.source} is damaged"
            )
    return load_mesh(record.source, name=record.id, limits=limits)


@dataclass(frozen=True)
class AssetFilter:
    """Which assets of a catalogue to use; None leaves a filter out.

    ids            exactly these
    licenses       accepted licences, in any case
    splits         names of splits
    min_faces, max_faces   triangles; an asset whose number is not known passes (limits apply when it is
    loaded) min_aesthetic  least aesthetic score; an asset without a score does not pass
    limit          keep at most this many of the remaining records
    """

    ids: Sequence[str] | None = None
    licenses: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    min_faces: int | None = None
    max_faces: int | None = None
    min_aesthetic: float | None = None
    limit: int | None = None

    def apply(self, catalogue: Catalogue, records: Iterable[AssetRecord] | None = None) -> list[AssetRecord]:
        """The records that pass, of all of the catalogue or of ``records``, in their order.

        Raises InputError for ids that the catalogue lacks.
        """
        records = catalogue if records is None else records
        if self.ids is not None:
            wanted = set(self.ids)
            records = [record for record in records if record.id in wanted]
            missing = sorted(wanted - {record.id for record in records})
            if missing:
                raise InputError(
                    f"{catalogue.name}: {len(missing)} ids not in the catalogue, first {missing[0]!r}"
                )
        passed = [record for record in records if self._passes(record)]
        return passed if self.limit is None else passed[: self.limit]

    def _passes(self, record: AssetRecord) -> bool:
        faces, score = record.num_faces, record.aesthetic_score
        if self.licenses is not None and (record.license or "").lower() not in {
            x.lower() for x in self.licenses
        }:
            return False
        if self.splits is not None and record.split not in self.splits:
            return False
        if faces is not None and self.min_faces is not None and faces < self.min_faces:
            return False
        if faces is not None and self.max_faces is not None and faces > self.max_faces:
            return False
        return self.min_aesthetic is None or (score is not None and score >= self.min_aesthetic)


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """One id a line; blank lines and lines that start with # do not count."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot read the list of ids ({error})") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


class LocalCatalogue(RecordList):
    """A folder or zip of 3D files, or a manifest file. Zips in a folder are looked into.

    A manifest has one JSON object a line: ``id`` and ``file`` (relative to the manifest, or a member of a zip
    beside it), and optionally ``license, split, sha256, faces, aesthetic_score`` and anything else. Without
    one, the id of a file is its path without the extension (with it, where two would be the same).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._path = Path(path)

    def fetch(self, records: Sequence[AssetRecord], options: FetchOptions | None = None) -> Iterator[Outcome]:
        """The files are here already."""
        for record in records:
            yield record.id, None

    def _read(self) -> list[AssetRecord]:
        path = self._path
        if path.is_dir():
            manifest = path / MANIFEST_NAME
            return self._from_manifest(manifest) if manifest.is_file() else self._from_files(_walk(path))
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return self._from_manifest(path)
        if path.suffix.lower() == ".zip":
            names = open_zip(path).namelist()
            if MANIFEST_NAME in names:
                text = utf8(FileSource(self.name, MANIFEST_NAME).read(Limits())).decode("utf-8", "replace")
                where = {name: FileSource(self.name, name) for name in names}
                return [self._record(row, where) for row in _json_lines(text, f"{self.name}!{MANIFEST_NAME}")]
            return self._from_files([(name, FileSource(self.name, name)) for name in names])
        if path.suffix[1:].lower() in UP_AXIS:
            return self._from_files([(path.name, FileSource.of(path))])
        raise InputError(f"{self.name}: neither a folder, a zip, a manifest (.jsonl) nor a 3D file")

    def _from_files(self, files: Iterable[tuple[str, FileSource]]) -> list[AssetRecord]:
        found = sorted((name, source) for name, source in files if _is_model(name))
        stems = [name.rsplit(".", 1)[0] for name, _ in found]
        counts = Counter(stems)
        ids = [stem if counts[stem] == 1 else name for stem, (name, _) in zip(stems, found, strict=True)]
        return [AssetRecord(asset_id, source) for asset_id, (_, source) in zip(ids, found, strict=True)]

    def _from_manifest(self, manifest: Path) -> list[AssetRecord]:
        try:
            text = read_text(manifest)
        except OSError as error:
            raise InputError(f"{manifest}: cannot be read ({error})") from None
        where: dict[str, FileSource] = {}
        for archive in sorted(manifest.parent.glob("*.zip")):
            for name in open_zip(archive).namelist():
                where.setdefault(name, FileSource(str(archive), name))
        return [self._record(row, where, manifest.parent) for row in _json_lines(text, str(manifest))]

    def _record(
        self, row: dict[str, Any], where: Mapping[str, FileSource], folder: Path | None = None
    ) -> AssetRecord:
        file = str(row["file"])
        source = where.get(file)
        if source is None or (folder is not None and (folder / file).is_file()):
            source = FileSource(str(folder) if folder is not None else self.name, file)
        known = ("id", "file", "license", "split", "sha256", "faces")
        return AssetRecord(
            id=str(row["id"]),
            source=source,
            license=row.get("license"),
            split=row.get("split"),
            sha256=row.get("sha256"),
            num_faces=row.get("faces"),
            metadata={key: value for key, value in row.items() if key not in known},
        )


def _json_lines(text: str, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or "id" not in row or "file" not in row:
            raise InputError(f"{name}, line {number}: expected an object with id and file")
        yield row


def _is_model(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in UP_AXIS and not os.path.basename(name).startswith(".")


def _walk(folder: Path) -> Iterator[tuple[str, FileSource]]:
    """(relative path, source) of all files under ``folder``, those in zips under the zip's name."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if path.suffix.lower() != ".zip":
                yield relative, FileSource(str(folder), relative)
                continue
            stem = relative[: -len(path.suffix)]
            for member in open_zip(path).namelist():
                inside = member if member.split("/")[0] == path.stem else f"{path.stem}/{member}"
                prefix = stem[: -len(path.stem)]
                yield prefix + inside, FileSource(str(path), member)
