"""The part of Hunyuan3D's API that its clients (Blender's add-on and others) use, over our generator.

    POST /generate      {image: base64, …} → the file
    POST /send          the same → {uid}
    GET  /status/<uid>  {status: processing | completed (with model_base64) | error (with message)}

Taken over: image, image_front, image_left, image_back, image_right, seed, num_inference_steps, type. Their guidance
scale, octree resolution, texture and face count mean nothing to this model, so they are accepted and left aside.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from diff2to3.errors import InputError
from diff2to3.web.jobs import DONE, FAILED, QUEUED, RUNNING, Job
from diff2to3.web.service import MAX_SEED, Service, optional_steps, whole
from diff2to3.web.uploads import decode_photo

#: In their order the first is the front.
IMAGES = ("image", "image_front", "image_left", "image_back", "image_right")
DEFAULT_SEED = 1234


def job_of(service: Service, request: Mapping[str, Any]) -> Job:
    """The job that a request describes, not yet in the queue. InputError for what does not fit."""
    given = [key for key in IMAGES if request.get(key)]
    if not given:
        hint = "; this model takes no text" if request.get("text") else ""
        raise InputError(f"image: expected a picture as base64{hint}")
    if request.get("mesh"):
        raise InputError("mesh: this server cannot texture a mesh; send a picture alone")
    ending = str(request.get("type") or default_format(service))
    if ending not in service.exports:
        raise InputError(f"type: expected one of {', '.join(service.exports)}, got {ending!r:.40}")
    pictures = [decode_photo(from_base64(key, request[key]), service.limits.pixels) for key in given]
    seed = request.get("seed")
    return Job(
        pictures,
        (DEFAULT_SEED if seed is None else whole("seed", seed, 0, MAX_SEED),),
        num_steps=optional_steps(request, "num_inference_steps"),
        format=ending,
    )


def default_format(service: Service) -> str:
    """GLB, as clients expect, where it can be written."""
    return "glb" if "glb" in service.exports else "ply"


def from_base64(name: str, text: Any) -> bytes:
    """Also with the prefix of a data: address."""
    if not isinstance(text, str):
        raise InputError(f"{name}: expected base64 text")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not base64 ({error})") from error


def file_of(service: Service, job: Job) -> bytes:
    """The finished job's file."""
    outcome = job.outcomes[0]
    return service.export(service.exports[job.format], outcome, f"{outcome.seed}")


def status_of(service: Service, job: Job) -> dict[str, Any]:
    if job.state in (QUEUED, RUNNING):
        return {"status": "processing"}
    if job.state == DONE:
        return {"status": "completed", "model_base64": base64.b64encode(file_of(service, job)).decode()}
    return {"status": "error", "message": job.error if job.state == FAILED else "cancelled"}
