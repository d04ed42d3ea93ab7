"""Shard files, the plan, and pictures: round trips, damage, and independence of time and place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diff2to3.data.pictures import (
    decode_depth,
    decode_image,
    depth_range,
    encode_depth,
    encode_image,
    shrink,
)
from diff2to3.data.plan import asset_key, extend_plan, read_plan, shards_of, write_plan
from diff2to3.data.shards import (
    Part,
    ShardIndex,
    assemble,
    index_path,
    is_intact,
    part_path,
    read_index,
    read_part,
    salvage,
    tar_path,
    write_part,
)
from diff2to3.errors import InputError
from diff2to3.types import Views

MEMBERS = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(_[0-9]{3})?\.(webp|safetensors)", fullmatch=True),
    st.binary(max_size=2000),
    max_size=4,
)


class TestShards:
    @settings(max_examples=30, deadline=None)
    @given(parts=st.lists(MEMBERS | st.text(max_size=40), min_size=1, max_size=5))
    def test_round_trip_and_standard_tar(
        self, parts: list[dict[str, bytes] | str], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        root = tmp_path_factory.mktemp("shard")
        assets = [(f"id {i}", f"key-{i}", f"stamp-{i}") for i in range(len(parts))]
        for (_, key, stamp), content in zip(assets, parts, strict=True):
            part = Part(failed=content) if isinstance(content, str) else Part(content, {"n": len(content)})
            write_part(part_path(root, "stage", 7, key), key, part, stamp)
        index = assemble(root, "stage", 7, assets)
        assert isinstance(index, ShardIndex)
        assert read_index(index_path(root, "stage", 7)) == index and is_intact(root, index)
        assert not part_path(root, "stage", 7, "x").parent.exists()

        raw = tar_path(root, "stage", 7).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            files = {m.name: archive.extractfile(m) for m in archive.getmembers()}
            extracted = {name: file.read() for name, file in files.items() if file is not None}
        expected = {}
        for entry, (asset_id, key, stamp), content in zip(index.entries, assets, parts, strict=True):
            assert (entry.id, entry.key, entry.stamp) == (asset_id, key, stamp)
            if isinstance(content, str):
                assert entry.failed == content
                continue
            assert entry.info == {"n": len(content)} and set(entry.members) == set(content)
            for name, data in content.items():
                offset, size = entry.members[name]
                assert raw[offset : offset + size] == data
                expected[f"{key}.{name}"] = data
        assert extracted == expected

    def test_missing_damaged_and_foreign_parts_are_named_and_nothing_is_written(self, tmp_path: Path) -> None:
        assets = [(k, k, "now") for k in "abcd"]
        for key in "abc":
            write_part(part_path(tmp_path, "s", 0, key), key, Part({"x": b"12345"}), "now")
        path = part_path(tmp_path, "s", 0, "b")
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        write_part(part_path(tmp_path, "s", 0, "c"), "c", Part({"x": b"1"}), "before")
        assert assemble(tmp_path, "s", 0, assets) == ["b", "c", "d"]
        assert list((tmp_path / "s").iterdir()) == []
        assert read_part(part_path(tmp_path, "s", 0, "a"), "a", "now") is not None
        assert read_part(part_path(tmp_path, "s", 0, "a"), "b", "now") is None

    def test_salvage_keeps_what_is_whole(self, tmp_path: Path) -> None:
        assets = [(k, k, "t") for k in "abc"]
        for key in "ab":
            write_part(part_path(tmp_path, "s", 0, key), key, Part({"x": key.encode() * 600}), "t")
        write_part(part_path(tmp_path, "s", 0, "c"), "c", Part(failed="because"), "t")
        index = assemble(tmp_path, "s", 0, assets)
        assert isinstance(index, ShardIndex)
        whole = tar_path(tmp_path, "s", 0).read_bytes()
        damaged = bytearray(whole)
        damaged[index.entries[1].members["x"][0]] ^= 1
        tar_path(tmp_path, "s", 0).write_bytes(damaged)
        assert is_intact(tmp_path, index, checksum=False) and not is_intact(tmp_path, index)
        salvage(tmp_path, index, {"a": "t", "b": "t", "c": "t"})
        assert assemble(tmp_path, "s", 0, assets) == ["b"]
        write_part(part_path(tmp_path, "s", 0, "b"), "b", Part({"x": b"b" * 600}), "t")
        assert assemble(tmp_path, "s", 0, assets) == index
        assert tar_path(tmp_path, "s", 0).read_bytes() == whole

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", '{"format": "other/1"}', '{"format": "diff2to3-shard/1", "assets": [{"id": 1}]}'],
    )
    def test_damaged_indexes_are_named(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "00000.json"
        path.write_text(text)
        with pytest.raises(InputError, match=r"00000\.json: (damaged|format)"):
            read_index(path)
        with pytest.raises(InputError, match="no such file"):
            read_index(tmp_path / "00001.json")

    def test_names_too_long_for_a_tar_header_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="limited to 100 bytes"):
            write_part(tmp_path / "p", "k" * 90, Part({"member.webp": b""}), "")


class TestPlan:
    @given(ids=st.lists(st.text(min_size=1, max_size=80), unique=True, max_size=20))
    def test_keys_are_unique_short_and_safe(self, ids: list[str]) -> None:
        keys = [asset_key(i) for i in ids]
        assert len(set(keys)) == len(ids)
        for key in keys:
            assert len(key) <= 59 and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)

    @given(first=st.integers(0, 20), second=st.integers(0, 20), size=st.integers(1, 5))
    def test_growing_never_moves_an_asset(
        self, first: int, second: int, size: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        rows = [(f"a{i}", "train", "CC0-1.0") for i in range(first + second)]
        small = extend_plan([], rows[:first], size)
        grown = extend_plan(small, rows, size)
        assert grown[:first] == small and [a.id for a in grown] == [r[0] for r in rows]
        assert {a.shard for a in small}.isdisjoint(a.shard for a in grown[first:])
        assert all(len(assets) <= size for assets in shards_of(grown).values())
        parts = [shards_of(grown, (i, 3)) for i in range(3)]
        assert sorted(s for p in parts for s in p) == sorted(shards_of(grown))
        root = tmp_path_factory.mktemp("plan")
        write_plan(root, grown)
        assert read_plan(root) == grown

    def test_twice_the_same_id_and_damaged_lines_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="'x' occurs twice"):
            extend_plan([], [("x", "", ""), ("x", "", "")], 4)
        (tmp_path / "plan.jsonl").write_text(json.dumps({"shard": 0}) + "\n")
        with pytest.raises(InputError, match=r"plan\.jsonl: line 1 is damaged"):
            read_plan(tmp_path)


class TestPictures:
    @settings(max_examples=20, deadline=None)
    @given(
        seed=st.integers(0, 1000), height=st.integers(1, 40), width=st.integers(1, 40), opaque=st.booleans()
    )
    def test_eight_bits_come_back_exactly(self, seed: int, height: int, width: int, opaque: bool) -> None:
        rng = np.random.default_rng(seed)
        codes = torch.from_numpy(rng.integers(0, 256, (height, width, 4)).astype(np.float32))
        codes[..., 3] = 255 if opaque else codes[..., 3]
        image, alpha = decode_image(encode_image(codes[..., :3] / 255, codes[..., 3] / 255))
        assert torch.equal(alpha, codes[..., 3] / 255)
        seen = alpha > 0
        assert torch.equal(image[seen], codes[..., :3][seen] / 255)
        assert (image[~seen] == 0).all()

    def test_files_are_standard(self) -> None:
        data = encode_image(torch.full((4, 6, 3), 0.2), torch.full((4, 6), 0.8))
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("WEBP", (6, 4), (51, 51, 51, 204))

    def test_depth_is_exact_to_half_a_step_and_zero_stays_nothing(self) -> None:
        viewmat = torch.eye(4)
        viewmat[2, 3] = 2.0
        near, far = depth_range(viewmat)
        assert near < 2 - 3**0.5 / 2 and far > 2 + 3**0.5 / 2
        depth = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) * 1.7 + 1.15
        depth[3] = 0
        back = decode_depth(encode_depth(depth, viewmat), viewmat)
        assert (back[3] == 0).all() and (back[:3] > 0).all()
        assert (back - depth).abs().max() <= 0.5 * (far - near) / 65534 + 1e-6

    def test_damaged_pictures_are_an_input_error(self) -> None:
        data = encode_image(torch.rand(8, 8, 3), torch.ones(8, 8))
        with pytest.raises(InputError, match="damaged"):
            decode_image(data[: len(data) // 2])

    def test_shrinking_averages_premultiplied_and_moves_the_camera(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images, alphas = torch.rand(2, 8, 8, 3, generator=generator), torch.rand(2, 8, 8, generator=generator)
        Ks = torch.tensor([[10.0, 0, 4], [0, 10, 4], [0, 0, 1]]).repeat(2, 1, 1)
        small = shrink(Views(images, alphas, torch.eye(4).repeat(2, 1, 1), Ks), 4)
        for v in range(2):
            for y in range(4):
                for x in range(4):
                    a = alphas[v, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    c = images[v, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    torch.testing.assert_close(small.alphas[v, y, x], a.mean())
                    torch.testing.assert_close(
                        small.images[v, y, x], (c * a[..., None]).sum((0, 1)) / a.sum()
                    )
        assert small.Ks[0].tolist() == [[5, 0, 2], [0, 5, 2], [0, 0, 1]]
        with pytest.raises(ValueError, match="does not divide"):
            shrink(small, 3)
