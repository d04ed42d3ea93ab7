"""The process that run.py starts with a sanitizer's runtime loaded: random calls of an instrumented library.

worker.py LIBRARY LAST ROUNDS SEED MODULE...      LAST is a file that names the call being made
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diff2to3.kernels import library

HERE = Path(__file__).resolve().parent


class Replace:
    """What the emulator needs of pytest's monkeypatch; nothing is put back in a process that ends here."""

    setattr = staticmethod(setattr)


def serve(library_file: Path) -> Callable[[int], None]:
    """Put the instrumented library in the place of the usual one; returns what to call before every round."""
    if library_file.stem != "emulated":
        instrumented = ctypes.CDLL(str(library_file))
        library.cpu_library = lambda: instrumented
        return lambda index: torch.set_num_threads(1 + index % 3)
    sys.path.insert(0, str(HERE.parent / "cuda_emulator"))
    emulator = importlib.import_module("emulator")
    emulator.install(library_file, Replace)
    return lambda index: emulator.call("emulator_seed", index % 4)


def main() -> None:
    library_file, last, rounds, seed, *names = sys.argv[1:]
    before_round = serve(Path(library_file))
    for name in names:
        for case in importlib.import_module(name).CASES:
            started, outcomes = time.perf_counter(), {}
            for index in range(int(rounds)):
                Path(last).write_text(f"{name}.{case.__name__}, seed {seed}, round {index}")
                before_round(index)
                outcome = case(torch.Generator().manual_seed(int(seed) * 1_000_003 + index))
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            print(f"{name}.{case.__name__}: {summary} ({time.perf_counter() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # what torch does at the end of a process is not ours to judge
