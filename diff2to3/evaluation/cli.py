"""What the programs in eval/ share: arguments, and one run from them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diff2to3.assets import read_ids
from diff2to3.config import load_config
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.evaluation.parallel import check_output
from diff2to3.evaluation.protocol import Protocol, draw_ids
from diff2to3.evaluation.runs import RunFolder, run_assets, run_settings
from diff2to3.evaluation.scores import Scorer
from diff2to3.evaluation.sources import MeshSource, Source
from diff2to3.evaluation.summary import summarise
from diff2to3.evaluation.tables import build_table, markdown
from diff2to3.files import write_atomic
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
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every program that scores."""
    parser.add_argument("--protocol", type=Path, help="a YAML file (default: the one of the task)")
    parser.add_argument("--ids", help="a file with one id a line, instead of drawing assets")
    parser.add_argument(
        "--out", required=True, type=Path, help="the run's folder; the same command continues it"
    )
    parser.add_argument(
        "--weights",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help=f"of {', '.join(WEIGHTS)}; NAME=none leaves it out",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offline", action="store_true", help="never open a connection")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the protocol, such as resolution=256"
    )


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
    names = truth.names() if isinstance(truth, MeshSource) else {}
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


def score_method(
    out: Path,
    method: Source,
    truth: Source,
    scorer: Scorer,
    ids: Sequence[str],
    notes: Sequence[str],
    device: torch.device,
    worker: Worker,
) -> dict[str, Any] | None:
    """Run or continue a run; the table where all processes are done, else None."""
    settings = run_settings(scorer.rules, method, truth, scorer, ids)
    folder = RunFolder.open(out, settings)

    def progress(asset_id: str, error: str | None) -> None:
        print(f"{asset_id}: {'done' if error is None else f'FAILED: {error}'}", file=sys.stderr, flush=True)

    if worker.rank == 0:
        write_atomic(out / "ids.txt", f"# seed {scorer.rules.seed}, {truth.name}\n" + "\n".join(ids) + "\n")
    for note in scorer.notes if worker.rank == 0 else ():
        print(note, file=sys.stderr)
    finished = run_assets(
        folder,
        scorer,
        method,
        truth,
        ids,
        device=device,
        rank=worker.rank,
        world_size=worker.world_size,
        progress=progress,
    )
    if not finished:
        print(f"{out}: this process is done; others have assets left", file=sys.stderr)
        return None
    summary = summarise(folder, scorer.rules, ids, list(scorer.extractors))
    all_notes = [*notes, *scorer.notes]
    table = build_table(
        settings, scorer.rules, summary, device=device, notes=all_notes, num_expected=len(ids)
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
