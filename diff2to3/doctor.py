"""What is built and found on this machine, as data; ``diff2to3 doctor`` prints it.

Optional packages are looked up in the installation's metadata and not imported: some take seconds, and a
broken one must not break this.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import diff2to3
from diff2to3.kernels import build, cache, library
from diff2to3.nn.attention import torch_varlen
from diff2to3.nn.backends import ATTENTION_PACKAGES

STATUSES = OK, MISSING, BROKEN, INFO = "ok", "missing", "broken", "info"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    status  ok; missing (optional, ``fix`` adds it); broken (present and unusable); info (nothing to judge)
    fix     the one line that adds or repairs it
    """

    section: str
    name: str
    status: str
    value: str
    fix: str | None = None


@dataclass(frozen=True)
class Package:
    """An optional package: its module, the distributions that may provide it, and what it is for."""

    module: str
    purpose: str
    fix: str
    distributions: tuple[str, ...] = ()


def extra(name: str) -> str:
    return f'pip install "diff2to3[{name}]"'


PACKAGES = (
    Package("diffusers", "FLUX autoencoders", extra("flux")),
    Package("transformers", "image encoders", extra("flux")),
    Package(
        "spconv",
        "sparse convolution, explicit backend",
        extra("spconv"),
        ("spconv-cu126", "spconv-cu124", "spconv-cu121", "spconv-cu120", "spconv-cu118", "spconv"),
    ),
    Package("xformers", "attention, explicit backend", extra("xformers")),
    Package(
        "flash_attn",
        "attention, explicit backend",
        "pip install flash-attn --no-build-isolation",
        ("flash-attn",),
    ),
    Package("gsplat", "rasteriser to compare with", extra("gsplat")),
    Package("trimesh", "mesh files", extra("data")),
    Package("embreex", "ray casting", extra("data")),
    Package("scipy", "nearest neighbours", extra("data")),
    Package("objaverse", "Objaverse-XL downloads", extra("data")),
    Package("DracoPy", "compressed glTF", extra("data")),
    Package("meshoptimizer", "meshopt-compressed glTF, compiled on installation", extra("meshopt")),
    Package("pi_heif", "HEIC photos", extra("photos"), ("pi-heif",)),
    Package("zstandard", "version 4 of .spz files", extra("spz")),
    Package("fast_simplification", "simpler meshes", extra("mesh"), ("fast-simplification",)),
    Package("xatlas", "textured meshes", extra("mesh")),
    Package("ray", "preparing data on a cluster", 'pip install "ray[default]"'),
    Package("huggingface_hub", "downloads of models", extra("flux"), ("huggingface-hub",)),
    Package("rembg", "background removal", extra("photos")),
    Package("imageio_ffmpeg", "films of turntables", extra("video"), ("imageio-ffmpeg",)),
    Package("wandb", "experiment tracking", extra("wandb")),
    Package("tensorboard", "experiment tracking", extra("tensorboard")),
    Package("bpy", "Blender as a renderer", "pip install bpy   (each release supports one Python version)"),
    Package("kaolin", "mesh and volume tools", "see kaolin_hint"),
)


def collect(*, imports: bool = False) -> list[Check]:
    """The whole report. ``imports``: also import every optional package, in a process of its own."""
    return [*system(), *kernels(), *devices(), *packages(imports=imports), *backends()]


# ---- machine ----


def system() -> Iterator[Check]:
    section = "system"
    yield Check(section, "diff2to3", OK, f"{diff2to3.__version__} in {Path(diff2to3.__file__).parent}")
    cpus = f"{build.available_cpus()} of {os.cpu_count()} CPUs usable"
    yield Check(section, "python", OK, f"{platform.python_version()}, {platform.platform()}, {cpus}")
    yield Check(section, "torch", OK, torch.__version__)
    try:
        compiler = build.find_compiler()
        yield Check(section, "C++ compiler", OK, f"{compiler}: {build.version_of(compiler)}")
    except build.BuildError:
        yield Check(section, "C++ compiler", MISSING, "c++, g++, clang++ not found", build.compiler_hint())
    openmp = "with" if torch.backends.openmp.is_available() else "without"
    threads = torch.get_num_threads()
    yield Check(
        section, "threads", INFO, f"{threads}: torch {openmp} OpenMP, the kernels on a pool of their own"
    )


