"""The photo's own texture: a generated asset is fitted to its photo at the camera, through our rasteriser.

    Gaussians in the photo frame ┐ 1. camera, and a smooth warp of the picture plane      ┌▶ Gaussians
    photo, camera as predicted   ┘ 2. colours, opacities and small shifts as well, by Adam └▶ camera as found

A single photo says nothing about depth, and nothing about what it does not see. So nothing moves along the rays: the
warp is the same at every depth, and Gaussians shift across them only. What the photo does not see keeps its opacity,
and takes over how the visible surface nearby has changed its colour, so that no seam is left; its own colours are made
quiet (:mod:`diff2to3.pipeline.hidden`). What projects beside the
photo's silhouette may turn transparent, whether it was visible or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.gaussians.render import EPS2D, render
from diff2to3.kernels.rasterize import blending_weights
from diff2to3.pipeline.hidden import HiddenConfig, grid_sums, quiet_hidden
from diff2to3.types import Gaussians
from diff2to3.vae.losses import blur, ssim
from diff2to3.views.photo_frame import PhotoCamera

#: SH of degree 0 is colour over this.
Y0 = 0.28209479177387814
#: Standard deviations of what a predicted camera is wrong by: degrees of elevation, and log focal.
CAMERA_SPREAD = (6.0, 0.25)
#: The picture plane's warp has so many points a side.
WARP_POINTS = 7


@dataclass(frozen=True)
class RefineConfig:
    """steps       of Adam, all together; the first third finds the camera
    size        longest side in pixels that the photo is compared at in the last phase
    rates       learning rates: camera (in its spreads), warp and shift (units of the frame), colour, opacity (logits)
    shift       most that a Gaussian moves on its own, in units of the frame
    hidden      how the colours of what the photo does not see are made quiet
    """

    steps: int = 45
    size: int = 256
    camera_rate: float = 0.08
    warp_rate: float = 0.003
    color_rate: float = 0.03
    opacity_rate: float = 0.15
    shift_rate: float = 0.0015
    shift: float = 0.012
    hidden: HiddenConfig = field(default_factory=HiddenConfig)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected no negative number, got {self.steps}")
        if self.size < 32:
            raise ValueError(f"size: expected at least 32 pixels, got {self.size}")


@dataclass(frozen=True)
class Refined:
    """gaussians, camera  as found
    error       mean squared difference from the photo over mid-grey, before and after
    """

    gaussians: Gaussians
    camera: PhotoCamera
    error: tuple[float, float]


def refine(
    gaussians: Gaussians, rgb: Tensor, alpha: Tensor, camera: PhotoCamera, config: RefineConfig | None = None
) -> Refined:
    """Fit an asset to the photo that it was made from. The same input gives the same result.

    Args:
        gaussians: in the photo frame, with SH of degree 0.
        rgb: [S, S, 3] of the photo's square crop in [0, 1], not premultiplied.
        alpha: [S, S] of the crop.
        camera: as predicted.

    Raises:
        ValueError: rgb or alpha of a wrong shape.
    """
    config = config or RefineConfig()
    if alpha.ndim != 2 or alpha.shape[0] != alpha.shape[1] or rgb.shape != (*alpha.shape, 3):
        raise ValueError(
            f"rgb, alpha: expected [S, S, 3], [S, S], got {list(rgb.shape)}, {list(alpha.shape)}"
        )
    with torch.inference_mode(False), torch.enable_grad():
        own = replace(gaussians, **{name: x.detach().float().clone() for name, x in vars(gaussians).items()})
        fit = Fit(own, camera, config)
        photo = torch.cat([rgb.float(), alpha.float()[..., None]], -1).to(own.means).clone()
        before = fit.error(photo)
        if not config.steps or not len(gaussians):
            return Refined(gaussians, camera, (before, before))
        first = config.steps // 3
        fit.run(photo, min(config.size // 2, 128), first, fit.find_camera, [fit.pose, fit.warp])
        fit.see(photo)
        fit.run(photo, config.size, config.steps - first, fit.paint, fit.everything())
        with torch.no_grad():
            refined = quiet_hidden(fit.gaussians(spread=True), fit.seen, config.hidden)
            return Refined(refined, fit.camera(), (before, fit.error(photo)))


class Moved:
    """A tensor that Adam moves, written out: torch.optim imports torch.compile's front end, which takes a second."""

    BETAS = (0.8, 0.95)

    def __init__(self, value: Tensor, rate: float) -> None:
        self.value, self.rate, self.steps = value, rate, 0
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)

    @torch.no_grad()
    def step(self, gradient: Tensor, share: float) -> None:
        """One step at ``share`` of the rate."""
        self.steps += 1
        first, second = self.BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = self.mean / (1 - first**self.steps)
        spread = (self.square / (1 - second**self.steps)).sqrt() + 1e-8
        self.value -= share * self.rate * mean / spread


