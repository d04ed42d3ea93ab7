"""What the web app does, without HTTP: photos and their masks, jobs on the generator, files of the results.

Everything is kept in memory, within bounds, and forgotten oldest first; nothing is written to the disk.
"""

from __future__ import annotations

import dataclasses
import io
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from diff2to3 import __version__
from diff2to3.errors import InputError
from diff2to3.gaussians.render import EPS2D
from diff2to3.pipeline.cutout import cut_out
from diff2to3.web.exports import Export, exports
from diff2to3.web.jobs import Cancelled, Job, Jobs, Outcome
from diff2to3.web.payload import pack
from diff2to3.web.uploads import decode_mask, decode_photo
from diff2to3.web.viewer import home_of, seen_picture

if TYPE_CHECKING:
    from diff2to3.pipeline.image_to_3d import ImageTo3D
    from diff2to3.pipeline.result import Result

MAX_SEEDS = 4
MAX_STEPS = 200
MAX_SEED = 2**53 - 1  # what JavaScript's numbers hold exactly


@dataclass(frozen=True)
class Limits:
    """upload_bytes of a request's body; pixels of a photo; jobs that may wait; photos and finished jobs remembered."""

    upload_bytes: int = 32_000_000
    pixels: int = 50_000_000
    waiting: int = 8
    photos: int = 24
    finished: int = 16


@dataclass
class Upload:
    """A photo (RGB) and what of it is the object (mask L, of the same size)."""

    id: str
    image: Image.Image
    mask: Image.Image
    method: str
    notes: tuple[str, ...]

    def cut_out(self) -> Image.Image:
        picture = self.image.copy()
        picture.putalpha(self.mask)
        return picture


class Service:
    """The generator for one server. Its methods are called from any thread."""

    def __init__(self, model: ImageTo3D, name: str, limits: Limits | None = None) -> None:
        self.model, self.name, self.limits = model, name, limits or Limits()
        self.uploads: OrderedDict[str, Upload] = OrderedDict()
        self.lock, self.cutting, self.exporting = threading.Lock(), threading.Lock(), threading.Lock()
        self.exports = exports()
        self.jobs = Jobs(self.generate, waiting=self.limits.waiting, kept=self.limits.finished)

    def close(self) -> None:
        self.jobs.close()

    def info(self) -> dict[str, Any]:
        structure, latent = self.model.structure_settings, self.model.latent_settings
        return {
            "version": __version__,
            "model": self.name,
            "steps": [structure.num_steps, latent.num_steps],
            "max_seeds": MAX_SEEDS,
            "upload_bytes": self.limits.upload_bytes,
            "formats": [{"ending": e.ending, "label": e.label} for e in self.exports.values()],
        }

    # ---- photos ----

    def add_photo(self, data: bytes) -> Upload:
        """Decode a photo and cut the object out; where that finds nothing the mask is empty and a note says why."""
        image = decode_photo(data, self.limits.pixels)
        with self.cutting:  # one at a time: it takes memory, and the generator wants the processors
            try:
                found = cut_out(image, "auto", offline=self.model.offline)
                rgba, method, notes = found.image, found.method, found.notes
            except InputError as error:
                rgba, method, notes = image.convert("RGBA"), "none", (str(error).removeprefix("image: "),)
                rgba.putalpha(0)
        upload = Upload(str(uuid.uuid4()), rgba.convert("RGB"), rgba.getchannel("A"), method, notes)
        with self.lock:
            self.uploads[upload.id] = upload
            while len(self.uploads) > self.limits.photos:
                self.uploads.popitem(last=False)
        return upload

    def photo(self, photo_id: str) -> Upload | None:
        with self.lock:
            return self.uploads.get(photo_id)

    def set_mask(self, upload: Upload, data: bytes) -> None:
        upload.mask = decode_mask(data, upload.image.size)
        upload.method, upload.notes = "brush", ()

    # ---- jobs ----

    def submit(self, request: Mapping[str, Any]) -> Job:
        """A job from the page: {photo, seeds, steps?, guidance_scale?}. InputError for what does not fit; QueueFull."""
        upload = self.photo(str(request.get("photo", "")))
        if upload is None:
            raise InputError("photo: the server does not know it (any more); send it again")
        seeds = request.get("seeds", [0])
        if not isinstance(seeds, list) or not 1 <= len(seeds) <= MAX_SEEDS:
            raise InputError(f"seeds: expected 1 to {MAX_SEEDS} numbers, got {seeds!r:.80}")
        return self.jobs.submit(
            Job(
                [upload.cut_out()],
                tuple(whole("seeds", seed, 0, MAX_SEED) for seed in seeds),
                background_removal="none",  # the mask says what the object is
                num_steps=optional_steps(request, "steps"),
                guidance_scale=optional_scale(request, "guidance_scale"),
            )
        )

    def generate(self, job: Job) -> None:
        """The work of one job, in the jobs' thread: an outcome a seed, as soon as it is there."""
        changes: dict[str, Any] = {"num_steps": job.num_steps, "guidance_scale": job.guidance_scale}
        changes = {key: value for key, value in changes.items() if value is not None}
        for seed in job.seeds:
            job.report("photo", 0, 1)
            before = time.perf_counter()
            result = self.model(
                job.pictures,
                seed=seed,
                structure=dataclasses.replace(self.model.structure_settings, **changes),
                latent=dataclasses.replace(self.model.latent_settings, **changes),
                background_removal=job.background_removal,
                progress=job.report,
            )
            if job.stop.is_set():
                raise Cancelled
            job.outcomes.append(self.outcome(result, time.perf_counter() - before))

    def outcome(self, result: Result, seconds: float) -> Outcome:
        note = {"generator": f"diff2to3 {__version__}", "seed": result.seed, "screen_filter": EPS2D}
        photo = seen_picture(result)
        return Outcome(result.seed, result.gaussians, seconds, result.notes, photo, home_of(result), note)

    def status(self, job: Job) -> dict[str, Any]:
        """What the page shows of a job."""
        return {
            "id": job.id,
            "state": job.state,
            "ahead": self.jobs.ahead(job),
            "stage": job.stage,
            "step": job.step,
            "steps": job.steps,
            "seeds": list(job.seeds),
            "error": job.error,
            "results": [
                {
                    "seed": outcome.seed,
                    "gaussians": len(outcome.gaussians),
                    "seconds": round(outcome.seconds, 2),
                    "notes": list(outcome.notes),
                    "home": dataclasses.asdict(outcome.home),
                }
                for outcome in list(job.outcomes)
            ],
        }

    def export(self, export: Export, outcome: Outcome, name: str) -> bytes:
        with self.exporting:  # one at a time, for memory
            return export.make(outcome, name)

    def splats(self, outcome: Outcome) -> bytes:
        with self.exporting:
            return pack(outcome.gaussians)


def encoded(image: Image.Image, kind: str) -> bytes:
    """The picture as "PNG" or "WEBP"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "WEBP" else {"compress_level": 3}))
    return buffer.getvalue()


# ---- numbers from outside ----


def whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name}: expected a whole number from {low} to {high}, got {value!r:.40}")
    return value


def optional_steps(request: Mapping[str, Any], name: str) -> int | None:
    value = request.get(name)
    return None if value is None else whole(name, value, 1, MAX_STEPS)


def optional_scale(request: Mapping[str, Any], name: str) -> float | None:
    value = request.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InputError(f"{name}: expected a number from 0 to 100, got {value!r:.40}")
    return float(value)
