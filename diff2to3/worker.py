"""One child process for calls that may hang, exhaust memory or crash native code: it can be stopped."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from diff2to3.errors import Diff2to3Error, InputError

R = TypeVar("R")


#: How long a stopped worker may take to die before it is no longer waited for.
_KILL_WAIT_SECONDS = 10.0


class WorkerKilled(InputError):
    """The child ended during a call: a crash of native code, or the system short of memory."""


class WorkerError(Diff2to3Error, RuntimeError):
    """A call in a worker failed for a reason that is not bad input; the message carries its traceback."""


class LimitedWorker:
    """One child process that runs calls under a time and a memory limit, and outlives them.

    Python cannot interrupt a decoder or a ray caster from inside, so the parent does: a call that runs past
    ``seconds`` is killed with its process, and the next call starts a fresh one. A crash of native code is
    reported in the same way. Functions and arguments must be picklable (module-level functions).

        with LimitedWorker(seconds=120, memory_bytes=8 << 30) as worker:
            mesh = worker.run(load_mesh, path, label=path)

    seconds       limit of one call
    memory_bytes  what a call may allocate beyond the child's own start; None sets no limit
    preload       modules that the child imports before the first call, outside its time limit
    """

    def __init__(self, seconds: float, memory_bytes: int | None = None, preload: Sequence[str] = ()) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds: expected a positive number, got {seconds}")
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self.preload = tuple(preload)
        # Not fork: the parent has threads (torch, Embree) whose locks a forked child would inherit.
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, fn: Callable[..., R], *args: Any, label: str = "", **kwargs: Any) -> R:
        """``fn(*args, **kwargs)`` in the child. InputError for bad input, too long or too much memory.

        WorkerKilled, an InputError, where the child ended; WorkerError where the call raised anything else.
        """
        prefix = f"{label}: " if label else ""
        pipe = self._connect()
        pipe.send((fn, args, kwargs))
        if not pipe.poll(self.seconds):
            self.close()
            raise InputError(f"{prefix}took longer than the limit of {self.seconds:g} s")
        try:
            kind, value = pipe.recv()
        except EOFError:
            raise WorkerKilled(f"{prefix}{self._cause_of_death()}") from None
        if kind == "ok":
            result: R = value
            return result
        if kind == "input":
            raise InputError(value)
        if kind == "memory":
            raise InputError(f"{prefix}needs more memory than the limit of {self.memory_bytes or 0:,} bytes")
        raise WorkerError(f"{prefix}{value}")

    def close(self) -> None:
        """Stop the child, at once."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join(_KILL_WAIT_SECONDS)
        self._pipe = self._process = None

    def __enter__(self) -> LimitedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> Connection:
        if self._pipe is None or self._process is None or not self._process.is_alive():
            self.close()
            self._pipe, child = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(child, self.memory_bytes, self.preload), daemon=True
            )
            process.start()
            child.close()
            self._process = process
            # Importing takes seconds and is not the asset's fault, so it is not counted.
            with contextlib.suppress(EOFError):
                self._pipe.recv()
        return self._pipe

    def _cause_of_death(self) -> str:
        process = self._process
        if process is None:
            return "the worker is gone"
        process.join(_KILL_WAIT_SECONDS)
        code = process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"the worker was killed by {signal.Signals(-code).name} (damaged file, or out of memory)"
        return f"the worker ended with exit code {code}"


def _serve(pipe: Connection, memory_bytes: int | None, preload: tuple[str, ...]) -> None:
    for module in preload:
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_memory(memory_bytes)
    pipe.send(("ready", None))
    while True:
        try:
            fn, args, kwargs = pipe.recv()
        except EOFError:
            return
        pipe.send(_call(fn, args, kwargs))


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
    try:
        return "ok", fn(*args, **kwargs)
    except InputError as error:
        return "input", str(error)
    except MemoryError:
        return "memory", None
    except Exception:
        return "error", traceback.format_exc()


def _limit_memory(num_bytes: int | None) -> None:
    """Cap private writable memory at what is used now plus ``num_bytes``, where the system can (Linux)."""
    if num_bytes is None:
        return
    try:
        import resource

        with open("/proc/self/status", encoding="ascii") as status:
            used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    except (ImportError, OSError, StopIteration):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + num_bytes if hard == resource.RLIM_INFINITY else min(used + num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
