"""A worker slot: which failures get another try."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from diff2to3.data import executors
from diff2to3.errors import InputError
from diff2to3.worker import WorkerKilled


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (WorkerKilled("the worker was killed by SIGSEGV"), 2),
        (InputError("a.obj: a material is called 'killed by exit code 3'"), 1),
    ],
)
def test_only_a_dead_worker_gets_another_try(
    monkeypatch: pytest.MonkeyPatch, error: InputError, calls: int
) -> None:
    """The words of an asset's own error do not decide it."""
    made: list[str] = []

    class Worker:
        def __init__(self, *limits: object, **options: object) -> None:
            pass

        def run(self, *args: object) -> None:
            made.append("call")
            raise error

        def close(self) -> None:
            pass

    monkeypatch.setattr(executors, "LimitedWorker", Worker)
    failed: list[str] = []
    work: Any = SimpleNamespace(
        run=None, context=None, seconds=60.0, memory_bytes=None, fail=lambda *args: failed.append(args[2])
    )
    task: Any = None
    outcome = executors.Slot(0).run(work, task)
    assert outcome.failed == str(error) and failed == [str(error)]
    assert len(made) == calls
