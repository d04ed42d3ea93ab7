"""The page of one asset: small, whole in itself, and the same picture as the rasteriser's."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.cli import main
from diff2to3.formats.ply import read_ply, write_ply
from diff2to3.gaussians.render import EPS2D, render
from diff2to3.gaussians.turn import Y_DOWN, turned
from diff2to3.types import Gaussians
from diff2to3.views.cameras import intrinsics, look_at
from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.web.payload import pack
from diff2to3.web.viewer import Home, home_for, home_from_camera, home_from_photo, viewer_page

EYES = np.array([[0, -2.0, 0.4], [1.8, 0.6, 1.0], [-1.0, 1.4, -0.9], [0.3, 0.3, 1.9]])


def of_degree(cloud: Gaussians, degree: int) -> Gaussians:
    return replace(cloud, sh=cloud.sh[:, : (degree + 1) ** 2])


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """The payload read as its description says, independently of the page's script."""
    raw = zlib.decompress(data)
    magic, count, terms, planes = struct.unpack_from("<4sIII", raw)
    assert magic == b"D2V1"
    box = np.frombuffer(raw, "<f4", 9, 16).astype(float)
    at = 16 + 36

    def column(width: int) -> np.ndarray:
        nonlocal at
        rows = np.frombuffer(raw, np.uint8, width * count, at).reshape(width, count).astype(np.int64)
        at += width * count
        return (rows * 256 ** np.arange(width)[:, None]).sum(0)

    means = np.stack([box[k] + column(planes) / (256**planes - 1) * box[3 + k] for k in range(3)], 1)
    logs = np.stack([box[7] + column(2) * box[8] for _ in range(3)], 1)
    p = np.stack([column(2) / 32767 - 1 for _ in range(3)], 1)
    square = (p**2).sum(1, keepdims=True)
    opacities = column(2) / 65535
    sh = np.stack([column(2).astype("<u2").view("<f2").astype(float) for _ in range(3 * terms)], 1)
    assert at == len(raw)
    return {
        "means": means,
        "scales": np.exp(logs),
        "quats": np.concatenate([1 - square, 2 * p], 1) / (1 + square),
        "opacities": opacities,
        "sh": sh.reshape(count, terms, 3),
        "filter": box[6:7],
    }


def test_payload_is_close(cloud: Gaussians) -> None:
    read = unpack(pack(cloud, 0.3))
    quats = torch.nn.functional.normalize(cloud.quats, dim=1).numpy()
    quats *= np.sign(quats[:, :1])
    assert np.abs(read["means"] - cloud.means.numpy()).max() < 1 / 65535
    assert np.abs(np.log(read["scales"] / cloud.scales.numpy())).max() < 4 / 65535
    assert np.abs(read["quats"] - quats).max() < 2 / 32767
    assert np.abs(read["opacities"] - cloud.opacities.numpy()).max() < 0.6 / 65535
    assert np.abs(read["sh"] - cloud.sh.numpy()).max() < 2e-3
    assert read["filter"][0] == pytest.approx(0.3)


def test_payload_of_a_wide_scene_has_finer_coordinates(cloud: Gaussians) -> None:
    wide = replace(cloud, means=cloud.means * 1000)
    assert np.abs(unpack(pack(wide))["means"] - wide.means.numpy()).max() < 1.1e-4


def test_payload_of_nothing_and_of_one(cloud: Gaussians) -> None:
    assert len(unpack(pack(rows(cloud, 0)))["means"]) == 0
    one = unpack(pack(rows(cloud, 1)))
    assert np.allclose(one["means"], cloud.means[:1].numpy(), atol=1e-6)
    assert np.allclose(one["scales"], cloud.scales[:1].numpy(), rtol=1e-4)


def rows(g: Gaussians, count: int) -> Gaussians:
    return Gaussians(*(getattr(g, n)[:count] for n in ("means", "quats", "scales", "opacities", "sh")))


def test_page_is_small_and_needs_nothing_else(cloud: Gaussians) -> None:
    page = viewer_page(rows(cloud, 0), "chair")
    assert len(page.encode()) <= 40_000
    for word in ("http:", "https:", "src=", "import(", "fetch(", "XMLHttpRequest", "{{"):
        assert word not in page


def test_names_cannot_break_out_of_the_page(cloud: Gaussians) -> None:
    page = viewer_page(rows(cloud, 1), "</script><b>", note={"by": "<!--"})
    assert "<b>" not in page and "<!--" not in page


def test_home_is_the_camera(cloud: Gaussians) -> None:
    for eye in EYES:
        home = home_from_camera(look_at(eye)[0], 33.0)
        a, e = math.radians(home.azimuth), math.radians(home.elevation)
        back = home.distance * np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        assert np.allclose(back, eye, atol=1e-5) and home.fov == 33.0


