"""A tiny generator of the photo frame with random weights: what tests of that frame run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_to_dict
from diff2to3.flow.config import LatentSMDiTConfig
from diff2to3.flow.efficientnet import EfficientNetConfig, EfficientNetLite
from diff2to3.flow.smdit import LatentSMDiT
from diff2to3.photo.encoder import PhotoEncoder, PhotoEncoderConfig
from diff2to3.photo.occupancy import OccupancyFlow, OccupancyFlowConfig
from diff2to3.vae.config import DecoderConfig, GaussianConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.voxels.mini_encoder import MiniEncoder, MiniEncoderConfig

RESOLUTION, CHANNELS, IMAGE_CHANNELS = 16, 4, 5


def statistics(channels: int, shift: float) -> dict[str, list[float]]:
    return {
        "mean": [shift * i for i in range(channels)],
        "std": [1.0 + 0.01 * i for i in range(channels)],
    }


SETTINGS: dict[str, Any] = {
    "frame": "photo",
    "samplers": {
        "structure": {"num_steps": 3, "guidance_scale": 1.5, "shift": 2.0},
        "latent": {"num_steps": 2, "guidance_scale": 1.5, "shift": 1.0},
    },
    "map_deviations": [1.3, 0.8],
    "latents": statistics(CHANNELS, 0.1),
    "image_latents": statistics(IMAGE_CHANNELS, -0.1),
    "fine_maps": statistics(40, 0.01),
    "coarse_maps": statistics(112, 0.0),
    "refine": 0,
}


def networks(seed: int = 0) -> dict[str, nn.Module]:
    """All six."""
    lifted = 8 + IMAGE_CHANNELS + 40
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        made: dict[str, nn.Module] = {
            "photo_maps": EfficientNetLite(EfficientNetConfig(11, 1)),
            "photo_encoder": PhotoEncoder(
                PhotoEncoderConfig(widths=(8, 8, 16), plane_channels=4, frustum_channels=2, depth_bins=6)
            ),
            "occupancy_flow": OccupancyFlow(
                OccupancyFlowConfig(
                    resolution=RESOLUTION, fine_width=8, coarse_width=16, num_coarse=1, time_width=16,
                    plane_channels=4, frustum_channels=2, token_channels=16,
                )
            ),
            "image_encoder": MiniEncoder(
                MiniEncoderConfig(
                    fine_width=8, num_fine=1, coarse_width=8, num_coarse=1, latent_channels=IMAGE_CHANNELS
                )
            ),
            "latent_flow": LatentSMDiT(
                LatentSMDiTConfig(
                    resolution=RESOLUTION, in_channels=CHANNELS, out_channels=CHANNELS, width=32, num_heads=2,
                    image_channels=4 * IMAGE_CHANNELS + 112, image_patch_size=2, lifted_channels=lifted, num_double=1,
                    num_single=1, patch_size=2, io_channels=[16], num_io_blocks=1, rope_theta=100.0,
                )
            ),
            "decoder": Decoder(
                DecoderConfig(
                    resolution=RESOLUTION, width=16, num_blocks=1, num_heads=2, latent_channels=CHANNELS,
                    gaussians=GaussianConfig(per_voxel=4, scale_bias=0.02, opacity_bias=0.6),
                )
            ),
        }  # fmt: skip
        for name, network in made.items():
            for parameter in network.parameters():
                if name != "photo_maps":
                    parameter.data = 0.2 * torch.randn(parameter.shape)
        made["occupancy_flow"].out_layer.bias.data.fill_(-0.4)  # type: ignore[union-attr, operator]
    return made


def write_photo_generator(folder: Path) -> Path:
    """The bundle."""
    made: dict[str, Any] = networks()
    entries = {
        name: NetworkEntry(type(net).__name__, config_to_dict(net.config), f"{name}.safetensors")
        for name, net in made.items()
    }
    info = BundleInfo("image-to-3d", entries, SETTINGS, "MIT", "random")
    save_bundle(folder, info, {name: net.state_dict() for name, net in made.items()})
    return folder
