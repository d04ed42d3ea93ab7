"""Stage 2 on generated voxels: the voxels against generation's own, the loss by hand, and a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flow_runs import VIEWS, arguments, task_for

from diff2to3.config import load_config
from diff2to3.data.store import AssetStore
from diff2to3.flow.denoise import Conditions
from diff2to3.flow.tokens import ImageTokens
from diff2to3.gaussians.render import render
from diff2to3.metrics.image import ssim
from diff2to3.pipeline import ImageTo3D
from diff2to3.pipeline.parts import some_voxels
from diff2to3.training.run import main
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.flow import FlowRunConfig, flow_task
from diff2to3.training.tasks.flow_generated import GeneratedObjective, StructureStage
from diff2to3.types import SparseVoxels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_voxels_are_those_that_generation_makes_without_guidance(load_source, tmp_path):
    tiny = load_source(Path(__file__).resolve().parents[2] / "tiny_generator.py")
    folder = tiny.write_generator(tmp_path / "model")
    latents = torch.randn(3, tiny.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    model = ImageTo3D.from_pretrained(str(folder))
    settings = replace(model.structure_settings, guidance_scale=1.0)
    wanted = some_voxels(model.structure_logits(Conditions((latents,)), settings, generators()), 0.3)
    torch.testing.assert_close(StructureStage(str(folder), 0.3)(latents, generators()), wanted)
    most = StructureStage(str(folder), 1e9)(latents, generators())
    assert most[:, 0].tolist() == [0, 1, 2]  # no item without a voxel


def generators():
    return [torch.Generator().manual_seed(k) for k in range(3)]


def packed(cells):
    """Coordinates [N, 4] of a batch, from each item's cells [n, 3]."""
    return torch.cat([torch.nn.functional.pad(c, (1, 0), value=k) for k, c in enumerate(cells)]).int()


CHANGES = {
    "data.loader.views": "{target: 1}", "loss.render.weight": 0.7, "loss.render.log": 0.3,
    "loss.render.l2": 2.0, "data.generated.bundle": "unread",
}  # fmt: skip


def test_the_loss_is_of_one_step_from_noise_on_the_voxels_it_is_given(dataset, decoder_bundle):
    """By hand, an item at a time; what stage 1 sees is augmented, what stage 2 sees is not."""
    folder, decoder = decoder_bundle
    task = task_for(dataset, "latents", **CHANGES, **{"data.bundle": folder, "data.augment.tint": 0.5})
    objective = task.objective()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    cells = [torch.randint(8, (30 + 5 * k, 3), generator=g).unique(dim=0) for k, g in enumerate(generators())]
    seen = []

    def structure(latents, drawn):
        seen.append(latents)
        return packed(cells)

    objective.structure = structure
    batch, randomness = next(iter(task.loader(0, 0, 1))), Randomness(3, 4)
    out = objective(batch, randomness)
    plain = objective.image_latents(batch.tensors)
    tint = seen[0] - plain
    assert float(tint.std((2, 3)).max()) < 1e-5 < 0.1 < float(tint.abs().max())
    values = out["loss"].tolist()
    with torch.no_grad():
        for k, asset in enumerate(batch.ids):
            noise = torch.randn(len(cells[k]), 4, generator=randomness.generator(asset, "flow"))
            voxels = SparseVoxels.from_coords(packed([cells[k]]), noise, 8)
            velocity = objective.network(voxels, torch.ones(1), ImageTokens.from_latents(plain[k : k + 1], 2))
            made = (noise - velocity) * objective.latents.std + objective.latents.mean
            (gaussians,) = decoder(voxels.with_feats(made))
            color = torch.rand(3, generator=randomness.generator(asset, "background"))
            view = batch.views["target"].select([k])
            drawn = render(gaussians, view.viewmats, view.Ks, 24, 24, background=color).colors
            squared = (drawn - view.images).square().mean()
            expected = (drawn - view.images).abs().mean() + 2 * squared + 0.3 * torch.log10(squared + 1e-4)
            expected = expected + 0.2 * (1 - ssim(drawn, view.images).mean())
            assert values[k] == pytest.approx(0.7 * float(expected), rel=1e-3)
    out["loss"].sum().backward()
    assert float(objective.network.out_layer.weight.grad.abs().max()) > 0


def test_the_loss_may_count_how_far_the_surface_is(dataset, decoder_bundle):
    """What it adds, from all pairs of centres and points, with as many drawn as there are."""
    changes = {**CHANGES, "data.bundle": decoder_bundle[0], "data.points": "points_50"}
    losses, seen = [], []
    for weight in (0.0, 2.0):
        task = task_for(dataset, "latents", **changes, **{"loss.render.surface": weight})
        torch.manual_seed(1)
        objective = task.objective()
        objective.structure = lambda latents, drawn: packed(
            [torch.tensor([[1, 2, 3], [4, 4, 5]])] * len(latents)
        )
        decoded = objective.decoded
        objective.decoded = lambda data, decoded=decoded: seen.append(decoded(data)) or seen[-1]
        batch = next(iter(task.loader(0, 0, 1)))
        losses.append(objective(batch, Randomness(3, 4))["loss"])
    for k, gaussians in enumerate(seen[-1]):
        points = batch.tensors["points_50/points.safetensors"][k]["points"].double()
        distances = (gaussians.means.detach().double()[:, None] - points).norm(dim=2)
        opacities = gaussians.opacities.detach().double()
        near = distances.amin(1) ** 2
        precise = (opacities * near / (near + 0.02**2)).mean()
        far = distances[opacities >= 0.5].amin(0) ** 2
        expected = (precise + (far / (far + 0.02**2)).mean()) / 2
        added = losses[1][k] - losses[0][k]
        assert added.item() == pytest.approx(0.7 * 2 * float(expected), abs=1e-4)
    losses[1].sum().backward()


