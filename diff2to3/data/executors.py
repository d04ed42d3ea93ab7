"""Where tasks run: worker processes here, or actors on a Ray cluster. Both give the same results.

A task is an asset in a stage. Every worker slot owns a child process under the limits of the configuration
(:class:`LimitedWorker`), so an asset that hangs, exhausts memory or crashes native code costs its own failure
and a new child, nothing else. What a task made is on the shared file system before its outcome is reported,
which is all that travels back.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diff2to3.data.plan import PlannedAsset
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.worker import LimitedWorker, WorkerError, WorkerKilled


@dataclass(frozen=True)
class Task:
    """Make ``asset`` in ``stage``; ``stamp`` says what from (see :func:`diff2to3.data.shards.write_part`)."""

    stage: str
    asset: PlannedAsset
    stamp: str


@dataclass(frozen=True)
class Outcome:
    """How a task ended. ``fatal`` is a reason to stop the run: it is not about this asset."""

    task: Task
    seconds: dict[str, float]
    failed: str | None = None
    fatal: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Work:
    """What a worker calls, with module-level functions so that it travels.

    run    (context, task, number of the slot) -> Outcome; catches what goes wrong inside
    fail   (context, task, reason): records a failure that ``run`` could not, because its process died
    """

    context: Any
    run: Callable[[Any, Task, int], Outcome]
    fail: Callable[[Any, Task, str], None]
    seconds: float
    memory_bytes: int | None = None


class Executor(Protocol):
    """Runs tasks in any order and yields each outcome as it comes."""

    def map(self, work: Work, tasks: Sequence[Task]) -> Iterator[Outcome]: ...

    def close(self) -> None: ...


class Slot:
    """One worker: a limited child process, and what to do when it dies."""

    #: A child that dies may have been somebody else's victim (the system short of memory), so it gets another
    #: try.
    TRIES = 2

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: LimitedWorker | None = None
        self.limits: tuple[float, int | None] | None = None

    def run(self, work: Work, task: Task) -> Outcome:
        """Run one task; every way to fail becomes an Outcome."""
        limits = (work.seconds, work.memory_bytes)
        if self.worker is None or self.limits != limits:
            self.close()
            self.worker, self.limits = LimitedWorker(*limits, preload=("diff2to3.assets.load",)), limits
        reason = ""
        for _ in range(self.TRIES):
            try:
                return self.worker.run(work.run, work.context, task, self.number)
            except WorkerKilled as error:
                reason = str(error)
            except InputError as error:
                reason = str(error)
                break
            except WorkerError as error:
                last_line = str(error).strip().splitlines()[-1]
                return Outcome(task, {}, fatal=last_line, traceback=str(error))
        work.fail(work.context, task, reason)
        return Outcome(task, {}, failed=reason)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None


class InlineExecutor:
    """One task after another in this process: for debugging, without limits on time or memory."""

    def map(self, work: Work, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """See :class:`Executor`."""
        num_threads = torch.get_num_threads()
        try:
            for task in tasks:
                yield work.run(work.context, task, 0)
        finally:
            torch.set_num_threads(num_threads)

    def close(self) -> None:
        pass


class LocalExecutor:
    """``num_workers`` processes on this machine."""

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise InputError(f"workers: expected a positive number, got {num_workers}")
        self.slots = [Slot(number) for number in range(num_workers)]

    def map(self, work: Work, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """See :class:`Executor`. Threads only wait for their child processes."""
        todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
        done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        stopped = threading.Event()
        for task in tasks:
            todo.put(task)

        def serve(slot: Slot) -> None:
            try:
                while not stopped.is_set():
                    done.put(slot.run(work, todo.get_nowait()))
            except queue.Empty:
                pass
            except BaseException as error:  # handed to the caller, who raises it
                done.put(error)

        threads = [threading.Thread(target=serve, args=(slot,), daemon=True) for slot in self.slots]
        for thread in threads:
            thread.start()
        try:
            for _ in tasks:
                outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stopped.set()

    def close(self) -> None:
        """Stop the processes at once; what they had finished is on disk."""
        for slot in self.slots:
            slot.close()


class RayExecutor:
    """``num_workers`` actors on a Ray cluster, or on this machine when ``address`` is None."""

    def __init__(self, num_workers: int, address: str | None = None, gpus_per_worker: float = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("ray", hint='pip install "ray"') from error
        if num_workers < 1:
            raise InputError(f"workers: expected a positive number, got {num_workers}")
        self.ray: Any = ray
        self.started = not ray.is_initialized()
        if self.started:
            options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
            options |= {"address": address} if address else {"num_cpus": num_workers}
            ray.init(**options)
        actor = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=-1)(Slot)
        self.slots: list[Any] = [actor.remote(number) for number in range(num_workers)]

    def map(self, work: Work, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """See :class:`Executor`. Limits are kept inside the actors, exactly as on one machine."""
        shared, waiting = self.ray.put(work), list(reversed(tasks))
        running = {}
        for slot in self.slots:
            if waiting:
                running[slot.run.remote(shared, waiting.pop())] = slot
        while running:
            (ready, *_), _ = self.ray.wait(list(running), num_returns=1)
            slot = running.pop(ready)
            if waiting:
                running[slot.run.remote(shared, waiting.pop())] = slot
            yield self.ray.get(ready)

    def close(self) -> None:
        """Stop the actors, and Ray itself if this started it."""
        for slot in self.slots:
            self.ray.kill(slot)
        if self.started:
            self.ray.shutdown()
