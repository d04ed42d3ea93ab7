"""``diff2to3 data list`` and ``diff2to3 data fetch``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diff2to3.assets import AssetRecord, Catalogue

EXIT_SOME_FAILED = 1

_LIST = """\
List the assets of a catalogue: a folder or zip of 3D files, a manifest, or a published data set.

  diff2to3 data list assets/
  diff2to3 data list abo:data/abo --min-aesthetic 4.5 --format ids > ids.txt
  diff2to3 data list objaverse:data/objaverse --license CC-BY-4.0 --max-faces 100000

Published sets: objaverse, objaverse-xl, abo, hssd, 3d-future, toys4k, each as NAME:FOLDER.
"""

_FETCH = """\
Bring the files of a published data set here, where its terms allow that without a person; otherwise
say what to do by hand. Files that are here already are left alone, so the same command goes on after a stop.
"""


def add_list(verbs: Any) -> None:
    """The arguments of ``data list``."""
    parser = verbs.add_parser(
        "list",
        help="list the assets of a catalogue",
        description=_LIST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_filters(parser)
    parser.add_argument(
        "--format",
        choices=["table", "ids", "jsonl", "summary"],
        default="table",
        help="columns for people, ids alone, one JSON object a line, or counts (default table)",
    )
    parser.set_defaults(run_verb=run_list)


def add_fetch(verbs: Any) -> None:
    """The arguments of ``data fetch``."""
    parser = verbs.add_parser(
        "fetch",
        help="download the files of a published data set",
        description=_FETCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_filters(parser)
    parser.add_argument("--workers", type=int, default=4, help="downloads at a time (default 4)")
    parser.add_argument(
        "--blender",
        default="blender",
        metavar="PROGRAM",
        help="a Blender, or a Python with bpy, that converts .blend files (toys4k)",
    )
    parser.set_defaults(run_verb=run_fetch)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder, zip, manifest, or NAME:FOLDER")
    parser.add_argument("--ids", metavar="FILE", help="only the ids in this file, one a line")
    parser.add_argument(
        "--license", action="append", metavar="NAME", help="accepted licence; may be repeated"
    )
    parser.add_argument("--split", action="append", metavar="NAME", help="only this split; may be repeated")
    parser.add_argument(
        "--min-faces", type=int, metavar="N", help="triangles, where the catalogue knows them"
    )
    parser.add_argument("--max-faces", type=int, metavar="N")
    parser.add_argument("--min-aesthetic", type=float, metavar="S", help="aesthetic score, where known")
    parser.add_argument("--limit", type=int, metavar="N", help="keep only the first N records")


def _select(args: argparse.Namespace) -> tuple[Catalogue, list[AssetRecord]]:
    from diff2to3.assets import AssetFilter, open_catalogue, read_ids

    catalogue = open_catalogue(args.source)
    chosen = AssetFilter(
        ids=read_ids(args.ids) if args.ids else None,
        licenses=args.license,
        splits=args.split,
        min_faces=args.min_faces,
        max_faces=args.max_faces,
        min_aesthetic=args.min_aesthetic,
        limit=args.limit,
    )
    return catalogue, chosen.apply(catalogue)


def run_list(args: argparse.Namespace) -> int:
    """Print the chosen assets."""
    _, records = _select(args)
    if args.format == "summary":
        print(_summary(records))
        return 0
    try:
        for record in records:
            print(_line(record, args.format))
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if args.format == "table":
        print(_summary(records), file=sys.stderr)
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Fetch the chosen assets; failures go to stderr, one a line."""
    from tqdm import tqdm

    from diff2to3.assets import FetchOptions
    from diff2to3.errors import InputError

    if args.workers < 1:
        raise InputError(f"--workers: expected a positive number, got {args.workers}")
    catalogue, records = _select(args)
    num_failed = 0
    with tqdm(total=len(records), unit="asset", disable=not sys.stderr.isatty()) as progress:
        for asset_id, reason in catalogue.fetch(records, FetchOptions(args.workers, args.blender)):
            progress.update()
            if reason is not None:
                num_failed += 1
                progress.write(f"{asset_id}: {reason}", file=sys.stderr)
    print(f"{len(records) - num_failed} of {len(records)} assets are here")
    return EXIT_SOME_FAILED if num_failed else 0


def _line(record: AssetRecord, style: str) -> str:
    if style == "ids":
        return record.id
    if style == "jsonl":
        row = {
            "id": record.id,
            "file": None if record.source is None else str(record.source),
            "license": record.license,
            "split": record.split,
            "sha256": record.sha256,
            "faces": record.num_faces,
            **record.metadata,
        }
        return json.dumps(row, ensure_ascii=False)
    faces = "?" if record.num_faces is None else str(record.num_faces)
    here = "here" if record.source is not None else "not fetched"
    return "\t".join((record.id, record.split or "-", record.license or "-", faces, here))


def _summary(records: list[AssetRecord]) -> str:
    here = sum(record.source is not None for record in records)
    parts = [f"{len(records)} assets, {here} here"]
    for what, values in (
        ("licences", Counter(record.license or "unknown" for record in records)),
        ("splits", Counter(record.split or "none" for record in records)),
    ):
        parts.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in values.most_common()))
    return "; ".join(parts)
