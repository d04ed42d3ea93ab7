"""The engine's promises on the real thing: the mini 2to3-VAE on a few prepared assets. Minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training_runs import (  # isort: skip
    FOLDER,
    assert_identical,
    checkpoint,
    free_ports,
    records,
    stored,
    wait_for,
)

ROOT = FOLDER.parents[1]
STEPS, PAIR_STEPS = 200, 20
#: One step of two assets, in one or two parts.
PARTS = {1: "data.loader.max_assets_per_batch=2", 2: "data.loader.max_assets_per_batch=1"}

DATA = """
filter: {limit: 16}
view_sets:
  input: {size: 64, depths: true, cameras: {kind: sphere, num_views: 6}}
  target: {size: 64, cameras: {kind: sphere, num_views: 6}}
resolutions: [32]
features:
  rgb: {provider: rgb, resolution: 32}
  surface: {provider: surface, resolution: 32}
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def dataset(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen assets at 64²."""
    root = tmp_path_factory.mktemp("vae") / "data"
    file = root.with_name("data.yaml")
    file.write_text(DATA)
    command = [
        sys.executable,
        "-m",
        "diff2to3.cli",
        "data",
        "prepare",
        str(file),
        "--quiet",
        "--workers",
        "0",
    ]
    command += ["--set", f"source={shared / 'assets'}", "--set", f"out={root}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
    return root


def command(dataset: Path, out: Path, *arguments: str) -> list[str]:
    settings = [
        f"data.root={dataset}", "data.loader.features=[surface, rgb]", "encoder.in_channels=31", "sizes=[]",
        "data.loader.num_workers=0", "data.loader.max_voxels_per_asset=3000", "data.loader.views={target: 1}",
        "data.validation_assets=1", "train.sample_every=null", "train.validate_every=null",
        f"train.out={out}", f"train.steps={STEPS}", "train.save_every=10", "train.keep=20",
    ]  # fmt: skip
    return [sys.executable, "train/vae.py", "configs/vae/mini.yaml", *settings, *arguments]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    full = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(arguments, cwd=ROOT, env=full, text=True)


@pytest.fixture(scope="module")
def straight(dataset: Path) -> Path:
    out = dataset.parent / "straight"
    assert start(command(dataset, out, PARTS[1])).wait() == 0
    return out


def differences(a: Path, b: Path, step: int) -> dict[str, float]:
    """The largest difference of weights, averages and first moments."""
    ours, theirs = stored(a, step), stored(b, step)
    assert ours.keys() == theirs.keys()
    return {
        kind: max(float((ours[n] - theirs[n]).abs().max()) for n in ours if n.startswith(f"{kind}."))
        for kind in ("model", "ema", "exp_avg")
    }


def test_200_steps_or_100_a_kill_and_100_are_bit_identical(dataset: Path, straight: Path) -> None:
    out = dataset.parent / "killed"
    process = start(command(dataset, out, PARTS[1]))
    wait_for(checkpoint(out, STEPS // 2), process, 1800)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert start(command(dataset, out, PARTS[1])).wait() == 0
    resumed = [r["step"] for r in records(out, "event") if r["event"] == "resumed"]
    assert len(resumed) == 1 and STEPS // 2 <= resumed[0] < STEPS
    print(f"resumed at {resumed[0]}")
    assert_identical(stored(out, STEPS), stored(straight, STEPS))
    losses = [[(r["step"], r["loss"]) for r in records(run, "train")] for run in (out, straight)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "taken over by ddp", "taken over by fsdp2"])
def test_two_processes_match_one(how: str, dataset: Path) -> None:
    """Rounding grows with the steps, so the comparison is after a few and after all of them."""
    out = dataset.parent / how.replace(" ", "-")
    if how.startswith("taken"):
        shutil.copytree(straight_of(PAIR_STEPS, dataset), out)
        for path in (out / "checkpoints").iterdir():
            if int(path.name[5:]) > PAIR_STEPS // 2:
                shutil.rmtree(path)
    port = str(free_ports(1)[0])
    arguments = command(
        dataset,
        out,
        PARTS[2],
        f"train.parallel={how.split()[-1]}",
        f"train.steps={PAIR_STEPS}",
        "--allow-changes",
    )
    places = [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in range(2)
    ]
    assert [p.wait() for p in [start(arguments, **place) for place in places]] == [0, 0]
    found = differences(out, straight_of(PAIR_STEPS, dataset), PAIR_STEPS)
    print(how, json.dumps(found))
    # a weight moves about lr = 2e-3 a step; rounding must stay far below one step
    assert found["model"] < 2e-5 and found["ema"] < 2e-5, found


def straight_of(steps: int, dataset: Path) -> Path:
    """One process with the schedule of ``steps`` steps; made once."""
    out = dataset.parent / f"straight-{steps}"
    if not out.exists():
        assert start(command(dataset, out, PARTS[1], f"train.steps={steps}")).wait() == 0
    return out


def test_the_rounding_is_no_larger_than_that_of_accumulation(dataset: Path) -> None:
    """One process that adds up two parts differs from one with whole batches by as much as two processes do."""
    out = dataset.parent / "accumulated"
    steps = f"train.steps={PAIR_STEPS}"
    assert start(command(dataset, out, PARTS[2], "train.accumulate=2", steps)).wait() == 0
    found = differences(out, straight_of(PAIR_STEPS, dataset), PAIR_STEPS)
    print("accumulated", json.dumps(found))
    assert found["model"] < 2e-5, found
    assert torch.isfinite(torch.tensor(list(found.values()))).all()


def test_sigterm_to_the_whole_group_saves(dataset: Path) -> None:
    """As a batch system ends a job: the loader's processes get the signal too."""
    out = dataset.parent / "ended"
    arguments = command(
        dataset, out, PARTS[1], "data.loader.num_workers=1", "train.log_every=1", "train.save_every=1000"
    )
    process = subprocess.Popen(arguments, cwd=ROOT, text=True, start_new_session=True, stderr=subprocess.PIPE)
    wait_for(out / "log.jsonl", process)
    while len(records(out, "train")) < 2:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [r["event"] for r in records(out, "event")] == ["started", "stopped by SIGTERM"]
    (saved,) = [int(p.name[5:]) for p in (out / "checkpoints").iterdir()]
    assert saved >= 2
