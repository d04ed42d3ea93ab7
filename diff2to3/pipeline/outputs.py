"""What generation leaves behind: files of Gaussians, a turntable and metadata.json an asset, each set whole or not at
all.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diff2to3 import __version__
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.files import sync_folder
from diff2to3.formats import FORMATS, Format, encode
from diff2to3.formats.comments import CONVENTIONS
from diff2to3.gaussians.render import EPS2D
from diff2to3.machine import peak_memory
from diff2to3.mesh.write import write_mesh
from diff2to3.pipeline.camera_file import camera_entry
from diff2to3.pipeline.index import METADATA
from diff2to3.pipeline.turntable import DEFAULT_VIEWS

if TYPE_CHECKING:
    from diff2to3.pipeline.image_to_3d import ImageTo3D
    from diff2to3.pipeline.result import Result

#: What ``--turntable`` takes.
TURNTABLES = ("png", "gif", "mp4", "none")
RESOLUTION = 256


class OutputFolder:
    """Where results go: a folder in it for each asset, however many there are.

    As a context: the folders are made on entry, so that an unwritable place is found out before anything slow begins,
    and those that are still empty at the end are removed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        self.make(self.folder)
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            self.clean()
            raise unwritable(self.folder, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clean()

    def make(self, folder: Path) -> None:
        missing = [f for f in (folder, *folder.parents) if not f.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        self.made += reversed(missing)

    def clean(self) -> None:
        for folder in reversed(self.made):
            try:
                folder.rmdir()
            except OSError:  # not empty: it holds results
                pass

    def replace(self, stem: str, files: Mapping[str, Path]) -> Path:
        """Move finished files (name → where it is now) to their places; returns the folder."""
        place = self.folder / stem
        self.make(place)
        for name, path in files.items():
            os.replace(path, place / name)
        sync_folder(place)
        return place


class Writer:
    """Writes results; ``common`` and ``seconds`` go into every asset's metadata."""

    def __init__(
        self,
        output: OutputFolder,
        picture: str,
        common: Mapping[str, Any],
        seconds: Mapping[str, float],
        *,
        viewer: bool = False,
        mesh: bool = False,
        formats: Sequence[Format] = (FORMATS["ply"],),
        encoding: Mapping[str, Any] | None = None,
    ) -> None:
        """``encoding``: options of :func:`diff2to3.formats.encode`."""
        self.mesh = mesh
        self.formats, self.encoding = formats, dict(encoding or {})
        self.output, self.picture, self.viewer = output, picture, viewer
        self.common, self.seconds = common, seconds

    def write(self, stem: str, result: Result, own: Mapping[str, Any]) -> tuple[Path, list[str]]:
        """All files of one asset; returns the path of the Gaussians and the names of all files.

        The files are written and forced to the disk under a hidden folder first, then renamed one after another.
        """
        files = [f"{stem}{entry.ending}" for entry in self.formats]
        picture = f"{stem}_turntable.{self.picture}"
        meshes = [f"{stem}_mesh.glb"] if self.mesh else []
        page = [f"{stem}.html"] if self.viewer else []
        cuts = cut_outs(stem, result)
        names = [*files, *([] if self.picture == "none" else [picture]), *page, *meshes, *cuts, METADATA]
        seconds = {**self.seconds, **result.seconds}
        try:
            with tempfile.TemporaryDirectory(dir=self.output.folder, prefix=".diff2to3-") as temporary:
                folder = Path(temporary)
                before = time.perf_counter()
                if self.picture != "none":
                    draw(folder / picture, result)
                    seconds["turntable"] = time.perf_counter() - before
                for name, entry in zip(files, self.formats, strict=True):
                    before = time.perf_counter()
                    content = encode(result.gaussians, entry, result.record(), **self.encoding)
                    (folder / name).write_bytes(content)
                    seconds[entry.name] = time.perf_counter() - before
                for name in page:
                    before = time.perf_counter()
                    page_text = result_page(result, stem, result.record())
                    (folder / name).write_text(page_text, encoding="utf-8", errors="replace")
                    seconds["viewer"] = time.perf_counter() - before
                for name, image in cuts.items():
                    image.save(folder / name)
                for name in meshes:
                    before = time.perf_counter()
                    write_mesh(folder / name, result.to_mesh())
                    seconds["mesh"] = time.perf_counter() - before
                metadata = self.metadata(result, own, seconds, names)
                (folder / names[-1]).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
                for name in names:
                    sync(folder / name)
                place = self.output.replace(stem, {name: folder / name for name in names})
        except OSError as error:
            raise unwritable(self.output.folder / files[0], error) from error
        return place / files[0], names

    def metadata(
        self, result: Result, own: Mapping[str, Any], seconds: Mapping[str, float], names: list[str]
    ) -> dict[str, Any]:
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        return {
            **own,
            **self.common,
            "seed": result.seed,
            **({} if result.camera is None else {"camera": camera_entry(result.camera)}),
            "background_removal": [photo.method for photo in result.photos],
            "warnings": list(result.notes),
            "num_voxels": len(result.coords),
            "num_gaussians": len(result.gaussians),
            "files": names,
            "seconds": {**rounded, "total": round(sum(seconds.values()), 3)},
            "peak_memory_bytes": peak_memory(torch.device(self.common["device"])),
        }


class FileWriter:
    """Writes one result to one file, in the format that the path's ending names, and nothing else.

    ``encoding``: options of :func:`diff2to3.formats.encode`. ``mesh``: a textured mesh in place of the Gaussians.
    """

    def __init__(self, path: Path, encoding: Mapping[str, Any] | None = None, *, mesh: bool = False) -> None:
        self.path, self.encoding, self.mesh = path, dict(encoding or {}), mesh

    def write(self, stem: str, result: Result, own: Mapping[str, Any]) -> tuple[Path, list[str]]:
        if self.mesh:
            files = write_mesh(self.path, result.to_mesh())
            return self.path, [file.name for file in files]
        result.save(self.path, **self.encoding)
        return self.path, [self.path.name]


def describe(name: str, model: ImageTo3D, device: torch.device) -> dict[str, Any]:
    """What is the same for all assets of a run."""
    return {
        "model": name,
        "frame": CONVENTIONS["frame"],
        "model_frame": model.frame,
        "color_space": CONVENTIONS["color_space"],
        "screen_filter": EPS2D,
        "device": str(device),
        "dtype": str(model.networks.latent_flow.torso_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "diff2to3": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def check_turntable(kind: str) -> None:
    """MissingDependencyError where films cannot be written."""
    if kind == "mp4" and find_spec("imageio_ffmpeg") is None:
        raise MissingDependencyError("imageio-ffmpeg", "video")


def cut_outs(stem: str, result: Result) -> dict[str, Image.Image]:
    """File name → the object on transparency, as the model was given it: one a photo."""
    found = [photo.cut_out for photo in result.photos if photo.cut_out is not None]
    if len(found) == 1:
        return {f"{stem}_cutout.png": found[0]}
    return {f"{stem}_cutout_{k}.png": image for k, image in enumerate(found)}


def draw(path: Path, result: Result) -> None:
    from diff2to3.gaussians.pictures import write_frames

    write_frames(path, result.turntable(DEFAULT_VIEWS[path.suffix], RESOLUTION))


def result_page(result: Result, name: str, note: Mapping[str, Any]) -> str:
    """The page that shows a result (:func:`diff2to3.web.viewer.viewer_page`), with what the model saw beside it."""
    from diff2to3.web.viewer import home_of, seen_picture, viewer_page

    return viewer_page(result.gaussians, name, photo=seen_picture(result), home=home_of(result), note=note)


def sync(path: Path) -> None:
    """Force a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written to: {error.strerror or error}")
