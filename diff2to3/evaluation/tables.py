"""Results as JSON and Markdown: ours beside the paper's rows."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diff2to3 import __version__
from diff2to3.errors import InputError
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.summary import METRICS, Estimate, Scores

FORMAT = 1
_GENERATION = ("clip", "fd_inception", "kd_inception", "fd_dinov2", "kd_dinov2")
#: The paper's tables as printed: title, metrics, and rows (name, numbers, parameters).
PAPER: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, tuple[str, ...], str], ...]]] = {
    "reconstruction": (
        "Table 1: reconstruction, Toys4k",
        ("ssim", "psnr", "lpips"),
        (
            ("GaussianAnything", ("0.9475", "26.73", "0.06397"), ""),
            ("TRELLIS", ("0.9712", "30.14", "0.02901"), ""),
            ("Diff2to3", ("0.9773", "31.86", "0.02633"), ""),
        ),
    ),
    "generation": (
        "Table 2: image-conditioned generation, Toys4k",
        _GENERATION,
        (
            ("Shap-E", ("86.32", "133.96", "8.23", "792.43", "147.72"), "300 M"),
            ("LGM", ("87.23", "65.89", "1.33", "662.91", "75.49"), "415 M"),
            ("InstantMesh", ("89.95", "45.38", "2.54", "392.15", "24.48"), "866 M"),
            ("GaussianAnything", ("85.09", "65.31", "8.07", "702.03", "71.72"), "586 M"),
            ("3DTopia-XL", ("86.10", "64.39", "1.16", "619.11", "64.28"), "909 M"),
            ("TRELLIS", ("98.02", "24.57", "0.0421", "146.14", "8.74"), "770 M"),
            ("Diff2to3", ("98.45", "19.78", "0.0394", "122.90", "3.78"), "821 M"),
        ),
    ),
    "ablation": (
        "Table 3: ablation, Toys4k",
        _GENERATION,
        (
            ("Exp 1: DINOv2 VAE, DiT, APE", ("98.02", "24.57", "0.0421", "146.14", "8.74"), ""),
            ("Exp 2: + 2to3-VAE", ("96.96", "30.24", "0.0523", "210.50", "5.58"), ""),
            ("Exp 3: + SMDiT", ("97.11", "28.74", "0.0496", "159.34", "4.11"), ""),
            ("Exp 4: + MARoPE", ("98.45", "19.78", "0.0394", "122.90", "3.78"), ""),
        ),
    ),
}


def build_table(
    settings: Mapping[str, Any],
    rules: Protocol,
    scores: Scores,
    estimates: Mapping[str, Estimate],
    *,
    device: torch.device,
    notes: Sequence[str],
    num_expected: int,
) -> dict[str, Any]:
    """Everything that a result says, as plain values. Only ``run`` differs between equal runs."""
    rows = {i: {k: v for k, v in row.items() if k in METRICS} for i, row in scores.values.items()}
    return {
        "format": FORMAT,
        "task": rules.task,
        "method": settings["method"],
        "truth": settings["truth"],
        "protocol": rules.to_dict(),
        "protocol_sha256": rules.digest(),
        "weights": settings["weights"],
        "num_assets": {"expected": num_expected, "scored": len(rows), "failed": len(scores.errors)},
        "metrics": {name: {**asdict(e), "more_is_better": METRICS[name][1]} for name, e in estimates.items()},
        "assets": rows,
        "errors": scores.errors,
        "notes": list(notes),
        "run": {"date": time.strftime("%Y-%m-%d"), "device": device_name(device), "versions": versions()},
    }


def device_name(device: torch.device) -> str:
    """Such as ``NVIDIA H100`` or ``CPU x86_64``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} {platform.machine()}"


def versions() -> dict[str, str]:
    return {"diff2to3": __version__, "torch": torch.__version__, "python": platform.python_version()}


