"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import sys

import torch

from diff2to3.errors import InputError
from diff2to3.kernels.build import available_cpus as available_cpus


def best_device(index: int | None = None, *, mps: bool = True) -> torch.device:
    """A GPU (number ``index``, round and round where there are fewer), Apple's (with ``mps``), or the CPU."""
    if torch.cuda.is_available():
        return (
            torch.device("cuda") if index is None else torch.device("cuda", index % torch.cuda.device_count())
        )
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


def choose_device(name: str | None) -> torch.device:
    """The device that --device asks for, or the best there is; InputError where it cannot be used here."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def device_name(device: torch.device) -> str:
    """ "NVIDIA H200", or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
