"""Image tokens: 2D latents cut into patches, packed without padding.

    latents [C, h p, w p] of each image ─patches p²─▶ feats [T, C p²], index (i, j) of each patch

Images of one batch may have different sizes, an item may hold several images or some patches only, and an
item without tokens is one without a condition (the unconditional pass of guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageTokens:
    """Patches of the condition images of a batch.

    feats       [T, C]
    indices     int32 [T, 2]   row i from the top and column j of the patch in its image
    grids       int32 [T, 2]   rows and columns of that image's patch grid
    cu_seqlens  int32 [B + 1]  tokens of batch item b are cu_seqlens[b]:cu_seqlens[b+1]
    """

    feats: Tensor
    indices: Tensor
    grids: Tensor
    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        rows = self.feats.shape[0]
        if self.feats.ndim != 2 or self.indices.shape != (rows, 2) or self.grids.shape != (rows, 2):
            raise ValueError(
                f"feats, indices, grids: expected [T, C], [T, 2], [T, 2], got {list(self.feats.shape)}, "
                f"{list(self.indices.shape)}, {list(self.grids.shape)}"
            )
        if self.cu_seqlens.ndim != 1 or len(self.cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens: expected [B + 1], got {list(self.cu_seqlens.shape)}")

    @property
    def batch_size(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1

    @property
    def channels(self) -> int:
        return int(self.feats.shape[1])

    @staticmethod
    def from_latents(latents: Tensor | Sequence[Tensor], patch_size: int = 2) -> ImageTokens:
        """One image an item: latents [B, C, H, W], or B of [C, H, W] of any sizes; H and W are multiples of
        ``patch_size``. Features are ordered (channel, row in the patch, column), channel slowest.
        """
        if not len(latents):
            raise ValueError("latents: expected at least one image")
        parts = [patches_of(image, patch_size) for image in latents]
        feats, indices, grids = (torch.cat(column) for column in zip(*parts, strict=True))
        return ImageTokens(feats, indices, grids, boundaries([len(part[0]) for part in parts], feats.device))

    @staticmethod
    def none(batch_size: int, channels: int, device: torch.device | str = "cpu") -> ImageTokens:
        """No condition for any of ``batch_size`` items."""
        indices = torch.zeros(0, 2, dtype=torch.int32, device=device)
        feats = torch.zeros(0, channels, device=device)
        return ImageTokens(feats, indices, indices, boundaries([0] * batch_size, device))

    @staticmethod
    def cat(items: Sequence[ImageTokens]) -> ImageTokens:
        """The items of several batches as one batch."""
        if not items:
            raise ValueError("items: expected at least one ImageTokens")
        lengths = [n for item in items for n in item.lengths()]
        feats, indices, grids = (
            torch.cat([getattr(i, n) for i in items]) for n in ("feats", "indices", "grids")
        )
        return ImageTokens(feats, indices, grids, boundaries(lengths, feats.device))

    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return self.cu_seqlens.diff().tolist()

    def select(self, rows: Tensor) -> ImageTokens:
        """Only the tokens where ``rows`` (bool [T]) is true."""
        item = torch.repeat_interleave(
            torch.arange(self.batch_size, device=rows.device), self.cu_seqlens.diff().long().to(rows.device)
        )
        counts = torch.bincount(item[rows], minlength=self.batch_size)
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(self.cu_seqlens)
        return ImageTokens(self.feats[rows], self.indices[rows], self.grids[rows], cu_seqlens)

    def drop(self, items: Tensor) -> ImageTokens:
        """Without the tokens of the batch items where ``items`` (bool [B]) is true."""
        if items.shape != (self.batch_size,):
            raise ValueError(f"items: expected [{self.batch_size}], got {list(items.shape)}")
        lengths = self.cu_seqlens.diff().long()
        return self.select(torch.repeat_interleave(~items.to(lengths.device), lengths))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ImageTokens:
        """Copy to ``device``; ``dtype`` applies to the features."""
        return ImageTokens(
            self.feats.to(device, dtype),
            self.indices.to(device),
            self.grids.to(device),
            self.cu_seqlens.to(device),
        )

    def with_feats(self, feats: Tensor) -> ImageTokens:
        """The same patches with other features [T, C']."""
        return replace(self, feats=feats)


def patches_of(latents: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [C, H, W] → features [T, C p²], indices [T, 2] and grids [T, 2], row by row."""
    p = patch_size
    if latents.ndim != 3 or p < 1 or latents.shape[1] % p or latents.shape[2] % p:
        raise ValueError(f"latents: expected [C, H, W], H and W multiples of {p}, got {list(latents.shape)}")
    c, height, width = latents.shape
    rows, columns = height // p, width // p
    feats = latents.reshape(c, rows, p, columns, p).permute(1, 3, 0, 2, 4).reshape(rows * columns, c * p * p)
    device = latents.device
    i = torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(columns)
    j = torch.arange(columns, dtype=torch.int32, device=device).repeat(rows)
    grid = torch.tensor([[rows, columns]], dtype=torch.int32, device=device).expand(rows * columns, 2)
    return feats, torch.stack([i, j], 1), grid


def boundaries(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """[0, n_0, n_0 + n_1, …] as int32."""
    counts = torch.tensor([0, *lengths], dtype=torch.int64)
    return counts.cumsum(0).to(device, torch.int32)
