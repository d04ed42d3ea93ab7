"""How much of an asset a model gives back from one photograph of it, seen in the photograph's own frame.

asset ─ photographed ─▶ picture ─ model ─▶ Gaussians ┐
      └ moved to the true photo frame ───────────────┴▶ eight views around, voxels ─▶ scores

In the object's frame a model would have to guess a convention: which of an object's sides is its front. Here views are
relative to the camera of the photograph. A model that works in the object's frame is given the photograph's true yaw,
place and scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3.data.photographs import photo_occupancy
from diff2to3.data.schema import PhotographConfig
from diff2to3.errors import InputError
from diff2to3.evaluation.recognition import turned_about_z
from diff2to3.evaluation.summary import bootstrap_mean
from diff2to3.gaussians.render import render_pictures
from diff2to3.gaussians.turn import turned
from diff2to3.metrics.geometry import voxel_iou
from diff2to3.metrics.image import psnr, ssim
from diff2to3.pipeline import Result
from diff2to3.types import Gaussians, Mesh
from diff2to3.views.cameras import generator_for
from diff2to3.views.config import RenderConfig
from diff2to3.views.photo_frame import PhotoCamera, Photograph, photograph, transformed
from diff2to3.views.tracer import Camera, Frames, Tracer

#: Degrees about z of the views, from the photograph's own camera.
TURNS = (0.0, 45.0, 90.0, 135.0, 180.0, 225.0, 270.0, 315.0)
#: Pixels a side of the photograph and of the views.
PHOTO_SIZE, VIEW_SIZE = 256, 160
#: Elevations of the photographs, in degrees; focal lengths, in crop sides.
ELEVATIONS, FOCALS = (-5.0, 45.0), (1.2, 4.0)
#: Photographs of which a larger share of the voxels lies outside the cube are taken again.
MOST_LOST, TRIES = 0.02, 8


@dataclass(frozen=True)
class Truth:
    """A photograph of an asset, and the asset in its frame.

    picture    RGBA
    views      [8, S, S, 3] over white
    occupancy  bool [R, R, R]
    """

    picture: Image.Image
    camera: PhotoCamera
    transform: np.ndarray
    views: Tensor
    occupancy: Tensor


def part_of(asset_id: str) -> int:
    """Which third of a split an asset is in, by the SHA-256 of its id: 0 is kept for choosing settings."""
    return int(hashlib.sha256(asset_id.encode()).hexdigest()[:8], 16) % 3


def truth_of(mesh: Mesh, asset_id: str, resolution: int, seed: int = 0) -> Truth:
    """Photograph an asset: at random, but always the same for an id and a seed.

    Raises:
        InputError: no photograph shows anything of it, or holds it within the cube.
    """
    generator = generator_for(seed, "photo_frame", asset_id)
    render = RenderConfig(outputs=("depths",))
    tracer = Tracer(mesh, render)
    for _ in range(TRIES):
        shot = shoot(mesh, generator)
        frames = Frames(1, PHOTO_SIZE, PHOTO_SIZE, ("depths",))
        K = shot.camera.K(PHOTO_SIZE).numpy()
        tracer.render(Camera.of(shot.viewmat.numpy(), K, PHOTO_SIZE, PHOTO_SIZE), frames, 0)
        assert frames.depths is not None
        if not (frames.depths > 0).any():
            continue
        shot = shot.placed(frames.depths[0])
        found = photo_occupancy(mesh, shot, resolution)
        if found is None or found[1] > MOST_LOST:
            continue
        picture = np.concatenate([frames.images[0], frames.alphas[0][..., None]], -1)
        image = Image.fromarray((picture * 255 + 0.5).astype(np.uint8), "RGBA")
        views = views_around(mesh, shot, render)
        return Truth(image, shot.camera, shot.transform, views, torch.from_numpy(found[0]))
    raise InputError(f"{asset_id}: no photograph holds it within the cube; it is left out")


def shoot(mesh: Mesh, generator: np.random.Generator) -> Photograph:
    """A camera around the asset."""
    config = PhotographConfig()
    azimuth, elevation = generator.uniform(0, 360), generator.uniform(*ELEVATIONS)
    focal = float(np.exp(generator.uniform(*np.log(FOCALS))))
    try:
        return photograph(mesh.vertices, azimuth, elevation, focal)
    except ValueError:  # so near that the camera would stand in the object
        return photograph(mesh.vertices, azimuth, elevation, config.focal_range[1])


def views_around(mesh: Mesh, shot: Photograph, render: RenderConfig) -> Tensor:
    """The asset in the photo frame from the eight views [8, S, S, 3], over white."""
    vertices = transformed(mesh.vertices, shot.transform).astype(np.float32)
    tracer = Tracer(replace(mesh, vertices=vertices), replace(render, outputs=()))
    frames = Frames(len(TURNS), VIEW_SIZE, VIEW_SIZE, ())
    K = shot.camera.K(VIEW_SIZE).numpy()
    for index, viewmat in enumerate(viewmats_around(shot.camera)):
        tracer.render(Camera.of(viewmat.numpy(), K, VIEW_SIZE, VIEW_SIZE), frames, index)
    images, alphas = torch.from_numpy(frames.images), torch.from_numpy(frames.alphas)[..., None]
    return images * alphas + (1 - alphas)


def viewmats_around(camera: PhotoCamera) -> Tensor:
    """[8, 4, 4]."""
    return torch.stack([turned_about_z(camera.viewmat, turn) for turn in TURNS])


def in_photo_frame(gaussians: Gaussians, transform: np.ndarray) -> Gaussians:
    """Gaussians of the object's frame, moved to the photo frame by a similarity [4, 4]."""
    scale = float(np.linalg.norm(transform[:3, 0]))
    moved = turned(gaussians, torch.from_numpy(transform[:3, :3] / scale))
    shift = torch.from_numpy(transform[:3, 3]).to(moved.means)
    return replace(moved, means=scale * moved.means + shift, scales=scale * moved.scales)


