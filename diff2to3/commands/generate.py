"""Turn photos into 3D Gaussian assets: one .ply and one .json (seed, settings, timings) each.

diff2to3 generate photo.png --model microsoft/TRELLIS-image-large -o out/
diff2to3 generate a.png b.png -o out/                     two assets
diff2to3 generate --image front.png --image back.png      one asset from several photos of it
diff2to3 generate --prompt "a red chair" --model microsoft/TRELLIS-text-large
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diff2to3 import __version__
from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.gaussians.ply import ply_bytes
from diff2to3.pipeline.image_to_3d import MULTI_IMAGE_MODES, Result, StageSettings
from diff2to3.pipeline.load import DTYPES, load_model
from diff2to3.pipeline.photos import open_photo

DEFAULT_MODEL = "microsoft/TRELLIS-image-large"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "photos", nargs="*", type=Path, metavar="PHOTO", help="an image file or a folder of them"
    )
    what.add_argument(
        "--image", action="append", type=Path, default=[], metavar="PHOTO",
        help="several times: photos of one object from different sides",
    )  # fmt: skip
    what.add_argument("--prompt", help="a text, for models that take text")
    what.add_argument(
        "-o", "--out", type=Path, default=Path("out"), help="folder for the results (default: out)"
    )
    what.add_argument(
        "--num-samples", type=int, default=1, help="assets from each input, by seed, seed + 1, …"
    )
    what.add_argument("--seed", type=int, default=0)

    how = parser.add_argument_group("how to sample (default: as the model says)")
    how.add_argument("--steps", type=int, help="Euler steps of each stage")
    how.add_argument("--guidance-scale", type=float, help="1 is off; TRELLIS's cfg_strength + 1")
    how.add_argument(
        "--multi-image", choices=MULTI_IMAGE_MODES, default=MULTI_IMAGE_MODES[0],
        help="with several --image: one of them a step in turn, or the mean over all (slower)",
    )  # fmt: skip

    model = parser.add_argument_group("model and machine")
    model.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"folder or hub repository (default: {DEFAULT_MODEL})"
    )
    model.add_argument("--image-encoder", metavar="FOLDER", help="folder of the condition encoder's weights")
    model.add_argument("--offline", action="store_true", help="open no connection; use what is here")
    model.add_argument("--device", help="cuda, cpu or mps (default: the best there is)")
    model.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the large layers (default: as released on a GPU)"
    )
    model.add_argument("--low-vram", action="store_true", help="keep networks on the CPU between stages")


@dataclass(frozen=True)
class Job:
    """One input and the stem of its files."""

    stem: str
    prompt: list[Image.Image] | str
    origin: list[str]


def run(args: argparse.Namespace) -> int:
    jobs = collect_jobs(args)
    for name in ("num_samples", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    device = choose_device(args.device)
    make_folder(args.out)
    model = load_model(
        args.model,
        device=device,
        dtype=DTYPES.get(args.dtype),
        offline=args.offline,
        image_encoder=args.image_encoder,
        low_memory=args.low_vram,
    )
    structure = override(model.structure_settings, args)
    latent = override(model.latent_settings, args)
    for job in jobs:
        for number in range(args.num_samples):
            stem = job.stem if args.num_samples == 1 else f"{job.stem}_{number}"
            with Progress(stem) as progress:
                result = model(
                    job.prompt,
                    seed=args.seed + number,
                    structure=structure,
                    latent=latent,
                    multi_image=args.multi_image,
                    progress=progress,
                )
            metadata = describe(args, job, result, structure, latent, device)
            path = write_result(args.out, stem, result, metadata)
            print(f"{path}: {len(result.gaussians)} Gaussians in {sum(result.seconds.values()):.1f} s")
    for note in model.notes:
        print(f"diff2to3 generate: {note}", file=sys.stderr)
    return 0


def collect_jobs(args: argparse.Namespace) -> list[Job]:
    """Decode every input before anything slow begins, so that a bad one costs nothing."""
    if args.prompt is not None:
        if args.photos or args.image:
            raise InputError("--prompt: give a text or photos, not both")
        if not args.prompt.strip():
            raise InputError("--prompt: the text is empty")
        stem = re.sub(r"\W+", "_", args.prompt).strip("_")[:60] or "prompt"
        return [Job(stem, args.prompt, [args.prompt])]
    if args.image and args.photos:
        raise InputError("--image: give photos of one object with --image, or separate photos, not both")
    if args.image:
        images = [open_photo(path) for path in args.image]
        return [Job(args.image[0].stem, images, [str(p) for p in args.image])]
    paths = [p for given in args.photos for p in expand(given)]
    if not paths:
        raise InputError("no input: give a photo, a folder of photos, --image or --prompt")
    stems = [path.stem for path in paths]
    names = [p.stem if stems.count(p.stem) == 1 else p.name.replace(".", "_") for p in paths]
    return [Job(name, [open_photo(p)], [str(p)]) for name, p in zip(names, paths, strict=True)]


def expand(path: Path) -> list[Path]:
    """The images in a folder, sorted; a file stays as it is."""
    if not path.is_dir():
        return [path]
    known = Image.registered_extensions()
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in known)
    if not found:
        raise InputError(f"{path}: no image in this folder")
    return found


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{__name__}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror or error}") from error


def override(settings: StageSettings, args: argparse.Namespace) -> StageSettings:
    changes: dict[str, Any] = {"num_steps": args.steps, "guidance_scale": args.guidance_scale}
    return dataclasses.replace(settings, **{k: v for k, v in changes.items() if v is not None})


def describe(
    args: argparse.Namespace,
    job: Job,
    result: Result,
    structure: StageSettings,
    latent: StageSettings,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "input": job.origin,
        "model": args.model,
        "seed": result.seed,
        "structure": dataclasses.asdict(structure),
        "latent": dataclasses.asdict(latent),
        "num_voxels": len(result.latents),
        "num_gaussians": len(result.gaussians),
        "frame": "right-handed, z up",
        "screen_filter": 0.1,
        "device": str(device),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "versions": {"diff2to3": __version__, "torch": torch.__version__},
    }


def write_result(folder: Path, stem: str, result: Result, metadata: dict[str, Any]) -> Path:
    """Both files, each whole or not at all."""
    path = folder / f"{stem}.ply"
    note = {k: metadata[k] for k in ("seed", "screen_filter")} | {"generator": f"diff2to3 {__version__}"}
    try:
        write_atomic(path, ply_bytes(result.gaussians, note))
        write_atomic(folder / f"{stem}.json", json.dumps(metadata, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


class Progress:
    """A bar over the steps of both stages, on stderr when that is a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self.stage = ""

    def __enter__(self) -> Progress:
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self.stage:
            self.close()
            self.stage = stage
            self.bar = tqdm(total=total, desc=f"{self.label}: {stage}", disable=None, leave=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __exit__(self, *_: object) -> None:
        self.close()
