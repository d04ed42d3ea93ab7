"""The 2to3-VAE and stage 2 in the photo frame, from photographs of boxes to exported bundles."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from diff2to3.checkpoint import BundleInfo, NetworkEntry, merge_bundles, read_bundle, save_bundle
from diff2to3.config import config_from_dict
from diff2to3.data.executors import InlineExecutor
from diff2to3.data.loader import TrainLoader
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.flow.efficientnet import EfficientNetConfig, EfficientNetLite
from diff2to3.tensors import read_tensors
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World
from diff2to3.training.run import build
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.occupancy import OccupancyRunConfig, OccupancyTask
from diff2to3.training.tasks.photo_latents import PhotoLatentRunConfig, PhotoLatentTask
from diff2to3.training.tasks.photo_vae import PhotoVaeRunConfig, PhotoVaeTask
from diff2to3.vae.config import EncoderConfig
from diff2to3.vae.encoder import Encoder
from diff2to3.views.photo_frame import PhotoCamera, transformed
from diff2to3.voxels.mini_encoder import MiniEncoder, MiniEncoderConfig
from tests.data.conftest import colored_box, write_source

R = 16
SMALL = {"width": 8, "num_blocks": 1, "num_heads": 2, "block": "convolution", "conv_kernel": "cross"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(dataset, bundle): six boxes with all stages."""
    folder = tmp_path_factory.mktemp("photo_frame")
    boxes = {f"box{i}.glb": colored_box((1.0, 0.4 + 0.1 * i, 0.5), i) for i in range(6)}
    source = write_source(folder / "source", boxes)
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(resolution=R, in_channels=31, latent_channels=4, **SMALL))
    torch.nn.init.normal_(encoder.out_layer.weight, std=0.2)
    image = MiniEncoder(MiniEncoderConfig(4, 1, 4, 1, 8))
    maps = EfficientNetLite(EfficientNetConfig(11, 1))
    networks = {"encoder": encoder, "image_encoder": image, "photo_maps": maps}
    configs = {
        "encoder": asdict(encoder.config),
        "image_encoder": asdict(image.config),
        "photo_maps": {"num_blocks": 11, "pool": 1},
    }
    entries = {n: NetworkEntry(type(v).__name__, configs[n], f"{n}.safetensors") for n, v in networks.items()}
    bundle = folder / "bundle"
    save_bundle(bundle, BundleInfo("test", entries), {n: v.state_dict() for n, v in networks.items()})
    settings = {
        "source": str(source),
        "out": str(folder / "data"),
        "render": {"lighting": {"mode": "unlit"}, "supersample": 1},
        "view_sets": {"input": {"size": 64, "depths": True, "cameras": {"num_views": 8}}},
        "resolutions": [R],
        "photographs": {"photo": {"num_views": 3, "size": 8 * R, "resolution": R}},
        "maps": {"photo": {"bundle": str(bundle)}},
        "features": {
            "surface": {"provider": "surface", "resolution": R},
            "rgb": {"provider": "rgb", "resolution": R, "dtype": "float32"},
        },
        "photovoxels": {"photo": {"features": ["surface", "rgb"], "num_photographs": 2, "most_lost": 0.3}},
        "photolatents": {"photo": {"bundle": str(bundle)}},
        "stages": ["views", "voxels", "photographs", "maps", "photovoxels", "photolatents"],
    }
    prepare(config_from_dict(DataConfig, settings, "test"), InlineExecutor())
    return folder / "data", bundle


def vae_config(data, out) -> PhotoVaeRunConfig:
    networks = {"resolution": R, "linear_path": True, "latent_channels": 4, **SMALL}
    values = {
        "data": {
            "root": str(data),
            "loader": {"views": {"input": 2}, "max_assets_per_batch": 2, "num_workers": 0},
        },
        "encoder": {**networks, "in_channels": 31},
        "decoder": {**networks, "gaussians": {"per_voxel": 2}},
        "loss": {"lpips": 0.0, "edges": 0.1},
        "sizes": [[0, 32]],
        "train": {"out": str(out)},
    }
    return config_from_dict(PhotoVaeRunConfig, values, "test")


