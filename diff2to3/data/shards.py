"""Shards: what one stage made of a fixed list of assets, as a tar file and an index beside it.

    <root>/<stage>/00007.tar    the members of each asset, in WebDataset's layout: <key>.<member>
    <root>/<stage>/00007.json   the index: for each asset its members' places and a SHA-256, or why it failed

Tar, because every tool opens it (``tar xf`` gives PNG and safetensors files to look at), because it streams
from object stores and loads with the webdataset package as it is, and because an uncompressed member is a
plain byte range: with the index, an asset or a single view is one ``pread``. Headers carry no time, owner or
order of arrival, so the bytes depend on the content alone.

A shard is written once, atomically, when all its assets are done. Until then each finished asset is a *part*:
its finished tar entries, in a file of its own. A part is written atomically as well, so a run that is killed
loses at most the assets it was working on, and the shard is the concatenation of its parts in the order of
the plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from diff2to3.errors import InputError
from diff2to3.files import sync_folder, write_atomic

FORMAT = "diff2to3-shard/1"
_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME = 100  # of a plain ustar header


@dataclass(frozen=True)
class Part:
    """One asset's result in one stage: members and the small facts worth indexing, or the reason it
    failed."""

    members: Mapping[str, bytes] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    failed: str | None = None


@dataclass(frozen=True)
class Entry:
    """An asset in a shard: members' (offset, size) in the tar, and the SHA-256 of all its bytes; or its
    failure.

    ``stamp`` says what it was made from: a hash of the stage's settings and of the bytes it read of earlier
    ones.
    """

    id: str
    key: str
    stamp: str
    offset: int = 0
    size: int = 0
    sha256: str = ""
    members: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    failed: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds."""

    stage: str
    shard: int
    sha256: str
    size: int
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        """The index file: one line an asset, the same bytes for the same content."""
        head = {
            "format": FORMAT,
            "stage": self.stage,
            "shard": self.shard,
            "sha256": self.sha256,
            "size": self.size,
        }
        lines = [_dump(head)[:-1] + ',"assets":[']
        for i, entry in enumerate(self.entries):
            lines.append(_dump(_entry_to_dict(entry)) + ("," if i + 1 < len(self.entries) else ""))
        return "\n".join([*lines, "]}"]) + "\n"


def index_path(root: Path, stage: str, shard: int) -> Path:
    return root / stage / f"{shard:05d}.json"


def tar_path(root: Path, stage: str, shard: int) -> Path:
    return root / stage / f"{shard:05d}.tar"


def part_path(root: Path, stage: str, shard: int, key: str) -> Path:
    return root / ".staging" / stage / f"{shard:05d}" / f"{key}.part"


def read_index(path: Path) -> ShardIndex:
    """The index at ``path``. Raises InputError when it is missing, unreadable, or of another format."""
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT:
            raise InputError(f"{path}: format {raw['format']!r}, expected {FORMAT!r}")
        entries = tuple(_entry_from_dict(e) for e in raw["assets"])
        return ShardIndex(str(raw["stage"]), int(raw["shard"]), raw["sha256"], int(raw["size"]), entries)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged index: {error}") from error


def entry_from_line(line: bytes) -> Entry:
    """One asset of an index from its own line."""
    return _entry_from_dict(json.loads(line))


def write_part(path: Path, key: str, part: Part, stamp: str) -> None:
    """Write one asset's result atomically: a JSON line that describes it, then its tar entries.

    ``stamp`` says what it was made from (settings and inputs), so that a part from before a change is not
    used after.
    """
    body = (
        b"" if part.failed is not None else b"".join(_tar_entry(key, n, d) for n, d in part.members.items())
    )
    facts = {"failed": part.failed} if part.failed is not None else {"info": dict(part.info)}
    _write_part(path, key, body, facts, stamp)


def _write_part(path: Path, key: str, body: bytes, facts: Mapping[str, Any], stamp: str) -> None:
    head = {
        "key": key,
        "stamp": stamp,
        "sha256": hashlib.sha256(body).hexdigest(),
        "size": len(body),
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _dump(head).encode() + b"\n" + body)


