"""The readers survive damaged files. A fixed budget; tests/fuzz/run.py runs longer, or under libFuzzer."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("run.py")
KINDS = ("obj", "mtl", "ply", "glb", "splat-ply", "photo", "splat", "spz", "spz4", "sog", "compressed-ply", "splat-glb",
         "ksplat")  # fmt: skip
NEEDS = {"spz4": "zstandard", "ksplat": "gaussforge"}


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("resource", reason="limits of processes are POSIX")
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=3000)


def needs(kind: str) -> None:
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"no {NEEDS[kind]}")


def test_a_few_inputs(tmp_path: Path) -> None:
    """And the counts that a longer run goes on from."""
    counts = tmp_path / "counts.json"
    kinds = ("obj", "glb", "splat-ply", "photo")
    chosen = [word for kind in kinds for word in ("--kind", kind)]
    for executions in ("100", "300"):
        done = fuzz(*chosen, "--executions", executions, "--counts", str(counts))
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(counts.read_text())
    assert [rows[kind]["executions"] for kind in kinds] == [300] * 4
    assert all(0 < row["read"] < 300 for row in rows.values())  # neither all good nor all hopeless


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise KeyError('x')", "fails"),
        ("import os; os.kill(os.getpid(), 11)", "fails; exit code -11"),
        ("blob = b'x' * (2 << 30)", "fails"),
        ("sum(0 for _ in iter(int, 1))", "fails"),
        ("import time; time.sleep(1000)", "hangs"),
    ],
    ids=["raises", "dies", "takes memory", "takes time", "waits"],
)
def test_what_must_not_happen_is_found(fault: str, said: str, tmp_path: Path) -> None:
    """A reader with each fault, which the program must name with its input."""
    program = f"""
import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})
import dataclasses, kinds, run
run.SECONDS, run.STUCK_SECONDS = 1, 10
good = kinds.KINDS["obj"]
def check(data, folder):
 if data not in good.seeds(): {fault}
 return True
kinds.KINDS["obj"] = dataclasses.replace(good, check=check)
if __name__ == "__main__":
 run.main()
"""
    path = tmp_path / "planted.py"
    path.write_text(program)
    command = [sys.executable, str(path), "--kind", "obj", "--executions", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and f"obj: input 0 {said}" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs(kind: str) -> None:
    needs(kind)
    done = fuzz("--kind", kind, "--executions", "50000")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{kind}: 50000 executions" in done.stdout
