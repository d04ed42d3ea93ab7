"""The generator inside the package, on the pictures inside the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_helpers import difference

from diff2to3.hub import EMBEDDED
from diff2to3.metrics.geometry import voxel_iou
from diff2to3.pipeline import ImageTo3D, Result
from diff2to3.pipeline.turntable import turntable

EXAMPLES = Path(__file__).resolve().parents[2] / "eval" / "examples"
NAMES = ("ambulance", "suv", "trunk")

pytestmark = pytest.mark.skipif(
    not (EMBEDDED / "mini-photo" / "latent_flow.safetensors").is_file(), reason="the package has no generator"
)


@pytest.fixture(scope="module")
def model() -> ImageTo3D:
    return ImageTo3D.from_pretrained("mini-photo")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.open(EXAMPLES / f"{name}.png") for name in NAMES]


@pytest.fixture(scope="module")
def alone(model: ImageTo3D, pictures: list[Image.Image]) -> list[Result]:
    return [model(picture, seed=i) for i, picture in enumerate(pictures)]


def mean_color(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Of pixels uint8 [..., 3] that show the object, in [0, 1]."""
    return image[seen].mean(0) / 255


def test_the_same_seed_gives_the_same_alone_and_in_a_batch(
    model: ImageTo3D, pictures: list[Image.Image], alone: list[Result]
) -> None:
    """Bit by bit when repeated, to rounding when packed with others."""
    assert difference(model(pictures[1], seed=1), alone[1]) == 0
    for single, packed in zip(alone, model.batch(pictures, list(range(len(pictures)))), strict=True):
        assert difference(single, packed) < 1e-4


#: Runs the command, by itself or after importing what compiles, and tells whether that is imported in the end.
COMMAND = """
import importlib, sys
[importlib.import_module(name) for name in sys.argv[3:]]
from diff2to3.cli import main
code = main(["generate", sys.argv[1], "-o", sys.argv[2], "--refine", "0"])
print(code, "torch._dynamo" in sys.modules)
"""


def test_the_command_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    """Importing torch._dynamo takes a second; without it the kernels are called another way, and give the same.
    (The fit to the photo needs the rasteriser's gradients, for which torch imports it.)
    """
    for name, modules in (("plain", []), ("compiler", ["torch._dynamo"])):
        words = [sys.executable, "-c", COMMAND, EXAMPLES / "suv.png", tmp_path / name, *modules]
        ended = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        assert ended.stdout.split()[-2:] == ["0", str(bool(modules))]
    plain, compiler = (tmp_path / name / "suv" / "suv.ply" for name in ("plain", "compiler"))
    assert plain.read_bytes() == compiler.read_bytes()


def test_a_sharper_photo_gives_the_same_object(
    model: ImageTo3D, pictures: list[Image.Image], alone: list[Result]
) -> None:
    """Enlarged and reduced photos of the same object give nearly the same voxels."""
    for i, (picture, usual) in enumerate(zip(pictures, alone, strict=True)):
        for factor, least in ((0.7, 0.6), (3.0, 0.6)):
            resized = picture.resize([round(side * factor) for side in picture.size], Image.Resampling.BOX)
            assert voxel_iou(model(resized, seed=i, refine=0).coords, usual.coords) > least, (
                NAMES[i],
                factor,
            )


def test_objects_have_the_size_and_the_colour_of_the_picture(
    pictures: list[Image.Image], alone: list[Result]
) -> None:
    """The mean colour over a turntable is within 0.15 of the picture's, and its hue nearer to its own picture's than to
    any other's (how bright it is depends on sides that the picture does not show).
    """
    wanted = []
    for picture in pictures:
        rgba = np.asarray(picture.convert("RGBA"))
        wanted.append(mean_color(rgba[..., :3], rgba[..., 3] > 250))
    for i, result in enumerate(alone):
        coords = result.latents.coords[:, 1:]
        assert 300 < len(coords) < 12_000
        assert (
            int((coords.max(0).values - coords.min(0).values).max()) >= 20
        )  # the silhouette spans 0.85 of the cube
        black, white = (turntable(result.gaussians, 6, 96, background=b) / 255 for b in (0.0, 1.0))
        opacity = 1 - (white - black)  # white is a colour too
        found = black.sum((0, 1, 2)) / opacity.sum((0, 1, 2))
        assert float(np.abs(found - wanted[i]).mean()) < 0.15, NAMES[i]
        hues = [float(np.abs(found / found.sum() - color / color.sum()).mean()) for color in wanted]
        assert hues[i] == min(hues), (NAMES[i], hues)
