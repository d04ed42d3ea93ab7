"""What a picture tells of an object that was not trained on: the mean occupancy of training assets that look alike.

    image latents of all training views ─descriptor, linear, unit length─▶ queries = keys
    softmax of their likeness, a view's own family left out ─▶ weights of assets ─▶ mean occupancy of these

A network that is taught the true occupancy of a few thousand assets learns their pictures by heart: on them it is sure
of itself, and on others wrong. The mean over look-alikes is as unsure on assets that were trained on as on others. The
linear map is learnt so that this mean, each family left out, is as near the truth as it can be (as in neighbourhood
components analysis, Goldberger et al. 2004, with occupancy in place of classes). Not in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.flow.image_tower import PrototypeHead
from diff2to3.vae.sparse_structure import coarsened

#: Probabilities are kept this far from 0 and 1 in logarithms.
MARGIN = 1e-4
#: How many look-alikes a view keeps.
NUM_KEPT = 96


@dataclass(frozen=True)
class Memory:
    """All training views.

    descriptors  [V, D], of unit length (PrototypeHead.descriptor)
    owner        int64 [V]: the asset of each view
    family       int64 [A]: assets made of one another share a number (an asset, its mirror image, its variants)
    occupancy    bool [A, R, R, R]
    """

    descriptors: Tensor
    owner: Tensor
    family: Tensor
    occupancy: Tensor

    def __post_init__(self) -> None:
        if len(self.family.unique()) < 2:
            raise InputError("look-alikes: need assets of at least two families")

    def coarse(self, resolution: int) -> Tensor:
        """float32 [A, c³]: 1 where any of a coarse cell's cells is active."""
        return coarsened(self.occupancy, resolution).flatten(1)


def families(ids: Sequence[str]) -> Tensor:
    """Of asset ids: what is before the first ``~`` is the same in a family."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name.partition("~")[0], len(numbers)) for name in ids])


@dataclass(frozen=True)
class Metric:
    """Likeness of two descriptors: sharpness · cos of their images under x ↦ W x + b. weight [K, D], bias [K]."""

    weight: Tensor
    bias: Tensor
    log_sharpness: Tensor

    def keys(self, descriptors: Tensor) -> Tensor:
        return F.normalize(F.linear(descriptors, self.weight, self.bias), dim=1)

    def likeness(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries @ keys.T * self.log_sharpness.exp()


def asset_weights(likeness: Tensor, owner: Tensor, banned: Tensor, count: int) -> Tensor:
    """Likeness [B, V] to views that belong to assets ``owner`` [V] → weights [B, count] of assets; nothing of the views
    ``banned`` (bool [B, V]).
    """
    weights = likeness.masked_fill(banned, -torch.inf).softmax(1)
    return weights.new_zeros(len(weights), count).index_add(1, owner, weights)


def learn_metric(
    memory: Memory,
    resolution: int,
    steps: int,
    seed: int,
    batch: int = 192,
    others: int = 9000,
    lr: float = 2e-3,
) -> Iterator[tuple[int, float, Metric]]:
    """Gradient descent on the cross-entropy (and a little dice loss) of the mean over look-alikes on a coarse grid.
    Yields (step, running loss, metric) after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    x, grids = memory.descriptors, memory.coarse(resolution)
    width = PrototypeHead.KEY_WIDTH
    center = x.mean(0)
    some = x[torch.randperm(len(x), generator=generator)[:5000]] - center
    axes = torch.linalg.svd(some, full_matrices=False).Vh[:width]
    weight = F.pad(axes, (0, 0, 0, width - len(axes))).clone().requires_grad_()
    bias = (-weight.detach() @ center).requires_grad_()
    log_sharpness = torch.tensor(4.0, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [weight, bias], "lr": lr}, {"params": [log_sharpness], "lr": 0.02}]
    )
    running = 0.0
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / (steps + 1)))
        rows = torch.randint(0, len(x), (batch,), generator=generator)
        columns = torch.randperm(len(x), generator=generator)[:others]
        metric = Metric(weight, bias, log_sharpness)
        own = memory.owner[rows]
        banned = memory.family[own][:, None] == memory.family[memory.owner[columns]][None]
        likeness = metric.likeness(metric.keys(x[rows]), metric.keys(x[columns]))
        weights = asset_weights(likeness, memory.owner[columns], banned, len(grids))
        p, y = (weights @ grids).clamp(MARGIN, 1 - MARGIN), grids[own]
        dice = 1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum(1))
        loss = F.binary_cross_entropy(p, y) + 0.1 * dice.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        yield step, running, Metric(*(v.detach().clone() for v in (weight, bias, log_sharpness)))


