"""Turn a 3D model into 3D Gaussians through the 2to3-VAE: what the representation keeps of an asset.

diff2to3 reconstruct asset.glb -o out.ply
diff2to3 reconstruct a.glb b.obj folder/ -o out/            a .ply for each
diff2to3 reconstruct asset.glb -o out.ply --turntable out.gif
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diff2to3 import __version__
from diff2to3.assets import load_mesh
from diff2to3.assets.load import UP_AXIS
from diff2to3.commands.generate import make_folder
from diff2to3.commands.render import turn
from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.formats import FORMATS, encode
from diff2to3.gaussians.pictures import check_format, write_frames
from diff2to3.machine import choose_device
from diff2to3.pipeline.load import DTYPES
from diff2to3.pipeline.reconstruct import Reconstruction, Reconstructor
from diff2to3.pipeline.turntable import DEFAULT_VIEWS
from diff2to3.views.cameras import CameraConfig, sample_cameras
from diff2to3.voxels.providers import PROVIDERS

DEFAULT_MODEL = "mini"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(UP_AXIS)
    parser.add_argument(
        "assets", nargs="+", type=Path, metavar="ASSET", help=f"a 3D file ({known}) or a folder of them"
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a .ply for one asset, or a folder"
    )  # fmt: skip
    parser.add_argument(
        "--turntable", type=Path, metavar="FILE", help="also a picture of one asset: .png, .gif or .mp4"
    )
    parser.add_argument(
        "--resolution", type=int, default=512, help="of the turntable, pixels a side (default: %(default)s)"
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="embedded model, folder or hub repository (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="PROVIDER=PATH", help="of the model's feature providers"
    )
    parser.add_argument("--up", choices=("auto", "y", "z"), default="auto", help="the files' upward axis")
    parser.add_argument("--offline", action="store_true", help="open no connection; use what is here")
    parser.add_argument("--device", help="cuda, cpu or mps (default: the best there is)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the large layers")


def run(args: argparse.Namespace) -> int:
    jobs = collect_jobs(args.assets, args.out)
    check_outputs(args, jobs)
    device = choose_device(args.device)
    # One asset is read before the model is, so that a bad file is told at once.
    meshes = [load_mesh(path, up=args.up) for path, _ in jobs if len(jobs) == 1]
    model = Reconstructor.from_pretrained(
        args.model,
        device=device,
        dtype=DTYPES.get(args.dtype),
        offline=args.offline,
        weights=parse_weights(args.weights),
    )
    failed = 0
    for path, out in jobs:
        try:
            mesh = meshes[0] if meshes else load_mesh(path, up=args.up)
            made = model(mesh)
        except InputError as error:
            if len(jobs) == 1:
                raise
            failed += 1
            print(f"diff2to3 reconstruct: error: {error}", file=sys.stderr)
            continue
        write(out, made, metadata(args.model, path, mesh.transform))
        if args.turntable is not None:
            write_turntable(args.turntable, made, args.resolution, device)
        seconds = sum(made.seconds.values())
        print(f"{out}: {len(made.gaussians):,} Gaussians on {len(made.latents):,} voxels in {seconds:.1f} s")
    return 2 if failed else 0


def parse_weights(pairs: list[str]) -> dict[str, str]:
    """PROVIDER=PATH each."""
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or name not in PROVIDERS or not path:
            raise InputError(f"--weights {pair}: expected PROVIDER=PATH, with one of {', '.join(PROVIDERS)}")
        found[name] = path
    return found


def collect_jobs(paths: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """(asset, .ply) of everything that was named. InputError for a missing file or an empty folder."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix[1:].lower() in UP_AXIS)
            if not inside:
                raise InputError(f"{path}: no 3D file ({', '.join(UP_AXIS)}) in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file")
    if len(found) == 1 and out.suffix.lower() == ".ply":
        return [(found[0], out)]
    if out.suffix.lower() == ".ply":
        raise InputError(f"-o {out}: {len(found)} assets cannot be one file; name a folder")
    stems = [path.stem for path in found]
    names = [p.stem if stems.count(p.stem) == 1 else p.name.replace(".", "_") for p in found]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"-o {out}: two assets are called {twice!r}; reconstruct them one by one")
    return [(path, out / f"{name}.ply") for path, name in zip(found, names, strict=True)]


def check_outputs(args: argparse.Namespace, jobs: list[tuple[Path, Path]]) -> None:
    """Find out before anything slow begins whether results can be written."""
    if args.turntable is not None:
        if len(jobs) > 1:
            raise InputError("--turntable: is a picture of one asset; diff2to3 render makes others")
        check_format(args.turntable)
        if not 1 <= args.resolution <= 8192:
            raise InputError(f"--resolution: expected a number from 1 to 8192, got {args.resolution}")
    folder = jobs[0][1].parent
    if args.out.suffix.lower() == ".ply":
        if not folder.is_dir():
            raise InputError(f"{args.out}: the folder {folder.absolute()} does not exist")
        if args.out.is_dir():
            raise InputError(f"{args.out}: is a folder")
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder")
    # A folder that is not there yet is made with its first file, so that a run that fails leaves nothing.
    if folder.is_dir():
        make_folder(folder)


def metadata(model: str, path: Path, transform: np.ndarray) -> dict[str, Any]:
    """What the file says about itself; ``transform`` takes the asset's own coordinates to the object frame."""
    return {
        "generator": f"diff2to3 {__version__}",
        "model": Path(model).name,
        "asset": path.name,
        "screen_filter": 0.1,
        "transform": [[round(float(x), 9) for x in row] for row in transform],
    }


def write(path: Path, made: Reconstruction, note: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, encode(made.gaussians, FORMATS["ply"], note))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_turntable(path: Path, made: Reconstruction, resolution: int, device: torch.device) -> None:
    config = CameraConfig("orbit", num_views=DEFAULT_VIEWS[path.suffix.lower()])
    viewmats, Ks = sample_cameras(config, resolution, resolution, np.random.default_rng(0))
    write_frames(path, turn(made.gaussians.to(device), viewmats, Ks, resolution, 1.0))
