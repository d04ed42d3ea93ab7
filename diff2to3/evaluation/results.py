"""What programs that score a model on a folder of assets write: one JSON, tables by pack, the worst with pictures."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diff2to3.assets import AssetRecord
from diff2to3.evaluation.assets import pack_of
from diff2to3.evaluation.report import STYLE
from diff2to3.evaluation.summary import bootstrap_mean
from diff2to3.evaluation.tables import device_name, versions
from diff2to3.files import write_atomic

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


def intervals_of(rows: Mapping[str, Row], seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals of the means, by bootstrap over assets."""
    found = {}
    for key in mean_of(rows):
        estimate = bootstrap_mean([r[key] for r in rows.values() if r.get(key) is not None], seed)
        if estimate.low is not None and estimate.high is not None:
            found[key] = [estimate.low, estimate.high]
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
    outcomes: Mapping[str, Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Everything a result says, as plain values. Only ``run`` differs between equal runs."""
    rows = {name: row["values"] for name, row in sorted(outcomes.items()) if "values" in row}
    failed = {name: row["error"] for name, row in sorted(outcomes.items()) if "values" not in row}
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


def write_gallery(
    path: Path, title: str, intro: Sequence[str], tables: Sequence[str], items: Sequence[tuple[str, str, str]]
) -> None:
    """An HTML page: paragraphs, tables (as text), then (caption, text, picture relative to the page) each."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in intro]
    body += [f"<pre>{html.escape(table)}</pre>" for table in tables]
    for caption, text, picture in items:
        body.append(f"<h3>{html.escape(caption)}</h3><p><small>{html.escape(text)}</small></p>")
        body.append(f'<img loading="lazy" style="max-width:100%" alt="" src="{html.escape(picture)}">')
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n<body>{chr(10).join(body)}</body></html>\n"
    )
    write_atomic(path, page)
