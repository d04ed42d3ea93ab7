"""Render a 3DGS .ply from cameras around it.

diff2to3 render out.ply -o turntable.gif              a turn around the object (.gif, .mp4, or .png for a sheet)
diff2to3 render out.ply -o sheet.png --views 8 --resolution 256 --elevation 30
diff2to3 render scene.ply -o scene.mp4 --fit          a file whose object is not in the unit box
diff2to3 render out.ply -o out.mp4 --device cuda --backend gsplat    with gsplat's rasteriser
diff2to3 render out.ply -o photo.png --camera metadata.json    as the photo showed it that out.ply was made from
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.formats import read
from diff2to3.gaussians.pictures import check_format, write_frames
from diff2to3.kernels.library import BACKENDS, resolve_backend
from diff2to3.pipeline.camera_file import read_camera
from diff2to3.pipeline.turntable import DEFAULT_VIEWS, frames
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, sample_cameras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ply", type=Path, metavar="PLY", help="a 3D Gaussian Splatting file")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help=".gif, .mp4 or .png (a sheet)"
    )
    parser.add_argument(
        "--orbit", action="store_true", help="turn once around the object (this is the default)"
    )
    parser.add_argument(
        "--camera", type=Path, metavar="FILE",
        help="metadata.json beside a generated .ply: one picture (.png) from its photo's camera",
    )  # fmt: skip
    parser.add_argument(
        "--views", type=int, help="frames of the turn (default: 8 in a .png, 48 in a .gif, 120 in an .mp4)"
    )
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--elevation", type=float, default=20.0, help="degrees above the horizon (default: %(default)s)"
    )
    parser.add_argument(
        "--radius", type=float, default=2.0, help="distance from the centre (default: %(default)s)"
    )
    parser.add_argument(
        "--fov", type=float, default=40.0, help="field of view in degrees (default: %(default)s)"
    )
    parser.add_argument(
        "--background", type=float, default=1.0, help="grey level from 0 to 1 (default: white)"
    )
    parser.add_argument(
        "--fit", action="store_true", help="centre the object and scale it into the unit box first"
    )
    parser.add_argument(
        "--fps", type=int, default=24, help="frames a second of an animation (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=(*BACKENDS, "gsplat"), default="auto",
        help="rasteriser: native (compiled kernels), reference (PyTorch, slow), gsplat (that package, needs CUDA); "
        "auto takes native where it is built (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    check_format(args.out)
    for name, low, high in (
        ("resolution", 1, 8192),
        ("background", 0, 1),
        ("fps", 1, 240),
        ("elevation", -90, 90),
    ):
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name}: expected a number from {low} to {high}, got {getattr(args, name)}")
    check_backend(args.backend, args.device)
    num_views = DEFAULT_VIEWS[args.out.suffix.lower()] if args.views is None else args.views
    gaussians, metadata = read(args.ply, means_dtype=torch.float64 if args.fit else torch.float32)
    for note in metadata.get("notes", []):
        print(f"diff2to3 render: {note}", file=sys.stderr)
    if len(gaussians) == 0:
        raise InputError(f"{args.ply}: holds no Gaussians")
    if args.camera is not None:
        return as_in_photo(args, gaussians)
    if args.fit:
        gaussians = fit_unit_box(gaussians)
    try:
        config = CameraConfig(
            "orbit", num_views=num_views, radius=args.radius, fov_degrees=args.fov, elevation=args.elevation
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    viewmats, Ks = sample_cameras(config, args.resolution, args.resolution, np.random.default_rng(0))
    shots = (viewmats, Ks, args.resolution, args.background, args.backend)
    pictures = turn(gaussians.to(args.device), *shots)
    write_frames(args.out, pictures, args.fps)
    print(f"{args.out}: {num_views} views of {len(gaussians):,} Gaussians")
    return 0


def check_backend(backend: str, device: str) -> None:
    """InputError or MissingDependencyError where the rasteriser ``backend`` cannot run on ``device``."""
    if backend == "gsplat":
        if importlib.util.find_spec("gsplat") is None:
            raise MissingDependencyError("gsplat", "gsplat")
        if torch.device(device).type != "cuda":
            raise InputError(f"--backend gsplat: runs on CUDA only, not on {device}; add --device cuda")
    elif backend == "native" and resolve_backend("auto", torch.device(device), torch.float32) != "native":
        raise InputError(
            f"--backend native: no compiled kernels for {device}; 'diff2to3 doctor' says what is missing"
        )


def as_in_photo(args: argparse.Namespace, gaussians: Gaussians) -> int:
    """One picture from the camera that a metadata.json records."""
    if args.out.suffix.lower() != ".png":
        raise InputError(f"{args.out}: --camera makes one picture; name a .png")
    for name in ("fit", "views", "orbit"):
        if getattr(args, name):
            raise InputError(
                f"--{name}: has no meaning with --camera, which is one view of the asset as it is"
            )
    camera = read_camera(args.camera)
    shot = [(camera.viewmat, camera.K(args.resolution))]
    pictures = frames(gaussians.to(args.device), shot, args.resolution, args.background, args.backend)
    write_frames(args.out, pictures, args.fps)
    print(f"{args.out}: the photo's view of {len(gaussians):,} Gaussians")
    return 0


def turn(
    gaussians: Gaussians,
    viewmats: Tensor,
    Ks: Tensor,
    resolution: int,
    background: float,
    backend: str = "auto",
) -> np.ndarray:
    """Frames uint8 [V, R, R, 3], with a progress bar."""
    cameras = tqdm(list(zip(viewmats, Ks, strict=True)), desc="render", unit="view")
    return frames(gaussians, cameras, resolution, background, backend)


def fit_unit_box(gaussians: Gaussians) -> Gaussians:
    """Centred, longest side 1. Stray Gaussians do not count: the box is that of the middle 98 % along each axis.

    Positions in float64, far from the origin, are as exact afterwards as they were.
    """
    low = gaussians.means.quantile(0.01, dim=0)
    high = gaussians.means.quantile(0.99, dim=0)
    scale = 1 / (high - low).max().clamp_min(1e-9)
    return Gaussians(
        ((gaussians.means - (low + high) / 2) * scale).to(gaussians.scales.dtype),
        gaussians.quats,
        gaussians.scales * scale.to(gaussians.scales.dtype),
        gaussians.opacities,
        gaussians.sh,
    )
