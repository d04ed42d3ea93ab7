"""List the models that diff2to3 runs, with size and licence; check a bundle's hashes; put bundles together.

diff2to3 models
diff2to3 models --check FOLDER
diff2to3 models merge VAE STRUCTURE FLOW -o MODEL       the networks and settings of several bundles as one
diff2to3 models merge MODEL NEWER -o MODEL --replace    what the later one has counts
diff2to3 models average A B --weights 2 1 -o MEAN       the mean of the weights of networks trained from one beginning
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diff2to3.checkpoint import (
    MODEL_FILE,
    BundleInfo,
    average_bundles,
    merge_bundles,
    read_bundle,
    read_checked_bundle,
    save_bundle,
)
from diff2to3.errors import InputError
from diff2to3.hub import EMBEDDED, embedded_models
from diff2to3.tensors import half_tensors


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
    parser.add_argument("--check", metavar="MODEL", help="a bundle's folder, or an embedded model, to check")
    actions = parser.add_subparsers(dest="action", metavar="merge | average")
    merge = actions.add_parser("merge", help="put bundles together")
    merge.add_argument("bundles", nargs="+", type=Path, metavar="FOLDER")
    merge.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
    merge.add_argument("--replace", action="store_true", help="where two differ, the later one counts")
    merge.add_argument("--half", action="store_true", help="store weights as float16, half the size")
    merge.add_argument(
        "--kind", help="of the result, such as image-to-3d (default: what its networks make it)"
    )
    average = actions.add_parser("average", help="the weighted mean of bundles' networks")
    average.add_argument("bundles", nargs="+", type=Path, metavar="FOLDER")
    average.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
    average.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of each, in any unit (default: all the same)"
    )


def run(args: argparse.Namespace) -> int:
    if args.action == "merge":
        return run_merge(args)
    if args.action == "average":
        info, tensors = average_bundles(args.bundles, args.weights or [1.0] * len(args.bundles))
        return write_and_report(args.out, info, tensors)
    if args.check is not None:
        folder = EMBEDDED / args.check if args.check in embedded_models() else Path(args.check)
        info = read_checked_bundle(folder)
        print(
            f"{args.check}: {info.kind}, {len(info.networks)} networks, licence {info.license or 'not stated'}: ok"
        )
        return 0
    rows = [("model", "purpose", "parameters", "licence")]
    rows += [embedded_row(name) for name in embedded_models()]
    rows += [(m.name, m.purpose, m.parameters, m.license) for m in PUBLIC_MODELS]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nA folder that holds such a repository's files works wherever a name does.")
    return 0


def embedded_row(name: str) -> tuple[str, str, str, str]:
    """An embedded model as a line of the list; parameters from the files' headers."""
    from safetensors import safe_open

    info = read_bundle(EMBEDDED / name)
    count = 0
    for entry in info.networks.values():
        with safe_open(EMBEDDED / name / entry.file, "pt") as file:
            for key in file.keys():
                shape = file.get_slice(key).get_shape()
                count += torch.Size(shape).numel()
    purpose = {"image-to-3d": "photo to 3D Gaussians", "vae": "3D models to 3D Gaussians"}
    return name, f"{purpose.get(info.kind, info.kind)}, in the package", f"{count / 1e6:.1f} M", info.license


def run_merge(args: argparse.Namespace) -> int:
    info, tensors = merge_bundles(args.bundles, kind=args.kind, replace=args.replace)
    if args.half:
        tensors = {name: half_tensors(values, name) for name, values in tensors.items()}
    return write_and_report(args.out, info, tensors)


def write_and_report(out: Path, info: BundleInfo, tensors: dict[str, dict[str, Tensor]]) -> int:
    """Write the bundle, and say what is in it."""
    write_bundle(out, info, tensors)
    size = sum((out / entry.file).stat().st_size for entry in info.networks.values())
    print(f"{out}: {info.kind}: {', '.join(info.networks)}; {size / 1e6:.1f} MB")
    return 0


def write_bundle(folder: Path, info: BundleInfo, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write beside ``folder`` and move the files in, ``model.json`` last."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        save_bundle(temporary, info, tensors)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == MODEL_FILE):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