def latent_config(data, bundle, out) -> PhotoLatentRunConfig:
    model = {
        "resolution": R, "in_channels": 4, "out_channels": 4, "width": 16, "num_heads": 2, "num_double": 1,
        "num_single": 1, "image_channels": 4 * 8 + 112, "image_patch_size": 2, "lifted_channels": 8 + 8 + 40,
        "patch_size": 2, "io_channels": [8], "precondition": True,
    }  # fmt: skip
    values = {
        "data": {
            "root": str(data), "bundle": str(bundle), "loader": {"max_assets_per_batch": 3, "num_workers": 0},
        },
        "model": model,
        "train": {"out": str(out)},
    }  # fmt: skip
    return config_from_dict(PhotoLatentRunConfig, values, "test")


def occupancy_config(data, bundle, out) -> OccupancyRunConfig:
    values = {
        "data": {
            "root": str(data), "bundle": str(bundle), "loader": {"max_assets_per_batch": 3, "num_workers": 0},
        },
        "encoder": {
            "resolution": R, "widths": [8, 8, 16], "plane_channels": 4, "frustum_channels": 2, "depth_bins": 6,
        },
        "flow": {
            "resolution": R, "fine_width": 8, "coarse_width": 16, "num_coarse": 1, "time_width": 16,
            "plane_channels": 4, "frustum_channels": 2, "token_channels": 16,
        },
        "train": {"out": str(out)},
    }  # fmt: skip
    return config_from_dict(OccupancyRunConfig, values, "test")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_1_has_a_finite_loss_and_gradients_in_both_precisions(prepared, tmp_path, precision):
    config = occupancy_config(*prepared, tmp_path / "run")
    task = OccupancyTask(config)
    torch.manual_seed(0)
    objective = task.objective()
    batch = first_batch(task, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses = objective(batch, Randomness(0, 0))
    losses["loss"].mean().backward()
    assert bool(torch.isfinite(losses["loss"]).all())
    # every seventh voxel or so is occupied, which a new network expects of one in thirteen
    assert 0.1 < float(losses["occupancy"].detach().mean()) < 1.5
    moved = [float(p.grad.abs().max()) for p in objective.parameters() if p.grad is not None]
    assert max(moved) > 0 and all(math.isfinite(value) for value in moved)


def first_batch(task, config):
    return next(iter(task.loader(config.train.seed, 0, 1)))


def test_colours_on_voxels_are_those_that_the_views_show_there(prepared):
    """Boxes are unlit with a colour a face: lifted colours are one of six, and voxels lie on the moved surface."""
    store = AssetStore(prepared[0])
    for asset in store.assets()[:3]:
        stored = store.open(asset, "photovoxels_photo")
        assert 1 <= len(stored.entry.members) <= 2
        for name in stored.entry.members:
            item, photo = stored.tensors(name), store.open(asset, "photographs_photo").tensors(name)
            grid = np.unpackbits(photo["occupancy"].numpy(), axis=-1)
            np.testing.assert_array_equal(np.argwhere(grid), item["coords"].numpy())
            centres = (item["coords"].numpy() + 0.5) / R - 0.5
            back = transformed(centres.astype(np.float64), np.linalg.inv(item["transform"].numpy()))
            views = store.views(asset, "input")
            low, high = back.min(0), back.max(0)
            middle = np.abs((back - (low + high) / 2) / (high - low))
            inside_a_face = (middle > 0.35).sum(1) == 1  # away from edges, where colours mix
            rgb = item["feats"].float().numpy()[inside_a_face, 28:]
            seen = views.images[views.alphas > 0.99].numpy()
            distance = np.abs(rgb[:, None] - seen[None, ::37]).max(-1).min(1)
            assert np.median(distance) < 0.02


def test_latents_are_the_encoders_and_come_with_what_is_seen(prepared):
    data, bundle = prepared
    store = AssetStore(data)
    asset = store.assets()[0]
    stored, voxels = store.open(asset, "photolatents_photo"), store.open(asset, "photovoxels_photo")
    assert sorted(stored.entry.members) == sorted(voxels.entry.members)
    encoder = Encoder(EncoderConfig(**read_bundle(bundle).networks["encoder"].config))
    encoder.load_state_dict(read_tensors(bundle / "encoder.safetensors"))
    from diff2to3.training.tasks.photo_vae import voxels_of

    name = sorted(stored.entry.members)[0]
    item = stored.tensors(name)
    with torch.no_grad():
        mean = encoder(voxels_of([voxels.tensors(name)], R)).mean
    torch.testing.assert_close(item["mean"].float(), mean, atol=2e-3, rtol=2e-3)
    maps = store.open(asset, "maps_photo").tensors(name)
    assert all(torch.equal(item[key], maps[key]) for key in ("fine", "coarse", "rgba"))
    assert item["image"].shape == (8, R, R)


def test_the_autoencoder_learns_and_exports_principal_axes(prepared, tmp_path):
    config = vae_config(prepared[0], tmp_path)
    task = PhotoVaeTask(config)
    torch.manual_seed(0)
    objective = task.objective()
    batch = first_batch(task, config)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = objective(batch, Randomness(0, 0))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    numbers = task.validate(objective)
    assert all(math.isfinite(value) for value in numbers.values())
    task.export(objective, tmp_path / "bundle")
    info = read_bundle(tmp_path / "bundle")
    encoder = Encoder(EncoderConfig(**info.networks["encoder"].config))
    encoder.load_state_dict(read_tensors(tmp_path / "bundle" / "encoder.safetensors"))
    means = task.means(encoder)
    covariance = torch.cov(means.T)
    assert (covariance - covariance.diag().diag()).abs().max() < 0.02 * covariance.diag().max()
    expected = torch.tensor(info.settings["latents"]["std"])
    torch.testing.assert_close(means.std(0), expected, rtol=2e-2, atol=2e-3)
    assert [f["provider"] for f in info.settings["features"]] == ["surface", "rgb"]


def test_stage_2_learns_and_exports(prepared, tmp_path):
    data, bundle = prepared
    config = latent_config(data, bundle, tmp_path)
    task = PhotoLatentTask(config)
    torch.manual_seed(0)
    objective = task.objective()
    batch = first_batch(task, config)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = objective(batch, Randomness(0, 0))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1, abs=0.35)  # the best linear guess at normalised latents
    assert losses[-1] < 0.8 * losses[0]
    assert set(task.validate(objective)) <= {"loss_1.0", "loss_0.7", "loss_0.4"}
    task.export(objective, tmp_path / "bundle")
    info = read_bundle(tmp_path / "bundle")
    assert {"latents", "image_latents", "fine_maps", "coarse_maps", "frame"} <= set(info.settings)
    assert set(info.networks) == {"latent_flow", "image_encoder"}
    stored = read_tensors(tmp_path / "bundle" / "latent_flow.safetensors")
    assert set(stored) == set(objective.latent_flow.state_dict())


