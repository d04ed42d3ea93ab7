"""The flow task on a small synthetic dataset: what it reads, its loss by hand, determinism, training, bundles."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from flow_runs import arguments, task_for

from diff2to3.checkpoint import load_strictly, read_bundle
from diff2to3.config import config_from_dict, load_config
from diff2to3.flow.networks import NETWORKS
from diff2to3.flow.tokens import ImageTokens
from diff2to3.gaussians.render import render
from diff2to3.metrics.image import ssim
from diff2to3.tensors import read_tensors
from diff2to3.training.run import main
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.flow import FlowRunConfig, FlowTask
from diff2to3.types import SparseVoxels

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs" / "flow").glob("*.yaml"))


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_the_objective_is_the_formula_on_normalised_latents(stage, dataset):
    """Loss of every item from its own stored numbers, noise and time, one item at a time."""
    task = task_for(dataset, stage, **{"loss.image_dropout": 0.4})
    torch.manual_seed(0)
    objective = task.objective()
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    batch = next(iter(task.loader(0, 0, 1)))
    randomness = Randomness(3, 5)
    losses = objective(batch, randomness)["loss"]
    assert losses.shape == (3,)
    latent_name, token_name = task.tensor_names()[:2]
    mean, std = objective.latents.mean, objective.latents.std
    for i, asset in enumerate(batch.ids):
        stored = batch.tensors[latent_name][i]["mean"]
        generator = randomness.generator(asset, "flow")
        t = torch.rand(1, generator=generator)
        dropped = bool(torch.rand(1, generator=generator) < 0.4)
        noise = torch.randn(stored.shape, generator=generator)
        latents = batch.tensors[token_name][i]["latents"]
        latents = (latents - objective.image.mean[:, None, None]) / objective.image.std[:, None, None]
        image = ImageTokens.none(1, 12) if dropped else ImageTokens.from_latents(latents[None], 2)
        if stage == "structure":
            data = (stored - mean[:, None, None, None]) / std[:, None, None, None]
            z = ((1 - t) * data + t * noise)[None]
        else:
            data = (stored - mean) / std
            coords = batch.tensors[task.tensor_names()[2]][i]["coords"]
            packed = torch.nn.functional.pad(coords.int(), (1, 0))
            z = SparseVoxels.from_coords(packed, (1 - t) * data + t * noise, 8)
        velocity = objective.network(z, t, image)
        velocity = velocity[0] if stage == "structure" else velocity
        expected = (velocity - (noise - data)).square().mean()
        assert float(losses[i]) == pytest.approx(float(expected), rel=1e-4)


def test_the_dice_loss_is_that_of_what_one_step_to_the_data_decodes_to(dataset, structure_bundle):
    """By hand, in float64, with gradients of the network's last layer by finite differences."""
    folder, decoder = structure_bundle
    changes = {"loss.dice": 0.7, "loss.image_dropout": 0.4, "data.bundle": folder}
    task = task_for(dataset, "structure", **changes)
    torch.manual_seed(0)
    objective = task.objective().double()
    assert not any("decoder" in name for name in objective.state_dict())
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    batch = next(iter(task.loader(0, 0, 1)))
    (wanted,) = batch.occupancy.values()
    assert wanted.shape == (3, 8, 8, 8)
    out = objective(batch, Randomness(3, 4))
    dropped = 0
    for i, asset in enumerate(batch.ids):
        stored = batch.tensors["structures_x/latents.safetensors"][i]["mean"].double()
        generator = Randomness(3, 4).generator(asset, "flow")
        t = torch.rand(1, generator=generator)
        without = bool(torch.rand(1, generator=generator) < 0.4)
        dropped += without
        noise = torch.randn(stored.shape, generator=generator)
        mean, std = (x[:, None, None, None] for x in (objective.latents.mean, objective.latents.std))
        data = (stored - mean) / std
        image = objective.image(batch.tensors["tokens_x/*.safetensors"][i]["latents"][None].double())
        tokens = (
            ImageTokens.none(1, 12).to(dtype=torch.float64) if without else ImageTokens.from_latents(image, 2)
        )
        z = (1 - t) * data + t * noise
        velocity = objective.network(z[None], t, tokens)[0]
        logits = decoder.double()(((z - t * velocity) * std + mean)[None])[0, 0]
        p, y = torch.sigmoid(logits), wanted[i].double()
        dice = 0.0 if without else float(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
        error = float((velocity - (noise - data)).square().mean())
        assert float(out["dice"][i]) == pytest.approx(dice, rel=1e-4)
        assert float(out["velocity"][i]) == pytest.approx(error, rel=1e-4)
        assert float(out["loss"][i]) == pytest.approx(error + 0.7 * dice, rel=1e-4)
    assert 0 < dropped < 3  # both cases were seen

    weight = objective.network.out_layer.weight
    (gradient,) = torch.autograd.grad(out["dice"].sum(), weight)
    assert not any(p.requires_grad for p in task.judge.decoder.parameters())
    direction, step = torch.randn(weight.shape, dtype=torch.float64), 1e-3
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            values.append(float(objective(batch, Randomness(3, 4))["dice"].double().sum()))
            weight.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02)  # dice is summed in float32