class Fit:
    """The asset as it was, and what is to be added to it.

    pose     [5]: elevation and log focal in CAMERA_SPREAD, shift to the right and up in units, log size
    warp     [2, n, n] over the crop: shifts to the right and up
    color, opacity, shift   [G, 3] sRGB, [G] logits, [G, 2] right and up, before they are bounded
    seen     [G]: how much of each Gaussian the photo sees, 0 to 1
    beside   [G]: whether a Gaussian projects beside the silhouette
    """

    def __init__(self, gaussians: Gaussians, camera: PhotoCamera, config: RefineConfig) -> None:
        self.base, self.start, self.config = gaussians, camera, config
        count, make = len(gaussians), gaussians.means.new_zeros
        self.pose, self.warp = (
            make(5, requires_grad=True),
            make(2, WARP_POINTS, WARP_POINTS, requires_grad=True),
        )
        self.color, self.opacity, self.shift = (
            make(*s, requires_grad=True) for s in ((count, 3), (count,), (count, 2))
        )
        self.seen, self.beside = make(count), make(count)
        self.logits = torch.logit(gaussians.opacities.clamp(1e-4, 1 - 1e-4))
        self.place = place_of(gaussians.means, camera)

    # ---- the camera ----

    def angle_and_focal(self) -> tuple[Tensor, Tensor]:
        elevation = math.radians(self.start.elevation) + self.pose[0] * math.radians(CAMERA_SPREAD[0])
        return elevation, self.start.focal * torch.exp(self.pose[1] * CAMERA_SPREAD[1])

    def camera(self) -> PhotoCamera:
        elevation, focal = self.angle_and_focal()
        degrees = math.degrees(float(elevation.detach()))
        return PhotoCamera(max(-89.0, min(89.0, degrees)), max(float(focal.detach()), 0.51))

    def viewmat(self) -> Tensor:
        """World to camera [4, 4], differentiable. Depths are scaled by the focal length at the start over this one, so
        that the intrinsics stay what they were."""
        elevation, focal = self.angle_and_focal()
        c, s, k, one, zero = (
            elevation.cos(),
            elevation.sin(),
            self.start.focal / focal,
            focal / focal,
            focal * 0,
        )
        rows = [
            torch.stack([one, zero, zero, zero]),
            torch.stack([zero, -s, -c, zero]),
            torch.stack([zero, k * c, -k * s, k * focal]),
            torch.stack([zero, zero, zero, one]),
        ]
        return torch.stack(rows)

    # ---- the asset ----

    def moves(self) -> Tensor:
        """How far every Gaussian moves [G, 3]: across the rays of the camera at the start."""
        maps = F.interpolate(self.warp[None], size=4 * WARP_POINTS, mode="bicubic", align_corners=True)
        smooth = F.grid_sample(
            maps, self.place[None, None] * 2 - 1, align_corners=True, padding_mode="border"
        )
        bound = self.config.shift
        across = (
            smooth[0, :, 0].T
            + self.pose[2:4] * 0.02
            + bound * torch.tanh(self.shift / bound) * self.seen[:, None]
        )
        angle = math.radians(self.start.elevation)
        up = across.new_tensor([0.0, math.sin(angle), math.cos(angle)])
        right = across.new_tensor([1.0, 0.0, 0.0])
        return across[:, :1] * right + across[:, 1:] * up

    def gaussians(self, spread: bool = False) -> Gaussians:
        """The asset as it is now. ``spread``: what is not seen takes over its visible neighbours' change of colour."""
        size = torch.exp(self.pose[4] * 0.05)
        change = self.color * self.seen[:, None]
        if spread:
            change = change + (1 - self.seen[:, None]) * around(self.base.means, change, self.seen)
        open_to = torch.maximum(self.seen, self.beside)
        opacities = torch.sigmoid(self.logits + self.opacity * open_to)
        sh = torch.cat([self.base.sh[:, :1] + change[:, None] / Y0, self.base.sh[:, 1:]], 1)
        means = self.base.means * size + self.moves()
        return Gaussians(means, self.base.quats, self.base.scales * size, opacities, sh)

    def see(self, photo: Tensor) -> None:
        """Find out what the photo sees of the asset, now that the camera is known."""
        with torch.no_grad():
            now = self.gaussians()
        size = self.config.size
        viewmats, K = self.viewmat().detach()[None], self.start.K(size).to(now.means)[None]
        scene = (now.means, now.quats, now.scales, now.opacities, viewmats, K)
        pixels = blending_weights(*scene, K.new_ones(1, size, size), eps2d=EPS2D, antialiased=True)[:, 0]
        self.seen = (pixels / (pixels + 0.5)).detach()
        where = place_of(now.means, self.camera())
        solid = F.max_pool2d(shrunk(photo, 64)[None, None, ..., 3], 3, 1, 1)
        at = F.grid_sample(solid, where[None, None] * 2 - 1, align_corners=False)[0, 0, 0]
        self.beside = (at < 0.5).to(at)

    # ---- the losses ----

    def draw(self, size: int, background: float) -> tuple[Tensor, Tensor]:
        """Colours [1, S, S, 3] over a grey level, and alphas [1, S, S]."""
        K = self.start.K(size).to(self.base.means)[None]
        drawn = render(self.gaussians(), self.viewmat()[None], K, size, size, background=background)
        return drawn.colors, drawn.alphas

    def find_camera(self, target: Tensor, background: float) -> Tensor:
        """Silhouette and blurred colour: what a camera that is a little wrong can be found by."""
        colors, alphas = self.draw(len(target), background)
        line = target.new_tensor([1.0, 2.0, 3.0, 2.0, 1.0]) / 9
        drawn = torch.cat([colors[0], alphas[0][..., None]], -1).permute(2, 0, 1)
        wanted = torch.cat([over(target, background), target[..., 3:]], -1).permute(2, 0, 1)
        difference = blur(drawn - wanted, line)
        return 2 * difference[3].square().mean() + difference[:3].square().mean() + self.priors()

    def paint(self, target: Tensor, background: float) -> Tensor:
        colors, alphas = self.draw(len(target), background)
        wanted = over(target, background)[None]
        difference = colors - wanted
        loss = (
            difference.abs().mean() + 2 * difference.square().mean() + 0.1 * (1 - ssim(colors, wanted).mean())
        )
        loss = loss + 0.5 * (alphas[0] - target[..., 3]).abs().mean()
        return loss + self.priors() + 2e-4 * (self.opacity * self.seen).square().mean()

    def priors(self) -> Tensor:
        """What keeps the camera near the predicted one and the warp small and smooth."""
        bend = self.warp.diff(dim=1).square().mean() + self.warp.diff(dim=2).square().mean()
        return 3e-4 * self.pose[:2].square().sum() + 3e-4 * self.pose[2:].square().sum() + 2.0 * bend

    # ---- the fitting ----

    def everything(self) -> list[Tensor]:
        return [self.pose, self.warp, self.color, self.opacity, self.shift]

    def run(
        self,
        photo: Tensor,
        size: int,
        steps: int,
        loss: Callable[[Tensor, float], Tensor],
        chosen: list[Tensor],
    ) -> None:
        """``steps`` of Adam on the ``chosen``; the rate falls to a tenth along a cosine."""
        c = self.config
        rates = (c.camera_rate, c.warp_rate, c.color_rate, c.opacity_rate, c.shift_rate)
        moved = [
            Moved(value, rate)
            for value, rate in zip(self.everything(), rates, strict=True)
            if any(value is other for other in chosen)
        ]
        target = shrunk(photo, size)
        for step in range(steps):
            # colours that are right over black and over white are no transparency in disguise
            gradients = torch.autograd.grad(
                loss(target, (0.0, 1.0)[step % 2]), [m.value for m in moved], allow_unused=True
            )
            share = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
            for one, gradient in zip(moved, gradients, strict=True):
                if gradient is not None:
                    one.step(gradient, share)

    @torch.no_grad()
    def error(self, photo: Tensor) -> float:
        target = shrunk(photo, self.config.size)
        return float((self.draw(len(target), 0.5)[0][0] - over(target, 0.5)).square().mean())


