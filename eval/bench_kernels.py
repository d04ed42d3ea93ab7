"""Time the project's kernels, and every peer that is installed, on the same inputs in the same run.

    python eval/bench_kernels.py                               both sections on the CPU, one thread
    python eval/bench_kernels.py --threads 1,2 --only sparse --out sparse.json
    python eval/bench_kernels.py --device cuda

Contenders take turns, and the median of the rounds is printed in milliseconds. "limit" is what the machine would need
if it only moved the bytes, or only did the multiplications, at the best rate measured here. "best peer" is the
fastest peer's time over ours; "1 thread" the time on one thread over that on several.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Config, Row, machine  # noqa: E402

SECTIONS = ("sparse", "rasterizer")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", default="1", help="numbers of CPU threads, comma-separated")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--rounds", type=int, default=11, help="calls of each contender")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of the calling thread, for busy machines",
    )
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no NVIDIA GPU, or torch was built without CUDA")
    threads = [1] if device.type == "cuda" else [int(count) for count in args.threads.split(",")]
    if args.clock == "cpu" and (device.type != "cpu" or threads != [1]):
        parser.error("--clock cpu: measures one thread of the CPU")
    facts = {**machine(device), "clock": args.clock}
    print("\n".join(f"{name:8} {value}" for name, value in facts.items()))
    rows: list[Row] = []
    for section in (args.only,) if args.only else SECTIONS:
        module = importlib.import_module(f"benchmarks.{section}")
        print(f"\n{section}\n{header()}")
        for count in threads:
            torch.set_num_threads(count)
            found = [
                replace(row, threads=count)
                for row in module.run(Config(device, count, args.rounds, args.clock))
            ]
            for row in found:
                print(line(row, rows), flush=True)
            rows += found
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        print(f"not timed: {note}")
    if args.out:
        args.out.write_text(
            json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
    return 0


def header() -> str:
    columns = f"{'':32} {'threads':>7} {'ours':>8} {'bar':>6} {'limit':>8} {'best peer':>9} {'1 thread':>8}"
    return f"{columns}  peers"


def line(row: Row, earlier: list[Row]) -> str:
    peers = {name: ms for name, ms in row.peers.items() if not name.startswith("ours")}
    best = f"{min(peers.values()) / row.ours_ms:.1f}x" if peers else ""
    single = next((r.ours_ms for r in earlier if r.name == row.name and r.threads == 1), None)
    speedup = f"{single / row.ours_ms:.2f}x" if single and row.threads > 1 else ""
    bar = "" if row.bar_ms is None else f"{row.bar_ms:g}"
    others = "  ".join(f"{name} {ms:.2f}" for name, ms in row.peers.items())
    ours = f"{row.name:32} {row.threads:7} {row.ours_ms:8.2f} {bar:>6} {row.limit_ms:8.2f}"
    return f"{ours} {best:>9} {speedup:>8}  {others}"


if __name__ == "__main__":
    sys.exit(main())
