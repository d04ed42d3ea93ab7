"""Compiles the CUDA sources for the emulator, and puts them in the place of the CUDA kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from diff2to3.kernels import build, library

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DD23_EMULATE", "-Wno-unknown-pragmas"]


def compile_emulated(folder: Path, sources: Sequence[Path] = (), extra: Sequence[str] = ()) -> Path:
    """The CUDA sources (all of the package's by default) and the emulator as one library in ``folder``."""
    compiler = build.find_compiler()
    sources = [*(sources or sorted((build.SOURCES / "cuda").glob("*.cu"))), HERE / "scheduler.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    include = [f"-I{HERE / 'include'}", f"-I{build.SOURCES}"]
    commands = [
        [compiler, *FLAGS, *extra, *include, "-x", "c++", "-c", str(source), "-o", str(output)]
        for source, output in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=build.available_cpus()) as pool:
        list(pool.map(build.run, commands))
    file = folder / f"emulated{build.library_suffix()}"
    build.run([compiler, "-shared", *extra, *map(str, objects), "-o", str(file)])
    return file


def install(file: Path, patch: Any) -> ctypes.CDLL:
    """Serve tensors in ordinary memory with the emulated CUDA kernels; ``patch`` is pytest's monkeypatch.

    Ops then take the same way through Python as on a GPU. ``d23_emulator_seed`` of the result chooses the order
    of threads.
    """
    emulated = ctypes.CDLL(str(file))
    patch.setattr(library, "target", lambda device: "cuda" if device.type == "cpu" else None)
    patch.setattr(library, "library_for", lambda device: emulated)
    for name in ("neighbors", "patchify", "rasterize", "sparse_products"):
        module = getattr(__import__(f"diff2to3.kernels.{name}").kernels, name)
        if hasattr(module, "target"):
            patch.setattr(module, "target", library.target)
    return emulated


def call(name: str, *args: library.Argument) -> int:
    return library.call(name, *args, device=torch.device("cpu"))