def read_part(path: Path, key: str, stamp: str) -> tuple[dict[str, Any], bytes] | None:
    """The description and tar entries of a part; None when it is missing, damaged, or of another asset or
    stamp."""
    try:
        line, _, body = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        found = (head["key"], head["stamp"], head["size"], head["sha256"])
        return (head, body) if found == (key, stamp, len(body), hashlib.sha256(body).hexdigest()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def assemble(
    root: Path, stage: str, shard: int, assets: Sequence[tuple[str, str, str]]
) -> ShardIndex | list[str]:
    """Join the parts of ``assets`` (id, key, stamp) into the shard, tar first and index last, and remove
    them.

    Returns the index, or the keys of the parts that are missing or damaged, in which case nothing is written.
    """
    target = tar_path(root, stage, shard)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest, offset = hashlib.sha256(), 0
    entries: list[Entry] = []
    bad: list[str] = []
    with open(temporary, "wb") as file:
        for asset_id, key, stamp in assets:
            part = read_part(part_path(root, stage, shard, key), key, stamp)
            if part is None:
                bad.append(key)
                continue
            head, body = part
            entries.append(_entry(asset_id, head, body, offset))
            file.write(body)
            digest.update(body)
            offset += len(body)
        end = bytes(2 * _BLOCK)
        file.write(end)
        digest.update(end)
        file.flush()
        os.fsync(file.fileno())
    if bad:
        temporary.unlink()
        return bad
    index = ShardIndex(stage, shard, digest.hexdigest(), offset + len(end), tuple(entries))
    os.replace(temporary, target)
    sync_folder(target.parent)
    write_atomic(index_path(root, stage, shard), index.to_json())
    remove_parts(root, stage, shard)
    return index


def remove_parts(root: Path, stage: str, shard: int) -> None:
    """Delete the staging folder of a shard, if there is one."""
    folder = part_path(root, stage, shard, "x").parent
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()


def salvage(root: Path, index: ShardIndex, stamps: Mapping[str, str]) -> None:
    """Turn the assets of a shard that are undamaged, and still made from what ``stamps`` (by key) says, into
    parts.

    Failures are kept like results: they carry no bytes that could be damaged.
    """
    try:
        file: BinaryIO | None = open(tar_path(root, index.stage, index.shard), "rb")
    except OSError:
        file = None
    with file or nullcontext():
        for entry in index.entries:
            if stamps.get(entry.key) != entry.stamp:
                continue
            path = part_path(root, index.stage, index.shard, entry.key)
            if entry.failed is not None:
                write_part(path, entry.key, Part(failed=entry.failed), entry.stamp)
            elif file is not None:
                file.seek(entry.offset)
                body = file.read(entry.size)
                if hashlib.sha256(body).hexdigest() == entry.sha256:
                    _write_part(path, entry.key, body, {"info": dict(entry.info)}, entry.stamp)


def remove_leftovers(root: Path, stage: str, shard: int) -> None:
    """Delete temporary files that a killed run left beside a shard."""
    for target in (tar_path(root, stage, shard), index_path(root, stage, shard)):
        for path in target.parent.glob(f".{target.name}.*.tmp"):
            path.unlink(missing_ok=True)


def is_intact(root: Path, index: ShardIndex, checksum: bool = True) -> bool:
    """Whether the tar has the size, and with ``checksum`` the SHA-256, that its index states."""
    path = tar_path(root, index.stage, index.shard)
    try:
        if path.stat().st_size != index.size:
            return False
        if not checksum:
            return True
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() == index.sha256
    except OSError:
        return False


def _tar_entry(key: str, member: str, data: bytes) -> bytes:
    """A ustar header and the data, padded to whole blocks; the same bytes for the same content."""
    info = tarfile.TarInfo(f"{key}.{member}")
    if len(info.name.encode()) > _MAX_NAME:
        raise ValueError(f"{info.name}: member names are limited to {_MAX_NAME} bytes")
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)


def _entry(asset_id: str, head: Mapping[str, Any], body: bytes, offset: int) -> Entry:
    if "failed" in head:
        return Entry(asset_id, head["key"], head["stamp"], failed=str(head["failed"]))
    members, position = {}, 0
    while position < len(body):
        info = tarfile.TarInfo.frombuf(body[position : position + _BLOCK], "utf-8", "strict")
        members[info.name[len(head["key"]) + 1 :]] = (offset + position + _BLOCK, info.size)
        position += _BLOCK + -(-info.size // _BLOCK) * _BLOCK
    return Entry(
        asset_id, head["key"], head["stamp"], offset, len(body), head["sha256"], members, head["info"]
    )


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    if entry.failed is not None:
        return {"id": entry.id, "key": entry.key, "stamp": entry.stamp, "failed": entry.failed}
    return {
        "id": entry.id,
        "key": entry.key,
        "stamp": entry.stamp,
        "offset": entry.offset,
        "size": entry.size,
        "sha256": entry.sha256,
        "info": dict(entry.info),
        "members": {name: list(place) for name, place in entry.members.items()},
    }


def _entry_from_dict(raw: Mapping[str, Any]) -> Entry:
    if "failed" in raw:
        return Entry(raw["id"], raw["key"], raw["stamp"], failed=raw["failed"])
    members = {name: (int(place[0]), int(place[1])) for name, place in raw["members"].items()}
    where = int(raw["offset"]), int(raw["size"])
    return Entry(raw["id"], raw["key"], raw["stamp"], *where, raw["sha256"], members, raw["info"])


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
