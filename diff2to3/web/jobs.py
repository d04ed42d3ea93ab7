"""A bounded queue of jobs, worked through one at a time by one thread. Everything stays in memory."""

from __future__ import annotations

import sys
import threading
import time
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.types import Gaussians

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"


class QueueFull(Exception):
    """As many jobs wait as may."""


class Cancelled(Exception):
    """Raised inside a job that is to stop."""


@dataclass
class Outcome:
    """One finished asset; ``home`` is where a viewer's camera starts, ``note`` what its files say about themselves."""

    seed: int
    gaussians: Gaussians
    seconds: float
    notes: tuple[str, ...]
    photo: Image.Image | None
    home: Any
    note: dict[str, Any]


@dataclass
class Job:
    """``pictures`` (of one object) are made into an asset for each of ``seeds``.

    stage, step, steps  of the asset that is being made
    """

    pictures: list[Image.Image]
    seeds: tuple[int, ...]
    background_removal: str = "auto"
    num_steps: int | None = None
    guidance_scale: float | None = None
    format: str = "ply"
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = QUEUED
    stage: str = ""
    step: int = 0
    steps: int = 0
    error: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    finished: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.monotonic)

    def report(self, stage: str, step: int, steps: int) -> None:
        """Progress from inside the job. Cancelled if it is to stop."""
        if self.stop.is_set():
            raise Cancelled
        self.stage, self.step, self.steps = stage, step, steps


class Jobs:
    """The queue and what it has finished.

    work      makes the outcomes of one job; may raise InputError and Cancelled
    waiting   how many jobs may wait beside the one at work
    kept      how many finished jobs are remembered, with their assets
    """

    def __init__(self, work: Callable[[Job], None], *, waiting: int = 8, kept: int = 16) -> None:
        self.work, self.waiting, self.kept = work, waiting, kept
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.queue: list[Job] = []
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self.run, name="jobs", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue; QueueFull if it has no place."""
        with self.changed:
            if self.closing or len(self.queue) >= self.waiting:
                raise QueueFull
            self.queue.append(job)
            self.jobs[job.id] = job
            self.changed.notify_all()
        return job

    def get(self, job_id: str) -> Job | None:
        with self.changed:
            return self.jobs.get(job_id)

    def ahead(self, job: Job) -> int:
        """How many jobs come first, with the one at work."""
        with self.changed:
            if job not in self.queue:
                return 0
            return self.queue.index(job) + sum(j.state == RUNNING for j in self.jobs.values())

    def cancel(self, job: Job) -> None:
        """At once if it waits; at its next step if it is at work. A finished job stays as it is."""
        with self.changed:
            job.stop.set()
            if job in self.queue:
                self.queue.remove(job)
                self.end(job, CANCELLED)

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self.changed:
            self.closing = True
            for job in list(self.jobs.values()):
                job.stop.set()
            for job in list(self.queue):
                self.queue.remove(job)
                self.end(job, CANCELLED)
            self.changed.notify_all()
        self.thread.join()

    # ---- the thread ----

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.closing)
                if self.closing:
                    return
                job = self.queue.pop(0)
                job.state = RUNNING
            state = self.attempt(job)
            with self.changed:
                self.end(job, state)

    def attempt(self, job: Job) -> str:
        """Do the work; returns the state it ends in. Whatever a job raises, the next one runs."""
        try:
            self.work(job)
            return DONE
        except Cancelled:
            return CANCELLED
        except (InputError, MissingDependencyError) as error:
            job.error = str(error)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            reason = (str(error).strip().splitlines() or [""])[0]
            job.error = f"the generator failed: {type(error).__name__}: {reason}"
        return FAILED

    def end(self, job: Job, state: str) -> None:
        """With the lock held."""
        job.state = state
        job.pictures = []  # the largest part, and no longer needed
        job.finished.set()
        done = [j for j in self.jobs.values() if j.finished.is_set()]
        for old in done[: max(0, len(done) - self.kept)]:
            del self.jobs[old.id]
