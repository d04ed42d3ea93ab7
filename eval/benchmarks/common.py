"""What the sections of bench_kernels.py share: their interface, timing, and what the machine can do at best."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Config:
    """What a section's ``run(config)`` gets. ``rounds`` is how often every contender runs.

    ``clock``: ``wall``, or ``cpu``, the time the processor spent on the calling thread (one thread only), which a
    busy machine disturbs less.
    """

    device: torch.device
    threads: int = 1
    rounds: int = 11
    clock: str = "wall"


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds.

    peers    name -> time on the same inputs in the same rounds
    limit_ms what the hardware needs at least, by ``limit`` (bytes moved, multiplications)
    notes    lines about peers that did not run, each with its reason
    bar_ms   the time this project set itself, if any (CPU, one thread)
    """

    name: str
    ours_ms: float
    peers: Mapping[str, float]
    limit_ms: float
    limit: str
    notes: tuple[str, ...] = ()
    bar_ms: float | None = None
    threads: int = 0


def interleaved_medians(
    functions: Mapping[str, Function], config: Config, rounds: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Median time in ms of every function; one call each, round after round, so that all meet the same weather.

    ``rounds`` overrides ``config.rounds`` for functions too slow to run that often. The first call is not counted.
    """
    limits = {name: (rounds or {}).get(name, config.rounds) for name in functions}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        if limits[name] > 1:
            timed(function, config)
    for index in range(max(limits.values(), default=0)):
        for name, function in functions.items():
            if index < limits[name]:
                times[name].append(timed(function, config))
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def timed(function: Function, config: Config) -> float:
    """Seconds one call takes, work on the device included."""
    clock = time.thread_time if config.clock == "cpu" else time.perf_counter
    if config.device.type == "cuda":
        torch.cuda.synchronize(config.device)
    start = clock()
    function()
    if config.device.type == "cuda":
        torch.cuda.synchronize(config.device)
    return clock() - start


# ---- what the hardware does at best ----


@functools.cache
def copy_bandwidth(config: Config) -> float:
    """Bytes a second that a copy reads and writes, out of caches."""
    count = (256 if config.device.type == "cuda" else 64) << 20
    source = torch.ones(count // 4, device=config.device)
    to = torch.empty_like(source)
    return 2 * count / min(timed(lambda: to.copy_(source), config) for _ in range(8))


@functools.cache
def matmul_rate(config: Config, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a large matrix product."""
    n = 4096 if config.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=config.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, config) for _ in range(12))


# ---- what ran ----


def installed(package: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, str]:
    """Machine and versions, for the head of the table."""
    from diff2to3.kernels.library import variant_name

    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "cpu": f"{cpu_name()}, {torch.multiprocessing.cpu_count()} cores, {platform.machine()}",
        "system": f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}",
        "kernels": f"diff2to3 {installed('diff2to3')}, instruction set {variant_name()}",
    }
    if device.type == "cuda":
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return facts
