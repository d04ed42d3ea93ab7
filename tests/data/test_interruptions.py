"""Workers that crash or hang, runs that are killed, and Ray: the same bytes, and one failure for one
asset."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diff2to3.config import save_config
from diff2to3.data.executors import InlineExecutor, LocalExecutor, Outcome, Slot, Task, Work
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig

Settings = Callable[..., DataConfig]
Content = Callable[[Path], dict[str, str]]


STAND_INS = """
import os, time
from diff2to3.data.executors import Outcome

def run(context, task, slot):
    if task.stage == "crash":
        os._exit(3)
    if task.stage == "hang":
        time.sleep(60)
    if task.stage == "bug":
        raise ZeroDivisionError
    return Outcome(task, {})

def fail(context, task, reason):
    with open(context, "a") as file:
        print(task.stage, reason, file=file)
"""


def test_crashes_bugs_and_hangs_cost_one_task_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Slot, "TRIES", 1)
    import stand_ins  # type: ignore[import-not-found]

    executor = LocalExecutor(1)
    work = Work(str(tmp_path / "failures"), stand_ins.run, stand_ins.fail, seconds=1.5)
    tasks = [Task(name, PlannedAsset(0, name, name), "") for name in ("crash", "fine", "bug", "hang", "last")]
    try:
        got = {o.task.stage: o for o in executor.map(work, tasks)}
    finally:
        executor.close()
    assert (got["fine"], got["last"]) == (Outcome(tasks[1], {}), Outcome(tasks[4], {}))
    assert "exit code 3" in str(got["crash"].failed)
    assert "longer than the limit of 1.5 s" in str(got["hang"].failed)
    assert got["bug"].fatal == "ZeroDivisionError" and "in run" in str(got["bug"].traceback)
    recorded = (tmp_path / "failures").read_text().splitlines()
    assert [line.split()[0] for line in recorded] == ["crash", "hang"]


class _Crash(BaseException):
    """Stands for the loss of the process: nothing may be cleaned up after it."""


def test_survives_a_crash_at_any_write(
    tmp_path: Path, prepared: Path, settings: Settings, content_of: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that end in the middle of their n-th write or rename, again and again, until one gets through."""
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "rmdir")}
    rng = np.random.default_rng(0)
    left = 0

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise _Crash
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    crashes, finished = 0, False
    while not finished:
        left = int(rng.integers(2, 40))
        try:
            prepare(settings(tmp_path / "set"), InlineExecutor())
            finished = True
        except _Crash:
            crashes += 1
            assert crashes < 200
    monkeypatch.undo()
    assert crashes >= 8
    visible = {k: v for k, v in content_of(tmp_path / "set").items() if not Path(k).name.startswith(".")}
    assert visible == content_of(prepared)


def run_command(config: DataConfig, tmp_path: Path, *options: str) -> subprocess.Popen[bytes]:
    save_config(config, tmp_path / "config.yaml")
    command = [
        sys.executable,
        "-m",
        "diff2to3.cli",
        "data",
        "prepare",
        str(tmp_path / "config.yaml"),
        *options,
    ]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_twenty_sigkills_change_no_byte(
    tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
) -> None:
    config, rng = settings(tmp_path / "set"), np.random.default_rng(1)
    kills = whole_group = 0
    started = time.monotonic()
    process = run_command(config, tmp_path, "--workers", "2", "--quiet")
    while kills < 20:
        try:
            # Importing takes seconds, the work little more: aim at the whole span, start-up included.
            process.wait(rng.uniform(1.0, 12.0))
            if kills < 20:  # got through before the shot: begin again from nothing, the kills still count
                shutil.rmtree(tmp_path / "set")
        except subprocess.TimeoutExpired:
            kills += 1
            if kills % 2:  # with its workers, and alone, leaving them to finish what they hold
                os.killpg(process.pid, signal.SIGKILL)
                whole_group += 1
            else:
                process.kill()
            process.wait()
        process = run_command(config, tmp_path, "--workers", "2", "--quiet")
    assert process.wait(300) == 0 and whole_group == 10
    visible = {k: v for k, v in content_of(tmp_path / "set").items() if not Path(k).name.startswith(".")}
    assert visible == content_of(prepared), f"after {time.monotonic() - started:.0f} s"


@pytest.mark.slow
def test_two_ray_workers_give_the_bytes_of_local_ones(
    tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
) -> None:
    pytest.importorskip("ray")
    process = run_command(
        settings(tmp_path / "set"), tmp_path, "--workers", "2", "--executor", "ray", "--quiet"
    )
    assert process.wait(300) == 0
    assert content_of(tmp_path / "set") == content_of(prepared)
