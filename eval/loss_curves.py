"""Draw a training run's log as a picture: python eval/loss_curves.py RUN/log.jsonl -o curves.png

One panel for each kind of number: those of training (smoothed, over the values themselves) and those of
validation, against the optimiser step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 420, 260, 44
#: What a record holds besides numbers worth drawing.
SKIPPED = {"step", "kind", "time", "items_per_s", "s_per_step", "busy", "items"}
#: Drawn on a logarithmic axis.
LOGARITHMIC = {"loss", "mse", "dice", "cross_entropy", "kl", "l1", "l2", "grad_norm", "lr"}


def read(path: Path) -> dict[str, list[tuple[float, float]]]:
    """name -> (step, value) of every number in the log; validation's are called "validate: name"."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prefix = "validate: " if record.get("kind") == "validate" else ""
        for name, value in record.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in SKIPPED and number and math.isfinite(value):
                series.setdefault(prefix + name, []).append((record["step"], value))
    return {name: points for name, points in series.items() if len(points) > 1}


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the ``window`` values around each."""
    half = window // 2
    parts = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def panel(name: str, points: list[tuple[float, float]]) -> Image.Image:
    """One series against the step."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    steps, values = [p[0] for p in points], [p[1] for p in points]
    logarithmic = name in LOGARITHMIC and min(values) > 0
    shown = [math.log10(v) for v in values] if logarithmic else values
    low, high = min(shown), max(shown)
    high = high if high > low else low + 1
    right, bottom = WIDTH - 12, HEIGHT - MARGIN + 14

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (right - MARGIN)
        return x, bottom - (value - low) / (high - low) * (bottom - 28)

    for part in range(5):
        value = low + part / 4 * (high - low)
        y = place(steps[0], value)[1]
        draw.line([(MARGIN, y), (right, y)], fill=(225, 225, 225))
        draw.text((3, y - 6), f"{10**value if logarithmic else value:.3g}", fill=(90, 90, 90))
    draw.text((MARGIN, 6), name + (" (log)" if logarithmic else ""), fill="black")
    draw.text((MARGIN, bottom + 6), f"step {steps[0]:g}", fill=(90, 90, 90))
    draw.text((right - 60, bottom + 6), f"{steps[-1]:g}", fill=(90, 90, 90))
    if len(points) > 20:
        draw.line([place(*p) for p in zip(steps, shown, strict=True)], fill=(190, 208, 235))
        shown = smooth(shown, max(len(shown) // 25, 3))
    draw.line([place(*p) for p in zip(steps, shown, strict=True)], fill=(31, 90, 180), width=2)
    return image


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        series = read(args.log)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.log}: {error}", file=sys.stderr)
        return 2
    if not series:
        print(f"error: {args.log}: holds no series of numbers", file=sys.stderr)
        return 2
    panels = [panel(name, points) for name, points in series.items()]
    columns = min(args.columns, len(panels))
    sheet = Image.new("RGB", (columns * WIDTH, -(-len(panels) // columns) * HEIGHT), "white")
    for i, picture in enumerate(panels):
        sheet.paste(picture, (i % columns * WIDTH, i // columns * HEIGHT))
    sheet.quantize(32).save(args.out, "PNG", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
