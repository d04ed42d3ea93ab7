"""The condition picture: the object's place and size in it, its edges, and what is behind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diff2to3.flow.framing import Framing, frame


def rectangle(height, width, box, color=(0.2, 0.6, 0.9)):
    left, top, right, bottom = box
    image, alpha = torch.ones(height, width, 3), torch.zeros(height, width)
    image[top:bottom, left:right] = torch.tensor(color)
    alpha[top:bottom, left:right] = 1
    return image, alpha


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(4, 60), st.integers(4, 60), st.floats(1.0, 2.0))
def test_object_is_centred_at_its_share(left, top, width, height, margin):
    """Wherever it was, also at the rim: the longer side takes 1/margin of the picture, the middle is kept."""
    image, alpha = rectangle(100, 100, (left, top, left + width, top + height))
    framing = Framing(128, margin, background=0.0)
    out = frame(image, alpha, framing)
    assert out.shape == (3, 128, 128)
    covered = out[2] / 0.9  # white behind the object does not shine through
    assert float(covered.max()) <= 1 + 1e-5
    side = round(max(width, height) * margin)
    assert float(covered.sum()) == pytest.approx(width * height * (128 / side) ** 2, rel=0.03)
    ys, xs = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    for axis in (xs, ys):
        middle = float((axis * covered).sum() / covered.sum())
        assert middle == pytest.approx(64, abs=128 / side)  # half a source pixel, and rounding


def test_resizing_agrees_with_pillow():
    """Pillow's triangle filter on the premultiplied crop is the same map."""
    rng = np.random.default_rng(0)
    alpha = np.zeros((90, 80), np.float32)
    alpha[20:70, 10:70] = 1
    image = rng.random((90, 80, 3), dtype=np.float32)
    out = frame(torch.from_numpy(image), torch.from_numpy(alpha), Framing(24, 1.0, 0.25))
    # a box of 60 x 50: a square of 60 from (10, 15)
    layers = [*(image * alpha[..., None]).transpose(2, 0, 1), alpha]
    resized = [
        np.asarray(Image.fromarray(x[15:75, 10:70]).resize((24, 24), Image.Resampling.BILINEAR))
        for x in layers
    ]
    expected = np.stack(resized[:3]) + (1 - resized[3]) * 0.25
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("bad", [{"size": 0}, {"margin": 0.5}, {"margin": float("nan")}, {"background": 2.0}])
def test_impossible_framings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Framing(**bad)
