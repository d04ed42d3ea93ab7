"""Readings of one run on a device: medians of events, wall time, and device time a kernel from torch's profiler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Readings:
    """What was read on ``device``. ``smoke``: two rounds of everything, to see that it runs."""

    device: torch.device
    smoke: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def timed(
        self,
        name: str,
        call: Callable[[], object],
        rounds: int = 15,
        gflop: float | None = None,
        gigabytes: float | None = None,
    ) -> float | None:
        """Median milliseconds of one call, by events on a GPU; beside it wall time and the rates.

        What fails is a row too, with its reason: the next section still runs.
        """
        try:
            for _ in range(1 if self.smoke else 3):
                call()
            pairs = [self._once(call) for _ in range(2 if self.smoke else rounds)]
        except Exception as error:
            self.rows.append({"name": name, "error": f"{type(error).__name__}: {error}"[:300]})
            print(f"{name:64} FAILED {self.rows[-1]['error']}", flush=True)
            return None
        ms, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
        row: dict[str, Any] = {"name": name, "ms": round(ms, 4), "wall_ms": round(wall, 4)}
        if gflop is not None:
            row |= {"gflop": gflop, "tflops": gflop / ms}
        if gigabytes is not None:
            row["tb_s"] = gigabytes / ms
        self.rows.append(row)
        rates = "  ".join(f"{key} {row[key]:.3g}" for key in ("tflops", "tb_s") if key in row)
        print(f"{name:64} {ms:9.3f} ms  wall {wall:9.3f}  {rates}", flush=True)
        return ms

    def _once(self, call: Callable[[], object]) -> tuple[float, float]:
        self.wait()
        started = time.perf_counter()
        if not self.gpu:
            call()
            wall = 1e3 * (time.perf_counter() - started)
            return wall, wall
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        self.wait()
        return before.elapsed_time(after), 1e3 * (time.perf_counter() - started)

    def launches(self, name: str, call: Callable[[], object], top: int = 14) -> None:
        """Device time and launches of each kernel of one call; nothing on a CPU."""
        if not self.gpu:
            return
        from torch.profiler import ProfilerActivity, profile

        call()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            call()
            self.wait()
        found = [
            (event.key, event.self_device_time_total / 1e3, event.count)
            for event in profiler.key_averages()
            if event.self_device_time_total and event.device_type.name == "CUDA"
        ]
        found.sort(key=lambda row: -row[1])
        total, count = sum(row[1] for row in found), sum(row[2] for row in found)
        print(f"  kernels of {name}: {total:.3f} ms in {count} launches")
        for key, ms, times in found[:top]:
            print(f"    {ms:8.3f} ms {times:5d}x  {key[:110]}", flush=True)
        kept = [(key[:160], ms, times) for key, ms, times in found[:30]]
        self.rows.append({"name": f"kernels of {name}", "ms": total, "launches": count, "top": kept})

    def ceilings(self) -> None:
        """What the card copies and multiplies at best."""
        size = 1 << (30 if self.gpu else 24)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        to = torch.empty_like(source)
        self.timed("copy, read and write", lambda: to.copy_(source), gigabytes=2 * size / 1e9)
        n = 8192 if self.gpu else 512
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.timed(f"matmul bf16 {n}", lambda: a @ b, gflop=2 * n**3 / 1e9)
