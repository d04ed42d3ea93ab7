"""Local and published catalogues, filters, and the commands over them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diff2to3.assets import AssetFilter, FetchOptions, load_asset, open_catalogue, read_ids
from diff2to3.cli import main
from diff2to3.errors import InputError, MissingDependencyError


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def table(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        out = csv.DictWriter(file, ["sha256", "file_identifier", "aesthetic_score", "captions", "local_path"])
        out.writeheader()
        out.writerows(rows)


def test_folder_without_a_manifest(tmp_path, triangle_glb):
    (tmp_path / "sub").mkdir()
    for name in ("b.glb", "sub/a.glb", "b.obj", "notes.txt", ".hidden.glb"):
        (tmp_path / name).write_bytes(triangle_glb)
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("pack/c.glb", triangle_glb)
        archive.writestr("d.glb", triangle_glb)
    catalogue = open_catalogue(tmp_path)
    assert [record.id for record in catalogue] == ["b.glb", "b.obj", "pack/c", "pack/d", "sub/a"]
    for asset_id in ("b.glb", "pack/c", "pack/d", "sub/a"):
        mesh = load_asset(pickle.loads(pickle.dumps(catalogue[asset_id])))
        assert mesh.num_faces == 1 and mesh.name == asset_id
    with pytest.raises(InputError, match="no asset 'x'"):
        catalogue["x"]


def test_manifest_and_filters(tmp_path, triangle_glb):
    rows = [
        {
            "id": "a",
            "file": "p/a.glb",
            "license": "CC0-1.0",
            "split": "train",
            "faces": 10,
            "aesthetic_score": 5,
        },
        {
            "id": "b",
            "file": "b.glb",
            "license": "CC-BY-4.0",
            "split": "val",
            "faces": 99,
            "sha256": sha(b"other"),
        },
        {"id": "c", "file": "b.glb", "license": "cc0-1.0", "sha256": sha(triangle_glb), "colour": "red"},
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.glb").write_bytes(triangle_glb)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("p/a.glb", triangle_glb)
    for spec in (tmp_path, tmp_path / "manifest.jsonl"):
        catalogue = open_catalogue(spec)
        assert [record.id for record in catalogue] == ["a", "b", "c"] and len(catalogue) == 3
    assert catalogue["c"].metadata == {"colour": "red"} and catalogue["a"].aesthetic_score == 5
    assert load_asset(catalogue["a"]).num_faces == load_asset(catalogue["c"]).num_faces == 1
    with pytest.raises(InputError, match="b: checksum differs from the catalogue's"):
        load_asset(catalogue["b"])
    assert load_asset(catalogue["b"], verify=False).num_faces == 1

    def chosen(**options) -> list[str]:
        return [record.id for record in AssetFilter(**options).apply(catalogue)]

    assert chosen() == ["a", "b", "c"]
    assert chosen(licenses=["CC0-1.0"]) == ["a", "c"]
    assert chosen(splits=["val"]) == ["b"]
    assert chosen(min_faces=20) == ["b", "c"] and chosen(max_faces=20) == ["a", "c"]
    assert chosen(min_aesthetic=4.5) == ["a"] and chosen(min_aesthetic=5.5) == []
    assert chosen(ids=["c", "a"]) == ["a", "c"] and chosen(limit=2) == ["a", "b"]
    with pytest.raises(InputError, match="1 ids not in the catalogue, first 'zz'"):
        chosen(ids=["a", "zz"])


def test_zip_with_names_that_leave_it(tmp_path, triangle_glb):
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../evil.glb", "/abs.glb", "good.glb", "C:/win.glb"):
            archive.writestr(name, triangle_glb)
    reasons = {}
    for record in open_catalogue(path):
        try:
            reasons[record.id] = load_asset(record).num_faces
        except InputError as error:
            reasons[record.id] = str(error)
    assert reasons.pop("good") == 1 and len(reasons) == 3
    for asset_id, reason in reasons.items():
        assert reason.startswith(f"{asset_id}: ") and "leaves its folder or archive" in reason
    assert not (tmp_path.parent / "evil.glb").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken", "line 1: not JSON"),
        ('{"id": "a"}', "line 1: expected an object with id and file"),
        ('{"id": "a", "file": "x"}\n{"id": "a", "file": "y"}', "two assets are called 'a'"),
    ],
)
def test_bad_manifests(tmp_path, text, reason):
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(InputError, match=reason):
        len(open_catalogue(tmp_path))


def test_unknown_places(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_catalogue(tmp_path / "gone")
    with pytest.raises(InputError, match="expected abo:FOLDER"):
        open_catalogue("abo:")
    with pytest.raises(InputError, match=r"metadata\.csv: no such table; .*abo-3dmodels\.tar"):
        len(open_catalogue(f"abo:{tmp_path}"))
    table(tmp_path / "bad", [])
    (tmp_path / "bad" / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="lacks the columns file_identifier, sha256"):
        len(open_catalogue(f"hssd:{tmp_path / 'bad'}"))


def test_abo_unpacks_what_is_asked_for(tmp_path, triangle_glb):
    other = triangle_glb + b" "
    table(
        tmp_path,
        [
            {"sha256": sha(triangle_glb), "file_identifier": "B/ONE.glb", "aesthetic_score": "4.9"},
            {"sha256": sha(b"what it was"), "file_identifier": "C/TWO.glb", "aesthetic_score": "4.0"},
            {"sha256": sha(other), "file_identifier": "D/GONE.glb", "aesthetic_score": ""},
        ],
    )
    catalogue = open_catalogue(f"abo:{tmp_path}")
    assert all(record.source is None and record.license == "CC-BY-NC-4.0" for record in catalogue)
    with pytest.raises(InputError, match="not fetched yet; run: diff2to3 data fetch"):
        load_asset(next(iter(catalogue)))
    with pytest.raises(InputError, match=r"abo-3dmodels\.tar: not here"):
        list(catalogue.fetch(list(catalogue)))
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "abo-3dmodels.tar", "w") as tar:
        for name, data in (("B/ONE.glb", triangle_glb), ("C/TWO.glb", other)):
            info = tarfile.TarInfo(f"3dmodels/original/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    outcome = dict(catalogue.fetch(list(catalogue)))
    assert outcome[sha(triangle_glb)] is None
    assert "checksum differs" in outcome[sha(b"what it was")] and "not in abo" in outcome[sha(other)]
    again = open_catalogue(f"abo:{tmp_path}")
    assert [record.source is not None for record in again] == [True, False, False]
    assert load_asset(again[sha(triangle_glb)]).num_faces == 1
    assert [r.id for r in AssetFilter(min_aesthetic=4.5).apply(again)] == [sha(triangle_glb)]
    assert not list((tmp_path / "raw").rglob("*.part"))


def test_3d_future_is_read_inside_its_zip(tmp_path):
    table(tmp_path, [{"sha256": sha(b"the image"), "file_identifier": "3D-FUTURE-model/abc"}])
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "3D-FUTURE-model.zip", "w") as archive:
        archive.writestr("3D-FUTURE-model/abc/raw_model.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (record,) = open_catalogue(f"3d-future:{tmp_path}")
    assert record.sha256 is None  # the table's hash is of another file
    assert load_asset(record).num_faces == 1


def test_toys4k_prefers_converted_files(tmp_path, triangle_glb):
    table(tmp_path, [{"sha256": "1" * 64, "file_identifier": "cat/cat_000/cat_000.blend"}])
    folder = tmp_path / "raw" / "toys4k_blend_files" / "cat" / "cat_000"
    folder.mkdir(parents=True)
    (record,) = open_catalogue(f"toys4k:{tmp_path}")
    ((_, reason),) = open_catalogue(f"toys4k:{tmp_path}").fetch([record])
    assert reason is not None and "Download toys4k_blend_files.zip" in reason
    (folder / "cat_000.blend").write_bytes(b"BLENDER")
    (record,) = open_catalogue(f"toys4k:{tmp_path}")
    with pytest.raises(InputError, match="type 'blend' are not read"):
        load_asset(record)
    with pytest.raises(MissingDependencyError, match="no program 'no-blender'"):
        list(open_catalogue(f"toys4k:{tmp_path}").fetch([record], FetchOptions(blender="no-blender")))
    (folder / "cat_000.glb").write_bytes(triangle_glb)
    (record,) = open_catalogue(f"toys4k:{tmp_path}")
    assert load_asset(record).num_faces == 1


@pytest.mark.slow
def test_toys4k_is_converted_by_blender(tmp_path):
    """With an interpreter that has bpy in DIFF2TO3_TEST_BLENDER: two cubes, one of them hidden, one red."""
    program = os.environ.get("DIFF2TO3_TEST_BLENDER")
    if not program:
        pytest.skip("DIFF2TO3_TEST_BLENDER names no interpreter with bpy")
    table(tmp_path, [{"sha256": "1" * 64, "file_identifier": "a/a_0/a_0.blend"}])
    folder = tmp_path / "raw" / "toys4k_blend_files" / "a" / "a_0"
    folder.mkdir(parents=True)
    make = f"""
