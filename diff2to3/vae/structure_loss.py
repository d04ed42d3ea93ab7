"""What the sparse-structure VAE is trained with, and what it is judged by: numbers a grid (TRELLIS, section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.vae.posterior import Posterior


def dice_loss(logits: Tensor, occupancy: Tensor) -> Tensor:
    """1 - 2 Σpy / (Σp + Σy), smoothed by one cell, with p = sigmoid(logits): [B, …] and [B, …] in {0, 1} → [B]."""
    p, y = logits.float().sigmoid().flatten(1), occupancy.float().flatten(1)
    return 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)


def cross_entropy(logits: Tensor, occupancy: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Mean binary cross-entropy of [B, …] in which active cells weigh ``positive_weight``: [B]."""
    weight = torch.tensor(positive_weight, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), occupancy.float(), pos_weight=weight, reduction="none"
    )
    return losses.flatten(1).mean(1)


def kl_by_grid(posterior: Posterior) -> Tensor:
    """KL divergence to N(0, 1), mean over each grid's elements: [B]."""
    return Posterior(posterior.mean.float(), posterior.logvar.float()).kl_terms().flatten(1).mean(1)


def intersection_over_union(logits: Tensor, occupancy: Tensor, threshold: float = 0.0) -> Tensor:
    """Cells that are active in both over cells active in either: [B]; 1 where both are empty."""
    found, wanted = (logits > threshold).flatten(1), occupancy.bool().flatten(1)
    either = (found | wanted).sum(1)
    return torch.where(either > 0, (found & wanted).sum(1) / either.clamp(min=1), 1.0)
