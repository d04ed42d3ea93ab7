"""The package as a library: what ``import diff2to3`` offers, and what models and results do beside generating."""

import importlib
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import diff2to3
from diff2to3 import ImageTo3D, InputError, Reconstructor
from diff2to3.formats import read
from diff2to3.gaussians.render import render, to_uint8
from diff2to3.pipeline.share import LICENSES, model_card
from diff2to3.pipeline.turntable import turntable
from diff2to3.views.photo_frame import PhotoCamera

PHOTO = "eval/examples/suv.png"


@pytest.fixture(scope="module")
def model():
    return ImageTo3D.from_pretrained("mini-photo")


@pytest.fixture(scope="module")
def result(model, pytestconfig):
    return model(pytestconfig.rootpath / PHOTO, seed=3, refine=0)


def test_importing_the_package_imports_no_torch():
    code = "import sys, diff2to3; print(diff2to3.__version__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split()[1:] == ["False", "False"]


def test_everything_that_is_offered_exists_and_is_listed(pytestconfig):
    stub = (pytestconfig.rootpath / "diff2to3" / "__init__.pyi").read_text()
    assert all(f" as {name}\n" in stub for name in diff2to3.__all__ if name != "__version__")
    for name in diff2to3.__all__:
        assert getattr(diff2to3, name) is not None and name in dir(diff2to3)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diff2to3.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module, name",
    [
        ("errors", "InputError"),
        ("errors", "MissingDependencyError"),
        ("kernels.library", "KernelError"),
        ("training.faults", "NotFiniteError"),
        ("training.checkpoints", "CheckpointError"),
        ("training.distributed", "ElsewhereError"),
        ("worker", "WorkerError"),
    ],
)
def test_errors_have_one_base(module, name):
    error = getattr(importlib.import_module(f"diff2to3.{module}"), name)
    assert issubclass(error, diff2to3.Diff2to3Error)


def test_a_path_is_a_prompt_and_gives_what_the_opened_photo_gives(model, result, pytestconfig):
    path = pytestconfig.rootpath / PHOTO
    for prompt in (str(path), Image.open(path), [path]):
        other = model(prompt, seed=3, refine=0)
        assert torch.equal(other.gaussians.means, result.gaussians.means)
        assert torch.equal(other.gaussians.sh, result.gaussians.sh)
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        model("nowhere.png")


def test_a_result_saves_by_ending_and_says_which_it_cannot(result, tmp_path):
    path = result.save(tmp_path / "asset.ply")
    gaussians, metadata = read(path)
    torch.testing.assert_close(gaussians.means, result.gaussians.means, atol=1e-6, rtol=0)
    assert metadata["seed"] == 3
    for name in ("asset.glb", "asset.spz", "asset.splat"):
        assert len(read(result.save(str(tmp_path / name)))[0]) > 0
    with pytest.raises(InputError, match=r"asset\.doc"):
        result.save(tmp_path / "asset.doc")


def test_a_result_renders_from_its_photo_and_from_elsewhere(result):
    mine = np.asarray(result.render(size=64))
    camera = result.camera
    with torch.no_grad():
        seen = render(result.gaussians, camera.viewmat[None], camera.K(64)[None], 64, 64, background=1.0)
    np.testing.assert_array_equal(mine, to_uint8(seen.colors[0]).numpy())
    above = np.asarray(result.render(PhotoCamera(70.0, 2.0), size=64, background=0.0))
    assert above.shape == (64, 64, 3) and (above[0, 0] == 0).all()
    frames = result.turntable(4, 48)
    assert frames.shape == (4, 48, 48, 3) and frames.dtype == np.uint8
    # the first camera stands where the photo's did, at -y
    np.testing.assert_array_equal(frames, turntable(result.gaussians, 4, 48, azimuth=-90.0))


def test_to_changes_the_torsos_dtype_and_returns_the_model(pytestconfig):
    model = ImageTo3D.from_pretrained("mini-photo")
    assert model.to("cpu", torch.bfloat16) is model
    assert model.networks.latent_flow.torso_dtype == torch.bfloat16
    assert model.to(dtype=torch.float32).networks.latent_flow.torso_dtype == torch.float32
    reconstructor = Reconstructor.from_pretrained("mini").to("cpu", torch.bfloat16)
    assert reconstructor.encoder.torso_dtype == torch.bfloat16


def test_from_pretrained_gives_the_class_it_is_called_on():
    class Mine(Reconstructor):
        pass

    assert type(Mine.from_pretrained("mini")) is Mine


def test_a_saved_model_is_the_same_model(model, result, tmp_path, pytestconfig):
    folder = model.save_pretrained(tmp_path / "saved")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diff2to3\npipeline_tag: image-to-3d\nlicense: ")
    again = ImageTo3D.from_pretrained(str(folder))(pytestconfig.rootpath / PHOTO, seed=3, refine=0)
    assert torch.equal(again.gaussians.means, result.gaussians.means)
    assert torch.equal(again.gaussians.sh, result.gaussians.sh)
    assert any(path.name.startswith("LICENSE") for path in folder.iterdir())
    with pytest.raises(InputError, match="not empty"):
        model.save_pretrained(folder)
    # saving what was saved keeps the card as it is: it has its header already
    twice = ImageTo3D.from_pretrained(str(folder)).save_pretrained(tmp_path / "twice")
    assert (twice / "README.md").read_text() == card


def test_models_go_to_the_hub_with_the_calls_that_it_knows(model, tmp_path, monkeypatch):
    calls = []

    class HfApi:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            files = sorted(p.name for p in __import__("pathlib").Path(folder_path).iterdir())
            calls.append(("upload", repo_id, files, commit_message, revision))
            return types.SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    assert model.push_to_hub("me/chairs", private=True, token="t") == "https://hub/commit/1"
    assert calls[0] == ("token", "t") and calls[1] == ("create", "me/chairs", True, True)
    name, repository, files, message, revision = calls[2]
    assert (name, repository, message, revision) == ("upload", "me/chairs", "Push model with diff2to3", None)
    stored = json.loads((model.source.folder / "model.json").read_text())
    assert {entry["file"] for entry in stored["networks"].values()} <= set(files) and "README.md" in files
    calls.clear()
    model.save_pretrained(tmp_path / "pushed", repo_id="me/other", push_to_hub=True)
    assert calls[2][1] == "me/other"


def test_without_the_hubs_library_the_error_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(diff2to3.Diff2to3Error, match="pip install huggingface_hub"):
        model.push_to_hub("me/chairs")


def test_model_cards_name_the_licence_as_the_hub_does(model):
    from dataclasses import replace

    from diff2to3.checkpoint import read_bundle

    info = read_bundle(model.source.folder)
    for name, identifier in LICENSES.items():
        assert f"\nlicense: {identifier}\n" in model_card(replace(info, license=name), "", "mine")
    mixed = model_card(replace(info, license="MIT AND Apache-2.0"), "", "mine")
    assert "\nlicense: other\nlicense_name: mit-and-apache-2.0\n" in mixed and "# mine" in mixed
