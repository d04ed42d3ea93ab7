"""Fail where a result is worse than a committed one beyond the noise.

    python eval/gate.py runs/new/table.json --baseline eval/results/mini.json [--sigmas 3] [--floor 1e-4]

Exit code 0: no metric is worse by more than SIGMAS standard errors (paired over assets where both results have them)
plus FLOOR times its value. 1: one is, or is missing. 2: the results cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diff2to3.errors import InputError
from diff2to3.evaluation.cli import main_of
from diff2to3.evaluation.gate import compare_results
from diff2to3.evaluation.tables import read_table


def run(args: argparse.Namespace) -> int:
    if args.sigmas < 0 or args.floor < 0:
        raise InputError("--sigmas, --floor: expected numbers >= 0")
    verdicts = compare_results(
        read_table(args.baseline), read_table(args.result), sigmas=args.sigmas, floor=args.floor
    )
    for verdict in verdicts:
        print(verdict.line())
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result")
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--sigmas", type=float, default=3.0)
    parser.add_argument("--floor", type=float, default=1e-4)
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
