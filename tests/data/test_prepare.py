"""Preparing a dataset: right content, and the same bytes however it is run, interrupted or damaged."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diff2to3.data.executors import InlineExecutor, LocalExecutor, Outcome, Task, Work
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig, FilterConfig, LimitConfig, ViewSetConfig
from diff2to3.data.shards import index_path, read_index, tar_path
from diff2to3.data.source import AssetSource
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.views.cameras import CameraConfig, generator_for, sample_cameras
from diff2to3.views.render import render_views
from diff2to3.voxels.aggregate import aggregate_features
from diff2to3.voxels.providers import RgbFeatures
from diff2to3.voxels.voxelise import voxelise

Settings = Callable[..., DataConfig]
Content = Callable[[Path], dict[str, str]]


def test_what_is_stored_is_what_the_parts_compute(prepared: Path, settings: Settings) -> None:
    store, config = AssetStore(prepared), settings(prepared)
    source = AssetSource(config)
    assert [a.id for a in store.assets()] == [f"pack/box-{i}" for i in range(8)]
    for asset in store.assets()[:3]:
        mesh = source.load(asset.id)
        viewmats, Ks = sample_cameras(
            config.view_sets["input"].cameras, 48, 48, generator_for(3, asset.id, "input")
        )
        rendered = render_views(mesh, viewmats, Ks, 48, 48, replace(config.render, outputs=("depths",)))
        stored = store.views(asset, "input", depths=True)
        assert torch.equal(stored.viewmats, viewmats) and torch.equal(stored.Ks, Ks)
        torch.testing.assert_close(stored.alphas, rendered.alphas, rtol=0, atol=0.51 / 255)
        shown = rendered.alphas > 0.01
        torch.testing.assert_close(stored.images[shown], rendered.images[shown], rtol=0, atol=0.51 / 255)
        assert stored.depths is not None and rendered.depths is not None
        torch.testing.assert_close(stored.depths, rendered.depths, rtol=0, atol=1.75 / 65534)

        for resolution in (16, 32):
            coords = store.coords(asset, resolution)
            assert coords.tolist() == voxelise(mesh.triangles, resolution).tolist()
            assert store.info(asset, f"voxels_{resolution}")["num_voxels"] == len(coords)
        coords = store.coords(asset, 16)
        assert torch.equal(store.features(asset, ["rgb"]).feats, store.features(asset, ["rgb.visible"]).feats)
        for name, mode in (("rgb", "visible"), ("rgb.mean", "mean")):
            want = aggregate_features(stored, coords, 16, RgbFeatures(), mode=mode)
            torch.testing.assert_close(store.features(asset, [name]).feats, want.feats, rtol=0, atol=5e-4)
        both = store.features(asset, ["rgb", "stats"])
        assert both.feats.shape == (len(coords), 9) and both.resolution == 16
        transform = torch.tensor(store.info(asset, "views_input")["transform"]).reshape(4, 4)
        torch.testing.assert_close(transform.double(), torch.from_numpy(mesh.transform))


def test_shards_are_plain_tar_files_in_webdataset_layout(prepared: Path) -> None:
    index = read_index(index_path(prepared, "views_input", 0))
    with tarfile.open(tar_path(prepared, "views_input", 0)) as archive:
        names = archive.getnames()
        assert len(names) == sum(len(e.members) for e in index.entries)
        for entry in index.entries:
            for member, (_, size) in entry.members.items():
                data = archive.extractfile(f"{entry.key}.{member}")
                assert data is not None and len(data.read()) == size
    keys = [name.split(".", 1)[0] for name in names]
    assert keys == sorted(keys, key=keys.index) and len(set(keys)) == 3


class CountingExecutor(InlineExecutor):
    """Notes the tasks it was given."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def map(self, work: Work, tasks: Sequence[Task]) -> Iterator[Outcome]:
        self.tasks += tasks
        return super().map(work, tasks)


def test_a_second_run_does_nothing(prepared: Path, settings: Settings, content_of: Content) -> None:
    before, executor = content_of(prepared), CountingExecutor()
    reports = prepare(settings(prepared), executor)
    assert executor.tasks == [] and content_of(prepared) == before
    assert [(r.num_made, r.num_assets, r.failed) for r in reports] == [(0, 8, {})] * 7