@pytest.mark.parametrize(
    ("stage", "changes"), [("structure", {"loss.dice": 1}), ("latents", {"loss.dice": 1, "data.bundle": "x"})]
)
def test_the_dice_loss_needs_structure_latents_and_their_decoder(stage, changes, dataset):
    with pytest.raises(ValueError, match=r"loss\.dice"):
        task_for(dataset, stage, **changes)


def test_the_render_loss_is_of_what_one_step_to_the_data_looks_like(dataset, decoder_bundle):
    """By hand, an item at a time, with another SSIM; and its gradient (decoder and rasterizer have their own tests)."""
    folder, decoder = decoder_bundle
    changes = {
        "loss.render.weight": 0.7, "loss.render.l2": 3.0, "loss.image_dropout": 0.4, "data.bundle": folder,
        "data.loader.views": "{target: 1}",
    }  # fmt: skip
    task = task_for(dataset, "latents", **changes)
    torch.manual_seed(0)
    objective = task.objective()
    assert not any("decoder" in name for name in objective.state_dict())
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    batch = next(iter(task.loader(0, 0, 1)))
    out = objective(batch, Randomness(3, 4))
    dropped, by_hand = 0, []
    for i, asset in enumerate(batch.ids):
        generator = Randomness(3, 4).generator(asset, "flow")
        t = torch.rand(1, generator=generator)
        without = bool(torch.rand(1, generator=generator) < 0.4)
        dropped += without
        stored = batch.tensors["latents_x/latents.safetensors"][i]["mean"]
        noise = torch.randn(stored.shape, generator=generator)
        data = (stored - objective.latents.mean) / objective.latents.std
        z = (1 - t) * data + t * noise
        image = objective.image(batch.tensors["tokens_x/*.safetensors"][i]["latents"][None])
        tokens = ImageTokens.none(1, 12) if without else ImageTokens.from_latents(image, 2)
        coords = batch.tensors["voxels_8/coords.safetensors"][i]["coords"].int()
        voxels = SparseVoxels.from_coords(torch.nn.functional.pad(coords, (1, 0)), z, 8)
        velocity = objective.network(voxels, t, tokens)
        made = (z - t * velocity) * objective.latents.std + objective.latents.mean
        (gaussians,) = decoder(voxels.with_feats(made))
        color = torch.rand(3, generator=Randomness(3, 4).generator(asset, "background"))
        view = batch.views["target"].select([i])
        drawn = render(gaussians, view.viewmats, view.Ks, 24, 24, background=color).colors
        error = drawn - view.images
        assert (
            0.02 < float(error.abs().mean()) and float((drawn - color).abs().max()) > 0.1
        )  # something is drawn
        expected = (
            error.abs().mean() + 3 * error.square().mean() + 0.2 * (1 - ssim(drawn, view.images).mean())
        )
        by_hand.append(expected.float() * (not without))
        assert float(out["render"][i]) == pytest.approx(float(by_hand[-1]), rel=1e-3)
    assert 0 < dropped < 3  # both cases were seen
    torch.testing.assert_close(out["loss"], out["velocity"] + 0.7 * out["render"])
    weight = objective.network.out_layer.weight
    (gradient,) = torch.autograd.grad(out["render"].sum(), weight)
    (wanted,) = torch.autograd.grad(sum(by_hand), weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("structure", {"data.bundle": "x", "data.loader.views": "{target: 1}"}),
        ("latents", {"data.loader.views": "{target: 1}"}),
        ("latents", {"data.bundle": "x"}),
        ("latents", {"data.bundle": "x", "data.loader.views": "{target: 1}", "loss.render.l1": -1}),
    ],
)
def test_the_render_loss_needs_latents_their_decoder_and_views(stage, changes, dataset):
    with pytest.raises(ValueError, match=r"render"):
        task_for(dataset, stage, **changes, **{"loss.render.weight": 1})


