"""eval/reconstruction.py: its numbers, its files, continuing after a kill, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diff2to3.assets import load_asset
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import choose_assets, pack_of
from diff2to3.evaluation.engine import score
from diff2to3.evaluation.models import Autoencoder
from diff2to3.evaluation.parallel import run_items
from diff2to3.evaluation.protocol import Protocol, reconstruction_rules
from diff2to3.evaluation.runs import RunFolder
from diff2to3.evaluation.scores import Pairs
from diff2to3.evaluation.sources import MeshSource
from diff2to3.evaluation.subjects import Subject
from diff2to3.gaussians.render import render, render_pictures
from diff2to3.metrics.image import psnr
from diff2to3.metrics.pairs import pair_values
from diff2to3.views import RenderConfig

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


def test_a_result_of_val(evaluate, boxes, vae, recorded, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert evaluate(out, "--split", "val", "--worst", "2") == 0
    result = json.loads(out.read_text())
    recorded("reconstruction", sha=result["protocol_sha256"], assets=result["assets"])
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
    lighting = RenderConfig(supersample=1, lighting=RenderConfig().lighting.__class__(mode="unlit"))
    _, made, truth = reconstructed(boxes, vae, reconstruction_rules(2, 32, 0, lighting))
    values = pair_values(
        render_pictures(made.gaussians, truth.viewmats, truth.Ks, 32, 32)[0],
        truth.composite(1.0),
        truth.alphas,
        None,
    )
    for metric, value in values.items():
        assert value == pytest.approx(result["assets"]["plain/box-1"][metric])


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


def reconstructed(boxes: Path, vae: Path, rules: Protocol):
    """(subject, reconstruction, the asset's views), by the parts alone."""
    subject = Subject("plain/box-1", rules, MeshSource((str(boxes),)), torch.device("cpu"))
    made = Autoencoder(str(vae)).network(subject.mesh, name=subject.id)
    size, cameras = rules.resolution, subject.cameras
    return subject, made, subject.renderer.render(cameras.viewmats, cameras.Ks, size, size)


def test_scores_are_of_held_out_views_on_white(vae, boxes):
    subject, made, truth = reconstructed(boxes, vae, reconstruction_rules(3, 24))
    assert float(torch.cdist(truth.viewmats.flatten(1), made.views.viewmats.flatten(1)).min()) > 1e-3
    shown = Autoencoder(str(vae)).pictures(subject, subject.cameras)
    values = score([Pairs()], subject, subject.source, shown)
    drawn = render(made.gaussians, truth.viewmats, truth.Ks, 24, 24, background=1.0).colors.clamp(0, 1)
    expected = psnr(drawn, truth.images * truth.alphas[..., None] + 1 - truth.alphas[..., None]).mean()
    assert values["psnr"] == pytest.approx(float(expected), abs=1e-6)
    # Exactly right pictures score as such.
    perfect = score([Pairs()], subject, subject.source, subject.truth)
    assert perfect["psnr"] > 90 and perfect["ciede2000"] < 1e-3


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


@pytest.fixture
def stopped(evaluate, tmp_path, monkeypatch):
    """A run of val that was stopped when it had scored one asset: (its command again, the file of its lines)."""
    out, original = tmp_path / "stopped.json", RunFolder.append

    def run(*more: str) -> int:
        return evaluate(out, "--split", "val", "--worst", "1", *more)

    def append(self, rank, row):
        original(self, rank, row)
        if "values" in row:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", append)
        assert run() == 130
    lines = tmp_path / "stopped.json.partial" / "results-0.jsonl"
    assert lines.read_bytes().count(b'"values"') == 1 and not out.exists()
    return run, lines


def test_stopped_and_run_again_gives_the_same(stopped, evaluate, tmp_path, monkeypatch):
    """Continued and, elsewhere, run without a stop. (A process that is killed is in test_toys4k.py.)"""
    run, lines = stopped
    kept = lines.read_bytes()
    with open(lines, "ab") as stream:
        stream.write(b'{"id": "half a li')  # as a crash in the middle of writing leaves it
    seen, original = [], RunFolder.append
    with monkeypatch.context() as patch:
        patch.setattr(
            RunFolder, "append", lambda self, rank, row: (seen.append(row["id"]), original(self, rank, row))
        )
        assert run() == 0
    done = {json.loads(line)["id"] for line in kept.splitlines() if "values" in json.loads(line)}
    assert done and not done & set(seen)
    assert evaluate(tmp_path / "whole.json", "--split", "val", "--worst", "1") == 0
    assert without_run(tmp_path / "stopped.json") == without_run(tmp_path / "whole.json")
    assert not lines.parent.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "1"], "holds a run with another protocol"),  # a mistyped flag
        (["--limit", "2"], "holds a run with another assets"),
        (["--views", "0"], "--views"),
        (["--weights", "lpips=nowhere"], "nowhere"),
    ],
)
def test_no_error_deletes_what_a_stopped_run_has_computed(stopped, words, said, capsys):
    run, lines = stopped
    before = {p: p.read_bytes() for p in lines.parent.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and ("another --out" in line) == ("holds a run" in line)
    assert {p: p.read_bytes() for p in lines.parent.rglob("*") if p.is_file()} == before
    assert run() == 0


def test_a_damaged_record_of_a_run_deletes_nothing(stopped, capsys):
    run, lines = stopped
    kept = lines.read_bytes()
    (lines.parent / "run.json").write_text("[1, ")
    assert run() == 2
    assert "run.json: cannot be used as a run's folder" in capsys.readouterr().err
    assert lines.read_bytes() == kept


def fail_or_work(context: str, item: str) -> dict:
    """For run_items in this process."""
    if item == "bad":
        raise InputError("bad: is bad")
    return {"made": item + context}


def test_an_asset_that_fails_stops_no_other():
    rows = run_items(None, fail_or_work, "!", [("good", "good"), ("bad", "bad")], workers=0, label="x")
    assert rows == {
        "good": {"id": "good", "values": {"made": "good!"}},
        "bad": {"id": "bad", "error": "bad: is bad"},
    }


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
