"""A small source of assets, good and bad, and a dataset prepared from it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diff2to3.config import config_from_dict
from diff2to3.data.executors import InlineExecutor
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig

#: Small enough for a second an asset, with every kind of view and feature.
SETTINGS = {
    "seed": 3,
    "shard_size": 3,
    "render": {"lighting": {"mode": "unlit"}, "supersample": 1},
    "view_sets": {
        "input": {"size": 48, "depths": True, "cameras": {"num_views": 6}},
        "cond": {"size": 32, "cameras": {"kind": "fitted", "num_views": 4, "fov_range": [20, 40]}},
    },
    "resolutions": [16, 32],
    "points": [200],
    "features": {
        "rgb": {"provider": "rgb", "resolution": 16, "modes": ["visible", "mean"]},
        "stats": {"provider": "rgb_stats", "stride": 4, "resolution": 16, "dtype": "float32"},
    },
}


def colored_box(extents: tuple[float, float, float], seed: int) -> bytes:
    """A box with a random colour a face, as GLB."""
    trimesh = pytest.importorskip("trimesh", reason="needs the data extra")
    box = trimesh.creation.box(extents)
    box.unmerge_vertices()  # GLB has colours at vertices: shared ones would blend the faces
    colors = np.random.default_rng(seed).integers(30, 255, (6, 4), np.uint8)
    colors[:, 3] = 255
    normals = box.face_normals.round()
    side = np.abs(normals).argmax(1) + 3 * (normals.sum(1) > 0)
    box.visual = trimesh.visual.ColorVisuals(box, face_colors=colors[side])
    return bytes(box.export(file_type="glb"))


def write_source(folder: Path, files: dict[str, bytes]) -> Path:
    """A pack as it is published: one zip and a manifest with a line an asset."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "pack.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    rows = []
    for number, (name, data) in enumerate(files.items()):
        rows.append(
            {
                "id": name.rsplit(".", 1)[0],
                "file": name,
                "pack": "pack",
                "license": "CC0-1.0",
                "sha256": hashlib.sha256(data).hexdigest(),
                "split": "val" if number % 4 == 3 else "train",
            }
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight boxes of different shapes in three shards."""
    pytest.importorskip("embreex", reason="needs the data extra")
    shapes = [
        (1, 1, 1),
        (1, 0.5, 0.2),
        (0.3, 1, 0.4),
        (0.1, 0.1, 1),
        (1, 1, 0.05),
        (0.7, 1, 1),
        (1, 0.3, 1),
        (0.5, 0.5, 1),
    ]
    files = {f"pack/box-{i}.glb": colored_box(shape, i) for i, shape in enumerate(shapes)}
    return write_source(tmp_path_factory.mktemp("boxes"), files)


@pytest.fixture(scope="session")
def settings(boxes: Path) -> Callable[..., DataConfig]:
    """The small configuration for an output folder, with fields replaced."""

    def make(out: Path, **changes: object) -> DataConfig:
        config = config_from_dict(DataConfig, {**SETTINGS, "source": str(boxes), "out": str(out)})
        return replace(config, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., DataConfig]) -> Iterator[Path]:
    """The boxes, prepared without interruption. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare(settings(out), InlineExecutor())
    yield out


def content(root: Path) -> dict[str, str]:
    """Path -> SHA-256 of everything that belongs to a dataset: not logs, and not where it lies."""
    found = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and relative.parts[0] != "logs" and relative.name != "dataset.yaml":
            found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session")
def content_of() -> Callable[[Path], dict[str, str]]:
    return content
