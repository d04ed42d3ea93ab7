"""How many views a second the renderers make: all outputs, 2 x 2 supersampling, shadowed light, one asset a process.

    python eval/bench_renderer.py ../shared/assets --workers 2
    python eval/bench_renderer.py ../shared/assets --num 4 --views 4 --blender bl/bin/python --samples 16 --denoise fast

Assets are spread evenly over the catalogue and views over the sphere. Times include building the ray tree and the
cache of soft shadows, which views share, so more views an asset are faster; loading is timed apart. Blender's times
include its start, once an asset. On a busy machine only the processor seconds mean something.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diff2to3.assets import AssetRecord, load_asset, open_catalogue
from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.views import (
    BlenderConfig,
    CameraConfig,
    LightingConfig,
    RenderConfig,
    generator_for,
    make_renderer,
    sample_cameras,
)
from diff2to3.views.config import OUTPUTS


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    name: str
    config: RenderConfig
    size: int
    num_views: int


def cpu_seconds() -> float:
    """Processor time of this process and of the children that have ended, where the system counts it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def render_asset(job: tuple[AssetRecord, Case]) -> tuple[float, float, float, float]:
    """(seconds to load, seconds to render, processor seconds of that, share of the pixels that show the asset)."""
    import torch

    torch.set_num_threads(1)
    record, case = job
    start = time.perf_counter()
    mesh = load_asset(record)
    loaded, cpu = time.perf_counter(), cpu_seconds()
    cameras = CameraConfig("sphere", num_views=case.num_views)
    viewmats, Ks = sample_cameras(cameras, case.size, case.size, generator_for(0, record.id))
    views = make_renderer(mesh, case.config).render(viewmats, Ks, case.size, case.size)
    done = time.perf_counter()
    return loaded - start, done - loaded, cpu_seconds() - cpu, float((views.alphas > 0).float().mean())


def measure(case: Case, records: Sequence[AssetRecord], workers: int) -> dict[str, Any]:
    """Render every asset once on ``workers`` processes; the processes are warm before the clock starts."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        tiny = replace(case, size=16, num_views=1)
        if case.config.renderer != "blender":
            pool.map(render_asset, [(records[0], tiny)] * workers, chunksize=1)
        start = time.perf_counter()
        outcomes = pool.map(render_asset, [(record, case) for record in records], chunksize=1)
        wall = time.perf_counter() - start
    load, render, cpu, covered = (np.array(column) for column in zip(*outcomes, strict=True))
    num_views = len(records) * case.num_views
    return {
        "case": case.name,
        "size": case.size,
        "assets": len(records),
        "views_per_asset": case.num_views,
        "workers": workers,
        "views_per_second": round(num_views / wall, 3),
        "seconds_per_view_and_core": round(float(render.sum()) / num_views, 4),
        "cpu_seconds_per_view": round(float(cpu.sum()) / num_views, 4),
        "seconds_to_load": round(float(load.mean()), 4),
        "share_covered": round(float(covered.mean()), 3),
    }


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The ray caster at every size; Blender too where it is given."""
    base = RenderConfig(outputs=OUTPUTS)
    cases = []
    for size in args.sizes:
        cases.append(Case("raycast, studio", base, size, args.views))
        if not args.blender:
            unlit = replace(base, lighting=LightingConfig(mode="unlit"))
            cases.append(Case("raycast, unlit", unlit, size, args.views))
            continue
        options = BlenderConfig(
            python=args.blender, samples=args.samples, denoise=args.denoise, look="config", threads=1
        )
        cycles = RenderConfig(renderer="blender", blender=options, outputs=())
        cases.append(
            Case(f"cycles, {args.samples} samples, denoiser {args.denoise}", cycles, size, args.views)
        )
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder, zip, manifest, or NAME:FOLDER")
    parser.add_argument("--num", type=int, default=24, help="assets (default 24)")
    parser.add_argument("--views", type=int, default=12, help="views an asset (default 12)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels a side")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument("--blender", metavar="PYTHON", help="also Cycles, under this Python with bpy")
    parser.add_argument("--samples", type=int, default=16, help="of Cycles (default 16)")
    parser.add_argument("--denoise", choices=["none", "fast", "high"], default="fast")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers as JSON")
    args = parser.parse_args(argv)
    try:
        records = list(open_catalogue(args.source))
        chosen = [records[i] for i in np.linspace(0, len(records), args.num, endpoint=False).astype(int)]
        rows = []
        for case in make_cases(args):
            rows.append(measure(case, chosen, args.workers))
            print(json.dumps(rows[-1]), flush=True)
    except InputError as error:
        print(f"bench_renderer: error: {error}", file=sys.stderr)
        return 2
    if args.output:
        machine = {
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        write_atomic(args.output, json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