def kernels() -> Iterator[Check]:
    section = "kernels"
    file = library.cpu_library_file()
    if file is None:
        fix = build.compiler_hint()
        yield Check(section, "CPU kernels", MISSING, "not built: the slow PyTorch reference runs", fix)
    else:
        names = ", ".join(library.runnable_variants(file.parent))
        yield Check(section, "CPU kernels", OK, f"{library.variant_name()} (of {names}) in {file.parent}")
        yield Check(section, "CPU kernels by", INFO, compiled_by(file.parent))
    yield nvcc_check()
    built = list(cuda_builds())
    for part, folder in built:
        value = f"{part.removeprefix('cuda_')} in {folder} by {compiled_by(folder)}"
        yield Check(section, "CUDA kernels", OK, value)
    if not built:
        yield Check(section, "CUDA kernels", INFO, "none yet: compiled for the GPU at first use")


def nvcc_check() -> Check:
    """nvcc, and whether the driver, whose CUDA may not be a major version older, runs what it makes."""
    driver, fix = driver_cuda_version(), build.nvcc_hint()
    if driver is not None and driver[0] < 13:
        fix = f"install a CUDA {driver[0]} toolkit from https://developer.nvidia.com/cuda-toolkit-archive"
    try:
        nvcc = build.find_nvcc()
    except build.BuildError:
        return Check("kernels", "nvcc", MISSING, "not found: CUDA kernels cannot be compiled here", fix)
    version = build.version_of(nvcc)
    release = re.search(r"release (\d+)", version)
    if driver and release and int(release[1]) > driver[0]:
        value = f"{nvcc}: {version}; but the driver runs CUDA up to {driver[0]}.{driver[1]}"
        return Check("kernels", "nvcc", BROKEN, value, f"update NVIDIA's driver, or {fix}")
    return Check("kernels", "nvcc", OK, f"{nvcc}: {version}")


def cuda_builds() -> Iterator[tuple[str, Path]]:
    """(part, folder) of every usable CUDA build, installed or cached."""
    parts = {path.name for path in cache.BESIDE.glob("cuda_sm*")}
    for root in cache.cache_roots():
        parts |= {path.name.split("-")[0] for path in root.glob("cuda_sm*-*") if path.is_dir()}
    for part in sorted(parts):
        for folder in cache.existing(part):
            yield part, folder


def compiled_by(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest["compiler"])


def devices() -> Iterator[Check]:
    section = "devices"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gib = found.total_memory / 2**30
            value = f"{found.name}, sm_{found.major}{found.minor}, {gib:.0f} GiB"
            yield Check(section, f"cuda:{index}", OK, f"{value}, torch for CUDA {torch.version.cuda}")
    elif torch.version.cuda is None and torch.version.hip is None:
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cu126   (needs an NVIDIA GPU)"
        yield Check(section, "CUDA GPU", MISSING, f"torch {torch.__version__} is built without CUDA", fix)
    else:
        fix = "nvidia-smi   (shows whether NVIDIA's driver is installed and sees a GPU)"
        yield Check(section, "CUDA GPU", MISSING, "torch finds none", fix)
    if driver := driver_cuda_version():
        yield Check(section, "NVIDIA driver", OK, f"runs CUDA up to {driver[0]}.{driver[1]}")
    if sys.platform == "darwin":
        found_mps = torch.backends.mps.is_available()
        yield Check(
            section, "MPS", OK if found_mps else MISSING, "available" if found_mps else "not available"
        )


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed NVIDIA driver runs; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int(0)
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


