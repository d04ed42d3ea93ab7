"""Everything that wants a GPU, in one run: check first, measure next, sanitise last.

    python eval/gpu.py --name h200                            about 9 minutes on one card; --seconds bounds it
    python eval/gpu.py --name cpu --device cpu --smoke        a rehearsal, which measures nothing of use
    python eval/gpu.py --section raster --device cuda         one section alone, printed

From a checkout; needs Python with torch, pytest, hypothesis and omegaconf, nvcc for the kernels and, for the last
steps, compute-sanitizer. gsplat takes part where it is installed. Writes eval/results/gpu_NAME.json with every reading
and gpu_NAME.md, where what was predicted from instruction and launch counts stands beside what was read. Steps that
the time does not suffice for are said to be skipped, never left out in silence. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.gpu_sections import SECTIONS  # noqa: E402
from benchmarks.gpu_timing import Readings  # noqa: E402

#: Eight processes at once, as on a node: one compiles, the others wait and load.
BUILD = """
import torch, sys
from diff2to3.kernels.library import library_for
assert library_for(torch.device(sys.argv[1])) is not None
"""


@dataclass(frozen=True)
class Prediction:
    """What a reading, or the ratio of two, was expected to be on an H200. Of rows that match, the first counts."""

    what: str
    low: float
    high: float
    reading: str  # start of the row's name
    over: str = ""  # start of the row's name that it is divided by
    key: str = "ms"


def gsplat_ratio(scene: str, kind: str, low: float, high: float) -> Prediction:
    what = f"{scene} 512², {kind}: gsplat's time over ours"
    return Prediction(what, low, high, f"{scene} 512² x 1 gsplat {kind}", f"{scene} 512² x 1 native {kind}")


#: From the counts of instructions and launches in the code as it was before it first met a GPU.
PREDICTIONS = (
    gsplat_ratio("shell 200k", "forward", 1.0, 1.4),
    gsplat_ratio("shell 200k", "backward", 0.7, 1.2),
    gsplat_ratio("shell 1000k", "forward", 1.0, 1.4),
    gsplat_ratio("shell 1000k", "backward", 0.7, 1.2),
    Prediction("SMDiT-large, one conditional forward, ms", 28, 36, "latents conditional"),
    Prediction("SMDiT-large, TFLOP/s", 215, 275, "latents conditional", key="tflops"),
    Prediction("SMDiT-large, launches", 1700, 2100, "kernels of latents conditional", key="launches"),
    Prediction("convolution 2048->128 at 20k voxels, ms", 2.5, 3.5, "conv 20k 2048->128 bf16 forward"),
)


def value_of(rows: list[dict[str, Any]], start: str, key: str) -> float | None:
    found = (row[key] for row in rows if row["name"].startswith(start) and key in row)
    return next(found, None)


def predictions_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown rows: what, predicted, read."""
    lines = ["| What | predicted | read |", "| --- | ---: | ---: |"]
    for p in PREDICTIONS:
        value = value_of(rows, p.reading, p.key)
        base = value_of(rows, p.over, p.key) if p.over else 1.0
        read = "not measured" if value is None or not base else f"{value / base:.3g}"
        lines.append(f"| {p.what} | {p.low:g} to {p.high:g} | {read} |")
    return lines


class Steps:
    """Programs run one after another within a number of seconds."""

    def __init__(self, seconds: float, environment: dict[str, str]) -> None:
        self.deadline, self.environment = time.monotonic() + seconds, environment
        self.outcomes: list[dict[str, Any]] = []

    def run(self, name: str, seconds: float, command: list[str], counts: bool = True) -> None:
        """``counts``: its failure is the whole run's."""
        left = self.deadline - time.monotonic()
        if left < 15:
            self.note(name, "skipped, no time left", counts=False)
            return
        print(f"== {name} (at most {min(seconds, left):.0f} s)", flush=True)
        started = time.monotonic()
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=self.environment, timeout=min(seconds, left)
            ).returncode
            outcome = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        self.note(name, outcome, time.monotonic() - started, counts)

    def note(self, name: str, outcome: str, seconds: float = 0.0, counts: bool = True) -> None:
        print(f"== {name}: {outcome}, {seconds:.1f} s", flush=True)
        self.outcomes.append(
            {"step": name, "outcome": outcome, "seconds": round(seconds, 1), "counts": counts}
        )

    @property
    def failed(self) -> bool:
        return any(step["counts"] and step["outcome"] != "ok" for step in self.outcomes)


