"""What is measured on a GPU at the sizes that training and generation have: one function a section.

    raster      shells and VAE-like Gaussians, forward and backward, ours and gsplat, one view and four
    vae         a training step of the autoencoder
    denoiser    SMDiT-large, both stages: eager, with cuDNN's attention, with compiled blocks
    sparse      plans, convolutions at the widths of the networks, and the product-first order of their sums

Everything is a row of :class:`gpu_timing.Readings`; nothing here is a test (tests/gpu is).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import rasterizer, sparse
from .gpu_timing import Readings

# ---- rasteriser ----


def vae_like(voxels: int, opacity: float, device: torch.device) -> dict[str, Tensor]:
    """The Gaussians of a decoder at its start: 32 a voxel, all of one opacity."""
    from diff2to3.types import SparseVoxels
    from diff2to3.vae.config import GaussianConfig
    from diff2to3.vae.gaussian_head import num_raw_channels, offset_perturbation, split_raw, to_gaussians

    coords, config = sparse.bumpy_shell(torch.device("cpu"))[:voxels], GaussianConfig()
    rng = torch.Generator().manual_seed(0)
    raw = 0.5 * torch.randn(len(coords), num_raw_channels(config), generator=rng)
    grid = SparseVoxels.from_coords(coords, torch.zeros(len(coords), 1), 64)
    g = to_gaussians(split_raw(raw, config), grid, offset_perturbation(config), config)[0]
    opacities = torch.full_like(g.opacities, opacity)
    scene = {"means": g.means, "quats": g.quats, "scales": g.scales, "opacities": opacities, "sh": g.sh}
    return {name: t.to(device).contiguous().requires_grad_() for name, t in scene.items()}


def cameras(views: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``views`` around the vertical axis."""
    viewmat, K = rasterizer.camera(size, device)
    viewmats = viewmat.repeat(views, 1, 1)
    for v in range(views):
        c, s = math.cos(2 * math.pi * v / views), math.sin(2 * math.pi * v / views)
        viewmats[v, :3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return viewmats, K.repeat(views, 1, 1)


def raster(readings: Readings) -> None:
    device = readings.device
    scenes: list[tuple[str, Callable[[], dict[str, Tensor]]]] = [
        (f"shell {n // 1000}k", lambda n=n: rasterizer.bumpy_shell(n, device))  # type: ignore[misc]
        for n in (50_000, 200_000, 1_000_000)
    ]
    scenes += [
        (f"vae 640k opacity {o}", lambda o=o: vae_like(20_000, o, device))  # type: ignore[misc]
        for o in (0.1, 0.6)
    ]
    if readings.smoke:
        scenes = [("shell 5k", lambda: rasterizer.bumpy_shell(5_000, device))]
    for label, make in scenes:
        scene = make()
        for size, views in ((512, 1), (512, 4), (1024, 1)) if not readings.smoke else ((64, 2),):
            raster_rows(readings, f"{label} {size}² x {views}", scene, size, views)


def raster_rows(readings: Readings, label: str, scene: dict[str, Tensor], size: int, views: int) -> None:
    from importlib.util import find_spec

    from diff2to3.kernels.rasterize import rasterize

    viewmats, Ks = cameras(views, size, readings.device)
    geometry, leaves = [scene[n] for n in ("means", "quats", "scales", "opacities")], list(scene.values())
    v_colors = torch.rand(views, size, size, 3, device=readings.device)
    for backend in ("native", "gsplat") if readings.gpu and find_spec("gsplat") else ("native",):

        def render(backend: str = backend) -> Tensor:
            return rasterize(*geometry, viewmats, Ks, size, size, sh=scene["sh"], backend=backend).colors

        def infer(render: Callable[[], Tensor] = render) -> None:
            with torch.no_grad():
                render()

        readings.timed(f"{label} {backend} inference", infer)
        readings.timed(f"{label} {backend} forward", render)
        try:
            out = render()
        except Exception as error:
            print(f"{label} {backend} backward: {error}")
            continue
        readings.timed(
            f"{label} {backend} backward",
            lambda out=out: torch.autograd.grad(out, leaves, v_colors, retain_graph=True),  # type: ignore[misc]
        )
        if views == 1 and size == 512:
            readings.launches(
                f"{label} {backend}", lambda r=render: torch.autograd.grad(r(), leaves, v_colors)
            )  # type: ignore[misc]


# ---- sparse convolution ----


def sparse_section(readings: Readings) -> None:
    from diff2to3.kernels.neighbors import neighbor_plan
    from diff2to3.kernels.patchify import patch_plan, unpatchify

    device = readings.device
    fine = sparse.bumpy_shell(device)
    fine = fine[:500].contiguous() if readings.smoke else fine
    shift = torch.tensor([1, 0, 0, 0], dtype=torch.int32, device=device)
    coarse, many = patch_plan(fine).coords, torch.cat([fine + b * shift for b in range(8)])
    for label, coords in (("20k", fine), ("160k", many)):
        readings.timed(f"neighbor plan 27 {label}", lambda c=coords: neighbor_plan(c))  # type: ignore[misc]
        readings.timed(f"patch plan 2 {label}", lambda c=coords: patch_plan(c))  # type: ignore[misc]
    cases = [
        ("20k", fine, 64, 64),
        ("20k", fine, 128, 128),
        ("20k", fine, 2048, 128),
        ("5k", coarse, 1024, 1024),
    ]
    cases += [("160k", many, 128, 128), ("160k", many, 256, 128)]
    for label, coords, cin, cout in cases[:1] if readings.smoke else cases:
        convolution_rows(readings, f"conv {label} {cin}->{cout}", neighbor_plan(coords), cin, cout)
    rows = torch.randn(len(coarse), 64 if readings.smoke else 2048, device=device, dtype=torch.bfloat16)
    patches = patch_plan(fine)
    readings.timed("unpatchify 2048 bf16", lambda: unpatchify(rows, patches))
    readings.timed("index_select 2048 bf16", lambda: rows.index_select(0, patches.parents))


def convolution_rows(readings: Readings, name: str, plan: Any, cin: int, cout: int) -> None:
    """Forward and backward in bfloat16; the rate counts the products of pairs that exist."""
    from diff2to3.kernels.sparse_conv import submanifold_conv

    device, half = readings.device, torch.bfloat16
    gflop = 2 * int((plan.table >= 0).sum()) * cin * cout / 1e9
    feats = torch.randn(plan.num_voxels, cin, device=device).to(half).requires_grad_()
    weight = (torch.randn(cout, 3, 3, 3, cin, device=device) / math.sqrt(27 * cin)).to(half).requires_grad_()
    bias = torch.zeros(cout, device=device, dtype=half)

    def forward() -> None:
        with torch.no_grad():
            submanifold_conv(feats, weight, bias, plan)

    readings.timed(f"{name} bf16 forward", forward, gflop=gflop)
    out = submanifold_conv(feats, weight, bias, plan)
    v_out = torch.randn_like(out)
    readings.timed(
        f"{name} bf16 backward",
        lambda: torch.autograd.grad(out, (feats, weight), v_out, retain_graph=True),
        gflop=2 * gflop,
    )
    readings.launches(name, forward)


# ---- flow models at full size ----


def denoiser(readings: Readings) -> None:
    """Time is in the blocks: weights are random, and the tokens those of a shell and of a 512² picture."""
    for stage in ("latents", "structure"):
        denoiser_stage(readings, stage)


def denoiser_stage(readings: Readings, stage: str) -> None:
    from diff2to3.flow.networks import FlowConfig, build_network, make_plan, see
    from diff2to3.flow.tokens import ImageTokens
    from diff2to3.types import SparseVoxels

    device = readings.device
    small: dict[str, Any] = (
        {"width": 64, "num_heads": 2, "num_double": 1, "num_single": 1} if readings.smoke else {}
    )
    sizes: dict[str, Any] = {} if stage == "latents" else {"resolution": 16, "patch_size": 1}
    config = FlowConfig(stage=stage, **small, **sizes)
    network: Any = build_network(config).to(device).eval()
    for parameter in network.parameters():
        parameter.data.normal_(std=0.02)
    network.cast_torso(torch.bfloat16)
    noise: Any = torch.randn(1, 8, 16, 16, 16, device=device)
    if stage == "latents":
        fine = sparse.bumpy_shell(device)
        fine = fine[:600].contiguous() if readings.smoke else fine
        noise = SparseVoxels.from_coords(fine, torch.randn(len(fine), 8, device=device), 64)
    side = 16 if readings.smoke else 64
    image = ImageTokens.from_latents(torch.randn(1, 16, side, side, device=device))
    t = torch.full((1,), 0.5, dtype=torch.float64)
    with torch.inference_mode():
        readings.timed(f"{stage} plan", lambda: make_plan(network, noise, image))
        for label, tokens in (
            ("conditional", image),
            ("unconditional", ImageTokens.none(1, image.channels, device)),
        ):
            plan, seen = make_plan(network, noise, tokens), see(network, tokens)
            width, length = config.width, plan.blocks.joint.sequences.num_q
            gflop = (
                (config.num_double + config.num_single)
                * (24 * width**2 * length + 4 * length**2 * width)
                / 1e9
            )

            def forward(tokens: Any = tokens, plan: Any = plan, seen: Any = seen) -> None:
                network(noise, t, tokens, plan, seen=seen)

            name = f"{stage} {label} {length} tokens bf16"
            readings.timed(f"{name} eager", forward, gflop=gflop)
            if readings.gpu and label == "conditional":
                readings.launches(name, forward, 24)
                with_cudnn(readings, name, forward, gflop)
                if stage == "latents":
                    compiled(readings, name, network, forward, gflop)


def with_cudnn(readings: Readings, name: str, forward: Callable[[], None], gflop: float) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        readings.timed(f"{name} cuDNN attention", forward, gflop=gflop)


def compiled(readings: Readings, name: str, network: Any, forward: Callable[[], None], gflop: float) -> None:
    """The blocks through torch.compile, and what the first call of all takes."""
    started = time.perf_counter()
    blocks = [*network.double_blocks, *network.single_blocks]
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
    forward()
    readings.wait()
    print(f"    compiled in {time.perf_counter() - started:.1f} s", flush=True)
    with_cudnn(readings, f"{name} compiled blocks,", forward, gflop)
    readings.launches(f"{name} compiled", forward, 24)
    for block in blocks:
        del block.forward


# ---- a training step of the autoencoder ----


def vae(readings: Readings) -> None:
    from diff2to3.data.loader import Batch
    from diff2to3.training import activations
    from diff2to3.training.batches import to_device
    from diff2to3.training.task import Randomness
    from diff2to3.training.tasks.vae_objective import VaeLossConfig, VaeObjective
    from diff2to3.types import SparseVoxels, Views
    from diff2to3.vae.config import DecoderConfig, EncoderConfig
    from diff2to3.vae.decoder import Decoder
    from diff2to3.vae.encoder import Encoder

    device = readings.device
    small: dict[str, Any] = {"width": 48, "num_blocks": 2, "num_heads": 2} if readings.smoke else {}
    assets, size = (2, 64) if readings.smoke else (4, 512)
    coords = sparse.bumpy_shell(torch.device("cpu"))
    coords = coords[:300] if readings.smoke else coords
    items = [SparseVoxels.from_coords(coords, torch.randn(len(coords), 16), 64) for _ in range(assets)]
    viewmats, Ks = (t.cpu().repeat(assets, 1, 1) for t in cameras(1, size, torch.device("cpu")))
    views = Views(torch.rand(assets, size, size, 3), torch.ones(assets, size, size), viewmats, Ks)
    ids = tuple(f"a{i}" for i in range(assets))
    batch = Batch(0, ids, SparseVoxels.cat(items), {"target": views}, {}, {}, {})
    objective = VaeObjective(
        Encoder(EncoderConfig(**small)), Decoder(DecoderConfig(**small)), VaeLossConfig().with_what_is_there()
    )
    objective.to(device).train()
    activations.recompute([*objective.encoder.blocks, *objective.decoder.blocks])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=readings.gpu or None)
    moved, randomness = to_device(batch, device), Randomness(0, 0)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = objective(moved, randomness)["loss"].float().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    readings.timed(f"vae step, {assets} assets of {len(coords)} voxels, bf16, recomputed", step, 6)
    readings.timed("vae plan", lambda: objective.encoder.plan(moved.voxels), 6)
    readings.launches("vae step", step, 30)
    if readings.gpu:
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        readings.rows.append({"name": "vae step, peak GB", "gigabytes": peak})
        print(f"    peak {peak:.1f} GB", flush=True)


SECTIONS: dict[str, Callable[[Readings], None]] = {
    "raster": raster,
    "vae": vae,
    "denoiser": denoiser,
    "sparse": sparse_section,
}
