"""README's training commands, in order, from a plain folder: a step each, on few and small views."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from diff2to3.cli import main
from diff2to3.data.store import AssetStore

ROOT = Path(__file__).resolve().parents[2]

#: What makes data small: views of every set, and points. The networks are the shipped ones.
SMALL_DATA = [
    "view_sets.input.cameras.num_views=2",
    "view_sets.target.cameras.num_views=2",
    "view_sets.cond.cameras.num_views=2",
]
SMALL_RUN = [
    "train.steps=1", "train.device=cpu", "train.threads=1", "train.compile=false", "train.sample_every=null",
    "train.validate_every=null", "data.loader.num_workers=0", "data.loader.max_assets_per_batch=1",
]  # fmt: skip
FOLDER = re.compile(r"\b(FOLDER|data/mini\b(?!\.yaml)|runs/)")


def training_block() -> list[list[str]]:
    """The commands of the first block under "Train", as words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## Train\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def assets(folder: Path) -> None:
    """Four solids in colours, as OBJ."""
    folder.mkdir()
    square = [[0, 0], [1, 0], [1, 1], [0, 1]]
    for n in range(4):
        height, narrow = 0.4 + 0.4 * n, 0.2 * n
        top = [[narrow / 2 + (1 - narrow) * x, narrow / 2 + (1 - narrow) * y] for x, y in square]
        corners = [[x, 0, y] for x, y in square] + [[x, height, y] for x, y in top]
        colors = np.random.default_rng(n).uniform(0.2, 0.9, (8, 3)).round(3)
        rows = [f"v {x} {y} {z} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(corners, colors, strict=True)]
        faces = [
            "f 1 2 3 4",
            "f 8 7 6 5",
            *(f"f {i} {4 + i} {4 + i % 4 + 1} {i % 4 + 1}" for i in range(1, 5)),
        ]
        faces[2:] = [f"f {i} {i + 4} {i % 4 + 5} {i % 4 + 1}" for i in range(1, 5)]
        (folder / f"solid-{n}.obj").write_text("\n".join([*rows, *faces, ""]))


def run_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A program of train/ in this process: importing torch anew for each takes longer than its step."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(words[0], run_name="__main__")
    return int(ended.value.code or 0)


def test_the_block_runs_from_a_plain_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("embreex", reason="needs the data extra")
    assets(tmp_path / "FOLDER")
    monkeypatch.chdir(ROOT)
    commands = training_block()
    assert [words[:3] for words in commands if words[0] == "diff2to3"] == [["diff2to3", "data", "prepare"]]
    programs = [words[1] for words in commands if words[0] == "python"]
    assert len(programs) == len(commands) - 1 >= 4
    for words in commands:
        words = [FOLDER.sub(lambda match: f"{tmp_path}/{match[0]}", word) for word in words]
        if words[0] == "diff2to3":
            small = [word for setting in SMALL_DATA for word in ("--set", setting)]
            words[words.index("--workers") + 1] = "0"
            assert main([*words[1:], *small, "--quiet"]) == 0
            splits = {asset.split for asset in AssetStore(tmp_path / "data" / "mini").assets()}
            assert splits == {"train", "val"}
            continue
        if not any(word.startswith("train.out=") for word in words):
            words.append(f"train.out={tmp_path}/runs/{Path(words[2]).parent.name}-{Path(words[2]).stem}")
        assert run_program([*words[1:], *SMALL_RUN], monkeypatch) == 0, words
    assert len(list((tmp_path / "runs").glob("*/bundle/model.json"))) >= 4
