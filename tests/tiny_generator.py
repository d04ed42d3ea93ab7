"""A tiny generator with random weights: what tests of generation run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_to_dict
from diff2to3.flow.networks import FlowConfig, build_network
from diff2to3.vae.config import DecoderConfig, GaussianConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.sparse_structure import StructureDecoder
from diff2to3.voxels.mini_encoder import MiniEncoder, MiniEncoderConfig

CHANNELS, GRID, RESOLUTION = 4, 4, 16
SETTINGS: dict[str, Any] = {
    "samplers": {
        "structure": {"num_steps": 3, "guidance_scale": 2.0, "guidance_interval": [0.3, 1.0], "shift": 2.0},
        "latent": {"num_steps": 2, "guidance_scale": 1.5, "guidance_interval": [0.0, 1.0], "shift": 1.0},
    },
    "structure_latents": {"mean": [0.1 * i for i in range(4)], "std": [1.0 + 0.1 * i for i in range(4)]},
    "latents": {"mean": [-0.2, 0.0, 0.1, 0.3], "std": [0.5, 1.0, 1.5, 2.0]},
    "image_latents": {"mean": [-1.0, 0.0, 1.0, 2.0], "std": [2.0, 3.0, 4.0, 5.0]},
    "condition": {"size": 32, "margin": 1.25, "background": 0.5},
}


def networks(backbone: str = "smdit", seed: int = 0) -> dict[str, nn.Module]:
    """All five. About a seventh of the cells are active, and everything has an effect on the result."""
    same = {
        "backbone": backbone, "position": "marope" if backbone == "smdit" else "ape", "channels": CHANNELS,
        "width": 32, "num_heads": 2, "num_double": 1, "num_single": 1,
    }  # fmt: skip
    gaussians = GaussianConfig(per_voxel=4, scale_bias=0.02, opacity_bias=0.6)
    torso = {"resolution": RESOLUTION, "width": 16, "num_blocks": 1, "num_heads": 2}
    grid = StructureConfig(
        latent_channels=CHANNELS, num_res_blocks=1, num_middle_blocks=1, channels=[16, 8, 8]
    )
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        made: dict[str, Any] = {
            "structure_flow": build_network(
                FlowConfig(
                    stage="structure",
                    resolution=GRID,
                    patch_size=1,
                    io_channels=[],
                    image_channels=CHANNELS,
                    **same,
                )
            ),
            "structure_decoder": StructureDecoder(grid),
            "latent_flow": build_network(
                FlowConfig(
                    stage="latents", resolution=RESOLUTION, io_channels=[16], image_channels=CHANNELS, **same
                )
            ),
            "decoder": Decoder(DecoderConfig(**torso, latent_channels=CHANNELS, gaussians=gaussians)),
            "image_encoder": encoder(CHANNELS),
        }
        for network in made.values():
            for parameter in network.parameters():
                parameter.data = 0.2 * torch.randn(parameter.shape)
        with torch.no_grad():
            logits = made["structure_decoder"](torch.randn(1, CHANNELS, GRID, GRID, GRID))
            made["structure_decoder"].out_layer[2].bias.data -= logits.quantile(0.85)
    return made


def encoder(channels: int) -> MiniEncoder:
    return MiniEncoder(
        MiniEncoderConfig(fine_width=8, num_fine=1, coarse_width=8, num_coarse=1, latent_channels=channels)
    )


def write_generator(folder: Path, backbone: str = "smdit", leave_out: tuple[str, ...] = ()) -> Path:
    """The bundle."""
    made = networks(backbone)
    kept = {name: net for name, net in made.items() if name not in leave_out}
    entries = {
        name: NetworkEntry(type(net).__name__, config_to_dict(net.config), f"{name}.safetensors")
        for name, net in kept.items()
    }
    kind = "vae" if leave_out else "image-to-3d"
    info = BundleInfo(kind, entries, SETTINGS, "MIT", "random")
    save_bundle(folder, info, {name: net.state_dict() for name, net in kept.items()})
    return folder


def photo(number: int = 0) -> Any:
    """A coloured disc on transparency, off centre: a PIL image."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:90, :120]
    inside = (x - 70) ** 2 + (1 + number) * (y - 40) ** 2 < 30**2
    pixels = np.stack([x * 2, (y * 2 + 60 * number) % 256, 255 - x, inside * 255], -1).astype(np.uint8)
    return Image.fromarray(pixels)
