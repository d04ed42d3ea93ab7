"""A small made-up dataset of latents, random decoders of them, and tasks on these."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_tensors

from diff2to3.data.encodings import moments
from diff2to3.data.pictures import encode_image
from diff2to3.data.plan import PlannedAsset, asset_key, write_plan
from diff2to3.data.shards import Part, assemble, part_path, write_part
from diff2to3.vae.config import DecoderConfig, GaussianConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.sparse_structure import StructureDecoder

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder's helpers, within reach of its tests

from flow_runs import VIEWS, random_bundle

#: Views an asset to compare renderings with: as many as validation needs.
NUM_TARGETS = 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six assets of 8³ voxels with random latents, occupancy latents, image latents of three views (of stage 1's own
    encoder, too: twice the first two channels of the others), and pictures."""
    root = tmp_path_factory.mktemp("flow-data")
    generator = torch.Generator().manual_seed(7)
    plan = [PlannedAsset(0, asset_key(f"a{i}"), f"a{i}", "val" if i == 5 else "train") for i in range(6)]
    write_plan(root, plan)
    members: dict[str, list[tuple[dict, dict]]] = {
        "voxels_8": [],
        "latents_x": [],
        "structures_x": [],
        "tokens_x": [],
        "views_target": [],
        "points_50": [],
    }
    viewmat, K = torch.eye(4), torch.tensor([[24.0, 0, 12], [0, 24, 12], [0, 0, 1]])
    viewmat[2, 3] = 1.5
    cameras = save_tensors({"viewmats": viewmat.repeat(NUM_TARGETS, 1, 1), "Ks": K.repeat(NUM_TARGETS, 1, 1)})
    for i in range(6):
        cells = torch.randperm(512, generator=generator)[: 20 + 10 * i].sort().values
        coords = torch.stack([cells // 64, cells // 8 % 8, cells % 8], 1).to(torch.uint8)
        mean = 3 + 2 * torch.randn(len(coords), 4, generator=generator)
        dense = torch.randn(4, 4, 4, 4, generator=generator)
        points = {"points": (torch.rand(50, 3, generator=torch.Generator().manual_seed(i)) - 0.5).half()}
        members["points_50"].append(({"points.safetensors": points}, {"num_points": 50}))
        images = {
            f"{v:03d}.safetensors": {"latents": torch.randn(3, 8, 8, generator=generator)}
            for v in range(VIEWS)
        }
        rows = torch.stack([im["latents"] for im in images.values()]).permute(0, 2, 3, 1).flatten(0, 2)
        members["voxels_8"].append(({"coords.safetensors": {"coords": coords}}, {"num_voxels": len(coords)}))
        members["latents_x"].append(({"latents.safetensors": {"mean": mean}}, moments(mean)))
        members["structures_x"].append(
            ({"latents.safetensors": {"mean": dense}}, moments(dense.flatten(1).T))
        )
        members["tokens_x"].append((images, {"num_views": VIEWS, **moments(rows)}))
        pictures = {
            f"{v:03d}.webp": encode_image(torch.rand(24, 24, 3, generator=generator), torch.ones(24, 24))
            for v in range(NUM_TARGETS)
        }
        members["views_target"].append(
            ({**pictures, "cameras.safetensors": cameras}, {"num_views": NUM_TARGETS})
        )
    for stage, items in members.items():
        (root / stage).mkdir()
        settings: dict = {}
        if stage.startswith("tokens_"):
            settings = {"size": 64, "margin": 1.2, "background": 0.5}
        (root / stage / "settings.json").write_text(json.dumps(settings))
        for asset, (files, info) in zip(plan, items, strict=True):
            stored = {n: x if isinstance(x, bytes) else save_tensors(x) for n, x in files.items()}
            part = Part(stored, info)
            write_part(part_path(root, stage, 0, asset.key), asset.key, part, "s")
        assemble(root, stage, 0, [(a.id, a.key, "s") for a in plan])
    return root


@pytest.fixture(scope="module")
def structure_bundle(tmp_path_factory):
    """A random decoder from 4³ × 4 latents to 8³ cells."""
    config = StructureConfig(latent_channels=4, num_res_blocks=1, num_middle_blocks=1, channels=[6, 4])
    torch.manual_seed(3)
    return random_bundle(tmp_path_factory, "structure_decoder", StructureDecoder(config), 0.3)


@pytest.fixture(scope="module")
def decoder_bundle(tmp_path_factory):
    """A random decoder from latents on 8³ cells to two Gaussians each."""
    gaussians = GaussianConfig(per_voxel=2, opacity_bias=0.5, scale_bias=0.03)
    config = DecoderConfig(
        resolution=8, latent_channels=4, width=16, num_blocks=1, num_heads=2, window=4, gaussians=gaussians
    )
    torch.manual_seed(5)
    return random_bundle(tmp_path_factory, "decoder", Decoder(config), 0.15)