def test_home_from_a_photo_is_its_camera(page: Any, tmp_path: Path, cloud: Gaussians) -> None:
    camera = PhotoCamera(elevation=23.0, focal=1.4)
    open_page(page, tmp_path, viewer_page(rows(cloud, 9), "cloud", home=home_from_photo(camera)))
    shown = page.evaluate("cameraOf(stage.orbit, 256, 256)")
    assert np.allclose(shown["turn"], camera.viewmat[:3, :3].flatten(), atol=1e-5)
    assert np.allclose(shown["shift"], camera.viewmat[:3, 3], atol=1e-5)
    K = camera.K(256)
    assert np.allclose(shown["lens"], [K[0, 0], K[1, 1], K[0, 2], K[1, 2]], rtol=1e-5)


def test_home_shows_the_whole(cloud: Gaussians) -> None:
    assert home_for(cloud) == Home()
    far = home_for(replace(cloud, means=cloud.means * 10 + torch.tensor([5.0, 0, 0])))
    assert far.distance == pytest.approx(20, rel=0.1) and far.target[0] == pytest.approx(5, abs=0.5)


# ---- in the browser ----


def open_page(page: Any, folder: Path, html: str) -> None:
    (folder / "page.html").write_text(html, encoding="utf-8")
    page.emulate_media(reduced_motion="reduce")  # or the turntable turns at once
    page.goto((folder / "page.html").as_uri())
    page.wait_for_function("window.stage && stage.view.count > 0")


def picture(page: Any, viewmat: torch.Tensor, K: torch.Tensor, width: int, height: int) -> np.ndarray:
    """What the page draws for a camera over white: [H, W, 3] in [0, 1]."""
    camera = {
        "turn": viewmat[:3, :3].flatten().tolist(),
        "shift": viewmat[:3, 3].tolist(),
        "lens": [K[0, 0].item(), K[1, 1].item(), K[0, 2].item(), K[1, 2].item()],
    }
    options = {"width": width, "height": height, "camera": camera, "background": "#fff"}
    data = page.evaluate(
        """async (options) => {
          const reader = new FileReader(), picture = await stage.picture(options);
          return new Promise((done) => { reader.onload = () => done(reader.result); reader.readAsDataURL(picture); });
        }""",
        options,
    )
    image = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")
    return np.asarray(image) / 255.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(((a - b) ** 2).mean(), 1e-12)))


@pytest.mark.parametrize(("degree", "screen_filter"), [(0, EPS2D), (1, 0.3), (2, EPS2D), (3, 0.0)])
def test_same_picture_as_the_rasteriser(
    page: Any, tmp_path: Path, cloud: Gaussians, degree: int, screen_filter: float
) -> None:
    gaussians = of_degree(cloud, degree)
    open_page(page, tmp_path, viewer_page(gaussians, "cloud", screen_filter=screen_filter))
    width, height = 176, 144
    viewmats, Ks = look_at(EYES), intrinsics(np.radians([40.0, 60.0, 35.0, 50.0]), width, height)
    Ks[1, 0, 2] += 11.5  # a principal point off the centre
    want = render(gaussians, viewmats, Ks, width, height, background=1.0, eps2d=screen_filter).colors
    for number in range(len(EYES)):
        seen = picture(page, viewmats[number], Ks[number], width, height)
        assert psnr(seen, want[number].clamp(0, 1).numpy()) > 45


def test_a_camera_inside_the_object(page: Any, tmp_path: Path, cloud: Gaussians) -> None:
    """Gaussians behind the camera and across the borders."""
    open_page(page, tmp_path, viewer_page(of_degree(cloud, 0), "cloud"))
    viewmats, Ks = look_at(np.array([[0.1, -0.3, 0.05]])), intrinsics(math.radians(70), 160, 120)
    want = render(of_degree(cloud, 0), viewmats, Ks, 160, 120, background=1.0).colors[0].clamp(0, 1).numpy()
    assert psnr(picture(page, viewmats[0], Ks[0], 160, 120), want) > 40


def test_orbit_is_the_camera_of_python(page: Any, tmp_path: Path, cloud: Gaussians) -> None:
    open_page(
        page, tmp_path, viewer_page(rows(cloud, 9), "cloud", home=home_from_camera(look_at(EYES[1])[0], 35.0))
    )
    camera = page.evaluate("cameraOf(stage.orbit, 200, 100)")
    want, K = look_at(EYES[1])[0], intrinsics(math.radians(35.0), 200, 100)[0]
    assert np.allclose(camera["turn"], want[:3, :3].flatten(), atol=1e-5)
    assert np.allclose(camera["shift"], want[:3, 3], atol=1e-5)
    assert np.allclose(camera["lens"], [K[0, 0], K[1, 1], K[0, 2], K[1, 2]], rtol=1e-5)


