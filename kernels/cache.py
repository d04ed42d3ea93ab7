"""Finds the folder with a part's compiled libraries, or compiles it into a per-user cache.

Order: beside this package (``pip install`` put it there), the user's cache, a private folder under the
system's temporary directory. The last one serves users without a writable home.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import build

BESIDE = Path(__file__).resolve().parent / "_lib"


def cache_roots() -> list[Path]:
    """Folders that may hold the cache, best first."""
    roots = []
    try:
        home = Path.home()
        roots.append(
            {"win32": home / "AppData/Local", "darwin": home / "Library/Caches"}.get(
                sys.platform, home / ".cache"
            )
            / "diff2to3"
        )
    except RuntimeError:  # a user without a home
        pass
    user = os.getuid() if hasattr(os, "getuid") else "user"
    roots.append(Path(tempfile.gettempdir()) / f"diff2to3-{user}")
    return roots


def platform_name() -> str:
    """Machine and C library: a home may be shared by machines that cannot load each other's libraries."""
    libc = ""
    if hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        libc = (os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", "")
    return "-".join(filter(None, [sys.platform, platform.machine().lower(), libc]))


def cached_folder(root: Path, part: str) -> Path:
    return root / f"{part}-{build.source_hash(part)}-{platform_name()}"


def is_private(folder: Path) -> bool:
    """Whether only this user can write to ``folder``: code from anywhere else must not be loaded."""
    if not hasattr(os, "getuid"):
        return True
    info = folder.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


def existing(part: str) -> Iterator[Path]:
    """Complete and current builds of ``part``, best first."""
    folders = [BESIDE / part]
    for root in cache_roots():
        try:
            if is_private(root):
                folders.append(cached_folder(root, part))
        except OSError:
            continue
    yield from (folder for folder in folders if build.is_current(folder, part))


def writable_root() -> Path:
    """The first cache root that this process can write to. Raises OSError if there is none."""
    reasons = []
    for root in cache_roots():
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private(root):
                reasons.append(f"{root}: other users can write to it")
                continue
            with tempfile.TemporaryFile(dir=root):
                return root
        except OSError as error:
            reasons.append(str(error))
    raise OSError("no folder for compiled kernels: " + "; ".join(reasons))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock on the file ``path``, waiting for other processes; no effect where locks do not work."""
    with open(path, "a+b") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # two processes then compile the same thing, and one result stays
        yield


def compile_once(part: str, compile_into: Callable[[Path], object], damaged: set[Path]) -> Path:
    """Compile ``part`` into the cache unless another process just did. Raises BuildError or OSError."""
    root = writable_root()
    folder = cached_folder(root, part)
    with exclusive(root / f"{folder.name}.lock"):
        if folder in damaged or not build.is_current(folder, part):
            print(
                f"diff2to3: compiling the {part} kernels (once, under a minute)", file=sys.stderr, flush=True
            )
            compile_into(folder)
    return folder