def read_table(path: str | Path) -> dict[str, Any]:
    """A ``table.json``. InputError where it is not one."""
    try:
        table = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a result: {error}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT or "metrics" not in table:
        raise InputError(f"{path}: not a result (table.json) of format {FORMAT}")
    return table


def markdown(table: Mapping[str, Any]) -> str:
    """The paper's rows and ours, then all our metrics with intervals, then what they were made with."""
    sections = ["reconstruction"] if table["task"] == "reconstruction" else ["generation", "ablation"]
    parts = [_paper_section(table, name) for name in sections]
    parts += [_all_metrics(table), _about(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _paper_section(table: Mapping[str, Any], section: str) -> str:
    title, metrics, rows = PAPER[section]
    sizes = any(size for _, _, size in rows)
    heads = ["Method", *(f"{METRICS[m][0]} {'↑' if METRICS[m][1] else '↓'}" for m in metrics)]
    lines = [f"**{title}**", "", _row([*heads, *(["Parameters"] if sizes else [])])]
    lines.append(_row(["---"] * (len(heads) + sizes)))
    for name, numbers, size in rows:
        lines.append(_row([f"{name} (paper)", *numbers, *([size] if sizes else [])]))
    ours = [_cell(table, m) for m in metrics]
    lines.append(_row([f"**{table['method']['name']}**", *ours, *([""] if sizes else [])]))
    if not _like_the_paper(table):
        lines += [
            "",
            f"The paper's rows are on 1,000 assets of Toys4k at 512 x 512; {_what(table)}: not to be compared.",
        ]
    return "\n".join(lines)


def _like_the_paper(table: Mapping[str, Any]) -> bool:
    """Whether a result is on the data and at the size of the paper's."""
    on_toys4k = str(table["truth"]["name"]).startswith("toys4k:")
    return on_toys4k and bool(
        table["num_assets"]["scored"] == 1000 and table["protocol"]["resolution"] == 512
    )


def _what(table: Mapping[str, Any]) -> str:
    size = table["protocol"]["resolution"]
    return f"this result is on {table['num_assets']['scored']} of {table['truth']['name']} at {size} x {size}"


def _all_metrics(table: Mapping[str, Any]) -> str:
    lines = [_row(["Metric", "Value", "95 % interval", "Noise", "Assets"]), _row(["---"] * 5)]
    for name, (heading, _, factor, digits) in METRICS.items():
        held = table["metrics"].get(name)
        if held is None:
            continue
        low, high, noise = (
            None if held[k] is None else f"{held[k] * factor:.{digits}f}" for k in ("low", "high", "noise")
        )
        interval = f"{low} to {high}" if low is not None else "—"
        lines.append(_row([heading, _cell(table, name), interval, noise or "—", str(held["count"])]))
    return "\n".join(lines)


def _about(table: Mapping[str, Any]) -> str:
    counts, run = table["num_assets"], table["run"]
    lines = [
        f"{run['date']}, {run['device']}, "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        f"method {table['method']['name']} (sha256 {table['method']['sha256'][:16]}), "
        f"truth {table['truth']['name']}, protocol sha256 {table['protocol_sha256'][:16]}",
        f"{counts['scored']} of {counts['expected']} assets scored, {counts['failed']} failed",
    ]
    for name, weights in table["weights"].items():
        lines.append(f"{name}: {weights['source']}, sha256 {weights['sha256'][:16]}, {weights['version']}")
    for name, held in table["metrics"].items():
        if name.startswith("kd_"):
            d = held["details"]
            lines.append(f"{name}: {d['num_subsets']} subsets of {d['subset_size']}, seed {d['seed']}")
    lines += [f"failed: {asset_id}: {error}" for asset_id, error in table["errors"].items()]
    return "\n".join(f"- {line}" for line in [*lines, *table["notes"]])


def _cell(table: Mapping[str, Any], metric: str) -> str:
    held = table["metrics"].get(metric)
    _, _, factor, digits = METRICS[metric]
    return "—" if held is None else f"{held['value'] * factor:.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
