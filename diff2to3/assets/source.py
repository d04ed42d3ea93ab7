"""Where an asset's bytes are: a file in a folder or in a zip, and the files beside it that it names."""

from __future__ import annotations

import functools
import os
import posixpath
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diff2to3.assets.limits import Limits
from diff2to3.errors import InputError

#: Reads a file that the asset names by a relative URI.
Resolver = Callable[[str], bytes]


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

    def resolver(self, limits: Limits) -> Resolver:
        """Reads URIs relative to this file, from the same folder or zip and nowhere else."""

        def resolve(uri: str) -> bytes:
            if "://" in uri:
                raise InputError(f"the file names {uri[:80]!r}; only files beside it are read")
            relative = posixpath.join(posixpath.dirname(self.member), urllib.parse.unquote(uri))
            return _read(self.container, safe_member(relative), limits)

        return resolve


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
