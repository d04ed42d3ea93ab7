"""Show a 3D Gaussian file in the browser. The page is one HTML file that needs nothing from elsewhere.

diff2to3 view chair.ply                               opens the browser on a page in the temporary folder
diff2to3 view chair.ply -o chair.html --photo a.png   writes the page, with the photo beside the object
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import webbrowser
from pathlib import Path

from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.formats import read
from diff2to3.gaussians.render import EPS2D
from diff2to3.pipeline.photo_files import open_photo
from diff2to3.web.viewer import viewer_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a 3D Gaussian Splatting file")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="PAGE.html", help="write the page here, and open no browser"
    )
    parser.add_argument("--photo", type=Path, help="a picture to show beside the object")
    parser.add_argument(
        "--screen-filter", type=float, metavar="PX2",
        help="variance in px² of the screen filter (default: what the file says, else 0.1)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    gaussians, metadata = read(args.file)
    for note in metadata.pop("notes", []):
        print(f"diff2to3 view: {note}", file=sys.stderr)
    if len(gaussians) == 0:
        raise InputError(f"{args.file}: holds no Gaussians")
    photo = open_photo(args.photo) if args.photo else None
    given = metadata.get("screen_filter", EPS2D) if args.screen_filter is None else args.screen_filter
    if not isinstance(given, int | float) or not 0 <= given <= 100:
        raise InputError(f"--screen-filter: expected px² from 0 to 100, got {given!r}")
    page = viewer_page(
        gaussians, args.file.stem, photo=photo, note=metadata, screen_filter=float(given)
    ).encode("utf-8")
    path = args.out
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="diff2to3-view-")) / f"{args.file.stem}.html"
    try:
        write_atomic(path, page)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    print(f"{path}: {len(gaussians):,} Gaussians, {len(page) / 1e6:.2f} MB")
    if args.out is None and not webbrowser.open(path.absolute().as_uri()):
        print("diff2to3 view: no browser found; open the page yourself", file=sys.stderr)
    return 0
