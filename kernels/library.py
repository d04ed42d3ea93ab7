"""Loads the compiled kernels and calls them. The C interface knows only pointers, int64 and doubles.

Which backend an op uses is an argument, never a setting that something else reads:

    auto       the compiled kernel for the tensors' device if there is one, else the reference
    native     the compiled kernel; an error that names the fix if there is none
    reference  plain PyTorch, on any device and dtype
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from diff2to3.errors import Diff2to3Error

from . import build, cache

BACKENDS = ("auto", "native", "reference")

Argument = Tensor | int | float | None
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])

#: Negative results of the C functions.
_TOO_MANY = -2
FAILURES = {-1: "out of memory", _TOO_MANY: "too many items for 32-bit indices", -3: "CUDA error"}

#: Instruction sets, best first, with the level that d23_cpu_level must report at least.
CPU_LEVELS = (("avx512", 2), ("avx2", 1), ("baseline", 0))


class KernelError(Diff2to3Error, RuntimeError):
    """A compiled kernel reported a failure."""


class TooManyError(KernelError):
    """The call has more elements than the kernel's indices of 32 bits reach. Smaller parts of it may work."""


# ---- loading ----


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The CPU kernels for the best instruction set of this machine, or None if they cannot be built."""
    return find_or_build("cpu", load_cpu, build.build_cpu)


@functools.cache
def cuda_library(capability: int) -> ctypes.CDLL | None:
    """The CUDA kernels for one compute capability (for example 90), built at first use; None without nvcc."""
    return find_or_build(
        f"cuda_sm{capability}", load_cuda, lambda folder: build.build_cuda(folder, capability)
    )


def find_or_build(part: str, load: Callable[[Path], T], compile_into: Callable[[Path], object]) -> T | None:
    """Load ``part`` from where it is, or compile it. None, after one line on stderr, if neither works."""
    damaged: set[Path] = set()
    try:
        for folder in cache.existing(part):
            try:
                return load(folder)
            except (OSError, AttributeError) as error:  # damaged on disk, or built for another machine
                print(f"diff2to3: {folder} cannot be loaded: {error}", file=sys.stderr)
                damaged.add(folder)
        return load(cache.compile_once(part, compile_into, damaged))
    except (build.BuildError, KernelError, OSError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else repr(error))
        print(f"diff2to3: no {part} kernels, the slow reference runs instead: {reason}", file=sys.stderr)
        return None


def load_cpu(folder: Path, variant: str | None = None) -> ctypes.CDLL:
    """Load one instruction-set variant from ``folder``, by default the fastest that this CPU runs."""
    if variant is None:
        variant = runnable_variants(folder)[0]
    return ctypes.CDLL(str(folder / f"cpu_{variant}{build.library_suffix()}"))


def runnable_variants(folder: Path) -> list[str]:
    """The variants in ``folder`` that this CPU runs, fastest first."""
    baseline = load_cpu(folder, "baseline")
    baseline.d23_cpu_level.restype = ctypes.c_int64
    level = baseline.d23_cpu_level()
    suffix = build.library_suffix()
    return [
        name for name, least in CPU_LEVELS if level >= least and (folder / f"cpu_{name}{suffix}").exists()
    ]


def load_cuda(folder: Path) -> ctypes.CDLL:
    """Load the CUDA kernels. KernelError if the driver cannot run them (it is too old, for example)."""
    library = ctypes.CDLL(str(folder / f"cuda{build.library_suffix()}"))
    library.d23_cuda_ready.restype = ctypes.c_int64
    if (result := library.d23_cuda_ready()) < 0:
        raise KernelError(failure_text(library, result))
    return library


def cpu_library_file() -> Path | None:
    """The file that the CPU kernels in use were loaded from."""
    library = cpu_library()
    return None if library is None else Path(library._name)


def variant_name() -> str:
    """The CPU's instruction set in use: ``avx512``, ``avx2``, ``baseline`` or ``none``."""
    file = cpu_library_file()
    return "none" if file is None else file.stem.removeprefix("cpu_")


