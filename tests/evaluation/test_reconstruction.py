"""eval/reconstruction.py: its numbers, its files, continuing after a kill, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diff2to3.assets import load_asset
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import choose_assets, pack_of
from diff2to3.evaluation.parallel import run_items
from diff2to3.evaluation.reconstruction import Setup, reconstruct_and_compare, reconstruction_rules, scores
from diff2to3.evaluation.runs import RunFolder
from diff2to3.gaussians.render import render
from diff2to3.metrics.image import psnr
from diff2to3.types import Views
from diff2to3.views import RenderConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--views", "2", "--resolution", "32"]


def without_run(path: Path) -> dict:
    """A result without what may differ between equal runs."""
    result = json.loads(path.read_text())
    result.pop("run")
    return result


@pytest.fixture
def evaluate(program, boxes, vae):
    """Run the program here: evaluate(out, more…)."""

    def run(out: Path, *more: str, assets: str | None = None) -> int:
        words = ["--assets", assets or str(boxes), "--model", str(vae), "--out", str(out), "--device", "cpu"]
        return program("reconstruction").main([*words, *SMALL, "--workers", "0", *more])

    return run


def test_a_result_of_val(evaluate, boxes, vae, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert evaluate(out, "--split", "val", "--worst", "2") == 0
    result = json.loads(out.read_text())
    assert result["num_assets"] == {"asked": 4, "scored": 3, "failed": 1}
    assert set(result["assets"]) == {"other/box-1", "plain/box-1", "plain/box-2"}
    assert list(result["failed"]) == ["plain/box-3"] and "truncated" in result["failed"]["plain/box-3"]
    for name in ("psnr", "psnr_foreground", "ssim", "ciede2000", "structure_iou"):
        values = [row[name] for row in result["assets"].values()]
        assert result["mean"][name] == pytest.approx(np.mean(values))
        low, high = result["interval"][name]
        assert min(values) - 1e-9 <= low < result["mean"][name] < high <= max(values) + 1e-9
    packs = result["packs"]
    assert packs["plain"]["num_assets"] == 2 and packs["other"]["num_assets"] == 1
    assert packs["other"]["psnr"] == result["assets"]["other/box-1"]["psnr"]
    order = sorted(result["assets"], key=lambda name: result["assets"][name]["psnr"])
    assert result["worst"] == order[:2]
    # Pictures of the worst, and nothing else left behind.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results_worst"]
    names = sorted(p.name for p in (tmp_path / "results_worst").iterdir())
    assert names == ["index.html", "worst-01.png", "worst-02.png"]
    captured = capsys.readouterr()
    assert (
        f"{result['mean']['psnr']:.2f}" in captured.out and "3 of 4 assets scored, 1 failed" in captured.out
    )
    # One asset again, from the parts: the same mesh, cameras, and metric.
    record = next(r for r in choose_assets([str(boxes)]).records if r.id == "plain/box-1")
    lighting = RenderConfig(supersample=1, lighting=RenderConfig().lighting.__class__(mode="unlit"))
    rules = reconstruction_rules(2, 32, 0, lighting)
    made = reconstruct_and_compare(Setup(str(vae), rules), record)
    assert made.values["psnr"] == pytest.approx(result["assets"]["plain/box-1"]["psnr"])
    again = scores(made.reconstruction.gaussians, made.truth)
    assert again["ssim"] == pytest.approx(result["assets"]["plain/box-1"]["ssim"])


def test_an_asset_too_thin_to_see_has_no_foreground(evaluate, tmp_path, capsys):
    """A sliver covers no pixel by half: numbers of the foreground are undefined, and not counted."""
    trimesh = pytest.importorskip("trimesh")
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, height in (("thin", 1e-7), ("thick", 1.0)):
        mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0.5, height, 0]], [[0, 1, 2]], process=False)
        (folder / f"{name}.glb").write_bytes(mesh.export(file_type="glb"))
    assert evaluate(tmp_path / "r.json", assets=str(folder)) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["assets"]["thin"]["psnr_foreground"] is None and result["assets"]["thin"]["psnr"] > 0
    assert result["mean"]["psnr_foreground"] == result["assets"]["thick"]["psnr_foreground"]
    assert "—" in capsys.readouterr().out


def test_scores_are_of_held_out_views_on_white(vae, boxes):
    record = next(r for r in choose_assets([str(boxes)]).records if r.id == "plain/box-1")
    made = reconstruct_and_compare(Setup(str(vae), reconstruction_rules(3, 24)), record)
    distances = torch.cdist(made.truth.viewmats.flatten(1), made.reconstruction.views.viewmats.flatten(1))
    assert float(distances.min()) > 1e-3
    g, truth = made.reconstruction.gaussians, made.truth
    drawn = render(g, truth.viewmats, truth.Ks, 24, 24, background=1.0).colors.clamp(0, 1)
    expected = psnr(drawn, truth.images * truth.alphas[..., None] + 1 - truth.alphas[..., None]).mean()
    assert made.values["psnr"] == pytest.approx(float(expected), abs=1e-6)
    # Exactly right pictures score as such.
    perfect = Views(drawn, torch.ones_like(truth.alphas), truth.viewmats, truth.Ks)
    assert scores(g, perfect)["psnr"] > 90 and scores(g, perfect)["ciede2000"] < 1e-3


def test_zips_know_the_split_of_the_manifest_beside_them(evaluate, boxes, tmp_path):
    assert evaluate(tmp_path / "a.json", "--split", "val", assets=str(boxes / "other.zip")) == 0
    assert list(without_run(tmp_path / "a.json")["assets"]) == ["other/box-1"]
    both = choose_assets([str(boxes / "other.zip"), str(boxes / "plain.zip")], "train")
    assert [record.id for record in both.records] == ["other/box-0", "plain/box-0"]
    assert [pack_of(record) for record in both.records] == ["other", "plain"]
    assert "2 of 6 assets are of the split train" in choose_assets([str(boxes)]).notes[0]
    assert load_asset(both.records[0]).num_faces == 12
    with pytest.raises(InputError, match="known are train, val"):
        choose_assets([str(boxes)], "test")


def test_killed_and_run_again_gives_the_same(evaluate, boxes, vae, tmp_path):
    """In two processes of its own, killed after the first assets; continued and, elsewhere, run without a stop."""
    out = tmp_path / "killed.json"
    command = [
        sys.executable,
        str(ROOT / "eval" / "reconstruction.py"),
        "--assets",
        str(boxes),
        "--model",
        str(vae),
    ]
    command += [
        "--split",
        "val",
        *SMALL,
        "--device",
        "cpu",
        "--worst",
        "1",
        "--out",
        str(out),
        "--workers",
        "1",
    ]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = tmp_path / "killed.json.partial" / "results-0.jsonl"
    while child.poll() is None and not (lines.is_file() and lines.read_bytes().count(b"\n") >= 1):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = lines.read_bytes() if lines.is_file() else b""
    assert kept.count(b"\n") >= 1 and not out.exists()
    with open(lines, "ab") as stream:
        stream.write(b'{"id": "half a li')  # as a crash in the middle of writing leaves it
    seen = []
    original = RunFolder.append
    try:
        RunFolder.append = lambda self, rank, row: (seen.append(row["id"]), original(self, rank, row))[1]  # type: ignore
        assert evaluate(out, "--split", "val", "--worst", "1") == 0
    finally:
        RunFolder.append = original  # type: ignore[method-assign]
    done = {json.loads(line)["id"] for line in kept.splitlines() if "values" in json.loads(line)}
    assert done and not done & set(seen)
    assert evaluate(tmp_path / "whole.json", "--split", "val", "--worst", "1") == 0
    assert without_run(out) == without_run(tmp_path / "whole.json")
    assert not lines.parent.exists()


def fail_or_work(context: str, item: str) -> dict:
    """For run_items in this process."""
    if item == "bad":
        raise InputError("bad: is bad")
    return {"made": item + context}


def test_an_asset_that_breaks_its_process_stops_no_other(capsys):
    rows = run_items(None, fail_or_work, "!", [("good", "good"), ("bad", "bad")], workers=0, label="x")
    assert rows == {
        "good": {"id": "good", "values": {"made": "good!"}},
        "bad": {"id": "bad", "error": "bad: is bad"},
    }
    # exec(code, variables), because children must be able to import the function
    code = "import os\nif how is not None: os._exit(how)"
    items = [(name, {"how": how}) for name, how in (("dies", 3), ("raises", "x"), ("works", None))]
    rows = run_items(None, exec, code, items, workers=1, label="x")  # type: ignore[arg-type]
    assert "dies" in rows["dies"]["error"] and "exit code 3" in rows["dies"]["error"]
    assert rows["raises"]["error"].startswith("TypeError")
    assert "values" in rows["works"]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no assets", "nowhere: no such file or folder"),
        ("empty folder", "no 3D file"),
        ("wrong split", "--split test: no asset is of this split"),
        ("wrong model", "no such folder, not an embedded model"),
        ("truncated weights", "not a complete safetensors file"),
        ("unwritable", "cannot be written"),
        ("out is a folder", "is a folder"),
        ("no views", "--views: expected a number from 1"),
        ("missing lpips", "lpips: no file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(case, said, program, boxes, vae, tmp_path, capsys):
    model, assets, out, more = vae, boxes, tmp_path / "out.json", []
    if case == "no assets":
        assets = tmp_path / "nowhere"
    elif case == "empty folder":
        assets = tmp_path / "empty"
        assets.mkdir()
    elif case == "wrong split":
        more = ["--split", "test"]
    elif case == "wrong model":
        model = tmp_path / "no model"
    elif case == "truncated weights":
        model = tmp_path / "model"
        shutil.copytree(vae, model)
        path = model / "encoder.safetensors"
        path.write_bytes(path.read_bytes()[:-50])
    elif case == "unwritable":
        (tmp_path / "file").write_text("no folder")
        out = tmp_path / "file" / "out.json"
    elif case == "out is a folder":
        out = tmp_path
    elif case == "no views":
        more = ["--views", "0"]
    elif case == "missing lpips":
        more = ["--weights", f"lpips={tmp_path / 'lpips.safetensors'}"]
    before = sorted(tmp_path.rglob("*"))
    words = [
        "--assets",
        str(assets),
        "--model",
        str(model),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert program("reconstruction").main([*words, *SMALL, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("reconstruction: error: ") and said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_lpips_is_scored_where_weights_are_at_hand(evaluate, weights, tmp_path):
    lpips = next(pair for pair in weights if pair.startswith("lpips="))
    assert evaluate(tmp_path / "r.json", "--limit", "1", "--weights", lpips, "--worst", "0") == 0
    result = without_run(tmp_path / "r.json")
    assert result["mean"]["lpips"] > 0 and not any("lpips" in note for note in result["notes"])
