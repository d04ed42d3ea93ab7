"""What precision things are computed in, whatever the device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diff2to3
from diff2to3.flow.config import DiTConfig, LatentDiTConfig, LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.types import SparseVoxels
from diff2to3.vae.config import DecoderConfig, EncoderConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder

ROOT = Path(diff2to3.__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("diff2to3/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("kernels/*.py")])
SWITCHES = re.compile(r"\.allow_tf32\s*=|set_float32_matmul_precision|fp32_precision\s*=")


def test_nothing_turns_tf32_on() -> None:
    """SSIM subtracts products of float32 matrices that nearly cancel; a global switch would reach it too."""
    assert len(SOURCES) > 100
    assert [str(path) for path in SOURCES if SWITCHES.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "line", ["torch.backends.cuda.matmul.allow_tf32 = True", "set_float32_matmul_precision('high')"]
)
def test_the_switches_are_recognised(line: str) -> None:
    assert SWITCHES.search(line)


# ---- autocast ----

COORDS = torch.nn.functional.pad(torch.cartesian_prod(*[torch.arange(4)] * 3), (1, 0)).to(torch.int32)
TIME = torch.tensor([0.5])


def voxels(channels: int) -> SparseVoxels:
    return SparseVoxels.from_coords(COORDS, torch.randn(len(COORDS), channels), 8)


def structure_smdit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    config = SMDiTConfig(
        in_channels=3, out_channels=3, resolution=4, patch_size=2, width=24, num_heads=2, num_double=1, num_single=1,
        image_channels=4, position="ape",
    )  # fmt: skip
    image = ImageTokens.from_latents(torch.randn(1, 4, 8, 8), 2)
    return StructureSMDiT(config), lambda net: net(torch.randn(1, 3, 4, 4, 4), TIME, image)


def latent_smdit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    config = LatentSMDiTConfig(
        in_channels=3, out_channels=3, resolution=8, patch_size=2, width=24, num_heads=2, num_double=1, num_single=1,
        image_channels=4, io_channels=[8], num_io_blocks=1, position="ape",
    )  # fmt: skip
    image = ImageTokens.from_latents(torch.randn(1, 4, 8, 8), 2)
    return LatentSMDiT(config), lambda net: net(voxels(3), TIME, image)


def structure_dit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    config = DiTConfig(
        in_channels=3,
        out_channels=3,
        resolution=4,
        patch_size=1,
        width=24,
        num_heads=2,
        num_blocks=1,
        cond_channels=6,
    )
    return StructureDiT(config), lambda net: net(torch.randn(1, 3, 4, 4, 4), TIME, torch.randn(1, 5, 6))


def latent_dit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    config = LatentDiTConfig(
        in_channels=3, out_channels=3, resolution=8, patch_size=2, width=24, num_heads=2, num_blocks=1,
        cond_channels=6, io_channels=[8], num_io_blocks=1,
    )  # fmt: skip
    return LatentDiT(config), lambda net: net(voxels(3), TIME, torch.randn(1, 5, 6))


TORSO = {"resolution": 8, "width": 24, "num_blocks": 2, "num_heads": 2, "latent_channels": 3}
GRID = StructureConfig(latent_channels=4, num_res_blocks=1, num_middle_blocks=1, channels=[8, 8])


def vae_encoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    return Encoder(EncoderConfig(**TORSO, in_channels=5, linear_path=True)), lambda net: net(voxels(5)).mean


def vae_decoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    return Decoder(DecoderConfig(**TORSO, linear_path=True)), lambda net: net.raw(voxels(3)).offsets


def structure_encoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    return StructureEncoder(GRID), lambda net: net(torch.rand(1, 1, 8, 8, 8)).mean


def structure_decoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    return StructureDecoder(GRID), lambda net: net(torch.randn(1, 4, 4, 4, 4))


NETWORKS = [structure_smdit, latent_smdit, structure_dit, latent_dit]
NETWORKS += [vae_encoder, vae_decoder, structure_encoder, structure_decoder]
#: Layers at a network's edges, by the start of their names.
EDGES = ("input_layer", "out_layer", "linear_path", "image_layer", "t_embedder")


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_autocast_leaves_the_edges_of_networks_in_float32(make: Callable[[], Any]) -> None:
    network, call = make()
    dtypes: dict[str, torch.dtype] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: dtypes.update({name: output.dtype})

    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            module.register_forward_hook(watch(name))
    with torch.autocast("cpu", torch.bfloat16):
        out = call(network)
    assert out.dtype == torch.float32
    edges = {name: dtype for name, dtype in dtypes.items() if name.startswith(EDGES)}
    assert len(edges) >= 2 and set(edges.values()) == {torch.float32}, edges
    assert torch.bfloat16 in {dtype for name, dtype in dtypes.items() if name not in edges}