# ---- choosing ----


def target(device: torch.device) -> str | None:
    """Which kernel sources serve tensors on ``device``: ``cpu``, ``cuda`` or None (MPS, ROCm, …).

    An op whose arguments differ between the two asks this, not ``device.type``: the tests that run the CUDA
    sources on an emulator answer ``cuda`` for tensors in ordinary memory.
    """
    if device.type == "cpu":
        return "cpu"
    return "cuda" if device.type == "cuda" and torch.version.hip is None else None


def library_for(device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernels for ``device``; None where there are none (MPS, or nothing could be built)."""
    kind = target(device)
    if kind == "cpu":
        return cpu_library()
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return cuda_library(10 * major + minor)
    return None


def constant_to_compile(function: F) -> F:
    """A function that torch.compile need not look into, for its result depends on no data.

    What torch.compiler.assume_constant_result does, but that imports torch._dynamo: a second of every command's start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_to_compile
def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """``native`` or ``reference`` for this device and dtype. ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return "reference"
    supported = (torch.float32, torch.float64) if target(device) == "cpu" else (torch.float32,)
    available = dtype in supported and library_for(device) is not None
    if backend == "native" and not available:
        raise RuntimeError(
            f"backend 'native' has no kernel for {dtype} on {device.type}; run 'diff2to3 doctor' to see what "
            "is missing, or use backend='reference'"
        )
    return "native" if available else "reference"


# ---- ops ----


def define_op(
    name: str, schema: str, device_types: tuple[str, ...] | None = None
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make a function the op ``diff2to3::NAME`` of torch's dispatcher, for autograd and torch.compile: a decorator.

    The first call of such an op imports torch._dynamo: a second, which making Gaussians of a picture need not take. As
    long as nothing has imported that, and no gradient is asked for, the function is called as it is.
    """

    def define(function: Callable[..., T]) -> Callable[..., T]:
        op = torch.library.custom_op(
            f"diff2to3::{name}", function, mutates_args=(), schema=schema, device_types=device_types
        )

        @functools.wraps(function)
        def run(*args: object) -> T:
            compiler = torch.compiler.is_compiling() or "torch._dynamo" in sys.modules
            if compiler or torch.is_grad_enabled():
                return op(*args)
            return function(*args)

        return run

    return define


# ---- calling ----


def call(name: str, *args: Argument, device: torch.device) -> int:
    """Call the C function ``d23_<name>`` and return its non-negative result.

    Tensors become pointers (they must be contiguous and on ``device``), ints int64, floats double, None a
    null pointer. The number of threads (CPU) or the current stream (CUDA) is appended. A negative result is
    an error.
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
    elif target(device) == "cuda":  # the emulator has one stream
        result = function(*converted, ctypes.c_void_p(None))
    else:
        result = function(*converted, ctypes.c_int64(torch.get_num_threads()))
    if result < 0:
        kind = TooManyError if result == _TOO_MANY else KernelError
        raise kind(f"{name}: {failure_text(library, result)}")
    return int(result)


def scratch(name: str, *args: Argument, device: torch.device) -> Tensor:
    """Uninitialised memory of the size that ``d23_<name>_scratch_bytes`` asks for: uint8 [bytes]."""
    return torch.empty(call(f"{name}_scratch_bytes", *args, device=device), dtype=torch.uint8, device=device)


def convert(
    arg: Argument, name: str, device: torch.device
) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        if arg.device.type != device.type or (device.index is not None and arg.device != device):
            raise KernelError(f"{name}: expected tensors on {device}, got one on {arg.device}")
        if not arg.is_contiguous():
            raise KernelError(f"{name}: tensors must be contiguous")
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, float):
        return ctypes.c_double(arg)
    return ctypes.c_int64(int(arg))


def failure_text(library: ctypes.CDLL, result: int) -> str:
    text = f"{FAILURES.get(result, 'failed')} (code {result})"
    if result == -3:
        library.d23_cuda_error_text.restype = ctypes.c_char_p
        text += f": {library.d23_cuda_error_text().decode()}"
    return text