def test_a_surface_to_learn_from_has_to_be_named(dataset, decoder_bundle):
    changes = {**CHANGES, "data.bundle": decoder_bundle[0], "loss.render.surface": 1.0}
    with pytest.raises(ValueError, match=r"loss\.render\.surface: needs data\.points"):
        task_for(dataset, "latents", **changes)


def test_stage_1_may_see_the_same_views_through_an_encoder_of_its_own(dataset, decoder_bundle):
    changes = {**CHANGES, "data.bundle": decoder_bundle[0], "data.generated.tokens": "tokens_y"}
    task = task_for(dataset, "latents", **changes)
    objective = task.objective()
    seen = []

    def structure(latents, drawn):
        seen.append(latents)
        return packed([torch.tensor([[1, 2, 3]])] * len(latents))

    objective.structure = structure
    loader = task.loader(0, 0, 1)
    for batch in (next(iter(loader)) for _ in range(3)):
        objective(batch, Randomness(3, 4))
        torch.testing.assert_close(seen.pop(), objective.image_latents(batch.tensors)[:, :2])
    store, assets = task.validation(3)
    task.made(objective, store, assets)
    wanted = objective.image_latents(task.read(objective, store, assets))[:, :2]
    torch.testing.assert_close(seen.pop(), wanted)


def test_training_may_take_the_voxels_from_what_is_expected_of_the_view(dataset, decoder_bundle):
    """Of the same view as the image, above the share; validation still asks stage 1."""
    changes = {**CHANGES, "data.bundle": decoder_bundle[0], "data.expected": "expected_z"}
    task = task_for(dataset, "latents", **changes, **{"data.generated.share": 0.9})
    objective, cells = task.objective(), torch.tensor([[1, 2, 3]])
    steps, asked = [], []
    one_step = objective.one_step
    objective.one_step = lambda coords, *rest: steps.append(coords) or one_step(coords, *rest)
    objective.structure = lambda latents, drawn: asked.append(latents) or packed([cells] * len(latents))
    batch = next(iter(task.loader(0, 0, 1)))
    objective(batch, Randomness(3, 4))
    assert not asked
    store = AssetStore(dataset, ["expected_z", "tokens_x"])
    wanted = []
    for name, image in zip(batch.ids, batch.tensors["tokens_x/*.safetensors"], strict=True):
        (asset,) = (a for a in store.assets("train") if a.id == name)
        members = [f"{v:03d}.safetensors" for v in range(VIEWS)]
        (view,) = (
            m
            for m in members
            if torch.equal(store.open(asset, "tokens_x").tensors(m)["latents"], image["latents"])
        )
        grid = store.open(asset, "expected_z").tensors(view)["occupancy"]
        wanted.append((grid >= 230).nonzero())  # 0.9 of 255 is 229.5
    torch.testing.assert_close(steps.pop(), packed(wanted))
    made, _ = task.made(objective, *task.validation(1))
    torch.testing.assert_close(made.coords, packed([cells]))
    assert len(asked) == 1


def test_expected_voxels_are_for_generated_ones_only(dataset, decoder_bundle):
    changes = {**CHANGES, "data.bundle": decoder_bundle[0], "data.expected": "expected_z"}
    with pytest.raises(ValueError, match=r"data\.expected: stage latents needs data\.generated"):
        task_for(dataset, "latents", **{**changes, "data.generated.bundle": "null"})


def test_a_run_trains_validates_and_exports(dataset, decoder_bundle, tmp_path, monkeypatch):
    """With voxels from a stage 1 that makes a ball of everything."""
    grid = torch.cartesian_prod(*[torch.arange(8)] * 3)
    ball = grid[(grid - 3.5).square().sum(1) < 9]

    def structure(self, latents, drawn):
        return packed([ball] * len(latents))

    monkeypatch.setattr(StructureStage, "__call__", structure)
    changes = {
        **CHANGES,
        "data.bundle": decoder_bundle[0],
        "train.validate_every": 2,
        "train.sample_every": 4,
    }
    argv = arguments(dataset, "latents", tmp_path / "run", **changes)
    (tmp_path / "empty.yaml").write_text("{}")
    for _ in range(2):  # the second time it is found to be done
        assert main(flow_task, FlowRunConfig, [str(tmp_path / "empty.yaml"), *argv]) == 0
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"psnr"' in log
    assert (tmp_path / "run" / "bundle" / "latent_flow.safetensors").is_file()


def test_generated_voxels_need_renderings(dataset):
    with pytest.raises(ValueError, match=r"data\.generated: needs loss\.render"):
        task_for(dataset, "latents", **{**CHANGES, "data.bundle": "x", "loss.render.weight": 0})


def test_only_the_task_for_generated_voxels_has_them(dataset, decoder_bundle):
    objective = task_for(dataset, "latents", **CHANGES, **{"data.bundle": decoder_bundle[0]}).objective()
    assert isinstance(objective, GeneratedObjective)
    assert not any("structure" in name for name in objective.state_dict())
    config = load_config(FlowRunConfig, None, arguments(dataset, "latents", "x"))
    assert not isinstance(flow_task(config).objective(), GeneratedObjective)
