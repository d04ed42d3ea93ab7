"""One function over many assets: in processes that may die, with a bar, continued after a kill.

The function runs in child processes (or in this one, with ``workers`` 0) and returns plain values. What a context loads
is kept in a child as long as equal contexts come. A broken file is an error of its asset; so is one that takes too long
or ends the process.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diff2to3.errors import InputError
from diff2to3.evaluation.runs import RunFolder
from diff2to3.machine import available_cpus
from diff2to3.worker import LimitedWorker, WorkerError

#: (shared context, item) -> plain values. A module-level function: it is sent to the children by name.
Function = Callable[[Any, Any], dict[str, Any]]

SECONDS = 600.0


def default_workers() -> int:
    """The processors that this process may use, at most eight."""
    return min(available_cpus(), 8)


def check_output(path: Path) -> None:
    """InputError unless a file can be made at ``path``; makes the folders above it, and nothing else."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def run_items(
    folder: RunFolder | None,
    function: Function,
    context: Any,
    items: Sequence[tuple[str, Any]],
    *,
    workers: int,
    label: str,
    seconds: float = SECONDS,
    rank: int = 0,
) -> dict[str, dict[str, Any]]:
    """``function(context, item)`` of every (id, item); id -> {"values", …} or {"error"}. Those with values in
    ``folder`` are left out, and others are added to it as they are done, to the file of this process's ``rank``.

    What the function returns is the row, if it has "values"; else its values.
    """
    lines = {} if folder is None else folder.lines()
    done = {name: row for name, row in lines.items() if "values" in row}
    todo = [(name, item) for name, item in items if name not in done]
    shown_trace = False
    with tqdm(
        total=len(items), initial=len(items) - len(todo), desc=label, unit="asset", disable=None
    ) as bar:
        for name, values, error, trace in _outcomes(function, context, todo, workers, seconds):
            row: dict[str, Any] = {"id": name}
            if error is not None:
                row["error"] = error
            else:
                row |= values if values is not None and "values" in values else {"values": values}
            if folder is not None:
                folder.append(rank, row)
            done[name] = row
            if error is not None:
                bar.write(
                    f"{label}: failed: {error if name in error else f'{name}: {error}'}", file=sys.stderr
                )
            if trace and not shown_trace:
                shown_trace = True
                bar.write(trace, file=sys.stderr)
            bar.update()
    wanted = {name for name, _ in items}
    return {name: row for name, row in done.items() if name in wanted}


Outcome = tuple[str, dict[str, Any] | None, str | None, str]


def _outcomes(
    function: Function, context: Any, todo: Sequence[tuple[str, Any]], workers: int, seconds: float
) -> Iterator[Outcome]:
    if workers == 0:
        for name, item in todo:
            try:
                yield name, function(context, item), None, ""
            except InputError as error:
                yield name, None, first_line(error), ""
        return
    waiting: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    finished: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()
    for pair in todo:
        waiting.put(pair)
    threads = max(1, torch.get_num_threads() // workers)

    def serve() -> None:
        try:
            with LimitedWorker(seconds, preload=("diff2to3.assets.load",)) as worker:
                while not stopped.is_set():
                    name, item = waiting.get_nowait()
                    finished.put(_attempt(worker, function, context, name, item, threads))
        except queue.Empty:
            pass
        except BaseException as error:  # handed to the caller, who raises it
            finished.put(error)

    for _ in range(min(workers, len(todo))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for _ in todo:
            outcome = finished.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        stopped.set()


def _attempt(
    worker: LimitedWorker, function: Function, context: Any, name: str, item: Any, threads: int
) -> Outcome:
    try:
        return name, worker.run(_in_child, function, context, item, threads, label=name), None, ""
    except InputError as error:
        return name, None, first_line(error), ""
    except WorkerError as error:
        return name, None, str(error).strip().splitlines()[-1], str(error)
    except OSError as error:  # its process ended before it could be asked anything
        worker.close()
        return name, None, f"the worker's process ended ({error})", ""


def _in_child(function: Function, context: Any, item: Any, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return function(_held(context), item)


_HELD: list[Any] = []


def _held(context: Any) -> Any:
    """The equal context that came with the item before, with what it has loaded; else ``context``, from now on."""
    if not _HELD or _HELD[0] != context:
        _HELD[:] = [context]
    return _HELD[0]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
