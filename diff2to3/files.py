"""Files: written so that a reader, or a run after a crash, sees the whole new content or the old one, never a
part; and text read in whatever Unicode encoding an editor left it."""

from __future__ import annotations

import codecs
import hashlib
import os
from pathlib import Path

from diff2to3.errors import InputError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` beside ``path``, force it to the disk, and rename it over ``path``.

    Raises OSError as ``open`` does; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the folder's entries (names, renames) to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(descriptor)


#: Byte order marks, the longer first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def utf8(data: bytes) -> bytes:
    """Text in any Unicode encoding as UTF-8 without a byte order mark; bytes without one are left alone.

    UTF-16 is also recognised without its mark, by the zero bytes of its first characters (text has none).
    Raises InputError when the bytes are not what their mark says.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            data = data[len(mark) :]
            return data if encoding == "utf-8" else _recode(data, encoding)
    head = data[:64]
    if len(head) >= 4 and b"\0" in head:
        for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
            if not any(head[first::2]) and all(head[1 - first :: 2]):
                return _recode(data, encoding)
    return data


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file that a person may have written: UTF-8, UTF-16 or UTF-32, with a mark or without.

    Raises OSError as ``open`` does, and InputError for bytes that are no text.
    """
    try:
        return utf8(Path(path).read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(path)}: not text in UTF-8 or UTF-16 ({error})") from None


def _recode(data: bytes, encoding: str) -> bytes:
    try:
        return data.decode(encoding).encode()
    except UnicodeError as error:
        raise InputError(f"damaged text: its first bytes say {encoding}, and {error}") from None


def file_sha256(*paths: Path) -> str:
    """SHA-256 of a file, or of several in turn, read in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
