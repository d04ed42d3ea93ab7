"""The readers survive damaged files. A fixed budget; tests/fuzz/readers.py runs longer, or under libFuzzer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("obj", "mtl", "ply", "glb")
PROGRAM = Path(__file__).with_name("readers.py")


def executed(*targets: str, count: int) -> str:
    """In a process of its own, which a crash of native code ends, not this one."""
    pytest.importorskip("resource", reason="limits of processes are POSIX")
    command = [sys.executable, str(PROGRAM), *targets, "--executions", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_few_inputs() -> None:
    assert executed(*TARGETS, count=200).count(": 200 executions") == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_many_inputs(target: str) -> None:
    assert "50000 executions" in executed(target, count=50_000)
