"""Pages and pictures: a report on several methods, with intervals, paired differences and pictures side by side; a
gallery of assets; a sheet of one asset's pictures.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.evaluation.engine import Plan
from diff2to3.evaluation.protocol import Protocol
from diff2to3.evaluation.subjects import Source, Subject
from diff2to3.evaluation.summary import METRICS, paired_differences
from diff2to3.files import write_atomic

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ccc; }
.best { font-weight: 600; } small { color: #666; } .pictures td { padding: 2px; text-align: center; }
.pictures img { display: block; width: 100%; max-width: 300px; image-rendering: auto; }
@media (prefers-color-scheme: dark) { body { background: #151515; color: #ddd; } small { color: #999; } }
"""


def write_report(
    folder: Path,
    tables: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, Source],
    truth: Source,
    rules: Protocol,
    ids: Sequence[str],
    device: torch.device,
    num_views: int = 2,
) -> Path:
    """``folder``/report.html and its pictures, of ``ids`` and the first ``num_views`` views. Returns its path."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = [_picture_row(pictures, Subject(i, rules, truth, device), methods, num_views) for i in ids]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ["truth", *methods])
    body = [
        "<h1>Comparison</h1>",
        f"<p>Truth: {html.escape(truth.name)}. {html.escape(_protocol_line(rules))}</p>",
        _numbers(tables),
        _differences(tables),
        _remarks(tables),
        f'<table class="pictures"><tr>{heads}</tr>{"".join(rows)}</table>',
    ]
    write_atomic(folder / "report.html", page("Comparison", body))
    return folder / "report.html"


def page(title: str, body: Sequence[str]) -> str:
    """An HTML page of elements."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n<body>{chr(10).join(body)}</body></html>\n"
    )


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
    write_atomic(path, page(title, body))


@dataclass(frozen=True)
class Sheet:
    """A picture of one asset: a row each of the truth and of methods, by key; with ``difference``, then of white minus
    three times the first method's difference to the truth. In generation the photo comes first.
    """

    asset_id: str
    path: str
    methods: tuple[str, ...]
    difference: bool = False


def save_sheet(plan: Plan, sheet: Sheet) -> dict[str, Any]:
    """Write a sheet of at most four views, made once more: to keep pictures of all assets would take more room than it
    saves time. For :func:`diff2to3.evaluation.parallel.run_items`.
    """
    subject, sources = plan.subject(sheet.asset_id), dict(plan.methods)
    shown = [subject.truth, *(sources[key].pictures(subject, subject.cameras) for key in sheet.methods)]
    rows = [one.images[:4].cpu() for one in shown]
    if sheet.difference:
        rows.append((1 - 3 * (rows[1] - rows[0]).abs()).clamp(0, 1))
    cells = torch.stack(rows)  # [rows, views, H, W, 3]
    _, _, height, width, _ = cells.shape
    image = cells.permute(0, 2, 1, 3, 4).reshape(len(rows) * height, -1, 3)
    if plan.rules.task == "generation":
        first = torch.ones(len(image), width, 3)
        first[:height] = subject.photo_pictures.images[0].cpu()
        image = torch.cat([first, image], 1)
    write_atomic(Path(sheet.path), png(image))
    return {}


def png(image: Tensor) -> bytes:
    """An image [H, W, 3] in [0, 1] as a file."""
    stream = BytesIO()
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(stream, "PNG")
    return stream.getvalue()


def _protocol_line(rules: Protocol) -> str:
    return (
        f"{rules.task}, {rules.cameras.num_views} views of {rules.resolution} pixels, "
        f"protocol sha256 {rules.digest()[:16]}"
    )


def _numbers(tables: Mapping[str, Mapping[str, Any]]) -> str:
    shown = [m for m in METRICS if any(m in t["metrics"] for t in tables.values())]
    heads = "".join(f"<th>{html.escape(METRICS[m][0])} {'↑' if METRICS[m][1] else '↓'}</th>" for m in shown)
    lines = [f"<table><tr><th>Method</th>{heads}<th>Assets</th></tr>"]
    for name, table in tables.items():
        cells = "".join(_number(tables, name, metric) for metric in shown)
        count = table["num_assets"]
        lines.append(
            f"<tr><td>{html.escape(name)}</td>{cells}<td>{count['scored']} of {count['expected']}</td></tr>"
        )
    lines.append(
        "</table><p><small>In brackets: 95 % interval, bootstrap over assets. Bold: best.</small></p>"
    )
    return "\n".join(lines)


def _number(tables: Mapping[str, Mapping[str, Any]], name: str, metric: str) -> str:
    held = tables[name]["metrics"].get(metric)
    if held is None:
        return "<td>—</td>"
    _, more, factor, digits = METRICS[metric]
    known = [t["metrics"][metric]["value"] for t in tables.values() if metric in t["metrics"]]
    best = held["value"] == (max if more else min)(known) and len(known) > 1
    text = f"{held['value'] * factor:.{digits}f}"
    if held["low"] is not None:
        low, high = (f"{held[k] * factor:.{digits}f}" for k in ("low", "high"))
        text += f"<br><small>[{low}, {high}]</small>"
    return f"<td{' class=best' if best else ''}>{text}</td>"


def _differences(tables: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(tables)
    if len(names) < 2:
        return ""
    lines = [f"<h2>Difference to {html.escape(names[0])}, asset by asset</h2><table>"]
    lines.append("<tr><th>Method</th><th>Metric</th><th>Difference</th><th>95 % interval</th><th></th></tr>")
    for other in names[1:]:
        for metric, e in paired_differences(tables[names[0]]["assets"], tables[other]["assets"]).items():
            heading, more, factor, digits = METRICS[metric]
            verdict, interval = "", "—"
            if e.low is not None and e.high is not None:
                interval = f"{e.low * factor:+.{digits}f} to {e.high * factor:+.{digits}f}"
                if e.low > 0 or e.high < 0:
                    verdict = "better" if (e.low > 0) == more else "worse"
            cells = (other, heading, f"{e.value * factor:+.{digits}f}", interval, verdict)
            lines.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _remarks(tables: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, table in tables.items():
        lines += [f"{name}: {i}: {error}" for i, error in table["errors"].items()]
    lines += sorted({note for table in tables.values() for note in table["notes"]})
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _picture_row(folder: Path, subject: Subject, methods: Mapping[str, Source], num_views: int) -> str:
    rows = []
    shown: list[Tensor | str] = [subject.truth.images]
    for method in methods.values():
        try:
            shown.append(method.pictures(subject, subject.cameras).images)
        except (InputError, ValueError) as error:
            shown.append(str(error).splitlines()[0])
    for view in range(min(num_views, len(subject.truth.images))):
        cells = [
            f"<td><small>{html.escape(item)}</small></td>"
            if isinstance(item, str)
            else f'<td><img loading="lazy" alt="" src="pictures/{_save(folder, item[view])}"></td>'
            for item in shown
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = f'<tr><td colspan="{len(shown)}"><small>{html.escape(subject.id)}</small></td></tr>'
    return title + "".join(rows)


def _save(folder: Path, image: Tensor) -> str:
    """Write a picture under the hash of its bytes; returns its name."""
    content = png(image)
    name = f"{hashlib.sha256(content).hexdigest()[:20]}.png"
    if not (folder / name).is_file():
        write_atomic(folder / name, content)
    return name
