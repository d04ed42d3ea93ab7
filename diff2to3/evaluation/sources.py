"""Where the pictures of a method, or of the truth, come from.

    ply:FOLDER            FOLDER/ID.ply, 3D Gaussians; rendered from the protocol's cameras
    ply-yup:FOLDER        the same, written with y up (as glTF is): the cameras turn with it
    images:FOLDER         FOLDER/ID/*.png (or jpg, webp) in the order of their names, one for each camera
    assets:CATALOGUE      meshes of a folder, zip or published data set, rendered
    call:FILE.py:NAME     NAME(subject) -> Gaussians, or Views from subject.cameras
    model:NAME            a model of ours (embedded name, folder or repository): generation from the asset's photo, or
                          reconstruction of its mesh, as the protocol's task says

A plain path is looked at: a folder with .ply files, with folders of pictures, or else a catalogue.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3.assets import Catalogue, load_asset, open_catalogue
from diff2to3.errors import InputError
from diff2to3.evaluation.protocol import Cameras
from diff2to3.evaluation.protocol import Protocol as Rules
from diff2to3.gaussians.ply import read_ply
from diff2to3.gaussians.render import render_pictures
from diff2to3.types import Gaussians, Mesh, Views
from diff2to3.views import make_renderer

KINDS = ("ply", "ply-yup", "images", "assets", "call", "model")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SAMPLED = 1 << 16


@dataclass(frozen=True)
class Pictures:
    """images [V, H, W, 3] over the protocol's background; alphas [V, H, W], None where the files have none.

    ``gaussians`` is the object itself, where there is one: shape metrics use it.
    """

    images: Tensor
    alphas: Tensor | None
    gaussians: Gaussians | None = None


class Subject:
    """One asset of a benchmark, as a method gets it.

    id, seed   of the asset; the seed is what a method that draws noise should start from
    rules      the protocol
    cameras    the views that will be compared
    device     where to compute
    """

    def __init__(self, asset_id: str, rules: Rules, truth: Source, device: torch.device) -> None:
        self.id, self.rules, self.device = asset_id, rules, device
        self.seed, self.cameras = rules.asset_seed(asset_id), rules.views_of(asset_id)
        self._truth = truth

    @cached_property
    def mesh(self) -> Mesh:
        """The asset's mesh. InputError where the truth is not a catalogue of meshes."""
        if not isinstance(self._truth, MeshSource):
            raise InputError(f"{self._truth.name}: has pictures, not meshes; this method needs meshes")
        return self._truth.mesh(self.id)

    @cached_property
    def truth(self) -> Pictures:
        """The asset from the protocol's cameras."""
        return self._truth.pictures(self, self.cameras)

    @cached_property
    def photo(self) -> Image.Image:
        """The RGBA picture that generation starts from."""
        shown = self.photo_pictures
        alphas = torch.ones_like(shown.images[..., 0]) if shown.alphas is None else shown.alphas
        background = shown.images.new_tensor(self.rules.background)
        # Back to straight colour, which is what a file with alpha holds.
        alpha = alphas[0, ..., None]
        straight = torch.where(alpha > 0, (shown.images[0] - (1 - alpha) * background) / alpha, 0)
        rgba = torch.cat([straight.clamp(0, 1), alpha], -1)
        return Image.fromarray((rgba * 255).round().byte().cpu().numpy(), "RGBA")

    @cached_property
    def photo_pictures(self) -> Pictures:
        return self._truth.pictures(self, self.rules.photo_of(self.id), photo=True)


class Source(Protocol):
    """Pictures of assets by id. ``name`` is for results, which are published: it holds no private path."""

    name: str

    def ids(self) -> list[str]:
        """The assets that it has, sorted; [] where it takes any."""
        ...

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        """``subject`` from ``cameras``. InputError that names the asset or file."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the source does."""
        ...


