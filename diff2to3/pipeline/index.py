"""What lies beside the assets of a run: index.json, and a contact sheet with each input beside its result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diff2to3.files import write_atomic

INDEX, SHEET = "index.json", "contact_sheet.png"
METADATA = "metadata.json"
#: Pixels a side of a picture in the contact sheet, and how many results it holds at most.
TILE, MAX_TILES = 160, 400
LINE = 14


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file, or none of ours."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_index(folder: Path, made: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> None:
    """Every asset of the folder: those of earlier runs, as long as their metadata is there, and those made now.

    assets  name, and its own folder; input, seed, files, warnings
    failed  of this run: input, error
    """
    names = {entry["name"] for entry in made}
    earlier = read_json(folder / INDEX).get("assets")
    kept = [
        entry
        for entry in (earlier if isinstance(earlier, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry["name"] not in names
        and (folder / entry["name"] / METADATA).is_file()
    ]
    content = {"format": "diff2to3-index", "version": 1, "assets": [*kept, *made], "failed": list(failed)}
    write_atomic(folder / INDEX, json.dumps(content, indent=2) + "\n")


class ContactSheet:
    """Pairs of input and result, with names, in rows; of this run."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, Image.Image | None, Image.Image]] = []

    def add(self, name: str, seen: Image.Image | None, result: np.ndarray) -> None:
        """``seen`` (RGB or RGBA): the input, or None for a text; ``result``: uint8 [H, W, 3]."""
        if len(self.pairs) < MAX_TILES:
            self.pairs.append((name, None if seen is None else tile(seen), tile(Image.fromarray(result))))

    def write(self, path: Path) -> None:
        columns = max(1, round(math.sqrt(len(self.pairs) / 2)))
        rows = -(-len(self.pairs) // columns)
        sheet = Image.new("RGB", (columns * 2 * TILE, rows * (TILE + LINE)), "white")
        pen = ImageDraw.Draw(sheet)
        for k, (name, seen, result) in enumerate(self.pairs):
            x, y = k % columns * 2 * TILE, k // columns * (TILE + LINE)
            if seen is not None:
                sheet.paste(seen, (x, y))
            sheet.paste(result, (x + TILE, y))
            label = name if len(name) <= 50 else name[:49] + "~"
            # the built-in font has no more letters on every version of Pillow
            pen.text((x + 3, y + TILE + 1), label.encode("ascii", "replace").decode(), fill="black")
        sheet.save(path, "PNG")


def tile(image: Image.Image) -> Image.Image:
    """Fitted into a square of white."""
    small = image.convert("RGBA")
    small.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (TILE, TILE), "white")
    square.paste(small, ((TILE - small.width) // 2, (TILE - small.height) // 2), small)
    return square
