"""The web app's server over its real socket: results, limits, and who may talk to it."""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diff2to3.cli import main
from diff2to3.errors import InputError
from diff2to3.formats import read as read_ply
from diff2to3.pipeline import ImageTo3D
from diff2to3.web.guard import Guard
from diff2to3.web.uploads import decode_mask, decode_photo

TOKEN = "correct horse"


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def over_white(image: Image.Image) -> np.ndarray:
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")).astype(int)


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---- what it makes ----


def test_from_photo_to_file(client: Any, photo_bytes: bytes, tiny_model: ImageTo3D, tmp_path: Path) -> None:
    """The same asset as the model called from Python."""
    photo = client("POST", "/api/photos", photo_bytes).json()
    assert (photo["width"], photo["height"]) == Image.open(io.BytesIO(photo_bytes)).size
    assert photo["method"] == "alpha" and photo["notes"] == []
    submitted = client.post("/api/jobs", {"photo": photo["id"], "seeds": [3, 4]})
    assert submitted.status == 202
    done = client.wait(submitted.json()["id"], "done")
    assert [result["seed"] for result in done["results"]] == [3, 4]
    path = f"/api/jobs/{done['id']}/1/ply"
    reply = client("GET", path)
    assert reply.headers["Content-Disposition"] == 'attachment; filename="seed4.ply"'
    (tmp_path / "a.ply").write_bytes(reply.body)
    got, metadata = read_ply(tmp_path / "a.ply")
    want = tiny_model(Image.open(io.BytesIO(photo_bytes)), seed=4)
    torch.testing.assert_close(got.means, want.gaussians.means, rtol=0, atol=1e-6)
    assert metadata["seed"] == 4 and metadata["screen_filter"] == 0.1
    page = client("GET", f"/api/jobs/{done['id']}/0/html").body.decode()
    assert page.startswith("<!doctype html>") and "seed3" in page


def test_every_format_that_is_offered_can_be_downloaded(client: Any, photo_bytes: bytes) -> None:
    submitted = client.post("/api/jobs", {"photo": client.photo(photo_bytes), "seeds": [0]}).json()
    job = client.wait(submitted["id"], "done")
    for kind in client("GET", "/api/info").json()["formats"]:
        reply = client("GET", f"/api/jobs/{job['id']}/0/{kind['ending']}")
        assert reply.status == 200 and len(reply.body) > 500
        assert reply.headers["Content-Disposition"].endswith(f'.{kind["ending"]}"')


def test_settings_reach_the_model(client: Any, photo_bytes: bytes) -> None:
    stages: list[tuple[str, int]] = []
    inner = client.model.model

    def spy(pictures: Any, *, progress: Any, structure: Any, latent: Any, **options: Any) -> Any:
        stages.append((structure.num_steps, latent.num_steps))
        assert structure.guidance_scale == latent.guidance_scale == 1.25
        return inner(pictures, progress=progress, structure=structure, latent=latent, **options)

    client.model.model = Proxy(inner, spy)
    request = {"photo": client.photo(photo_bytes), "seeds": [0], "steps": 5, "guidance_scale": 1.25}
    client.wait(client.post("/api/jobs", request).json()["id"], "done")
    assert stages == [(5, 5)]


class Proxy:
    """A model with another call."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self.model, self.call = model, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.call(*args, **options)


def test_the_mask_of_the_brush_is_what_the_model_sees(client: Any) -> None:
    """A photo of two squares; the brush keeps the right one."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:44, 6:26], pixels[20:44, 38:58] = (200, 0, 0), (0, 0, 200)
    photo = client("POST", "/api/photos", png(Image.fromarray(pixels))).json()
    assert photo["method"] not in ("alpha", "none", "brush")
    mask = np.asarray(Image.open(io.BytesIO(client("GET", f"/api/photos/{photo['id']}/mask").body)))
    assert mask.shape == (64, 64) and mask.max() > 200
    own = np.zeros((64, 64), np.uint8)
    own[20:44, 38:58] = 255
    reply = client("POST", f"/api/photos/{photo['id']}/mask", png(Image.fromarray(own)))
    assert reply.status == 200 and reply.json()["method"] == "brush"
    job = client.wait(client.post("/api/jobs", {"photo": photo["id"], "seeds": [0]}).json()["id"], "done")
    seen = over_white(client.server.service.jobs.get(job["id"]).outcomes[0].photo)
    blue, red = seen[..., 2] - seen[..., 0] > 100, seen[..., 0] - seen[..., 2] > 100
    assert blue.sum() > 100 and red.sum() == 0


