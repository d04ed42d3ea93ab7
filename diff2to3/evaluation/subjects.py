"""What a benchmark is about: an asset as methods get it, what they show of it, and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.evaluation.protocol import Cameras
from diff2to3.evaluation.protocol import Protocol as Rules
from diff2to3.evaluation.shapes import Shape, shape_of_gaussians, shape_of_mesh
from diff2to3.gaussians.render import render_pictures
from diff2to3.types import Gaussians, Mesh, Views
from diff2to3.views import MeshRenderer, make_renderer

T = TypeVar("T")


class Words:
    """A frozen dataclass of plain values that loads what they name when it is first needed (cached properties). Sent to
    another process, it is those values alone, and loads there once.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}

    def load(self) -> None:
        """Load now, so that what is wrong is found before any work. InputError that says what."""


@dataclass(frozen=True)
class Pictures:
    """What a source shows of an asset.

    images     [V, H, W, 3] over the protocol's background
    alphas     [V, H, W]; None where it is not known
    straight   the images without background, where they are known so
    gaussians  the object itself, in the asset's frame, where there is one
    shape      the object's shape, where it is not that of ``gaussians``
    facts      numbers about it, averaged over a run as metrics are; None is "not defined"
    remarks    plain values about it that are only kept
    draws      other objects, where a source stands for several: numbers of one object are means over these
    views      which of the cameras the images are from; None for all
    """

    images: Tensor
    alphas: Tensor | None = None
    gaussians: Gaussians | None = None
    straight: Tensor | None = None
    shape: Shape | None = None
    facts: Mapping[str, float | None] = field(default_factory=dict)
    remarks: Mapping[str, Any] = field(default_factory=dict)
    draws: tuple[Pictures, ...] = ()
    views: tuple[int, ...] | None = None

    def only(self, views: tuple[int, ...]) -> Pictures:
        """The same from fewer of the cameras."""
        chosen = list(views)
        alphas, straight = (None if t is None else t[chosen] for t in (self.alphas, self.straight))
        return replace(self, images=self.images[chosen], alphas=alphas, straight=straight, views=views)


class Source(Words):
    """Pictures of assets by id: a method, or the truth. A subclass is a frozen dataclass; it must have ``name``,
    ``fingerprint`` and ``pictures`` (or be an :class:`ObjectSource`, which needs ``make`` in place of the last).
    """

    #: Whether ``mesh`` gives meshes.
    has_meshes: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For results, which are published: it holds no private path."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash that changes when the source does."""
        raise NotImplementedError

    def ids(self) -> list[str]:
        """The assets that it has, sorted; [] where it takes any."""
        return []

    def names(self) -> dict[str, str]:
        """By id what the owners of a published set call an asset, where they have another name for it."""
        return {}

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        """``subject`` from ``cameras``, the photo's if ``photo``. InputError that names the asset or file."""
        raise NotImplementedError

    def mesh(self, asset_id: str) -> Mesh:
        """The mesh of an asset. InputError where the source has none."""
        raise InputError(f"{self.name}: has pictures, not meshes; this method needs meshes")

    def has_photo(self, asset_id: str) -> bool:
        """Whether ``pictures`` has this asset from the photo's camera."""
        return True


