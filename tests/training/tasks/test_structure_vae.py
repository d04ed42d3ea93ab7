"""The sparse-structure VAE's losses against loops in float64, its folded grids, and that it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diff2to3.checkpoint import load_strictly, read_bundle
from diff2to3.config import config_from_dict, load_config
from diff2to3.tensors import read_tensors
from diff2to3.training.task import Randomness, seeded
from diff2to3.training.tasks.structure_vae import (
    StructureLossConfig,
    StructureObjective,
    StructureVaeRunConfig,
    StructureVaeTask,
    reconstruction_scores,
    turned,
)
from diff2to3.vae.config import StructureConfig
from diff2to3.vae.posterior import Posterior
from diff2to3.vae.sparse_structure import (
    StructureDecoder,
    StructureEncoder,
    fold_cells,
    unfold_cells,
)
from diff2to3.vae.structure_loss import cross_entropy, dice_loss, intersection_over_union, kl_by_grid

ROOT = Path(__file__).resolve().parents[3]
ENCODER = StructureConfig(channels=[16, 32], num_res_blocks=1, num_middle_blocks=0, latent_channels=4, fold=2)
DECODER = StructureConfig(channels=[32, 16], num_res_blocks=1, num_middle_blocks=0, latent_channels=4, fold=2)


@dataclass(frozen=True)
class Grids:
    """The part of a batch that the objective reads."""

    ids: tuple[str, ...]
    occupancy: dict[int, Tensor]


def ball(resolution: int, radius: float, x: float = 0.0) -> Tensor:
    """A hollow ball, its centre moved by ``x`` along x: bool [R, R, R]."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, resolution)] * 3, indexing="ij")
    distance = ((axes[0] - x) ** 2 + axes[1] ** 2 + axes[2] ** 2).sqrt()
    return (distance - radius).abs() < 1.2 / resolution


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def small_objective(**loss: float) -> StructureObjective:
    with seeded(0):
        return StructureObjective(
            StructureEncoder(ENCODER), StructureDecoder(DECODER), StructureLossConfig(**loss), augment=False
        )


@given(seed=st.integers(0, 1000), batch=st.integers(1, 3), size=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_losses_are_their_sums_over_cells(seed: int, batch: int, size: int) -> None:
    logits = numbers((batch, 1, size, size, size), seed)
    grids = (numbers(tuple(logits.shape), seed + 1) > 1).double()
    dice, entropy = dice_loss(logits, grids), cross_entropy(logits, grids, 2.5)
    overlap = intersection_over_union(logits, grids)
    for b in range(batch):
        both = found = wanted = total = intersection = union = 0.0
        for value, y in zip(logits[b].flatten().tolist(), grids[b].flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-value))
            both, found, wanted = both + p * y, found + p, wanted + y
            total -= 2.5 * y * math.log(p) + (1 - y) * math.log(1 - p)
            intersection += value > 0 and y == 1
            union += value > 0 or y == 1
        assert float(dice[b]) == pytest.approx(1 - (2 * both + 1) / (found + wanted + 1), rel=1e-5, abs=1e-6)
        assert float(entropy[b]) == pytest.approx(total / size**3, rel=1e-5, abs=1e-6)
        assert float(overlap[b]) == pytest.approx(intersection / union if union else 1)


def test_gradient_of_the_dice_loss() -> None:
    """Against central differences of the loss written out in float64."""
    logits, grids = numbers((1, 30), 0), (numbers((1, 30), 1) > 0).double()

    def loss(x: Tensor) -> float:
        p = 1 / (1 + (-x).exp())
        return float(1 - (2 * (p * grids).sum() + 1) / (p.sum() + grids.sum() + 1))

    x = logits.clone().requires_grad_()
    dice_loss(x, grids).sum().backward()
    assert x.grad is not None
    for i in range(30):
        step = torch.zeros_like(logits)
        step[0, i] = 1e-5
        want = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert float(x.grad[0, i]) == pytest.approx(want, rel=1e-3, abs=1e-7)