@torch.no_grad()
def compared(result: Result, truth: Truth) -> dict[str, float | None]:
    """Scores of what a model made of the photograph.

    psnr, ssim  means over the eight views, on white; _front: at the photograph's camera, _side: 45 and 90 degrees away,
                _back: 135 and 180
    voxel_iou   of the generated voxels; of the photo frame alone
    elevation_error   degrees; of models that return the camera
    """
    gaussians = result.gaussians
    if result.frame != "photo":
        gaussians = in_photo_frame(gaussians, truth.transform)
    Ks = truth.camera.K(VIEW_SIZE).expand(len(TURNS), 3, 3)
    images, _ = render_pictures(gaussians, viewmats_around(truth.camera), Ks, VIEW_SIZE, VIEW_SIZE)
    decibels, similar = psnr(images, truth.views), ssim(images, truth.views)
    side = torch.tensor([abs((turn + 180) % 360 - 180) in (45.0, 90.0) for turn in TURNS])
    back = torch.tensor([abs((turn + 180) % 360 - 180) > 90 for turn in TURNS])
    iou = None
    if result.frame == "photo" and result.latents.resolution == len(truth.occupancy):
        iou = voxel_iou(result.coords, truth.occupancy.nonzero())
    error = None if result.camera is None else abs(result.camera.elevation - truth.camera.elevation)
    return {
        "psnr": float(decibels.mean()),
        "psnr_front": float(decibels[0]),
        "psnr_side": float(decibels[side].mean()),
        "psnr_back": float(decibels[back].mean()),
        "ssim": float(similar.mean()),
        "voxel_iou": iou,
        "elevation_error": error,
    }


def summarised(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, median and 95 % interval of every score over assets."""
    found = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if isinstance(row.get(name), float)]
        if values:
            estimate = bootstrap_mean(values)
            found[name] = {
                "mean": estimate.value, "median": float(np.median(values)), "low": estimate.low,
                "high": estimate.high, "count": len(values),
            }  # fmt: skip
    return found
