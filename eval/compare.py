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
    WEIGHTS,
    Worker,
    choose_ids,
    load_protocol,
    main_of,
    parse_weights,
    score_method,
)
from diff2to3.evaluation.report import write_report
from diff2to3.evaluation.scores import Scorer
from diff2to3.evaluation.sources import Source, open_source

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
    scorer = Scorer.build(rules, parse_weights(args.weights), device, args.offline)
    tables = {}
    for name, method in methods.items():
        out = args.out / folder_name(name)
        table = score_method(out, method, truth, scorer, ids, notes, device, Worker())
        assert table is not None
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
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--protocol", type=Path, help="a YAML file (default: eval/protocol/compare.yaml)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the protocol")
    parser.add_argument("--ids", help="a file with one id a line: the assets to compare")
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="NAME=PATH", help=f"of {', '.join(WEIGHTS)}"
    )
    parser.add_argument("--pictures", type=int, default=20, help="assets shown in the report")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offline", action="store_true", help="never open a connection")
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