def build_step(steps: Steps, device: str) -> None:
    started = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD, device], cwd=ROOT, env=steps.environment)
        for _ in range(8)
    ]
    codes = [process.wait() for process in processes]
    outcome = "ok" if codes == [0] * 8 else f"exit codes {codes}"
    steps.note("build and load by 8 processes", outcome, time.monotonic() - started)


def all_steps(steps: Steps, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every step; the rows that the sections read."""
    python, device = sys.executable, args.device
    build_step(steps, device)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", device]
    steps.run("checks", 200, [*pytest, "tests/gpu"])
    if device == "cuda":
        others = [f"tests/nn/test_{name}.py" for name in ("attention", "sparse_layers", "items")]
        steps.run("more checks", 90, [*pytest, "-m", "cuda", *others])
    rows: list[dict[str, Any]] = []
    for name, seconds in (("raster", 110), ("vae", 60), ("denoiser", 130), ("sparse", 60)):
        out = folder / f"{name}.json"
        command = [
            python,
            str(ROOT / "eval" / "gpu.py"),
            "--section",
            name,
            "--device",
            device,
            "--out",
            str(out),
        ]
        steps.run(name, seconds, [*command, *(["--smoke"] if args.smoke else [])], counts=False)
        rows += json.loads(out.read_text()) if out.exists() else []
    photo = str(ROOT / "eval" / "examples" / "suv.png")
    made = [python, "-m", "diff2to3.cli", "generate", photo, "-o", str(folder / "made"), "--device", device]
    steps.run("generate", 90, made)
    if device == "cuda":
        sanitise(steps, pytest)
    return rows


def sanitise(steps: Steps, pytest: list[str]) -> None:
    """compute-sanitizer on the tiny scenes, the project's own kernels only."""
    if shutil.which("compute-sanitizer") is None:
        steps.note("sanitise", "skipped, no compute-sanitizer", counts=False)
        return
    steps.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=d23", "--print-limit", "5"]
        steps.run(tool, 90, [*sanitizer, "--error-exitcode", "9", *pytest, "tests/gpu", "-k", "tiny"])


def report(args: argparse.Namespace, steps: Steps, rows: list[dict[str, Any]]) -> None:
    """gpu_NAME.json and gpu_NAME.md."""
    gpu = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else "none: a rehearsal, whose times mean nothing"
    )
    facts = {"gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    args.results.mkdir(parents=True, exist_ok=True)
    target = args.results / f"gpu_{args.name}"
    content = {"facts": facts, "steps": steps.outcomes, "rows": rows}
    target.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# On a GPU: {args.name}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| Step | outcome | s |", "| --- | --- | ---: |"]
    lines += [f"| {s['step']} | {s['outcome']} | {s['seconds']} |" for s in steps.outcomes]
    lines += [
        "",
        *predictions_table(rows),
        "",
        "| Reading | ms | wall ms | TFLOP/s | TB/s |",
        "| --- " * 5 + "|",
    ]
    for row in rows:
        numbers = (f"{row[k]:.3g}" if k in row else "" for k in ("ms", "wall_ms", "tflops", "tb_s"))
        lines.append(
            f"| {row['name']}{': ' + row['error'] if 'error' in row else ''} | {' | '.join(numbers)} |"
        )
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"{target}.md")


def section(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    readings = Readings(torch.device(args.device), args.smoke)
    try:
        if args.section in ("raster", "denoiser"):
            readings.ceilings()
        SECTIONS[args.section](readings)
    finally:
        if args.out is not None:
            args.out.write_text(json.dumps(readings.rows))
    return int(any("error" in row for row in readings.rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="run", help="of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds")
    parser.add_argument("--section", choices=tuple(SECTIONS))
    parser.add_argument("--out", type=Path, help="of --section: JSON")
    parser.add_argument("--results", type=Path, default=ROOT / "eval" / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: no NVIDIA GPU, or torch was built without CUDA; --device cpu --smoke rehearses"
        )
    if args.section:
        return section(args)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    steps = Steps(args.seconds, {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})
    with tempfile.TemporaryDirectory() as folder:
        rows = all_steps(steps, args, Path(folder))
        report(args, steps, rows)
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())
