"""What programs that score a model on a folder of assets write: one JSON, tables by pack, the worst with pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diff2to3.assets import AssetRecord
from diff2to3.evaluation.assets import pack_of
from diff2to3.evaluation.engine import Plan
from diff2to3.evaluation.parallel import run_items
from diff2to3.evaluation.report import Sheet, save_sheet, write_gallery
from diff2to3.evaluation.summary import METRICS, Scores, estimates_of, paired_differences
from diff2to3.evaluation.tables import device_name, versions

FORMAT = 1
Row = Mapping[str, Any]

#: metric → (heading, whether more is better, digits), in the order of tables.
COLUMNS: dict[str, tuple[str, bool, int]] = {
    "psnr": ("PSNR", True, 2),
    "psnr_foreground": ("PSNR fg", True, 2),
    "ssim": ("SSIM", True, 4),
    "lpips": ("LPIPS", False, 4),
    "ciede2000": ("ΔE00", False, 2),
    "structure_iou": ("structure IoU", True, 4),
    "voxel_iou": ("voxel IoU", True, 4),
    "chamfer": ("Chamfer", False, 4),
    "f_score": ("F-score", True, 4),
    "clip": ("CLIP", True, 2),
    "fd_inception": ("FD incep", False, 2),
    "kd_inception": ("KD incep", False, 5),
    "fd_dinov2": ("FD dinov2", False, 2),
    "kd_dinov2": ("KD dinov2", False, 5),
    "num_voxels": ("voxels", True, 0),
    "seconds": ("s", False, 1),
}


def mean_of(rows: Mapping[str, Row], columns: Sequence[str] | None = None) -> dict[str, float]:
    """The mean over assets of every metric, over the assets for which it is defined."""
    found = {}
    for key in columns or COLUMNS:
        values = [row[key] for row in rows.values() if row.get(key) is not None]
        if values:
            found[key] = float(np.mean(np.asarray(values, np.float64)))
    return found


def intervals_of(rows: Mapping[str, Row]) -> dict[str, list[float]]:
    """95 % intervals of the means, by bootstrap over assets."""
    estimates = estimates_of(rows, metrics=COLUMNS)
    return {k: [e.low, e.high] for k, e in estimates.items() if e.low is not None and e.high is not None}


def paired(
    ours: Mapping[str, Row], other: Mapping[str, Row], mean: Row, other_mean: Row
) -> dict[str, dict[str, Any]]:
    """metric → {mean, low, high, better}: ours − other over the assets that both have, with a 95 % interval; for FD and
    KD, which are of whole sets, the difference of ``mean`` and ``other_mean`` alone.
    """
    differences = paired_differences(other, ours)
    found: dict[str, dict[str, Any]] = {}
    for metric, (_, more_is_better, _, _) in METRICS.items():
        if metric in differences:
            e = differences[metric]
            entry: dict[str, Any] = {"mean": e.value, "low": e.low, "high": e.high}
        elif metric in mean and metric in other_mean:
            entry = {"mean": mean[metric] - other_mean[metric]}
        else:
            continue
        found[metric] = entry | {"better": entry["mean"] > 0 if more_is_better else entry["mean"] < 0}
    return found


def by_pack(records: Sequence[AssetRecord], rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """pack → means and num_assets, of the assets that have scores."""
    packs: dict[str, dict[str, Row]] = {}
    for record in records:
        if record.id in rows:
            packs.setdefault(pack_of(record) or "(no pack)", {})[record.id] = rows[record.id]
    return {name: {"num_assets": float(len(held)), **mean_of(held)} for name, held in sorted(packs.items())}


def worst(rows: Mapping[str, Row], metric: str, count: int = 10) -> list[str]:
    """The ids with the least ``metric``, worst first."""
    known = [(row[metric], name) for name, row in rows.items() if row.get(metric) is not None]
    return [name for _, name in sorted(known)[:count]]


def result_of(
    program: str,
    records: Sequence[AssetRecord],
    scores: Scores,
    *,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Everything a result says, as plain values. Only ``run`` differs between equal runs."""
    rows, failed = scores.values, scores.errors
    return {
        "format": FORMAT,
        "program": program,
        **settings,
        "num_assets": {"asked": len(records), "scored": len(rows), "failed": len(failed)},
        "mean": mean_of(rows),
        "interval": intervals_of(rows),
        "packs": by_pack(records, rows),
        "assets": rows,
        "failed": failed,
        "notes": list(notes),
        "run": {
            "date": time.strftime("%Y-%m-%d"),
            "device": device_name(device),
            "seconds": round(seconds, 1),
            "versions": versions(),
        },
    }


def write_sheets(
    folder: Path,
    plan: Plan,
    names: Sequence[str],
    result: Mapping[str, Any],
    tables: Sequence[str],
    *,
    title: str,
    intro: str,
    sheet: Sheet,
    workers: int,
) -> Path:
    """A gallery of some assets: their numbers and their sheets, each as ``sheet`` is. ``sheet.path`` is how names of
    pictures begin; older ones of such names are removed.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"{sheet.path}[0-9]*.png"):
        old.unlink()
    items, shown = [], []
    for number, name in enumerate(names, 1):
        picture = f"{sheet.path}{number:02d}.png"
        one = replace(sheet, asset_id=name, path=str(folder / picture))
        items.append((f"picture of {name}", one))
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in result["assets"][name].items() if v is not None)
        shown.append((name, numbers, picture))
    run_items(None, save_sheet, plan, items, workers=workers, label="pictures")
    write_gallery(folder / "index.html", title, [intro], tables, shown)
    return folder / "index.html"


def text_table(rows: Mapping[str, Mapping[str, float]], first: str) -> str:
    """A table for a terminal: a line a name, the columns that any of them has."""
    keys = [key for key in COLUMNS if any(key in row for row in rows.values())]
    heads = [first, *(["assets"] if any("num_assets" in r for r in rows.values()) else [])]
    lines = [heads + [COLUMNS[k][0] for k in keys]]
    for name, row in rows.items():
        counts = [f"{row['num_assets']:.0f}" if "num_assets" in row else ""] if len(heads) > 1 else []
        lines.append([name, *counts, *(_cell(row, k) for k in keys)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = (
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in text)


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    return "—" if value is None else f"{value:.{COLUMNS[key][2]}f}"


def markdown_table(rows: Mapping[str, Mapping[str, float]], first: str) -> str:
    """The same in Markdown."""
    keys = [key for key in COLUMNS if any(key in row for row in rows.values())]
    counted = any("num_assets" in row for row in rows.values())
    heads = [f"{COLUMNS[k][0]} {'↑' if COLUMNS[k][1] else '↓'}" for k in keys]
    lines = [[first, *(["assets"] if counted else []), *heads]]
    lines.append(["---"] * len(lines[0]))
    for name, row in rows.items():
        counts = [f"{row['num_assets']:.0f}" if "num_assets" in row else ""] if counted else []
        lines.append([name, *counts, *(_cell(row, k) for k in keys)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
