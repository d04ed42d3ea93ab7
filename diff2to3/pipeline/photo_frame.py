"""Generation in the photo frame: both stages look up the photo at its predicted camera.

crop [4, 256, 256] ─▶ maps ─▶ PhotoEncoder ─▶ features, camera
                       │        │ lifted onto 32³
                       │ noise ─▶ OccupancyFlow, several steps ─▶ voxels
                       │ lifted onto the voxels
                noise ─▶ LatentSMDiT ─▶ latents ─▶ decoder ─▶ Gaussians ─▶ fitted to the photo at its camera
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow.denoise import Progress, StageSettings, share_of
from diff2to3.flow.framing import crop_square, resized
from diff2to3.flow.networks import make_plan, see
from diff2to3.flow.samplers import SAMPLERS, OnStep, Step, Velocity, guided, timesteps
from diff2to3.flow.smdit import LatentSMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.photo.encoder import PhotoFeatures, PhotoMaps
from diff2to3.photo.maps import small_rgba, stacked_maps
from diff2to3.photo.occupancy import LiftedPhoto, OccupancyFlow, velocity
from diff2to3.pipeline.parts import BACKGROUND, MARGIN, SIZE, PhotoParts, some_voxels, visiting
from diff2to3.pipeline.photos import Photo
from diff2to3.pipeline.refine import RefineConfig, Refined, refine
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.voxels.lift_photo import lift_photo
from diff2to3.voxels.silhouette import fit_silhouette


@dataclass(frozen=True)
class SeenPhoto:
    """One photo as both stages see it.

    crop        of the object: premultiplied colour and alpha [4, 256, 256]
    rgb, alpha  of the crop at a quarter of its side: [64, 64, 3] not premultiplied, [64, 64]
    maps, features  of stage 1, a batch of one
    lifted_maps     [C, 32, 32] twice: what stage 2 looks up at its voxels
    tokens          [1, C, 16, 16]: the image latents of stage 2
    """

    crop: Tensor
    rgb: Tensor
    alpha: Tensor
    maps: PhotoMaps
    features: PhotoFeatures
    lifted_maps: tuple[Tensor, Tensor]
    tokens: Tensor
    camera: PhotoCamera


class PhotoStages:
    """See :class:`diff2to3.pipeline.stages.Stages`. Objects are worked on one after another, each from one photo."""

    frame = "photo"

    def __init__(self, parts: PhotoParts) -> None:
        self.networks, self.statistics = parts.networks, parts.statistics
        self.device, self.low_memory = parts.device, parts.low_memory

    def all_networks(self) -> list[nn.Module]:
        return list(vars(self.networks).values())

    def on_device(self, network: nn.Module) -> AbstractContextManager[Any]:
        """The network, on the device; with ``low_memory`` it goes back to the CPU afterwards."""
        return visiting(network, self.device, self.low_memory)

    # ---- a batch ----

    def see(
        self, prompts: Sequence[Any], photos: Sequence[tuple[Photo, ...]], multi_image: str = ""
    ) -> list[SeenPhoto]:
        for own in photos:
            if len(own) != 1:
                raise InputError(f"prompt: this model takes one photo of an object, got {len(own)}")
        return [self.look(photo) for (photo,) in photos]

    def occupancy(
        self,
        seen: Sequence[SeenPhoto],
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> Tensor:
        parts = []
        for number, (photo, generator) in enumerate(zip(seen, generators, strict=True)):
            logits = self.logits(photo, settings, generator, share_of(progress, number, len(seen)))
            coords = self.voxels(photo, logits, settings.threshold)
            coords[:, 0] = number
            parts.append(coords)
        return torch.cat(parts)

    def latents(
        self,
        coords: Tensor,
        seen: Sequence[SeenPhoto],
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> SparseVoxels:
        parts = []
        for number, (photo, generator) in enumerate(zip(seen, generators, strict=True)):
            own = coords[coords[:, 0] == number].clone()
            own[:, 0] = 0
            report = share_of(progress, number, len(seen))
            parts.append(self.latents_on(own, photo, settings, generator, report))
        return SparseVoxels.cat(parts)

    def decode(self, latents: SparseVoxels) -> list[Gaussians]:
        with self.on_device(self.networks.decoder) as decoder:
            return [decoder(own)[0] for own in latents.unbind()]

    def cameras(self, seen: Sequence[SeenPhoto]) -> list[PhotoCamera | None]:
        return [photo.camera for photo in seen]

    def refined(
        self, gaussians: Sequence[Gaussians], seen: Sequence[SeenPhoto], steps: int
    ) -> tuple[list[Gaussians], list[PhotoCamera | None]]:
        fits = [fitted(own, photo, steps) for own, photo in zip(gaussians, seen, strict=True)]
        return [fit.gaussians for fit in fits], [fit.camera for fit in fits]

    # ---- one object ----

    def look(self, photo: Photo) -> SeenPhoto:
        """Encode a photo and predict its camera."""
        statistics = self.statistics
        crop = crop_of(photo, SIZE).to(self.device)
        image = straight(crop)[None]
        alphas = crop[3][None]
        with self.on_device(self.networks.maps) as network:
            fine, coarse = stacked_maps(network, image, alphas)
        grey = image * alphas[..., None] + (1 - alphas[..., None]) * BACKGROUND
        with self.on_device(self.networks.image_encoder) as network:
            latents = statistics.image(network(grey.permute(0, 3, 1, 2)))
        rgba = small_rgba(image, alphas)
        scale = statistics.deviations.to(self.device)
        maps = PhotoMaps(fine / scale[0], coarse / scale[1], rgba)
        with self.on_device(self.networks.encoder) as encoder:
            features = encoder(maps)
        camera = PhotoCamera(math.degrees(float(features.elevations()[0])), float(features.focals()[0]))
        tokens = torch.cat([F.pixel_unshuffle(latents, 2), statistics.coarse(coarse)], 1)
        lifted = (latents[0], statistics.fine(fine)[0])
        return SeenPhoto(crop, straight(rgba[0]), rgba[0, 3], maps, features, lifted, tokens, camera)

    def logits(
        self,
        photo: SeenPhoto,
        settings: StageSettings,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Tensor:
        """Stage 1: logits [1, 1, R, R, R] of occupied voxels, from the generator's noise."""
        with self.on_device(self.networks.flow) as flow:
            side = flow.config.resolution
            noise = torch.randn(1, 1, side, side, side, generator=generator).to(self.device)
            elevations = torch.tensor([math.radians(photo.camera.elevation)], device=self.device)
            focals = torch.tensor([photo.camera.focal], device=self.device)
            lifted = flow.lift(photo.features, photo.maps.rgba, elevations, focals)
            nothing = lifted.kept(torch.zeros(1, device=self.device))
            velocities = occupancy_velocity(flow, lifted), occupancy_velocity(flow, nothing)
            clean = sampled(velocities, noise, settings, reporting(progress, "structure"))
        return 2 * torch.atanh(clean.clamp(-1 + 1e-6, 1 - 1e-6))  # the last step ends at 2p - 1

    def voxels(self, photo: SeenPhoto, logits: Tensor, threshold: float) -> Tensor:
        """Active voxels int32 [N, 4] of one object, made to fill the photo's silhouette at its camera
        (:mod:`diff2to3.voxels.silhouette`). InputError where there are none.
        """
        grid = fit_silhouette(logits[0, 0], photo.alpha, photo.camera, threshold)
        return some_voxels(torch.where(grid, 1.0, -1.0)[None, None], 0.0)

    def latents_on(
        self,
        coords: Tensor,
        photo: SeenPhoto,
        settings: StageSettings,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> SparseVoxels:
        """Stage 2: latents on voxels [N, 4] of one object, as the decoder takes them."""
        with self.on_device(self.networks.latent_flow) as flow:
            c = flow.config
            noise = torch.randn(len(coords), c.in_channels, generator=generator).to(self.device)
            voxels = SparseVoxels.from_coords(coords, noise, c.resolution, 1)
            velocities = latent_velocities(flow, voxels, photo)
            z = sampled(velocities, noise, settings, reporting(progress, "latents"))
        return voxels.with_feats(self.statistics.latents.invert(z))


def crop_of(photo: Photo, size: int) -> Tensor:
    """The photo's crop, premultiplied colour and alpha [4, size, size]."""
    assert photo.cut_out is not None
    pixels = torch.from_numpy(np.array(photo.cut_out.convert("RGBA"), np.float32)) / 255
    square = crop_square(pixels[:, :, :3], pixels[:, :, 3], MARGIN)
    if square is None:
        raise InputError("image: no object: nothing in it is more than 80 % opaque")
    return resized(square[None], size)[0]


def straight(crop: Tensor) -> Tensor:
    """Premultiplied colour and alpha [4, H, W] → colour [H, W, 3] that is not."""
    return (crop[:3] / crop[3:].clamp(min=1 / 255)).clamp(0, 1).permute(1, 2, 0)


def fitted(gaussians: Gaussians, photo: SeenPhoto, steps: int) -> Refined:
    """An object fitted to its photo at its camera (:func:`diff2to3.pipeline.refine.refine`)."""
    config = RefineConfig(steps=steps)
    return refine(gaussians, straight(photo.crop), photo.crop[3], photo.camera, config)


def occupancy_velocity(flow: OccupancyFlow, lifted: LiftedPhoto) -> Velocity:
    """What the samplers call: (z_t [B, 1, R, R, R], t) → velocity."""

    def u(noisy: Tensor, t: float) -> Tensor:
        time = torch.full((len(noisy),), float(t), device=noisy.device)
        return velocity(noisy, flow(noisy, time, lifted), time)

    return u


def latent_velocities(flow: LatentSMDiT, voxels: SparseVoxels, photo: SeenPhoto) -> tuple[Velocity, Velocity]:
    """Of one object's latents: with the photo's tokens and its lifted features, and without either."""
    lifted = lift_photo(
        photo.lifted_maps, photo.alpha, photo.rgb, photo.camera, voxels.coords[:, 1:], voxels.resolution
    )
    image = ImageTokens.from_latents(photo.tokens, flow.config.image_patch_size)
    nothing = ImageTokens.none(1, flow.config.image_width, voxels.coords.device)

    def of(tokens: ImageTokens, features: Tensor | None) -> Velocity:
        plan, seen = make_plan(flow, voxels, tokens), see(flow, tokens)

        def u(z: Tensor, t: float) -> Tensor:
            time = torch.full((1,), float(t), dtype=torch.float64)
            velocity: Tensor = flow(voxels.with_feats(z), time, tokens, plan, seen=seen, lifted=features)
            return velocity

        return u

    return of(image, lifted), of(nothing, None)


def sampled(
    velocities: tuple[Velocity, Velocity], noise: Tensor, settings: StageSettings, on_step: OnStep
) -> Tensor:
    """From noise to data, guided; ``velocities`` with and without the photo."""
    moved = velocities[0]
    if settings.guidance_scale != 1:
        moved = guided(*velocities, settings.guidance_scale, settings.guidance_interval)
    times = timesteps(settings.num_steps, settings.shift)
    clean: Tensor = SAMPLERS[settings.sampler](moved, noise, times, on_step)
    return clean


def reporting(progress: Progress | None, stage: str) -> OnStep:
    """Tell ``progress`` of every step."""

    def on_step(step: Step) -> None:
        if progress is not None:
            progress(stage, step.index + 1, step.num_steps)

    return on_step
