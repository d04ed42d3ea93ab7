"""Write a bundle of ours (model.json and safetensors, with hashes) from a TRELLIS folder or repository.

diff2to3 convert microsoft/TRELLIS-image-large -o trellis-image-large/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diff2to3.pipeline.convert import convert_trellis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder with pipeline.json and ckpts/, or a hub repository")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--offline", action="store_true", help="open no connection; use what is here")


def run(args: argparse.Namespace) -> int:
    info = convert_trellis(args.source, args.out, offline=args.offline)
    for name, entry in info.networks.items():
        print(f"{args.out / entry.file}: {name}, {entry.type}, sha256 {entry.sha256[:16]}…")
    return 0