class Subject:
    """One asset of a benchmark, as a method gets it.

    id, seed   of the asset; the seed is what a method that draws noise should start from
    rules      the protocol
    source     where the truth is from
    cameras    the views that will be compared
    device     where to compute
    """

    def __init__(self, asset_id: str, rules: Rules, source: Source, device: torch.device) -> None:
        self.id, self.rules, self.source, self.device = asset_id, rules, source, device
        self.seed, self.cameras = rules.asset_seed(asset_id), rules.views_of(asset_id)
        self._made: dict[tuple[int, str], Any] = {}

    @cached_property
    def mesh(self) -> Mesh:
        """The asset's mesh. InputError where the truth is not a catalogue of meshes."""
        return self.source.mesh(self.id)

    @cached_property
    def renderer(self) -> MeshRenderer:
        """Of the asset's mesh, lit as the protocol says. What it prepares takes longer than a few views, so everything
        that looks at the asset shares it; for reconstruction it has depth, which encoders need.
        """
        lighting = self.rules.render
        if self.rules.task == "reconstruction":
            lighting = replace(lighting, outputs=("depths",))
        return make_renderer(self.mesh, lighting)

    @cached_property
    def truth(self) -> Pictures:
        """The asset from the protocol's cameras."""
        return self.source.pictures(self, self.cameras)

    @cached_property
    def shape(self) -> Shape | None:
        """The asset's shape; None where the protocol compares none or there is no mesh."""
        if not self.rules.shape_points or not self.source.has_meshes:
            return None
        return shape_of_mesh(self.rules, self.mesh, self.id)

    def shape_of(self, shown: Pictures) -> Shape | None:
        """The shape of what a source shows, where this asset's own is known; else None."""
        if self.shape is None:
            return None
        if shown.shape is None and shown.gaussians is not None:
            return shape_of_gaussians(self.rules, shown.gaussians, self.seed)
        return shown.shape

    @cached_property
    def photo_pictures(self) -> Pictures:
        """The picture that generation starts from, over the protocol's background."""
        return self.source.pictures(self, self.rules.photo_of(self.id), photo=True)

    @cached_property
    def photo(self) -> Image.Image:
        """The RGBA picture that generation starts from."""
        return rgba_image(*self.straight_photo(self.rules.straight_photo))

    def straight_photo(self, exact: bool = True) -> tuple[Tensor, Tensor]:
        """Colours [H, W, 3] with straight alpha [H, W]: as they were rendered if ``exact`` and known; else taken back
        from over the background.
        """
        shown = self.photo_pictures
        alpha = torch.ones_like(shown.images[0, ..., 0]) if shown.alphas is None else shown.alphas[0]
        if exact and shown.straight is not None:
            return shown.straight[0], alpha
        background, a = shown.images.new_tensor(self.rules.background), alpha[..., None]
        return torch.where(a > 0, (shown.images[0] - (1 - a) * background) / a, 0), alpha

    def once(self, owner: object, make: Callable[[], T], what: str = "") -> T:
        """What ``make`` gives, made once for this asset: for an object that several numbers need."""
        key = id(owner), what
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])


@dataclass(frozen=True)
class Made:
    """An object that a method made of a subject; see :class:`Pictures` for the rest."""

    gaussians: Gaussians
    shape: Shape | None = None
    facts: Mapping[str, float | None] = field(default_factory=dict)
    remarks: Mapping[str, Any] = field(default_factory=dict)


class ObjectSource(Source):
    """A method that makes an object of a subject, once, and is seen by rendering it."""

    def make(self, subject: Subject) -> Made | Gaussians | Views:
        """The object; or Views of it, from ``subject.cameras``."""
        raise NotImplementedError

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        made = subject.once(self, lambda: self.make(subject))
        if isinstance(made, Gaussians):
            made = Made(made)
        if isinstance(made, Made):
            shown = show_gaussians(made.gaussians, cameras, subject, subject.rules.screen_filter)
            return replace(shown, shape=made.shape, facts=made.facts, remarks=made.remarks)
        if not isinstance(made, Views):
            raise InputError(f"{self.name}: expected Gaussians or Views, got {type(made).__name__}")
        if photo:
            raise InputError(f"{self.name}: gives Views; the photo's camera needs Gaussians")
        if made.images.shape[:3] != (len(cameras.viewmats), cameras.resolution, cameras.resolution):
            raise InputError(
                f"{self.name}: expected views from subject.cameras, got {list(made.images.shape)}"
            )
        return show_views(made, subject)


def show_views(views: Views, subject: Subject) -> Pictures:
    """Views over the protocol's background."""
    background = views.images.new_tensor(subject.rules.background)
    images, alphas = views.composite(background).to(subject.device), views.alphas.to(subject.device)
    return Pictures(images, alphas, straight=views.images.to(subject.device))


def show_gaussians(
    gaussians: Gaussians, cameras: Cameras, subject: Subject, screen_filter: float
) -> Pictures:
    """Gaussians from cameras, over the protocol's background, with opacity compensation."""
    g = gaussians.to(subject.device, torch.float32)
    background = torch.tensor(subject.rules.background, device=subject.device)
    size = cameras.resolution
    images, alphas = render_pictures(
        g, cameras.viewmats, cameras.Ks, size, size, background=background, eps2d=screen_filter
    )
    return Pictures(images, alphas, gaussians)


def rgba_image(colors: Tensor, alpha: Tensor) -> Image.Image:
    """Colours [H, W, 3] with straight alpha [H, W], as they would lie in a file."""
    rgba = torch.cat([colors, alpha[..., None]], -1)
    return Image.fromarray((rgba.clamp(0, 1) * 255).round().byte().cpu().numpy(), "RGBA")
