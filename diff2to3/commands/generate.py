"""Turn photos into 3D Gaussian assets: for each a .ply, a turntable, the cut-out and metadata.json (seed, settings,
timings); beside them index.json and a contact sheet.

diff2to3 generate photo.png -o out/                       out/photo/photo.ply, out/photo/photo_turntable.png, …
diff2to3 generate a.png photos/ -o out/                   an asset each: out/a/a.ply, …
diff2to3 generate photo.png -o photo.ply                  this file alone
diff2to3 generate --image front.png --image back.png      one asset from several photos of it
diff2to3 generate photo.png --model microsoft/TRELLIS-image-large
diff2to3 generate --prompt "a red chair" --model microsoft/TRELLIS-text-large
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import re
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diff2to3.errors import InputError
from diff2to3.flow.denoise import MULTI_IMAGE_MODES, resampled
from diff2to3.flow.samplers import SAMPLERS
from diff2to3.formats import FORMATS, FRAMES, WRITABLE, find_format, format_named
from diff2to3.machine import choose_device, limit_threads
from diff2to3.mesh.write import MESH_FORMATS
from diff2to3.pipeline.cutout import METHODS
from diff2to3.pipeline.index import METADATA, SHEET, ContactSheet, read_json, write_index
from diff2to3.pipeline.outputs import (
    TURNTABLES,
    FileWriter,
    OutputFolder,
    Writer,
    check_turntable,
    describe,
    unwritable,
)
from diff2to3.pipeline.photo_files import check_photo, open_photo
from diff2to3.pipeline.photos import Photo

if TYPE_CHECKING:
    from PIL import Image

    from diff2to3.pipeline.image_to_3d import ImageTo3D
    from diff2to3.pipeline.result import Result

DEFAULT_MODEL = "mini-photo"
#: Arguments of the library → options of this command, where they have other names.
FLAGS = {"num_steps": "--steps", "guidance_scale": "--guidance-scale", "sampler": "--sampler"}
#: Endings with which --out names a file.
FILES = tuple(entry.ending for entry in FORMATS.values())
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        "-o", "--out", type=Path, default=Path("out"),
        help="folder for the results, or a file, such as chair.ply or chair.spz, for the Gaussians of one asset alone "
        "(default: out)",
    )  # fmt: skip
    what.add_argument(
        "--recursive",
        action="store_true",
        help="also the photos in folders within a folder; hidden ones never",
    )
    what.add_argument(
        "--skip-existing", action="store_true",
        help="leave out what --out has already: of the same photo, seed and model",
    )  # fmt: skip
    what.add_argument(
        "--num-samples", type=int, default=1, help="assets from each input, by seed, seed + 1, …"
    )
    what.add_argument("--seed", type=int, default=0)
    what.add_argument(
        "--format", default="ply", metavar="NAMES",
        help=f"files of Gaussians to write, with commas between: {', '.join(WRITABLE)} (default: ply)",
    )  # fmt: skip
    what.add_argument(
        "--frame", choices=tuple(FRAMES), help="axes of those files (default: as viewers expect)"
    )
    what.add_argument(
        "--mesh", action="store_true",
        help='also NAME_mesh.glb, a textured triangle mesh; with -o NAME.glb (.obj, .ply, .stl) that file is the mesh; '
        'needs pip install "diff2to3[mesh]"',
    )  # fmt: skip
    what.add_argument(
        "--bake-filter", action="store_true",
        help="for viewers that blur by 0.3 px²: Gaussians changed so that they look right there",
    )  # fmt: skip
    what.add_argument(
        "--turntable", choices=TURNTABLES, default="png",
        help="a sheet of 8 views, an animation, or a film (default: png)",
    )  # fmt: skip
    what.add_argument(
        "--viewer",
        action="store_true",
        help="also a page that shows the asset in any browser: one .html file",
    )
    what.add_argument(
        "--background-removal", choices=METHODS, default="auto",
        help="for photos without transparency: rembg where it is installed, else the network in this package or, where "
        "they agree, the border's colour (auto); "
        "none: the photo is all object",
    )  # fmt: skip

    how = parser.add_argument_group(
        "how to sample (default: as the model says; a model that is no flow has no steps to set)"
    )
    how.add_argument("--steps", type=int, help="steps of each stage")
    how.add_argument("--guidance-scale", type=float, help="1 is off; TRELLIS's cfg_strength + 1")
    how.add_argument("--sampler", choices=tuple(SAMPLERS))
    how.add_argument(
        "--multi-image", choices=MULTI_IMAGE_MODES, default=MULTI_IMAGE_MODES[0],
        help="with several --image: one of them a step in turn (where there are as many steps), or the mean over all "
        "(slower)",
    )  # fmt: skip
    how.add_argument(
        "--refine", type=int, metavar="STEPS",
        help="fit the object to its photo at the photo's camera; 0: off (default: as the model says; models that "
        "do not know the camera cannot)",
    )  # fmt: skip
    how.add_argument(
        "--batch-size", type=int, default=1, help="assets generated at once; changes speed, not results"
    )

    how.add_argument(
        "--prune", type=float, metavar="PIXELS",
        help="leave out Gaussians of which pictures of 128² from 16 sides show less in all, for smaller files: 0.05 "
        "leaves out those inside",
    )  # fmt: skip

    model = parser.add_argument_group("model and machine")
    model.add_argument(
        "--model", default=DEFAULT_MODEL,
        help=f"embedded model, folder or hub repository (default: {DEFAULT_MODEL}, which is embedded)",
    )  # fmt: skip
    model.add_argument("--image-encoder", metavar="FOLDER", help="folder of the condition encoder's weights")
    model.add_argument("--offline", action="store_true", help="open no connection; use what is here")
    model.add_argument("--device", help="cuda, cpu or mps (default: the best there is)")
    model.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the large layers (default on a GPU: as released; bfloat16 for flows of our own)",
    )
    model.add_argument("--low-vram", action="store_true", help="keep networks on the CPU between stages")


@dataclass
class Job:
    """One input: the stem of its files, where it comes from, and, once it has been read, what the model is given."""

    stem: str
    origin: list[str]
    paths: list[Path] = field(default_factory=list)
    text: str | None = None
    photos: list[Photo] = field(default_factory=list)

    @cached_property
    def digest(self) -> list[str]:
        """SHA-256 of each photo's file, or of the text."""
        if self.text is not None:
            return [hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()]
        digests = []
        for path in self.paths:
            try:
                digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        return digests

    def prompt(self, model: ImageTo3D, background_removal: str) -> str | list[Photo]:
        """Read and prepare the photos, once. InputError that names the photo."""
        if self.text is not None:
            return self.text
        if not self.photos:
            self.photos = [self.read(model, path, background_removal) for path in self.paths]
        return self.photos

    def read(self, model: ImageTo3D, path: Path, background_removal: str) -> Photo:
        image = open_photo(path)
        try:
            return model.photo(image, background_removal)
        except InputError as error:
            raise InputError(f"{path}: {str(error).removeprefix('image: ')}") from error


