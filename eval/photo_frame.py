"""How much of an asset a model gives back from one photograph, by views relative to the photograph's camera.

    python eval/photo_frame.py --assets FOLDER_OR_ZIPS --split val --model mini-photo --out photo_frame.json

Every asset is photographed once (elevation -5 to 45 degrees, random but always the same), a model makes an asset of the
photograph, and both are seen from eight views around, the first of which is the photograph's own:

    psnr, ssim       means over the views, on white; psnr_front, _side (45 and 90 degrees away), _back
    voxel_iou        of the generated voxels and those of the asset, in the photo frame
    elevation_error  of the returned camera, in degrees

A model that works in the object's frame is given the photograph's true yaw, place and scale. --part choose takes the
third of the assets (by the hash of their ids) on which settings may be chosen, --part report the other two. Printed and
in OUT (.json, with a table in .md): means, medians, 95 % intervals by bootstrap over assets, and the means by pack. One
line per asset is kept in OUT's .jsonl, so that the same command continues a stopped run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diff2to3.evaluation.cli import main_of
from diff2to3.evaluation.photo_frame_run import Run, tables


def run(args: argparse.Namespace) -> int:
    work = Run(args.model, args.seed, args.device, args.out.with_suffix(".jsonl"))
    rows = work.over(args.assets, args.split, args.part, args.limit)
    table = tables(args.out, rows, work.settings(), args.part)
    print(table)
    return 0 if any("error" not in row for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="photo_frame", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", nargs="+", required=True, help="folders, zips or catalogues of 3D files")
    parser.add_argument("--split", help="assets of this split alone")
    parser.add_argument("--part", choices=("choose", "report", "all"), default="all")
    parser.add_argument("--limit", type=int, help="evaluate at most this many assets")
    parser.add_argument("--model", default="mini-photo", help="an embedded model, a bundle, or a repository")
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
