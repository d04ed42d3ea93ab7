"""Requests to answers. No part of a request names a file: ids are looked up in memory, everything else is fixed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diff2to3.errors import InputError
from diff2to3.web import hunyuan
from diff2to3.web.jobs import CANCELLED, DONE, FAILED, Job, Outcome, QueueFull
from diff2to3.web.service import Service, Upload, encoded
from diff2to3.web.viewer import fill

JSON, BYTES = "application/json", "application/octet-stream"
#: Sent with every answer.
COMMON_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Request:
    """``gone()``: whether the client has closed its connection."""

    method: str
    path: str
    body: bytes = b""
    gone: Callable[[], bool] = lambda: False

    def json(self) -> Mapping[str, Any]:
        """The body as a JSON object; InputError otherwise."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"body: not JSON ({str(error)[:80]})") from error
        if not isinstance(value, dict):
            raise InputError("body: expected a JSON object")
        return value


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


def as_json(status: int, value: Any) -> Answer:
    return Answer(status, json.dumps(value).encode())


def problem(status: int, message: str, **headers: str) -> Answer:
    """``text`` and ``error_code`` are what clients of Hunyuan3D's API look at."""
    return Answer(
        status, json.dumps({"error": message, "text": message, "error_code": 1}).encode(), headers=headers
    )


class Routes:
    """All addresses of the server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.page = fill("app.html", {"nonce": "{{nonce}}"})

    def __call__(self, request: Request) -> Answer:
        try:
            return self.answer(request)
        except InputError as error:
            return problem(400, str(error))
        except QueueFull:
            return problem(503, "the queue is full; try again when a job is done", **{"Retry-After": "5"})

    def answer(self, request: Request) -> Answer:
        parts = request.path.split("?")[0].strip("/").split("/")
        match request.method, parts:
            case "GET", [""]:
                return self.front()
            case "GET", ["health"]:
                return as_json(200, {"status": "healthy"})
            case "GET", ["api", "info"]:
                return as_json(200, self.service.info())
            case "POST", ["api", "photos"]:
                return as_json(201, about(self.service.add_photo(request.body)))
            case _, ["api", "photos", photo_id, *rest]:
                return self.photo(request, photo_id, rest)
            case "POST", ["api", "jobs"]:
                return as_json(202, self.service.status(self.service.submit(request.json())))
            case _, ["api", "jobs", job_id, *rest]:
                return self.job(request, job_id, rest)
            case "POST", ["send"]:
                job = self.service.jobs.submit(hunyuan.job_of(self.service, request.json()))
                return as_json(200, {"uid": job.id})
            case "POST", ["generate"]:
                return self.generate(request)
            case "GET", ["status", job_id]:
                return self.status(job_id)
        return problem(404, "there is nothing at this address")

    def front(self) -> Answer:
        """The page. Its scripts carry a nonce, so that no other script can run in it."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; worker-src blob:; "
            "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        page = self.page.replace("{{nonce}}", nonce).encode("utf-8")
        return Answer(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def photo(self, request: Request, photo_id: str, rest: list[str]) -> Answer:
        upload = self.service.photo(photo_id)
        if upload is None:
            return problem(404, "the server does not know this photo (any more); send it again")
        match request.method, rest:
            case "GET", ["picture"]:
                return Answer(200, encoded(upload.image, "WEBP"), "image/webp")
            case "GET", ["mask"]:
                return Answer(200, encoded(upload.mask, "PNG"), "image/png")
            case "POST", ["mask"]:
                self.service.set_mask(upload, request.body)
                return as_json(200, about(upload))
        return problem(404, "there is nothing at this address")

    def job(self, request: Request, job_id: str, rest: list[str]) -> Answer:
        job = self.service.jobs.get(job_id)
        if job is None:
            return problem(404, "the server does not know this job (any more)")
        match request.method, rest:
            case "GET", []:
                return as_json(200, self.service.status(job))
            case "DELETE", []:
                self.service.jobs.cancel(job)
                return as_json(200, self.service.status(job))
            case "GET", [number, kind]:
                outcome = outcome_of(job, number)
                if outcome is not None:
                    return self.file(outcome, kind)
        return problem(404, "there is nothing at this address")

    def file(self, outcome: Outcome, kind: str) -> Answer:
        """What the viewer draws ("splats"), or a file to keep, by its ending."""
        if kind == "splats":
            return Answer(200, self.service.splats(outcome), BYTES)
        export = self.service.exports.get(kind)
        if export is None:
            return problem(404, f"files: expected one of {', '.join(self.service.exports)}")
        name = f"seed{outcome.seed}"
        headers = {"Content-Disposition": f'attachment; filename="{name}.{export.ending}"'}
        return Answer(200, self.service.export(export, outcome, name), export.media_type, headers)

    # ---- as Hunyuan3D's server ----

    def generate(self, request: Request) -> Answer:
        """Wait for the file; a client that leaves takes its job with it."""
        job = self.service.jobs.submit(hunyuan.job_of(self.service, request.json()))
        while not job.finished.wait(0.5):
            if request.gone():
                self.service.jobs.cancel(job)
        if job.state != DONE:
            return problem(400 if job.state == FAILED else 409, job.error or "the job was cancelled")
        export = self.service.exports[job.format]
        return Answer(200, hunyuan.file_of(self.service, job), export.media_type)

    def status(self, job_id: str) -> Answer:
        job = self.service.jobs.get(job_id)
        if job is None:
            return as_json(404, {"status": "error", "message": "unknown uid"})
        status = hunyuan.status_of(self.service, job)
        return as_json(500 if job.state in (FAILED, CANCELLED) else 200, status)


def about(upload: Upload) -> dict[str, Any]:
    width, height = upload.image.size
    notes = list(upload.notes)
    return {"id": upload.id, "width": width, "height": height, "method": upload.method, "notes": notes}


def outcome_of(job: Job, number: str) -> Outcome | None:
    """The result of that number, as a request writes it."""
    if not (number.isascii() and number.isdigit() and len(number) < 4):
        return None
    outcomes = list(job.outcomes)
    return outcomes[int(number)] if int(number) < len(outcomes) else None