class GaussianSource:
    """A folder of .ply files. ``up`` is the axis that points up in them: "z" (ours) or "y"."""

    def __init__(self, folder: str, up: str = "z") -> None:
        self.name, self._folder, self._up = public_name(folder), _folder(folder), up

    def ids(self) -> list[str]:
        return _stems(self._folder, self._folder.rglob("*.ply"))

    def fingerprint(self) -> str:
        return _listing_digest(self._folder, self._folder.rglob("*.ply"), f"ply {self._up}")

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        path = self._folder / f"{subject.id}.ply"
        gaussians, metadata = read_ply(path)
        viewmats = cameras.viewmats
        if self._up == "y":  # (x, y, z) of the file is (x, -z, y) of the object frame
            turn = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
            viewmats = viewmats @ turn
        turned = Cameras(viewmats, cameras.Ks, cameras.resolution)
        screen_filter = metadata.get("screen_filter", subject.rules.screen_filter)
        if not isinstance(screen_filter, (int, float)) or not 0 <= screen_filter < math.inf:
            raise InputError(f"{path}: screen_filter: expected a number of px² >= 0, got {screen_filter!r}")
        shown = render_gaussians(gaussians, turned, subject, float(screen_filter))
        return Pictures(shown.images, shown.alphas, gaussians if self._up == "z" else None)


def render_gaussians(
    gaussians: Gaussians, cameras: Cameras, subject: Subject, screen_filter: float
) -> Pictures:
    """Gaussians from cameras, over the protocol's background, with opacity compensation."""
    g = gaussians.to(subject.device, torch.float32)
    background = torch.tensor(subject.rules.background, device=subject.device)
    size = cameras.resolution
    shown = render_pictures(
        g, cameras.viewmats, cameras.Ks, size, size, background=background, eps2d=screen_filter
    )
    return Pictures(*shown, gaussians)


class ImageSource:
    """A folder of folders of pictures. ID/photo.png is, for the truth, the photo that generation starts from; for a
    method, its object from that camera. Without it, the CLIP score is not defined.
    """

    def __init__(self, folder: str) -> None:
        self.name, self._folder = public_name(folder), _folder(folder)

    def ids(self) -> list[str]:
        parents = {p.parent for p in self._folder.rglob("*") if p.suffix.lower() in PICTURES}
        return sorted(p.relative_to(self._folder).as_posix() for p in parents if p != self._folder)

    def has_photo(self, asset_id: str) -> bool:
        """Whether there is a picture from the photo's camera."""
        return any(p.stem == "photo" for p in (self._folder / asset_id).glob("photo.*"))

    def fingerprint(self) -> str:
        files = (p for p in self._folder.rglob("*") if p.suffix.lower() in PICTURES)
        return _listing_digest(self._folder, files, "images")

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        folder = self._folder / subject.id
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


class MeshSource:
    """The assets of a catalogue, rendered as the protocol says."""

    def __init__(self, spec: str, split: str | None = None) -> None:
        """``split``: only these assets. InputError where there are none."""
        self.name = public_name(spec) + (f" ({split})" if split else "")
        self._catalogue: Catalogue = open_catalogue(spec)
        self._records = [r for r in self._catalogue if split is None or r.split == split]
        if split is not None and not self._records:
            known = ", ".join(sorted({r.split for r in self._catalogue if r.split})) or "none"
            raise InputError(f"--split {split}: no asset of {self.name} is of this split; known are {known}")
        self._kept: tuple[str, Any, Mesh] | None = None

    def ids(self) -> list[str]:
        return sorted(record.id for record in self._records)

    def names(self) -> dict[str, str]:
        """By id what the owners of a published set call each asset, "mug/mug_007/mug_007.blend"; else its id."""
        return {record.id: record.metadata.get("file_identifier") or record.id for record in self._records}

    def fingerprint(self) -> str:
        lines = (f"{record.id} {record.sha256}" for record in self._records)
        return hashlib.sha256("\n".join(["assets", *lines]).encode()).hexdigest()

    def mesh(self, asset_id: str) -> Mesh:
        return load_asset(self._catalogue[asset_id])

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        if self._kept is None or self._kept[0] != subject.id:  # photo and views share what rendering prepares
            mesh = subject.mesh
            self._kept = (subject.id, make_renderer(mesh, subject.rules.render), mesh)
        size = cameras.resolution
        views = self._kept[1].render(cameras.viewmats, cameras.Ks, size, size)
        return _composited(views, subject)


class CallSource:
    """A function of one's own: ``call(subject)`` gives Gaussians, or Views from ``subject.cameras``."""

    def __init__(self, call: Callable[[Subject], Any], name: str, fingerprint: str) -> None:
        self.name, self._call, self._fingerprint = name, call, fingerprint
        self._kept: tuple[Subject, Any] | None = None

    def ids(self) -> list[str]:
        return []

    def fingerprint(self) -> str:
        return self._fingerprint

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        if self._kept is None or self._kept[0] is not subject:
            self._kept = (subject, self._call(subject))
        made = self._kept[1]
        if isinstance(made, Gaussians):
            return render_gaussians(made, cameras, subject, subject.rules.screen_filter)
        if not isinstance(made, Views):
            raise InputError(f"{self.name}: expected Gaussians or Views, got {type(made).__name__}")
        if cameras is not subject.cameras:
            raise InputError(f"{self.name}: gives Views; the photo's camera needs Gaussians")
        if made.images.shape[:3] != (len(cameras.viewmats), cameras.resolution, cameras.resolution):
            raise InputError(
                f"{self.name}: expected views from subject.cameras, got {list(made.images.shape)}"
            )
        return _composited(made, subject)


