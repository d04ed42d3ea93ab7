"""The Toys4k benchmark (paper, tables 1 to 3), or the same on any assets.

    python eval/toys4k.py reconstruction --assets toys4k:FOLDER --method ply:MINE --out runs/mine --weights lpips=FILE
    torchrun --nproc-per-node 8 eval/toys4k.py generation --assets toys4k:FOLDER --method model:BUNDLE --out runs/gen
    python eval/toys4k.py draw --list toys_dict.json > eval/protocol/toys4k_ids.txt

--assets is a folder, a zip or a published data set (see diff2to3/assets); --method is one of

    ply:FOLDER           ply-yup:FOLDER       images:FOLDER
    call:FILE.py:NAME    model:NAME_OR_FOLDER (such as model:mini; the task says whether it generates or reconstructs)

The 1,000 assets are drawn by the owners' names for them, "mug/mug_007/mug_007.blend": from all that --assets has, the
next in the same order where some are missing. eval/protocol/toys4k_ids.txt are those of the complete list,
toys_dict.json in toys4k/renderer/jsons of github.com/rehg-lab/lowshot-shapebias; --ids with that file insists on them.

--set KEY=VALUE … changes the protocol (eval/protocol), such as resolution=256 num_assets=null.

A killed run is continued by the same command; with --workers or under torchrun, processes share the assets, and the
last one writes OUT/table.md and OUT/table.json; OUT/ids.txt records the assets. Exit code 1 where an asset failed
(it is tried again next time), 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from diff2to3.errors import InputError
from diff2to3.evaluation.cli import (
    Worker,
    add_benchmark_arguments,
    choose_ids,
    load_protocol,
    main_of,
    parse_weights,
    print_notes,
    score_method,
)
from diff2to3.evaluation.engine import Plan
from diff2to3.evaluation.protocol import Protocol, draw_ids
from diff2to3.evaluation.scores import benchmark_metrics
from diff2to3.evaluation.sources import MeshSource, open_source

PROTOCOLS = Path(__file__).resolve().parent / "protocol"


def worker() -> Worker:
    """From torchrun's environment."""
    try:
        rank, size, local = (
            int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK: expected numbers ({error})") from error
    return Worker(rank, size, local)


def draw(args: argparse.Namespace) -> int:
    """Print the names of what is drawn."""
    if (args.list is None) == (args.assets is None):
        raise InputError("draw: expected one of --assets and --list")
    known = listed(args.list) if args.list else list(MeshSource((args.assets,), args.split).names().values())
    names = draw_ids(known, args.count, args.seed)
    print(f"# {len(names)} of {len(known)} names: the names with the smallest sha256 of '{args.seed}:NAME'")
    print("\n".join(names))
    return 0


def listed(path: Path) -> list[str]:
    """The names in the owners' list: {category: ["NAME/NAME.blend", …]}."""
    try:
        categories = json.loads(path.read_text("utf-8"))
        return [f"{category}/{file}" for category, files in categories.items() for file in files]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: expected a JSON object of categories and their files ({error})") from None


def run(args: argparse.Namespace) -> int:
    if args.task == "draw":
        return draw(args)
    truth = MeshSource((args.assets,), args.split)
    rules = load_protocol(args, PROTOCOLS / f"toys4k_{args.task}.yaml", args.task)
    here = worker()
    device = here.device(args.device)
    ids, notes = choose_ids(args, rules, truth)
    method = open_source(args.method, device, args.offline, args.task)
    metrics, missing = benchmark_metrics(rules, parse_weights(args.weights), device, args.offline)
    plan = Plan(rules, truth, ((method.name, method),), metrics, str(device))
    if here.rank == 0:
        print_notes(missing)
    table = score_method(args.out, plan, ids, [*notes, *missing], here, args.workers)
    if table is None:
        return 0
    print((args.out / "table.md").read_text("utf-8"))
    return 1 if table["errors"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="toys4k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("reconstruction", "generation", "draw"))
    words = list(sys.argv[1:] if argv is None else argv)
    parser.add_argument("--assets", required="draw" not in words[:1])
    parser.add_argument("--split", help="only assets of this split, where the catalogue has splits")
    if "draw" in words[:1]:
        parser.add_argument("--list", type=Path, help="the owners' toys_dict.json, in place of --assets")
        parser.add_argument("--count", type=int, default=Protocol().num_assets)
        parser.add_argument("--seed", type=int, default=Protocol().seed)
    else:
        parser.add_argument("--method", required=True)
        add_benchmark_arguments(parser)
    return main_of(run, parser, words)


if __name__ == "__main__":
    sys.exit(main())
