"""Whether what a model makes of photos can be recognised: each photo against the assets of all photos.

    python eval/recognition.py photos/ --model mini-photo --out recognition.json
    python eval/recognition.py photos/ --assets out/ --out recognition.json    # what `diff2to3 generate` has written

Every photo in the folder is made into an asset, and each asset is compared with each photo:

    silhouette_iou     of the photo's silhouette with its own asset's, in the best of 72 views, box-normalised
    silhouette_first   share of the photos whose own asset has the highest IoU of all assets
    features_first     the same by features of EfficientNet-Lite0 at the photo's camera; _+30 and _-30: turned about z
    color_difference   CIEDE2000 between mean colours; chroma_difference: of their mean chroma
    photo_psnr, photo_iou   of the photo and the asset at the photo's camera, over the object (models that return it)

Assets of a model that returns no camera are compared at the best of the 72 views. Printed and in OUT (.json, with a
table in .md beside it): means, medians and 95 % intervals by bootstrap over photos. Assets are kept in OUT's folder, so
that a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diff2to3.evaluation.cli import main_of
from diff2to3.evaluation.recognition import scored
from diff2to3.evaluation.recognition_run import collected, generated, map_network, recognition_table
from diff2to3.files import write_atomic


def run(args: argparse.Namespace) -> int:
    if args.assets is not None:
        items = collected(args.photos, args.assets, args.background_removal)
    else:
        kept = args.out.parent / f"{args.out.stem}_assets"
        items = generated(args.photos, args.model, kept, args.seed, args.device, args.background_removal)
    found = scored(items, map_network())
    found = {
        "photos": len(items),
        "model": args.model if args.assets is None else str(args.assets.name),
        "seed": args.seed,
        **found,
    }
    write_atomic(args.out, json.dumps(found, indent=1) + "\n")
    table = recognition_table(found)
    write_atomic(args.out.with_suffix(".md"), table)
    print(table)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="recognition", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="a folder of pictures, one object in each")
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--model", default="mini-photo", help="an embedded model, a bundle, or a repository")
    parser.add_argument(
        "--assets", type=Path, help="a folder that diff2to3 generate has written, in place of a model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--background-removal", default="auto", help="as of diff2to3 generate")
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
