"""Damaged and hostile files: each must be read, or refused with one clear error, soon and in little memory.

    python tests/fuzz/run.py --kind obj --executions 1000000
    python tests/fuzz/run.py --executions 1000000 --counts counts.json     every kind; goes on where it was stopped
    python tests/fuzz/run.py --kind glb --first 4711 --executions 1 --show  input number 4711 again
    python tests/fuzz/run.py --table counts.json                            the counts, as in README.md
    python tests/fuzz/run.py --kind ply --atheris -runs=1000000             inputs chosen by the code they reach

Input number i of a kind follows from the kind and i alone. Inputs run in a process of their own, which ends with what
crashes it; this process names the input and stops. ``--atheris`` needs pip install atheris; what follows it goes to
libFuzzer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 20  # of the process's own time for one input: others may hold it up
#: An input after which nothing comes back for so long, in native code, which no signal ends, hangs.
STUCK_SECONDS = 600
#: What reading may add to the process. The limits that the kinds are read with allow no file of 1 MiB to take more.
MIB = 1000
BATCH = 50_000


class TooLong(BaseException):
    """No Exception, which readers of damaged files catch."""


# ---- the process that reads ----


def input_number(kind: str, number: int, pool: Sequence[bytes]) -> bytes:
    import mutation
    from kinds import KINDS

    rng = Random(f"{kind} {number}")
    words = KINDS[kind].words

    def change(data: bytes) -> bytes:
        return mutation.changed(data, rng, words, pool)

    rewrite = KINDS[kind].rewrite if rng.random() < 0.7 else mutation.plain
    return rewrite(rng.choice(pool), change, rng)[: mutation.LARGEST]


def read_batch(kind: str, first: int, last: int, at: Synchronized[int], read: Synchronized[int]) -> None:
    """Inputs ``first`` to ``last``; ``at`` is the one that is being read, ``read`` counts those that were."""
    from kinds import KINDS, prepare

    warnings.simplefilter("ignore")
    silence_libraries()
    signal.signal(signal.SIGPROF, _too_long)
    pool = KINDS[kind].seeds()
    memory = Path("/dev/shm")  # opening files is most of the time elsewhere
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        prepare(folder)
        for data in pool:
            KINDS[kind].check(data, folder)  # imports what it needs
        limit_memory()
        for number in range(first, last):
            at.value = number
            data = input_number(kind, number, pool)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            read.value += KINDS[kind].check(data, folder)
            signal.setitimer(signal.ITIMER_PROF, 0)


def silence_libraries() -> None:
    """libtiff writes a line to stderr for many a damaged picture; Python's own lines stay."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _too_long(number: int, frame: object) -> None:
    raise TooLong(f"took more than {SECONDS} s of CPU time")


def limit_memory() -> None:
    """Memory beyond ``MIB`` more than now is a MemoryError. On Linux; elsewhere there is no such limit."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmData:"))
        bound = int(line.split()[1]) * 1024 + (MIB << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


# ---- the process that watches ----


def run_batch(kind: str, first: int, last: int) -> int:
    """How many of the inputs were read; SystemExit that names the input where one fails."""
    context = multiprocessing.get_context("spawn")
    at, read = context.Value("q", first, lock=False), context.Value("q", 0, lock=False)
    process = context.Process(target=read_batch, args=(kind, first, last, at, read), daemon=True)
    process.start()
    seen, since = first, time.monotonic()
    while process.is_alive():
        process.join(1)
        if at.value != seen:
            seen, since = at.value, time.monotonic()
        elif time.monotonic() - since > STUCK_SECONDS:
            process.kill()
            process.join()
            raise SystemExit(f"{kind}: input {at.value} hangs")
    if process.exitcode:
        raise SystemExit(f"{kind}: input {at.value} fails; exit code {process.exitcode}")
    return int(read.value)


def run(kind: str, first: int, executions: int, counts: Counts) -> None:
    row = counts.row(kind)
    first += row["executions"]
    end = executions
    while first < end:
        last, started = min(first + BATCH, end), time.monotonic()
        row["read"] += run_batch(kind, first, last)
        row["executions"] += last - first
        row["seconds"] = round(row["seconds"] + time.monotonic() - started, 1)
        counts.save()
        first = last
    refused = row["executions"] - row["read"]
    print(
        f"{kind}: {row['executions']} executions, {row['read']} read, {refused} refused; {row['seconds']:.0f} s"
    )


class Counts:
    """Executions by kind, kept in a file where one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            self.rows = json.loads(path.read_text())

    def row(self, kind: str) -> dict[str, Any]:
        return self.rows.setdefault(kind, {"executions": 0, "read": 0, "seconds": 0.0})

    def save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def table(self) -> str:
        lines = [
            "| kind | executions | read | refused | executions a second |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for kind, row in self.rows.items():
            done, read = row["executions"], row["read"]
            rate = done / max(row["seconds"], 1)
            lines.append(f"| {kind} | {done:,} | {read:,} | {done - read:,} | {rate:,.0f} |")
        return "\n".join(lines)


# ---- libFuzzer ----


def run_atheris(kind: str, arguments: list[str]) -> None:
    """Does not come back: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["diff2to3.assets", "diff2to3.formats", "diff2to3.pipeline.photo_files"]
    ):
        from kinds import KINDS, prepare

    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), Path(name, "corpus")
        corpus.mkdir()
        prepare(folder)
        for i, data in enumerate(KINDS[kind].seeds()):
            (corpus / str(i)).write_bytes(data)
        limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MIB + 500}", "-max_len=65536"]
        atheris.Setup(
            [sys.argv[0], *limits, *arguments, str(corpus)], lambda data: KINDS[kind].check(data, folder)
        )
        atheris.Fuzz()


def show(kind: str, first: int, last: int) -> None:
    from kinds import KINDS

    pool = KINDS[kind].seeds()
    for number in range(first, last):
        sys.stdout.buffer.write(input_number(kind, number, pool))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", help="of file; may be given again; every kind by default")
    parser.add_argument("--executions", type=int, default=20_000, help="of each kind, with those of --counts")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--counts", type=Path, help="a file that keeps how many inputs were tried")
    parser.add_argument("--show", action="store_true", help="write the inputs to stdout, and read none")
    parser.add_argument("--table", type=Path, metavar="COUNTS", help="print what the file of --counts holds")
    parser.add_argument("--atheris", nargs=argparse.REMAINDER, help="arguments of libFuzzer")
    args = parser.parse_args()
    if args.table:
        print(Counts(args.table).table())
        return 0
    if args.atheris is not None:
        run_atheris((args.kind or ["obj"])[0], args.atheris)
    from kinds import KINDS

    unknown = set(args.kind or []) - set(KINDS)
    if unknown:
        parser.error(f"--kind: unknown {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    counts = Counts(args.counts)
    for kind in args.kind or KINDS:
        if args.show:
            show(kind, args.first, args.first + args.executions)
        else:
            run(kind, args.first, args.first + args.executions, counts)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
