"""Models of ours as sources: a generator from the asset's photo, an autoencoder from its mesh."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diff2to3.checkpoint import MODEL_FILE, read_bundle
from diff2to3.errors import InputError
from diff2to3.evaluation.shapes import shape_of_gaussians
from diff2to3.evaluation.subjects import Made, ObjectSource, Subject
from diff2to3.files import file_sha256
from diff2to3.flow.denoise import resampled
from diff2to3.hub import EMBEDDED, Source, embedded_models
from diff2to3.metrics.geometry import voxel_iou
from diff2to3.pipeline import ImageTo3D
from diff2to3.pipeline.reconstruct import ReconstructionSettings, Reconstructor
from diff2to3.types import Gaussians
from diff2to3.views import RenderConfig


@dataclass(frozen=True)
class ModelSource(ObjectSource):
    """A bundle: the name of an embedded one, a folder or a hub repository."""

    model: str
    device: str = "cpu"
    offline: bool = False

    @property
    def name(self) -> str:
        return self._folder.name or self.model

    @property
    def _folder(self) -> Path:
        return EMBEDDED / self.model if self.model in embedded_models() else Path(self.model).expanduser()

    def fingerprint(self) -> str:
        """A hash over its files; a repository's files are known by its name."""
        digest = hashlib.sha256(self.model.encode())
        for path in sorted(p for p in self._folder.rglob("*") if p.suffix in (".safetensors", ".json")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Generator(ModelSource):
    """What a model generates from the asset's photo.

    steps    of both samplers; None for the model's
    nothing  a photo from which the model makes nothing is scored as empty space; else it is the asset's error
    """

    steps: int | None = None
    nothing: bool = False

    @cached_property
    def network(self) -> ImageTo3D:
        return ImageTo3D.from_pretrained(self.model, device=self.device, offline=self.offline)

    def load(self) -> None:
        self.network  # noqa: B018  an InputError where weights are missing or damaged

    @property
    def grid(self) -> int:
        """Cells a side of the voxels that it generates."""
        return int(self.network.networks.latent_flow.config.resolution)

    def options(self) -> dict[str, Any]:
        """What the model is called with, beside photo and seed."""
        if self.steps is None:
            return {}
        stages = self.network.structure_settings, self.network.latent_settings
        structure, latent = resampled(stages, {"num_steps": self.steps})
        return {"structure": structure, "latent": latent}

    def make(self, subject: Subject) -> Made:
        photo = subject.photo  # its errors are the asset's
        try:
            made = self.network(photo, seed=subject.seed, **self.options())
        except InputError as error:
            if not self.nothing:
                raise
            none: dict[str, float | None] = {"seconds": None, "num_voxels": 0, "num_gaussians": 0}
            return Made(no_gaussians(), facts=none, remarks={"nothing": str(error)})
        seconds = round(sum(made.seconds.values()), 3)
        facts = {
            "seconds": seconds,
            "num_voxels": len(made.coords),
            "num_gaussians": len(made.gaussians),
        }
        shape, rules = None, subject.rules
        if rules.own_voxels and made.latents.resolution == rules.grid:
            shape = shape_of_gaussians(rules, made.gaussians, subject.seed, made.coords)
        return Made(made.gaussians, shape, facts)


@dataclass(frozen=True)
class Autoencoder(ModelSource):
    """What a model's 2to3-VAE gives back of the asset's mesh. The views that it is given are of its training's cameras.

    structure  also how well its sparse-structure VAE keeps the voxels: the fact ``structure_iou``
    """

    structure: bool = False

    @cached_property
    def network(self) -> Reconstructor:
        return Reconstructor.from_pretrained(self.model, device=self.device, offline=self.offline)

    def load(self) -> None:
        self.network  # noqa: B018  an InputError where weights are missing or damaged

    def make(self, subject: Subject) -> Made:
        lighting = self.network.settings.views.render
        same = replace(lighting, outputs=()) == replace(subject.rules.render, outputs=())
        renderer = subject.renderer if same and subject.rules.task == "reconstruction" else None
        made = self.network(subject.mesh, name=subject.id, renderer=renderer)
        coords = made.latents.coords[:, 1:]
        facts = {}
        if self.structure:
            kept = self.network.structure_of(coords)
            if kept is not None:
                facts["structure_iou"] = voxel_iou(kept.cpu(), coords.cpu())
        facts |= {"num_voxels": float(len(coords)), "num_gaussians": float(len(made.gaussians))}
        return Made(made.gaussians, facts=facts)


def no_gaussians() -> Gaussians:
    """An object that is nowhere."""
    return Gaussians(
        torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 1, 3)
    )


def model_digest(source: str, offline: bool = False) -> tuple[str, str]:
    """(public name, hash over the networks' files) of a bundle."""
    place = Source(source, offline)
    if place.folder is not None and not place.has(MODEL_FILE):  # TRELLIS's layout
        files = sorted(place.folder.rglob("*.safetensors"))
        digest = hashlib.sha256("".join(file_sha256(file) for file in files).encode())
        return Path(source).name, digest.hexdigest()
    path = place.file(MODEL_FILE)
    digest = hashlib.sha256(path.read_bytes())
    for entry in read_bundle(path.parent).networks.values():
        digest.update(file_sha256(place.file(entry.file)).encode())
    return Path(source).name, digest.hexdigest()


def model_lighting(source: str, offline: bool = False) -> RenderConfig:
    """How the training set of a bundle was lit; the default where it does not say."""
    place = Source(source, offline)
    if place.folder is not None and not place.has(MODEL_FILE):
        return RenderConfig()
    path = place.file(MODEL_FILE)
    settings = read_bundle(path.parent).settings
    if not settings.get("features"):
        return RenderConfig()
    return ReconstructionSettings.from_settings(settings, str(path)).views.render
