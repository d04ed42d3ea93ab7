"""A tiny data set in Toys4k's published layout, tiny weights, and methods of which the result is known."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cat/cat_000", "cat/cat_001", "dog/dog_000", "mug/mug_007", "pen/pen_002")

#: A file for ``call:``; surfaces as dots, so that there is something to see and it is not perfect.
METHOD = '''
import numpy as np, torch
from diff2to3.metrics.geometry import sample_surface
from diff2to3.types import Gaussians

NUMBER = 400
UPRIGHT = torch.tensor([1.0, 0, 0, 0])


def dots(subject):
    """Gaussians on the asset's surface, in the colour of its material."""
    points = sample_surface(subject.mesh, NUMBER, np.random.default_rng(subject.seed))
    color = torch.tensor(subject.mesh.materials[0].base_color_factor[:3]).clamp(min=1e-6) ** (1 / 2.2)
    sh = ((color - 0.5) / 0.28209479177387814).expand(NUMBER, 1, 3)
    return Gaussians(points, UPRIGHT.expand(NUMBER, 4), torch.full((NUMBER, 3), 0.03), torch.full((NUMBER,), 0.9), sh)


def gray(subject):
    """As dots, without their colours."""
    made = dots(subject)
    return Gaussians(made.means, made.quats, made.scales, made.opacities, made.sh * 0)


def from_photo(subject):
    """A method for generation: it sees the photo only. A ball of the photo's mean colour."""
    rgba = torch.from_numpy(np.array(subject.photo, np.float32)) / 255
    assert subject.photo.mode == "RGBA" and 0 < float(rgba[..., 3].mean()) < 1
    color = (rgba[..., :3] * rgba[..., 3:]).sum((0, 1)) / rgba[..., 3].sum()
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(subject.seed))
    points = 0.4 * torch.nn.functional.normalize(noise, dim=1)
    sh = ((color - 0.5) / 0.28209479177387814).expand(200, 1, 3)
    return Gaussians(points, UPRIGHT.expand(200, 4), torch.full((200, 3), 0.05), torch.ones(200), sh)


def killed(subject, flag=__file__ + ".flag"):
    """As dots; but the process dies at the third asset the first time."""
    import os, pathlib, signal
    count = pathlib.Path(flag)
    seen = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (seen + 1))
    if seen == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return dots(subject)


def breaks(subject, flag=__file__ + ".flag"):
    """As dots; but the first asset is a mistake of the method's, and the process dies at the second, the first time."""
    import os, pathlib, signal
    count = pathlib.Path(flag)
    seen = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (seen + 1))
    if seen == 0:
        len(3)
    if seen == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return dots(subject)
'''


@pytest.fixture(scope="session")
def program(load_source: Callable[[Path], ModuleType]) -> Callable[[str], ModuleType]:
    """A program of eval/ by name, as a module."""
    return lambda name: load_source(ROOT / "eval" / f"{name}.py")


@pytest.fixture(scope="session")
def weights(load_source: Callable[[Path], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--weights with tiny random networks: the code path of the real ones."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    made = load_source(ROOT / "tests" / "metrics" / "conftest.py")
    folder = tmp_path_factory.mktemp("weights")
    save_file(made.inception_weights(16), folder / "inception.safetensors")
    save_file(made.lpips_weights("vgg", 16), folder / "lpips.safetensors")
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **small)).save_pretrained(
            folder / "dinov2"
        )
        clip = transformers.CLIPVisionConfig(intermediate_size=32, projection_dim=8, **small)
        transformers.CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    files = {n: f"{n}.safetensors" for n in ("inception", "lpips")} | {n: n for n in ("dinov2", "clip")}
    return [f"{name}={folder / file}" for name, file in files.items()]


@pytest.fixture(scope="session")
def toys4k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """metadata.csv and raw/toys4k_blend_files/CLASS/NAME/NAME.glb: boxes of different shapes and colours."""
    trimesh = pytest.importorskip("trimesh")
    folder = tmp_path_factory.mktemp("toys4k")
    rows = []
    for index, name in enumerate(NAMES):
        box = trimesh.creation.box((1, 0.3 + 0.15 * index, 0.9 - 0.1 * index))
        color = [0.2 + 0.15 * index, 0.9 - 0.15 * index, 0.3, 1.0]
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=color, metallicFactor=0.0)
        box.visual = trimesh.visual.TextureVisuals(material=material)
        stem = name.split("/")[1]
        path = folder / "raw" / "toys4k_blend_files" / name / f"{stem}.glb"
        path.parent.mkdir(parents=True)
        path.write_bytes(trimesh.Scene(box).export(file_type="glb"))
        identifier = f"{name}/{stem}.blend"
        rows.append(
            {"sha256": hashlib.sha256(identifier.encode()).hexdigest(), "file_identifier": identifier}
        )
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["sha256", "file_identifier"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def method(tmp_path: Path) -> Path:
    return write_method(tmp_path)


@pytest.fixture(scope="session")
def session_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for what a session makes once."""
    return write_method(tmp_path_factory.mktemp("method"))


def write_method(folder: Path) -> Path:
    path = folder / "method.py"
    path.write_text(METHOD)
    return path


@pytest.fixture(scope="session")
def recorded() -> Callable[..., None]:
    """Compares numbers with those that two earlier programs gave for the same run: recorded(which, key=numbers, …)."""
    held = json.loads((Path(__file__).parent / "recorded.json").read_text())

    def check(which: str, **found: Any) -> None:
        for key, numbers in found.items():
            same(held[which][key], numbers, f"{which}: {key}")

    def same(expected: Any, found: Any, where: str) -> None:
        if isinstance(expected, dict):
            assert set(expected) <= set(found), where
            for name, value in expected.items():
                same(value, found[name], f"{where}: {name}")
        elif isinstance(expected, float):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), where
        else:
            assert found == expected, where

    return check


#: What makes a protocol tiny.
TINY = ("resolution=32", "cameras.num_views=2", "render.supersample=1", "render.lighting.mode=unlit")


@pytest.fixture
def tiny() -> tuple[str, ...]:
    return TINY


@pytest.fixture(autouse=True)
def tiny_networks(one_thread: None) -> None:
    """Networks this small are several times slower on two threads than on one, where the machine is busy."""


@pytest.fixture(scope="session")
def generator_bundle(
    load_source: Callable[[Path], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle that generates; the training set that it says it had was unlit, which is soon rendered."""
    made = load_source(ROOT / "tests" / "tiny_generator.py")
    folder = Path(made.write_generator(tmp_path_factory.mktemp("generator") / "model"))
    info = json.loads((folder / "model.json").read_text())
    info["settings"] |= load_source(ROOT / "tests" / "tiny_models.py").SETTINGS
    (folder / "model.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def boxes(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four boxes of split val in two zips, one of them cut short, and two of split train."""
    pytest.importorskip("trimesh", reason="needs the data extra")
    return Path(tiny_models.write_assets(tmp_path_factory.mktemp("boxes")))
