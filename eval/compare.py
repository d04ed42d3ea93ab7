"""Compare methods on the same assets: numbers with confidence intervals, and a report with pictures side by side.

    python eval/compare.py mine=ply:A theirs=ply-yup:B images:C --truth assets:MODELS --out report/ --weights lpips=FILE

Each method is a folder of .ply files or of folders of pictures (see toys4k.py), with a name before = if wanted;
--truth is the same, or a catalogue of meshes. Assets are those of the truth, all of them unless --ids or --set
num_assets=N says otherwise; one that a method lacks is reported as failed. OUT/report.html is the report,
OUT/METHOD/table.json the numbers. With --protocol eval/protocol/toys4k_generation.yaml, sets of pictures are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import re
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
from diff2to3.evaluation.report import write_report
from diff2to3.evaluation.scores import benchmark_metrics
from diff2to3.evaluation.sources import open_source
from diff2to3.evaluation.subjects import Source

PROTOCOL = Path(__file__).resolve().parent / "protocol" / "compare.yaml"


def named(specs: Sequence[str]) -> dict[str, str]:
    """name → source, from ``NAME=SOURCE`` or a source alone, whose last part is the name."""
    found: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals:
            name, source = Path(spec.rpartition(":")[2]).name, spec
        if not name or name in found:
            raise InputError(f"{spec}: two methods are called {name!r}; give names: NAME={source}")
        found[name] = source
    return found


def folder_name(name: str) -> str:
    """``name`` as the name of a folder of its own."""
    clean = re.sub(r"[^\w.-]", "_", name)
    return (
        clean
        if clean == name and name not in (".", "..", "pictures")
        else (f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")
    )


def run(args: argparse.Namespace) -> int:
    rules = load_protocol(args, PROTOCOL)
    device = Worker().device(args.device)
    truth = open_source(args.truth, device)
    ids, notes = choose_ids(args, rules, truth)
    methods: dict[str, Source] = {
        name: open_source(spec, device, args.offline) for name, spec in named(args.methods).items()
    }
    metrics, missing = benchmark_metrics(rules, parse_weights(args.weights), device, args.offline)
    print_notes(missing)
    tables = {}
    for name, method in methods.items():
        plan = Plan(rules, truth, ((method.name, method),), metrics, str(device))
        table = score_method(
            args.out / folder_name(name), plan, ids, [*notes, *missing], Worker(), args.workers
        )
        assert table is not None  # there is one process
        tables[name] = table
    report = write_report(args.out, tables, methods, truth, rules, ids[: args.pictures], device)
    for name, table in tables.items():
        numbers = ", ".join(f"{metric} {held['value']:.5g}" for metric, held in table["metrics"].items())
        print(f"{name}: {numbers or 'no scores'} ({table['num_assets']['scored']} assets)")
    print(report)
    return 1 if any(table["errors"] for table in tables.values()) else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", metavar="[NAME=]SOURCE")
    parser.add_argument("--truth", required=True)
    parser.add_argument("--pictures", type=int, default=20, help="assets shown in the report")
    add_benchmark_arguments(parser)
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