def test_statistics_are_of_the_training_split(dataset):
    task = task_for(dataset, "latents")
    objective = task.objective()
    from diff2to3.data.store import AssetStore

    store = AssetStore(dataset, ["latents_x"])
    assets = store.assets("train")
    assert len(assets) == 5
    rows = torch.cat([store.open(a, "latents_x").tensors("latents.safetensors")["mean"] for a in assets])
    torch.testing.assert_close(objective.latents.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.latents.std, rows.std(0, unbiased=False), rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(objective.latents.invert(objective.latents(x)), x, rtol=1e-5, atol=1e-5)


def test_views_vary_between_epochs_and_repeat_with_the_seed(dataset):
    def drawn(seed):
        loader = iter(task_for(dataset, "structure").loader(seed, 0, 1))
        seen = []
        for _ in range(8):
            batch = next(loader)
            seen += [
                (i, hashlib.sha256(t["latents"].numpy().tobytes()).hexdigest())
                for i, t in zip(batch.ids, batch.tensors["tokens_x/*.safetensors"], strict=True)
            ]
        return seen

    first = drawn(0)
    assert first == drawn(0) and first != drawn(1)
    views = {asset: {h for a, h in first if a == asset} for asset, _ in first}
    assert all(len(v) > 1 for v in views.values())


def test_a_loss_does_not_depend_on_how_items_are_dealt(dataset):
    """One process of three items, or three of one each: the same losses."""
    torch.manual_seed(0)
    task = task_for(dataset, "latents")
    objective = task.objective()
    torch.nn.init.normal_(objective.network.out_layer.weight)
    batch = next(iter(task.loader(0, 0, 1)))
    together = objective(batch, Randomness(0, 0))["loss"]
    import dataclasses

    for i in range(3):
        one = dataclasses.replace(
            batch, ids=batch.ids[i : i + 1], tensors={k: v[i : i + 1] for k, v in batch.tensors.items()}
        )
        torch.testing.assert_close(
            objective(one, Randomness(0, 0))["loss"][0], together[i], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_a_run_trains_validates_and_exports(stage, dataset, tmp_path):
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    options = {"train.steps": 60, "train.validate_every": 60, "train.ema": 0.9, "train.lr": 0.01}
    options |= {"sampling.num_steps": 2, "loss.image_dropout": 0.1, "train.log_every": 60}
    assert (
        main(FlowTask, FlowRunConfig, [str(config), *arguments(dataset, stage, tmp_path / "run", **options)])
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scores = next(line for line in lines if line["kind"] == "validate")
    assert 0 < scores["loss_0.9"] < 2.5
    trained = next(line for line in lines if line["kind"] == "train")
    assert trained["loss"] < 1.95  # 2 is what predicting nothing costs
    folder = tmp_path / "run" / "bundle"
    info = read_bundle(folder)
    name = "structure_flow" if stage == "structure" else "latent_flow"
    entry = info.networks[name]
    schema, network = NETWORKS[entry.type]
    built = network(config_from_dict(schema, entry.config))
    load_strictly(built, read_tensors(folder / entry.file), folder)
    latents = "structure_latents" if stage == "structure" else "latents"
    assert len(info.settings[latents]["mean"]) == 4 and len(info.settings["image_latents"]["std"]) == 3
    assert info.settings["samplers"]["structure" if stage == "structure" else "latent"]["num_steps"] == 2
    assert info.settings["condition"] == {"size": 64, "margin": 1.2, "background": 0.5}


def test_stage_and_latents_must_agree(dataset):
    with pytest.raises(ValueError, match=r"latents_<name>"):
        task_for(dataset, "latents", **{"data.latents": "structures_x"})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_builds(path):
    config = load_config(FlowRunConfig, path)
    from diff2to3.flow.networks import build_network

    with torch.device("meta"):
        network = build_network(config.model)
    assert sum(p.numel() for p in network.parameters()) > 1e6


def test_the_rows_of_table_3_differ_in_one_line_each():
    lines = {}
    for number in (1, 2, 3, 4):
        path = CONFIGS[0].parent / f"exp{number}.yaml"
        text = path.read_text().splitlines()
        lines[number] = [line for line in text if line.strip() and not line.lstrip().startswith("#")]
    for number, key in ((2, "latents:"), (3, "backbone:"), (4, "position:")):
        before, after = lines[number - 1], lines[number]
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert [a.strip().split(" ")[0] for a, _ in changed if "out:" not in a] == [key]


def test_augmentation_is_for_training_alone(dataset):
    """The loss is that of changed images, drawn anew at every step; validation sees them as they are."""
    task = task_for(dataset, "structure", **{"data.augment.noise": 2.0})
    torch.manual_seed(0)
    objective = task.objective()
    for parameter in objective.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain = task_for(dataset, "structure").objective()
    plain.load_state_dict(objective.state_dict())
    batch = next(iter(task.loader(0, 0, 1)))
    with torch.no_grad():
        one, again, next_step = (objective(batch, Randomness(3, k))["loss"] for k in (5, 5, 6))
        assert torch.equal(one, again) and not torch.equal(one, next_step)
        assert not torch.allclose(one, plain(batch, Randomness(3, 5))["loss"])
        assert task.validate(objective) == task_for(dataset, "structure").validate(plain)
