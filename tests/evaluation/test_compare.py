"""Comparing folders: sources that must agree, the report, intervals, and the gate's decisions."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.evaluation.gate import compare_results
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.runs import RunFolder
from diff2to3.evaluation.sources import MeshSource, open_source
from diff2to3.evaluation.subjects import Subject
from diff2to3.evaluation.summary import bootstrap_mean, paired_differences, set_distances
from diff2to3.formats.ply import write_ply
from diff2to3.types import Gaussians
from diff2to3.views import CameraConfig, LightingConfig, RenderConfig

CPU = torch.device("cpu")
RULES = Protocol(
    resolution=32,
    num_assets=None,
    cameras=CameraConfig("sphere", num_views=2),
    render=RenderConfig(supersample=1, lighting=LightingConfig(mode="unlit"), outputs=()),
)
#: The same protocol for the programs.
TINY = ["num_assets=null", "render.supersample=1", "render.lighting.mode=unlit", "resolution=32"]
TINY += ["cameras.num_views=2", "shape_points=0"]


@pytest.fixture
def folders(made_folders, tmp_path) -> dict[str, Path]:
    """A test's own copy of them."""
    shutil.copytree(made_folders, tmp_path, dirs_exist_ok=True)
    return {name: tmp_path / name for name in ("ply", "yup", "images", "truth")}


@pytest.fixture(scope="module")
def made_folders(toys4k, session_method, tmp_path_factory) -> Path:
    """The same dots as .ply, as .ply with y up, and as pictures; the truth as pictures."""
    tmp_path = tmp_path_factory.mktemp("folders")
    truth = MeshSource((f"toys4k:{toys4k}",))
    dots = open_source(f"call:{session_method}:dots", CPU)
    made = {name: tmp_path / name for name in ("ply", "yup", "images", "truth")}
    for asset_id in truth.ids():
        subject = Subject(asset_id, RULES, truth, CPU)
        shown = dots.pictures(subject, subject.cameras)
        g = shown.gaussians
        assert g is not None
        for name in ("ply", "yup"):
            made[name].mkdir(exist_ok=True)
        write_ply(made["ply"] / f"{asset_id}.ply", g)
        x, y, z = g.means.unbind(1)  # balls need no rotation of their own
        turned = Gaussians(torch.stack([x, z, -y], 1), g.quats, g.scales, g.opacities, g.sh)
        write_ply(made["yup"] / f"{asset_id}.ply", turned)
        for name, images in (("images", shown.images), ("truth", subject.truth.images)):
            (made[name] / asset_id).mkdir(parents=True)
            for view, image in enumerate((images * 255).round().byte().numpy()):
                Image.fromarray(image).save(made[name] / asset_id / f"{view:03d}.png")
    return tmp_path


