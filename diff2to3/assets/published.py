"""The published data sets that TRELLIS-500K is made of, in their published layouts.

    FOLDER/metadata.csv     the set's table from the hub data set JeffreyXiang/TRELLIS-500K: sha256,
                            file_identifier, aesthetic_score, captions; one asset a row
    FOLDER/raw/...          the files, as the set's owners or `diff2to3 data fetch` lay them out

    name          files under FOLDER/raw                                              fetched by
    objaverse     hf-objaverse-v1/glbs/000-000/UID.glb (needs no metadata.csv)        the objaverse package
    objaverse-xl  hf-objaverse-v1/..., github/repos/ORG/REPO.zip                      the objaverse package
    abo           3dmodels/original/X/ID.glb, unpacked from abo-3dmodels.tar          hand, then unpacked here
    hssd          objects/X/ID.glb                                                    huggingface_hub (gated)
    3d-future     3D-FUTURE-model.zip, read in place: 3D-FUTURE-model/ID/raw_model.obj     hand
    toys4k        toys4k_blend_files.zip, or the same as glb files                    hand; Blender converts

Licences are the owners'; `diff2to3 data list` shows them, and the filter of a configuration chooses by them.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diff2to3.assets.limits import Limits
from diff2to3.assets.records import AssetRecord, Catalogue, FetchOptions, Outcome, RecordList
from diff2to3.assets.source import FileSource, open_zip, safe_member
from diff2to3.blender import run_script
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.hub import download

TABLE = "metadata.csv"
_BLEND_SCRIPT = Path(__file__).with_name("blend_script.py")
#: Objaverse writes licences in Sketchfab's short words.
_SKETCHFAB_LICENSES = {
    "by": "CC-BY-4.0",
    "by-sa": "CC-BY-SA-4.0",
    "by-nd": "CC-BY-ND-4.0",
    "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0",
    "by-nc-nd": "CC-BY-NC-ND-4.0",
    "cc0": "CC0-1.0",
}

Fetcher = Callable[["PublishedCatalogue", Sequence[AssetRecord], FetchOptions], Iterator[Outcome]]


@dataclass(frozen=True)
class PublishedSet:
    """One published data set.

    license  of all of its assets; None where it differs by asset
    locate   (folder of raw files, file_identifier) -> where the file would be
    fetch    brings files of records; None where a person has to
    how      what a person has to do first, in one sentence
    hashed   what the table's sha256 is of: "model", or something else that is not checked
    """

    name: str
    license: str | None
    locate: Callable[[Path, str], FileSource]
    fetch: Fetcher | None
    how: str
    hashed: str = "model"


class PublishedCatalogue(RecordList):
    """A published set under ``folder``."""

    def __init__(self, published: PublishedSet, folder: str | os.PathLike[str]) -> None:
        self.published = published
        self.folder = Path(folder)
        self.raw = self.folder / "raw"
        self.name = f"{published.name}:{os.fspath(folder)}"

    def _read(self) -> list[AssetRecord]:
        return [self._record(row) for row in read_table(self.folder / TABLE, self.published)]

    def _record(self, row: dict[str, str]) -> AssetRecord:
        identifier = row["file_identifier"]
        source = self._local(row.get("local_path") or "") or self.published.locate(self.raw, identifier)
        checked = self.published.hashed == "model"
        return AssetRecord(
            id=row["sha256"],
            source=source if _exists(source) else None,
            license=row.get("license") or self.published.license,
            split=row.get("split"),
            sha256=row["sha256"] if checked else None,
            metadata={key: value for key, value in row.items() if key not in ("sha256", "license", "split")},
        )

    def _local(self, path: str) -> FileSource | None:
        """``local_path`` of a table, relative to the folder; a part of it may be a zip."""
        if not path:
            return None
        parts = safe_member(path).split("/")
        for end in range(1, len(parts)):
            archive = self.folder.joinpath(*parts[:end])
            if archive.suffix.lower() == ".zip" and archive.is_file():
                return FileSource(str(archive), "/".join(parts[end:]))
        return FileSource(str(self.folder), "/".join(parts))

    def fetch(self, records: Sequence[AssetRecord], options: FetchOptions | None = None) -> Iterator[Outcome]:
        """Bring files here, skipping those that are; see :class:`Catalogue`."""
        missing = []
        for record in records:
            if record.source is not None and not record.source.member.endswith(".blend"):
                yield record.id, None
            else:
                missing.append(record)
        if not missing:
            return
        if self.published.fetch is None:
            raise InputError(f"{self.name}: {len(missing)} files are not here. {self.published.how}")
        yield from self.published.fetch(self, missing, options or FetchOptions())


def read_table(path: Path, published: PublishedSet) -> Iterator[dict[str, str]]:
    """Rows of a set's metadata table. InputError when it is missing or is something else."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such table; take the file for {published.name} from the hub data set "
            f"JeffreyXiang/TRELLIS-500K and save it there. {published.how}"
        )
    csv.field_size_limit(min(sys.maxsize, 1 << 30))  # captions are long
    with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet may have saved it
        rows = csv.DictReader(file)
        missing = {"sha256", "file_identifier"} - set(rows.fieldnames or ())
        if missing:
            raise InputError(f"{path}: the table lacks the columns {', '.join(sorted(missing))}")
        yield from rows


