"""Look-alikes: weights against sums by hand, learning on made-up families, and the program up to training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flow_runs import VIEWS, arguments, task_for
from safetensors.torch import load_file

from diff2to3.checkpoint import read_bundle
from diff2to3.config import load_config
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.flow.image_tower import PARTS, PrototypeHead
from diff2to3.flow.networks import build_network
from diff2to3.flow.normalization import Normalization
from diff2to3.flow.tokens import ImageTokens
from diff2to3.hub import EMBEDDED
from diff2to3.training.lookalikes import (
    Memory,
    Metric,
    begin_prototypes,
    expected_occupancy,
    families,
    learn_metric,
    look_alikes,
)
from diff2to3.training.run import main as train
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.flow import FlowRunConfig, flow_task
from diff2to3.training.tasks.flow_objective import BatchStages, FlowObjective, latent_member, view_member
from diff2to3.training.tasks.flow_pictures import Judge
from diff2to3.training.tasks.lookalikes import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]


def made_up(num_kinds=4, families_a_kind=5, views=3, noise=0.3):
    """Assets of a few kinds, told apart by few of many dimensions; every other asset has a mirror image."""
    g = torch.Generator().manual_seed(0)
    grids = torch.rand(num_kinds, 8, 8, 8, generator=g) < 0.3
    signs = torch.randn(num_kinds, 4, generator=g)
    rows, owner, family, occupancy = [], [], [], []
    for number in range(num_kinds * families_a_kind):
        kind = number % num_kinds
        for _ in range(1 + number % 2):
            occupancy.append(grids[kind] ^ (torch.rand(8, 8, 8, generator=g) < 0.03))
            family.append(number)
            for _ in range(views):
                rows.append(
                    torch.cat(
                        [signs[kind] + noise * torch.randn(4, generator=g), torch.randn(28, generator=g)]
                    )
                )
                owner.append(len(occupancy) - 1)
    x = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    return Memory(x, torch.tensor(owner), torch.tensor(family), torch.stack(occupancy))


def plain_metric(memory, sharpness=3.0):
    g = torch.Generator().manual_seed(1)
    size = (6, memory.descriptors.shape[1])
    return Metric(torch.randn(size, generator=g), torch.randn(6, generator=g), torch.tensor(sharpness).log())


def by_hand(memory, metric, view):
    """Weights of all assets for a view, summed view by view in float64."""
    keys = memory.descriptors.double() @ metric.weight.double().T + metric.bias.double()
    keys = keys / keys.norm(dim=1, keepdim=True)
    weights = torch.zeros(len(memory.family), dtype=torch.float64)
    for other in range(len(keys)):
        asset = memory.owner[other]
        if memory.family[asset] != memory.family[memory.owner[view]]:
            weights[asset] += (metric.log_sharpness.double().exp() * (keys[view] @ keys[other])).exp()
    return weights / weights.sum()


def test_look_alikes_are_of_other_families_and_weighed_by_likeness():
    memory = made_up()
    metric = plain_metric(memory)
    assets, weights = look_alikes(memory, metric, chunk=7)
    for view in (0, 5, len(memory.owner) - 1):
        row = torch.zeros(len(memory.family)).scatter(0, assets[view], weights[view])
        torch.testing.assert_close(row.double(), by_hand(memory, metric, view), rtol=1e-4, atol=1e-6)
    rows = torch.tensor([2, 9])
    owner = memory.owner[rows]
    made = expected_occupancy(memory, assets[rows], weights[rows], owner, 0.25)
    for k, view in enumerate(rows.tolist()):
        others = torch.einsum("a,axyz->xyz", by_hand(memory, metric, view), memory.occupancy.double())
        wanted = 0.75 * others + 0.25 * memory.occupancy[owner[k]].double()
        torch.testing.assert_close(made[k].double(), wanted, rtol=0, atol=1e-5)


def test_the_likeness_that_is_learnt_finds_what_tells_of_the_shape():
    memory = made_up()
    kinds = memory.family % 4

    def share_of_own_kind(metric):
        assets, weights = look_alikes(memory, metric)
        return float((weights * (kinds[assets] == kinds[memory.owner][:, None])).sum(1).mean())

    steps = list(learn_metric(memory, 4, 80, seed=0, batch=32, others=60, lr=2e-2))
    assert steps[-1][1] < steps[0][1] - 0.05
    assert share_of_own_kind(steps[-1][2]) > 0.8 > 0.6 > share_of_own_kind(steps[0][2])
    again = list(learn_metric(memory, 4, 3, seed=0, batch=32, others=60))
    assert torch.equal(
        again[2][2].weight, list(learn_metric(memory, 4, 3, seed=0, batch=32, others=60))[2][2].weight
    )


def test_families_are_told_by_the_ids():
    assert families(["a", "b~mirrored", "a~variant1", "b"]).tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="two families"):
        Memory(torch.ones(2, 3), torch.tensor([0, 1]), torch.zeros(2).long(), torch.zeros(2, 4, 4, 4).bool())


def test_the_prototype_head_looks_up_by_likeness_of_the_parts():
    """By hand in float64, with gradients; the order of tokens does not matter, nor what else is in the batch."""
    g = torch.Generator().manual_seed(0)
    head = PrototypeHead(3, 7, 2).double()
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    latents = torch.randn(2, 3, 16, 8, generator=g, dtype=torch.float64)
    image = ImageTokens.from_latents(latents, 2)
    made = head(torch.zeros(len(image.feats), 5), image)
    x = torch.stack(
        [
            latents[:, :, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2].mean((2, 3))
            for i in range(PARTS)
            for j in range(PARTS)
        ],
        1,
    ).flatten(1)
    x = x / x.norm(dim=1, keepdim=True)
    q = x @ head.query_layer.weight.T + head.query_layer.bias
    cosine = (q / q.norm(dim=1, keepdim=True)) @ (head.keys / head.keys.norm(dim=1, keepdim=True)).T
    weights = (cosine * head.log_sharpness.exp()).exp()
    weights = weights / weights.sum(1, keepdim=True)
    wanted = weights @ head.values @ head.out_layer.weight.T + head.out_layer.bias
    torch.testing.assert_close(made.flatten(1), wanted, rtol=1e-5, atol=1e-5)
    parameters = list(head.parameters())
    pull = torch.randn(made.shape, generator=g, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((made * pull).sum(), parameters),
        torch.autograd.grad((wanted.view_as(pull) * pull).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert bool(head(torch.zeros(0, 5), ImageTokens.none(1, 12)).isfinite().all())


def test_prototypes_begin_as_the_look_alikes_of_training_views():
    memory = made_up()
    metric = list(learn_metric(memory, 4, 60, seed=0, batch=32, others=60, lr=2e-2))[-1][2]
    assets, weights = look_alikes(memory, metric)
    head = PrototypeHead(2, len(memory.owner), 8)
    begin_prototypes(head, memory, metric, assets, weights, 0.2, seed=0)
    keys = metric.keys(memory.descriptors)
    weights_of = (keys @ head.keys.T * head.log_sharpness.exp()).softmax(1)
    logits = head.out_layer(weights_of @ head.values)
    grids = memory.coarse(8)[memory.owner]
    agree = ((logits > 0) == grids.bool()).float().mean()
    assert float(agree) > 0.85 > float((grids == grids.mean(0).round()).float().mean())


PROTOTYPES = {
    "data.expected": "expected_y", "data.tokens": "tokens_y", "model.image_channels": 2, "model.absolute": True,
    "model.coarse_resolution": 4, "model.coarse_prototypes": 5, "loss.coarse": 0.5, "loss.velocity": 0,
    "loss.cross_entropy": 2.0, "loss.image_dropout": 0,
}  # fmt: skip


def test_from_the_program_to_a_run(dataset, structure_bundle, tmp_path, capsys):
    """What it writes is what the library says, of the same view that the loader takes; and training begins with it."""
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    changes = {**PROTOTYPES, "data.bundle": structure_bundle[0]}
    argv = [str(config), *arguments(dataset, "structure", tmp_path / "begin", **changes)]
    assert main([*argv, "--steps", "5", "--own-share", "0.5"]) == 0
    store = AssetStore(dataset, ["expected_y", "tokens_y", "voxels_8"])
    assets = store.assets("train")
    for asset in assets:
        own = store.open(asset, "voxels_8").coords().long()
        for view in range(VIEWS):
            grid = store.open(asset, "expected_y").tensors(f"{view:03d}.safetensors")["occupancy"]
            assert int(grid[own[:, 0], own[:, 1], own[:, 2]].min()) >= 127
            assert grid.shape == (8, 8, 8) and int(grid.float().sum()) > 127 * len(own)
    assert json.loads((dataset / "expected_y" / "settings.json").read_text()) == {}

    task = task_for(dataset, "structure", **changes)
    objective = task.objective()
    batch = next(iter(task.loader(0, 0, 1)))
    for k, name in enumerate(batch.ids):
        (asset,) = (a for a in assets if a.id == name)
        seen = batch.tensors["tokens_y/*.safetensors"][k]["latents"]
        views = [
            store.open(asset, "tokens_y").tensors(f"{v:03d}.safetensors")["latents"] for v in range(VIEWS)
        ]
        (view,) = (v for v, latents in enumerate(views) if torch.equal(latents, seen))
        wanted = store.open(asset, "expected_y").tensors(f"{view:03d}.safetensors")["occupancy"]
        assert torch.equal(objective.occupancy(batch)[k], wanted.float() / 255)
    out = objective(batch, Randomness(3, 4))
    assert set(out) == {"loss", "velocity", "cross_entropy", "coarse"}
    torch.testing.assert_close(out["loss"], 2 * out["cross_entropy"] + 0.5 * out["coarse"])

    alone = task_for(dataset, "structure", **changes, **{"loss.coarse_only": True}).objective()
    trained = {name.split(".")[1] for name, p in alone.named_parameters() if p.requires_grad}
    assert trained == {"coarse_head"}
    run = [str(config), *arguments(dataset, "structure", tmp_path / "run", **changes)]
    run += [
        "loss.coarse_only=true",
        f"train.init_from={tmp_path / 'begin'}",
        "train.lr=1e-9",
        "train.steps=1",
    ]
    assert train(flow_task, FlowRunConfig, run) == 0
    begun, after = (
        load_file(tmp_path / folder / "structure_flow.safetensors")["coarse_head.keys"]
        for folder in ("begin", "run/bundle")
    )
    torch.testing.assert_close(begun, after)
    assert read_bundle(tmp_path / "begin").networks["structure_flow"].config["coarse_prototypes"] == 5

    bad = [
        str(config),
        *arguments(dataset, "structure", tmp_path / "x", **{**changes, "data.expected": "null"}),
    ]
    assert main(bad) == 2
    assert "needs data.expected and model.coarse_prototypes" in capsys.readouterr().err


def test_the_mini_configuration_starts_from_new_weights():
    """At first the predicted latents decode to an empty grid, where the dice loss hardly has a gradient: with it alone
    nothing was learnt in a hundred steps.
    """
    config = load_config(FlowRunConfig, ROOT / "configs" / "flow" / "structure_mini.yaml", [])
    data, count, channels = config.data, 2, config.model.channels
    generator = torch.Generator().manual_seed(0)
    settings = read_bundle(EMBEDDED / "mini").settings["structure_latents"]
    torch.manual_seed(0)
    objective = FlowObjective(
        build_network(config.model),
        config.loss,
        Normalization(settings),
        Normalization(
            {"mean": [0.0] * config.model.image_channels, "std": [1.0] * config.model.image_channels}
        ),
        BatchStages(data.latents, data.tokens, data.expected),
        config.model.resolution,
        config.model.image_patch_size,
        decoder=Judge(str(EMBEDDED / "mini"), "structure").decoder,
    )
    grids = torch.zeros(count, 32, 32, 32, dtype=torch.uint8)
    for k, grid in enumerate(grids):
        grid[4:28, 4 + 8 * k : 28, 8 : 12 + 8 * k] = 200  # as sure as look-alikes are
    tensors = {
        latent_member(data.latents): [{"mean": torch.zeros(channels, 8, 8, 8)}] * count,
        view_member(data.tokens): [{"latents": torch.randn(112, 8, 8, generator=generator)} for _ in grids],
        view_member(data.expected): [{"occupancy": grid} for grid in grids],
    }
    batch = SimpleNamespace(ids=[str(k) for k in range(count)], tensors=tensors)
    optimizer = torch.optim.AdamW(objective.network.parameters(), lr=config.train.lr)
    dice = []
    for step in range(30):
        terms = objective(batch, Randomness(0, step))
        dice.append(terms["dice"].mean().item())
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    assert dice[0] > 0.99 and dice[-1] < 0.8, dice
