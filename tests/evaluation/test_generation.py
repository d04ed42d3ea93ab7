"""eval/generation.py: a model from one photo beside retrieval and random assets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diff2to3.errors import InputError
from diff2to3.evaluation.assets import choose_assets
from diff2to3.evaluation.generation import (
    Setup,
    compare,
    generation_rules,
    paired,
    photo_of,
    score_asset,
    show_gaussians,
    show_mesh,
)
from diff2to3.evaluation.retrieval import IndexSetup, build_index, load_index
from diff2to3.types import Gaussians
from diff2to3.views import LightingConfig, RenderConfig, make_renderer

UNLIT = RenderConfig(supersample=1, lighting=LightingConfig(mode="unlit"), outputs=())


@pytest.fixture
def evaluate(program, boxes, generator_bundle, tmp_path):
    def run(out: Path, *more: str) -> int:
        words = [
            "--assets",
            str(boxes),
            "--model",
            str(generator_bundle),
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        words += ["--views", "2", "--resolution", "32", "--workers", "0", "--cache", str(tmp_path / "cache")]
        return program("generation").main([*words, *more])

    return run


def test_a_result_with_baselines(evaluate, weights, tmp_path, capsys):
    out = tmp_path / "r.json"
    some = [pair for pair in weights if pair.startswith(("clip", "inception"))]
    assert evaluate(out, "--split", "val", "--pictures", "1", "--weights", *some) == 0
    result = json.loads(out.read_text())
    assert result["num_assets"] == {"asked": 4, "scored": 3, "failed": 1}
    metrics = {"psnr", "ssim", "psnr_foreground", "ciede2000", "voxel_iou", "chamfer", "f_score", "clip"}
    sets = {"fd_inception", "kd_inception"}
    assert metrics | sets <= set(result["mean"])
    for method in ("retrieval", "random"):
        held = result["baselines"][method]["mean"]
        assert metrics - (set() if method == "retrieval" else {"clip"}) <= set(held)
        for metric in ("psnr", "chamfer"):
            rows = [row[method][metric] for row in result["baseline_assets"].values()]
            assert held[metric] == pytest.approx(np.mean(rows))
            difference = result["differences"][method][metric]
            assert difference["mean"] == pytest.approx(result["mean"][metric] - held[metric])
            assert difference["better"] == ((difference["mean"] > 0) == (metric == "psnr"))
    for row in result["baseline_assets"].values():
        assert row["retrieved"] in ("plain/box-0", "other/box-0")  # those of split train
        assert set(row["drawn"]) <= {"plain/box-0", "other/box-0"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "r.json", "r_pictures"]
    shown = capsys.readouterr().out
    assert "retrieval" in shown and "random" in shown
    # Again, from the cache: the same.
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*-*.safetensors")}
    assert (
        stamps and evaluate(tmp_path / "s.json", "--split", "val", "--pictures", "0", "--weights", *some) == 0
    )
    again = json.loads((tmp_path / "s.json").read_text())
    again.pop("run"), result.pop("run")
    for one in (again, result):
        for row in one["assets"].values():
            row.pop("seconds")
        for part in (one["mean"], one["interval"], *one["packs"].values()):
            part.pop("seconds", None)
    assert again == result
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_without_training_assets_there_are_no_baselines(evaluate, tmp_path, capsys):
    assert (
        evaluate(tmp_path / "r.json", "--split", "val", "--limit", "1", "--pictures", "0", "--no-baselines")
        == 0
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["baselines"] == {} and "no baselines (--no-baselines)" in result["notes"]
    assert (
        evaluate(
            tmp_path / "s.json", "--split", "val", "--train-split", "nope", "--limit", "1", "--pictures", "0"
        )
        == 0
    )
    assert any(
        "no baselines: --split nope" in n for n in json.loads((tmp_path / "s.json").read_text())["notes"]
    )


def test_the_truth_itself_scores_best(boxes):
    """Its own mesh is perfect; retrieval among assets with the photographed one finds it."""
    records = choose_assets([str(boxes)]).records[:4]
    setup = Setup("unused", generation_rules(2, 48, lighting=UNLIT))
    truth = show_mesh(setup, records[0])
    same = compare(setup, show_mesh(setup, records[0]), truth)
    assert same["voxel_iou"] == 1 and same["psnr"] > 90 and same["chamfer"] < 1e-12 and same["f_score"] == 1
    other = compare(setup, show_mesh(setup, records[1]), truth)
    assert other["voxel_iou"] < 0.9 and other["psnr"] < 40 and other["chamfer"] > 0.005


def test_retrieval_finds_what_it_has_seen(boxes, tmp_path):
    records = [r for r in choose_assets([str(boxes)]).records if r.id != "plain/box-3"]
    rules = generation_rules(2, 64, lighting=UNLIT)
    path, failed = build_index(tmp_path, IndexSetup(rules, 24), records, workers=0)
    index = load_index(str(path))
    assert not failed and sorted(index.ids) == sorted(r.id for r in records)
    setup = Setup("unused", rules)
    for record in records:
        from diff2to3.assets import load_asset

        photo = photo_of(setup, record.id, make_renderer(load_asset(record), UNLIT))
        assert index.nearest(photo.images[0], photo.alphas[0]) == record.id
        assert index.nearest(photo.images[0], photo.alphas[0], record.id) != record.id


def test_gaussians_are_compared_by_those_that_are_solid(boxes):
    """Dots on the surface come near to it; an empty object is as far away as things can be."""
    record = choose_assets([str(boxes)]).records[0]
    setup = Setup("unused", generation_rules(2, 32, lighting=UNLIT))
    truth = show_mesh(setup, record)
    n = len(truth.points)
    solid = torch.full((n,), 0.9)
    dots = Gaussians(
        truth.points,
        torch.tensor([1.0, 0, 0, 0]).expand(n, 4),
        torch.full((n, 3), 0.01),
        solid,
        torch.zeros(n, 1, 3),
    )
    near = compare(setup, show_gaussians(setup, dots, None, 0), truth)
    assert near["chamfer"] < 0.01 and near["f_score"] > 0.9 and near["voxel_iou"] > 0.9
    faint = Gaussians(dots.means, dots.quats, dots.scales, solid * 0.1, dots.sh)
    gone = compare(setup, show_gaussians(setup, faint, None, 0), truth)
    assert gone["chamfer"] == pytest.approx(3**0.5) and gone["f_score"] == 0 and gone["voxel_iou"] == 0


def test_nothing_made_is_scored_as_empty_space(boxes, generator_bundle, monkeypatch):
    from diff2to3.evaluation import generation

    def no_model(setup):
        def call(image, **options):
            raise InputError("the structure stage generated no voxel")

        return call

    monkeypatch.setattr(generation, "load_model", no_model)
    record = choose_assets([str(boxes)], "train").records[0]
    row = score_asset(Setup("unused", generation_rules(2, 32, lighting=UNLIT)), record)
    assert row["ours"]["voxel_iou"] == 0 and row["ours"]["f_score"] == 0 and row["ours"]["psnr"] > 0
    assert row["nothing"] == "the structure stage generated no voxel" and row["num_gaussians"] == 0


def test_paired_differences_have_signs():
    ours = {"a": {"psnr": 3.0, "chamfer": 1.0}, "b": {"psnr": 5.0, "chamfer": None}}
    other = {"a": {"psnr": 2.0, "chamfer": 2.0}, "b": {"psnr": 7.0, "chamfer": 2.0}}
    found = paired(ours, other, {"fd_inception": 1.0}, {"fd_inception": 4.0})
    assert found["psnr"]["mean"] == -0.5 and not found["psnr"]["better"]
    assert found["chamfer"]["mean"] == -1 and found["chamfer"]["better"]
    assert found["fd_inception"] == {"mean": -3.0, "better": True}


def test_equal_seeds_give_equal_numbers(boxes, generator_bundle):
    record = choose_assets([str(boxes)], "train").records[0]
    setup = Setup(str(generator_bundle), generation_rules(2, 32, lighting=UNLIT), resolution=16)
    first, again = score_asset(setup, record), score_asset(setup, record)
    assert first["ours"] == again["ours"]


@pytest.mark.parametrize(
    ("case", "said"),
    [("vae", "cannot generate"), ("cache", "--cache"), ("steps", "--steps: expected at least 1")],
)
def test_bad_input(case, said, evaluate, vae, tmp_path, capsys):
    more = {
        "vae": ["--model", str(vae)],
        "cache": ["--cache", str(tmp_path / "file" / "x")],
        "steps": ["--steps", "0"],
    }[case]
    (tmp_path / "file").write_text("")
    assert evaluate(tmp_path / "r.json", "--split", "val", *more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("generation: error: ") and said in line
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