@dataclass(frozen=True)
class Failure:
    """An input of which nothing was made, and why."""

    input: list[str]
    message: str


@dataclass(frozen=True)
class Task:
    """One asset to make."""

    job: Job
    stem: str
    seed: int


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    limit_threads()
    check_numbers(args)
    jobs, failed = collect_jobs(args)
    check_turntable(args.turntable)
    formats = [format_named(name) for name in dict.fromkeys(args.format.split(","))]
    encoding = {"frame": args.frame, "bake_filter": args.bake_filter}
    tasks, skipped = placed(tasks_of(jobs, args), args)
    if args.skip_existing and skipped:
        print(f"{args.out}: {skipped} already there, left out")
    if tasks:
        device = choose_device(args.device)
        file = single_file(args, tasks, failed)
        with OutputFolder(args.out if file is None else file.parent) as output:
            model = load(args, device)
            seconds = {"start": start - args.started, "load": time.perf_counter() - start}
            common = describe(args.model, model, device)
            writer: Writer | FileWriter
            if file is not None:
                writer = FileWriter(file, encoding, mesh=args.mesh)
            else:
                options: dict[str, Any] = {"viewer": args.viewer, "mesh": args.mesh}
                options |= {"formats": formats, "encoding": encoding}
                writer = Writer(output, args.turntable, common, seconds, **options)
            work = Run(args, model, writer, failed)
            try:
                work.all(tasks)
            finally:
                if file is None:
                    work.conclude(args.out)
        for note in model.notes:
            print(f"diff2to3 generate: {note}", file=sys.stderr)
    for failure in failed:
        print(f"diff2to3 generate: error: {failure.message}", file=sys.stderr)
    if failed and len(jobs) + len(failed) > 1:
        print(f"diff2to3 generate: {len(failed)} failed; the others are done", file=sys.stderr)
    return 2 if failed else 0


def single_file(args: argparse.Namespace, tasks: list[Task], failed: list[Failure]) -> Path | None:
    """The file that ``--out`` names, if it does. InputError where there is more than one asset to write."""
    out: Path = args.out
    meshes = tuple(f".{kind}" for kind in MESH_FORMATS)
    if not out.name.lower().endswith((*FILES, *meshes) if args.mesh else FILES) or out.is_dir():
        return None
    if args.mesh and not out.name.lower().endswith(meshes):
        raise InputError(
            f"--out: {out} is a file of Gaussians; with --mesh name one of {', '.join(meshes)}, or a folder"
        )
    if not args.mesh:
        format_named(find_format(out).name)  # some are only read
    if len(tasks) + len(failed) != 1:
        raise InputError(
            f"--out: {out} is one file, and there are {len(tasks) + len(failed)} assets; name a folder"
        )
    return out


