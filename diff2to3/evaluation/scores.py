"""Metrics: the numbers of one object beside the truth, and the features that numbers over whole sets need.

A metric is a frozen dataclass of words, as a source is; :class:`Metric` says what it may define. ``benchmark_metrics``
and ``given_metrics`` choose those of a program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.shapes import compare_shapes
from diff2to3.evaluation.subjects import Pictures, Source, Subject, Words
from diff2to3.metrics.features import FeatureExtractor, build_extractor, cosine_scores
from diff2to3.metrics.lpips import Lpips
from diff2to3.metrics.pairs import mean_of_views, pair_values

#: Extractors whose features are kept for FD and KD.
SET_EXTRACTORS = ("inception", "dinov2")


class Metric(Words):
    """One or several numbers. A number that is not defined for an object is NaN or infinite, or is left out."""

    #: Whether a source that stands for several objects gets the mean over these; else its first object counts.
    over_draws: ClassVar[bool] = False

    def values(self, subject: Subject, source: Source, shown: Pictures) -> dict[str, float]:
        """Numbers of what ``source`` shows of an asset."""
        return {}

    def features(self, subject: Subject, shown: Pictures) -> dict[str, tuple[Tensor, Tensor]]:
        """extractor → (ours, truth), [V, C] each, which :mod:`diff2to3.evaluation.summary` makes FD and KD of."""
        return {}

    def describe(self) -> dict[str, Any]:
        """name → which weights it has, for the result."""
        return {}


@dataclass(frozen=True)
class Pairs(Metric):
    """psnr, ssim, psnr_foreground, ciede2000, and lpips where its weights are given: pictures against the asset's.
    In generation only where the shape is compared as well, because else the object need not be in the asset's frame.
    """

    lpips: str | None = None
    net: str = "vgg"
    device: str = "cpu"
    over_draws: ClassVar[bool] = True

    @cached_property
    def network(self) -> Lpips | None:
        return None if self.lpips is None else Lpips.load(self.lpips, self.net, torch.device(self.device))

    def load(self) -> None:
        self.network  # noqa: B018  an InputError where weights are missing

    def values(self, subject: Subject, source: Source, shown: Pictures) -> dict[str, float]:
        rules, truth = subject.rules, subject.truth
        if rules.task == "generation" and subject.shape_of(shown) is None:
            return {}
        if shown.views is not None:
            truth = truth.only(shown.views)
        images = shown.images.to(truth.images.device)
        return pair_values(images, truth.images, truth.alphas, self.network, rules.ssim_border)

    def describe(self) -> dict[str, Any]:
        record = None if self.network is None else self.network.record
        return {} if record is None else {"lpips": record.to_dict()}


@dataclass(frozen=True)
class Shapes(Metric):
    """chamfer, f_score and voxel_iou, where both have a shape and the protocol compares shapes."""

    over_draws: ClassVar[bool] = True

    def values(self, subject: Subject, source: Source, shown: Pictures) -> dict[str, float]:
        ours, truth = subject.shape_of(shown), subject.shape
        return {} if ours is None or truth is None else compare_shapes(subject.rules, ours, truth)


@dataclass(frozen=True)
class Extractor(Words):
    """A feature extractor with its weights; None for the published ones."""

    name: str
    weights: str | None = None
    device: str = "cpu"
    offline: bool = False

    @cached_property
    def network(self) -> FeatureExtractor:
        return build_extractor(self.name, self.weights, device=self.device, offline=self.offline)

    def load(self) -> None:
        self.network  # noqa: B018  an InputError where weights are missing

    def describe(self) -> dict[str, Any]:
        return {self.name: self.network.record.to_dict()}


@dataclass(frozen=True)
class Clip(Metric):
    """Similarity with the photo: of the object from the photo's camera ("clip") and from all ("clip_views"); or,
    without ``photo_camera``, from all ("clip").
    """

    extractor: Extractor
    photo_camera: bool = True

    def load(self) -> None:
        self.extractor.load()

    def values(self, subject: Subject, source: Source, shown: Pictures) -> dict[str, float]:
        extract = self.extractor.network
        photo = subject.once(self, lambda: extract(subject.photo_pictures.images))
        all_views = mean_of_views(cosine_scores(extract(shown.images), photo))
        if not self.photo_camera:
            return {"clip": all_views}
        if not source.has_photo(subject.id):
            return {"clip_views": all_views}
        again = source.pictures(subject, subject.rules.photo_of(subject.id), photo=True)
        return {
            "clip_views": all_views,
            "clip": mean_of_views(cosine_scores(extract(again.images), photo)),
        }

    def describe(self) -> dict[str, Any]:
        return self.extractor.describe()


@dataclass(frozen=True)
class SetFeatures(Metric):
    """Features of FD and KD between the pictures of all assets and the truth's."""

    extractor: Extractor

    def load(self) -> None:
        self.extractor.load()

    def features(self, subject: Subject, shown: Pictures) -> dict[str, tuple[Tensor, Tensor]]:
        extract = self.extractor.network
        truth = subject.once(self, lambda: extract(subject.truth.images).cpu())
        return {self.extractor.name: (extract(shown.images).cpu(), truth)}

    def describe(self) -> dict[str, Any]:
        return self.extractor.describe()


def benchmark_metrics(
    rules: Protocol, weights: Mapping[str, str], device: torch.device, offline: bool = False
) -> tuple[tuple[Metric, ...], list[str]]:
    """(metrics, notes): all of the protocol's task whose weights can be had; a note says what is left out, and why.

    weights: lpips, inception, dinov2, clip → file, folder or hub repository. ``none`` leaves one out.
    """
    place, notes = str(device), []
    wanted: dict[str, Metric] = {}
    if rules.task == "reconstruction":
        wanted["lpips"] = Pairs(weights.get("lpips"), rules.lpips_net, place)
    else:
        wanted["clip"] = Clip(Extractor("clip", weights.get("clip"), place, offline))
        for name in SET_EXTRACTORS:
            wanted[name] = SetFeatures(Extractor(name, weights.get(name), place, offline))
    found: list[Metric] = []
    for name, metric in wanted.items():
        if weights.get(name) == "none":
            continue
        try:
            if name == "lpips" and name not in weights:
                raise InputError("lpips: no weights given; give lpips=FILE (see eval/convert_weights.py)")
            metric.load()
            found.append(metric)
        except (InputError, MissingDependencyError) as error:
            notes.append(f"left out: {error}")
    if not any(isinstance(metric, Pairs) for metric in found):
        found.insert(0, Pairs(device=place))
    return (*found, Shapes()), notes


def given_metrics(
    rules: Protocol, weights: Mapping[str, str], device: torch.device, offline: bool = False
) -> tuple[Metric, ...]:
    """Those that need no weights, and those whose weights are given. InputError where these cannot be loaded."""
    place = str(device)
    found: list[Metric] = [Pairs(weights.get("lpips"), rules.lpips_net, place), Shapes()]
    if "clip" in weights:
        found.append(Clip(Extractor("clip", weights["clip"], place, offline), photo_camera=False))
    for name in SET_EXTRACTORS:
        if name in weights:
            found.append(SetFeatures(Extractor(name, weights[name], place, offline)))
    for metric in found:
        metric.load()
    return tuple(found)
