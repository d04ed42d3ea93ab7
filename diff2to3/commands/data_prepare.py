"""``diff2to3 data prepare`` and ``diff2to3 data inspect``."""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diff2to3.errors import InputError
from diff2to3.machine import available_cpus

if TYPE_CHECKING:
    from diff2to3.data.executors import Executor
    from diff2to3.data.prepare import StageReport

#: Failures listed at the end of a run; all of them are in the indexes and the log.
_SHOWN_FAILURES = 20

_PREPARE = """\
Run the stages of a configuration: render views, find voxels, lift features.

Rerunning the same command goes on where the last run stopped, however it stopped; skips what is done; repairs
what is damaged; and adds what is new in the source. The result is the same for any number of workers.

  diff2to3 data prepare configs/data/mini.yaml --set source=assets/ --workers 4
  diff2to3 data prepare configs/data/large.yaml --shard $SLURM_ARRAY_TASK_ID/64      job arrays
  diff2to3 data prepare configs/data/large.yaml --executor ray --ray-address auto --workers 512
"""

_INSPECT = """\
Draw a contact sheet of a prepared dataset: views of every set, then voxels and features through the camera of
one of them. Voxels must cover the object as that view shows it; features must change where the picture does.
"""


def add_prepare(verbs: Any) -> None:
    """The arguments of ``data prepare``."""
    parser = verbs.add_parser(
        "prepare",
        help="render, voxelise and encode assets to a training set",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a YAML file such as configs/data/mini.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value; may be repeated"
    )
    parser.add_argument(
        "--workers", type=int, help="processes or actors (default: one a core); 0: this process"
    )
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    parser.add_argument("--ray-address", help="a running cluster; without it Ray is started on this machine")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="what a Ray actor reserves")
    parser.add_argument(
        "--shard", type=_part, default=(0, 1), metavar="I/N", help="only every N-th shard from I"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try assets again that failed before")
    parser.add_argument("--no-verify", action="store_true", help="trust finished shards of the right size")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run_verb=run_prepare)


def add_inspect(verbs: Any) -> None:
    """The arguments of ``data inspect``."""
    parser = verbs.add_parser(
        "inspect",
        help="draw a contact sheet of a prepared dataset",
        description=_INSPECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", type=Path, help="the folder that data prepare wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("contact_sheet.png"))
    parser.add_argument("--num", type=int, default=24, help="assets, spread evenly (default 24)")
    parser.add_argument("--id", action="append", default=[], help="these assets instead; may be repeated")
    parser.add_argument("--split", help="only assets of this split")
    parser.add_argument("--views", type=int, default=3, help="views of each set (default 3)")
    parser.add_argument("--cell", type=int, default=128, help="pixels a side of a picture (default 128)")
    parser.add_argument("--columns", type=int, default=1, help="assets beside each other (default 1)")
    parser.set_defaults(run_verb=run_inspect)


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare, and print what was done, how long it took, and what failed; 1 where not one asset is complete."""
    from diff2to3.config import load_config
    from diff2to3.data.prepare import prepare
    from diff2to3.data.schema import DataConfig

    config = load_config(DataConfig, args.config, args.set)
    executor = _executor(args)
    try:
        reports = prepare(
            config,
            executor,
            part=args.shard,
            checksum=not args.no_verify,
            retry_failed=args.retry_failed,
            progress=not args.quiet,
        )
    finally:
        executor.close()
    print(summary(reports))
    hopeless = next((r for r in reports if 0 < r.num_assets <= len(r.failed)), None)
    if hopeless is not None:
        print(f"{config.out}: every asset failed in {hopeless.name}", file=sys.stderr)
        return 1
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Write the contact sheet and print what the dataset holds."""
    from diff2to3.data.inspect import choose_assets, contact_sheet
    from diff2to3.data.store import AssetStore
    from diff2to3.files import write_atomic

    for name in ("num", "views", "cell", "columns"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}: expected a positive number, got {getattr(args, name)}")
    store = AssetStore(args.dataset)
    chosen = choose_assets(store, args.num, args.split)
    if args.id:
        by_id = {asset.id: asset for asset in store.plan}
        unknown = [i for i in args.id if i not in by_id]
        if unknown:
            raise InputError(f"{args.dataset}: no asset {unknown[0]!r}")
        chosen = [by_id[i] for i in args.id]
    sheet = contact_sheet(store, chosen, cell=args.cell, views_per_set=args.views, columns=args.columns)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    try:
        write_atomic(args.output, stream.getvalue())
    except OSError as error:
        raise InputError(f"{args.output}: cannot be written: {error.strerror or error}") from error
    print(f"{args.dataset}: {len(store.plan)} assets planned, {len(store.assets())} complete")
    for stage in store.stages:
        done, failed = len(store.assets(stages=[stage])), len(store.failures[stage])
        print(f"  {stage:20} {done} done, {failed} failed")
    print(f"{args.output}: {len(chosen)} assets, {sheet.width} x {sheet.height} pixels")
    return 0


def summary(reports: list[StageReport]) -> str:
    """A table of stages, and the failures with their reasons."""
    lines = ["stage                 assets    made  failed   s/asset  cpu s/asset    wall s      size"]
    for r in reports:
        made = max(r.num_made, 1)
        work, cpu = r.seconds.get("total", 0.0) / made, r.seconds.get("cpu", 0.0) / made
        lines.append(
            f"{r.name:20}{r.num_assets:8}{r.num_made:8}{len(r.failed):8}{work:10.3f}{cpu:13.3f}"
            f"{r.wall_seconds:10.1f}{_size(r.num_bytes):>10}"
        )
        steps = [f"{name} {s / made:.3f}" for name, s in r.seconds.items() if name not in ("total", "cpu")]
        if steps:
            lines.append(f"            of which: {', '.join(steps)}")
    repaired = [shard for r in reports for shard in r.repaired]
    if repaired:
        lines.append(f"repaired: {', '.join(repaired)}")
    failures = {asset: reason for r in reversed(reports) for asset, reason in r.failed.items()}
    if failures:
        lines.append(f"{len(failures)} failed:")
        lines += [f"  {asset}: {reason}" for asset, reason in list(failures.items())[:_SHOWN_FAILURES]]
        if len(failures) > _SHOWN_FAILURES:
            lines.append(f"  ... and {len(failures) - _SHOWN_FAILURES} more; all are in the shards' indexes")
    return "\n".join(lines)


def _executor(args: argparse.Namespace) -> Executor:
    from diff2to3.data.executors import InlineExecutor, LocalExecutor, RayExecutor

    workers = available_cpus() if args.workers is None else args.workers
    if args.executor == "ray":
        return RayExecutor(workers, args.ray_address, args.gpus_per_worker)
    return LocalExecutor(workers) if workers else InlineExecutor()


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return int(match[1]), int(match[2])


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
