"""How well a 2to3-VAE gives assets back: renderings of its Gaussians against the asset's own, from held-out views.

``scores`` compares one object's Gaussians with views of it (training validates with it); ``score_asset`` does
everything for one asset: truth, reconstruction, numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3.assets import AssetRecord, load_asset
from diff2to3.checkpoint import MODEL_FILE, file_sha256, read_bundle
from diff2to3.evaluation.protocol import Protocol
from diff2to3.files import write_atomic
from diff2to3.gaussians.render import EPS2D, render_pictures
from diff2to3.hub import Source
from diff2to3.metrics.geometry import voxel_iou
from diff2to3.metrics.lpips import Lpips
from diff2to3.metrics.pairs import pair_values
from diff2to3.pipeline.reconstruct import Reconstruction, ReconstructionSettings, Reconstructor
from diff2to3.types import Gaussians, Views
from diff2to3.views import CameraConfig, RenderConfig, make_renderer


def scores(
    gaussians: Gaussians,
    truth: Views,
    *,
    background: float = 1.0,
    lpips: Lpips | None = None,
    ssim_border: str = "same",
) -> dict[str, float]:
    """Means over the views of ``truth``: psnr, ssim, psnr_foreground and ciede2000 (where its alpha is above one half;
    NaN where no view has such a pixel), and lpips where the network is given. On the device of ``gaussians``.
    """
    images = pictures(gaussians, truth, background)
    targets = truth.composite(background).to(images)
    return pair_values(images, targets, truth.alphas.to(images), lpips, ssim_border)


def pictures(
    gaussians: Gaussians, views: Views, background: float = 1.0, screen_filter: float = EPS2D
) -> Tensor:
    """Gaussians from the cameras of ``views``: [V, H, W, 3] in [0, 1]."""
    cameras = views.viewmats, views.Ks, views.width, views.height
    return render_pictures(gaussians, *cameras, background=background, eps2d=screen_filter)[0]


@dataclass(frozen=True)
class Setup:
    """What every asset of a run shares. Picklable.

    model    name, folder or repository
    rules    views, resolution, background, seed
    weights  of LPIPS, or None
    """

    model: str
    rules: Protocol
    weights: str | None = None
    device: str = "cpu"
    offline: bool = False


def reconstruction_rules(
    num_views: int = 8, resolution: int = 256, seed: int = 0, lighting: RenderConfig | None = None
) -> Protocol:
    """Held-out views: the camera set of the training views, drawn for evaluation alone; on white. ``lighting`` is that
    of the model's training set.
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


@dataclass(frozen=True)
class Scored:
    """One asset: its truth, its reconstruction, the numbers."""

    truth: Views
    images: Tensor
    reconstruction: Reconstruction
    values: dict[str, float] = field(default_factory=dict)


def score_asset(setup: Setup, record: AssetRecord) -> dict[str, Any]:
    """The numbers of one asset as plain values: for ``run_items``. InputError for an asset that cannot be read."""
    made = reconstruct_and_compare(setup, record)
    return {k: v if np.isfinite(v) else None for k, v in made.values.items()}


def reconstruct_and_compare(setup: Setup, record: AssetRecord) -> Scored:
    """See :func:`score_asset`."""
    model, lpips = load_model(setup), load_lpips(setup.weights, setup.rules.lpips_net, setup.device)
    mesh = load_asset(record)
    rules = setup.rules
    # One renderer for the truth and the encoder's input: what it prepares takes longer than a few views.
    renderer = make_renderer(mesh, replace(rules.render, outputs=("depths",)))
    cameras = rules.views_of(record.id)
    truth = renderer.render(cameras.viewmats, cameras.Ks, cameras.resolution, cameras.resolution)
    made = model(mesh, name=record.id, renderer=renderer)
    white = rules.background[0]
    images = pictures(made.gaussians, truth, white, rules.screen_filter)
    targets = truth.composite(white).to(images)
    values = pair_values(images, targets, truth.alphas.to(images), lpips, rules.ssim_border)
    coords = made.latents.coords[:, 1:]
    structure = model.structure_of(coords)
    if structure is not None:
        values["structure_iou"] = voxel_iou(structure.cpu(), coords.cpu())
    values["num_voxels"], values["num_gaussians"] = float(len(coords)), float(len(made.gaussians))
    return Scored(truth, images, made, values)


def save_picture(setup: Setup, item: tuple[AssetRecord, str]) -> dict[str, Any]:
    """Write ``item[1]``: truth, reconstruction and three times their difference, a row each. For ``run_items``."""
    record, path = item
    made = reconstruct_and_compare(setup, record)
    truth = made.truth.composite(setup.rules.background[0])[:4]
    ours = made.images[:4].cpu()
    rows = torch.stack([truth, ours, (1 - 3 * (ours - truth).abs()).clamp(0, 1)])
    _, count, height, width, _ = rows.shape
    sheet = rows.permute(0, 2, 1, 3, 4).reshape(3 * height, count * width, 3)
    write_png(Path(path), sheet)
    return {}


def write_png(path: Path, image: Tensor) -> None:
    from io import BytesIO

    stream = BytesIO()
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(stream, "PNG")
    write_atomic(path, stream.getvalue())


def load_model(setup: Setup) -> Reconstructor:
    """The model of a run, once a process."""
    return _model(setup.model, setup.device, setup.offline)


@lru_cache(maxsize=1)
def _model(source: str, device: str, offline: bool) -> Reconstructor:
    return Reconstructor.from_pretrained(source, device=device, offline=offline)


@lru_cache(maxsize=1)
def load_lpips(weights: str | None, net: str, device: str) -> Lpips | None:
    return None if weights is None else Lpips.load(weights, net, torch.device(device))


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
