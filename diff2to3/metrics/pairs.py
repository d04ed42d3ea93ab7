"""The numbers between two sets of pictures of one object, view by view: what reconstruction is scored with."""

from __future__ import annotations

import torch
from torch import Tensor

from diff2to3.metrics.image import ciede2000, foreground_psnr, psnr, ssim
from diff2to3.metrics.lpips import Lpips


@torch.no_grad()
def pair_values(
    images: Tensor, targets: Tensor, alphas: Tensor | None, lpips: Lpips | None, ssim_border: str = "same"
) -> dict[str, float]:
    """Numbers between pictures [V, H, W, 3] of one object, means over views. ``alphas`` [V, H, W] of the truth say what
    the foreground is: where the object covers a pixel by more than half.
    """
    values = {"psnr": psnr(images, targets), "ssim": ssim(images, targets, ssim_border)}
    if lpips is not None:
        pairs = zip(images.float().split(2), targets.float().split(2), strict=True)
        values["lpips"] = torch.cat([lpips(a, b) for a, b in pairs])  # VGG at 512 takes 0.4 GB a view
    if alphas is not None:
        values["psnr_foreground"] = foreground_psnr(images, targets, alphas > 0.5)
        values["ciede2000"] = ciede2000(images, targets, alphas > 0.5)
    return {name: mean_of_views(v) for name, v in values.items()}


def mean_of_views(values: Tensor) -> float:
    """Over views, leaving out those where the metric is not defined (NaN); NaN where none is left."""
    return float(values.double().nanmean())
