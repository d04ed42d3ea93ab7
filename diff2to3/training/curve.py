"""Curves of a run's log as a PNG, one panel a value."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diff2to3.errors import InputError
from diff2to3.files import write_atomic

_PANEL = (640, 300)
_MARGINS = (76, 34, 16, 34)  # left, top, right, bottom
_COLORS = ("#1f5fa8", "#c44e2b", "#2f8f4e", "#7a4fa3", "#8a6d1c", "#3b3b3b")
#: Of a training record, what is not drawn unless asked for.
_TIMES = {"items_per_s", "s_per_step", "busy", "peak_gb"}


@dataclass(frozen=True)
class Curve:
    """Values over steps; ``points`` draws the points as well, for values that are few."""

    label: str
    steps: list[int]
    values: list[float]
    points: bool = False


def read_log(run: Path) -> dict[str, Curve]:
    """Name ("loss", "validate/psnr") -> curve, from a run folder or a log.jsonl."""
    path = run / "log.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, kind = record.pop("step"), record.pop("kind")
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: not a record of a run") from error
        record.pop("time", None)
        for name, value in record.items():
            if kind != "event" and isinstance(value, (int, float)):
                full = name if kind == "train" else f"{kind}/{name}"
                curve = curves.setdefault(full, Curve(str(run), [], [], kind != "train"))
                curve.steps.append(step)
                curve.values.append(float(value))
    if not curves:
        raise InputError(f"{path}: holds no numbers yet")
    return curves


def plot(runs: Sequence[Path], output: Path, names: Sequence[str] = (), columns: int = 2) -> list[str]:
    """Draw ``names`` (all losses and validation numbers if none is given) of several runs; returns what was
    drawn."""
    logs = [(run, read_log(run)) for run in runs]
    known = list(dict.fromkeys(name for _, log in logs for name in log))
    chosen = list(names) or [name for name in known if name not in _TIMES]
    for name in chosen:
        if name not in known:
            raise InputError(f"no value {name!r} in the log; there are {', '.join(known)}")
    columns = min(columns, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * _PANEL[0], rows * _PANEL[1]), "white")
    for i, name in enumerate(chosen):
        shown = [
            Curve(run.name or str(run), c.steps, c.values, c.points)
            for run, log in logs
            if (c := log.get(name)) is not None
        ]
        sheet.paste(draw_panel(name, shown), (i % columns * _PANEL[0], i // columns * _PANEL[1]))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    write_atomic(output, stream.getvalue())
    return chosen


def draw_panel(title: str, curves: Sequence[Curve]) -> Image.Image:
    """One panel with axes; several curves have a legend."""
    image = Image.new("RGB", _PANEL, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    left, top, right, bottom = _MARGINS[0], _MARGINS[1], _PANEL[0] - _MARGINS[2], _PANEL[1] - _MARGINS[3]
    finite = [v for curve in curves for v in curve.values if math.isfinite(v)]
    last = max((step for curve in curves for step in curve.steps), default=1)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    y_ticks = ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x_ticks = ticks(0, last)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / max(last, x_ticks[-1])
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for value in y_ticks:
        y = place(0, value)[1]
        draw.line([(left, y), (right, y)], fill="#e4e4e4")
        draw.text((left - 6, y), f"{value:g}", fill="#444444", font=font, anchor="rm")
    for step in x_ticks:
        x = place(step, low)[0]
        draw.line([(x, bottom), (x, bottom + 4)], fill="#444444")
        draw.text((x, bottom + 7), f"{step:g}", fill="#444444", font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#444444")
    draw.text((left, 8), title, fill="black", font=ImageFont.load_default(15))
    for i, curve in enumerate(curves):
        color = _COLORS[i % len(_COLORS)]
        line = [place(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
        if len(line) > 1:
            draw.line(line, fill=color, width=2)
        for x, y in line if curve.points or len(line) == 1 else []:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
        if len(curves) > 1:
            draw.text((right - 4, top + 4 + 16 * i), curve.label, fill=color, font=font, anchor="rt")
    return image


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) that span [low, high]."""
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-30):  # flat, as far as labels can tell
        span = abs(low) or 1.0
        low, high = low - span / 2, high + span / 2
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
