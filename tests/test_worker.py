"""The worker that can be stopped: time, memory, crashes, and that it goes on afterwards."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from diff2to3.assets import load_mesh
from diff2to3.errors import InputError
from diff2to3.worker import LimitedWorker, WorkerError, WorkerKilled


def test_worker_survives_everything():
    with LimitedWorker(seconds=1.0, memory_bytes=256 << 20) as worker:
        assert worker.run(abs, -21) == 21
        first = worker._process
        with pytest.raises(InputError, match="slow: took longer than the limit of 1 s"):
            worker.run(time.sleep, 60, label="slow")
        with pytest.raises(WorkerKilled, match="crash: the worker was killed by SIGSEGV"):
            worker.run(signal.raise_signal, signal.SIGSEGV, label="crash")
        with pytest.raises(WorkerError, match="ZeroDivisionError"):
            worker.run(divmod, 1, 0)
        assert worker.run(abs, -2) == 2 and worker._process is not first


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory limit needs Linux")
def test_memory_limit():
    with LimitedWorker(seconds=30, memory_bytes=64 << 20) as worker:
        assert worker.run(len, b"x" * 1000) == 1000
        with pytest.raises(InputError, match="big: needs more memory than the limit of 67,108,864 bytes"):
            worker.run(bytearray, 1 << 30, label="big")


def test_bad_input_comes_back_as_it_is(tmp_path):
    (tmp_path / "a.glb").write_bytes(b"glTF")
    with LimitedWorker(seconds=60, preload=("diff2to3.assets.load",)) as worker:
        with pytest.raises(InputError, match=r"a\.glb: truncated GLB header"):
            worker.run(load_mesh, tmp_path / "a.glb")


def test_bad_limits():
    with pytest.raises(ValueError, match="seconds"):
        LimitedWorker(0)
