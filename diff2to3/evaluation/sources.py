"""Where the pictures of a method, or of the truth, come from.

    ply:FOLDER            FOLDER/ID.ply, 3D Gaussians; rendered from the protocol's cameras
    ply-yup:FOLDER        the same, written with y up (as glTF is): the cameras turn with it
    images:FOLDER         FOLDER/ID/*.png (or jpg, webp) in the order of their names, one for each camera
    assets:CATALOGUE      meshes of a folder, zip or published data set, rendered
    call:FILE.py:NAME     NAME(subject) -> Gaussians, or Views from subject.cameras
    model:NAME            a model of ours (embedded name, folder or repository): generation from the asset's photo, or
                          reconstruction of its mesh, as the protocol's task says

A plain path is looked at: a folder with .ply files, with folders of pictures, or else a catalogue. Retrieval and random
training assets, the baselines of generation, are sources too (retrieval.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3.assets import AssetRecord, load_asset
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import find_records, public_name
from diff2to3.evaluation.models import Autoencoder, Generator
from diff2to3.evaluation.protocol import Cameras
from diff2to3.evaluation.subjects import (
    ObjectSource,
    Pictures,
    Source,
    Subject,
    show_gaussians,
    show_views,
)
from diff2to3.formats.frames import frame_in, out_of_frame
from diff2to3.formats.ply import read_ply
from diff2to3.types import Gaussians, Mesh, Views
from diff2to3.views import make_renderer

KINDS = ("ply", "ply-yup", "images", "assets", "call", "model")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SAMPLED = 1 << 16


@dataclass(frozen=True)
class GaussianSource(Source):
    """A folder of .ply files. ``up`` is the axis that points up in them: "z" (ours) or "y"."""

    folder: str
    up: str = "z"

    @property
    def name(self) -> str:
        return public_name(self.folder)

    @cached_property
    def path(self) -> Path:
        return _folder(self.folder)

    def load(self) -> None:
        self.path  # noqa: B018  an InputError where it is missing

    def ids(self) -> list[str]:
        files = self.path.rglob("*.ply")
        return sorted(p.relative_to(self.path).with_suffix("").as_posix() for p in files)

    def fingerprint(self) -> str:
        return _listing_digest(self.path, self.path.rglob("*.ply"), f"ply {self.up}")

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        path = self.path / f"{subject.id}.ply"
        gaussians, metadata = read_ply(path)
        viewmats = cameras.viewmats
        if self.up == "z":  # what a file says of itself goes before what is usual
            gaussians = out_of_frame(gaussians, frame_in(metadata) or "native")
        else:  # (x, y, z) of the file is (x, -z, y) of the object frame
            turn = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
            viewmats = viewmats @ turn
        turned = Cameras(viewmats, cameras.Ks, cameras.resolution)
        screen_filter = metadata.get("screen_filter", subject.rules.screen_filter)
        if not isinstance(screen_filter, (int, float)) or not 0 <= screen_filter < math.inf:
            raise InputError(f"{path}: screen_filter: expected a number of px² >= 0, got {screen_filter!r}")
        shown = show_gaussians(gaussians, turned, subject, float(screen_filter))
        return Pictures(shown.images, shown.alphas, gaussians if self.up == "z" else None)


@dataclass(frozen=True)
class ImageSource(Source):
    """A folder of folders of pictures. ID/photo.png is, for the truth, the photo that generation starts from; for a
    method, its object from that camera. Without it, the CLIP score is not defined.
    """

    folder: str

    @property
    def name(self) -> str:
        return public_name(self.folder)

    @cached_property
    def path(self) -> Path:
        return _folder(self.folder)

    def load(self) -> None:
        self.path  # noqa: B018  an InputError where it is missing

    def ids(self) -> list[str]:
        parents = {p.parent for p in self.path.rglob("*") if p.suffix.lower() in PICTURES}
        return sorted(p.relative_to(self.path).as_posix() for p in parents if p != self.path)

    def has_photo(self, asset_id: str) -> bool:
        """Whether there is a picture from the photo's camera."""
        return any(p.stem == "photo" for p in (self.path / asset_id).glob("photo.*"))

    def fingerprint(self) -> str:
        files = (p for p in self.path.rglob("*") if p.suffix.lower() in PICTURES)
        return _listing_digest(self.path, files, "images")

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        folder = self.path / subject.id
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
        files = [p for p in files if (p.stem == "photo") == photo]
        if len(files) != len(cameras.viewmats):
            what = "a photo.png" if photo else f"{len(cameras.viewmats)} pictures"
            raise InputError(
                f"{folder}: expected {what}, one for each of the protocol's cameras, got {len(files)}"
            )
        background = torch.tensor(subject.rules.background)
        images, alphas = [], []
        for path in files:
            rgba = read_picture(path, cameras.resolution)
            alpha = rgba[..., 3:] if rgba.shape[-1] == 4 else None
            images.append(
                rgba[..., :3] if alpha is None else rgba[..., :3] * alpha + (1 - alpha) * background
            )
            alphas.append(alpha)
        known = [a[..., 0] for a in alphas if a is not None]
        stacked = torch.stack(known) if len(known) == len(files) else None
        return Pictures(
            torch.stack(images).to(subject.device), None if stacked is None else stacked.to(subject.device)
        )


