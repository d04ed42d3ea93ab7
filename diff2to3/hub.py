"""Where the files of a model are: in this package, a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from diff2to3.errors import InputError, MissingDependencyError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: The models that come with the package, a folder each.
EMBEDDED = Path(__file__).resolve().parent / "bundles"


def embedded_models() -> list[str]:
    """Names of the models in this package, such as ``mini``."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/model.json"))


@dataclass(frozen=True)
class Source:
    """``name`` is that of an embedded model, a folder's path, or a repository (owner/name); ``offline`` uses only what
    is cached here. An embedded name comes first: ``./mini`` is a folder of that name.
    """

    name: str
    offline: bool = False

    def __post_init__(self) -> None:
        if self.folder is None and not REPOSITORY.fullmatch(self.name):
            known = ", ".join(embedded_models()) or "none in this installation"
            raise InputError(
                f"{self.name}: no such folder, not an embedded model ({known}), and not the name of a hub "
                "repository (owner/name)"
            )

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a repository."""
        if self.name in embedded_models():
            return EMBEDDED / self.name
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    def has(self, relative: str) -> bool:
        """Whether a local folder holds the file; a repository is not asked."""
        return self.folder is not None and (self.folder / relative).is_file()

    def file(self, relative: str) -> Path:
        """The local path of a file, downloaded into the hub's cache if need be.

        Raises:
            InputError: the file is missing or cannot be reached; the message says where to put it.
            MissingDependencyError: a repository is named and huggingface_hub is not installed.
        """
        if self.folder is not None:
            path = self.folder / relative
            if not path.is_file():
                raise InputError(f"{path}: no such file; this model needs it, put it there")
            return path
        hint = (
            f"download the repository on a machine with a connection (hf download {self.name} --local-dir FOLDER) "
            f"and name FOLDER as the model, with FOLDER/{relative} in it"
        )
        return download(self.name, relative, self.offline, hint)


def is_local(source: str) -> bool:
    """Whether ``source`` means a path here rather than a repository (owner/name)."""
    looks_like_path = source.startswith((".", "/", "~")) or source.endswith(".safetensors")
    return Path(source).exists() or looks_like_path or source.count("/") != 1


def download(
    repository: str,
    file: str,
    offline: bool = False,
    hint: str = "",
    extra: str = "flux",
    *,
    repo_type: str = "model",
    folder: Path | None = None,
) -> Path:
    """A file of a repository on the Hugging Face hub, in the hub's cache here or under ``folder``.

    Args:
        offline: only what is cached.
        hint: what to do where it cannot be had, for the error.
        extra: of this package, which brings huggingface_hub.

    Raises:
        InputError: it cannot be had; the message says why.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", extra) from error
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, file, repo_type=repo_type, local_dir=folder, local_files_only=offline
            )
        )
    except Exception as error:  # the library's errors have no common base and change between versions
        raise InputError(not_found(repository, file, offline, error, hint)) from error


def not_found(repository: str, file: str, offline: bool, error: Exception, hint: str = "") -> str:
    """One line about a file of a repository that could not be had."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = "is not in the local cache" if offline else "could not be downloaded"
    reason = lines[0] if lines else type(error).__name__
    return f"{repository}: {file} {where} ({reason})" + (f"; {hint}" if hint else "")