class Links(HTMLParser):
    """Collects what a page shows and checks that its tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_sources_of_the_same_thing_show_the_same(toys4k, folders):
    truth = MeshSource((f"toys4k:{toys4k}",))
    subject = Subject(truth.ids()[0], RULES, truth, CPU)
    specs = {
        name: open_source(f"{kind}:{folders[name]}", CPU)
        for name, kind in (("ply", "ply"), ("yup", "ply-yup"), ("images", "images"))
    }
    shown = {name: source.pictures(subject, subject.cameras) for name, source in specs.items()}
    assert float(shown["ply"].images.std()) > 0.05
    torch.testing.assert_close(shown["yup"].images, shown["ply"].images, atol=2e-3, rtol=0)
    torch.testing.assert_close(shown["images"].images, shown["ply"].images, atol=3e-3, rtol=0)
    assert shown["images"].alphas is None and shown["ply"].alphas is not None
    wrong = open_source(f"ply:{folders['yup']}", CPU).pictures(subject, subject.cameras)
    assert float((wrong.images - shown["ply"].images).abs().mean()) > 0.01
    for name in ("ply", "images"):
        assert type(open_source(str(folders[name]), CPU)) is type(specs[name])
    assert all(source.ids() == truth.ids() for source in specs.values())


def test_pictures_with_alpha_are_put_on_the_background(tmp_path):
    """And come back from the photo as they were."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:24, 8:24] = (200, 100, 50, 255)
    rgba[:4] = (10, 250, 30, 128)
    (tmp_path / "a").mkdir()
    for name in ("0", "1", "photo"):
        Image.fromarray(rgba).save(tmp_path / "a" / f"{name}.png")
    source = open_source(f"images:{tmp_path}", CPU)
    rules = Protocol(resolution=32, background=(1.0, 0.0, 0.5), cameras=CameraConfig("sphere", num_views=2))
    subject = Subject("a", rules, source, CPU)
    shown = source.pictures(subject, subject.cameras)
    assert shown.images.shape == (2, 32, 32, 3) and shown.alphas is not None
    torch.testing.assert_close(shown.images[0, 30, 30], torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(shown.images[0, 16, 16], torch.tensor([200, 100, 50]) / 255)
    half = 128 / 255
    expected = torch.tensor([10, 250, 30]) / 255 * half + (1 - half) * torch.tensor([1.0, 0.0, 0.5])
    torch.testing.assert_close(shown.images[0, 0, 0], expected)
    back = np.array(subject.photo)
    assert np.array_equal(back[..., 3], rgba[..., 3]) and np.array_equal(back[:24, 8:24], rgba[:24, 8:24])


def test_picture_folders_that_do_not_fit_are_refused(folders):
    source = open_source(f"images:{folders['images']}", CPU)
    asset_id = source.ids()[0]
    for rules, message in (
        (Protocol(resolution=64, cameras=RULES.cameras), r"is 32 x 32; the protocol compares 64 x 64"),
        (Protocol(resolution=32), r"expected 8 pictures, one for each of the protocol's cameras, got 2"),
    ):
        subject = Subject(asset_id, rules, source, CPU)
        with pytest.raises(InputError, match=message):
            source.pictures(subject, subject.cameras)
    (folders["images"] / asset_id / "000.png").write_bytes(b"\x89PNG broken")
    subject = Subject(asset_id, RULES, source, CPU)
    with pytest.raises(InputError, match=r"000\.png: cannot be read as a picture"):
        source.pictures(subject, subject.cameras)


def test_compare_writes_a_report(program, toys4k, folders, weights, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = [
        f"a & b=ply:{folders['ply']}",
        f"images:{folders['images']}",
        f"same=images:{folders['truth']}",
    ]
    arguments += ["--truth", f"toys4k:{toys4k}", "--out", str(out), "--device", "cpu", "--set", *TINY]
    assert program("compare").main([*arguments, "--weights", weights[1]]) == 0
    shown = capsys.readouterr().out
    assert "images: " in shown and str(out / "report.html") in shown
    page = (out / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.images) == 5 * 2 * 4  # assets, views, truth and three methods
    assert all((out / link).is_file() for link in parser.images)
    assert (
        "a &amp; b" in page
        and "Difference to a &amp; b" in page
        and re.search(r"\[\d+\.\d\d, \d+\.\d\d\]", page)
    )
    tables = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/table.json")}
    assert len(tables) == 3
    assert tables["same"]["metrics"]["psnr"]["value"] > 50  # 8 bits only
    assert tables["same"]["metrics"]["lpips"]["value"] < 1e-3
    gap = (
        tables["images"]["metrics"]["psnr"]["value"]
        - next(t for n, t in tables.items() if n.startswith("a"))["metrics"]["psnr"]["value"]
    )
    assert abs(gap) < 0.05
    assert str(tmp_path) not in page and not any(
        str(tmp_path) in json.dumps(table) for table in tables.values()
    )


def test_compare_reports_assets_that_a_method_lacks(program, folders, tmp_path, capsys):
    lost = sorted((folders["images"]).iterdir())[2]
    for path in lost.iterdir():
        path.unlink()
    arguments = [
        str(folders["images"]),
        "--truth",
        f"images:{folders['truth']}",
        "--out",
        str(tmp_path / "r"),
    ]
    assert program("compare").main([*arguments, "--device", "cpu", "--set", *TINY]) == 1
    page = (tmp_path / "r" / "report.html").read_text()
    assert "4 of 5" in page and lost.name in page
    arguments = [str(folders["images"]), str(folders["images"]), *arguments[1:]]
    assert program("compare").main(arguments) == 2
    assert "two methods are called 'images'" in capsys.readouterr().err


def test_bootstrap_agrees_with_the_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    estimate = bootstrap_mean(values.tolist(), seed=1)
    error = values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.noise == pytest.approx(error, rel=0.1)
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_mean(values.tolist(), seed=1) == estimate
    one = bootstrap_mean([5.0])
    assert (one.value, one.noise, one.low, one.high, one.count) == (5, None, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_noise_of_fd_is_that_of_fresh_samples():
    """Estimated from one set of assets, against the spread over many sets."""
    rules = Protocol(kd_subsets=0)

    def pairs(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        return [
            tuple(torch.randn(2, 2, 4, generator=generator) + torch.tensor([[[0.0]], [[0.5]]]))
            for _ in range(80)
        ]

    fresh = [set_distances("dinov2", pairs(seed), rules, 0) for seed in range(30)]
    for name in ("fd_dinov2", "kd_dinov2"):
        spread = float(np.std([f[name].value for f in fresh], ddof=1))
        estimated = [set_distances("dinov2", pairs(seed), rules, 20)[name].noise for seed in range(4)]
        assert 0.4 * spread < float(np.mean(estimated)) < 2 * spread
        assert fresh[0][name].noise is None


def table(psnr: list[float], fd: float | None = None, noise: float = 1.0) -> dict:
    metrics = {"psnr": vars(bootstrap_mean(psnr))}
    if fd is not None:
        metrics["fd_dinov2"] = {"value": fd, "noise": noise, "low": None, "high": None, "count": len(psnr)}
    same = {"task": "reconstruction", "protocol_sha256": "p", "weights": {}, "errors": {}}
    return {**same, "metrics": metrics, "assets": {str(i): {"psnr": v} for i, v in enumerate(psnr)}}


def test_gate_weighs_changes_against_their_noise():
    scores = np.random.default_rng(0).normal(25, 5, 50)
    jitter = np.random.default_rng(1).normal(0, 0.1, 50)
    before = table(scores.tolist())

    def passes(change: np.ndarray | float, **options: float) -> bool:
        (verdict,) = compare_results(before, table((scores + change).tolist()), **options)
        return verdict.passed

    assert passes(0.0) and passes(1.0) and passes(jitter - jitter.mean())
    # 0.2 dB is nothing beside the spread of assets, but far beyond the noise of the differences.
    assert not passes(jitter - 0.2) and passes(jitter - 0.2, sigmas=20)
    assert not passes(-0.01) and passes(-0.01, floor=1e-3)  # the same loss everywhere has no noise


def test_gate_on_distances_uses_the_noise_of_both():
    before = table([20.0, 21.0], fd=10.0, noise=1.0)
    assert all(v.passed for v in compare_results(before, table([20.0, 21.0], fd=14.0, noise=1.0)))
    verdicts = compare_results(before, table([20.0, 21.0], fd=14.5, noise=1.0))
    assert [v.passed for v in verdicts] == [True, False] and "FAIL FD dinov2: 10.00 -> 14.50" in verdicts[
        1
    ].line()
    assert all(v.passed for v in compare_results(before, table([20.0, 21.0], fd=2.0)))
    lost = compare_results(before, table([20.0, 21.0]))
    assert not lost[1].passed and "missing" in lost[1].line()
    assert not compare_results(before, table([20.0, 21.0], fd=math.nan))[1].passed


def test_gate_refuses_what_cannot_be_compared(program, tmp_path, capsys):
    before = table([20.0, 21.0, 22.0])
    for change, message in (
        ({"protocol_sha256": "q"}, "different protocols"),
        ({"weights": {"lpips": 1}}, "different weights"),
        ({"assets": {}}, "3 assets of the baseline have no scores in the result, first '0'"),
    ):
        with pytest.raises(InputError, match=message):
            compare_results(before, {**copy.deepcopy(before), **change})
    undefined = copy.deepcopy(before)
    undefined["assets"]["1"]["psnr"] = None
    assert not compare_results(before, undefined)[0].passed
    (tmp_path / "x.json").write_text("[]")
    for name in ("x.json", "no.json"):
        assert program("gate").main([str(tmp_path / name), "--baseline", str(tmp_path / name)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_paired_differences_are_over_common_assets():
    first, other = table([1.0, 2.0, 3.0]), table([2.0, 4.0])
    difference = paired_differences(first["assets"], other["assets"])["psnr"]
    assert difference.value == 1.5 and difference.count == 2


def test_lines_survive_a_torn_end(tmp_path):
    folder = RunFolder.open(tmp_path / "run", {"a": 1})
    folder.append(0, {"id": "x", "error": "later"})
    folder.append(1, {"id": "x", "values": {"psnr": 1.0}})
    for torn in (b'{"id": "y", "val', b"\xff\xfe"):
        with open(tmp_path / "run" / "results-0.jsonl", "ab") as file:
            file.write(torn)
        assert folder.lines() == {"x": {"id": "x", "values": {"psnr": 1.0}}}
    folder.append(0, {"id": "y", "values": {}})
    assert set(folder.lines()) == {"x", "y"}
    assert (tmp_path / "run" / "results-0.jsonl").read_bytes().count(b"\n") == 2
    with pytest.raises(InputError, match="another a, b; give another folder"):
        RunFolder.open(tmp_path / "run", {"a": 2, "b": 1})