def test_keys_mouse_and_buttons(page: Any, tmp_path: Path, cloud: Gaussians) -> None:
    photo = Image.new("RGB", (64, 48), (200, 30, 30))
    open_page(page, tmp_path, viewer_page(of_degree(cloud, 0), "cloud", photo=photo))
    assert page.title() == "cloud" and page.locator("#photo").is_visible()
    start = page.evaluate("({...stage.orbit})")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("+")
    page.mouse.move(300, 200)
    page.mouse.down()
    page.mouse.move(340, 200, steps=3)
    page.mouse.up()
    moved = page.evaluate("({...stage.orbit})")
    assert moved["elevation"] == start["elevation"] + 5
    assert moved["distance"] == pytest.approx(0.9 * start["distance"])
    assert moved["azimuth"] == pytest.approx(start["azimuth"] - 40 * 0.35)
    page.mouse.wheel(0, 200)
    page.wait_for_function("stage.orbit.distance > 1.85")
    page.keyboard.press("r")
    assert page.evaluate("({...stage.orbit})") == start
    page.get_by_role("button", name="Turntable").click()
    page.wait_for_function(f"stage.orbit.azimuth > {start['azimuth'] + 1}")
    page.keyboard.press("t")
    assert page.evaluate("stage.turntable") is False
    page.keyboard.press("p")
    assert not page.locator("#photo").is_visible()
    page.keyboard.press("b")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(128, 128, 128)"
    with page.expect_download() as download:
        page.keyboard.press("s")
    assert download.value.suggested_filename == "cloud.png"
    assert Image.open(download.value.path()).size == (480, 360)


def test_two_fingers_zoom(page: Any, tmp_path: Path, cloud: Gaussians) -> None:
    open_page(page, tmp_path, viewer_page(rows(cloud, 50), "cloud"))
    page.evaluate(
        """() => {
          const c = document.querySelector("canvas"), send = (kind, pointerId, clientX, clientY) =>
            c.dispatchEvent(new PointerEvent(kind, { pointerId, clientX, clientY, pointerType: "touch", buttons: 1 }));
          c.setPointerCapture = () => {};  // these fingers are not real
          send("pointerdown", 1, 200, 150); send("pointerdown", 2, 250, 150);
          send("pointermove", 2, 300, 150); send("pointerup", 1, 200, 150); send("pointerup", 2, 300, 150);
        }"""
    )
    assert page.evaluate("stage.orbit.distance") == pytest.approx(1.0)


@pytest.mark.parametrize("degree", [0, 1])
def test_downloaded_ply_is_the_object(page: Any, tmp_path: Path, cloud: Gaussians, degree: int) -> None:
    """Y down for other programs where that needs no turning of harmonics; the file says its frame."""
    gaussians = of_degree(cloud, degree)
    open_page(page, tmp_path, viewer_page(gaussians, "cloud", note={"seed": 7}))
    with page.expect_download() as download:
        page.keyboard.press("d")
    read, metadata = read_ply(download.value.path())
    assert metadata["seed"] == 7 and metadata["screen_filter"] == EPS2D
    if degree == 0:
        assert metadata["frame"] == "right-handed, y down"
        gaussians = turned(gaussians, torch.tensor(Y_DOWN))
    else:
        assert metadata["frame"] == "right-handed, z up"
    assert torch.allclose(read.means, gaussians.means, atol=1e-5)
    assert torch.allclose(read.scales, gaussians.scales, rtol=1e-3)
    assert torch.allclose(read.opacities, gaussians.opacities, atol=1e-4)
    assert torch.allclose(read.sh, gaussians.sh, atol=2e-3)
    same = (read.quats * torch.nn.functional.normalize(gaussians.quats, dim=1)).sum(1).abs()
    assert same.min() > 1 - 1e-5


def test_damaged_data_is_said(page: Any, tmp_path: Path, cloud: Gaussians) -> None:
    html = viewer_page(rows(cloud, 5), "cloud")
    packed = base64.b64encode(pack(rows(cloud, 5))).decode()
    assert packed in html
    (tmp_path / "page.html").write_text(html.replace(packed, packed[:40]), encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.get_by_role("alert").wait_for()
    assert "cannot be shown" in page.get_by_role("alert").inner_text()


# ---- the command ----


def test_view_writes_a_page(tmp_path: Path, cloud: Gaussians, capsys: pytest.CaptureFixture[str]) -> None:
    write_ply(tmp_path / "cloud.ply", cloud, {"screen_filter": 0.2, "seed": 3})
    Image.new("RGB", (2000, 900), (9, 99, 9)).save(tmp_path / "photo.png")
    out = tmp_path / "page.html"
    arguments = ["view", str(tmp_path / "cloud.ply"), "-o", str(out), "--photo", str(tmp_path / "photo.png")]
    assert main(arguments) == 0
    assert "900 Gaussians" in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    facts = json.loads(html.split('type="application/json">')[1].split("</script>")[0])
    assert facts["note"]["seed"] == 3 and facts["note"]["screen_filter"] == 0.2
    image = Image.open(io.BytesIO(base64.b64decode(facts["photo"].split(",")[1])))
    assert image.size == (512, 230)
    data = base64.b64decode(html.split('type="text/plain">')[1].split("</script>")[0])
    assert unpack(data)["filter"][0] == pytest.approx(0.2)


@pytest.mark.parametrize("bad", ["missing.ply", "text.ply", "filter"])
def test_view_says_what_is_wrong(
    tmp_path: Path, cloud: Gaussians, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    (tmp_path / "text.ply").write_text("hello")
    write_ply(tmp_path / "filter", cloud, {"screen_filter": "wide"})
    assert main(["view", str(tmp_path / bad), "-o", str(tmp_path / "page.html")]) == 2
    assert "diff2to3 view: error:" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