# ---- packages ----


def packages(*, imports: bool = False) -> Iterator[Check]:
    for package in PACKAGES:
        fix = kaolin_hint() if package.module == "kaolin" else package.fix
        version = version_of(package)
        if version is None:
            yield Check("packages", package.module, MISSING, package.purpose, fix)
        elif package.module == "kaolin" and version == "0.1":
            yield Check(
                "packages", "kaolin", BROKEN, "0.1 is PyPI's placeholder, which raises on import", fix
            )
        elif imports and (error := import_error(package.module)):
            yield Check("packages", package.module, BROKEN, f"{version}, does not import: {error}", fix)
        else:
            yield Check("packages", package.module, OK, f"{version} ({package.purpose})")


def version_of(package: Package) -> str | None:
    """The installed version, ``unknown version`` for a module without metadata, None if it is absent."""
    try:
        if importlib.util.find_spec(package.module) is None:
            return None
    except (ImportError, ValueError):  # a module that hides itself, or a broken parent
        return None
    for name in package.distributions or (package.module,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def import_error(module: str) -> str | None:
    """The last line of what importing ``module`` prints in a process of its own; None if it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=180,
        )
    except subprocess.TimeoutExpired:
        return "no answer within 180 s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def kaolin_hint() -> str:
    """NVIDIA's index has a page for each torch and CUDA version; PyPI has a placeholder, 0.1."""
    release = torch.__version__.split("+")[0]
    cuda = (torch.version.cuda or "12.8").replace(".", "")
    page = f"https://nvidia-kaolin.s3.us-east-2.amazonaws.com/torch-{release}_cu{cuda}.html"
    return f'pip install "kaolin>0.1" -f {page}'


# ---- what each op will use ----

#: Ops on the project's own kernels, with the packages that can be asked for by name instead, and where.
KERNEL_OPS: dict[str, tuple[tuple[str, ...], str]] = {
    "rasterize": (("gsplat",), "diff2to3 render --backend"),
    "patchify": ((), ""),
    "neighbour maps": ((), ""),
    "sparse convolution": (("spconv",), "train.conv_backend"),
}


def backends() -> Iterator[Check]:
    """What ``backend="auto"`` means for each op on the devices of this machine, and what else can be named."""
    names = ["cpu"]
    names += ["cuda"] if torch.cuda.is_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    chosen = {name: library.resolve_backend("auto", torch.device(name), torch.float32) for name in names}
    status = OK if set(chosen.values()) == {"native"} else INFO
    text = ", ".join(f"{name}: {backend}{note(name, backend)}" for name, backend in chosen.items())
    for op, (others, setting) in KERNEL_OPS.items():
        choices = by_name("native", "reference", *others)
        yield Check("backends", op, status, f"{text}; by name{of(setting)}: {choices}")
    varlen = "cuda" in names and torch_varlen() is not None
    text = ", ".join(f"{name}: sdpa (torch's own)" for name in names) + (
        ", half precision on cuda where windows would need padding: varlen" if varlen else ""
    )
    choices = by_name("sdpa", *(["varlen"] if varlen else []), *ATTENTION_PACKAGES)
    yield Check("backends", "attention", OK, f"{text}; by name{of('train.attention_backend')}: {choices}")


def of(setting: str) -> str:
    return f" ({setting})" if setting else ""


def note(device: str, backend: str) -> str:
    if backend == "reference":
        return " (PyTorch, slow: no compiled kernels for this device)"
    return f" (compiled: {library.variant_name()})" if device == "cpu" else " (compiled for the GPU)"


def by_name(*choices: str) -> str:
    """The choices, packages that are absent marked so."""
    known = {package.module: package for package in PACKAGES}
    missing = {name for name in choices if name in known and version_of(known[name]) is None}
    return ", ".join(f"{name} (not installed)" if name in missing else name for name in choices)