import bpy
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.mesh.primitive_cube_add(size=2)
material = bpy.data.materials.new("red")
material.use_nodes = True
material.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (1, 0, 0, 1)
bpy.context.object.data.materials.append(material)
bpy.context.object.scale = (1, 1, 3)
bpy.ops.mesh.primitive_cube_add(size=9)
bpy.context.object.hide_render = True
bpy.ops.wm.save_as_mainfile(filepath={str(folder / "a_0.blend")!r})
"""
    subprocess.run([program, "-c", make], check=True, capture_output=True)
    catalogue = open_catalogue(f"toys4k:{tmp_path}")
    assert dict(catalogue.fetch(list(catalogue), FetchOptions(blender=program))) == {"1" * 64: None}
    mesh = load_asset(next(iter(open_catalogue(f"toys4k:{tmp_path}"))))
    assert mesh.num_faces == 12 and mesh.materials[0].base_color_factor == (1, 0, 0, 1)
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx([1 / 3, 1 / 3, 1], abs=1e-6)  # Blender's z is ours


def test_objaverse_xl_layouts(tmp_path, triangle_glb):
    github = "https://github.com/org/repo/blob/0123abc/dir/model.glb"
    uid = "a" * 32
    table(
        tmp_path,
        [
            {"sha256": sha(triangle_glb), "file_identifier": github},
            {"sha256": sha(triangle_glb + b" "), "file_identifier": f"https://sketchfab.com/3d-models/{uid}"},
            {"sha256": "2" * 64, "file_identifier": "x", "local_path": "raw/own/place.glb"},
            {"sha256": "3" * 64, "file_identifier": "y", "local_path": "raw/github/repos/org/repo.zip/e.glb"},
        ],
    )
    repos = tmp_path / "raw" / "github" / "repos" / "org"
    repos.mkdir(parents=True)
    with zipfile.ZipFile(repos / "repo.zip", "w") as archive:
        archive.writestr("dir/model.glb", triangle_glb)
        archive.writestr("e.glb", triangle_glb)
    glbs = tmp_path / "raw" / "hf-objaverse-v1" / "glbs" / "000-017"
    glbs.mkdir(parents=True)
    (glbs / f"{uid}.glb").write_bytes(triangle_glb + b" ")
    (tmp_path / "raw" / "own").mkdir()
    (tmp_path / "raw" / "own" / "place.glb").write_bytes(triangle_glb)
    for record in open_catalogue(f"objaverse-xl:{tmp_path}"):
        assert load_asset(record, verify=record.id[0] not in "23").num_faces == 1


def test_objaverse_reads_and_fetches_through_its_package(tmp_path, triangle_glb, monkeypatch):
    package = types.ModuleType("objaverse")
    package.BASE_PATH, package._VERSIONED_PATH = "elsewhere", "elsewhere/v1"
    paths = {uid: f"glbs/000-00{k}/{uid}.glb" for k, uid in enumerate("abc")}

    def load_paths() -> dict:
        root = Path(package._VERSIONED_PATH)
        root.mkdir(parents=True, exist_ok=True)
        with gzip.open(root / "object-paths.json.gz", "wt") as file:
            json.dump(paths, file)
        return paths

    def load_objects(uids: list[str], download_processes: int = 1) -> dict:
        got = {}
        for uid in uids:
            if uid != "c":
                path = Path(package._VERSIONED_PATH, paths[uid])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(triangle_glb)
                got[uid] = str(path)
        return got

    package._load_object_paths, package.load_objects = load_paths, load_objects
    monkeypatch.setitem(sys.modules, "objaverse", package)
    notes = tmp_path / "hf-objaverse-v1" / "metadata"
    notes.mkdir(parents=True)
    with gzip.open(notes / "000-000.json.gz", "wt") as file:
        json.dump({"a": {"license": "by-nc", "faceCount": 7, "name": "thing", "animationCount": 0}}, file)
    catalogue = open_catalogue(f"objaverse:{tmp_path}")
    assert catalogue["a"].license == "CC-BY-NC-4.0" and catalogue["a"].num_faces == 7
    assert catalogue["b"].license is None and catalogue["b"].source is None
    outcome = dict(catalogue.fetch(list(catalogue), FetchOptions(2)))
    assert outcome == {"a": None, "b": None, "c": "not in Objaverse any more"}
    assert load_asset(open_catalogue(f"objaverse:{tmp_path}")["b"]).num_faces == 1
    assert package.BASE_PATH == "elsewhere"  # put back


def test_list_and_fetch_commands(tmp_path, triangle_glb, capsys):
    rows = [{"id": f"x/{k}", "file": f"{k}.glb", "license": "CC0-1.0", "split": "train"} for k in range(3)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for k in range(3):
        (tmp_path / f"{k}.glb").write_bytes(triangle_glb)
    assert main(["data", "list", str(tmp_path), "--format", "ids", "--limit", "2"]) == 0
    ids = capsys.readouterr().out
    assert ids.split() == ["x/0", "x/1"]
    (tmp_path / "ids.txt").write_text("# two of them\n" + ids)
    assert read_ids(tmp_path / "ids.txt") == ["x/0", "x/1"]
    assert main(["data", "list", str(tmp_path), "--format", "jsonl", "--ids", str(tmp_path / "ids.txt")]) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["x/0", "x/1"]
    assert main(["data", "list", str(tmp_path), "--format", "summary"]) == 0
    assert capsys.readouterr().out.strip() == "3 assets, 3 here; licences: CC0-1.0 3; splits: train 3"
    assert main(["data", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "x/0\ttrain\tCC0-1.0\t?\there"
    assert main(["data", "fetch", str(tmp_path)]) == 0
    assert "3 of 3 assets are here" in capsys.readouterr().out
    assert main(["data", "fetch", str(tmp_path), "--workers", "0"]) == 2
    assert main(["data", "list", str(tmp_path / "gone")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 2 and all(line.startswith("diff2to3 data: error: ") for line in error)


def test_fetch_reports_failures(tmp_path, capsys):
    table(tmp_path, [{"sha256": "4" * 64, "file_identifier": "B/ONE.glb"}])
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "abo-3dmodels.tar", "w"):
        pass
    assert main(["data", "fetch", f"abo:{tmp_path}"]) == 1
    captured = capsys.readouterr()
    assert "0 of 1 assets are here" in captured.out and f"{'4' * 64}: not in abo-3dmodels.tar" in captured.err


def test_all_fixtures_are_listed(shared: Path):
    catalogue = open_catalogue(shared / "assets")
    lines = (shared / "assets" / "manifest.jsonl").read_text().splitlines()
    splits = [json.loads(line)["split"] for line in lines]
    assert len(catalogue) == len(lines) > 1000
    for split in ("train", "val"):
        assert len(AssetFilter(splits=[split]).apply(catalogue)) == splits.count(split) > 100
