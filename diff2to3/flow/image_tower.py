"""What a network makes of the image alone, before image and volume meet: the same at every sampling step.

    image tokens [T, D] ─blocks, within each item─▶ [T, D] ─mean of each of 4 x 4 parts, 2 layers─▶ [B, c, c, c]
    or  image latents ─mean of each part─▶ ─linear, unit length─▶ how alike to each prototype ─▶ mean of their grids

The FLUX-like latents of an image say what is where, not what it is. Image tokens are few, so blocks on them alone
see several times as many images in the same time as blocks on the joint sequence. Not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diff2to3.flow.tokens import ImageTokens
from diff2to3.nn.items import sum_by_item
from diff2to3.nn.sequences import SequencePlan
from diff2to3.nn.transformer import TransformerBlock, final_norm

#: The picture is read in so many parts along each side.
PARTS = 4


@dataclass(frozen=True)
class SeenImage:
    """tokens  [T, D]
    coarse  logits [B, c, c, c] of a coarse occupancy grid, or None
    """

    tokens: Tensor
    coarse: Tensor | None


class ImageTower(nn.ModuleList):
    """Transformer blocks over the image tokens of each item."""

    def __init__(self, num_blocks: int, width: int, num_heads: int, mlp_ratio: float, backend: str) -> None:
        super().__init__(
            TransformerBlock(width, num_heads, mlp_ratio, qk_rms_norm=True, backend=backend)
            for _ in range(num_blocks)
        )

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        if not len(self):
            return tokens
        plan = SequencePlan.from_cu_seqlens(cu_seqlens)
        for block in self:
            tokens = block(tokens, plan)
        return tokens


class CoarseHead(nn.Module):
    """Image tokens → the occupancy of a coarse grid, from the whole picture at once.

    An item without tokens gets the same grid whatever else is in the batch.
    """

    def __init__(self, width: int, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        narrow, hidden = width // 2, 4 * width // 3
        self.token_layer = nn.Linear(width, narrow)
        self.hidden_layer = nn.Linear(PARTS**2 * narrow, hidden)
        self.out_layer = nn.Linear(hidden, resolution**3)

    def forward(self, tokens: Tensor, image: ImageTokens) -> Tensor:
        """[T, D] → logits [B, c, c, c]."""
        pooled = mean_by_part(self.token_layer(final_norm(tokens)), image)
        hidden = nn.functional.silu(self.hidden_layer(pooled.to(self.hidden_layer.weight.dtype)))
        return self.out_layer(hidden).unflatten(1, (self.resolution,) * 3)


class PrototypeHead(nn.Module):
    """Image latents → the occupancy of a coarse grid: the mean of learnt prototypes' logits, weighed by how alike the
    picture is to theirs.

    From some thousands of objects a network like :class:`CoarseHead` learns their pictures by heart. Looking up what is
    alike, with a learnt measure of likeness, errs far less on other objects (diff2to3.training.lookalikes).

    descriptor  [B, PARTS² C]: each part's mean latents, of unit length; 0 for an item without tokens
    keys        of unit length in use; values: of a low rank
    """

    #: Channels of keys and queries, and rank of the prototypes' grids.
    KEY_WIDTH, RANK = 128, 96

    def __init__(self, image_channels: int, num_prototypes: int, resolution: int) -> None:
        super().__init__()
        self.image_channels, self.resolution = image_channels, resolution
        self.query_layer = nn.Linear(PARTS**2 * image_channels, self.KEY_WIDTH)
        self.keys = nn.Parameter(torch.empty(num_prototypes, self.KEY_WIDTH))
        self.values = nn.Parameter(torch.empty(num_prototypes, self.RANK))
        self.log_sharpness = nn.Parameter(torch.empty(()))
        self.out_layer = nn.Linear(self.RANK, resolution**3)
        nn.init.normal_(self.keys)
        nn.init.normal_(self.values, std=0.1)
        nn.init.constant_(self.log_sharpness, 3.0)

    def descriptor(self, image: ImageTokens) -> Tensor:
        patches = image.feats.unflatten(1, (self.image_channels, -1)).mean(2)
        return nn.functional.normalize(mean_by_part(patches, image), dim=1)

    def forward(self, tokens: Tensor, image: ImageTokens) -> Tensor:
        """→ logits [B, c, c, c]. ``tokens``, what the tower makes of the image, is not looked at."""
        queries = self.query_layer(self.descriptor(image).to(self.query_layer.weight.dtype))
        queries, keys = (nn.functional.normalize(x.float(), dim=1) for x in (queries, self.keys))
        weights = (queries @ keys.T * self.log_sharpness.exp()).softmax(1)
        logits = self.out_layer((weights @ self.values.float()).to(self.out_layer.weight.dtype))
        return logits.unflatten(1, (self.resolution,) * 3)


def mean_by_part(tokens: Tensor, image: ImageTokens) -> Tensor:
    """[T, D] → [B, PARTS² D], float32 or better: means over each part of an item's pictures, 0 where nothing is."""
    rows, columns = (image.indices.long() * PARTS // image.grids.long()).unbind(1)
    lengths = image.cu_seqlens.diff().long()
    item = torch.repeat_interleave(torch.arange(image.batch_size, device=tokens.device), lengths)
    part = (item * PARTS + rows) * PARTS + columns
    sums = sum_by_item(tokens, part, image.batch_size * PARTS**2)
    counts = torch.bincount(part, minlength=len(sums)).clamp(min=1)
    return (sums / counts[:, None]).unflatten(0, (-1, PARTS**2)).flatten(1)
