"""How much of an asset a generator gives back from one photo of it, beside what needs no generator.

For every asset: the photo; the model's object from it; the training asset whose views look most like the photo; ten
random training assets. Each is compared with the asset itself: its shape, and pictures of it from fixed cameras.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3.assets import AssetRecord, FileSource, load_asset
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import AssetList
from diff2to3.evaluation.protocol import Cameras, Protocol
from diff2to3.evaluation.reconstruction import load_lpips, pictures, write_png
from diff2to3.evaluation.retrieval import load_index
from diff2to3.evaluation.runs import RunFolder
from diff2to3.evaluation.scores import SET_EXTRACTORS, SOLID
from diff2to3.evaluation.summary import METRICS, bootstrap_mean, set_distances
from diff2to3.files import write_atomic
from diff2to3.flow.denoise import resampled
from diff2to3.metrics.features import FeatureExtractor, build_extractor, cosine_scores
from diff2to3.metrics.geometry import sample_surface, surface_distance, voxel_iou
from diff2to3.metrics.pairs import pair_values
from diff2to3.pipeline import ImageTo3D
from diff2to3.types import Gaussians, Mesh, Views
from diff2to3.views import CameraConfig, RenderConfig, generator_for, make_renderer
from diff2to3.voxels.voxelise import voxelise

#: Points of a shape that Chamfer distance and F-score compare.
NUM_POINTS = 10_000
METHODS = ("ours", "retrieval", "random")
#: metric → whether more is better.
BETTER = {name: held[1] for name, held in METRICS.items()}


@dataclass(frozen=True)
class Setup:
    """What every asset of a run shares. Picklable.

    model, device, offline  as of ImageTo3D
    rules       the protocol: photo, views, resolution, background
    resolution  of the voxel grid that shapes are compared on
    steps       of the samplers; None for the model's
    index       the file of the training views, or "" for no baselines
    train       training assets by id, of those that random draws choose from and retrieval returns
    pool        ids that random draws choose from
    num_random  draws an asset
    weights     extractor → file or folder, of those that are scored with
    features    the run's folder, for sets of features; "" to keep none
    """

    model: str
    rules: Protocol
    resolution: int = 32
    device: str = "cpu"
    offline: bool = False
    steps: int | None = None
    index: str = ""
    train: str = ""
    pool: tuple[str, ...] = ()
    num_random: int = 10
    weights: tuple[tuple[str, str], ...] = ()
    features: str = ""


def generation_rules(
    num_views: int = 8, resolution: int = 256, seed: int = 0, lighting: RenderConfig | None = None
) -> Protocol:
    """One photo from the conditioning views' camera set, from the horizon up to 60° above; views on white."""
    return Protocol(
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
    )


@dataclass(frozen=True)
class Shown:
    """An object as it is compared: views of it, points on it, cells of the grid that it crosses."""

    images: Tensor
    alphas: Tensor | None
    points: Tensor
    coords: Tensor

    def only(self, views: Sequence[int]) -> Shown:
        """The same with fewer views."""
        alphas = None if self.alphas is None else self.alphas[list(views)]
        return replace(self, images=self.images[list(views)], alphas=alphas)

    def in_floats(self) -> Shown:
        """With images in [0, 1], where they are kept as bytes."""
        return self if self.images.is_floating_point() else replace(self, images=self.images.float() / 255)


def views_of(rules: Protocol) -> Cameras:
    """The cameras of all comparisons: the same for every asset, so that views of training assets serve all."""
    return rules.views_of("generation")


def show_mesh(setup: Setup, record: AssetRecord, mesh: Mesh | None = None, renderer: Any = None) -> Shown:
    """An asset as it is."""
    rules, cameras = setup.rules, views_of(setup.rules)
    mesh = load_asset(record) if mesh is None else mesh
    renderer = make_renderer(mesh, rules.render) if renderer is None else renderer
    views = renderer.render(cameras.viewmats, cameras.Ks, cameras.resolution, cameras.resolution)
    points = sample_surface(mesh, NUM_POINTS, generator_for(rules.seed, "points", record.id))
    coords = torch.from_numpy(voxelise(mesh.triangles, setup.resolution))
    return Shown(views.composite(rules.background[0]), views.alphas, points, coords)


