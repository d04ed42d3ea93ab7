"""Renders a file of Gaussians from all sides, with the differentiable rasteriser, and measures a gradient.

python examples/render_a_turn.py asset.ply turn.png
"""

import sys

import numpy as np
import torch
from PIL import Image

from diff2to3.formats import read
from diff2to3.gaussians.render import render, to_uint8
from diff2to3.views import CameraConfig, sample_cameras

path, out = sys.argv[1:3]
gaussians, metadata = read(path)
print(f"{len(gaussians):,} Gaussians, frame: {metadata['frame']}")

cameras = CameraConfig("orbit", num_views=4, fov_degrees=40.0, elevation=20.0)
viewmats, Ks = sample_cameras(cameras, 192, 192, np.random.default_rng(0))
with torch.no_grad():
    seen = render(gaussians, viewmats, Ks, 192, 192, background=1.0)
Image.fromarray(np.concatenate(list(to_uint8(seen.colors).numpy()), 1)).save(out)

# everything is differentiable: how would the first view get brighter?
gaussians.sh.requires_grad_(True)
render(gaussians, viewmats[:1], Ks[:1], 192, 192, background=1.0).colors.mean().backward()
print(f"gradient of the mean colour: {float(gaussians.sh.grad.abs().sum()):.3f}")
