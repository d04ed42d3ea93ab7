"""Run the CPU kernels on random and hostile input under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize/run.py                        the best instruction set of this machine, 100 rounds
    python tests/sanitize/run.py --variant all --rounds 1000 --seed 7
    python tests/sanitize/run.py --sanitizer thread     data races instead (ThreadSanitizer)

Compiles the kernels with the sanitizers into a temporary folder and starts itself again with the sanitizer's
runtime loaded first, so that torch's allocations have guarded ends too. The cases are in fuzz_*.py beside
this file: each draws one random call of one public op. Exit code 1, with the sanitizer's report, at the
first finding.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: float-cast-overflow is not part of "undefined": a NaN or a huge float as an array index is what we look
#: for. The checks left out only repeat what AddressSanitizer sees, and double the time to compile.
ADDRESS = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-sanitize=null,object-size,vptr,alignment",
]
SANITIZERS = {"address": (ADDRESS, "libasan.so"), "thread": (["-fsanitize=thread"], "libtsan.so")}
#: Check through calls instead of inline code: half the time to compile.
GCC_CALLS = ["--param=asan-instrumentation-with-call-threshold=0"]
OPTIONS = {
    # Python and torch keep memory until exit, which is no leak of ours.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
}


def modules() -> list[str]:
    return sorted(path.stem for path in HERE.glob("fuzz_*.py"))


def runnable_variants() -> list[str]:
    """Instruction sets of this machine, best first, without compiling anything to ask."""
    import torch

    levels = {"AVX512": ["avx512", "avx2", "baseline"], "AVX2": ["avx2", "baseline"]}
    return levels.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])


def compile_sanitized(folder: Path, variant: str, sanitizer: str) -> None:
    """The CPU kernels of one instruction set, instrumented, into ``folder``."""
    from diff2to3.kernels import build

    flags = build.cpu_variants()[variant]
    build.cpu_variants = lambda: {variant: flags}
    compiler = build.find_compiler()
    extra = [*SANITIZERS[sanitizer][0], "-O1", "-g", "-fno-omit-frame-pointer"]
    if sanitizer == "address" and "clang" not in build.run([compiler, "--version"]):
        extra += GCC_CALLS
    print(build.build_cpu(folder, compiler, extra), end="")


def runtime_libraries(sanitizer: str) -> str:
    """What must be loaded first: the sanitizer's runtime, and libstdc++, whose functions it looks up as it
    starts.
    """
    from diff2to3.kernels import build

    paths = []
    for name in (SANITIZERS[sanitizer][1], "libstdc++.so.6"):
        path = build.run([build.find_compiler(), f"-print-file-name={name}"]).strip()
        if not Path(path).is_absolute():
            raise SystemExit(f"the compiler has no {name}; install it, or use a compiler that has it")
        paths.append(os.path.realpath(path))
    return " ".join(paths)


def fuzz(library_file: Path, names: list[str], rounds: int, seed: int) -> None:
    """Run ``rounds`` random calls of every case with the instrumented library in place of the usual one."""
    import torch

    from diff2to3.kernels import library

    instrumented = ctypes.CDLL(str(library_file))
    library.cpu_library = lambda: instrumented
    sys.path.insert(0, str(HERE))
    for name in names:
        cases: list[Callable[[torch.Generator], str]] = importlib.import_module(name).CASES
        for case in cases:
            started = time.perf_counter()
            outcomes: dict[str, int] = {}
            for index in range(rounds):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
                torch.set_num_threads(1 + index % 3)
                print(f"{name}.{case.__name__} seed {seed} round {index}", file=LAST, flush=True)
                outcome = case(generator)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            print(f"{name}.{case.__name__}: {summary} ({time.perf_counter() - started:.1f} s)", flush=True)


class LastCase:
    """Keeps what runs now in a file, so that a crash can be named and repeated."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w")

    def write(self, text: str) -> None:
        if text.strip():
            self.file.seek(0)
            self.file.truncate()
            self.file.write(text)

    def flush(self) -> None:
        self.file.flush()


LAST = LastCase(Path(os.devnull))


def sanitize(variant: str, args: argparse.Namespace) -> int:
    """Compile one variant and fuzz it in a child process; returns the child's exit code."""
    from diff2to3.kernels import build

    with tempfile.TemporaryDirectory() as scratch:
        compile_sanitized(Path(scratch) / "cpu", variant, args.sanitizer)
        library_file = Path(scratch) / "cpu" / f"cpu_{variant}{build.library_suffix()}"
        last = Path(scratch) / "last"
        command = [sys.executable, __file__, "--library", str(library_file), "--last", str(last)]
        command += ["--rounds", str(args.rounds), "--seed", str(args.seed), *args.modules]
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime_libraries(args.sanitizer)}
        code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
        if code:
            print(f"{variant}: stopped with exit code {code} in: {last.read_text()}", file=sys.stderr)
        else:
            print(f"{variant}: no findings")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", default=modules(), help="which fuzz_*.py; all by default")
    parser.add_argument("--rounds", type=int, default=100, help="random calls of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="best", help="avx512, avx2, baseline, best or all")
    parser.add_argument("--sanitizer", default="address", choices=SANITIZERS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        global LAST
        LAST = LastCase(args.last)
        fuzz(args.library, args.modules, args.rounds, args.seed)
        return 0
    runnable = runnable_variants()
    wanted = {"best": runnable[:1], "all": runnable}.get(args.variant, [args.variant])
    return max(sanitize(variant, args) for variant in wanted)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