def show_gaussians(setup: Setup, gaussians: Gaussians, coords: Tensor | None, seed: int) -> Shown:
    """A generated object. ``coords`` [N, 3] are the generator's voxels; None where it has none of this grid."""
    rules, cameras = setup.rules, views_of(setup.rules)
    size = cameras.resolution
    blank = torch.zeros(len(cameras.viewmats), size, size, 3)
    views = Views(blank, blank[..., 0], cameras.viewmats, cameras.Ks)
    images = pictures(gaussians, views, rules.background[0], rules.screen_filter).cpu()
    means = gaussians.means[gaussians.opacities >= SOLID].detach().cpu().float()
    if len(means) > NUM_POINTS:
        chosen = np.random.default_rng(seed).choice(len(means), NUM_POINTS, replace=False)
        means = means[torch.from_numpy(np.sort(chosen))]
    if coords is None:
        cells = ((means + 0.5) * setup.resolution).floor().clamp(0, setup.resolution - 1)
        coords = cells.int().unique(dim=0)
    return Shown(images, None, means, coords.cpu())


def compare(setup: Setup, ours: Shown, truth: Shown) -> dict[str, float]:
    """The numbers of one object against the truth."""
    rules = setup.rules
    ours = ours.in_floats()
    lpips = load_lpips(dict(setup.weights).get("lpips"), rules.lpips_net, setup.device)
    values = {"voxel_iou": voxel_iou(ours.coords, truth.coords)}
    if len(ours.points):
        distance = surface_distance(ours.points, truth.points, rules.f_threshold)
        values |= {"chamfer": distance.chamfer, "f_score": distance.f_score}
    else:  # nothing there: as far away as things can be
        values |= {"chamfer": float(np.sqrt(3)), "f_score": 0.0}
    return values | pair_values(ours.images, truth.images, truth.alphas, lpips, rules.ssim_border)