def over(photo: Tensor, background: float) -> Tensor:
    """RGBA [S, S, 4] over a grey level."""
    return photo[..., :3] * photo[..., 3:] + background * (1 - photo[..., 3:])


def shrunk(photo: Tensor, size: int) -> Tensor:
    """A square picture [S, S, 4], not premultiplied, at most ``size`` pixels a side."""
    if len(photo) <= size:
        return photo
    premultiplied = torch.cat([photo[..., :3] * photo[..., 3:], photo[..., 3:]], -1).permute(2, 0, 1)[None]
    small = F.interpolate(premultiplied, size=(size, size), mode="area")[0].permute(1, 2, 0)
    return torch.cat([small[..., :3] / small[..., 3:].clamp(min=1e-6), small[..., 3:]], -1)


def place_of(means: Tensor, camera: PhotoCamera) -> Tensor:
    """Where points [G, 3] are in the crop, 0 to 1 from the left and from the top: [G, 2]."""
    viewmat = camera.viewmat.to(means)
    seen = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    return 0.5 + camera.focal * seen[:, :2] / seen[:, 2:].clamp(min=1e-6)


def around(means: Tensor, change: Tensor, weights: Tensor, reach: float = 2.5) -> Tensor:
    """A weighted mean of ``change`` [G, C] around every point, which falls to 0 where nothing with weight is near."""
    sums = grid_sums(means, change, weights, (reach, reach, reach))
    return sums[:, :-1] / (sums[:, -1:] + 4.0)