def test_kl_is_that_of_two_normal_distributions() -> None:
    posterior = Posterior(numbers((2, 3, 2, 2, 2), 0).float(), numbers((2, 3, 2, 2, 2), 1).float() / 3)
    made = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    want = torch.distributions.kl_divergence(made, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_by_grid(posterior), want.flatten(1).mean(1))


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_folding_moves_cells_and_nothing_else(fold: int) -> None:
    x = torch.arange(2 * 2 * 6**3).reshape(2, 2, 6, 6, 6)
    folded = fold_cells(x, fold)
    for c, i, j, k in ((0, 0, 0, 0), (1, fold - 1, 0, fold // 2), (0, 0, fold - 1, fold - 1)):
        channel = ((c * fold + i) * fold + j) * fold + k
        assert torch.equal(folded[:, channel], x[:, c, i::fold, j::fold, k::fold])
    assert torch.equal(unfold_cells(folded, fold), x)


def test_grids_that_do_not_fold_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        fold_cells(torch.zeros(1, 1, 4, 4, 5), 2)


def test_the_eight_turns_are_the_symmetries_of_a_square_about_z() -> None:
    grid = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(0))
    made = [turned(grid, k) for k in range(8)]
    want = [torch.rot90(g, n, (0, 1)) for g in (grid, grid.flip(0)) for n in range(4)]
    assert all(any(torch.equal(a, b) for b in want) for a in made)
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])


def test_an_item_s_loss_does_not_depend_on_its_neighbours() -> None:
    objective = small_objective(cross_entropy=1.0)
    objective.augment = True
    grids = torch.stack([ball(16, 0.6), ball(16, 0.4, 0.3)])
    together = objective(Grids(("a", "b"), {16: grids}), Randomness(0, 3))
    alone = objective(Grids(("b",), {16: grids[1:]}), Randomness(0, 3))
    for name, values in together.items():
        torch.testing.assert_close(values[1:], alone[name], rtol=1e-4, atol=1e-6)
    later = objective(Grids(("b",), {16: grids[1:]}), Randomness(0, 4))
    assert not torch.equal(later["loss"], alone["loss"])


def test_it_learns_two_grids_by_heart() -> None:
    objective = small_objective(cross_entropy=1.0, positive_weight=2.0)
    grids = torch.stack([ball(8, 0.7), ball(8, 0.4, 0.3)])
    before = reconstruction_scores(objective, iter([grids[:, None].float()]))["iou"]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for step in range(80):
        optimizer.zero_grad()
        objective(Grids(("a", "b"), {8: grids}), Randomness(0, step))["loss"].mean().backward()
        optimizer.step()
    after = reconstruction_scores(objective, iter([grids[:, None].float()]))
    assert before < 0.5
    assert min(after["iou"], after["iou_noisy"]) > 0.95


@pytest.mark.parametrize("name", ["mini", "large"])
def test_shipped_configurations_build(name: str) -> None:
    config = load_config(StructureVaeRunConfig, ROOT / f"configs/structure_vae/{name}.yaml")
    with torch.device("meta"):
        objective = StructureVaeTask(config).objective()
        r = config.data.resolution
        posterior = objective.encoder(torch.zeros(1, 1, r, r, r))
        assert posterior.mean.shape == (1, 8, r // 4, r // 4, r // 4)
        assert objective.decoder(posterior.mean).shape == (1, 1, r, r, r)
    assert sum(p.numel() for p in objective.parameters()) < {"mini": 0.8e6, "large": 140e6}[name]


def test_halves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="enlarges by 8"):
        StructureVaeRunConfig(
            encoder=StructureConfig(channels=[8, 8]), decoder=StructureConfig(channels=[8] * 4)
        )


def test_the_bundle_s_vae_brings_back_a_shape_it_never_saw() -> None:
    folder = ROOT / "diff2to3/bundles/mini"
    info = read_bundle(folder)
    halves = {}
    for name, kind in (("structure_encoder", StructureEncoder), ("structure_decoder", StructureDecoder)):
        entry = info.networks[name]
        halves[name] = kind(config_from_dict(StructureConfig, entry.config))
        load_strictly(halves[name], read_tensors(folder / entry.file), entry.file)
    grid = ball(32, 0.7)[None, None].float()
    with torch.no_grad():
        mean = halves["structure_encoder"](grid).mean
        found = halves["structure_decoder"](mean)
    assert float(intersection_over_union(found, grid)) > 0.9
    stored = info.settings["structure_latents"]
    assert len(stored["mean"]) == len(stored["std"]) == mean.shape[1]
    assert all(value > 0.1 for value in stored["std"])
