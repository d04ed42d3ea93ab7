"""Train variants of one configuration at one budget, and print their scores side by side.

python eval/ablations.py eval/protocol/ablations_vae.yaml data.root=data/mini --out eval/results/ablations_vae.json

The protocol names a training program, its configuration, what all variants share and what each changes. A variant is
an ordinary run with its own folder, so a stopped ablation goes on where it was, and finished variants are read, not
trained again.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from diff2to3.config import MISSING, load_config
from diff2to3.errors import InputError
from diff2to3.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Protocol:
    """program and config are relative to the repository; ``common`` and each variant are key -> value."""

    program: str = MISSING
    config: str = MISSING
    scores: list[str] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for all variants: data.root=data/mini"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the table; a .md is written beside it")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--only", help="only variants whose name holds this")
    args = parser.parse_args(argv)
    try:
        protocol = load_config(Protocol, args.protocol)
        names = [name for name in protocol.variants if args.only is None or args.only in name]
        if not names:
            raise InputError(f"--only: no variant of {args.protocol} holds {args.only!r}")
        rows = [run_variant(protocol, name, args.overrides, args.runs) for name in names]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = markdown(rows, protocol.scores)
    print(table)
    if args.out is not None:
        result = {
            "protocol": str(args.protocol.name),
            "date": time.strftime("%Y-%m-%d"),
            "device": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "common": protocol.common,
            "variants": rows,
        }
        write_atomic(args.out, json.dumps(result, indent=2) + "\n")
        write_atomic(args.out.with_suffix(".md"), table)
    return 0


def run_variant(protocol: Protocol, name: str, overrides: list[str], runs: Path) -> dict[str, Any]:
    """Train one variant, unless its run is complete, and read its last validation."""
    out = runs / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    command = [sys.executable, str(ROOT / protocol.program), str(ROOT / protocol.config)]
    command += [*words_of(protocol, name), *overrides, f"train.out={out}"]
    print(f"== {name}", flush=True)
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise InputError(f"{name}: the run in {out} failed; see above")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "validate"][-1]
    seconds = sum(r["s_per_step"] for r in records if r["kind"] == "train") / sum(
        r["kind"] == "train" for r in records
    )
    row = {"name": name, "changes": protocol.variants[name], "steps": last["step"], "s_per_step": seconds}
    return {**row, **{score: last[score] for score in protocol.scores}}


def words_of(protocol: Protocol, name: str) -> list[str]:
    """What a variant is trained with, as key=value."""
    chosen = {**protocol.common, **protocol.variants[name]}
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for key, value in chosen.items()
    ]


def markdown(rows: list[dict[str, Any]], scores: list[str]) -> str:
    head = ["variant", *scores, "s per step"]
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(scores) + 1)])]
    for row in rows:
        lines.append(
            " | ".join([row["name"], *(f"{row[s]:.4g}" for s in scores), f"{row['s_per_step']:.2f}"])
        )
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
