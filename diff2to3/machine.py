"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch

#: The quota of a container: "max 100000" or "200000 100000" (microseconds of CPU time in each period).
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cpus(quota: Path = CPU_QUOTA) -> int:
    """CPUs that this process may run on, and, in a container, is granted."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    try:
        granted, period = quota.read_text().split()
        return max(1, min(count, math.ceil(int(granted) / int(period))))
    except (OSError, ValueError):  # no container, or no limit
        return count


def limit_threads() -> None:
    """Run no more threads than there are CPUs: PyTorch counts the machine's, not those that a container is granted."""
    if torch.get_num_threads() > available_cpus():
        torch.set_num_threads(available_cpus())


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory so far: of this process (host, where the system tells) and of its tensors on a GPU (device)."""
    out = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out["host"] = peak if sys.platform == "darwin" else 1024 * peak
    if device.type == "cuda":
        out["device"] = torch.cuda.max_memory_allocated(device)
    return out
