"""What a file from a stranger may cost: sizes checked early, and a worker that can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from diff2to3.errors import InputError

R = TypeVar("R")

#: How long a stopped worker may take to die before it is no longer waited for.
_KILL_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """Upper bounds for one asset. A file beyond one of them is an InputError that names the bound.

    max_file_bytes        size of one file, after unpacking from its zip
    max_faces             triangles after the scene graph is flattened (instances count each time)
    max_nodes             nodes of the scene graph
    max_texture_pixels    width x height of one image as stored
    max_texture_size      larger images are shrunk to this many pixels a side
    max_texture_bytes     all decoded textures together
    """

    max_file_bytes: int = 1 << 30
    max_faces: int = 4_000_000
    max_nodes: int = 100_000
    max_texture_pixels: int = 16384 * 8192
    max_texture_size: int = 2048
    max_texture_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    def check(self, what: str, value: int, bound: str) -> None:
        """Raise InputError when ``value`` of ``what`` is over the limit called ``bound``."""
        limit = getattr(self, bound)
        if value > limit:
            raise InputError(f"{value:,} {what} is over the limit of {limit:,} (raise {bound} to allow it)")


class WorkerError(RuntimeError):
    """A call in a worker failed for a reason that is not bad input; the message carries its traceback."""


class LimitedWorker:
    """One child process that runs calls under a time and a memory limit, and outlives them.

    Python cannot interrupt a decoder or a ray caster from inside, so the parent does: a call that runs past
    ``seconds`` is killed with its process, and the next call starts a fresh one. A crash of native code is
    reported in the same way. Functions and arguments must be picklable (module-level functions).

        with LimitedWorker(seconds=120, memory_bytes=8 << 30) as worker:
            mesh = worker.run(load_mesh, path, label=path)
    """

    def __init__(self, seconds: float, memory_bytes: int | None = None) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds: expected a positive number, got {seconds}")
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        # Not fork: the parent has threads (torch, Embree) whose locks a forked child would inherit.
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, fn: Callable[..., R], *args: Any, label: str = "", **kwargs: Any) -> R:
        """``fn(*args, **kwargs)`` in the child. InputError for bad input, too long or too much memory."""
        prefix = f"{label}: " if label else ""
        pipe = self._connect()
        pipe.send((fn, args, kwargs))
        if not pipe.poll(self.seconds):
            self.close()
            raise InputError(f"{prefix}took longer than the limit of {self.seconds:g} s")
        try:
            kind, value = pipe.recv()
        except EOFError:
            raise InputError(f"{prefix}{self._cause_of_death()}") from None
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
            process = self._context.Process(target=_serve, args=(child, self.memory_bytes), daemon=True)
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


def run_limited(
    fn: Callable[..., R],
    *args: Any,
    seconds: float,
    memory_bytes: int | None = None,
    label: str = "",
    **kwargs: Any,
) -> R:
    """One call in a process of its own; :class:`LimitedWorker` amortises the start-up over many."""
    with LimitedWorker(seconds, memory_bytes) as worker:
        return worker.run(fn, *args, label=label, **kwargs)


def _serve(pipe: Connection, memory_bytes: int | None) -> None:
    import diff2to3.assets.load  # noqa: F401  the usual work; imported before the clock starts

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
