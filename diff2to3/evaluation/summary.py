"""Numbers over a run: means with confidence intervals, FD and KD with their noise."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Scores:
    """One method over a run.

    values   asset → numbers
    remarks  asset → what else the method said
    errors   asset → why it has no numbers
    """

    values: dict[str, dict[str, float | None]]
    remarks: dict[str, dict[str, Any]]
    errors: dict[str, str]


def scores_of(lines: Mapping[str, Mapping[str, Any]], method: str) -> Scores:
    """One method's part of a run's lines, by asset."""
    rows = {i: row for i, row in sorted(lines.items()) if method in row.get("values", {})}
    return Scores(
        {i: row["values"][method] for i, row in rows.items()},
        {i: row.get("remarks", {}).get(method, {}) for i, row in rows.items()},
        {i: row["error"] for i, row in sorted(lines.items()) if "values" not in row},
    )


def estimates_of(
    values: Mapping[str, Mapping[str, float | None]], seed: int = 0, metrics: Iterable[str] = METRICS
) -> dict[str, Estimate]:
    """metric → estimate over the assets for which it is defined."""
    found = {}
    for name in metrics:
        numbers = [v for row in values.values() if (v := row.get(name)) is not None]
        if numbers:
            found[name] = bootstrap_mean(numbers, seed)
    return found


def set_estimates(
    folder: RunFolder,
    method: str,
    ids: Collection[str],
    extractors: Iterable[str],
    rules: Protocol,
    resamples: int = 4,
) -> dict[str, Estimate]:
    """FD and KD of a method over assets, by the extractors whose features the run kept; ``resamples`` are for noise."""
    found: dict[str, Estimate] = {}
    for extractor in extractors if ids else ():
        pairs = [folder.load_features(asset_id, method, extractor) for asset_id in ids]
        found |= set_distances(extractor, pairs, rules, resamples)
    return found


def paired_differences(
    first: Mapping[str, Mapping[str, float | None]],
    other: Mapping[str, Mapping[str, float | None]],
    seed: int = 0,
) -> dict[str, Estimate]:
    """metric → other − first, over the assets that both have, with a bootstrap interval. Both are asset → numbers."""
    found = {}
    for name in METRICS:
        pairs = [(row.get(name), other.get(asset_id, {}).get(name)) for asset_id, row in first.items()]
        differences = [b - a for a, b in pairs if a is not None and b is not None]
        if differences:
            found[name] = bootstrap_mean(differences, seed)
    return found


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
