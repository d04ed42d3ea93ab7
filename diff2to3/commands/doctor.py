"""Show what is built and found on this machine, and the one line that adds each missing thing.

Nothing here is an error: whatever is missing is optional, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from diff2to3 import doctor

MARKS = {doctor.OK: "ok", doctor.MISSING: "--", doctor.BROKEN: "!!", doctor.INFO: "  "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list, one object a line of the report"
    )
    parser.add_argument(
        "--imports",
        action="store_true",
        help="also import each optional package, in a process of its own (slow)",
    )


def run(args: argparse.Namespace) -> int:
    checks = doctor.collect(imports=args.imports)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print(as_text(checks))
    return 0


def as_text(checks: list[doctor.Check]) -> str:
    lines: list[str] = []
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {MARKS[check.status]}  {check.name:<18} {check.value}".rstrip())
        if check.fix:
            lines.append(f"{'':<25}fix: {check.fix}")
    return "\n".join(lines)
