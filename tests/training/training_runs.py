"""Running the tiny training program: in this process, in another, or in two that train together."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tiny
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

FOLDER = Path(__file__).resolve().parent

PROGRAM, CONFIG = str(FOLDER / "tiny.py"), str(FOLDER / "tiny.yaml")


def train(out: Path, *arguments: str) -> int:
    """The exit code of a run in this process."""
    return tiny.main(tiny.TinyTask, tiny.TinyConfig, [CONFIG, f"train.out={out}", *arguments])


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    command = [sys.executable, PROGRAM, CONFIG, f"train.out={out}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def train_in_pairs(runs: Sequence[Sequence[str]]) -> None:
    """Each of ``runs`` (arguments) one after another on the same two processes, as torchrun would start them."""
    ports = [str(port) for port in free_ports(len(runs))]
    command = [sys.executable, str(FOLDER / "pair.py"), json.dumps([[CONFIG, *run] for run in runs])]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **place, "PORTS": ",".join(ports)}
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that systems give to outgoing connections: among those, a run's own
    connections could take the port of the next before it starts.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(15000, 32000), 1000):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports")


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def stored(out: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read without the engine's own code."""
    reader = dcp.FileSystemReader(checkpoint(out, step))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    dcp.load(tensors, storage_reader=reader)
    return tensors


def records(out: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    worst = {name: float((a[name] - b[name]).abs().max()) for name in a}
    assert max(worst.values()) < tolerance, max(worst.items(), key=lambda item: item[1])
