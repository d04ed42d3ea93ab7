"""What a benchmark renders and compares. Plain values, so that a YAML file holds a protocol and its hash names it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diff2to3.config import config_to_dict
from diff2to3.views import CameraConfig, LightingConfig, RenderConfig, generator_for, sample_cameras

TASKS = ("reconstruction", "generation")
#: Points on a surface that :func:`generation_rules` compares.
NUM_POINTS = 10_000


@dataclass(frozen=True)
class Cameras:
    """V cameras: viewmats [V, 4, 4], Ks [V, 3, 3], for square pictures of ``resolution`` pixels."""

    viewmats: Tensor
    Ks: Tensor
    resolution: int


@dataclass(frozen=True)
class Protocol:
    """A benchmark's protocol; eval/protocol/*.yaml say why each value is what it is.

    task          "reconstruction": pictures of the method against those of the asset, from the same cameras;
                  "generation": the method sees one photo; sets of pictures are compared, and pictures with it
    resolution    of all pictures, in pixels
    background    sRGB colour under pictures with alpha
    cameras       the views that are compared
    photo         the view that generation starts from
    seed          draws the assets, the directions of cameras, and each asset's seed for the method
    num_assets    drawn from the catalogue; null for all of it
    screen_filter variance in px² that Gaussians are rendered with, with opacity compensation, where their
                  file does not say
    ssim_border   see :func:`diff2to3.metrics.image.ssim`
    lpips_net     "vgg" or "alex"
    kd_subsets, kd_subset_size   of KD's estimate
    shape_points  sampled on surfaces for Chamfer and F-score; 0 leaves shapes out. Generation then is compared with
                  the asset itself as well, shape and pictures, which supposes that it is in the asset's frame
    f_threshold   of the F-score, in object units
    voxels        grid of the voxel IoU
    render        how the assets themselves are rendered

    What differs between kinds of protocols without a value of its own is a method or one of these, for a subclass to
    override:

    straight_photo  the photo's colours are the renderer's own; else they are taken back from over the background
    own_voxels      voxels of a generated object are the generator's, where it has this grid; else its Gaussians'
    max_points      Gaussians of an object that are compared with the surface; None for all of them
    far             Chamfer distance of an object without a solid Gaussian; infinite is "not defined"
    """

    straight_photo: ClassVar[bool] = False
    own_voxels: ClassVar[bool] = False
    max_points: ClassVar[int | None] = None
    far: ClassVar[float] = math.inf

    task: str = "reconstruction"
    resolution: int = 512
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cameras: CameraConfig = field(default_factory=lambda: CameraConfig("sphere", num_views=8))
    photo: CameraConfig = field(
        default_factory=lambda: CameraConfig("fitted", num_views=1, elevation_range=(0.0, 60.0))
    )
    seed: int = 0
    num_assets: int | None = 1000
    screen_filter: float = 0.1
    ssim_border: str = "same"
    lpips_net: str = "vgg"
    kd_subsets: int = 100
    kd_subset_size: int = 1000
    shape_points: int = 0
    f_threshold: float = 0.01
    voxels: int = 64
    render: RenderConfig = field(default_factory=lambda: RenderConfig(lighting=LightingConfig(), outputs=()))

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if self.resolution < 16:
            raise ValueError(f"resolution: expected at least 16 pixels, got {self.resolution}")
        if not all(0 <= value <= 1 for value in self.background):
            raise ValueError(f"background: expected three numbers in [0, 1], got {self.background}")
        if self.num_assets is not None and self.num_assets < 1:
            raise ValueError(f"num_assets: expected at least 1, or null for all, got {self.num_assets}")
        if self.task == "generation" and self.photo.num_views != 1:
            raise ValueError(f"photo: expected one view, got {self.photo.num_views}")

    def to_dict(self) -> dict[str, Any]:
        """All values, plain."""
        return config_to_dict(self)

    def digest(self) -> str:
        """sha256 of all values."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def grid(self) -> int:
        """Cells a side of the grid that voxels are compared on."""
        return self.voxels

    def views_of(self, asset_id: str) -> Cameras:
        """The cameras that an asset is compared from: the same for every method, and not those of training."""
        return self._sample(self.cameras, "evaluation", asset_id)

    def photo_of(self, asset_id: str) -> Cameras:
        """The camera of the photo that generation starts from."""
        return self._sample(self.photo, "photo", asset_id)

    def _sample(self, config: CameraConfig, *names: str) -> Cameras:
        size = self.resolution
        return Cameras(*sample_cameras(config, size, size, generator_for(self.seed, *names)), size)

    def asset_seed(self, asset_id: str) -> int:
        """The seed that a method uses for an asset."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}\0{asset_id}".encode()).digest()[:4], "big")

    def surface_generator(self, asset_id: str) -> np.random.Generator:
        """Samples the points on an asset's surface."""
        return np.random.default_rng(self.asset_seed(asset_id))