def _composited(views: Views, subject: Subject) -> Pictures:
    background = views.images.new_tensor(subject.rules.background)
    return Pictures(views.composite(background).to(subject.device), views.alphas.to(subject.device))


def public_name(spec: str) -> str:
    """``toys4k:/data/toys4k`` → ``toys4k:toys4k``: the last part of the path says enough."""
    kind, colon, path = spec.rpartition(":")
    return f"{kind}{colon}{Path(path).expanduser().resolve().name}"


def open_source(spec: str, device: torch.device, offline: bool = False, task: str = "generation") -> Source:
    """The source that ``spec`` names; see the top of this file. InputError that says what was expected."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        return _look_at(spec)
    if kind in ("ply", "ply-yup"):
        return GaussianSource(rest, "y" if kind == "ply-yup" else "z")
    if kind == "images":
        return ImageSource(rest)
    if kind == "assets":
        return MeshSource(rest)
    if kind == "call":
        return _function(rest)
    return _model(rest, device, offline) if task == "generation" else _autoencoder(rest, device, offline)


def _look_at(spec: str) -> Source:
    folder = Path(spec)
    if folder.is_dir():
        if next(folder.rglob("*.ply"), None):
            return GaussianSource(spec)
        has_models = any(p.suffix.lower() in (".glb", ".gltf", ".obj", ".zip") for p in folder.rglob("*"))
        if not has_models and any(p.suffix.lower() in PICTURES for p in folder.rglob("*")):
            return ImageSource(spec)
    return MeshSource(spec)


def _function(rest: str) -> CallSource:
    file, _, name = rest.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise InputError(f"call:{rest}: expected call:FILE.py:NAME, with FILE.py a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    call = getattr(module, name, None)
    if not callable(call):
        raise InputError(f"call:{rest}: {path} has no function {name!r}")
    own = getattr(module, "FINGERPRINT", "")  # such as the hash of the weights that the function loads
    return CallSource(call, name, hashlib.sha256(path.read_bytes() + str(own).encode()).hexdigest())


def _model(rest: str, device: torch.device, offline: bool) -> CallSource:
    from diff2to3.pipeline import ImageTo3D

    model = ImageTo3D.from_pretrained(rest, device=device, offline=offline)

    def generate(subject: Subject) -> Gaussians:
        return model(subject.photo, seed=subject.seed).gaussians

    return CallSource(generate, *_identity(rest))


def _autoencoder(rest: str, device: torch.device, offline: bool) -> CallSource:
    from diff2to3.pipeline.reconstruct import Reconstructor

    model = Reconstructor.from_pretrained(rest, device=device, offline=offline)

    def reconstruct(subject: Subject) -> Gaussians:
        return model(subject.mesh, name=subject.id).gaussians

    return CallSource(reconstruct, *_identity(rest))


def _identity(model: str) -> tuple[str, str]:
    """(name, hash over its files) of a model; a repository's files are known by its name."""
    from diff2to3.hub import EMBEDDED, embedded_models

    folder = EMBEDDED / model if model in embedded_models() else Path(model).expanduser()
    digest = hashlib.sha256(model.encode())
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return folder.name or model, digest.hexdigest()


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{path}: no such folder")
    return folder


def _stems(folder: Path, files: Any) -> list[str]:
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in files)


def _listing_digest(folder: Path, files: Any, kind: str) -> str:
    """Names, sizes, beginnings and ends of files: reading gigabytes whole would take longer than some benchmarks,
    and times change when a folder is copied.
    """
    digest = hashlib.sha256(kind.encode())
    for path in sorted(cast(Sequence[Path], files)):
        size = path.stat().st_size
        digest.update(f"\n{path.relative_to(folder).as_posix()} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLED))
            file.seek(max(size - _SAMPLED, 0))
            digest.update(file.read(_SAMPLED))
    return digest.hexdigest()
