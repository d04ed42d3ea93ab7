"""eval/generation.py: a model from one photo beside retrieval and random assets."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diff2to3.errors import InputError
from diff2to3.evaluation.assets import choose_assets
from diff2to3.evaluation.engine import Plan, score, score_asset
from diff2to3.evaluation.models import Generator
from diff2to3.evaluation.protocol import generation_rules
from diff2to3.evaluation.results import paired
from diff2to3.evaluation.retrieval import (
    IndexSetup,
    Library,
    RandomAssets,
    Retrieval,
    build_index,
    load_index,
    write_library,
)
from diff2to3.evaluation.scores import Pairs, Shapes
from diff2to3.evaluation.sources import MeshSource
from diff2to3.evaluation.subjects import Pictures, Subject, show_gaussians
from diff2to3.pipeline import ImageTo3D
from diff2to3.types import Gaussians
from diff2to3.views import LightingConfig, RenderConfig

METRICS = (Pairs(), Shapes())
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


def test_a_result_with_baselines(evaluate, weights, recorded, tmp_path, capsys):
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
    recorded(
        "generation",
        sha=result["protocol_sha256"],
        assets=result["assets"],
        baselines=result["baseline_assets"],
        mean=result["mean"],
    )
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


def subject_of(boxes: Path, asset_id: str, resolution: int = 48) -> Subject:
    rules = generation_rules(2, resolution, lighting=UNLIT)
    return Subject(asset_id, rules, MeshSource((str(boxes),)), torch.device("cpu"))


def numbers(subject: Subject, shown: Pictures) -> dict[str, float]:
    return score(METRICS, subject, subject.source, shown)


def test_the_truth_itself_scores_best(boxes):
    first, second = (subject_of(boxes, f"plain/box-{i}") for i in (0, 1))
    same = numbers(first, replace(first.truth, shape=first.shape))
    assert same["voxel_iou"] == 1 and same["psnr"] > 90 and same["chamfer"] < 1e-12 and same["f_score"] == 1
    other = numbers(first, replace(second.truth, shape=second.shape))
    assert other["voxel_iou"] < 0.9 and other["psnr"] < 40 and other["chamfer"] > 0.005


def test_retrieval_finds_what_it_has_seen(boxes, tmp_path):
    records = [r for r in choose_assets([str(boxes)]).records if r.id != "plain/box-3"]
    rules = generation_rules(2, 64, lighting=UNLIT)
    path, failed = build_index(tmp_path, IndexSetup(rules, 24), records, workers=0)
    index = load_index(str(path))
    assert not failed and sorted(index.ids) == sorted(r.id for r in records)
    for record in records:
        photo = subject_of(boxes, record.id, 64).straight_photo()
        assert index.nearest(*photo) == record.id
        assert index.nearest(*photo, record.id) != record.id


def test_gaussians_are_compared_by_those_that_are_solid(boxes):
    """Dots on the surface come near to it; an empty object is as far away as things can be."""
    subject = subject_of(boxes, "plain/box-0", 32)
    points = subject.shape.points
    n = len(points)
    solid = torch.full((n,), 0.9)
    upright = torch.tensor([1.0, 0, 0, 0]).expand(n, 4)
    dots = Gaussians(points, upright, torch.full((n, 3), 0.01), solid, torch.zeros(n, 1, 3))
    near = numbers(subject, show_gaussians(dots, subject.cameras, subject, 0.1))
    assert near["chamfer"] < 0.01 and near["f_score"] > 0.9 and near["voxel_iou"] > 0.9
    faint = Gaussians(dots.means, dots.quats, dots.scales, solid * 0.1, dots.sh)
    gone = numbers(subject, show_gaussians(faint, subject.cameras, subject, 0.1))
    assert gone["chamfer"] == pytest.approx(3**0.5) and gone["f_score"] == 0 and gone["voxel_iou"] == 0


def generation_plan(boxes: Path, model: str, **options: bool) -> Plan:
    rules = generation_rules(2, 32, lighting=UNLIT, model_grid=16)
    methods = (("ours", Generator(model, **options)),)
    return Plan(rules, MeshSource((str(boxes),)), methods, METRICS)


def test_nothing_made_is_scored_as_empty_space(boxes, monkeypatch):
    """Where the plan says so; else it is the asset's error."""

    def no_model(image, **options):
        raise InputError("the structure stage generated no voxel")

    monkeypatch.setattr(ImageTo3D, "from_pretrained", staticmethod(lambda source, **options: no_model))
    plan = generation_plan(boxes, "unused", nothing=True)
    row = score_asset(plan, "plain/box-0")
    ours = row["values"]["ours"]
    assert ours["voxel_iou"] == 0 and ours["f_score"] == 0 and ours["psnr"] > 0
    assert row["remarks"]["ours"] == {"nothing": "the structure stage generated no voxel"}
    assert ours["num_gaussians"] == 0 and ours["seconds"] is None
    subject = plan.subject("plain/box-0")
    assert (plan.methods[0][1].pictures(subject, subject.cameras).images == 1).all()
    with pytest.raises(InputError, match="generated no voxel"):
        score_asset(generation_plan(boxes, "unused"), "plain/box-0")


def test_a_plan_travels_as_words(boxes, generator_bundle, tmp_path):
    """A copy, as a worker process gets it, is equal, has nothing loaded, and gives the same numbers."""
    train = choose_assets([str(boxes)], "train")
    plan = generation_plan(boxes, str(generator_bundle))
    index, _ = build_index(tmp_path, IndexSetup(plan.rules, 2), train.records, workers=0)
    library = Library(str(write_library(tmp_path, train)), plan.rules)
    pool = tuple(record.id for record in train.records)
    baselines = Retrieval(library, str(index)), RandomAssets(library, pool, 2)
    plan = replace(plan, methods=(*plan.methods, *((b.name, b) for b in baselines)))
    plan.load()
    row = score_asset(plan, "plain/box-1")
    sent = pickle.dumps(plan)
    assert len(sent) < 10_000
    copy = pickle.loads(sent)
    assert copy == plan and "network" not in vars(copy.methods[0][1]) and "records" not in vars(copy.truth)
    again = score_asset(copy, "plain/box-1")
    for one in (row, again):
        assert one["values"]["ours"].pop("seconds") > 0
    assert again == row and set(row["remarks"]["random"]["drawn"]) == set(pool)


def test_paired_differences_have_signs():
    ours = {"a": {"psnr": 3.0, "chamfer": 1.0}, "b": {"psnr": 5.0, "chamfer": None}}
    other = {"a": {"psnr": 2.0, "chamfer": 2.0}, "b": {"psnr": 7.0, "chamfer": 2.0}}
    found = paired(ours, other, {"fd_inception": 1.0}, {"fd_inception": 4.0})
    assert found["psnr"]["mean"] == -0.5 and not found["psnr"]["better"]
    assert found["chamfer"]["mean"] == -1 and found["chamfer"]["better"]
    assert found["fd_inception"] == {"mean": -3.0, "better": True}


def test_equal_seeds_give_equal_numbers(boxes, generator_bundle):
    plan = generation_plan(boxes, str(generator_bundle))
    first, again = (score_asset(plan, "plain/box-0")["values"]["ours"] for _ in range(2))
    for row in (first, again):
        row.pop("seconds")
    assert first == again


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