@dataclass(frozen=True)
class PhotoProtocol(Protocol):
    """What eval/generation.py compares: all assets from the same cameras, so that pictures of training assets, which
    are its baselines, are rendered once.

    model_grid  of the model that is scored; None for ``voxels``. Not part of the hash, which names the protocol.
    """

    model_grid: int | None = None

    straight_photo: ClassVar[bool] = True
    own_voxels: ClassVar[bool] = True
    max_points: ClassVar[int | None] = NUM_POINTS
    far: ClassVar[float] = math.sqrt(3)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "model_grid"}

    @property
    def grid(self) -> int:
        return self.model_grid or self.voxels

    def views_of(self, asset_id: str) -> Cameras:
        return self._sample(self.cameras, "evaluation", "generation")

    def surface_generator(self, asset_id: str) -> np.random.Generator:
        return generator_for(self.seed, "points", asset_id)


def reconstruction_rules(
    num_views: int = 8, resolution: int = 256, seed: int = 0, lighting: RenderConfig | None = None
) -> Protocol:
    """eval/reconstruction.py: views on white from the camera set of the training views, sampled for evaluation alone.
    ``lighting`` is that of the model's training set.
    """
    return Protocol(
        task="reconstruction",
        resolution=resolution,
        background=(1.0, 1.0, 1.0),
        cameras=CameraConfig("sphere", num_views=num_views),
        seed=seed,
        num_assets=None,
        render=replace(lighting or RenderConfig(), outputs=()),
    )


def generation_rules(
    num_views: int = 8,
    resolution: int = 256,
    seed: int = 0,
    lighting: RenderConfig | None = None,
    model_grid: int | None = None,
) -> PhotoProtocol:
    """eval/generation.py: one photo from the conditioning views' camera set, from the horizon up to 60° above it; views
    on white; shapes.
    """
    return PhotoProtocol(
        task="generation",
        resolution=resolution,
        background=(1.0, 1.0, 1.0),
        cameras=CameraConfig("sphere", num_views=num_views),
        photo=CameraConfig("fitted", num_views=1, elevation_range=(0.0, 60.0)),
        seed=seed,
        num_assets=None,
        voxels=32,
        shape_points=NUM_POINTS,
        render=replace(lighting or RenderConfig(), outputs=()),
        model_grid=model_grid,
    )


def draw_ids(
    ids: Iterable[str], count: int | None, seed: int, names: Mapping[str, str] | None = None
) -> list[str]:
    """``count`` of ``ids`` (all where there are fewer, or for None), sorted; the choice depends on nothing but the
    ids and ``seed``: those whose sha256 of ``SEED:ID`` is least. ``names`` stand for ids in that, where they have one.
    """
    names = names or {}
    ids = sorted(set(ids))
    if count is None or count >= len(ids):
        return ids
    ranked = sorted(
        ids, key=lambda asset_id: hashlib.sha256(f"{seed}:{names.get(asset_id, asset_id)}".encode()).digest()
    )
    return sorted(ranked[:count])
