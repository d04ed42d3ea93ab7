"""Write a file of 3D Gaussians in another format, by the endings; or a model bundle from TRELLIS's published files.

diff2to3 convert chair.ply chair.glb                  .ply, .compressed.ply, .splat, .spz, .sog, .glb (.ksplat is read)
diff2to3 convert chair.spz chair.ply --frame native   z up, as in this package; files are y down otherwise, .glb y up
diff2to3 convert chair.ply chair-mesh.glb --mesh      a textured mesh: .glb, .obj, .stl, .ply
diff2to3 convert microsoft/TRELLIS-image-large -o trellis-image-large/
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from diff2to3.errors import InputError
from diff2to3.formats import FORMATS, FRAMES, encode, find_format, read
from diff2to3.formats.spz import write as write_spz
from diff2to3.mesh.write import check_mesh_name
from diff2to3.types import Gaussians


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="IN",
        help="a file of Gaussians; a folder with pipeline.json and ckpts/, or a hub repository",
    )
    parser.add_argument(
        "target", metavar="OUT", nargs="?", type=Path, help="a file; its ending says the format"
    )
    parser.add_argument("-o", "--out", type=Path, help="the new file, or the bundle's folder")

    files = parser.add_argument_group("files of Gaussians")
    files.add_argument("--frame", choices=tuple(FRAMES), help="axes of OUT (default: as viewers expect)")
    files.add_argument(
        "--input-frame",
        choices=tuple(FRAMES),
        help="axes of IN (default: as the file says, else as is usual)",
    )
    files.add_argument(
        "--bake-filter", action="store_true",
        help="change the Gaussians so that they look right in viewers that blur by 0.3 px²",
    )  # fmt: skip
    files.add_argument(
        "--spz-version", type=int, choices=(3, 4), default=3, help="of .spz (default: %(default)s)"
    )

    files.add_argument(
        "--mesh", action="store_true", help='write a triangle mesh; needs pip install "diff2to3[mesh]"'
    )
    files.add_argument(
        "--faces", type=int, default=20000, help="triangles of the mesh at most (default: %(default)s)"
    )
    files.add_argument(
        "--texture", type=int, default=1024, help="its texels a side, 0 for none (default: %(default)s)"
    )

    bundle = parser.add_argument_group("bundles")
    bundle.add_argument("--offline", action="store_true", help="open no connection; use what is here")


def run(args: argparse.Namespace) -> int:
    if args.target is not None and args.out is not None:
        raise InputError(f"two outputs, {args.target} and -o {args.out}: give one")
    out = args.target or args.out
    if out is None:
        raise InputError("no output: name the file to write, or a folder with -o")
    if any(args.source.lower().endswith(entry.ending) for entry in FORMATS.values()):
        return convert_file(args, out)
    if args.target is not None:
        find_format(args.source)
    return convert_bundle(args, out)


def convert_file(args: argparse.Namespace, out: Path) -> int:
    from diff2to3.files import write_atomic

    entry = None if args.mesh else find_format(out)
    if args.mesh:
        check_mesh_name(out)
    gaussians, metadata = read(args.source, args.input_frame)
    for note in metadata.pop("notes", []):
        print(f"diff2to3 convert: {note}", file=sys.stderr)
    if len(gaussians) == 0:
        raise InputError(f"{args.source}: holds no Gaussians")
    if entry is None:
        return convert_to_mesh(args, out, gaussians)
    if entry.name == "spz" and args.spz_version == 4:
        entry = dataclasses.replace(entry, write=functools.partial(write_spz, version=4))
    content = encode(gaussians, entry, metadata, frame=args.frame, bake_filter=args.bake_filter)
    try:
        write_atomic(out, content)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {error.strerror or error}") from error
    print(f"{out}: {len(gaussians):,} Gaussians, {len(content) / 1e6:.2f} MB")
    return 0


def convert_to_mesh(args: argparse.Namespace, out: Path, gaussians: Gaussians) -> int:
    from diff2to3.mesh import MeshSettings, to_mesh, write_mesh

    mesh = to_mesh(gaussians, MeshSettings(num_faces=args.faces, texture=args.texture))
    for path in write_mesh(out, mesh):
        print(f"{path}: {len(mesh.faces):,} triangles, {path.stat().st_size / 1e6:.2f} MB")
    return 0


def convert_bundle(args: argparse.Namespace, out: Path) -> int:
    from diff2to3.pipeline.convert import convert_trellis

    info = convert_trellis(args.source, out, offline=args.offline)
    for name, entry in info.networks.items():
        print(f"{out / entry.file}: {name}, {entry.type}, sha256 {entry.sha256[:16]}…")
    return 0
