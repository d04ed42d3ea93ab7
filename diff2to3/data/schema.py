"""What ``diff2to3 data prepare`` is told: the schema of configs/data/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from diff2to3.config import MISSING
from diff2to3.views.cameras import CameraConfig
from diff2to3.views.config import RenderConfig
from diff2to3.voxels.aggregate import MODES
from diff2to3.voxels.providers import PROVIDERS, SURFACE

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class FilterConfig:
    """Which assets of the source are used; null leaves a filter out.

    splits          names of splits
    licenses        accepted licences, as the catalogue writes them
    ids             a text file with one id a line
    min_faces       triangles, where the catalogue knows them
    max_faces
    min_aesthetic   aesthetic score, where the catalogue knows it
    limit           the first so many of what is left
    """

    splits: list[str] | None = None
    licenses: list[str] | None = None
    ids: str | None = None
    min_faces: int | None = None
    max_faces: int | None = None
    min_aesthetic: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected a positive number, got {self.limit}")


@dataclass(frozen=True)
class ViewSetConfig:
    """One set of square views of every asset.

    size     pixels a side
    cameras  see :class:`CameraConfig`; drawn from (seed, asset id, name of the set), so every asset has its
    own
    depths   store depth as well (16 bits, exact to 1/65534 of the depth range of the unit box)
    """

    size: int = 512
    cameras: CameraConfig = field(default_factory=CameraConfig)
    depths: bool = False

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size: expected 8 to 4096 pixels, got {self.size}")


@dataclass(frozen=True)
class FeatureSetConfig:
    """One set of features on the active voxels.

    provider          see diff2to3.voxels.providers; or "surface": see diff2to3.voxels.surface
    weights           local file or folder, or hub name; null for the published ones
    offline           never open a connection
    dtype, device     of the encoder; device "auto" takes a GPU where there is one
    stride            of the providers rgb and rgb_stats
    resolution        R; one of the voxel stage's
    views             the view set that is lifted
    modes             "visible" (by depth) and/or "mean" (over all views, as the paper); readers take the
    first
    depth_tolerance   in voxels
    background        grey level behind the object
    view_chunk        views encoded at a time
    """

    provider: str = MISSING
    weights: str | None = None
    offline: bool = False
    dtype: str = "bfloat16"
    device: str = "auto"
    stride: int | None = None
    resolution: int = 64
    views: str = "input"
    modes: list[str] = field(default_factory=lambda: ["visible"])
    depth_tolerance: float = 1.0
    background: float = 0.5
    view_chunk: int = 4

    def __post_init__(self) -> None:
        for name, value, known in (
            ("provider", self.provider, (*PROVIDERS, SURFACE)),
            *(("modes", mode, MODES) for mode in self.modes),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, DEVICES),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes: expected one or more different ones, got {self.modes}")
        if self.provider == SURFACE and list(self.modes) != ["visible"]:
            raise ValueError(f"modes: provider surface has only 'visible', got {self.modes}")
        if self.view_chunk < 1:
            raise ValueError(f"view_chunk: expected a positive number, got {self.view_chunk}")


@dataclass(frozen=True)
class LatentSetConfig:
    """One set of structured latents: feature sets through a trained encoder.

    bundle    folder of a bundle with the network ``encoder``
    features  the feature sets side by side that it takes, as it was trained
    """

    bundle: str = MISSING
    features: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StructureSetConfig:
    """One set of occupancy latents: a grid through a trained encoder.

    bundle      folder of a bundle with the network ``structure_encoder``
    resolution  of the grid
    """

    bundle: str = MISSING
    resolution: int = 64


@dataclass(frozen=True)
class TokenSetConfig:
    """One set of image latents of the views that generation is conditioned on.

    bundle      folder of a bundle with the network ``image_encoder``
    views       the view set
    num_views   the first so many of each asset's; null for all
    margin      side of the picture over the longer side of the object's box in it: views are cropped to the object
                exactly as generation crops a photo (diff2to3.flow.framing); null: views as they are
    size        pixels a side after cropping; null for the views' size
    background  grey level behind the object
    """

    bundle: str = MISSING
    views: str = "cond"
    num_views: int | None = None
    margin: float | None = 1.2
    size: int | None = None
    background: float = 0.5


@dataclass(frozen=True)
class PhotographConfig:
    """One set of photographs: cameras around each asset at random elevations, focal lengths and light.

    num_views         photographs an asset, at roughly equal steps of azimuth
    size              pixels a side
    resolution        R of the occupancy grid, and of the depth map
    elevation_range   degrees above the horizon
    usual_elevation   (mean, deviation) of the normal distribution, within the range, that most elevations come from
    unusual_share     share of the photographs whose elevation is uniform over the range instead
    focal_range       focal length over the crop's side, log-uniform
    studio_share      share of the photographs in the light of the other renderings; the rest have a key light from a
                      random direction on the camera's side
    """

    num_views: int = 10
    size: int = 256
    resolution: int = 32
    elevation_range: tuple[float, float] = (-10.0, 60.0)
    usual_elevation: tuple[float, float] = (18.0, 13.0)
    unusual_share: float = 0.3
    focal_range: tuple[float, float] = (1.0, 6.0)
    studio_share: float = 0.25

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise ValueError(f"num_views: expected at least 1, got {self.num_views}")
        if self.resolution < 8 or self.resolution % 8 or self.size % self.resolution:
            raise ValueError(
                f"resolution: expected a multiple of 8 that divides size {self.size}, got {self.resolution}"
            )
        low, high = self.elevation_range
        if not -90 < low <= high < 90:
            raise ValueError(f"elevation_range: expected degrees in (-90, 90) in order, got ({low}, {high})")
        if not 0.5 < self.focal_range[0] <= self.focal_range[1]:
            raise ValueError(
                f"focal_range: expected lengths above 0.5 in order, got {tuple(self.focal_range)}"
            )
        for name in ("unusual_share", "studio_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class MapConfig:
    """What a frozen image network says of one set of photographs.

    photographs  the set
    bundle       folder of a bundle with the network ``photo_maps``
    background   grey level behind the object
    """

    photographs: str = "photo"
    bundle: str = "diff2to3/bundles/mini-photo"
    background: float = 0.5


@dataclass(frozen=True)
class PhotoVoxelConfig:
    """Features of assets on the voxels of their photographs' frames.

    photographs      the set of photographs
    features         the feature sets side by side, as the 2to3-VAE's encoder takes them; lifted from their views
    num_photographs  the first so many of each asset's
    most_lost        photographs of which more than this share of the voxels lies outside the cube are left out
    """

    photographs: str = "photo"
    features: list[str] = field(default_factory=list)
    num_photographs: int = 3
    most_lost: float = 0.05

    def __post_init__(self) -> None:
        if self.num_photographs < 1:
            raise ValueError(f"num_photographs: expected at least 1, got {self.num_photographs}")


@dataclass(frozen=True)
class PhotoLatentConfig:
    """What stage 2 is trained on in the photo frame.

    bundle       folder of a bundle with the networks ``encoder`` and ``image_encoder``
    photovoxels  the set of features
    maps         the set of maps
    """

    bundle: str = MISSING
    photovoxels: str = "photo"
    maps: str = "photo"


@dataclass(frozen=True)
class LimitConfig:
    """What one asset may cost before it is given up and reported.

    seconds      in one stage
    memory_gib   of a worker that reads the source, beyond what it needs itself; null for no limit
    max_faces    triangles
    max_file_mib size of the file
    """

    seconds: float = 600.0
    memory_gib: float | None = 16.0
    max_faces: int = 4_000_000
    max_file_mib: int = 1024


@dataclass(frozen=True)
class DataConfig:
    """A dataset: where from, where to, and what is made of each asset.

    source       a folder, a zip, or a catalogue (see ``diff2to3 data list --help``). One without splits gets them by
                 id: of 20 assets about one is in "val", the others in "train", and of two assets one each
    out          the dataset's folder; on a file system that all workers see
    seed         of the cameras
    mirror       splits whose assets also come mirrored in x, as assets of their own: twice the shapes, and views from
                 other cameras, for models that see an image and have to know left from right
    variants     split -> how many variants of each of its assets, as assets of their own: stretched, recoloured,
                 a random half of them mirrored (see diff2to3.data.variants), with half as many views of each set
    stages       in order: "views", "voxels", "points", "features" for all of a kind, or one such as "features_rgb"
    shard_size   assets a shard
    view_sets    name -> views
    resolutions  voxel grids
    points       numbers of points on the surface: a stage points_<number> each
    photographs  name -> photographs as people take them, with the occupancy of their photo frames (stage 1)
    maps         name -> what a frozen image network says of photographs
    photovoxels  name -> features on the voxels of photographs' frames (the 2to3-VAE in the photo frame)
    photolatents name -> latents of these, with what is seen of the photographs (stage 2 in the photo frame)
    features     name -> features
    weights      provider -> local file or folder, or hub name, for features that do not say themselves
    """

    source: str = MISSING
    out: str = MISSING
    seed: int = 0
    filter: FilterConfig = field(default_factory=FilterConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    mirror: list[str] = field(default_factory=list)
    variants: dict[str, int] = field(default_factory=dict)
    stages: list[str] = field(default_factory=lambda: ["views", "voxels", "points", "features"])
    shard_size: int = 64
    render: RenderConfig = field(default_factory=RenderConfig)
    view_sets: dict[str, ViewSetConfig] = field(default_factory=dict)
    resolutions: list[int] = field(default_factory=lambda: [64])
    points: list[int] = field(default_factory=list)
    features: dict[str, FeatureSetConfig] = field(default_factory=dict)
    latents: dict[str, LatentSetConfig] = field(default_factory=dict)
    structures: dict[str, StructureSetConfig] = field(default_factory=dict)
    tokens: dict[str, TokenSetConfig] = field(default_factory=dict)
    photographs: dict[str, PhotographConfig] = field(default_factory=dict)
    maps: dict[str, MapConfig] = field(default_factory=dict)
    photovoxels: dict[str, PhotoVoxelConfig] = field(default_factory=dict)
    photolatents: dict[str, PhotoLatentConfig] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size: expected a positive number, got {self.shard_size}")
        for r in self.resolutions:
            if not 1 <= r <= 256:
                raise ValueError(f"resolutions: expected numbers from 1 to 256, got {r}")
        for count in self.points:
            if not 1 <= count <= 1_000_000:
                raise ValueError(f"points: expected numbers from 1 to 1000000, got {count}")
        for split, count in self.variants.items():
            if not 0 <= count <= 1000:
                raise ValueError(f"variants.{split}: expected a number from 0 to 1000, got {count}")
        for name in self.weights:
            if name not in PROVIDERS:
                raise ValueError(f"weights: unknown provider {name!r}; known are {', '.join(PROVIDERS)}")
        encodings = (
            *self.latents,
            *self.structures,
            *self.tokens,
            *self.photographs,
            *self.maps,
            *self.photovoxels,
        )
        encodings = (*encodings, *self.photolatents)
        for name in (*self.view_sets, *self.features, *encodings):
            if not name.isidentifier():
                raise ValueError(f"{name!r}: names of sets are letters, digits and _")
        for name, features in self.features.items():
            views = self.view_sets.get(features.views)
            if views is None:
                raise ValueError(f"features.{name}.views: no view set {features.views!r}")
            if "visible" in features.modes and not views.depths:
                raise ValueError(f"view_sets.{features.views}.depths: mode 'visible' needs true")
            if features.resolution not in self.resolutions:
                raise ValueError(f"features.{name}.resolution: {features.resolution} is not in resolutions")

    def weights_of(self, name: str) -> str | None:
        """The weights of the feature set ``name``: its own, those of its provider, or None for the
        published."""
        return self.features[name].weights or self.weights.get(self.features[name].provider)
