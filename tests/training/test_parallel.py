"""Two processes train as one does at an equal global batch, sharded or not, and take over from each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diff2to3.training.distributed import can_shard_on_cpu

from training_runs import assert_close, checkpoint, records, stored, train, train_in_pairs  # isort: skip

#: A step's batch in two parts of two items, for one process by accumulation.
HALVES = "batch_size=2"


@pytest.fixture(scope="module")
def runs(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, each in a folder of its own."""
    root = tmp_path_factory.mktemp("pairs")
    assert train(root / "taken", HALVES, "train.accumulate=2", "train.save_every=10") == 0
    shutil.rmtree(checkpoint(root / "taken", 20))
    shutil.copytree(root / "taken", root / "taken_sharded")
    full = ["train.steps=20", "train.save_every=10", "train.validate_every=10"]
    train_in_pairs(
        [
            [f"train.out={root}/{name}", HALVES, f"train.parallel={how}", *full, *more]
            for name, how, more in (
                ("ddp", "ddp", []),
                ("fsdp2", "fsdp2", []),
                ("quarters", "fsdp2", ["batch_size=1", "train.accumulate=2"]),
                ("taken", "ddp", []),
                ("taken_sharded", "fsdp2", []),
                ("recomputed", "fsdp2", ["train.checkpoint_blocks=true"]),
                ("begun", "fsdp2", ["train.steps=1", "train.lr=1e-30", f"train.init_from={straight}"]),
            )
            if how == "ddp" or can_shard_on_cpu()
        ]
    )
    return root


def sharded(*names: str) -> list[Any]:
    """Parameters of runs that need fsdp2 on a CPU."""
    needs = pytest.mark.skipif(not can_shard_on_cpu(), reason="this torch has fsdp2 on GPUs only")
    return [pytest.param(name, marks=needs) for name in names]


@pytest.mark.parametrize(
    "name", ["ddp", "taken", *sharded("fsdp2", "quarters", "taken_sharded", "recomputed")]
)
def test_two_processes_match_one(name: str, runs: Path, straight: Path) -> None:
    assert_close(stored(runs / name, 20), stored(straight, 20))


@pytest.mark.parametrize("name", ["ddp", *sharded("fsdp2")])
def test_their_logs_and_bundles_match(name: str, runs: Path, straight: Path) -> None:
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("validate", "norm")):
        theirs = [r[key] for r in records(runs / name, kind)]
        assert theirs == pytest.approx([r[key] for r in records(straight, kind)], rel=1e-4)
    a, b = (load_file(f / "bundle" / "denoiser.safetensors") for f in (runs / name, straight))
    assert_close(a, b)


@pytest.mark.parametrize("name", sharded("fsdp2"))
def test_sharded_checkpoints_are_written_by_both(name: str, runs: Path) -> None:
    names = {p.name for p in (runs / name / "checkpoints" / "step-00000020").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "checkpoint.json"} <= names


@pytest.mark.parametrize("name", ["ddp", *sharded("fsdp2")])
def test_one_process_takes_over_from_two(name: str, runs: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / name, run)
    shutil.rmtree(checkpoint(run, 20))
    assert train(run, HALVES, "train.accumulate=2") == 0
    assert_close(stored(run, 20), stored(straight, 20))


@pytest.mark.parametrize("name", sharded("begun"))
def test_a_sharded_run_begins_with_given_weights(name: str, runs: Path, straight: Path) -> None:
    wanted, found = stored(straight, 20), stored(runs / name, 1)
    assert torch.equal(found["model.denoiser.first.weight"], wanted["ema.denoiser.first.weight"])


def test_accumulated_parts_match_a_whole_batch(straight: Path, tmp_path: Path) -> None:
    assert train(tmp_path, HALVES, "train.accumulate=2") == 0
    assert_close(stored(tmp_path, 20), stored(straight, 20))


def test_a_changed_number_of_parts_is_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "ddp", run)
    assert train(run, HALVES, "train.steps=22") == 0
    assert "a step had 2 parts" in capsys.readouterr().err
