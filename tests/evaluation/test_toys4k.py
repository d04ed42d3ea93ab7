"""The Toys4k programs end to end on a tiny set in the published layout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from diff2to3.assets import read_ids
from diff2to3.evaluation.cli import choose_ids
from diff2to3.evaluation.protocol import Protocol, draw_ids
from diff2to3.evaluation.runs import RunFolder
from diff2to3.evaluation.sources import MeshSource
from diff2to3.evaluation.tables import PAPER, markdown
from diff2to3.metrics.distribution import FeatureMoments, frechet_distance, kernel_distance
from diff2to3.pipeline import ImageTo3D, Result
from diff2to3.types import Gaussians, SparseVoxels

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = ROOT / "eval" / "protocol"
#: What makes a protocol tiny.
TINY = ("resolution=32", "cameras.num_views=2", "render.supersample=1", "render.lighting.mode=unlit")


def numbers(folder: Path) -> dict:
    """A table without what may differ between equal runs."""
    table = json.loads((folder / "table.json").read_text())
    table.pop("run")
    return table


@pytest.fixture
def reconstruct(program, toys4k, method, tiny, weights):
    """Run the reconstruction program in this process: reconstruct(out, name of the method, overrides)."""

    def run(out: Path, name: str = "dots", *more: str, spec: str | None = None, workers: int = 0) -> int:
        arguments = ["reconstruction", "--assets", f"toys4k:{toys4k}", "--out", str(out), "--device", "cpu"]
        arguments += ["--method", spec or f"call:{method}:{name}", "--weights", *weights]
        arguments += ["--workers", str(workers)]
        return program("toys4k").main([*arguments, "--offline", "--set", *tiny, *more])

    return run


def test_reconstruction_end_to_end(reconstruct, tmp_path, capsys):
    assert reconstruct(tmp_path / "run", "dots", "shape_points=500") == 0
    table = numbers(tmp_path / "run")
    assert table["num_assets"] == {"expected": 5, "scored": 5, "failed": 0}
    metrics = table["metrics"]
    assert {
        "psnr",
        "ssim",
        "lpips",
        "psnr_foreground",
        "ciede2000",
        "chamfer",
        "f_score",
        "voxel_iou",
    } == set(metrics)
    for name, held in metrics.items():
        values = [row[name] for row in table["assets"].values()]
        assert held["value"] == pytest.approx(sum(values) / 5) and held["count"] == 5
        assert held["low"] <= held["value"] <= held["high"] and held["noise"] > 0
    assert 10 < metrics["psnr"]["value"] < 40
    assert metrics["chamfer"]["value"] < 0.1
    assert len(table["weights"]["lpips"]["sha256"]) == 64
    assert table["notes"] == [f"the protocol asks for 1000 assets; {table['truth']['name']} has 5"]
    shown = capsys.readouterr().out
    assert "| TRELLIS (paper) | 0.9712 | 30.14 | 0.02901 |" in shown
    assert f"| **dots** | {metrics['ssim']['value']:.4f} | {metrics['psnr']['value']:.2f} |" in shown


def test_a_worse_method_scores_worse_and_a_gate_says_so(reconstruct, program, tmp_path, capsys):
    for name in ("dots", "gray"):
        assert reconstruct(tmp_path / name, name) == 0
    good, bad = numbers(tmp_path / "dots")["metrics"], numbers(tmp_path / "gray")["metrics"]
    assert (
        bad["ciede2000"]["value"] > good["ciede2000"]["value"]
        and bad["psnr"]["value"] < good["psnr"]["value"]
    )
    files = [str(tmp_path / name / "table.json") for name in ("dots", "gray")]
    capsys.readouterr()
    gate = program("gate").main
    assert gate([files[0], "--baseline", files[0]]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert gate([files[1], "--baseline", files[0], "--sigmas", "1"]) == 1
    assert "FAIL ΔE00" in capsys.readouterr().out
    assert gate([files[0], "--baseline", files[1]]) == 0


def test_generation_end_to_end(program, toys4k, method, tiny, weights, recorded, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["generation", "--assets", f"toys4k:{toys4k}", "--method", f"call:{method}:from_photo"]
    arguments += ["--out", str(out), "--weights", *weights, "--offline", "--device", "cpu"]
    assert program("toys4k").main([*arguments, "--set", *tiny, "kd_subsets=7"]) == 0
    table = numbers(out)
    metrics = table["metrics"]
    assert {"clip", "clip_views"} | {
        f"{k}_{e}" for k in ("fd", "kd") for e in ("inception", "dinov2")
    } == set(metrics)
    assert set(table["weights"]) == {"inception", "dinov2", "clip"}
    means = {name: held["value"] for name, held in metrics.items()}
    recorded("benchmark of sets", sha=table["protocol_sha256"], assets=table["assets"], mean=means)
    # FD and KD again, from the features that the run kept.
    folder = RunFolder(out)
    for extractor in ("inception", "dinov2"):
        pairs = [
            folder.load_features(asset_id, "from_photo", extractor) for asset_id in sorted(table["assets"])
        ]
        ours, truth = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert len(ours) == len(truth) == 10
        fd = frechet_distance(FeatureMoments.of([ours]), FeatureMoments.of([truth]))
        assert metrics[f"fd_{extractor}"]["value"] == fd
        kd = kernel_distance(ours, truth, num_subsets=7, seed=0)
        held = metrics[f"kd_{extractor}"]
        assert held["value"] == kd.mean
        assert held["details"]["num_subsets"] == 7 and held["details"]["seed"] == 0
    shown = capsys.readouterr().out
    assert "| TRELLIS (paper) | 98.02 | 24.57 | 0.0421 | 146.14 | 8.74 | 770 M |" in shown
    assert "Exp 4: + MARoPE" in shown and "kd_dinov2: 7 subsets of 10, seed 0" in shown


def test_killed_at_an_asset_and_run_again_gives_the_same_table(
    reconstruct, toys4k, method, tiny, tmp_path, weights
):
    """Killed in a process of its own, continued and, elsewhere, run without a stop."""
    command = [
        sys.executable,
        str(ROOT / "eval" / "toys4k.py"),
        "reconstruction",
        "--assets",
        f"toys4k:{toys4k}",
    ]
    command += [
        "--method",
        f"call:{method}:killed",
        "--offline",
        "--device",
        "cpu",
        "--set",
        *tiny,
        "--weights",
        *weights,
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    out = tmp_path / "run"
    dead = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL
    file = out / "results-0.jsonl"
    kept = file.read_bytes()
    assert len(kept.splitlines()) == 2 and not (out / "table.json").exists()
    with open(file, "ab") as stream:
        stream.write(b'{"id": "half a li')  # as a crash in the middle of writing leaves it
    assert reconstruct(out, "killed") == 0  # it dies the first time only
    assert file.read_bytes().startswith(kept) and len(file.read_bytes().splitlines()) == 5
    assert reconstruct(tmp_path / "whole", "killed") == 0
    assert numbers(out) == numbers(tmp_path / "whole")


def test_workers_outlive_their_assets(reconstruct, tmp_path, capsys):
    """What breaks a method or its process is that asset's error. Other numbers are those of one process."""
    out, flag = tmp_path / "run", tmp_path / "method.py.flag"
    assert reconstruct(out, "breaks", workers=1) == 1
    assert "Traceback" in capsys.readouterr().err
    broken = numbers(out)
    first, second = sorted(broken["errors"])
    assert broken["errors"][first].startswith("TypeError")
    assert second in broken["errors"][second] and "SIGKILL" in broken["errors"][second]
    assert broken["num_assets"] == {"expected": 5, "scored": 3, "failed": 2} and flag.read_text() == "x" * 5
    assert reconstruct(out, "breaks") == 0
    assert reconstruct(tmp_path / "whole", "breaks") == 0
    assert numbers(out) == numbers(tmp_path / "whole")


