"""Where the weights of a feature extractor are, and which they were: a score without that cannot be compared.

Weights are named by a local path (a safetensors file, or a folder of transformers) or by a repository on the
Hugging Face hub. Nothing is unpickled here; published ``.pth`` files are turned into safetensors once, by
``eval/convert_weights.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.files import file_sha256
from diff2to3.hub import download
from diff2to3.tensors import read_tensors


@dataclass(frozen=True)
class WeightsRecord:
    """What a result says about an extractor's weights.

    name      of the extractor, such as ``dinov2``
    source    the path or repository that was asked for
    sha256    of the weights file
    version   of the library that ran it
    """

    name: str
    source: str
    sha256: str
    version: str

    def to_dict(self) -> dict[str, str]:
        """Plain values. The source is reduced to its last part: results are published, paths are private."""
        return {
            **asdict(self),
            "source": Path(self.source).name if Path(self.source).exists() else self.source,
        }


def record(name: str, source: str, file: Path, package: str) -> WeightsRecord:
    """The record of ``file``; ``package`` is whose version counts."""
    return WeightsRecord(name, source, file_sha256(file), f"{package} {_version(package)}")


def read_safetensors(path: str | Path, what: str, advice: str) -> dict[str, Tensor]:
    """Tensors by name. InputError, in one line with ``advice``, where the file is missing or not safetensors."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{what}: no file {path}; {advice}")
    try:
        return read_tensors(path)
    except InputError as error:
        raise InputError(f"{what}: {error}; {advice}") from error


def transformers_folder(name: str, source: str, offline: bool) -> Path:
    """The local folder of a transformers model with safetensors: ``source`` itself, or the hub's copy.

    Raises:
        InputError: not here and not to be had, in one line that says how to get it.
        MissingDependencyError: a repository is named and huggingface_hub is not installed.
    """
    folder = Path(source).expanduser()
    advice = f"download it (hf download {{}} --local-dir FOLDER) and give {name}=FOLDER"
    if folder.is_dir():
        for needed in ("config.json", "model.safetensors"):
            if not (folder / needed).is_file():
                raise InputError(f"{name}: no file {folder / needed}; {advice.format('REPOSITORY')}")
        return folder
    if source.startswith((".", "/", "~")):
        raise InputError(f"{name}: no folder {source}; {advice.format('REPOSITORY')}")
    hint = advice.format(source)
    files = [
        download(source, needed, offline, hint, "eval") for needed in ("config.json", "model.safetensors")
    ]
    return files[0].parent


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
