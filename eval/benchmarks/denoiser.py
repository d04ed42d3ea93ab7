"""Time and memory of TRELLIS-image-large's networks at full size, with random weights.

    python eval/benchmarks/denoiser.py --tokens 5000 --dtypes float32,bfloat16
    python eval/benchmarks/denoiser.py --device cuda --dtypes bfloat16,float16 --repeats 5

The paper's own networks, SMDiT at full size, are measured by ``python eval/gpu.py --section denoiser``.
Prints, per dtype of the torso, seconds of one forward pass of the latent flow model (best of the repeats),
the rate of its matrix products, and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from diff2to3.flow.config import LatentDiTConfig
from diff2to3.flow.dit import LatentDiT
from diff2to3.types import SparseVoxels

COND_TOKENS = 1374  # DINOv2 at 518²: 37² patches, 4 registers, 1 class token


def shell(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Voxels [N, 4] of a bumpy sphere in 64³ of which 2³ patches make ``num_tokens`` tokens."""
    directions = F.normalize(torch.randn(400_000, 3, generator=generator), dim=1)
    radius = 0.43 + 0.06 * torch.sin(25 * directions).prod(1, keepdim=True)
    voxels = torch.unique(((directions * radius + 0.5) * 64).long(), dim=0)
    patches, patch_of = torch.unique(voxels // 2, dim=0, return_inverse=True)
    if len(patches) < num_tokens:
        raise SystemExit(f"--tokens: this shell has {len(patches)} tokens, fewer than {num_tokens}")
    kept = torch.randperm(len(patches), generator=generator)[:num_tokens]
    return F.pad(voxels[torch.isin(patch_of, kept)], (1, 0)).to(torch.int32)


def matmul_flops(network: LatentDiT, num_tokens: int) -> float:
    """Multiply-adds, times two, of the transformer blocks."""
    c = network.config
    linear = num_tokens * 14 * c.width**2 + COND_TOKENS * 2 * c.width * c.cond_channels
    attention = 2 * num_tokens * (num_tokens + COND_TOKENS) * c.width
    return 2.0 * c.num_blocks * (linear + attention)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=24, help="fewer for a quick look")
    args = parser.parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    coords = shell(args.tokens, generator)
    config = LatentDiTConfig(num_blocks=args.blocks)
    feats = torch.randn(len(coords), config.in_channels, generator=generator)
    voxels = SparseVoxels.from_coords(coords, feats, config.resolution).to(device)
    cond = torch.randn(1, COND_TOKENS, config.cond_channels, generator=generator).to(device)
    t = torch.tensor([0.5], dtype=torch.float64)
    with torch.inference_mode():
        for name in args.dtypes.split(","):
            with torch.device("meta"):
                network = LatentDiT(config)
            network.cast_torso(getattr(torch, name))
            network.to_empty(device=device)
            for parameter in network.parameters():
                parameter.normal_(std=0.02)
            plan = network.plan(voxels, COND_TOKENS)
            best = float("inf")
            for _ in range(args.repeats):
                start = time.perf_counter()
                out = network(voxels, t, cond, plan)
                total = float(out.abs().sum())  # also waits for the device
                best = min(best, time.perf_counter() - start)
                if total != total:
                    raise SystemExit("NaN in the output")
            size = sum(p.numel() for p in network.parameters()) / 1e6
            rate = matmul_flops(network, args.tokens) / best / 1e9
            memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
            print(
                f"{name}: {size:.1f} M parameters, {len(coords)} voxels, {args.tokens} tokens: {best:.2f} s, "
                f"{rate:.0f} GFLOP/s in the blocks, peak {memory / 2**30:.2f} GiB, "
                f"{torch.get_num_threads()} CPU threads",
                flush=True,
            )
            del network, plan, out


def peak_rss() -> int:
    """Peak memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
