"""``render --camera``: the view that metadata.json records, against a rendering by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.cli import main
from diff2to3.formats.ply import ply_bytes
from diff2to3.gaussians.render import render
from diff2to3.pipeline.camera_file import camera_entry, read_camera
from diff2to3.types import Gaussians
from diff2to3.views.photo_frame import PhotoCamera

CAMERA = PhotoCamera(24.5, 1.75)


@pytest.fixture
def asset(tmp_path: Path) -> Path:
    """Three blobs and the metadata beside them."""
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1)
    means = torch.tensor([[0.3, 0, 0], [0, -0.4, 0.1], [0, 0, 0.4]])
    sh = torch.tensor([[1.5, -1.5, -1.5], [-1.5, 1.5, -1.5], [-1.5, -1.5, 1.5]])[:, None]
    gaussians = Gaussians(means, quats, torch.full((3, 3), 0.06), torch.full((3,), 0.9), sh)
    (tmp_path / "a.ply").write_bytes(ply_bytes(gaussians))
    (tmp_path / "metadata.json").write_text(json.dumps({"seed": 0, "camera": camera_entry(CAMERA)}))
    picture = render(gaussians, CAMERA.viewmat[None], CAMERA.K(96)[None], 96, 96, background=0.25).colors[0]
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()).save(tmp_path / "expected.png")
    return tmp_path


def test_the_photos_view_is_drawn(asset: Path) -> None:
    out = asset / "photo.png"
    options = ["--camera", str(asset / "metadata.json"), "--resolution", "96", "--background", "0.25"]
    assert main(["render", str(asset / "a.ply"), "-o", str(out), *options]) == 0
    drawn, expected = (np.asarray(Image.open(p).convert("RGB"), int) for p in (out, asset / "expected.png"))
    assert drawn.shape == (96, 96, 3) and np.ptp(expected) > 100
    assert np.abs(drawn - expected).max() <= 1


def test_a_camera_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"camera": camera_entry(CAMERA)}))
    assert read_camera(tmp_path / "m.json") == CAMERA


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "has no camera"),
        ('{"camera": null}', "has no camera"),
        ('{"camera": {"elevation": "low", "focal": 2}}', "expected numbers elevation and focal"),
        ('{"camera": {"elevation": NaN, "focal": 2}}', "expected numbers elevation and focal"),
        ('{"camera": {"elevation": 95, "focal": 2}}', "between -90 and 90"),
    ],
)
def test_files_without_a_camera_say_so(
    asset: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (asset / "bad.json").write_text(text)
    arguments = [
        "render",
        str(asset / "a.ply"),
        "-o",
        str(asset / "o.png"),
        "--camera",
        str(asset / "bad.json"),
    ]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (asset / "o.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "o.gif"], "name a .png"),
        (["-o", "o.png", "--fit"], "--fit: has no meaning"),
        (["-o", "o.png", "--views", "4"], "--views: has no meaning"),
    ],
)
def test_options_of_turns_are_refused(
    asset: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", str(asset / "a.ply"), "--camera", str(asset / "metadata.json"), *options]) == 2
    assert message in capsys.readouterr().err
