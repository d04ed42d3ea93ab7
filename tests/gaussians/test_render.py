"""Rendering Gaussians to files: the project's filter, sheets, animations, and the command."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.cli import main
from diff2to3.errors import InputError
from diff2to3.formats.ply import write_ply
from diff2to3.gaussians.pictures import sheet, write_frames
from diff2to3.gaussians.render import render, to_uint8
from diff2to3.kernels.library import TooManyError, resolve_backend
from diff2to3.kernels.rasterize import rasterize
from diff2to3.types import Gaussians

C0 = 0.28209479177387814


def colored_axes() -> Gaussians:
    """Red at +x, green at +y, blue at +z, each a small opaque ball."""
    colors = torch.eye(3) * 0.9 + 0.05
    return Gaussians(
        torch.eye(3) * 0.4, torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1), torch.full((3, 3), 0.04),
        torch.full((3,), 0.99), ((colors - 0.5) / C0)[:, None],
    )  # fmt: skip


def test_render_uses_the_projects_filter() -> None:
    g = colored_axes()
    viewmats, Ks = torch.eye(4)[None], torch.tensor([[[60.0, 0, 20], [0, 60, 16], [0, 0, 1]]])
    viewmats[0, 2, 3] = 2
    ours = render(g, viewmats, Ks, 40, 32, background=0.25, depth=True)
    expected = rasterize(
        g.means, g.quats, g.scales, g.opacities, viewmats, Ks, 40, 32, sh=g.sh, eps2d=0.1, antialiased=True,
        backgrounds=torch.full((3,), 0.25), depth=True,
    )  # fmt: skip
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    assert to_uint8(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]


def test_more_tiles_than_indices_reach() -> None:
    """40,000 Gaussians that fill a picture of 4096² overlap 2.6 billion tiles."""
    num = 40_000
    huge = Gaussians(
        torch.tensor([[0.0, 0, 2]]).repeat(num, 1), torch.tensor([[1.0, 0, 0, 0]]).repeat(num, 1),
        torch.full((num, 3), 50.0), torch.full((num,), 0.9), torch.zeros(num, 1, 3),
    )  # fmt: skip
    K = torch.tensor([[[4096.0, 0, 2048], [0, 4096, 2048], [0, 0, 1]]])
    if resolve_backend("auto", huge.means.device, huge.means.dtype) != "native":
        pytest.skip("no compiled kernels")
    with pytest.raises(InputError, match=r"40,000 Gaussians overlap more than 2.31 tiles .* 4096 x 4096"):
        render(huge, torch.eye(4)[None], K, 4096, 4096)


@pytest.mark.parametrize("num_views", [2, 5])
@pytest.mark.parametrize("background", [None, 0.5, "each"])
def test_views_that_are_too_many_together_are_rendered_in_parts(
    num_views: int, background: str | float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewmats = torch.eye(4).repeat(num_views, 1, 1)
    viewmats[:, 2, 3] = 1 + torch.arange(num_views)
    Ks = torch.tensor([[[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]]).repeat(num_views, 1, 1)
    colors = torch.rand(num_views, 3) if background == "each" else background
    whole = render(colored_axes(), viewmats, Ks, 32, 32, background=colors, depth=True)

    def small(*args: Any, **options: Any) -> Any:
        if len(args[4]) > 1:
            raise TooManyError("too many")
        return rasterize(*args, **options)

    monkeypatch.setattr("diff2to3.gaussians.render.rasterize", small)
    parts = render(colored_axes(), viewmats, Ks, 32, 32, background=colors, depth=True)
    for name in ("colors", "alphas", "depths"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_sheet_holds_every_frame_once(count: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (count, 5, 7, 3), dtype=np.uint8)
    picture = sheet(frames)
    rows, columns = picture.shape[0] // 5, picture.shape[1] // 7
    tiles = picture.reshape(rows, 5, columns, 7, 3).swapaxes(1, 2).reshape(-1, 5, 7, 3)
    np.testing.assert_array_equal(tiles[:count], frames)
    assert (tiles[count:] == 255).all() and len(tiles) - count < columns


def test_turntable_command(tmp_path: Path) -> None:
    """From azimuth 0 the camera is at +x: red is nearest, in the middle; +y lies to its right, +z above."""
    write_ply(tmp_path / "axes.ply", colored_axes())
    out = tmp_path / "sheet.png"
    arguments = [str(tmp_path / "axes.ply"), "--orbit", "-o", str(out), "--views", "2", "--resolution", "96"]
    assert main(["render", *arguments, "--elevation", "0"]) == 0
    picture = np.asarray(Image.open(out)).astype(float)[:, :96]
    assert picture.shape == (96, 96, 3) and (picture[0, 0] == 255).all()
    centres = []
    for channel in range(3):
        others = [c for c in range(3) if c != channel]
        mask = picture[..., channel] - picture[..., others].max(-1) > 100
        assert mask.any()
        centres.append(np.argwhere(mask).mean(0) - 47.5)
    red, green, blue = centres
    assert np.abs(red).max() < 1.5
    assert green[1] > 10 and abs(green[0]) < 1.5
    assert blue[0] < -10 and abs(blue[1]) < 1.5


def test_gif(tmp_path: Path) -> None:
    frames = np.zeros((6, 20, 30, 3), np.uint8)
    for i in range(6):
        frames[i, :, 5 * i : 5 * i + 5] = (250, 10, 30)
    write_frames(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 100
        for i in range(6):
            gif.seek(i)
            np.testing.assert_allclose(np.asarray(gif.convert("RGB")).astype(int), frames[i], atol=12)


def test_film(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = np.full((5, 33, 47, 3), 200, np.uint8)
    write_frames(tmp_path / "a.mp4", frames)
    count, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert count == 5 and 0.1 < seconds < 0.4
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_fit_brings_any_scene_into_view(tmp_path: Path) -> None:
    g = colored_axes()
    shifted = Gaussians(g.means * 70 + 300, g.quats, g.scales * 70, g.opacities, g.sh)
    write_ply(tmp_path / "far.ply", shifted)
    out = tmp_path / "fit.png"
    command = ["render", str(tmp_path / "far.ply"), "-o", str(out), "--views", "1", "--resolution", "64"]
    assert main(command) == 0 and (np.asarray(Image.open(out)) == 255).all()
    assert main([*command, "--fit"]) == 0 and (np.asarray(Image.open(out)) < 200).any()


@pytest.mark.parametrize("more", [[], ["--camera"]])
def test_backend_reaches_the_rasteriser(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ply(tmp_path / "axes.ply", colored_axes())
    asked = []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["backend"])
        return rasterize(*args, **options | {"backend": "auto"})

    monkeypatch.setattr("diff2to3.gaussians.render.rasterize", spy)
    monkeypatch.setattr("diff2to3.commands.render.check_backend", lambda backend, device: None)
    if more:
        camera = SimpleNamespace(viewmat=torch.eye(4), K=lambda size: torch.eye(3) * size)
        monkeypatch.setattr("diff2to3.commands.render.read_camera", lambda path: camera)
        more = [*more, str(tmp_path / "metadata.json")]
    command = ["render", str(tmp_path / "axes.ply"), "-o", str(tmp_path / "a.png"), "--resolution", "16"]
    assert main([*command, *more, "--backend", "gsplat"]) == 0
    assert set(asked) == {"gsplat"}


def test_backend_that_cannot_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ply(tmp_path / "axes.ply", colored_axes())
    command = ["render", str(tmp_path / "axes.ply"), "-o", str(tmp_path / "a.png"), "--backend"]
    monkeypatch.setitem(sys.modules, "gsplat", None)
    assert main([*command, "gsplat"]) == 2
    assert 'pip install "diff2to3[gsplat]"' in capsys.readouterr().err
    stand_in = ModuleType("gsplat")
    stand_in.__spec__ = ModuleSpec("gsplat", None)
    monkeypatch.setitem(sys.modules, "gsplat", stand_in)
    assert main([*command, "gsplat"]) == 2
    assert "--device cuda" in capsys.readouterr().err
    monkeypatch.setattr("diff2to3.kernels.library.library_for", lambda device: None)
    assert main([*command, "native"]) == 2
    assert "no compiled kernels" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "axes.ply"
    write_ply(good, colored_axes())
    (tmp_path / "broken.ply").write_bytes(good.read_bytes()[:-40])
    empty = Gaussians(*(torch.zeros(0, *s) for s in ((3,), (4,), (3,), (), (1, 3))))
    write_ply(tmp_path / "empty.ply", empty)
    cases = [
        (["missing.ply", "-o", "a.png"], "missing.ply"),
        (["broken.ply", "-o", "a.png"], "broken.ply"),
        (["empty.ply", "-o", "a.png"], "no Gaussians"),
        (["axes.ply", "-o", "a.webm"], ".webm"),
        (["axes.ply", "-o", "nowhere/a.png"], "nowhere"),
        (["axes.ply", "-o", "a.png", "--resolution", "0"], "--resolution"),
        (["axes.ply", "-o", "a.png", "--views", "0"], "num_views"),
        (["axes.ply", "-o", "a.png", "--fov", "190"], "fov"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for (ply, flag, out, *more), words in cases:
        assert main(["render", str(tmp_path / ply), flag, str(tmp_path / out), *more]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(InputError, match="cannot write"):
        write_frames(tmp_path / "a.txt", np.zeros((1, 2, 2, 3), np.uint8))
