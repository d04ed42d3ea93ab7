"""A worker slot: which failures get another try."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diff2to3.data.executors import Slot, Task
from diff2to3.errors import InputError


def count(folder: Path, task: Task, slot: int) -> dict[str, float]:
    """Leaves a file for each call, then fails as the task's stage says."""
    (folder / f"{len(list(folder.iterdir()))}").touch()
    if task.stage == "die":
        os._exit(3)
    raise InputError(f"a.obj: a material is called 'killed by exit code {slot}'")


@pytest.mark.parametrize(("stage", "calls"), [("die", 2), ("refuse", 1)])
def test_only_a_dead_worker_gets_another_try(tmp_path: Path, stage: str, calls: int) -> None:
    """The words of an asset's own error do not decide it."""
    failed: list[str] = []
    work: Any = SimpleNamespace(
        run=count,
        context=tmp_path,
        seconds=60.0,
        memory_bytes=None,
        fail=lambda *args: failed.append(args[2]),
    )
    task: Any = Task(stage, SimpleNamespace(id="a"), "")  # type: ignore[arg-type]
    slot = Slot(0)
    try:
        outcome = slot.run(work, task)
    finally:
        slot.close()
    assert outcome.failed and failed == [outcome.failed]
    assert len(list(tmp_path.iterdir())) == calls
