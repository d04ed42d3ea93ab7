"""Numbers over a run: means with confidence intervals, FD and KD with their noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.runs import RunFolder
from diff2to3.metrics.distribution import FeatureMoments, frechet_distance, kernel_distance

#: metric → (heading, whether more is better, factor in tables, digits).
METRICS: dict[str, tuple[str, bool, float, int]] = {
    "ssim": ("SSIM", True, 1, 4),
    "psnr": ("PSNR", True, 1, 2),
    "lpips": ("LPIPS", False, 1, 5),
    "psnr_foreground": ("PSNR (foreground)", True, 1, 2),
    "ciede2000": ("ΔE00", False, 1, 2),
    "chamfer": ("Chamfer", False, 1, 5),
    "f_score": ("F-score", True, 1, 4),
    "voxel_iou": ("Voxel IoU", True, 1, 4),
    "clip": ("CLIP", True, 1, 2),
    "clip_views": ("CLIP (all views)", True, 1, 2),
    "fd_inception": ("FD incep", False, 1, 2),
    "kd_inception": ("KD incep (%)", False, 100, 4),
    "fd_dinov2": ("FD dinov2", False, 1, 2),
    "kd_dinov2": ("KD dinov2 (%)", False, 100, 2),
}


@dataclass(frozen=True)
class Estimate:
    """A metric over a run.

    value      of all assets
    noise      standard error from resampling assets; None where it was not estimated
    low, high  95 % interval of a mean, by bootstrap over assets; None for FD and KD, which are biased under it
    count      assets it is over
    details    how it was estimated, such as KD's subsets and seed
    """

    value: float
    noise: float | None
    low: float | None
    high: float | None
    count: int
    details: dict[str, Any]


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean over assets with its standard error and 95 % percentile interval. One asset has no interval."""
    array = np.asarray(values, np.float64)
    if len(array) == 0:
        raise ValueError("values: expected at least one")
    mean = float(array.mean())
    if len(array) == 1:
        return Estimate(mean, None, None, None, 1, {})
    generator = np.random.default_rng(seed)
    # A few at a time: 2000 resamples of 100,000 assets would take gigabytes.
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    details = {"resamples": resamples, "seed": seed}
    return Estimate(mean, float(np.std(means, ddof=1)), float(low), float(high), len(array), details)


def summarise(
    folder: RunFolder, rules: Protocol, ids: Sequence[str], extractors: Sequence[str], resamples: int = 4
) -> tuple[dict[str, Estimate], dict[str, dict[str, float | None]], dict[str, str]]:
    """(metric → estimate, asset → values, asset → error) of a run. ``resamples`` are for FD's and KD's noise."""
    lines = folder.lines()
    values = {i: lines[i]["values"] for i in ids if "values" in lines.get(i, {})}
    errors = {i: lines[i]["error"] for i in ids if "error" in lines.get(i, {})}
    estimates: dict[str, Estimate] = {}
    for name in METRICS:
        numbers = [row[name] for row in values.values() if row.get(name) is not None]
        if numbers:
            estimates[name] = bootstrap_mean(numbers, rules.seed)
    for extractor in extractors:
        if len(values) and extractor in ("inception", "dinov2"):
            pairs = [folder.load_features(asset_id, extractor) for asset_id in values]
            estimates |= set_distances(extractor, pairs, rules, resamples)
    return estimates, values, errors


def set_distances(
    extractor: str, pairs: Sequence[tuple[Tensor, Tensor]], rules: Protocol, resamples: int
) -> dict[str, Estimate]:
    """FD and KD between all our features and all of the truth's; {} for sets too small to have them."""
    ours, truth = (torch.cat(side) for side in zip(*pairs, strict=True))
    if len(ours) < 2:
        return {}
    fd = frechet_distance(FeatureMoments.of([ours]), FeatureMoments.of([truth]))
    kd = kernel_distance(
        ours, truth, num_subsets=rules.kd_subsets, subset_size=rules.kd_subset_size, seed=rules.seed
    )
    noise: tuple[float | None, float | None] = (None, None)
    if resamples > 1 and len(pairs) > 3:
        noise = _subsampling_noise(pairs, rules, resamples)
    details = {"images": len(ours), "channels": ours.shape[1], "noise_resamples": resamples}
    kd_details = {k: v for k, v in asdict(kd).items() if k != "mean"} | details
    return {
        f"fd_{extractor}": Estimate(fd, noise[0], None, None, len(pairs), details),
        f"kd_{extractor}": Estimate(kd.mean, noise[1], None, None, len(pairs), kd_details),
    }


def _subsampling_noise(
    pairs: Sequence[tuple[Tensor, Tensor]], rules: Protocol, resamples: int
) -> tuple[float, float]:
    """Standard errors of FD and KD from halves of the assets without replacement: a bootstrap's repeated images
    would themselves change both. The spread of halves of n is that of samples of n (n / 2 drawn from n).
    """
    generator = np.random.default_rng([rules.seed, len(pairs)])
    fds, kds = [], []
    for _ in range(resamples):
        rows = generator.permutation(len(pairs))[: len(pairs) // 2]
        ours, truth = (torch.cat([pairs[i][side] for i in rows]) for side in (0, 1))
        fds.append(frechet_distance(FeatureMoments.of([ours]), FeatureMoments.of([truth])))
        subsets = min(rules.kd_subsets, 10) or 0
        kd = kernel_distance(
            ours, truth, num_subsets=subsets, subset_size=rules.kd_subset_size, seed=rules.seed
        )
        kds.append(kd.mean)
    return float(np.std(fds, ddof=1)), float(np.std(kds, ddof=1))