def test_processes_share_the_assets(reconstruct, tmp_path, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not (tmp_path / "two" / "table.json").exists()
        assert reconstruct(tmp_path / "two") == 0
    lines = [len((tmp_path / "two" / f"results-{r}.jsonl").read_bytes().splitlines()) for r in (0, 1)]
    assert lines == [3, 2]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert reconstruct(tmp_path / "one") == 0
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


def test_a_folder_holds_one_run(reconstruct, tmp_path, capsys):
    assert reconstruct(tmp_path / "run") == 0
    assert reconstruct(tmp_path / "run", "gray") == 2
    assert "holds a run with another method; give another folder" in capsys.readouterr().err
    assert reconstruct(tmp_path / "run", "dots", "seed=1") == 2
    assert "another assets, protocol" in capsys.readouterr().err.replace(
        "another protocol", "another assets, protocol"
    )


def test_what_is_missing_is_said_and_the_rest_is_computed(program, toys4k, method, tiny, tmp_path, capsys):
    arguments = ["--assets", f"toys4k:{toys4k}", "--offline", "--device", "cpu"]
    main = program("toys4k").main
    out = tmp_path / "a"
    assert (
        main(
            [
                "reconstruction",
                *arguments,
                "--method",
                f"call:{method}:dots",
                "--out",
                str(out),
                "--set",
                *tiny,
            ]
        )
        == 0
    )
    table = numbers(out)
    assert "lpips" not in table["metrics"] and "psnr" in table["metrics"]
    assert (
        "left out: lpips: no weights given; give lpips=FILE (see eval/convert_weights.py)" in table["notes"]
    )
    assert "| **dots** |" in (out / "table.md").read_text() and "| — |" in (out / "table.md").read_text()
    capsys.readouterr()
    out = tmp_path / "b"
    words = ["--method", f"call:{method}:from_photo", "--weights", f"dinov2={tmp_path / 'no'}", "clip=none"]
    assert main(["generation", *arguments, *words, "--out", str(out), "--set", *tiny]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert [note.split(":")[1].strip() for note in notes] == ["inception", "dinov2"]


def test_a_method_with_broken_pictures_does_not_score(reconstruct, method, tmp_path):
    """NaN, and values that no picture has, are errors of the asset and not numbers."""
    method.write_text(
        method.read_text()
        + """

def broken(subject):
    from diff2to3.types import Views
    size, cameras = subject.cameras.resolution, subject.cameras
    images = torch.full((2, size, size, 3), float("nan") if subject.seed % 2 else 7.0)
    return Views(images, torch.ones(2, size, size), cameras.viewmats, cameras.Ks)
"""
    )
    assert reconstruct(tmp_path / "run", "broken") == 1
    table = numbers(tmp_path / "run")
    assert table["num_assets"]["failed"] == 5 and table["metrics"] == {}
    assert {error.split(": ", 1)[1][:27] for error in table["errors"].values()} == {
        "broken: images: NaN or infi",
        "broken: images: expected va",
    }


def test_an_asset_that_fails_is_reported_and_tried_again(reconstruct, toys4k, tmp_path, capsys):
    """A folder of .ply files that lacks one."""
    from diff2to3.evaluation.sources import open_source
    from diff2to3.evaluation.subjects import Subject
    from diff2to3.formats.ply import write_ply

    folder = tmp_path / "plys"
    folder.mkdir()
    truth = MeshSource((f"toys4k:{toys4k}",))
    rules = Protocol(resolution=32)
    method = tmp_path / "method.py"
    made = open_source(f"call:{method}:dots", torch.device("cpu"))
    for asset_id in truth.ids():
        subject = Subject(asset_id, rules, truth, torch.device("cpu"))
        write_ply(folder / f"{asset_id}.ply", made.pictures(subject, subject.cameras).gaussians)
    assert reconstruct(tmp_path / "call") == 0
    assert reconstruct(tmp_path / "ply", spec=f"ply:{folder}") == 0
    for asset_id, row in numbers(tmp_path / "ply")["assets"].items():  # logits and logarithms round
        assert row == pytest.approx(numbers(tmp_path / "call")["assets"][asset_id], rel=1e-3)
    lost = folder / f"{truth.ids()[1]}.ply"
    content = lost.read_bytes()
    lost.write_bytes(b"ply\nbroken")
    capsys.readouterr()
    assert reconstruct(tmp_path / "broken", spec=f"ply:{folder}") == 1
    table = numbers(tmp_path / "broken")
    assert table["num_assets"] == {"expected": 5, "scored": 4, "failed": 1}
    assert str(lost) in table["errors"][truth.ids()[1]]
    lost.write_bytes(content)
    assert reconstruct(tmp_path / "broken", spec=f"ply:{folder}") == 2  # the folder's files changed


def test_drawing_is_a_function_of_ids_and_seed(program, toys4k, capsys):
    ids = [f"{i:03d}" for i in range(100)]
    drawn = draw_ids(ids, 10, 0)
    assert drawn == sorted(set(drawn)) and len(drawn) == 10
    assert drawn == draw_ids(reversed(ids), 10, 0) != draw_ids(ids, 10, 1)
    assert set(drawn) < set(draw_ids(ids, 20, 0))  # a longer list adds to a shorter one
    assert draw_ids(ids, 10, 0) == ["023", "024", "031", "047", "048", "049", "057", "077", "078", "085"]
    assert draw_ids(ids, 200, 0) == draw_ids(ids, None, 0) == ids
    assert program("toys4k").main(["draw", "--assets", f"toys4k:{toys4k}", "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("# 3 of 5 names")


def test_assets_are_drawn_and_chosen_by_the_owners_names(program, toys4k, tmp_path, capsys):
    """The same from the owners' list as from the data set, whose ids are hashes; --ids takes either."""
    names = [
        f"{name}/{name.split('/')[1]}.blend"
        for name in sorted(
            path.parent.relative_to(toys4k / "raw" / "toys4k_blend_files").as_posix()
            for path in toys4k.rglob("*.glb")
        )
    ]
    categories: dict[str, list[str]] = {}
    for name in names:
        category, _, file = name.partition("/")
        categories.setdefault(category, []).append(file)
    (tmp_path / "toys_dict.json").write_text(json.dumps(categories))
    draw = program("toys4k").main
    assert draw(["draw", "--list", str(tmp_path / "toys_dict.json"), "--count", "3"]) == 0
    listed = capsys.readouterr().out
    assert draw(["draw", "--assets", f"toys4k:{toys4k}", "--count", "3"]) == 0
    assert capsys.readouterr().out == listed
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"0:{name}".encode()).hexdigest())
    assert listed.splitlines()[1:] == sorted(ranked[:3])
    truth = MeshSource((f"toys4k:{toys4k}",))
    (tmp_path / "ids.txt").write_text(listed)
    drawn, _ = choose_ids(Namespace(ids=None), Protocol(num_assets=3), truth)
    given, _ = choose_ids(Namespace(ids=tmp_path / "ids.txt"), Protocol(num_assets=3), truth)
    assert drawn == given == sorted(hashlib.sha256(name.encode()).hexdigest() for name in ranked[:3])


@pytest.mark.parametrize("text", ["[1]", '{"a": 3}', "{", None])
def test_a_bad_list_of_names_is_named(text, program, tmp_path, capsys):
    if text is not None:
        (tmp_path / "list.json").write_text(text)
    assert program("toys4k").main(["draw", "--list", str(tmp_path / "list.json")]) == 2
    assert f"{tmp_path / 'list.json'}: expected a JSON object" in capsys.readouterr().err
    assert program("toys4k").main(["draw"]) == 2
    assert "one of --assets and --list" in capsys.readouterr().err


def test_the_committed_list_of_assets_is_what_the_rule_gives():
    """1,000 different names of the owners' form, sorted; a shorter draw from them is the best of the same order."""
    names = read_ids(PROTOCOLS / "toys4k_ids.txt")
    assert len(set(names)) == 1000 and names == sorted(names)
    assert all(re.fullmatch(r"(\w+)/(\1_\d{3})/\2\.blend", name) for name in names)
    digests = sorted(hashlib.sha256(f"0:{name}".encode()).digest()[0] for name in names)
    assert digests[-1] <= 0.28 * 256  # the least quarter of 4,000: their greatest first byte is about 64


def test_cameras_and_seeds_belong_to_the_asset():
    rules = Protocol()
    one, same, other = rules.views_of("a"), rules.views_of("a"), rules.views_of("b")
    assert torch.equal(one.viewmats, same.viewmats) and not torch.equal(one.viewmats, other.viewmats)
    assert not torch.equal(one.viewmats[:1], rules.photo_of("a").viewmats)
    assert rules.asset_seed("a") != rules.asset_seed("b")
    assert rules.digest() != Protocol(resolution=256).digest()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resolution=8", "resolution: expected at least 16 pixels, got 8"),
        ("tsk=generation", "unknown key 'tsk'; did you mean 'task'"),
        ("task=generation", "is a protocol for generation, not reconstruction"),
        ("num_assets=0", "num_assets: expected at least 1"),
    ],
)
def test_bad_protocols_are_refused(reconstruct, tmp_path, override, message, capsys):
    assert reconstruct(tmp_path / "run", "dots", override) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_arguments_are_one_line(program, toys4k, tmp_path, capsys):
    base = ["reconstruction", "--assets", f"toys4k:{toys4k}", "--out", str(tmp_path / "o"), "--method"]
    for words, message in (
        (["ply:nowhere"], "nowhere: no such folder"),
        (["call:no.py:f"], "expected call:FILE.py:NAME"),
        ([f"call:{__file__}:nothing"], "has no function 'nothing'"),
        ([f"images:{tmp_path}", "--weights", "vgg=x"], "expected NAME=PATH"),
        ([f"images:{tmp_path}", "--ids", str(tmp_path / "no")], "cannot read the list of ids"),
    ):
        assert program("toys4k").main([*base, *words]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


def test_only_a_result_on_toys4k_stands_beside_the_paper(reconstruct, tmp_path):
    assert reconstruct(tmp_path / "run") == 0
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert "on 5 of toys4k:toys4k0 at 32 x 32: not to be compared." in markdown(table)
    table["num_assets"]["scored"], table["protocol"]["resolution"] = 1000, 512
    assert "not to be compared" not in markdown(table)
    table["truth"]["name"] = "my-toys"
    assert "not to be compared" in markdown(table)


def test_a_model_bundle_is_run_on_the_photo(program, toys4k, tiny, tmp_path, monkeypatch):
    """With a stand-in for the pipeline: what it is called with, and that its Gaussians are scored."""
    seen = []

    class Model:
        def __call__(self, photo, *, seed):
            seen.append((photo.mode, photo.size, seed))
            one = torch.ones(1)
            gaussians = Gaussians(
                torch.zeros(1, 3), torch.eye(4)[:1], one.expand(1, 3) / 5, one, torch.ones(1, 1, 3)
            )
            none = SparseVoxels.from_coords(torch.zeros(0, 4).int(), torch.zeros(0, 1), 4)
            return Result(gaussians, none, none.coords[:, 1:], seed)

    monkeypatch.setattr(ImageTo3D, "from_pretrained", staticmethod(lambda folder, **options: Model()))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.json").write_text("{}")
    arguments = [
        "generation",
        "--assets",
        f"toys4k:{toys4k}",
        "--method",
        f"model:{bundle}",
        "--device",
        "cpu",
    ]
    arguments += ["--offline", "--out", str(tmp_path / "run"), "--weights", "clip=none", "dinov2=none"]
    arguments += ["inception=none"]
    assert program("toys4k").main([*arguments, "--set", *tiny]) == 0
    rules = Protocol()
    ids = sorted(numbers(tmp_path / "run")["assets"])
    assert seen == [("RGBA", (32, 32), rules.asset_seed(asset_id)) for asset_id in ids]
    (bundle / "model.json").write_text("{ }")
    assert program("toys4k").main([*arguments, "--set", *tiny]) == 2  # another model


def test_paper_rows_are_complete():
    for _, metrics, rows in PAPER.values():
        assert all(len(row[1]) == len(metrics) for row in rows)
    assert PAPER["generation"][2][-1][1] == PAPER["ablation"][2][-1][1]
    assert PAPER["generation"][2][-2][1] == PAPER["ablation"][2][0][1]


def test_a_bundle_reconstructs_a_split(program, boxes, vae, recorded, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["reconstruction", "--assets", str(boxes), "--split", "val", "--method", f"model:{vae}"]
    words += ["--device", "cpu", "--offline", "--out", str(out), "--set", "num_assets=null"]
    assert program("toys4k").main([*words, *TINY]) == 1  # one asset is damaged
    table = numbers(out)
    assert table["num_assets"] == {"expected": 4, "scored": 3, "failed": 1}
    recorded("benchmark of a bundle", sha=table["protocol_sha256"], assets=table["assets"])
    assert table["truth"]["name"].endswith("(val)") and table["method"]["name"] == "model"
    assert (out / "ids.txt").read_text().splitlines()[1:] == ["other/box-1"] + [
        f"plain/box-{i}" for i in (1, 2, 3)
    ]
    assert program("toys4k").main([*words, *TINY, "--split", "test"]) == 2
    assert "known are train, val" in capsys.readouterr().err


def test_generation_is_compared_with_the_asset_where_shapes_are_asked_for(
    program, toys4k, method, recorded, tmp_path
):
    out = tmp_path / "run"
    words = ["generation", "--assets", f"toys4k:{toys4k}", "--device", "cpu", "--offline", "--out", str(out)]
    words += ["--weights", "clip=none", "inception=none", "dinov2=none", "--set", "shape_points=300", *TINY]
    assert program("toys4k").main([*words, "--method", f"call:{method}:from_photo"]) == 0
    table = numbers(out)
    metrics = table["metrics"]
    recorded("benchmark with shapes", sha=table["protocol_sha256"], assets=table["assets"])
    assert set(metrics) == {
        "psnr", "ssim", "psnr_foreground", "ciede2000", "chamfer", "f_score", "voxel_iou",
    }  # fmt: skip
    assert 5 < metrics["psnr"]["value"] < 40 and 0 < metrics["chamfer"]["value"] < 0.5
