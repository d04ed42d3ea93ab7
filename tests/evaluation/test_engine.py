"""The package's own shape, and a method, a metric and a truth that are added to it as its docstring says."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diff2to3 import evaluation
from diff2to3.errors import InputError
from diff2to3.evaluation.engine import Plan, run_plan
from diff2to3.evaluation.protocol import Cameras, Protocol
from diff2to3.evaluation.scores import Metric
from diff2to3.evaluation.subjects import ObjectSource, Pictures, Source, Subject
from diff2to3.types import Gaussians
from diff2to3.views import CameraConfig

FOLDER = Path(evaluation.__file__).parent


def test_modules_import_only_those_above_them() -> None:
    """In the order of the package's docstring, which has them all: so there is no circle."""
    order = re.findall(r"^    (\w+)\.py", evaluation.__doc__ or "", re.MULTILINE)
    assert sorted(order) == sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
    for module in order:
        tree = ast.parse((FOLDER / f"{module}.py").read_text("utf-8"))
        for node in ast.walk(tree):  # inside functions, too
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diff2to3.evaluation"):
                used = node.module.split(".")[2]
                assert order.index(used) < order.index(module), f"{module} imports {used}"


@dataclass(frozen=True)
class Photos(Source):
    """A truth without meshes: white squares on transparent ground, each with a photo."""

    count: int

    @property
    def name(self) -> str:
        return "photos"

    def fingerprint(self) -> str:
        return str(self.count)

    def ids(self) -> list[str]:
        return [f"photo-{i}" for i in range(self.count)]

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        size = cameras.resolution
        alphas = torch.zeros(len(cameras.viewmats), size, size)
        alphas[:, 8:-8, 8:-8] = 1
        return Pictures(alphas[..., None].expand(-1, -1, -1, 3).contiguous(), alphas)


@dataclass(frozen=True)
class Ball(ObjectSource):
    """A method: one Gaussian of a given size, grey or, for an asset that is named, an error."""

    scale: float
    fails: str = ""

    @property
    def name(self) -> str:
        return "ball"

    def fingerprint(self) -> str:
        return str(self.scale)

    def make(self, subject: Subject) -> Gaussians:
        if subject.id == self.fails:
            raise InputError(f"{subject.id}: no ball")
        assert subject.photo.mode == "RGBA"
        one = torch.ones(1)
        scales = torch.full((1, 3), self.scale)
        return Gaussians(torch.zeros(1, 3), torch.eye(4)[:1], scales, one, torch.zeros(1, 1, 3))


@dataclass(frozen=True)
class Silhouette(Metric):
    """Intersection over union of alphas above one half."""

    def values(self, subject: Subject, source: Source, shown: Pictures) -> dict[str, float]:
        assert shown.alphas is not None and subject.truth.alphas is not None
        ours, truth = shown.alphas > 0.5, subject.truth.alphas > 0.5
        return {"silhouette": float((ours & truth).sum() / (ours | truth).sum())}


def test_a_truth_of_photos_a_method_and_a_metric_of_ones_own() -> None:
    rules = Protocol(
        "generation", resolution=32, num_assets=None, cameras=CameraConfig("sphere", num_views=2)
    )
    methods = (("small", Ball(0.02)), ("large", Ball(0.3, fails="photo-1")))
    plan = Plan(rules, Photos(3), methods, (Silhouette(),))
    lines = run_plan(None, plan, plan.truth.ids(), label="test")
    assert lines["photo-1"]["error"] == "photo-1: no ball"
    for asset_id in ("photo-0", "photo-2"):
        small, large = (lines[asset_id]["values"][key]["silhouette"] for key, _ in methods)
        assert 0 <= small < large < 1
    with pytest.raises(InputError, match="photos: has pictures, not meshes"):
        plan.subject("photo-0").mesh  # noqa: B018
