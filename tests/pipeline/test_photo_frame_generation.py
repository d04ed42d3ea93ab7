"""Generation in the photo frame: a tiny model with random weights through the whole path."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diff2to3.checkpoint import MODEL_FILE
from diff2to3.commands import generate
from diff2to3.errors import InputError
from diff2to3.gaussians.render import render
from diff2to3.pipeline import photo_frame
from diff2to3.pipeline.camera_file import read_camera
from diff2to3.pipeline.image_to_3d import ImageTo3D
from diff2to3.pipeline.photo_frame import crop_of

RESOLUTION = 16


@pytest.fixture(scope="module")
def bundle(load_source, tmp_path_factory):
    made = load_source(Path(__file__).resolve().parents[1] / "tiny_photo_generator.py")
    return made.write_photo_generator(tmp_path_factory.mktemp("photo"))


@pytest.fixture(scope="module")
def model(bundle):
    return ImageTo3D.from_pretrained(str(bundle))


def test_a_photo_gives_voxels_gaussians_and_its_camera(model, tiny):
    result = model(tiny.photo(), seed=1)
    assert model.frame == result.frame == "photo"
    assert 0 < len(result.coords) < RESOLUTION**3
    assert result.camera is not None and result.camera.focal > 0.5
    assert len(result.gaussians) == 4 * len(result.coords)
    assert all(bool(torch.isfinite(value).all()) for value in vars(result.gaussians).values())
    assert not result.gaussians.means.is_inference()


def test_seeds_decide_and_objects_do_not_depend_on_their_batch(model, tiny):
    alone = [model(tiny.photo(number), seed=seed) for number, seed in ((0, 1), (1, 7), (0, 2))]
    together = model.batch([tiny.photo(0), tiny.photo(1), tiny.photo(0)], [1, 7, 2])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.coords, other.coords)
        assert torch.equal(one.gaussians.means, other.gaussians.means)
    assert not torch.equal(alone[0].coords, alone[2].coords)
    assert alone[0].camera == alone[2].camera != alone[1].camera


def test_a_tilted_camera_sees_the_voxels_elsewhere(model, tiny):
    """The features that both stages read are looked up at the camera: another one gives another object."""
    stages = model.stages
    (photo,) = model.photos(tiny.photo(), True, "auto")
    with torch.inference_mode():
        seen = stages.look(photo)
        settings = model.structure_settings
        logits = [
            stages.logits(
                replace(seen, camera=replace(seen.camera, elevation=e)),
                settings,
                torch.Generator().manual_seed(0),
            )
            for e in (0.0, 0.0, 50.0)
        ]
    assert torch.equal(logits[0], logits[1])
    assert float((logits[0] - logits[2]).abs().max()) > 1e-3


def test_fitting_to_the_photo_comes_closer_to_it(model, tiny):
    size = 256
    plain = model(tiny.photo(), seed=3, refine=0)
    fit = model(tiny.photo(), seed=3, refine=12)
    picture = plain.photos[0].picture.permute(1, 2, 0)

    def error(result):
        drawn = render(
            result.gaussians,
            result.camera.viewmat[None],
            result.camera.K(size)[None],
            size,
            size,
            background=0.5,
        )
        return float((drawn.colors[0] - picture).square().mean())

    assert error(fit) < 0.8 * error(plain)
    assert "refine" in fit.seconds and "refine" not in plain.seconds


def test_the_fit_takes_the_crop_that_the_stages_saw(model, tiny, monkeypatch):
    crops = []

    def counted(photo, size):
        crops.append(crop_of(photo, size))
        return crops[-1]

    monkeypatch.setattr(photo_frame, "crop_of", counted)
    assert "refine" in model(tiny.photo(), seed=3, refine=2).seconds
    assert len(crops) == 1


def test_guidance_and_steps_are_heeded(model, tiny):
    plain = model(tiny.photo(), seed=3)
    for change in ({"guidance_scale": 1.0}, {"num_steps": 5}, {"shift": 1.0}):
        other = model(tiny.photo(), seed=3, structure=replace(model.structure_settings, **change))
        assert not torch.equal(other.coords, plain.coords), change


def test_what_it_cannot_take_is_said(model, tmp_path, tiny):
    with pytest.raises(InputError, match="one photo"):
        model([tiny.photo(0), tiny.photo(1)])
    with pytest.raises(InputError, match="not text"):
        model("a chair")
    token_model = ImageTo3D.from_pretrained(str(tiny.write_generator(tmp_path / "tokens")))
    with pytest.raises(InputError, match="where the photo was taken from"):
        token_model(tiny.photo(), refine=5)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda info: info["settings"].pop("map_deviations"), "map_deviations"),
        (lambda info: info["settings"]["fine_maps"]["std"].pop(), "fine_maps"),
        (lambda info: info["networks"].pop("occupancy_flow"), "occupancy_flow"),
    ],
)
def test_a_damaged_bundle_is_refused(bundle, tmp_path, damage, complaint, tiny):
    for path in bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    info = json.loads((tmp_path / MODEL_FILE).read_text())
    damage(info)
    (tmp_path / MODEL_FILE).write_text(json.dumps(info))
    with pytest.raises(InputError, match=complaint):
        ImageTo3D.from_pretrained(str(tmp_path))


def test_low_memory_gives_the_same(bundle, model, tiny):
    spare = ImageTo3D.from_pretrained(str(bundle), low_memory=True)
    assert torch.equal(spare(tiny.photo(), seed=4).coords, model(tiny.photo(), seed=4).coords)


def test_the_command_records_frame_and_camera(bundle, tmp_path, tiny):
    from diff2to3.cli import main

    assert generate is not None
    photo = tmp_path / "disc.png"
    tiny.photo().save(photo)
    arguments = ["generate", str(photo), "--model", str(bundle), "-o", str(tmp_path / "out"), "--refine", "3"]
    assert main([*arguments, "--turntable", "none"]) == 0
    (path,) = (tmp_path / "out").rglob("metadata.json")
    metadata = json.loads(path.read_text())
    assert metadata["model_frame"] == "photo"
    camera = read_camera(path)
    assert math.isfinite(camera.elevation) and camera.focal > 0.5
    assert main([*arguments[:-1], "-1", "--turntable", "none"]) == 2
