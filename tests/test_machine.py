"""How many CPUs there are for this process, and how memory is counted."""

from pathlib import Path

import pytest
import torch

from diff2to3 import machine
from diff2to3.kernels import build
from diff2to3.machine import available_cpus, limit_threads, peak_memory


@pytest.mark.parametrize(
    ("content", "expected"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("6400000 100000", 8), ("", 8), (None, 8)],
)
def test_a_container_grants_fewer(tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert available_cpus(tmp_path / "cpu.max") == expected


def test_threads_are_only_ever_fewer(monkeypatch, two_threads):
    monkeypatch.setattr(machine, "available_cpus", lambda: 4)
    limit_threads()
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(machine, "available_cpus", lambda: 1)
    limit_threads()
    assert torch.get_num_threads() == 1


def test_peak_memory_is_the_systems_high_water_mark():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("only Linux tells it twice")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory(torch.device("cpu"))["host"] == pytest.approx(1024 * int(line.split()[1]), rel=0.02)
