"""Distances between sets of images, in a network's features: Fréchet distance and kernel distance.

Features are [N, C]. Both are computed in float64 and independently of how the sets were cut into batches (up
to rounding); neither needs the images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class FeatureMoments:
    """Count, mean and scatter of features, updated batch by batch (Chan et al. 1979) and mergeable.

    ``mean`` [C] and ``scatter`` [C, C] = Σ (x − mean)(x − mean)ᵀ, float64, on the CPU. Small batches wait until
    they are worth an update of all C² numbers.
    """

    WAITING = 1024

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    @staticmethod
    def of(batches: Iterable[Tensor]) -> FeatureMoments:
        """The moments of all rows of ``batches`` ([N, C] each). ValueError when there is none."""
        moments: FeatureMoments | None = None
        for batch in batches:
            moments = moments or FeatureMoments(batch.shape[-1])
            moments.update(batch)
        if moments is None:
            raise ValueError("features: expected at least one batch")
        return moments

    @property
    def count(self) -> int:
        return self._settled()._count

    @property
    def mean(self) -> Tensor:
        return self._settled()._mean

    @property
    def scatter(self) -> Tensor:
        return self._settled()._scatter

    def update(self, features: Tensor) -> None:
        """Add rows [N, C]."""
        check_features("features", features, self.channels)
        self._waiting.append(features.detach().to("cpu", torch.float64, copy=True))
        if sum(len(x) for x in self._waiting) >= self.WAITING:
            self._settled()

    def _settled(self) -> FeatureMoments:
        """Itself, with nothing waiting."""
        if self._waiting:
            x = torch.cat(self._waiting)
            self._waiting = []
            if len(x):
                mean = x.mean(0)
                centred = x - mean
                self._add(len(x), mean, centred.T @ centred)
        return self

    def merge(self, other: FeatureMoments) -> None:
        """Add the rows that ``other`` has seen."""
        if other.channels != self.channels:
            raise ValueError(f"features: {other.channels} channels do not go with {self.channels}")
        self._settled()
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._count + count
        shift = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self._count * count / total)
        self._mean = self._mean + shift * (count / total)
        self._count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [C, C]. ValueError for fewer than two rows, which have none."""
        if self.count < 2:
            raise ValueError(f"features: a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets (Heusel et al. 2017), >= 0.

    ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

    The last trace is the sum of the singular values of Σ₁^½ Σ₂^½, each factor a symmetric root: real, and
    exact for singular covariances (fewer images than channels, constant features), where a general matrix root
    is neither. A set of one image has no covariance: ValueError.
    """
    if a.channels != b.channels:
        raise ValueError(f"features: {a.channels} and {b.channels} channels cannot be compared")
    first, second = a.covariance, b.covariance
    cross = torch.linalg.svdvals(_symmetric_root(first) @ _symmetric_root(second)).sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(float(distance), 0.0)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Eigenvalues below the rounding of the largest count as 0: their roots would add up to an error of 1e-8."""
    values, vectors = torch.linalg.eigh(matrix)
    noise = values.abs().max() * len(matrix) * torch.finfo(matrix.dtype).eps
    return (vectors * torch.where(values > noise, values, 0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distance and how it was estimated.

    mean         the estimate; unbiased, so it may be below 0 for like sets
    std          deviation between subsets; 0 for one
    num_subsets, subset_size, seed   0 subsets: one estimate over all features
    """

    mean: float
    std: float
    num_subsets: int
    subset_size: int
    seed: int


def kernel_distance(
    features: Tensor, reference: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Squared MMD with the kernel (x·y / C + 1)³ (Bińkowski et al. 2018), the unbiased estimate.

    The mean over random subsets without replacement, as published (100 of 1000, fewer where a set is smaller);
    with ``num_subsets`` = 0 over all features at once, in blocks. Tables give it in percent.

    Raises:
        ValueError: fewer than 2 rows in a set, different channels, or NaN.
    """
    for name, x in (("features", features), ("reference", reference)):
        check_features(name, x, features.shape[-1])
        if len(x) < 2:
            raise ValueError(f"{name}: KD needs at least 2 images, got {len(x)}")
    if num_subsets < 0 or subset_size < 2:
        raise ValueError(f"expected num_subsets >= 0 and subset_size >= 2, got {num_subsets}, {subset_size}")
    x, y = (t.detach().to("cpu", torch.float64) for t in (features, reference))
    if num_subsets == 0:
        return KernelDistance(mmd2_unbiased(x, y), 0.0, 0, 0, seed)
    size = min(subset_size, len(x), len(y))
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        rows, others = (torch.from_numpy(generator.choice(len(t), size, replace=False)) for t in (x, y))
        values.append(mmd2_unbiased(x[rows], y[others]))
    std = float(np.std(values, ddof=1)) if num_subsets > 1 else 0.0
    return KernelDistance(float(np.mean(values)), std, num_subsets, size, seed)


def mmd2_unbiased(x: Tensor, y: Tensor, block: int = 2048) -> float:
    """Unbiased squared MMD of two sets [N, C], [M, C] with the cubic kernel; N M numbers at most a block."""
    n, m = len(x), len(y)
    within_x = _kernel_sum(x, x, block) - float(_kernel(x.square().sum(1), x.shape[1]).sum())
    within_y = _kernel_sum(y, y, block) - float(_kernel(y.square().sum(1), y.shape[1]).sum())
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x, y, block) / (n * m)


def _kernel(products: Tensor, channels: int) -> Tensor:
    return (products / channels + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor, block: int) -> float:
    blocks = [(rows, others) for rows in x.split(block) for others in y.split(block)]
    return sum((float(_kernel(rows @ others.T, x.shape[1]).sum()) for rows, others in blocks), 0.0)


def check_features(name: str, features: Tensor, channels: int) -> None:
    """ValueError unless ``features`` is [N, channels] and finite."""
    if features.ndim != 2 or features.shape[1] != channels or channels == 0:
        raise ValueError(f"{name}: expected [N, {channels}], got {list(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name}: NaN or infinite features; look at the images they came from")
