"""The library's reconstruction: the same inputs as training had, and what a bundle may say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diff2to3.assets import load_asset, load_mesh, open_catalogue
from diff2to3.config import config_from_dict
from diff2to3.data.executors import InlineExecutor
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.hub import EMBEDDED, Source, embedded_models
from diff2to3.pipeline.reconstruct import ReconstructionSettings, Reconstructor
from diff2to3.voxels.voxelise import voxelise


@pytest.fixture(scope="module")
def boxes(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("embreex", reason="needs the data extra")
    return Path(tiny_models.write_assets(tmp_path_factory.mktemp("boxes"), broken=False))


@pytest.fixture(autouse=True)
def single(one_thread: None) -> Iterator[None]:
    yield


def test_the_encoder_reads_what_training_read(vae, boxes, tiny_models, tmp_path):
    """Views, voxels and features of one asset, from the preparation of data sets and from here."""
    wanted = tiny_models.SETTINGS
    settings = {
        "source": str(boxes),
        "out": str(tmp_path / "set"),
        "render": wanted["views"]["render"],
        "view_sets": {"input": {"size": 32, "depths": True, "cameras": wanted["views"]["cameras"]}},
        "resolutions": [8],
        "features": {
            name: {"provider": name, "resolution": 8, "dtype": "float32"} for name in ("rgb", "surface")
        },
    }
    prepare(config_from_dict(DataConfig, settings), InlineExecutor())
    store = AssetStore(tmp_path / "set")
    (asset,) = (a for a in store.assets() if a.id == "plain/box-2")
    expected = store.features(asset, ["rgb", "surface"])
    mesh = load_asset(open_catalogue(boxes)["plain/box-2"])
    model = Reconstructor.from_pretrained(str(vae))
    views = model.views(mesh, name="plain/box-2")
    stored = store.views(asset, "input", depths=True)
    torch.testing.assert_close(views.viewmats, stored.viewmats)
    torch.testing.assert_close(views.alphas, stored.alphas, atol=0.002, rtol=0)  # 8 bits
    voxels = model.features(views, torch.from_numpy(voxelise(mesh.triangles, 8)))
    assert torch.equal(voxels.coords, expected.coords)
    # 8 bits a colour and 16 bits a depth there; a pixel on a border of two voxels may change sides
    apart = (voxels.feats - expected.feats).abs() > 0.05
    assert voxels.feats.shape[1] == 31 and float(apart.any(1).float().mean()) < 0.03
    other = model.views(mesh, name="another")
    assert not torch.allclose(other.viewmats, views.viewmats, atol=0.01)


def test_a_reconstruction_is_the_decoded_mean(vae, boxes):
    model = Reconstructor.from_pretrained(str(vae))
    mesh = load_asset(open_catalogue(boxes)["plain/box-1"])
    made = model(mesh, name="x")
    voxels = model.features(made.views, made.latents.coords[:, 1:])
    latents = voxels.with_feats(model.encoder(voxels).mean)
    torch.testing.assert_close(made.latents.feats, latents.feats)
    torch.testing.assert_close(made.gaussians.means, model.decoder(latents)[0].means)
    assert len(made.gaussians) == 2 * len(made.latents) and not made.gaussians.means.requires_grad
    assert set(made.seconds) == {"views", "voxels", "features", "encode", "decode"}
    state = torch.random.get_rng_state()
    again = model(mesh, name="x")
    assert torch.equal(again.gaussians.means, made.gaussians.means)
    assert torch.equal(state, torch.random.get_rng_state())


def test_structure_goes_through_its_autoencoder(vae, tiny_models, tmp_path):
    model = Reconstructor.from_pretrained(str(vae))
    assert model.structure is not None
    coords = torch.from_numpy(np.argwhere(np.random.default_rng(0).random((8, 8, 8)) < 0.2).astype(np.int32))
    grid = torch.zeros(1, 1, 8, 8, 8)
    for x, y, z in coords.tolist():
        grid[0, 0, x, y, z] = 1
    with torch.no_grad():
        logits = model.structure.decoder(model.structure.encoder(grid).mean)[0, 0]
    found = model.structure_of(coords)
    assert found is not None and torch.equal(found.long(), (logits > 0).nonzero())
    plain = Reconstructor.from_pretrained(str(tiny_models.write_vae(tmp_path / "plain", structure=False)))
    assert plain.structure_of(coords) is None


def test_a_mesh_of_another_size_or_axis_gives_the_same(vae, tiny_models, tmp_path):
    """The object frame is what counts: 100 times as large and moved is the same asset."""
    trimesh = pytest.importorskip("trimesh")
    path = tmp_path / "a.glb"
    path.write_bytes(tiny_models.box((1, 0.5, 0.8), (0.2, 0.5, 0.9)))
    scene = trimesh.load(path)
    scene.apply_transform(
        trimesh.transformations.translation_matrix([7, 8, 9]) @ np.diag([100, 100, 100, 1.0])
    )
    (tmp_path / "b.glb").write_bytes(scene.export(file_type="glb"))
    model = Reconstructor.from_pretrained(str(vae))
    first, second = (model(load_mesh(tmp_path / name)) for name in ("a.glb", "b.glb"))
    torch.testing.assert_close(first.gaussians.means, second.gaussians.means, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": []}, "settings say no features"),
        ({"features": [{"provider": "rgb"}]}, "rgb have 3 channels; the encoder takes 31"),
        (
            {"features": [{"provider": "rgb", "resolution": 16}, {"provider": "surface"}]},
            "rgb is on 16³ voxels",
        ),
        ({"features": [{"provder": "rgb"}]}, "provder"),
        ({"views": {"size": "big"}}, "views.size"),
        ({"features": [{"provider": "rgb", "dtype": "int3"}]}, "dtype: expected one of float32"),
    ],
)
def test_settings_that_do_not_fit(change, said, vae, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(vae, folder)
    path = folder / "model.json"
    values = json.loads(path.read_text())
    values["settings"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=said):
        Reconstructor.from_pretrained(str(folder))


def test_settings_of_a_training_run_are_read():
    """What train/vae.py writes: the stages' own settings."""
    settings = {
        "features": [
            {"provider": "taef2", "weights": "sha256:0", "stride": None, "resolution": 32, "mode": "mean"}
        ],
        "views": {"name": "input", "seed": 3, "size": 64, "depths": True, "cameras": {"num_views": 5}},
        "latents": {"mean": [0.0], "std": [1.0]},
    }
    read = ReconstructionSettings.from_settings(settings, "here")
    assert read.views.cameras.num_views == 5 and read.views.seed == 3 and read.features[0].mode == "mean"