def look_alikes(memory: Memory, metric: Metric, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """For every view the assets that look most like it, none of its own family: int64 and float32 [V, k], the weights
    of each view adding up to 1.
    """
    keys, count = metric.keys(memory.descriptors), len(memory.family)
    of_view = memory.family[memory.owner]
    found = []
    for rows in torch.arange(len(keys)).split(chunk):
        likeness = metric.likeness(keys[rows], keys)
        weights = asset_weights(likeness, memory.owner, of_view[rows][:, None] == of_view[None], count)
        found.append(weights.topk(min(NUM_KEPT, count), dim=1))
    weights, assets = (torch.cat([getattr(f, name) for f in found]) for name in ("values", "indices"))
    return assets, weights / weights.sum(1, keepdim=True)


def expected_occupancy(
    memory: Memory, assets: Tensor, weights: Tensor, owner: Tensor, own_share: float
) -> Tensor:
    """float32 [B, R, R, R] from rows of :func:`look_alikes`, to the share ``own_share`` the truth of ``owner`` [B]."""
    mixed = expected(memory.occupancy.flatten(1), assets, weights, owner, own_share)
    return mixed.unflatten(1, memory.occupancy.shape[1:])


def expected(grids: Tensor, assets: Tensor, weights: Tensor, owner: Tensor, own_share: float) -> Tensor:
    """The same of any grids [A, N] of the assets: float32 [B, N]."""
    used, place = torch.cat([assets, owner[:, None]], 1).unique(return_inverse=True)
    shares = torch.cat([(1 - own_share) * weights, torch.full_like(weights[:, :1], own_share)], 1)
    mixed = weights.new_zeros(len(weights), len(used)).scatter_add_(1, place, shares)
    return mixed @ grids[used].float()


@torch.no_grad()
def begin_prototypes(
    head: PrototypeHead,
    memory: Memory,
    metric: Metric,
    assets: Tensor,
    weights: Tensor,
    own_share: float,
    seed: int,
) -> None:
    """Set a head to look up random training views, their expected coarse grids' logits at its rank."""
    generator = torch.Generator().manual_seed(seed)
    count = len(head.keys)
    rows = torch.randperm(len(memory.descriptors), generator=generator)
    rows = rows.repeat(-(-count // len(rows)))[:count]
    grids = memory.coarse(head.resolution)
    expectations = expected(grids, assets[rows], weights[rows], memory.owner[rows], own_share)
    logits = expectations.clamp(0.003, 0.997).logit()
    mean = logits.mean(0)
    rank = min(head.RANK, logits.shape[1])
    covariance = (logits - mean).T @ (logits - mean)
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -rank:]  # the largest come last
    values = (logits - mean) @ axes
    scale = values.std().clamp(min=1e-6)  # so that values and axes are learnt at like rates
    head.values.zero_()
    head.values[:, :rank] = values / scale
    head.out_layer.weight.zero_()
    head.out_layer.weight[:, :rank] = axes * scale
    head.out_layer.bias.copy_(mean)
    head.query_layer.weight.copy_(metric.weight)
    head.query_layer.bias.copy_(metric.bias)
    head.keys.copy_(metric.keys(memory.descriptors[rows]))
    head.log_sharpness.copy_(metric.log_sharpness)
