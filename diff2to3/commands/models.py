"""List the public models that diff2to3 runs, with size and licence; or check a local bundle's hashes.

diff2to3 models
diff2to3 models --check FOLDER
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from diff2to3.checkpoint import check_hashes, read_bundle


@dataclass(frozen=True)
class PublicModel:
    """A repository on the Hugging Face hub. ``parameters`` as its authors count them."""

    name: str
    purpose: str
    parameters: str
    license: str


#: Licences as their publishers state them; they bind whoever downloads the weights.
PUBLIC_MODELS = (
    PublicModel("microsoft/TRELLIS-image-large", "photo to 3D Gaussians", "1.2 B", "MIT"),
    PublicModel("microsoft/TRELLIS-text-base", "text to 3D Gaussians", "342 M", "MIT"),
    PublicModel("microsoft/TRELLIS-text-large", "text to 3D Gaussians", "1.1 B", "MIT"),
    PublicModel("microsoft/TRELLIS-text-xlarge", "text to 3D Gaussians", "2.0 B", "MIT"),
    PublicModel(
        "facebook/dinov2-with-registers-large", "image encoder of TRELLIS-image", "304 M", "Apache-2.0"
    ),
    PublicModel(
        "openai/clip-vit-large-patch14", "text encoder of TRELLIS-text", "123 M", "MIT (of the code)"
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="a bundle whose files to check")


def run(args: argparse.Namespace) -> int:
    if args.check is not None:
        info = read_bundle(args.check)
        check_hashes(args.check, info)
        print(
            f"{args.check}: {info.kind}, {len(info.networks)} networks, licence {info.license or 'not stated'}: ok"
        )
        return 0
    rows = [("model", "purpose", "parameters", "licence")]
    rows += [(m.name, m.purpose, m.parameters, m.license) for m in PUBLIC_MODELS]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nA folder that holds such a repository's files works wherever a name does.")
    return 0
