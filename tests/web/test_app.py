"""The web app in a real browser: from a photo to a turning object, and what happens when something goes wrong."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff2to3.formats import read as read_ply


def open_app(page: Any, url: str, photo: bytes, name: str = "photo.png") -> None:
    page.set_viewport_size({"width": 1100, "height": 900})
    page.goto(url)
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": photo})


def make(page: Any) -> None:
    page.get_by_role("button", name="Make 3D").click()


def seen(page: Any, number: int = 0) -> np.ndarray:
    """What a result's canvas shows."""
    shot = page.locator("canvas[data-drawn]").nth(number).screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def until(page: Any, true: Callable[[], bool]) -> None:
    """Wait up to 20 s."""
    for _ in range(40):
        if true():
            return
        page.wait_for_timeout(500)
    raise AssertionError("it did not happen")


def alert(page: Any, words: str) -> None:
    page.get_by_role("alert").filter(has_text=words).wait_for()


def test_from_upload_to_turning_object(page: Any, client: Any, photo_bytes: bytes, tmp_path: Path) -> None:
    open_app(page, client.url, photo_bytes)
    page.locator("#editor").wait_for()
    page.locator("#variants").select_option("2")
    page.locator("#seed").fill("5")
    make(page)
    page.locator("canvas[data-drawn]").nth(1).wait_for()
    page.get_by_text(re.compile(r"Seed 6 · [\d,]+ Gaussians")).wait_for()
    before = [seen(page, k) for k in range(2)]
    assert all((view < 240).any(-1).mean() > 0.01 for view in before)  # an object on white
    for number in range(2):  # both turn
        until(page, lambda k=number: np.abs(seen(page, k) - before[k]).max() > 30)
    box = page.locator("canvas[data-drawn]").first.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()  # a hand on one stops both
    page.mouse.up()
    for number in range(2):
        until(
            page,
            lambda k=number: np.array_equal(seen(page, k), (page.wait_for_timeout(400), seen(page, k))[1]),
        )
    with page.expect_download() as download:
        page.get_by_role("link", name=".ply", exact=True).nth(1).click()
    assert download.value.suggested_filename == "seed6.ply"
    download.value.save_as(tmp_path / "a.ply")
    assert read_ply(tmp_path / "a.ply")[1]["seed"] == 6
    assert not page.locator("#progress").is_visible() and page.get_by_role("alert").inner_text() == ""


def test_brush(page: Any, client: Any) -> None:
    """Keep all, remove the left one of two squares, undo, and remove it again: the model sees the right one."""
    pixels = np.full((64, 96, 3), 255, np.uint8)
    pixels[20:44, 12:36], pixels[20:44, 60:84] = (200, 0, 0), (0, 0, 200)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    open_app(page, client.url, buffer.getvalue())
    page.locator("#editor").wait_for()
    page.get_by_role("button", name="All of it").click()  # whatever the cut-out found
    page.get_by_role("button", name="Remove").click()
    page.locator("#brush").fill("120")
    box = page.locator("#cut").bounding_box()
    scale = min(box["width"] / 96, box["height"] / 64)

    def stroke() -> None:
        x = box["x"] + box["width"] / 2 + (24 - 48) * scale
        page.mouse.move(x, box["y"] + box["height"] / 2 - 10)
        page.mouse.down()
        page.mouse.move(x, box["y"] + box["height"] / 2 + 10, steps=4)
        page.mouse.up()

    def parts() -> tuple[int, int]:
        """Pixels of the shown cut-out that are clearly red and blue."""
        shot = np.asarray(Image.open(io.BytesIO(page.locator("#cut").screenshot())).convert("RGB")).astype(
            int
        )
        return int((shot[..., 0] - shot[..., 1] > 150).sum()), int((shot[..., 2] - shot[..., 1] > 150).sum())

    both = parts()
    stroke()
    assert parts()[0] < 0.1 * both[0] and parts()[1] == both[1]
    page.get_by_role("button", name="Undo").click()
    assert parts() == both
    stroke()
    make(page)
    page.locator("canvas[data-drawn]").wait_for()
    (job,) = client.server.service.jobs.jobs.values()
    photo = job.outcomes[0].photo.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    picture = np.asarray(white.convert("RGB")).astype(int)
    assert (picture[..., 2] - picture[..., 0] > 100).sum() > 100
    assert (picture[..., 0] - picture[..., 2] > 100).sum() == 0


def test_broken_image(page: Any, client: Any, photo_bytes: bytes) -> None:
    open_app(page, client.url, photo_bytes[:200])
    alert(page, "not an image that can be read")
    assert not page.locator("#editor").is_visible()
    page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": photo_bytes})
    page.locator("#editor").wait_for()  # the next one works
    assert page.get_by_role("alert").inner_text() == ""


def test_two_clients_take_turns(new_page: Callable[[], Any], client: Any, photo_bytes: bytes) -> None:
    client.model.open.clear()
    first, second = new_page(), new_page()
    for page in (first, second):
        open_app(page, client.url, photo_bytes)
        page.locator("#editor").wait_for()
    make(first)
    first.get_by_text("Reading the photo").or_(first.get_by_text("Shape")).wait_for()
    make(second)
    second.get_by_text("One job is before yours").wait_for()
    client.model.open.set()
    for page in (first, second):
        page.locator("canvas[data-drawn]").wait_for()
        assert page.locator("canvas[data-drawn]").count() == 1


def test_cancel(page: Any, client: Any, photo_bytes: bytes) -> None:
    client.model.open.clear()
    open_app(page, client.url, photo_bytes)
    page.locator("#editor").wait_for()
    make(page)
    assert client.model.entered.wait(30)
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_timeout(300)
    client.model.open.set()
    alert(page, "Cancelled.")
    make(page)
    page.locator("canvas[data-drawn]").wait_for()


def test_a_name_in_a_file_is_no_markup(page: Any, client: Any, photo_bytes: bytes) -> None:
    open_app(page, client.url, photo_bytes, name="<img src=x onerror=alert(1)>.png")
    page.locator("#editor").wait_for()
    assert page.locator("img").count() == 0


def start_server(bundle: Path, port: int) -> tuple[subprocess.Popen[str], int]:
    """The command itself, in a process of its own; returns it when it listens, with its port."""
    command = [sys.executable, "-m", "diff2to3.cli", "serve", "--model", str(bundle), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found, line
    return process, int(found[1])


def test_server_killed_in_between(page: Any, bundle: Path, photo_bytes: bytes) -> None:
    """The page says so, waits, and goes on with the server that comes next, which knows neither photo nor job."""
    process, port = start_server(bundle, 0)
    try:
        open_app(page, f"http://127.0.0.1:{port}", photo_bytes)
        page.locator("#editor").wait_for()
        page.locator("#variants").select_option("4")
        page.locator("#steps").fill("200")
        make(page)
        page.get_by_text(re.compile("step [1-9]")).wait_for()
        process.kill()
        process.wait()
        alert(page, "does not answer")
        process, _ = start_server(bundle, port)
        alert(page, "started anew")
        page.locator("#variants").select_option("1")
        page.locator("#steps").fill("2")
        make(page)  # sends the photo again, with its mask
        page.get_by_text(re.compile("Seed 0 ·")).last.wait_for()
        page.locator("canvas[data-drawn]").last.wait_for()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