def test_embedded_models_come_before_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in embedded_models():
        (tmp_path / name).mkdir()
        assert Source(name).folder == EMBEDDED / name
        assert Source(f"./{name}").folder == Path(name)
    with pytest.raises(InputError, match="no such folder, not an embedded model"):
        Source("nothing here")


@pytest.mark.skipif(
    not (EMBEDDED / "mini" / "decoder.safetensors").is_file(), reason="the embedded model has no decoder yet"
)
def test_the_embedded_model_gives_a_box_back(tiny_models, tmp_path):
    from diff2to3.gaussians.render import render_pictures
    from diff2to3.metrics.pairs import pair_values
    from diff2to3.views import CameraConfig, generator_for, make_renderer, sample_cameras

    pytest.importorskip("embreex", reason="needs the data extra")
    path = tmp_path / "box.glb"
    path.write_bytes(tiny_models.box((1.0, 0.5, 0.8), (0.8, 0.3, 0.1)))
    mesh = load_mesh(path)
    model = Reconstructor.from_pretrained("mini")
    made = model(mesh)
    viewmats, Ks = sample_cameras(CameraConfig(num_views=2), 128, 128, generator_for(1, "held out"))
    truth = make_renderer(mesh, model.settings.views.render).render(viewmats, Ks, 128, 128)
    images, _ = render_pictures(made.gaussians, viewmats, Ks, 128, 128)
    found = pair_values(images, truth.composite(1.0), truth.alphas, None)
    assert found["psnr"] > 28 and found["ssim"] > 0.95 and found["ciede2000"] < 3, found
