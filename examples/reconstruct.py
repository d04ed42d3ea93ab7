"""A 3D file through the 2to3-VAE and back: what the representation keeps of an asset.

python examples/reconstruct.py eval/examples/house.glb out/      (needs pip install ".[data]")
"""

import sys
from pathlib import Path

import torch

from diff2to3 import Reconstructor, load_mesh
from diff2to3.formats import write
from diff2to3.gaussians.render import render_pictures
from diff2to3.metrics.image import psnr

mesh, out = load_mesh(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)

made = Reconstructor.from_pretrained("mini")(mesh)
write(out / "reconstruction.ply", made.gaussians)

views = made.views
size = views.images.shape[1]
images, _ = render_pictures(made.gaussians, views.viewmats, views.Ks, size, size, background=1.0)
truth = views.images * views.alphas[..., None] + (1 - views.alphas[..., None])
latents = made.latents.feats
print(f"{len(mesh.faces):,} triangles -> {latents.shape[0]:,} voxels of {latents.shape[1]} numbers")
print(f"PSNR of {len(images)} views: {float(torch.as_tensor(psnr(images, truth)).mean()):.1f} dB")
