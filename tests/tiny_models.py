"""Tiny models with random weights, and tiny assets: what tests of whole programs run on."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_to_dict
from diff2to3.vae.config import DecoderConfig, EncoderConfig, GaussianConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder

RESOLUTION = 8
#: Small and unlit: a second for everything.
SETTINGS = {
    "views": {
        "size": 32,
        "cameras": {"kind": "sphere", "num_views": 3},
        "render": {"lighting": {"mode": "unlit"}, "supersample": 1},
    },
    "features": [{"provider": "rgb"}, {"provider": "surface"}],
}


def write_vae(folder: Path, structure: bool = True, seed: int = 0) -> Path:
    """A bundle of encoder, decoder and, with ``structure``, the sparse-structure VAE."""
    torso = {
        "resolution": RESOLUTION,
        "width": 16,
        "num_blocks": 1,
        "num_heads": 2,
        "block": "convolution",
        "conv_kernel": "cross",
    }
    grid = StructureConfig(latent_channels=4, num_res_blocks=1, num_middle_blocks=1, channels=[8, 8])
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        encoder = Encoder(EncoderConfig(**torso, in_channels=31, latent_channels=4, linear_path=True))
        gaussians = GaussianConfig(per_voxel=2, scale_bias=0.06, opacity_bias=0.9)
        decoder = Decoder(DecoderConfig(**torso, latent_channels=4, linear_path=True, gaussians=gaussians))
        networks = {"encoder": encoder, "decoder": decoder}
        if structure:
            networks |= {
                "structure_encoder": StructureEncoder(grid),
                "structure_decoder": StructureDecoder(grid),
            }
    entries = {
        name: NetworkEntry(type(net).__name__, config_to_dict(net.config), f"{name}.safetensors")
        for name, net in networks.items()
    }
    settings = {**SETTINGS, "latents": {"mean": [0.0] * 4, "std": [1.0] * 4}}
    tensors = {name: net.state_dict() for name, net in networks.items()}
    save_bundle(folder, BundleInfo("vae", entries, settings, "MIT", "random"), tensors)
    return folder


def box(extents: tuple[float, float, float], color: tuple[float, float, float]) -> bytes:
    """A box of one colour, as GLB."""
    import trimesh

    mesh = trimesh.creation.box(extents)
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*color, 1.0], metallicFactor=0.0)
    mesh.visual = trimesh.visual.TextureVisuals(material=material)
    return bytes(trimesh.Scene(mesh).export(file_type="glb"))


def write_assets(folder: Path, broken: bool = True) -> Path:
    """Two zips and a manifest: four boxes in ``val``, two in ``train``; one of ``val`` is not a GLB if ``broken``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    rows = []
    for pack, count in (("plain", 4), ("other", 2)):
        with zipfile.ZipFile(folder / f"{pack}.zip", "w") as archive:
            for number in range(count):
                shape, color = generator.uniform(0.4, 1, 3), generator.uniform(0, 1, 3)
                data = box(tuple(shape), tuple(color))
                if broken and (pack, number) == ("plain", 3):
                    data = data[: len(data) // 2]
                name = f"{pack}/box-{number}"
                archive.writestr(f"{name}.glb", data)
                split = "train" if number == 0 else "val"
                rows.append({"id": name, "file": f"{name}.glb", "pack": pack, "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