def test_photo_without_an_object_can_be_painted(client: Any) -> None:
    plain = client("POST", "/api/photos", png(Image.new("RGB", (40, 40), (90, 90, 90))))
    assert plain.status == 201 and "same colour" in plain.json()["notes"][0]
    mask = np.asarray(Image.open(io.BytesIO(client("GET", f"/api/photos/{plain.json()['id']}/mask").body)))
    assert mask.max() == 0
    job = client.post("/api/jobs", {"photo": plain.json()["id"], "seeds": [0]}).json()
    assert "no object" in client.wait(job["id"], "failed")["error"]


# ---- the queue ----


def test_one_job_at_a_time_and_a_bounded_queue(serve: Any, photo_bytes: bytes) -> None:
    client = serve(waiting=2)
    client.model.open.clear()
    photo = client.photo(photo_bytes)
    request = {"photo": photo, "seeds": [0]}
    first = client.post("/api/jobs", request).json()
    assert client.model.entered.wait(30)
    waiting = [client.post("/api/jobs", request).json() for _ in range(2)]
    assert [job["ahead"] for job in waiting] == [1, 2] and client.model.calls == 1
    full = client.post("/api/jobs", request)
    assert full.status == 503 and "full" in full.json()["error"] and full.headers["Retry-After"]
    assert client("DELETE", f"/api/jobs/{waiting[0]['id']}").json()["state"] == "cancelled"
    assert client("GET", f"/api/jobs/{waiting[1]['id']}").json()["ahead"] == 1
    client.model.open.set()
    for job in (first, waiting[1]):
        client.wait(job["id"], "done")
    assert client.model.calls == 2


def test_cancelled_at_its_next_step_and_the_next_job_runs(client: Any, photo_bytes: bytes) -> None:
    client.model.open.clear()
    request = {"photo": client.photo(photo_bytes), "seeds": [0, 1]}
    job = client.post("/api/jobs", request).json()
    assert client.model.entered.wait(30)
    client("DELETE", f"/api/jobs/{job['id']}")
    client.model.open.set()
    assert client.wait(job["id"], "cancelled")["results"] == []
    client.wait(client.post("/api/jobs", request).json()["id"], "done")


def test_a_fault_in_the_generator_fails_one_job_only(
    client: Any, photo_bytes: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = client.model.model

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    client.model.model = Proxy(inner, broken)
    request = {"photo": client.photo(photo_bytes), "seeds": [0]}
    failed = client.wait(client.post("/api/jobs", request).json()["id"], "failed")
    assert failed["error"] == "the generator failed: RuntimeError: out of memory"
    assert "Traceback" in capsys.readouterr().err
    client.model.model = inner
    client.wait(client.post("/api/jobs", request).json()["id"], "done")


def test_old_photos_and_jobs_are_forgotten(serve: Any, photo_bytes: bytes) -> None:
    client = serve(photos=2, finished=1)
    ids = [client.photo(photo_bytes) for _ in range(3)]
    assert client("GET", f"/api/photos/{ids[0]}/mask").status == 404
    jobs = []
    for _ in range(2):
        jobs.append(client.post("/api/jobs", {"photo": ids[2], "seeds": [0]}).json()["id"])
        client.wait(jobs[-1], "done")
    assert client("GET", f"/api/jobs/{jobs[0]}").status == 404
    reply = client.post("/api/jobs", {"photo": ids[0], "seeds": [0]})
    assert reply.status == 400 and "does not know" in reply.json()["error"]


# ---- as Hunyuan3D's server ----


def test_generate_answers_with_the_file(
    client: Any, photo_bytes: bytes, tiny_model: ImageTo3D, tmp_path: Path
) -> None:
    """What Blender's add-on sends."""
    request = {
        "image": as_text(photo_bytes), "octree_resolution": 256, "num_inference_steps": 20, "guidance_scale": 5.5,
        "texture": False, "type": "ply", "seed": 9,
    }  # fmt: skip
    reply = client.post("/generate", request)
    assert reply.status == 200
    (tmp_path / "a.ply").write_bytes(reply.body)
    assert len(read_ply(tmp_path / "a.ply")[0]) > 0 and read_ply(tmp_path / "a.ply")[1]["seed"] == 9


def test_send_and_status(client: Any, photo_bytes: bytes) -> None:
    client.model.open.clear()
    uid = client.post(
        "/send", {"image": "data:image/png;base64," + as_text(photo_bytes), "type": "ply"}
    ).json()["uid"]
    assert client("GET", f"/status/{uid}").json() == {"status": "processing"}
    client.model.open.set()
    client.wait(uid, "done")
    status = client("GET", f"/status/{uid}").json()
    assert status["status"] == "completed" and base64.b64decode(status["model_base64"]).startswith(b"ply\n")
    assert client("GET", "/status/nobody").json()["status"] == "error"
    assert client("GET", "/health").json() == {"status": "healthy"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image": None}, "image"),
        ({"image": None, "text": "a chair"}, "takes no text"),
        ({"image": 5}, "base64"),
        ({"image": "AAAA"}, "not an image"),
        ({"image": "A"}, "base64"),
        ({"type": "../../etc/passwd"}, "type"),
        ({"seed": -1}, "seed"),
        ({"seed": "0"}, "seed"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"mesh": "AAAA"}, "mesh"),
    ],
)
def test_generate_refuses(client: Any, photo_bytes: bytes, change: dict[str, Any], word: str) -> None:
    reply = client.post("/generate", {"image": as_text(photo_bytes), **change})
    assert reply.status == 400 and word in reply.json()["text"] and reply.json()["error_code"] == 1
    assert client.model.calls == 0


