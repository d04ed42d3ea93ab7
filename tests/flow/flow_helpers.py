"""Small networks and random inputs for the tests of flow models."""

import itertools

import torch

from diff2to3.flow.networks import FlowConfig, build_network
from diff2to3.flow.tokens import ImageTokens
from diff2to3.types import SparseVoxels

SMALL = {
    "channels": 3,
    "width": 48,
    "num_double": 2,
    "num_single": 2,
    "num_heads": 2,
    "image_channels": 5,
    "io_channels": [8],
}


def small_config(stage="latents", **values):
    sizes = {"resolution": 8, "patch_size": 2} if stage == "latents" else {"resolution": 4, "patch_size": 2}
    return FlowConfig(stage=stage, **{**SMALL, **sizes, **values})


def randomised(config, generator, std=0.15, dtype=torch.float64):
    """The network with every weight drawn, so that nothing is zero as at the start of training."""
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype)


def random_voxels(generator, counts, resolution=8, channels=3, dtype=torch.float64):
    items = []
    for count in counts:
        cells = torch.randperm(resolution**3, generator=generator)[:count].sort().values
        xyz = torch.stack([cells // resolution**2, cells // resolution % resolution, cells % resolution], 1)
        feats = torch.randn(count, channels, generator=generator, dtype=dtype)
        items.append(SparseVoxels.from_coords(torch.nn.functional.pad(xyz, (1, 0)), feats, resolution))
    return SparseVoxels.cat(items)


def random_image(generator, sizes, channels=5, dtype=torch.float64):
    """Tokens of images of different sizes (pixels of the latents); (0, 0) for none."""
    items = []
    for height, width in sizes:
        if height == 0:
            items.append(ImageTokens.none(1, 4 * channels).to(dtype=dtype))
        else:
            latents = torch.randn(1, channels, height, width, generator=generator, dtype=dtype)
            items.append(ImageTokens.from_latents(latents, 2))
    return ImageTokens.cat(items)


def split_image(image):
    """One ImageTokens an item."""
    bounds = image.cu_seqlens.tolist()
    items = []
    for start, stop in itertools.pairwise(bounds):
        rows = slice(start, stop)
        ends = torch.tensor([0, stop - start], dtype=torch.int32)
        items.append(ImageTokens(image.feats[rows], image.indices[rows], image.grids[rows], ends))
    return items