class TestSameBytes:
    def test_job_arrays_in_any_order(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        for i in (2, 0, 1):
            prepare(settings(tmp_path / "set"), InlineExecutor(), part=(i, 3))
        assert content_of(tmp_path / "set") == content_of(prepared)

    def test_two_local_workers(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        executor = LocalExecutor(2)
        try:
            prepare(settings(tmp_path / "set"), executor)
        finally:
            executor.close()
        assert content_of(tmp_path / "set") == content_of(prepared)

    def test_stages_one_at_a_time(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        for stage in ("voxels", "views_cond", "points", "views_input", "features"):
            prepare(settings(tmp_path / "set", stages=[stage]), InlineExecutor())
        assert content_of(tmp_path / "set") == content_of(prepared)

    def test_other_feature_chunks(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        config = settings(tmp_path / "set")
        features = {name: replace(f, view_chunk=5, device="cpu") for name, f in config.features.items()}
        prepare(replace(config, features=features), InlineExecutor())
        assert content_of(tmp_path / "set") == content_of(prepared)


class TestRepair:
    """Each kind of damage is found, and repaired to the same bytes with as little work as possible."""

    def copy(self, prepared: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(prepared, tmp_path / "set"))

    def repaired(self, root: Path, settings: Settings) -> tuple[list[str], list[str]]:
        executor = CountingExecutor()
        reports = prepare(settings(root), executor)
        tasks = [f"{t.stage}:{t.asset.id.rsplit('/')[-1]}" for t in executor.tasks]
        return tasks, [shard for report in reports for shard in report.repaired]

    def test_one_flipped_byte(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        root = self.copy(prepared, tmp_path)
        entry = read_index(index_path(root, "views_input", 1)).entries[2]
        with open(tar_path(root, "views_input", 1), "r+b") as file:
            file.seek(entry.offset + entry.size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        tasks, found = self.repaired(root, settings)
        assert found == ["views_input/00001"]
        assert tasks == ["views_input:box-5"]
        assert content_of(root) == content_of(prepared)

    def test_truncated_and_missing_shards(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        root = self.copy(prepared, tmp_path)
        path = tar_path(root, "features_rgb", 0)
        path.write_bytes(
            path.read_bytes()[: read_index(index_path(root, "features_rgb", 0)).entries[1].offset]
        )
        tar_path(root, "voxels_16", 2).unlink()
        tasks, found = self.repaired(root, settings)
        assert found == ["voxels_16/00002", "features_rgb/00000"]
        assert tasks == [
            *("voxels_16:box-6", "voxels_16:box-7", "features_rgb:box-1", "features_rgb:box-2"),
        ]
        assert content_of(root) == content_of(prepared)

    def test_damaged_and_missing_indexes(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        root = self.copy(prepared, tmp_path)
        index_path(root, "voxels_32", 0).write_text("{")
        index_path(root, "views_cond", 2).unlink()
        tasks, found = self.repaired(root, settings)
        assert found == ["voxels_32/00000"]
        assert tasks == [
            *("views_cond:box-6", "views_cond:box-7"),
            *("voxels_32:box-0", "voxels_32:box-1", "voxels_32:box-2"),
        ]
        assert content_of(root) == content_of(prepared)

    def test_leftovers_of_killed_runs(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        root = self.copy(prepared, tmp_path)
        (root / "views_input/.00001.tar.4242.tmp").write_bytes(b"half")
        staging = root / ".staging/views_input/00001"
        staging.mkdir(parents=True)
        (staging / "somebody.part").write_bytes(b"half a par")
        assert self.repaired(root, settings) == ([], [])
        assert content_of(root) == content_of(prepared)
        assert not (root / ".staging").exists()

    def test_parts_of_other_settings_are_not_used(
        self, tmp_path: Path, prepared: Path, settings: Settings, content_of: Content
    ) -> None:
        from diff2to3.data.shards import Part, part_path, write_part

        root = self.copy(prepared, tmp_path)
        key = read_index(index_path(root, "voxels_32", 0)).entries[0].key
        index_path(root, "voxels_32", 0).unlink()
        write_part(part_path(root, "voxels_32", 0, key), key, Part({"x": b"stale"}), "another stamp")
        assert "voxels_32:box-0" in self.repaired(root, settings)[0]
        assert content_of(root) == content_of(prepared)


class TestRefusals:
    def test_other_settings_in_the_same_folder(self, prepared: Path, settings: Settings) -> None:
        with pytest.raises(
            InputError, match=r"views_input was prepared with other settings \(seed: 3 there, 4 now\)"
        ):
            prepare(settings(prepared, seed=4), InlineExecutor())
        sets = {"input": ViewSetConfig(64, depths=True)}
        with pytest.raises(InputError, match=r"views\.size: 48 there, 64 now"):
            prepare(settings(prepared, view_sets=sets, features={}, stages=["views_input"]), InlineExecutor())

    def test_sources_without_assets(self, tmp_path: Path, settings: Settings) -> None:
        with pytest.raises(InputError, match="no asset passes the filters"):
            config = settings(tmp_path / "set", filter=FilterConfig(splits=["nothing"]))
            prepare(config, InlineExecutor())
        assert not (tmp_path / "set").exists()

    def test_stages_without_their_inputs(self, tmp_path: Path, settings: Settings) -> None:
        with pytest.raises(InputError, match="features_rgb needs views_input"):
            prepare(settings(tmp_path / "set", stages=["features"]), InlineExecutor())
        with pytest.raises(
            InputError,
            match=r"unknown stage 'latent'; known are views, voxels, points, features, .*views_input",
        ):
            prepare(settings(tmp_path / "set", stages=["latent"]), InlineExecutor())

    def test_missing_weights_stop_the_run_and_blame_no_asset(
        self, tmp_path: Path, settings: Settings
    ) -> None:
        config = settings(tmp_path / "set")
        bad = replace(config.features["rgb"], provider="taef2", weights=str(tmp_path / "gone.safetensors"))
        with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
            prepare(replace(config, features={"taef2": bad}), InlineExecutor())
        assert not list((tmp_path / "set").glob("features_taef2/0*"))

    def test_a_part_outside_the_array(self, tmp_path: Path, settings: Settings) -> None:
        with pytest.raises(InputError, match="0 <= i < n"):
            prepare(settings(tmp_path), InlineExecutor(), part=(3, 3))


def test_points_lie_on_all_sides_of_the_surface(prepared: Path, tmp_path: Path, settings: Settings) -> None:
    """Of boxes: one coordinate is that of a side, by its share of the area; of mirrored ones, mirrored."""
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    for report in prepare(settings(out, stages=["points"], mirror=["train"]), InlineExecutor()):
        assert not report.failed
    store, source = AssetStore(out, ["points_200"]), AssetSource(settings(out))
    assert len(store.assets()) == 14
    for asset in store.assets():
        points = store.open(asset, "points_200").tensors("points.safetensors")["points"].float()
        corners = torch.from_numpy(source.load(asset.id).triangles).float().flatten(0, 1)
        half = corners.amax(0)
        sides = ((points.abs() - half).abs() < 1e-3).float()
        assert len(points) == 200 and bool((points.abs() <= half + 1e-3).all())
        assert float(sides.amax(1).min()) == 1
        areas = half.prod() / half
        assert torch.allclose(sides.mean(0), areas / areas.sum(), atol=0.15)
    again = prepare(settings(out, stages=["points"], mirror=["train"]), InlineExecutor())
    assert [report.num_made for report in again] == [0]


def test_mirrored_assets_are_assets_of_their_own(tmp_path: Path, prepared: Path, settings: Settings) -> None:
    """Voxels and colours are the originals' mirrored in x; what was prepared without them stays as it is."""
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    for report in prepare(settings(out, mirror=["train"]), InlineExecutor()):
        assert not report.failed
    store = AssetStore(out)
    ids = [asset.id for asset in store.assets()]
    assert ids == [
        *(f"pack/box-{i}" for i in range(8)),
        *(f"pack/box-{i}~mirrored" for i in (0, 1, 2, 4, 5, 6)),
    ]
    by_id = {asset.id: asset for asset in store.assets()}
    for i in (0, 1, 4):
        before, after = by_id[f"pack/box-{i}"], by_id[f"pack/box-{i}~mirrored"]
        assert after.split == "train"
        coords, mirrored = store.coords(before, 16).clone(), store.coords(after, 16)
        coords[:, 0] = 15 - coords[:, 0]
        assert {tuple(c) for c in mirrored.tolist()} == {tuple(c) for c in coords.tolist()}
    mesh, flipped = (AssetSource(settings(out)).load(f"pack/box-1{end}") for end in ("", "~mirrored"))
    volume = [np.linalg.det(m.triangles.astype(np.float64)).sum() for m in (mesh, flipped)]
    assert volume[0] > 0 and volume[1] == pytest.approx(volume[0])  # still seen from outside
    camera = torch.tensor([[0.0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 3], [0, 0, 0, 1]])[
        None
    ]  # from +x, y to the right
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    K = torch.tensor([[[150.0, 0, 24], [0, 150, 24], [0, 0, 1]]])
    config = settings(out).render
    seen = render_views(mesh, camera, K, 48, 48, config)
    flip_image = torch.diag(torch.tensor([-1.0, 1, 1, 1]))  # a mirrored camera has a mirrored picture
    again = render_views(flipped, flip_image @ camera @ mirror, K, 48, 48, config)
    assert float(seen.alphas.mean()) > 0.05
    torch.testing.assert_close(again.images.flip(2), seen.images, rtol=0, atol=2e-3)
    torch.testing.assert_close(again.alphas.flip(2), seen.alphas, rtol=0, atol=2e-3)


def test_variants_have_half_the_views_and_shapes_of_their_own(
    tmp_path: Path, prepared: Path, settings: Settings
) -> None:
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    for report in prepare(settings(out, variants={"val": 2}), InlineExecutor()):
        assert not report.failed
    store = AssetStore(out)
    by_id = {asset.id: asset for asset in store.assets()}
    assert list(by_id)[8:] == [f"pack/box-{i}~variant{k}" for i in (3, 7) for k in (1, 2)]
    before, *after = (by_id[f"pack/box-3{end}"] for end in ("", "~variant1", "~variant2"))
    for asset in after:
        mesh = AssetSource(settings(out)).load(asset.id)
        cells = {tuple(c) for c in voxelise(mesh.triangles, 16).tolist()}
        assert {tuple(c) for c in store.coords(asset, 16).tolist()} == cells
    views = [store.info(asset, "views_input")["num_views"] for asset in (before, *after)]
    assert views[1:] == [views[0] // 2] * 2
    with pytest.raises(InputError, match=r"no split 'training'; its splits are train, val"):
        prepare(settings(out, mirror=["training"]), InlineExecutor())
    with pytest.raises(ValueError, match=r"variants\.train: expected a number"):
        settings(out, variants={"train": -1})


def test_a_grown_source_goes_to_new_shards(tmp_path: Path, prepared: Path, settings: Settings) -> None:
    root = tmp_path / "set"
    prepare(settings(root, filter=FilterConfig(limit=4)), InlineExecutor())
    first = {p: p.stat().st_mtime_ns for p in root.rglob("0*.tar")}
    executor = CountingExecutor()
    prepare(settings(root), executor)
    assert {t.asset.id.rsplit("/")[-1] for t in executor.tasks} == {f"box-{i}" for i in range(4, 8)}
    assert {p: p.stat().st_mtime_ns for p in first} == first
    store = AssetStore(root)
    assert [a.shard for a in store.plan] == [0, 0, 0, 1, 2, 2, 2, 3]
    assert len(store.assets()) == 8


def empty_scene() -> bytes:
    """A valid GLB with no mesh in it."""
    document = b'{"asset":{"version":"2.0"},"scenes":[{"nodes":[]}],"scene":0}'
    document += b" " * (-len(document) % 4)
    header = b"glTF" + struct.pack("<II", 2, 20 + len(document))
    return header + struct.pack("<II", len(document), 0x4E4F534A) + document


class TestFailures:
    @pytest.fixture
    def mixed(self, tmp_path: Path, boxes: Path, settings: Settings) -> DataConfig:
        """Good boxes among files that cannot be used."""
        trimesh = pytest.importorskip("trimesh")
        with zipfile.ZipFile(boxes / "pack.zip") as archive:
            good = [archive.read(f"pack/box-{i}.glb") for i in range(3)]
        nan = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]], process=False)
        cloud = trimesh.PointCloud(np.random.default_rng(0).random((50, 3)))
        ball = trimesh.creation.icosphere(4)  # 5120 faces
        files = {
            "good-0.glb": good[0],
            "cut.glb": good[1][: len(good[1]) // 2],
            "nan.glb": nan.export(file_type="glb"),
            "empty.glb": empty_scene(),
            "good-1.glb": good[1],
            "cloud.ply": cloud.export(file_type="ply"),
            "large.glb": ball.export(file_type="glb"),
            "good-2.glb": good[2],
        }
        source = tmp_path / "mixed"
        source.mkdir()
        with zipfile.ZipFile(source / "pack.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
            archive.writestr("../escaped.glb", good[0])
        names = [*files, "../escaped.glb"]
        rows = [
            {"id": Path(name).stem, "file": name, "pack": "pack", "license": "CC0-1.0", "split": "train"}
            for name in names
        ]
        (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return settings(tmp_path / "set", source=str(source), limits=LimitConfig(max_faces=5000))

    def test_each_is_reported_by_name_and_reason_and_the_rest_go_on(self, mixed: DataConfig) -> None:
        reports = prepare(mixed, InlineExecutor())
        said = reports[0].failed
        assert set(said) == {"cut", "nan", "empty", "cloud", "large", "escaped"}
        for name, pattern in {
            "cut": "cut short|damaged|truncated|bytes",
            "nan": "finite|NaN",
            "empty": "no (triangle|mesh|face|geometry)",
            "cloud": "no (triangle|mesh|face)|point",
            "large": "5,120 .* over the limit of 5,000",
            "escaped": r"\.\./escaped\.glb.*refused",
        }.items():
            assert re.search(pattern, said[name], re.I), (name, said[name])
        assert {k: v.split(":")[0] for k, v in reports[-1].failed.items()} == {
            k: "failed in views_input" for k in said
        }
        store = AssetStore(mixed.out)
        assert [a.id for a in store.assets()] == ["good-0", "good-1", "good-2"]
        assert store.failures["views_input"][store.plan[2].key] == said["nan"]
        with pytest.raises(InputError, match="nan: views_input: "):
            store.views(store.plan[2], "input")

    def test_retry_takes_up_failed_assets_only(self, mixed: DataConfig) -> None:
        prepare(mixed, InlineExecutor())
        executor = CountingExecutor()
        prepare(mixed, executor)
        assert executor.tasks == []
        reports = prepare(replace(mixed, limits=LimitConfig()), executor, retry_failed=True)
        tried = {t.asset.id for t in executor.tasks if t.stage == "views_input"}
        assert tried == {"cut", "nan", "empty", "cloud", "large", "escaped"}
        assert set(reports[0].failed) == tried - {"large"}
        # Of the later stages, what follows from results that did not change stays.
        assert {t.asset.id for t in executor.tasks if t.stage == "features_rgb"} == {"large"}
        assert "large" in [a.id for a in AssetStore(mixed.out).assets()]

    def test_an_unexpected_error_is_a_failure_with_its_traceback_in_the_log(
        self, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diff2to3.voxels import voxelise as module

        def broken(triangles: np.ndarray, resolution: int) -> np.ndarray:
            raise ZeroDivisionError("by the test")

        monkeypatch.setattr(module, "voxelise", broken)
        (report,) = prepare(settings(tmp_path / "set", stages=["voxels_16"]), InlineExecutor())
        assert set(report.failed.values()) == {"ZeroDivisionError: by the test"} and len(report.failed) == 8
        logged = [json.loads(line) for line in next((tmp_path / "set/logs").iterdir()).open()]
        assert "in broken" in logged[0]["traceback"] and logged[0]["id"] == "pack/box-0"


def test_a_cube_s_voxels_carry_the_colour_of_their_face(
    tmp_path: Path, settings: Settings, boxes: Path
) -> None:
    """The whole way, from the file's colours to features: the geometry proof with the real renderer."""
    trimesh = pytest.importorskip("trimesh")
    config = settings(tmp_path / "set", filter=FilterConfig(limit=1))
    views = {"input": ViewSetConfig(128, CameraConfig(num_views=16, lower_fraction=0.5), depths=True)}
    prepare(replace(config, view_sets=views), InlineExecutor())
    store = AssetStore(tmp_path / "set")
    (asset,) = store.assets()
    with zipfile.ZipFile(boxes / "pack.zip") as archive:
        cube = trimesh.load(
            io.BytesIO(archive.read("pack/box-0.glb")), file_type="glb", force="mesh", process=False
        )
    # glTF is y up: (x, y, z) there is (x, -z, y) here; its vertex colours are linear.
    normals = cube.face_normals[:, [0, 2, 1]] * [1, -1, 1]
    linear = cube.visual.vertex_colors[cube.faces[:, 0], :3] / 255.0
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)

    voxels = store.features(asset, ["rgb"])
    centers = voxels.centers()
    plain = store.features(asset, ["rgb.mean"]).feats
    num_views = store.open(asset, "features_rgb").tensors("visible.safetensors")["num_views"]
    for normal, color in zip(normals.round(), encoded, strict=True):
        axis, sign = int(np.abs(normal).argmax()), float(normal.sum())
        others = [i for i in range(3) if i != axis]
        inner = (centers[:, axis] * sign > 0.45) & (centers[:, others].abs() < 0.35).all(-1)
        assert inner.sum() >= 100 and (num_views[inner] > 0).all()
        want = torch.from_numpy(color).float().expand(int(inner.sum()), 3)
        torch.testing.assert_close(voxels.feats[inner], want, rtol=0, atol=2 / 255)
        assert (plain[inner] - want).abs().amax(-1).min() > 4 / 255  # the plain mean leaks everywhere