def test_a_client_that_leaves_takes_its_job_with_it(client: Any, photo_bytes: bytes) -> None:
    client.model.open.clear()
    body = json.dumps({"image": as_text(photo_bytes), "type": "ply"}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(head + body)
        assert client.model.entered.wait(30)
    (job,) = client.server.service.jobs.jobs.values()
    assert job.stop.wait(10)
    client.model.open.set()
    assert client.wait(job.id, "cancelled")


# ---- limits ----


def test_limits_of_uploads(serve: Any, photo_bytes: bytes) -> None:
    client = serve(upload_bytes=20_000, pixels=10_000)
    large = client("POST", "/api/photos", b"x" * 20_001)
    assert large.status == 413 and "0 MB" in large.json()["error"]
    many = client("POST", "/api/photos", png(Image.new("L", (101, 100))))
    assert many.status == 400 and "10,000" in many.json()["error"]
    few = client("POST", "/api/photos", png(Image.new("L", (7, 100))))
    assert few.status == 400 and "too few" in few.json()["error"]
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(
            b"POST /api/photos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        assert b" 411 " in connection.recv(4096)


def test_a_bomb_is_refused_before_it_is_decoded(client: Any) -> None:
    """A PNG of a few kilobytes whose header claims 60,000 × 60,000 pixels."""
    data = bytearray(png(Image.new("L", (64, 64))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    reply = client("POST", "/api/photos", bytes(data))
    assert reply.status == 400 and "pixels" in reply.json()["error"]


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "postscript"])
def test_broken_images(client: Any, kind: str) -> None:
    picture = png(noise(90))
    data = {
        "text": b"hello", "empty": b"", "truncated": picture[: len(picture) // 2],
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n",
    }[kind]  # fmt: skip
    reply = client("POST", "/api/photos", data)
    assert reply.status == 400 and "not an image that can be read" in reply.json()["error"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_pictures_raise_one_kind_of_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    picture = bytearray(png(noise(16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        picture[data.draw(st.integers(0, len(picture) - 1))] = data.draw(st.integers(0, 255))
    for decode in (lambda d: decode_photo(d, 10_000), lambda d: decode_mask(d, (16, 16))):
        try:
            image = decode(bytes(picture[: data.draw(st.integers(0, len(picture)))]))
            assert image.width * image.height <= 10_000
        except InputError:
            pass


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"photo": 1e999}', b'{"photo": "x", "seeds": []}',
        b'{"photo": {"a": 1}, "seeds": [0]}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_bodies_that_do_not_fit(client: Any, body: bytes) -> None:
    for path in ("/api/jobs", "/generate", "/send"):
        reply = client("POST", path, body)
        assert reply.status == 400 and reply.json()["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [0] * 5}, {"seeds": ["0"]}, {"seeds": [True]}, {"seeds": [-1]}, {"seeds": 3}, {"steps": 0},
        {"steps": 201}, {"steps": 2.5}, {"guidance_scale": "x"}, {"guidance_scale": -1},
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit(client: Any, photo_bytes: bytes, change: dict[str, Any]) -> None:
    request = {"photo": client.photo(photo_bytes), "seeds": [0], **change}
    reply = client.post("/api/jobs", request)
    assert reply.status == 400 and next(iter(change)) in reply.json()["error"]


def test_a_mask_of_another_size(client: Any, photo_bytes: bytes) -> None:
    photo = client.photo(photo_bytes)
    reply = client("POST", f"/api/photos/{photo}/mask", png(Image.new("L", (9, 9))))
    assert reply.status == 400 and "expected" in reply.json()["error"]


# ---- who may talk to it ----


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8081", 200), ("127.0.0.1", 200), ("[::1]:8081", 200), ("127.8.8.8", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.nip.io", 403), ("", 403), ("[", 403),
        ("192.168.0.9", 403),
    ],
)  # fmt: skip
def test_names_that_are_not_of_this_machine(client: Any, host: str, status: int) -> None:
    """DNS rebinding: a page whose name points at 127.0.0.1 has its own name as Host."""
    assert client("GET", "/api/info", headers={"Host": host}).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),
        ({"Origin": "SELF"}, 201),
        ({"Origin": "SELF", "Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_other_origins_may_not_post(
    client: Any, photo_bytes: bytes, headers: dict[str, str], status: int
) -> None:
    own = f"http://127.0.0.1:{client.port}"
    sent = {name: own if value == "SELF" else value for name, value in headers.items()}
    assert client("POST", "/api/photos", photo_bytes, sent).status == status


def test_no_answer_invites_other_origins(client: Any) -> None:
    for path in ("/", "/api/info", "/nothing"):
        headers = client("GET", path, headers={"Origin": "https://evil.example"}).headers
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert client("OPTIONS", "/api/photos").status == 501


def test_the_page_runs_its_own_scripts_only(client: Any) -> None:
    first, second = client("GET", "/"), client("GET", "/")
    policy = first.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">'.encode() in first.body and nonce.encode() not in second.body


def test_the_token(serve: Any, photo_bytes: bytes) -> None:
    client = serve(token=TOKEN)
    basic = "Basic " + as_text(f"anyone:{TOKEN}".encode())
    wrong = (
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        "Basic !!!",
        "Basic " + as_text(b"correct horse:"),
    )
    for value in wrong:
        reply = client("GET", "/", headers={"Authorization": value} if value else {})
        assert reply.status == 401 and reply.headers["WWW-Authenticate"].startswith("Basic")
    for value in (f"Bearer {TOKEN}", basic):
        assert client("GET", "/api/info", headers={"Authorization": value, "Host": "my.server"}).status == 200
    cross = {"Authorization": basic, "Host": "my.server", "Origin": "http://other.server"}
    assert client("POST", "/api/photos", photo_bytes, cross).status == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_hosts_need_a_token(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", host]) == 2
    assert "token" in capsys.readouterr().err


def test_the_token_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short").write_text("abc\n")
    for name in ("short", "missing"):
        assert main(["serve", "--host", "0.0.0.0", "--token-file", str(tmp_path / name)]) == 2
    assert "at least 8" in capsys.readouterr().err
    assert Guard(TOKEN).knows(f"bearer {TOKEN}")


def test_a_taken_port_is_an_error(client: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", str(client.port), "--model", str(bundle)]) == 2
    assert f"port {client.port}" in capsys.readouterr().err


# ---- the disk ----

PATHS = [
    "/etc/passwd", "/../../etc/passwd", "/api/jobs/../../etc/passwd/0/ply", "/status/..%2f..%2fetc%2fpasswd",
    "/static/app.js", "/api/photos/%2e%2e/mask", "//etc/passwd", "/api/jobs/x/0/../../setup.py", "/?page=../x",
]  # fmt: skip


def test_no_request_reaches_the_disk(
    client: Any, photo_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first request on nothing in this process opens, lists or looks at a file."""
    client("GET", "/")
    job = client.post("/api/jobs", {"photo": client.photo(photo_bytes), "seeds": [0]}).json()["id"]
    client.wait(job, "done")
    client("GET", f"/api/jobs/{job}/0/html")  # every module is imported now
    touched: list[str] = []
    active = threading.Event()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if active.is_set() and event in (
            "open",
            "os.listdir",
            "os.scandir",
            "os.remove",
            "os.rename",
            "os.mkdir",
        ):
            touched.append(f"{event} {arguments[:1]!r}")

    sys.addaudithook(watch)
    active.set()
    try:
        for path in PATHS:
            reply = client("GET", path)
            assert reply.status in (200, 404) and b"root:" not in reply.body
        photo = client.photo(photo_bytes)
        request = {"photo": photo, "seeds": [0], "name": "../../x", "out": "/tmp/x"}
        job = client.post("/api/jobs", request).json()["id"]
        client.wait(job, "done")
        for kind in ("ply", "splats"):
            assert client("GET", f"/api/jobs/{job}/0/{kind}").status == 200
        client.post("/generate", {"image": as_text(photo_bytes), "type": "ply"})
    finally:
        active.clear()
    assert touched == []
