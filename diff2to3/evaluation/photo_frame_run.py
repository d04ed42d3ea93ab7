"""What eval/photo_frame.py works through: assets photographed, generated and compared, a line per asset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diff2to3.assets.catalogue import load_asset
from diff2to3.assets.records import AssetRecord
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import find_records, pack_of
from diff2to3.evaluation.models import Generator
from diff2to3.evaluation.photo_frame import compared, part_of, summarised, truth_of
from diff2to3.files import write_atomic
from diff2to3.pipeline import ImageTo3D

PARTS = {"choose": (0,), "report": (1, 2), "all": (0, 1, 2)}


@dataclass(frozen=True)
class Run:
    """A model over assets. ``lines``: where finished assets are kept."""

    model: str
    seed: int
    device: str
    lines: Path

    def settings(self) -> dict[str, Any]:
        weights = Generator(self.model, self.device).fingerprint()
        return {"model": Path(self.model).name, "weights": weights[:16], "seed": self.seed}

    @cached_property
    def network(self) -> ImageTo3D:
        return ImageTo3D.from_pretrained(self.model, device=self.device)

    def over(
        self, specs: Sequence[str], split: str | None, part: str, limit: int | None
    ) -> list[dict[str, Any]]:
        """A row for every asset: its scores, or its error. InputError where the lines are of another run."""
        records = [r for i, r in find_records(specs, split).items() if part_of(i) in PARTS[part]]
        # in an order that is the same for any limit, and in which packs are mixed
        records.sort(key=lambda record: hashlib.sha256(b"order" + record.id.encode()).hexdigest())
        done = self.finished()
        rows = []
        for record in tqdm(records[:limit], desc="assets", unit="asset", disable=None):
            if record.id not in done:
                done[record.id] = self.row(record)
                with open(self.lines, "a", encoding="utf-8") as file:
                    file.write(json.dumps(done[record.id]) + "\n")
            rows.append(done[record.id])
        return rows

    def finished(self) -> dict[str, dict[str, Any]]:
        """Rows by asset, from a run before; the first line says which."""
        first = json.dumps(self.settings())
        if not self.lines.is_file():
            self.lines.parent.mkdir(parents=True, exist_ok=True)
            self.lines.write_text(first + "\n", encoding="utf-8")
        head, *lines = self.lines.read_text(encoding="utf-8").splitlines()
        if head != first:
            raise InputError(f"{self.lines}: is of another run ({head}); name another --out, or remove it")
        rows = [
            json.loads(line) for line in lines if line.endswith("}")
        ]  # a killed run may leave half a line
        return {row["asset"]: row for row in rows}

    def row(self, record: AssetRecord) -> dict[str, Any]:
        own = {"asset": record.id, "pack": pack_of(record)}
        resolution = int(self.network.networks.latent_flow.config.resolution)
        try:
            truth = truth_of(load_asset(record), record.id, resolution, self.seed)
            result = self.network(truth.picture, seed=self.seed)
        except InputError as error:
            return {**own, "error": str(error)}
        return {**own, **compared(result, truth), "seconds": round(sum(result.seconds.values()), 3)}


def tables(out: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any], part: str) -> str:
    """Write OUT and the table beside it; returns the table."""
    scored = [row for row in rows if "error" not in row]
    summary = summarised(scored)
    packs = {
        pack: {"count": len(own), **{n: held["mean"] for n, held in summarised(own).items()}}
        for pack in sorted({row["pack"] for row in scored})
        if (own := [row for row in scored if row["pack"] == pack])
    }
    failed = [row for row in rows if "error" in row]
    found = {**settings, "part": part, "summary": summary, "packs": packs, "failed": failed, "assets": scored}
    write_atomic(out, json.dumps(found, indent=1) + "\n")
    lines = [
        f"# Photo frame: {settings['model']}, {len(scored)} assets ({part}), {len(failed)} failed",
        "",
        "| score | mean | median | 95 % interval of the mean |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, held in summary.items():
        low, high = (("-" if held[key] is None else f"{held[key]:.3f}") for key in ("low", "high"))
        lines.append(f"| {name} | {held['mean']:.3f} | {held['median']:.3f} | {low} to {high} |")
    shown = [name for name in ("psnr", "ssim", "voxel_iou") if name in summary]
    lines += ["", f"| pack | assets | {' | '.join(shown)} |", "| --- | ---: |" + " ---: |" * len(shown)]
    for pack, held in packs.items():
        numbers = (f"{held[name]:.3f}" if name in held else "-" for name in shown)
        lines.append(f"| {pack} | {held['count']} | {' | '.join(numbers)} |")
    table = "\n".join(lines) + "\n"
    write_atomic(out.with_suffix(".md"), table)
    return table
