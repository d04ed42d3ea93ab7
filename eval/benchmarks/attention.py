"""Windowed attention over the voxels of a bumpy shell: bucketed calls, a loop over windows, full attention.

    python eval/benchmarks/attention.py [--device cuda --dtype bfloat16] [--threads 1]

Every row runs on the same inputs in the same process; times are the best of several runs, in milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.nn import sequences
from diff2to3.nn.attention import attention
from diff2to3.nn.sequences import SequencePlan
from diff2to3.nn.windows import WindowPlan


def bumpy_shell(resolution: int, generator: torch.Generator) -> Tensor:
    """Active voxels [N, 4] of a sphere with bumps."""
    directions = F.normalize(torch.randn(600_000, 3, generator=generator), dim=1)
    radius = 0.43 + 0.05 * torch.sin(25 * directions).prod(1, keepdim=True)
    cells = torch.unique(((directions * radius + 0.5) * resolution).long(), dim=0)
    return F.pad(cells, (1, 0)).to(torch.int32)


def best_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def run_plan(qkv: Tensor, plan: SequencePlan | WindowPlan, backend: str) -> Tensor:
    q, k, v = qkv.unbind(1)
    return attention(q, k, v, plan, backend=backend)


def window_loop(qkv: Tensor, order: Tensor, inverse: Tensor, lengths: list[int]) -> Tensor:
    """The simple way: sort rows by window, one call a window, sort back."""
    out = []
    for window in qkv[order].split(lengths):
        q, k, v = window.permute(1, 2, 0, 3)[:, None]
        out.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(out)[inverse]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backends", default="sdpa", help="comma-separated, see diff2to3.nn.attention")
    parser.add_argument(
        "--call-costs", default="", help="comma-separated costs of one call, in pairs, to try"
    )
    parser.add_argument("--no-full", action="store_true", help="skip full attention over all voxels")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    coords = bumpy_shell(64, generator).to(device)
    num = len(coords)
    qkv = torch.randn(num, 3, args.heads, args.width // args.heads, generator=generator).to(device, dtype)
    v_out = torch.randn(num, args.heads, args.width // args.heads, generator=generator).to(device, dtype)
    qkv.requires_grad_()

    def measure(name: str, run: Callable[[], Tensor], note: str) -> None:
        def backward() -> None:
            qkv.grad = None
            run().backward(v_out)

        with torch.no_grad():
            forward = best_ms(run, device, args.repeats)
        print(
            f"{name:28s} {forward:9.1f} {best_ms(backward, device, args.repeats):9.1f}   {note}", flush=True
        )

    print(f"{num} voxels, window {args.window}, width {args.width}, {args.heads} heads, {dtype}, {device}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':28s} {'forward':>9s} {'fwd+bwd':>9s}")
    key = "cpu" if device.type == "cpu" else "accelerator"
    for shift in (0, args.window // 2):
        for cost in [float(c) for c in args.call_costs.split(",") if c] or [sequences.CALL_COST[key]]:
            sequences.CALL_COST[key] = cost  # the only use of this table outside the module
            build = functools.partial(WindowPlan.build, coords, args.window, shift)
            windows, build_ms = build(), best_ms(build, device, args.repeats)
            plan = windows.sequences
            note = f"{len(plan.buckets)} calls for {plan.num_sequences} windows, padding {plan.padding:.1%}, "
            for backend in args.backends.split(","):
                run = functools.partial(run_plan, qkv, windows, backend)
                measure(f"{backend}, shift {shift}, cost {cost:.0f}", run, f"{note}plan {build_ms:.1f} ms")
        order = torch.cat([plan.rows(i) for i in range(plan.num_sequences)])
        loop = functools.partial(window_loop, qkv, order, order.argsort(), list(plan.lengths_q))
        measure(f"loop, shift {shift}", loop, f"{plan.num_sequences} calls")
    if not args.no_full:
        full = SequencePlan.from_lengths([num], device=device)
        measure("full attention", functools.partial(run_plan, qkv, full, "auto"), "1 call")


if __name__ == "__main__":
    main()
