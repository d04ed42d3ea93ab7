"""Loads the compiled kernels and calls them. The C interface knows only pointers, 64-bit integers and doubles.

Which backend an op uses is an argument, never a setting that something else reads:

    auto       the compiled kernel for the tensors' device if there is one, else the reference
    native     the compiled kernel; an error that names the fix if there is none
    reference  plain PyTorch, on any device and dtype
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import build

BACKENDS = ("auto", "native", "reference")

Argument = Tensor | int | float | None


class KernelError(RuntimeError):
    """A compiled kernel reported a failure."""


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The CPU kernels for the best instruction set of this machine, or None if they cannot be built.

    Looks beside this file first (pip install built them there), then in the user's cache, and builds into that
    cache as a last resort.
    """
    beside = Path(__file__).resolve().parent / "_lib"
    for folder in (beside, build.cache_dir()):
        if folder_is_current(folder):
            return load_best_variant(folder)
    try:
        print("diff2to3: compiling the CPU kernels (once, under a minute)", file=sys.stderr)
        build.build_cpu(build.cache_dir())
    except (build.BuildError, OSError) as error:
        print(f"diff2to3: CPU kernels not built, the slow reference runs instead: {error}", file=sys.stderr)
        return None
    return load_best_variant(build.cache_dir())


def folder_is_current(folder: Path) -> bool:
    """Whether ``folder`` holds a finished build of exactly these sources."""
    stamp = folder / "source_hash"
    return stamp.exists() and stamp.read_text() == build.source_hash()


def load_best_variant(folder: Path) -> ctypes.CDLL:
    """Load the fastest variant in ``folder`` that this CPU runs."""
    suffix = build.library_suffix()
    baseline = ctypes.CDLL(str(folder / f"cpu_baseline{suffix}"))
    baseline.d23_cpu_level.restype = ctypes.c_int64
    level = baseline.d23_cpu_level()
    for name, needed in (("avx512", 2), ("avx2", 1)):
        path = folder / f"cpu_{name}{suffix}"
        if level >= needed and path.exists():
            return ctypes.CDLL(str(path))
    return baseline


@functools.cache
def cuda_library(capability: int) -> ctypes.CDLL | None:
    """The CUDA kernels for one compute capability (for example 90), built at first use; None without nvcc."""
    path = build.cache_dir() / f"cuda_sm{capability}{build.library_suffix()}"
    if not path.exists():
        try:
            print(f"diff2to3: compiling the CUDA kernels for sm_{capability} (once)", file=sys.stderr)
            build.compile_cuda(path.parent, [capability])
        except (build.BuildError, OSError) as error:
            print(f"diff2to3: CUDA kernels not built, the slow reference runs instead: {error}", file=sys.stderr)
            return None
    return ctypes.CDLL(str(path))


def library_for(device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernels for ``device``; None where there are none (MPS, or nothing could be built)."""
    if device.type == "cpu":
        return cpu_library()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return cuda_library(10 * major + minor)
    return None


def variant_name() -> str:
    """The instruction set in use: ``avx512``, ``avx2``, ``baseline`` or ``none``."""
    library = cpu_library()
    return "none" if library is None else Path(library._name).stem.removeprefix("cpu_")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """``native`` or ``reference`` for this device and dtype. ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return "reference"
    supported = dtype in (torch.float32, torch.float64) if device.type == "cpu" else dtype == torch.float32
    available = supported and library_for(device) is not None
    if backend == "native" and not available:
        raise RuntimeError(
            f"backend 'native' has no kernel for {dtype} on {device.type}; run 'diff2to3 doctor' to see what is "
            "missing, or use backend='reference'"
        )
    return "native" if available else "reference"


def call(name: str, *args: Argument, device: torch.device) -> int:
    """Call the C function ``d23_<name>`` and return its non-negative result.

    Tensors become pointers (they must be contiguous and on ``device``), ints int64, floats double, None a null
    pointer. The number of threads (CPU) or the current stream (CUDA) is appended. A negative result is an error.
    """
    library = library_for(device)
    if library is None:
        raise KernelError(f"{name}: no compiled kernels for {device.type}")
    function = getattr(library, f"d23_{name}")
    function.restype = ctypes.c_int64
    converted = [convert(arg, name, device) for arg in args]
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            result = function(*converted, stream)
    else:
        result = function(*converted, ctypes.c_int64(torch.get_num_threads()))
    if result < 0:
        raise KernelError(f"{name}: {FAILURES.get(result, 'failed')} (code {result})")
    return int(result)


#: Negative results of the C functions.
FAILURES = {-1: "out of memory", -2: "too many items for 32-bit indices", -3: "CUDA error"}


def convert(arg: Argument, name: str, device: torch.device) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        if arg.device != device and arg.device.type != device.type:
            raise KernelError(f"{name}: expected tensors on {device}, got one on {arg.device}")
        if not arg.is_contiguous():
            raise KernelError(f"{name}: tensors must be contiguous")
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, float):
        return ctypes.c_double(arg)
    return ctypes.c_int64(int(arg))
