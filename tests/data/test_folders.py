"""A plain folder of 3D files as a source: its splits, and what becomes of files that cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diff2to3.assets.records import AssetRecord
from diff2to3.cli import main
from diff2to3.config import config_from_dict, save_config
from diff2to3.data.executors import InlineExecutor
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig, FilterConfig
from diff2to3.data.source import AssetSource, split_by_id
from diff2to3.data.store import AssetStore

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"


def splits_of(ids: list[str]) -> dict[str, str | None]:
    return {record.id: record.split for record in split_by_id([AssetRecord(i, None) for i in ids])}


def test_splits_follow_from_ids_alone():
    ids = [f"asset {i}" for i in range(4000)]
    splits = splits_of(ids)
    for i in ids[:50]:
        first = int.from_bytes(hashlib.sha256(i.encode()).digest()[:4], "big")
        assert splits[i] == ("val" if first % 20 == 0 else "train")
    assert 150 < list(splits.values()).count("val") < 250
    some = list(np.random.default_rng(0).permutation(ids)[:500])
    assert splits_of(some) == {i: splits[i] for i in some}


@pytest.mark.parametrize("num", [2, 3, 10])
def test_a_small_folder_has_both(num):
    for start in range(20):
        assert set(splits_of([f"{start}-{i}" for i in range(num)]).values()) == {"train", "val"}


def test_one_asset_trains_and_none_is_none():
    assert all(splits_of([f"only {i}"]) == {f"only {i}": "train"} for i in range(60))
    assert split_by_id([]) == []


def test_a_source_without_splits_gets_them_and_filters_and_mirrors_know(tmp_path: Path, boxes: Path):
    for i in range(30):
        (tmp_path / f"box {i}.obj").write_text(TRIANGLE)
    config = config_from_dict(DataConfig, {"source": str(tmp_path), "out": "x"})
    listed = {asset_id: split for asset_id, split, _ in AssetSource(config).list()}
    assert listed == splits_of([f"box {i}" for i in range(30)])
    only = replace(config, filter=FilterConfig(splits=["val"]), mirror=["val"])
    val = [i for i, split in listed.items() if split == "val"]
    assert [split for _, split, _ in AssetSource(only).list()] == ["val"] * (2 * len(val))
    own = config_from_dict(DataConfig, {"source": str(boxes), "out": "x"})  # has a manifest with splits
    assert [split for _, split, _ in AssetSource(own).list()] == (["train"] * 3 + ["val"]) * 2


def test_nothing_complete_is_exit_code_1(
    tmp_path: Path, settings: Callable[..., DataConfig], capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "source"
    source.mkdir()
    (source / "broken.obj").write_text("v 0 0 0\nf 1 2 3\n")
    (source / "glass.mtl").write_text("newmtl g\nd 0\n")
    (source / "glass.obj").write_text("mtllib glass.mtl\nusemtl g\n" + TRIANGLE)
    save_config(settings(tmp_path / "out", source=str(source)), tmp_path / "c.yaml")
    command = ["data", "prepare", str(tmp_path / "c.yaml"), "--workers", "0", "--quiet"]
    for _ in range(2):  # also when there is nothing to do any more
        assert main(command) == 1
        printed = capsys.readouterr()
        assert "every asset failed in views_input" in printed.err
        assert (
            "glass: no visible surface" in printed.out and "broken: a face refers to vertex 3" in printed.out
        )
    (source / "fine.obj").write_text(TRIANGLE.replace("0 1 0", "0 0 1"))
    assert main(command) == 0


def test_blank_views_are_no_success(tmp_path: Path, settings: Callable[..., DataConfig], monkeypatch):
    """Where a surface is there and no camera sees it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.obj").write_text(TRIANGLE)

    def blank(*arguments, **options):
        views = render_views(*arguments, **options)
        return replace(views, images=views.images * 0, alphas=views.alphas * 0)

    from diff2to3.views.render import render_views

    monkeypatch.setattr("diff2to3.views.render.render_views", blank)
    reports = prepare(settings(tmp_path / "out", source=str(source)), InlineExecutor())
    assert reports[0].failed == {"a": "nothing of it can be seen: all 6 views are blank"}
    assert not AssetStore(tmp_path / "out").assets()
