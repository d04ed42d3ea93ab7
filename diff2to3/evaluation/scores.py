"""The numbers of one asset, by the metrics whose weights are here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.sources import ImageSource, MeshSource, Pictures, Source, Subject
from diff2to3.metrics.features import FeatureExtractor, build_extractor, cosine_scores
from diff2to3.metrics.geometry import sample_surface, surface_distance, voxel_iou
from diff2to3.metrics.lpips import Lpips
from diff2to3.metrics.pairs import mean_of_views, pair_values
from diff2to3.voxels.voxelise import voxelise

#: Extractors whose features are kept for FD and KD.
SET_EXTRACTORS = ("inception", "dinov2")
#: A Gaussian counts as a point of the shape from this opacity on.
SOLID = 0.5


@dataclass(frozen=True)
class AssetScore:
    """values: metric → number, a mean over views; features: extractor → (ours, truth), [V, C] each."""

    values: dict[str, float]
    features: dict[str, tuple[Tensor, Tensor]]


@dataclass
class Scorer:
    """Scores assets. ``notes`` has a line for each metric that is left out, and why."""

    rules: Protocol
    lpips: Lpips | None
    extractors: dict[str, FeatureExtractor]
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def build(
        rules: Protocol, weights: Mapping[str, str], device: torch.device, offline: bool = False
    ) -> Scorer:
        """Load what the protocol's task needs; what is missing becomes a note.

        weights: lpips, inception, dinov2, clip → file, folder or hub repository. ``none`` leaves one out.
        """
        scorer = Scorer(rules, None, {})
        wanted = ["lpips"] if rules.task == "reconstruction" else ["clip"]
        for name in [*wanted, *(SET_EXTRACTORS if rules.task == "generation" else ())]:
            given = weights.get(name)
            if given == "none":
                continue
            try:
                if name == "lpips":
                    if given is None:
                        raise InputError(
                            "lpips: no weights given; give lpips=FILE (see eval/convert_weights.py)"
                        )
                    scorer.lpips = Lpips.load(given, rules.lpips_net, device)
                else:
                    scorer.extractors[name] = build_extractor(name, given, device=device, offline=offline)
            except (InputError, MissingDependencyError) as error:
                scorer.notes.append(f"left out: {error}")
        return scorer

    def describe(self) -> dict[str, Any]:
        """Which weights were used, for the result."""
        found: dict[str, Any] = {name: e.record.to_dict() for name, e in self.extractors.items()}
        if self.lpips is not None and self.lpips.record is not None:
            found["lpips"] = self.lpips.record.to_dict()
        return found

    def score(self, subject: Subject, method: Source, truth: Source) -> AssetScore:
        """Render (or read) the method's pictures of an asset and compare. InputError names what is wrong."""
        ours = method.pictures(subject, subject.cameras)
        theirs = subject.truth
        if ours.images.shape != theirs.images.shape:
            raise InputError(
                f"{subject.id}: {method.name} has pictures {list(ours.images.shape)}, "
                f"{truth.name} {list(theirs.images.shape)}"
            )
        try:
            if self.rules.task == "generation":
                return self._generation(subject, ours, theirs, method, truth)
            values = self._pairs(ours, theirs)
            if self.rules.shape_points and ours.gaussians is not None and isinstance(truth, MeshSource):
                values |= self._shape(subject, ours)
        except ValueError as error:
            raise InputError(f"{subject.id}: {method.name}: {error}") from error
        return AssetScore(values, {})

    def _pairs(self, ours: Pictures, theirs: Pictures) -> dict[str, float]:
        return pair_values(ours.images, theirs.images, theirs.alphas, self.lpips, self.rules.ssim_border)

    def _shape(self, subject: Subject, ours: Pictures) -> dict[str, float]:
        assert ours.gaussians is not None
        rules = self.rules
        points = ours.gaussians.means[ours.gaussians.opacities >= SOLID].detach().cpu().float()
        surface = sample_surface(subject.mesh, rules.shape_points, np.random.default_rng(subject.seed))
        if len(points) == 0:
            return {"chamfer": math.inf, "f_score": 0.0, "voxel_iou": 0.0}
        distance = surface_distance(points, surface, rules.f_threshold)
        cells = ((points + 0.5) * rules.voxels).floor().clamp(0, rules.voxels - 1).int().unique(dim=0)
        truth_cells = torch.from_numpy(voxelise(subject.mesh.triangles, rules.voxels))
        return {
            "chamfer": distance.chamfer,
            "f_score": distance.f_score,
            "voxel_iou": voxel_iou(cells, truth_cells),
        }

    def _generation(
        self, subject: Subject, ours: Pictures, theirs: Pictures, method: Source, truth: Source
    ) -> AssetScore:
        values: dict[str, float] = {}
        features: dict[str, tuple[Tensor, Tensor]] = {}
        if self.rules.shape_points and ours.gaussians is not None and isinstance(truth, MeshSource):
            values |= self._pairs(ours, theirs) | self._shape(subject, ours)
        for name, extractor in self.extractors.items():
            found = extractor(ours.images)
            if name == "clip":
                photo = extractor(subject.photo_pictures.images)
                values["clip_views"] = mean_of_views(cosine_scores(found, photo))
                if isinstance(method, ImageSource) and not method.has_photo(subject.id):
                    continue
                again = method.pictures(subject, self.rules.photo_of(subject.id), photo=True)
                values["clip"] = mean_of_views(cosine_scores(extractor(again.images), photo))
            else:
                features[name] = (found.cpu(), extractor(theirs.images).cpu())
        return AssetScore(values, features)
