"""The program that wants a GPU, rehearsed without one: its table, its steps and a section."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    return load_source(ROOT / "eval" / "gpu.py")


def test_predictions_stand_beside_readings(program: ModuleType) -> None:
    rows = [
        {"name": "shell 200k 512² x 1 native forward", "ms": 2.0},
        {"name": "shell 200k 512² x 1 gsplat forward", "ms": 2.6},
        {"name": "shell 200k 512² x 1 native backward", "error": "out of memory"},
        {"name": "latents conditional 5998 tokens bf16 eager", "ms": 30.0, "tflops": 250.0},
        {"name": "kernels of latents conditional 5998 tokens bf16", "ms": 29.0, "launches": 1900},
    ]
    table = "\n".join(program.predictions_table(rows))
    assert "| shell 200k 512², forward: gsplat's time over ours | 1 to 1.4 | 1.3 |" in table
    assert "| shell 200k 512², backward: gsplat's time over ours | 0.7 to 1.2 | not measured |" in table
    assert "| SMDiT-large, TFLOP/s | 215 to 275 | 250 |" in table
    assert "| SMDiT-large, launches | 1700 to 2100 | 1.9e+03 |" in table


def test_steps_end_in_time_and_failures_count(program: ModuleType) -> None:
    steps = program.Steps(40, {})
    steps.run("good", 20, [sys.executable, "-c", ""])
    steps.run("no matter", 20, [sys.executable, "-c", "raise SystemExit(3)"], counts=False)
    assert not steps.failed
    steps.run("hangs", 0.5, [sys.executable, "-c", "import time; time.sleep(60)"])
    steps.deadline -= 40
    steps.run("late", 20, [sys.executable, "-c", ""])
    assert [s["outcome"] for s in steps.outcomes] == ["ok", "exit 3", "out of time", "skipped, no time left"]
    assert steps.failed


@pytest.mark.slow
def test_a_section_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(ROOT / "eval" / "gpu.py"),
        "--section",
        "sparse",
        "--device",
        "cpu",
        "--smoke",
    ]
    subprocess.run([*command, "--out", str(out)], check=True, cwd=ROOT, capture_output=True, timeout=200)
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert rows["conv 20k 64->64 bf16 forward"]["tflops"] > 0 and "neighbor plan 27 20k" in rows
