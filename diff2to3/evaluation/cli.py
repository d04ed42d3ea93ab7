"""What the programs in eval/ share: arguments, and one run from them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diff2to3.assets import read_ids
from diff2to3.config import load_config
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.evaluation.engine import Plan, finished, run_plan, run_settings
from diff2to3.evaluation.parallel import check_output, default_workers
from diff2to3.evaluation.protocol import Protocol, draw_ids
from diff2to3.evaluation.runs import RunFolder
from diff2to3.evaluation.scores import SetFeatures
from diff2to3.evaluation.subjects import Source
from diff2to3.evaluation.summary import estimates_of, scores_of, set_estimates
from diff2to3.evaluation.tables import build_table, markdown
from diff2to3.files import write_atomic
from diff2to3.machine import best_device
from diff2to3.streams import make_usable

WEIGHTS = ("lpips", "inception", "dinov2", "clip")


@dataclass(frozen=True)
class Worker:
    """This process among those of torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def device(self, name: str) -> torch.device:
        """``auto`` is the GPU of this process's number, or the CPU."""
        if name != "auto":
            return torch.device(name)
        return best_device(self.local_rank, mps=False)


def add_common_arguments(parser: argparse.ArgumentParser, workers: int = 0) -> None:
    """Those of every program that scores. ``workers`` is the default of --workers."""
    parser.add_argument("--ids", help="a file with one id a line: the assets to score")
    parser.add_argument(
        "--weights",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help=f"of {', '.join(WEIGHTS)}; NAME=none leaves it out",
    )
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes; 0: in this one (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offline", action="store_true", help="never open a connection")


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of programs that follow a protocol in a file and write a run's folder."""
    add_common_arguments(parser)
    parser.add_argument(
        "--out", required=True, type=Path, help="the run's folder; the same command continues it"
    )
    parser.add_argument("--protocol", type=Path, help="a YAML file (default: the one of the task)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the protocol, such as resolution=256"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of programs that score a model on folders of assets and write one result file."""
    parser.add_argument(
        "--assets", nargs="+", required=True, help="folders, zips or 3D files; or NAME:FOLDER"
    )
    parser.add_argument("--split", help="only assets of this split, where there is a manifest (default: all)")
    parser.add_argument("--limit", type=int, help="score at most this many assets")
    parser.add_argument("--model", default="mini", help="embedded model, folder or hub repository")
    parser.add_argument("--views", type=int, default=8, help="compared for each asset (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of cameras and noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the result, a JSON file")
    parser.add_argument("--table", type=Path, help="also the tables, as Markdown")
    add_common_arguments(parser, default_workers())


def check_arguments(
    args: argparse.Namespace, bounds: Mapping[str, tuple[int, int]], at_least_one: Sequence[str]
) -> None:
    """InputError for numbers out of ``bounds``, for ones of ``at_least_one`` that are given and below it, and for
    --out and --table where nothing can be written.
    """
    for name, (low, high) in bounds.items():
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name}: expected a number from {low} to {high}, got {getattr(args, name)}")
    for name in at_least_one:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    check_output(args.out)
    if args.table is not None:
        check_output(args.table)


def parse_weights(pairs: Sequence[str]) -> dict[str, str]:
    weights = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or name not in WEIGHTS or not path:
            raise InputError(f"--weights {pair}: expected NAME=PATH with NAME one of {', '.join(WEIGHTS)}")
        weights[name] = path
    return weights


def load_protocol(args: argparse.Namespace, default: Path, task: str | None = None) -> Protocol:
    rules = load_config(Protocol, args.protocol or default, args.set)
    if task is not None and rules.task != task:
        raise InputError(f"{args.protocol or default}: is a protocol for {rules.task}, not {task}")
    return rules


def choose_ids(args: argparse.Namespace, rules: Protocol, truth: Source) -> tuple[list[str], list[str]]:
    """(ids, notes): those of --ids (or so named by the owners of a published set), or drawn from what ``truth`` has."""
    known = truth.ids()
    names = truth.names()
    if args.ids is not None:
        id_of = {name: asset_id for asset_id, name in names.items()}
        ids = sorted({id_of.get(name, name) for name in read_ids(args.ids)})
        unknown = sorted(set(ids) - set(known))
        if unknown:
            raise InputError(f"{args.ids}: {len(unknown)} ids are not in {truth.name}, first {unknown[0]!r}")
        drawn = ids
        notes = []
    else:
        drawn = draw_ids(known, rules.num_assets, rules.seed, names)
        notes = [f"{len(drawn)} of {len(known)} assets, drawn with seed {rules.seed}"]
        if rules.num_assets is not None and len(drawn) < rules.num_assets:
            notes = [f"the protocol asks for {rules.num_assets} assets; {truth.name} has {len(drawn)}"]
    if not drawn:
        raise InputError(f"{truth.name}: no assets")
    return drawn, notes


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


def score_method(
    out: Path,
    plan: Plan,
    ids: Sequence[str],
    notes: Sequence[str],
    worker: Worker,
    workers: int = 0,
) -> dict[str, Any] | None:
    """Run or continue a run of a plan's one method; the table where all processes are done, else None."""
    settings = run_settings(plan, ids)
    folder = RunFolder.open(out, settings)
    plan = replace(plan, features=str(out))
    if worker.rank == 0:
        write_atomic(
            out / "ids.txt", f"# seed {plan.rules.seed}, {plan.truth.name}\n" + "\n".join(ids) + "\n"
        )
    ((key, method),) = plan.methods
    lines = run_plan(
        folder, plan, ids, label=method.name, workers=workers, rank=worker.rank, world_size=worker.world_size
    )
    if not finished(lines, ids, out):
        return None
    scores = scores_of(lines, key)
    estimates = estimates_of(scores.values, plan.rules.seed)
    extractors = [m.extractor.name for m in plan.metrics if isinstance(m, SetFeatures)]
    estimates |= set_estimates(folder, key, scores.values, extractors, plan.rules)
    table = build_table(
        settings,
        plan.rules,
        scores,
        estimates,
        device=torch.device(plan.device),
        notes=notes,
        num_expected=len(ids),
    )
    write_atomic(out / "table.json", json.dumps(table, indent=1, sort_keys=True) + "\n")
    write_atomic(out / "table.md", markdown(table))
    return table


def main_of(
    run: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parse, run, and turn bad input into one line and exit code 2."""
    make_usable()
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (InputError, MissingDependencyError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command continues", file=sys.stderr)
        return 130
