"""What two processes do for each other beside training alike: wait, gather, save, and fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from diff2to3.errors import InputError
from diff2to3.training import run
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World, can_shard_on_cpu

from training_runs import FOLDER, free_ports  # isort: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder, port = tmp_path_factory.mktemp("two"), str(free_ports(1)[0])
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **place, "MASTER_PORT": port}
        command = [sys.executable, str(FOLDER / "two_processes.py"), str(folder / f"{rank}.json")]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_process_that_hangs_shows_soon(found: list[dict[str, Any]]) -> None:
    """Results may take longer than a step's limit (3 s here); the step's own exchange may not."""
    waits = found[0]["waits"]
    assert waits["slow"] > 4.5
    assert 2.5 < waits["hang"] < 6.5


def test_missing_kernels_on_one_process_end_the_run_on_all(found: list[dict[str, Any]]) -> None:
    assert found[1]["kernels"].startswith("InputError: rank 1: no CUDA kernels")
    assert found[0]["kernels"].startswith("ElsewhereError: on another process: rank 1: no CUDA kernels")


def test_whole_tensors_are_copied_by_the_process_that_writes_them(found: list[dict[str, Any]]) -> None:
    assert found[0]["ddp"]["saved"] > 10 and found[1]["ddp"]["saved"] == 0


@pytest.mark.skipif(not can_shard_on_cpu(), reason="this torch has fsdp2 on GPUs only")
def test_sharded_blocks_are_gathered_in_the_dtype_of_autocast(found: list[dict[str, Any]]) -> None:
    """Half the bytes; other weights and gradients stay in float32, activations are what they are with ddp."""
    for mine in found:
        sharded, ddp = mine["fsdp2"], mine["ddp"]
        assert sharded["block"] == "torch.bfloat16"
        assert sharded["last"] == sharded["gradient"] == "torch.float32"
        assert sharded["stream"] == ddp["stream"]
        assert sharded["saved"] == found[0]["ddp"]["saved"]
        assert sharded["norm"] == pytest.approx(ddp["norm"], rel=0.02)


def test_training_on_a_gpu_needs_its_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 1, torch.device("cuda"))
    monkeypatch.setattr(run, "library_for", lambda device: None)
    with pytest.raises(InputError, match=r"train\.kernels=auto"):
        run.check_kernels(TrainConfig(out=""), world)
    run.check_kernels(TrainConfig(out="", kernels="auto"), world)
    run.check_kernels(TrainConfig(out=""), World(0, 1, torch.device("cpu")))
    monkeypatch.setattr(run, "library_for", lambda device: object())
    run.check_kernels(TrainConfig(out=""), world)