def _exists(source: FileSource) -> bool:
    if source.is_zipped:
        return source.member in open_zip(source.container).NameToInfo
    return os.path.isfile(os.path.join(source.container, source.member))


class ObjaverseCatalogue(RecordList):
    """Objaverse 1.0 as its package lays it out: object-paths.json.gz, metadata/*.json.gz and glbs/ in
    FOLDER/hf-objaverse-v1 (or FOLDER/raw/hf-objaverse-v1)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = f"objaverse:{os.fspath(folder)}"
        self.folder = Path(folder)
        inner = self.folder / "raw" / "hf-objaverse-v1"
        self.root = inner if inner.is_dir() else self.folder / "hf-objaverse-v1"

    def _read(self) -> list[AssetRecord]:
        paths = self.root / "object-paths.json.gz"
        if not paths.is_file():
            self._with_package("_load_object_paths")
        notes: dict[str, Any] = {}
        for file in sorted((self.root / "metadata").glob("*.json.gz")):
            notes |= _read_json_gz(file)
        return [self._record(uid, path, notes.get(uid, {})) for uid, path in _read_json_gz(paths).items()]

    def _record(self, uid: str, path: str, notes: dict[str, Any]) -> AssetRecord:
        source = FileSource(str(self.root), safe_member(path))
        kept = ("name", "uri", "tags", "categories", "likeCount", "viewCount", "isAgeRestricted")
        license_name = notes.get("license")
        return AssetRecord(
            id=uid,
            source=source if _exists(source) else None,
            license=_SKETCHFAB_LICENSES.get(str(license_name), license_name),
            num_faces=notes.get("faceCount"),
            metadata={key: notes[key] for key in kept if key in notes},
        )

    def fetch(self, records: Sequence[AssetRecord], options: FetchOptions | None = None) -> Iterator[Outcome]:
        """Download through the objaverse package into this folder."""
        num_workers = (options or FetchOptions()).num_workers
        missing = [record.id for record in records if record.source is None]
        yield from ((record.id, None) for record in records if record.source is not None)
        for start in range(0, len(missing), 100):
            batch = missing[start : start + 100]
            try:
                got = self._with_package("load_objects", batch, num_workers)
            except OSError as error:
                yield from ((uid, f"download failed: {error}") for uid in batch)
                continue
            yield from ((uid, None if uid in got else "not in Objaverse any more") for uid in batch)

    def _with_package(self, function: str, *args: Any) -> Any:
        """Call a function of the objaverse package, with its folder (not an argument) set to ours."""
        try:
            import objaverse
        except ImportError:
            raise MissingDependencyError("objaverse", "data") from None
        before = objaverse.BASE_PATH, objaverse._VERSIONED_PATH
        objaverse.BASE_PATH, objaverse._VERSIONED_PATH = str(self.root.parent), str(self.root)
        try:
            return getattr(objaverse, function)(*args)
        finally:
            objaverse.BASE_PATH, objaverse._VERSIONED_PATH = before


def _read_json_gz(path: Path) -> dict[str, Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _fetch_objaverse_xl(
    catalogue: PublishedCatalogue, records: Sequence[AssetRecord], options: FetchOptions
) -> Iterator[Outcome]:
    """Download through objaverse.xl, which checks the hashes; repositories are kept as zips."""
    try:
        import objaverse.xl
    except ImportError:
        raise MissingDependencyError("objaverse", "data") from None
    annotations = objaverse.xl.get_annotations(download_dir=str(catalogue.raw))
    by_identifier = {record.metadata["file_identifier"]: record.id for record in records}
    chosen = annotations[annotations["fileIdentifier"].isin(by_identifier)]
    got = objaverse.xl.download_objects(
        chosen, download_dir=str(catalogue.raw), processes=options.num_workers, save_repo_format="zip"
    )
    for identifier, asset_id in by_identifier.items():
        yield asset_id, None if identifier in got else "no longer where it was published"


def _locate_objaverse_xl(raw: Path, identifier: str) -> FileSource:
    """Sketchfab pages lie by uid, GitHub files in the zip of their repository."""
    github = re.match(r"https://github\.com/([^/]+)/([^/]+)/blob/[^/]+/(.+)", identifier)
    if github:
        org, repo, path = github.groups()
        return FileSource(str(raw / "github" / "repos" / org / f"{repo}.zip"), safe_member(path))
    uid = identifier.rstrip("/").rsplit("/", 1)[-1].rsplit("-", 1)[-1]
    found = sorted((raw / "hf-objaverse-v1" / "glbs").glob(f"*/{uid}.glb")) if uid.isalnum() else []
    member = f"{found[0].parent.name}/{uid}.glb" if found else f"{uid}.glb"
    return FileSource(str(raw / "hf-objaverse-v1" / "glbs"), member)


def _fetch_abo(
    catalogue: PublishedCatalogue, records: Sequence[AssetRecord], options: FetchOptions
) -> Iterator[Outcome]:
    """Unpack the wanted members of abo-3dmodels.tar, which a person has put into raw/."""
    archive = catalogue.raw / "abo-3dmodels.tar"
    if not archive.is_file():
        raise InputError(f"{archive}: not here. {catalogue.published.how}")
    wanted = {f"3dmodels/original/{record.metadata['file_identifier']}": record for record in records}
    with tarfile.open(archive) as tar:
        for member in tar:
            record = wanted.pop(member.name.removeprefix("./"), None)
            if record is not None and member.isfile():
                stream = tar.extractfile(member)
                assert stream is not None
                yield record.id, _save(catalogue.raw / safe_member(member.name), stream.read(), record.sha256)
    yield from ((record.id, f"not in {archive.name}") for record in wanted.values())


def _fetch_hssd(
    catalogue: PublishedCatalogue, records: Sequence[AssetRecord], options: FetchOptions
) -> Iterator[Outcome]:
    for record in records:
        name = safe_member(record.metadata["file_identifier"])
        try:
            download(
                "hssd/hssd-models",
                name,
                hint=catalogue.published.how,
                repo_type="dataset",
                folder=catalogue.raw,
            )
        except InputError as error:
            yield record.id, str(error)
            continue
        yield record.id, None


def _fetch_toys4k(
    catalogue: PublishedCatalogue, records: Sequence[AssetRecord], options: FetchOptions
) -> Iterator[Outcome]:
    """Convert the .blend files that a person has put into raw/ to glb files beside them."""
    for record in records:
        if record.source is None:
            yield record.id, f"its .blend file is not here. {catalogue.published.how}"
            continue
        member = f"toys4k_blend_files/{safe_member(record.metadata['file_identifier'])}"
        try:
            glb = _blend_to_glb(record.source, options.blender)
        except InputError as error:
            yield record.id, str(error)
            continue
        yield record.id, _save(catalogue.raw / f"{member.removesuffix('.blend')}.glb", glb, None)


def _blend_to_glb(source: FileSource, blender: str, seconds: float = 600.0) -> bytes:
    with tempfile.TemporaryDirectory(prefix="diff2to3-blend-") as name:
        folder = Path(name)
        (folder / "asset.blend").write_bytes(source.read(Limits()))
        result = run_script(blender, _BLEND_SCRIPT, {"file": "asset.blend"}, folder, seconds)
        return (folder / safe_member(result["file"])).read_bytes()


def _save(path: Path, data: bytes, sha256: str | None) -> str | None:
    """Write atomically after checking the hash; returns what is wrong, or None."""
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        return "checksum differs from the table's"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _in_folder(*prefix: str) -> Callable[[Path, str], FileSource]:
    def locate(raw: Path, identifier: str) -> FileSource:
        return FileSource(str(raw), "/".join((*prefix, safe_member(identifier))))

    return locate


def _locate_3d_future(raw: Path, identifier: str) -> FileSource:
    """``identifier`` is 3D-FUTURE-model/ID; the OBJ with its texture, in the zip or unpacked."""
    member = f"{safe_member(identifier)}/raw_model.obj"
    archive = raw / "3D-FUTURE-model.zip"
    if archive.is_file() and not (raw / member).is_file():
        return FileSource(str(archive), member)
    return FileSource(str(raw), member)


def _locate_toys4k(raw: Path, identifier: str) -> FileSource:
    """A glb that Blender made of the .blend file, or the .blend file itself."""
    blend = f"toys4k_blend_files/{safe_member(identifier)}"
    converted = blend.removesuffix(".blend") + ".glb"
    if (raw / converted).is_file():
        return FileSource(str(raw), converted)
    archive = raw / "toys4k_blend_files.zip"
    if archive.is_file() and not (raw / blend).is_file():
        return FileSource(str(archive), blend)
    return FileSource(str(raw), blend)


_SETS: Iterable[PublishedSet] = (
    PublishedSet(
        "objaverse-xl",
        None,
        _locate_objaverse_xl,
        _fetch_objaverse_xl,
        "Then run: diff2to3 data fetch objaverse-xl:FOLDER",
    ),
    PublishedSet(
        "abo",
        "CC-BY-NC-4.0",
        _in_folder("3dmodels", "original"),
        _fetch_abo,
        "Download abo-3dmodels.tar (see https://amazon-berkeley-objects.s3.amazonaws.com) into raw/.",
    ),
    PublishedSet(
        "hssd",
        "CC-BY-NC-4.0",
        _in_folder(),
        _fetch_hssd,
        "Accept the terms at https://huggingface.co/datasets/hssd/hssd-models and log in: hf auth login",
    ),
    PublishedSet(
        "3d-future",
        "3D-FUTURE terms of use",
        _locate_3d_future,
        None,
        "Download 3D-FUTURE-model.zip from https://tianchi.aliyun.com/dataset/98063 into raw/.",
        hashed="image.jpg",
    ),
    PublishedSet(
        "toys4k",
        None,
        _locate_toys4k,
        _fetch_toys4k,
        "Download toys4k_blend_files.zip (see https://github.com/rehg-lab/lowshot-shapebias) into raw/.",
        hashed=".blend",
    ),
)

_BY_NAME = {published.name: published for published in _SETS}
#: Names that :func:`diff2to3.assets.open_catalogue` knows.
PUBLISHED = ("objaverse", *_BY_NAME)


def open_published(name: str, folder: str) -> Catalogue:
    """The published set ``name`` under ``folder``."""
    if not folder:
        raise InputError(f"{name}: expected {name}:FOLDER, the folder that holds or will hold the set")
    return ObjaverseCatalogue(folder) if name == "objaverse" else PublishedCatalogue(_BY_NAME[name], folder)
