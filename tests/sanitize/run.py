"""Run the kernels on random and hostile input under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize/run.py                        the best instruction set of this machine, 100 rounds
    python tests/sanitize/run.py --variant all --rounds 1000 --seed 7
    python tests/sanitize/run.py --variant cuda         the CUDA sources on tests/cuda_emulator
    python tests/sanitize/run.py --sanitizer thread     data races instead (ThreadSanitizer)

Compiles the kernels with the sanitizers into a temporary folder and calls them in a process (worker.py) that loads
the sanitizer's runtime first, so that torch's allocations have guarded ends too. The cases are in fuzz_*.py beside
this file: each draws one random call of one public op. Exit code 1, with the sanitizer's report, at the first
finding.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from diff2to3.kernels import build

HERE = Path(__file__).resolve().parent

#: float-cast-overflow is not part of "undefined": a NaN or a huge float as an array index is what we look for.
#: The checks left out only repeat what AddressSanitizer sees, and double the time to compile.
ADDRESS = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-sanitize=null,object-size,vptr,alignment",
]
#: Check through calls instead of inline code: half the time to compile.
GCC_CALLS = ["--param=asan-instrumentation-with-call-threshold=0"]
SANITIZERS = {"address": (ADDRESS, "libasan.so"), "thread": (["-fsanitize=thread"], "libtsan.so")}
OPTIONS = {
    # Python and torch keep memory until exit, which is no leak of ours.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode=66:report_signal_unsafe=0:suppressions={HERE / 'tsan.supp'}",
}


def modules() -> list[str]:
    return sorted(path.stem for path in HERE.glob("fuzz_*.py"))


def runnable_variants() -> list[str]:
    """Instruction sets of this machine, best first, without compiling anything to ask."""
    levels = {"AVX512": ["avx512", "avx2", "baseline"], "AVX2": ["avx2", "baseline"]}
    return levels.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])


def compile_sanitized(folder: Path, variant: str, sanitizer: str = "address") -> Path:
    """The kernels of one instruction set (or ``cuda``, for the emulator), instrumented; the library's file."""
    compiler = build.find_compiler()
    extra = [*SANITIZERS[sanitizer][0], "-O1", "-g1", "-fno-omit-frame-pointer"]
    if sanitizer == "address" and "clang" not in build.run([compiler, "--version"]):
        extra += GCC_CALLS
    if variant == "cuda":
        sys.path.insert(0, str(HERE.parent / "cuda_emulator"))
        return Path(importlib.import_module("emulator").compile_emulated(folder, extra=extra))
    all_variants = build.cpu_variants
    build.cpu_variants = lambda: {variant: all_variants()[variant]}
    try:
        print(build.build_cpu(folder / "cpu", compiler, extra), end="")
    finally:
        build.cpu_variants = all_variants
    return folder / "cpu" / f"cpu_{variant}{build.library_suffix()}"


def runtime_libraries(sanitizer: str) -> str:
    """What must be loaded first: the sanitizer's runtime, and libstdc++, whose functions it looks up at once."""
    paths = []
    for name in (SANITIZERS[sanitizer][1], "libstdc++.so.6"):
        path = build.run([build.find_compiler(), f"-print-file-name={name}"]).strip()
        if not Path(path).is_absolute():
            raise build.BuildError(f"the compiler has no {name}; install it, or use a compiler that has it")
        paths.append(os.path.realpath(path))
    return " ".join(paths)


def call_randomly(
    library_file: Path, names: Sequence[str], rounds: int, seed: int = 0, sanitizer: str = "address"
) -> tuple[int, str]:
    """Run worker.py; its exit code, and the call that was being made at the end."""
    with tempfile.NamedTemporaryFile() as last:
        command = [
            sys.executable,
            str(HERE / "worker.py"),
            str(library_file),
            last.name,
            str(rounds),
            str(seed),
        ]
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime_libraries(sanitizer)}
        done = subprocess.run([*command, *names], env=environment, stdin=subprocess.DEVNULL)
        return done.returncode, Path(last.name).read_text()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", default=modules(), help="which fuzz_*.py; all by default")
    parser.add_argument("--rounds", type=int, default=100, help="random calls of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="best", help="avx512, avx2, baseline, cuda, best or all")
    parser.add_argument("--sanitizer", default="address", choices=SANITIZERS)
    args = parser.parse_args()
    runnable = runnable_variants()
    wanted = {"best": runnable[:1], "all": [*runnable, "cuda"]}.get(args.variant, [args.variant])
    for variant in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            file = compile_sanitized(Path(scratch), variant, args.sanitizer)
            code, last = call_randomly(file, args.modules, args.rounds, args.seed, args.sanitizer)
        if code:
            print(f"{variant}: stopped with exit code {code} in {last}", file=sys.stderr)
            return 1
        print(f"{variant}: no findings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