def test_stage_1_learns_and_exports(prepared, tmp_path):
    data, bundle = prepared
    config = occupancy_config(data, bundle, tmp_path)
    task = OccupancyTask(config)
    torch.manual_seed(0)
    objective = task.objective()
    batch = first_batch(task, config)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = objective(batch, Randomness(0, 0))
        optimizer.zero_grad()
        out["loss"].mean().backward()
        optimizer.step()
        losses.append({name: float(value.detach().mean()) for name, value in out.items()})
    assert losses[-1]["loss"] == pytest.approx(
        20 * losses[-1]["occupancy"] + 0.25 * losses[-1]["depth"] + 0.2 * losses[-1]["camera"], rel=1e-5
    )
    assert losses[-1]["occupancy"] < 0.8 * losses[0]["occupancy"]
    assert all(0 <= value < 90 for value in task.validate(objective).values())
    task.export(objective, tmp_path / "bundle")
    assert set(read_bundle(tmp_path / "bundle").networks) == {"photo_maps", "photo_encoder", "occupancy_flow"}


@pytest.mark.parametrize("stage", ["occupancy", "latents"])
def test_a_run_that_begins_with_a_bundle_has_its_loss(stage, prepared, tmp_path):
    """Of weights in float16 and of statistics that are not the data set's, beside a network of another role."""
    data, bundle = prepared
    if stage == "occupancy":
        task = OccupancyTask(occupancy_config(data, bundle, tmp_path))
    else:
        task = PhotoLatentTask(latent_config(data, bundle, tmp_path))
    torch.manual_seed(5)
    trained = task.objective()
    for parameter in trained.parameters():
        parameter.data.normal_(std=0.1).copy_(parameter.half())
    for buffer in trained.buffers():
        buffer.mul_(1.5)
    task.export(trained, tmp_path / "trained")
    whole = tmp_path / "whole"  # with the 2to3-VAE's ``encoder``
    info, tensors = merge_bundles([tmp_path / "trained", bundle], replace=True)
    save_bundle(whole, info, tensors)
    state, _ = build(
        task, TrainConfig(out=str(tmp_path), init_from=str(whole)), World(0, 1, torch.device("cpu"))
    )
    batch = first_batch(task, task.config)
    with torch.no_grad():
        wanted = trained(batch, Randomness(0, 1))["loss"]
        found = state.objective(batch, Randomness(0, 1))["loss"]
        other = task.objective()(batch, Randomness(0, 1))["loss"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert float((other - wanted).abs().min()) > 0.01


def test_settings_that_do_not_fit_are_named(prepared, tmp_path):
    data, bundle = prepared
    task = OccupancyTask(occupancy_config(data, bundle, tmp_path))
    task.export(task.objective(), tmp_path / "trained")
    path = tmp_path / "trained" / "model.json"
    path.write_text(path.read_text().replace("map_deviations", "deviations"))
    config = TrainConfig(out=str(tmp_path), init_from=str(tmp_path / "trained"))
    with pytest.raises(InputError, match=r"model\.json: settings do not fit this run: 'map_deviations'"):
        build(task, config, World(0, 1, torch.device("cpu")))


def test_an_item_without_its_photo_sees_nothing_of_it(prepared, tmp_path):
    data, bundle = prepared
    objective = PhotoLatentTask(latent_config(data, bundle, tmp_path)).objective()
    torch.nn.init.normal_(objective.latent_flow.out_layer.weight)
    loader = TrainLoader(
        data, PhotoLatentTask(latent_config(data, bundle, tmp_path)).loader(0, 0, 1).config, seed=0
    )
    items = next(iter(loader)).tensors[objective.member][:2]
    other = {**items[1], "image": items[1]["image"] + 1, "rgba": 255 - items[1]["rgba"]}
    camera = PhotoCamera(10.0, 2.0)
    found = []
    for second in (items[1], other):
        for kept in (True, False):
            latents, image, lifted = objective.inputs(
                [items[0], second], [camera, camera], torch.tensor([True, kept])
            )
            with torch.no_grad():
                noise = torch.zeros_like(latents.feats)
                found.append(objective.errors(latents, image, lifted, torch.tensor([0.5, 0.5]), noise))
    torch.testing.assert_close(found[1], found[3])
    assert abs(float(found[0][1] - found[2][1])) > 1e-6


def test_stages_that_do_not_fit_say_so(prepared, tmp_path):
    config = vae_config(prepared[0], tmp_path)
    wrong = config_from_dict(
        PhotoVaeRunConfig,
        {"data": {"root": str(prepared[0])}, "encoder": {"resolution": R, "in_channels": 9},
         "decoder": {"resolution": R}, "train": {"out": "x"}},
        "test",
    )  # fmt: skip
    with pytest.raises(InputError, match="is 9, and photovoxels_photo has 31"):
        PhotoVaeTask(wrong).loader(0, 0, 1)
    assert PhotoVaeTask(config).loader(0, 0, 1).assets