def load(args: argparse.Namespace, device: torch.device) -> ImageTo3D:
    from diff2to3.pipeline.image_to_3d import ImageTo3D

    return ImageTo3D.from_pretrained(
        args.model,
        device=device,
        dtype=DTYPES.get(args.dtype),
        offline=args.offline,
        image_encoder=args.image_encoder,
        low_memory=args.low_vram,
    )


def by_flags(message: str) -> str:
    """What the library says of its arguments, in this command's words."""
    for name, flag in FLAGS.items():
        message = message.replace(name, flag)
    return message


class Run:
    """Works through the tasks in batches; one bad input of several does not stop the others."""

    def __init__(
        self, args: argparse.Namespace, model: ImageTo3D, writer: Writer | FileWriter, failed: list[Failure]
    ) -> None:
        self.args, self.model, self.writer, self.failed = args, model, writer, failed
        changes = {"num_steps": args.steps, "guidance_scale": args.guidance_scale, "sampler": args.sampler}
        stages = (model.structure_settings, model.latent_settings)
        try:
            self.structure, self.latent = resampled(stages, changes)
        except InputError as error:
            raise InputError(by_flags(str(error))) from error
        if args.prune is not None:
            self.latent = dataclasses.replace(self.latent, prune=args.prune)
        self.made: list[dict[str, Any]] = []
        self.sheet = ContactSheet()
        self.since = args.started

    def all(self, tasks: list[Task]) -> None:
        """Make every asset, and note what failed. The only one's InputError is raised."""
        for start in range(0, len(tasks), self.args.batch_size):
            chunk = tasks[start : start + self.args.batch_size]
            try:
                self.batch(chunk)
            except InputError as error:
                if len(tasks) == 1 and not self.failed:
                    raise
                if len(chunk) > 1:
                    for task in chunk:
                        self.alone(task)
                else:
                    self.failed.append(failure_of(task=chunk[0], error=error))

    def alone(self, task: Task) -> None:
        try:
            self.batch([task])
        except InputError as error:
            self.failed.append(failure_of(task, error))

    def batch(self, tasks: list[Task]) -> None:
        """Generate and write."""
        before = time.perf_counter()
        prompts = [task.job.prompt(self.model, self.args.background_removal) for task in tasks]
        prepared = time.perf_counter() - before
        with Progress(", ".join(task.stem for task in tasks)) as progress:
            results: list[Result] = self.model.batch(
                prompts,
                [task.seed for task in tasks],
                structure=self.structure,
                latent=self.latent,
                multi_image=self.args.multi_image,
                progress=progress,
                refine=self.args.refine,
            )
        paths = []
        for task, result in zip(tasks, results, strict=True):
            result.seconds["photos"] = prepared
            own = {
                "input": task.job.origin,
                "input_sha256": task.job.digest,
                "structure": dataclasses.asdict(self.structure),
                "latent": dataclasses.asdict(self.latent),
                "batch_size": len(tasks),
            }
            path, files = self.writer.write(task.stem, result, own)
            paths.append(path)
            self.made.append(
                {
                    "name": task.stem,
                    "input": task.job.origin,
                    "seed": task.seed,
                    "files": files,
                    "warnings": list(result.notes),
                }
            )
            self.sheet.add(task.stem, shown(result), result.turntable(1)[0])
        now = time.perf_counter()
        each, self.since = (now - self.since) / len(tasks), now
        for path, task, result in zip(paths, tasks, results, strict=True):
            print(f"{path}: {len(result.gaussians):,} Gaussians in {each:.1f} s")
            for note in result.notes:
                print(f"diff2to3 generate: {task.stem}: warning: {note}", file=sys.stderr)

    def conclude(self, folder: Path) -> None:
        """Write the index and the contact sheet, where there is anything to put on them."""
        if not self.made:
            return
        try:
            write_index(folder, self.made, [dataclasses.asdict(failure) for failure in self.failed])
            self.sheet.write(folder / SHEET)
        except OSError as error:
            raise unwritable(folder, error) from error
        if len(self.made) > 1:
            total = time.perf_counter() - self.args.started
            print(f"{folder}: {len(self.made)} assets in {total:.1f} s, index.json, {SHEET}")


def shown(result: Result) -> Image.Image | None:
    """The first input, for the contact sheet."""
    from diff2to3.web.viewer import seen_picture

    cut = result.photos[0].cut_out if result.photos else None
    return cut or seen_picture(result)


