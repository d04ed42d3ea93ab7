"""Where an asset's bytes are: a file in a folder or in a zip, and the files beside it that it names."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diff2to3.assets.limits import Limits
from diff2to3.errors import InputError

#: Files and folders that are looked through for one that an asset names by a path that is not there.
_MAX_LISTED = 20_000


class Resolver(Protocol):
    """The files that an asset may name."""

    def __call__(self, uri: str) -> bytes:
        """The file at a URI relative to the asset. InputError when it is missing or must not be read."""
        ...

    def find(self, path: str, folder: str = "") -> tuple[str, bytes]:
        """As exporters write paths: see :meth:`FilesBeside.find`."""
        ...


class NoFiles:
    """The resolver of bytes in memory, which can have no file beside them."""

    def __call__(self, uri: str) -> bytes:
        raise InputError(f"names the file {uri[:80]!r}, which in-memory data cannot have beside it")

    def find(self, path: str, folder: str = "") -> tuple[str, bytes]:
        return path, self(path)


def safe_member(path: str) -> str:
    """``path`` as a clean relative posix path. InputError when it is absolute or leaves its container."""
    clean = posixpath.normpath(path.replace("\\", "/"))
    parts = clean.split("/")
    if clean in ("", ".") or clean.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in clean:
        raise InputError(f"path {path!r} leaves its folder or archive, which is refused")
    return clean


@dataclass(frozen=True)
class FileSource:
    """One file: ``member`` (a relative posix path) of ``container`` (a folder or a zip). Picklable."""

    container: str
    member: str

    @staticmethod
    def of(path: str | os.PathLike[str]) -> FileSource:
        """The source of a plain file; the files it names must lie in its folder."""
        p = Path(path)
        return FileSource(str(p.parent), p.name)

    @property
    def is_zipped(self) -> bool:
        return os.path.isfile(self.container)

    def __str__(self) -> str:
        return f"{self.container}{'!' if self.is_zipped else '/'}{self.member}"

    def read(self, limits: Limits) -> bytes:
        """The file's bytes. InputError when missing, damaged, over ``limits`` or outside its container."""
        return _read(self.container, safe_member(self.member), limits)

    def resolver(self, limits: Limits) -> FilesBeside:
        """Reads what this file names, from the same folder or zip and nowhere else."""
        return FilesBeside(self, limits)


@dataclass(frozen=True)
class FilesBeside:
    """The files in the folder or zip of ``source``."""

    source: FileSource
    limits: Limits

    def __call__(self, uri: str) -> bytes:
        if "://" in uri:
            raise InputError(f"the file names {uri[:80]!r}; only files beside it are read")
        relative = posixpath.join(posixpath.dirname(self.source.member), urllib.parse.unquote(uri))
        return _read(self.source.container, safe_member(relative), self.limits)

    def find(self, path: str, folder: str = "") -> tuple[str, bytes]:
        """(where it was found, its bytes) of a file that an exporter named, perhaps on another machine.

        It is looked for relative to ``folder`` (of the file that names it, relative to the asset), then relative to
        the asset, and then by its last name, in any case, in the asset's folder and below; of several, the one
        whose folders agree best. Both are relative to the asset. InputError when there is none.
        """
        here = posixpath.dirname(self.source.member)
        clean = path.strip().strip('"').replace("\\", "/")
        for start in dict.fromkeys((folder, "")):
            for name in dict.fromkeys((clean, urllib.parse.unquote(clean))):
                try:
                    member = safe_member(posixpath.join(here, start, name))
                except InputError:
                    continue
                if self._holds(member):
                    return posixpath.relpath(member, here or "."), self._read(member)
        wanted = [part for part in clean.lower().split("/") if part not in ("", ".", "..")]
        if wanted:
            matches = [m for m in self._below(here) if posixpath.basename(m).lower() == wanted[-1]]
            if matches:
                best = min(matches, key=lambda m: (-_shared_end(m, wanted), m.count("/"), m))
                return posixpath.relpath(best, here or "."), self._read(best)
        raise InputError(f"no file {path[:80]!r} beside {self.source}")

    def _read(self, member: str) -> bytes:
        return _read(self.source.container, member, self.limits)

    def _holds(self, member: str) -> bool:
        if self.source.is_zipped:
            return member in open_zip(self.source.container).NameToInfo
        return os.path.isfile(os.path.join(self.source.container, member))

    def _below(self, folder: str) -> Iterator[str]:
        """Members in ``folder`` and below. A folder is listed no further once ``_MAX_LISTED`` entries were seen."""
        if self.source.is_zipped:
            prefix = f"{folder}/" if folder else ""
            yield from (n for n in open_zip(self.source.container).namelist() if n.startswith(prefix))
            return
        listed = 0
        for root, folders, names in os.walk(os.path.join(self.source.container, folder)):
            folders.sort()
            for name in sorted(names):
                yield Path(os.path.relpath(os.path.join(root, name), self.source.container)).as_posix()
            listed += len(names) + len(folders)
            if listed > _MAX_LISTED:
                return


def _shared_end(member: str, wanted: list[str]) -> int:
    """How many of the last parts of two paths agree, in any case."""
    pairs = zip(reversed(member.lower().split("/")), reversed(wanted), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _read(container: str, member: str, limits: Limits) -> bytes:
    if os.path.isfile(container):
        return _read_zipped(container, member, limits)
    root, path = os.path.realpath(container), os.path.join(container, member)
    # A symbolic link may be the user's own arrangement of a disk, so only a plain escape is refused: the
    # listed file itself may be a link, but a link in the middle of a path must stay inside.
    folder = os.path.realpath(os.path.dirname(path))
    if os.path.commonpath([root, folder]) != root:
        raise InputError(f"path {member!r} leaves its folder {container}, which is refused")
    try:
        limits.check(f"bytes in {member}", os.path.getsize(path), "max_file_bytes")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _read_zipped(container: str, member: str, limits: Limits) -> bytes:
    archive = open_zip(container)
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise InputError(f"{container} has no member {member!r}") from None
    limits.check(f"bytes in {member}", info.file_size, "max_file_bytes")
    try:
        with archive.open(info) as stream:
            data = stream.read(limits.max_file_bytes + 1)  # the declared size may lie
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"cannot unpack {member!r} from {container}: {error}") from None
    limits.check(f"bytes in {member}", len(data), "max_file_bytes")
    return data


def open_zip(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """The zip at ``path``, kept open for the next caller in this process until the file changes."""
    try:
        stat = os.stat(path)
        return _open_zip(os.fspath(path), stat.st_mtime_ns, stat.st_size)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{os.fspath(path)}: not a readable zip ({error})") from None


@functools.lru_cache(maxsize=16)
def _open_zip(path: str, mtime_ns: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