def read_picture(path: Path, resolution: int) -> Tensor:
    """[R, R, 3 or 4] in [0, 1]. InputError that names the file where it is damaged or of another size."""
    try:
        with Image.open(path) as picture:
            has_alpha = "A" in picture.getbands() or "transparency" in picture.info
            array = np.asarray(picture.convert("RGBA" if has_alpha else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a picture: {error}") from error
    if array.shape[:2] != (resolution, resolution):
        height, width = array.shape[:2]
        raise InputError(
            f"{path}: is {width} x {height}; the protocol compares {resolution} x {resolution}: render at that size, "
            f"or set resolution={height} for all"
        )
    return torch.from_numpy(array.astype(np.float32) / 255)


@dataclass(frozen=True)
class MeshSource(Source):
    """Assets of folders, zips, 3D files or published data sets, rendered as the protocol says; of ``split`` alone."""

    specs: tuple[str, ...]
    split: str | None = None
    has_meshes: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return ", ".join(map(public_name, self.specs)) + (f" ({self.split})" if self.split else "")

    @cached_property
    def records(self) -> dict[str, AssetRecord]:
        return find_records(self.specs, self.split)

    def load(self) -> None:
        self.records  # noqa: B018  an InputError where there are none

    def ids(self) -> list[str]:
        return sorted(self.records)

    def names(self) -> dict[str, str]:
        """By id what the owners of a published set call each asset, "mug/mug_007/mug_007.blend"; else its id."""
        return {i: record.metadata.get("file_identifier") or i for i, record in self.records.items()}

    def fingerprint(self) -> str:
        lines = (f"{record.id} {record.sha256}" for record in self.records.values())
        return hashlib.sha256("\n".join(["assets", *lines]).encode()).hexdigest()

    def mesh(self, asset_id: str) -> Mesh:
        if asset_id not in self.records:
            raise InputError(f"{self.name}: has no asset {asset_id!r}")
        return load_asset(self.records[asset_id])

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        own = subject.source is self
        renderer = subject.renderer if own else make_renderer(self.mesh(subject.id), subject.rules.render)
        size = cameras.resolution
        return show_views(renderer.render(cameras.viewmats, cameras.Ks, size, size), subject)


@dataclass(frozen=True)
class CallSource(ObjectSource):
    """A function in a Python file: ``function(subject)`` gives Gaussians, or Views from ``subject.cameras``."""

    file: str
    function: str

    @property
    def name(self) -> str:
        return self.function

    @cached_property
    def module(self) -> Any:
        path, asked = Path(self.file), f"call:{self.file}:{self.function}"
        if not self.file or not path.is_file():
            raise InputError(f"{asked}: expected call:FILE.py:NAME, with FILE.py a file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, self.function, None)):
            raise InputError(f"{asked}: {path} has no function {self.function!r}")
        return module

    def load(self) -> None:
        self.module  # noqa: B018  an InputError where it is missing

    def fingerprint(self) -> str:
        own = getattr(
            self.module, "FINGERPRINT", ""
        )  # such as the hash of the weights that the function loads
        return hashlib.sha256(Path(self.file).read_bytes() + str(own).encode()).hexdigest()

    def make(self, subject: Subject) -> Gaussians | Views:
        call: Callable[[Subject], Gaussians | Views] = getattr(self.module, self.function)
        return call(subject)


def open_source(spec: str, device: torch.device, offline: bool = False, task: str = "generation") -> Source:
    """The source that ``spec`` names, loaded; see the top of this file. InputError that says what was expected."""
    source = _named(spec, str(device), offline, task)
    source.load()
    return source


def _named(spec: str, device: str, offline: bool, task: str) -> Source:
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        return _look_at(spec)
    if kind in ("ply", "ply-yup"):
        return GaussianSource(rest, "y" if kind == "ply-yup" else "z")
    if kind == "images":
        return ImageSource(rest)
    if kind == "assets":
        return MeshSource((rest,))
    if kind == "call":
        return CallSource(*rest.rpartition(":")[::2])
    if task == "generation":
        return Generator(rest, device, offline)
    return Autoencoder(rest, device, offline)


def _look_at(spec: str) -> Source:
    folder = Path(spec)
    if folder.is_dir():
        if next(folder.rglob("*.ply"), None):
            return GaussianSource(spec)
        has_models = any(p.suffix.lower() in (".glb", ".gltf", ".obj", ".zip") for p in folder.rglob("*"))
        if not has_models and any(p.suffix.lower() in PICTURES for p in folder.rglob("*")):
            return ImageSource(spec)
    return MeshSource((spec,))


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{path}: no such folder")
    return folder


def _listing_digest(folder: Path, files: Iterable[Path], kind: str) -> str:
    """Names, sizes, beginnings and ends of files: reading gigabytes whole would take longer than some benchmarks,
    and times change when a folder is copied.
    """
    digest = hashlib.sha256(kind.encode())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"\n{path.relative_to(folder).as_posix()} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLED))
            file.seek(max(size - _SAMPLED, 0))
            digest.update(file.read(_SAMPLED))
    return digest.hexdigest()
