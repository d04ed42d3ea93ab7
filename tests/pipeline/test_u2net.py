"""The small U²-Net: its weights, and its masks against numbers that onnxruntime made of the published file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.checkpoint import read_tensors
from diff2to3.pipeline.u2net import FOLDER, U2NetP, network, saliency

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")

#: onnxruntime 1.25 on u2netp.onnx: means over 40 × 40 pixels of the example car on blue-grey, after the map's own
#: minimum and maximum became 0 and 1.
CAR = [
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0.040, 0.005, 0, 0],
    [0, 0, 0.205, 0.686, 0.977, 0.951, 0.302, 0],
    [0, 0.075, 0.858, 1, 1, 1, 0.466, 0],
    [0, 0.787, 1, 0.997, 1, 0.999, 0.236, 0],
    [0.092, 0.945, 1, 1, 0.796, 0.155, 0, 0],
    [0, 0.052, 0.396, 0.532, 0.125, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
]


def test_masks_are_those_of_the_published_network():
    cut = Image.open(ROOT / "eval" / "examples" / "suv.png").convert("RGBA")
    photo = Image.new("RGBA", cut.size, (120, 140, 160, 255))
    photo.alpha_composite(cut)
    found = saliency(photo.convert("RGB"))
    assert found.shape == (320, 320) and found.min() == 0 and found.max() == pytest.approx(1, abs=1e-6)
    coarse = found.reshape(8, 40, 8, 40).mean((1, 3))
    # weights in float16 move an outline a little
    assert np.abs(coarse - CAR).max() < 0.004
    truth = np.asarray(cut.getchannel("A").resize((320, 320))) > 127
    inside = found > 0.5
    assert (inside & truth).sum() / (inside | truth).sum() > 0.95


def test_weights_are_small_and_all_used():
    tensors = read_tensors(FOLDER / "u2netp.safetensors")
    assert tensors.keys() == U2NetP().state_dict().keys()
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert sum(value.numel() for value in tensors.values()) == 1_125_485
    assert (FOLDER / "u2netp.safetensors").stat().st_size < 2_300_000
    assert "Apache License" in (FOLDER / "LICENSE-U2Net").read_text(encoding="utf-8")


def test_any_size_goes_through():
    """Odd sides are halved upwards and come back."""
    with torch.inference_mode():
        out = network()(torch.randn(2, 3, 70, 101, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (2, 1, 70, 101) and 0 <= float(out.min()) <= float(out.max()) <= 1
    assert np.isfinite(saliency(Image.new("RGB", (9, 30)))).all()


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"]])
def test_help_does_not_wait_for_it(words):
    program = (
        "import sys\nfrom diff2to3.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', [m for m in sys.modules if 'u2net' in m], 'torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("loaded: []")
    if words == ["--help"]:
        assert last.endswith("False")