def score_asset(setup: Setup, record: AssetRecord) -> dict[str, Any]:
    """{"ours": numbers, "retrieval": …, "random": …, "retrieved": id} of one asset, as plain values."""
    mesh = load_asset(record)
    renderer = make_renderer(mesh, setup.rules.render)
    photo = photo_of(setup, record.id, renderer)
    truth = show_mesh(setup, record, mesh, renderer)
    seed = setup.rules.asset_seed(record.id)
    ours, more = generate(setup, photo, seed)
    shown = {"ours": ours}
    row: dict[str, Any] = {"ours": plain(compare(setup, ours, truth)), **more}
    if setup.index:
        nearest = load_index(setup.index).nearest(photo.images[0], photo.alphas[0], record.id)
        shown["retrieval"] = training_asset(setup, nearest)
        row["retrieved"] = nearest
        row["retrieval"] = plain(compare(setup, shown["retrieval"], truth))
        drawn = draw(setup, record.id)
        shown["random"] = training_asset(setup, drawn[0])
        # Two views of each of ten say as much of their mean as all would, in a quarter of the time.
        few = sorted({0, setup.rules.cameras.num_views // 2})
        numbers = [compare(setup, training_asset(setup, n).only(few), truth.only(few)) for n in drawn]
        row["random"] = plain({k: float(np.nanmean([n[k] for n in numbers])) for k in numbers[0]})
        row["drawn"] = drawn
    add_features(setup, record.id, photo, truth, shown, row)
    return row


def generate(setup: Setup, photo: Views, seed: int) -> tuple[Shown, dict[str, Any]]:
    """What the model makes of a photo, and facts about it. Where it makes nothing, that is its answer, and counts."""
    image = as_image(photo)
    try:
        made = load_model(setup)(image, seed=seed, **stage_options(setup))
    except InputError as error:
        size = setup.rules.resolution
        blank = torch.full((setup.rules.cameras.num_views, size, size, 3), setup.rules.background[0])
        nothing = Shown(blank, None, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
        return nothing, {"seconds": None, "num_voxels": 0, "num_gaussians": 0, "nothing": str(error)}
    fits = made.latents.resolution == setup.resolution
    shown = show_gaussians(setup, made.gaussians, made.coords if fits else None, seed)
    seconds = round(sum(made.seconds.values()), 3)
    return shown, {
        "seconds": seconds,
        "num_voxels": len(made.coords),
        "num_gaussians": len(made.gaussians),
    }


def save_picture(setup: Setup, item: tuple[AssetRecord, str]) -> dict[str, Any]:
    """Write ``item[1]``: the photo, then a row each of truth, ours and what retrieval found. For ``run_items``."""
    record, path = item
    mesh = load_asset(record)
    renderer = make_renderer(mesh, setup.rules.render)
    photo = photo_of(setup, record.id, renderer)
    ours, _ = generate(setup, photo, setup.rules.asset_seed(record.id))
    rows = [show_mesh(setup, record, mesh, renderer).images, ours.images]
    if setup.index:
        nearest = load_index(setup.index).nearest(photo.images[0], photo.alphas[0], record.id)
        rows.append(training_asset(setup, nearest).in_floats().images)
    size = setup.rules.resolution
    cells = torch.stack([row[:4].cpu() for row in rows])  # [rows, 4, H, W, 3]
    sheet = cells.permute(0, 2, 1, 3, 4).reshape(len(rows) * size, -1, 3)
    first = torch.ones(len(sheet), size, 3)
    first[:size] = photo.composite(1.0)[0]
    write_png(Path(path), torch.cat([first, sheet], 1))
    return {}


def photo_of(setup: Setup, asset_id: str, renderer: Any) -> Views:
    """The view that generation starts from: one view with alpha."""
    camera = setup.rules.photo_of(asset_id)
    found: Views = renderer.render(camera.viewmats, camera.Ks, camera.resolution, camera.resolution)
    return found


def as_image(photo: Views) -> Image.Image:
    """RGBA, as it would lie in a file."""
    rgba = torch.cat([photo.images[0], photo.alphas[0, ..., None]], -1)
    return Image.fromarray((rgba.clamp(0, 1) * 255).round().byte().cpu().numpy(), "RGBA")


def stage_options(setup: Setup) -> dict[str, Any]:
    """What the model is called with, beside photo and seed."""
    if setup.steps is None:
        return {}
    model = load_model(setup)
    stages = (model.structure_settings, model.latent_settings)
    structure, latent = resampled(stages, {"num_steps": setup.steps})
    return {"structure": structure, "latent": latent}


def draw(setup: Setup, asset_id: str) -> list[str]:
    """Ids of random training assets, drawn for this asset."""
    others = [name for name in setup.pool if name != asset_id]
    count = min(setup.num_random, len(others))
    chosen = generator_for(setup.rules.seed, "random assets", asset_id).choice(
        len(others), count, replace=False
    )
    return [others[int(i)] for i in sorted(chosen)]


@lru_cache(maxsize=80)
def training_asset(setup: Setup, name: str) -> Shown:
    """A training asset, kept as bytes once a process has shown it."""
    shown = show_mesh(setup, training_records(setup.train)[name])
    return replace(shown, images=(shown.images * 255).round().to(torch.uint8), alphas=None)


@lru_cache(maxsize=1)
def training_records(path: str) -> dict[str, AssetRecord]:
    """The records that the program wrote for its workers."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    return {r["id"]: AssetRecord(r["id"], FileSource(*r["source"]), sha256=r["sha256"]) for r in rows}


def add_features(
    setup: Setup, asset_id: str, photo: Views, truth: Shown, shown: dict[str, Shown], row: dict[str, Any]
) -> None:
    """CLIP scores into ``row``; features of sets into the run's folder."""
    for name, extractor in load_extractors(setup).items():
        if name == "clip":
            reference = extractor(photo.composite(setup.rules.background[0]))
            for method, held in shown.items():
                row[method]["clip"] = float(
                    cosine_scores(extractor(held.in_floats().images), reference).mean()
                )
        elif setup.features:
            theirs = extractor(truth.images).cpu()
            folder = RunFolder(Path(setup.features))
            for method, held in shown.items():
                key = feature_key(asset_id, method, name)
                folder.save_features(key, {name: (extractor(held.in_floats().images).cpu(), theirs)})


def feature_key(asset_id: str, method: str, extractor: str) -> str:
    return "\0".join((asset_id, method, extractor))


def load_extractors(setup: Setup) -> dict[str, FeatureExtractor]:
    """By name, those that the run has weights of."""
    chosen = [(name, source) for name, source in setup.weights if name != "lpips"]
    return {name: _extractor(name, source, setup.device, setup.offline) for name, source in chosen}


@lru_cache(maxsize=8)
def _extractor(name: str, source: str, device: str, offline: bool) -> FeatureExtractor:
    return build_extractor(name, source, device=device, offline=offline)


def load_model(setup: Setup) -> ImageTo3D:
    """The model of a run, once a process."""
    return _model(setup.model, setup.device, setup.offline)


@lru_cache(maxsize=1)
def _model(source: str, device: str, offline: bool) -> ImageTo3D:
    return ImageTo3D.from_pretrained(source, device=device, offline=offline)


def plain(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: null is a metric that is not defined for this asset."""
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


# ---- over a run ----


def method_rows(outcomes: Mapping[str, Mapping[str, Any]], method: str) -> dict[str, dict[str, Any]]:
    """asset → numbers of one of METHODS; the model's own have seconds and counts as well."""
    found = {}
    for name, row in sorted(outcomes.items()):
        values = row.get("values", {})
        if method in values:
            more = ("seconds", "num_voxels", "num_gaussians") if method == "ours" else ()
            found[name] = values[method] | {key: values[key] for key in more}
    return found


def paired(
    ours: Mapping[str, Mapping[str, Any]],
    other: Mapping[str, Mapping[str, Any]],
    mean: Mapping[str, float],
    other_mean: Mapping[str, float],
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """metric → {mean, low, high, better}: ours − other over the assets that both have, with a 95 % interval by
    bootstrap; for FD and KD, which are of whole sets, the difference alone.
    """
    found: dict[str, dict[str, Any]] = {}
    for metric, more_is_better in BETTER.items():
        pairs = [(row.get(metric), other.get(name, {}).get(metric)) for name, row in ours.items()]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if differences:
            e = bootstrap_mean(differences, seed)
            entry: dict[str, Any] = {"mean": e.value, "low": e.low, "high": e.high}
        elif metric in mean and metric in other_mean:
            entry = {"mean": mean[metric] - other_mean[metric]}
        else:
            continue
        found[metric] = entry | {"better": entry["mean"] > 0 if more_is_better else entry["mean"] < 0}
    return found


def set_scores(setup: Setup, ids: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """method → FD and KD between its pictures of all assets and the truth's, where features were kept."""
    found: dict[str, dict[str, float]] = {}
    if not setup.features:
        return found
    folder = RunFolder(Path(setup.features))
    for method in methods:
        for name, _ in setup.weights:
            if name in SET_EXTRACTORS:
                pairs = [folder.load_features(feature_key(asset_id, method, name), name) for asset_id in ids]
                estimates = set_distances(name, pairs, setup.rules, resamples=0)
                found.setdefault(method, {}).update({k: e.value for k, e in estimates.items()})
    return found


def write_records(folder: Path, train: AssetList) -> Path:
    """The training records for the workers, under a name that their content gives."""
    rows = [
        {"id": r.id, "source": [r.source.container, r.source.member], "sha256": r.sha256}
        for r in train.records
        if r.source is not None
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"records-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    write_atomic(path, text)
    return path