def failure_of(task: Task, error: InputError) -> Failure:
    origin = "" if str(error).startswith(tuple(task.job.origin)) else f"{task.job.origin[0]}: "
    return Failure(task.job.origin, f"{origin}{error}")


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("num_samples", "steps", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if args.refine is not None and args.refine < 0:
        raise InputError(f"--refine: expected no negative number, got {args.refine}")
    if not 0 <= args.seed < 2**63 - args.num_samples:
        raise InputError(f"--seed: expected a number from 0 to 2⁶³, got {args.seed}")


def collect_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Failure]]:
    """Look at the header of every input before anything slow begins, so that most bad ones cost nothing. The only
    input's InputError is raised; of several, the bad ones are put aside.
    """
    if args.prompt is not None:
        if args.photos or args.image:
            raise InputError("--prompt: give a text or photos, not both")
        if not args.prompt.strip():
            raise InputError("--prompt: the text is empty")
        stem = re.sub(r"\W+", "_", args.prompt).strip("_")[:60] or "prompt"
        return [Job(stem, [args.prompt], text=args.prompt)], []
    if args.image and args.photos:
        raise InputError("--image: give photos of one object with --image, or separate photos, not both")
    if args.image:
        for path in args.image:
            check_photo(path)
        return [Job(args.image[0].stem, [str(p) for p in args.image], list(args.image))], []
    if not args.photos:
        raise InputError("no input: give a photo, a folder of photos, --image or --prompt")
    good: list[Path] = []
    errors: list[tuple[Path, InputError]] = []
    for given in args.photos:
        try:
            found = expand(given, args.recursive, args.out)
        except InputError as error:
            errors.append((given, error))
            continue
        for path in found:
            try:
                check_photo(path)
                good.append(path)
            except InputError as error:
                errors.append((path, error))
    if len(errors) == 1 and not good:
        raise errors[0][1]
    jobs = [Job(name, [str(p)], [p]) for name, p in zip(names_of(good), good, strict=True)]
    return jobs, [Failure([str(path)], str(error)) for path, error in errors]


def names_of(paths: list[Path]) -> list[str]:
    """A different name for each: the stem, with the ending or a number where stems are the same."""
    stems = [path.stem for path in paths]
    names = [p.stem if stems.count(p.stem) == 1 else p.name.replace(".", "_") for p in paths]
    taken: dict[str, int] = {}
    out = []
    for name in names:
        taken[name] = taken.get(name, 0) + 1
        out.append(name if taken[name] == 1 else f"{name}_{taken[name]}")
    return out


def tasks_of(jobs: list[Job], args: argparse.Namespace) -> list[Task]:
    several = args.num_samples > 1
    return [
        Task(job, f"{job.stem}_{number}" if several else job.stem, args.seed + number)
        for job in jobs
        for number in range(args.num_samples)
    ]


def placed(tasks: list[Task], args: argparse.Namespace) -> tuple[list[Task], int]:
    """The tasks with names under which nothing else lies in ``--out``, and how many were left out because they are
    there. The same photo, seed and model replace what they made before.
    """
    out: Path = args.out
    kept: list[Task] = []
    taken: set[str] = set()
    skipped = 0
    for task in tasks:
        for number in itertools.count(1):
            name = task.stem if number == 1 else f"{task.stem}_{number}"
            metadata = read_json(out / name / METADATA)
            identity = (metadata.get("input_sha256"), metadata.get("seed"), metadata.get("model"))
            same = identity == (task.job.digest, task.seed, args.model)
            if name not in taken and (same or is_free(out / name)):
                break
        taken.add(name)
        if same and args.skip_existing:
            skipped += 1
            continue
        if name != task.stem:
            print(
                f"diff2to3 generate: {out / task.stem} holds something else; writing {name}", file=sys.stderr
            )
        kept.append(dataclasses.replace(task, stem=name))
    return kept, skipped


def is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def expand(path: Path, recursive: bool, out: Path) -> list[Path]:
    """The images in a folder, sorted, without hidden ones and the results of earlier runs; a file stays as it is."""
    if not path.is_dir():
        return [path]
    from PIL import Image

    Image.init()
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    known |= {".heic", ".heif", ".hif", ".avif"}
    found = []
    try:
        for inside in path.rglob("*") if recursive else path.iterdir():
            hidden = any(part.startswith(".") for part in inside.relative_to(path).parts)
            ours = inside == out / SHEET or (inside.parent / METADATA).is_file()
            if inside.suffix.lower() in known and not hidden and not ours and inside.is_file():
                found.append(inside)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        deeper = "" if recursive else "; --recursive looks into the folders within"
        raise InputError(f"{path}: no image in this folder{deeper}")
    return sorted(found)


def make_folder(folder: Path) -> None:
    """Make a folder for results; InputError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{__name__}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror or error}") from error


class Progress:
    """A bar over the steps of both stages, on stderr when that is a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label if len(label) <= 40 else label[:39] + "…"
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
