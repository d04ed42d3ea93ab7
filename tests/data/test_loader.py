"""The loader: what batches hold, and that order, packing and random views follow from the seed alone."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.data.loader import Batch, Cursor, LoaderConfig, StepPacker, StepPlan, TrainLoader, _BatchReader
from diff2to3.data.pictures import pack_views, shrink, unpack_views
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.types import Views

EVERYTHING = LoaderConfig(
    split=None,
    features=["rgb", "stats"],
    views={"input": 2, "cond": 1},
    occupancy=[32],
    tensors=["voxels_16/coords.safetensors"],
    max_voxels_per_batch=2500,
    num_workers=0,
)


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def assert_same(a: Batch, b: Batch) -> None:
    assert (a.step, a.ids, a.state) == (b.step, b.ids, b.state)
    assert a.voxels is not None and b.voxels is not None
    assert torch.equal(a.voxels.coords, b.voxels.coords) and torch.equal(a.voxels.feats, b.voxels.feats)
    for name in a.views:
        assert torch.equal(a.views[name].images, b.views[name].images)
        assert torch.equal(a.views[name].viewmats, b.views[name].viewmats)
    for resolution in a.occupancy:
        assert torch.equal(a.occupancy[resolution], b.occupancy[resolution])


class TestPacker:
    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30),
        budget=st.integers(100, 400),
        world_size=st.integers(1, 4),
        seed=st.integers(0, 9),
        max_assets=st.none() | st.integers(1, 5),
    )
    def test_budget_balance_and_coverage(
        self, sizes: list[int], budget: int, world_size: int, seed: int, max_assets: int | None
    ) -> None:
        packer = StepPacker(sizes, budget, world_size, seed, max_assets)
        cursor, dealt = Cursor(), []
        while cursor.epoch < 3:
            ranks, after = packer.next_step(cursor)
            loads = [sum(sizes[asset] for _, asset in items) for items in ranks]
            assert all(items for items in ranks) and max(loads) <= budget
            if max_assets is None:
                assert max(loads) - min(loads) <= max(sizes)
            else:
                assert max(map(len, ranks)) <= max_assets
            step = [item for items in ranks for item in items]
            assert len(step) == (after.epoch - cursor.epoch) * len(sizes) + after.position - cursor.position
            dealt += step
            assert after.step == cursor.step + 1
            cursor = after
        for epoch in range(3):
            assert Counter(a for e, a in dealt if e == epoch) == Counter(range(len(sizes)))

    def test_epochs_and_seeds_shuffle_differently(self) -> None:
        packer = StepPacker([1] * 50, 10, 1, seed=0)
        first, second = packer.order(0).tolist(), packer.order(1).tolist()
        assert first != second and first != StepPacker([1] * 50, 10, 1, seed=1).order(0).tolist()
        assert packer.order(0).tolist() == first

    def test_an_asset_over_the_budget_is_an_error(self) -> None:
        with pytest.raises(InputError, match="150 voxels, more than max_voxels_per_batch = 100"):
            StepPacker([10, 150], 100, 1, 0)
        with pytest.raises(InputError, match="no assets"):
            StepPacker([], 100, 1, 0)


class TestBatches:
    def test_hold_what_the_store_holds(self, prepared: Path) -> None:
        store = AssetStore(prepared)
        by_id = {asset.id: asset for asset in store.plan}
        for batch in take(TrainLoader(prepared, EVERYTHING, seed=0), 3):
            assert batch.voxels is not None
            for b, (asset_id, voxels) in enumerate(zip(batch.ids, batch.voxels.unbind(), strict=True)):
                asset = by_id[asset_id]
                want = store.features(asset, ["rgb", "stats"])
                assert torch.equal(voxels.coords, want.coords) and torch.equal(voxels.feats, want.feats)
                all_views = store.views(asset, "input")
                for view in range(2 * b, 2 * b + 2):
                    images = batch.views["input"].images[view]
                    same = [i for i in range(6) if torch.equal(all_views.images[i], images)]
                    cameras = [
                        i
                        for i in same
                        if torch.equal(all_views.viewmats[i], batch.views["input"].viewmats[view])
                    ]
                    assert len(cameras) == 1
                coords = store.coords(asset, 32)
                assert torch.equal(batch.occupancy[32][b].nonzero().to(torch.int32), coords)
                stored = batch.tensors["voxels_16/coords.safetensors"][b]["coords"]
                assert torch.equal(stored.to(torch.int32), want.coords[:, 1:])

    def test_views_travel_at_8_bits_a_channel(self, prepared: Path) -> None:
        """Through the queue of the workers; what arrives is what was stored, to the last bit."""
        config = LoaderConfig(split=None, views={"input": 6}, num_workers=0)
        loader = TrainLoader(prepared, config, seed=0)
        ranks, after = loader.packer.next_step(Cursor())
        reader = _BatchReader(loader.store, loader.assets, config, 0)
        sent = reader[StepPlan(0, tuple(ranks[0]), after)].views["input"]
        (batch,) = take(loader, 1)
        arrived = batch.views["input"]
        size = sum(t.numel() * t.element_size() for t in vars(sent).values() if t is not None)
        floats = sum(t.numel() * t.element_size() for t in (arrived.images, arrived.alphas))
        assert sent.rgba.dtype == torch.uint8 and size < 0.3 * floats
        stored = loader.store.views(loader.assets[ranks[0][0][1]], "input")
        for image, alpha, viewmat in zip(stored.images, stored.alphas, stored.viewmats, strict=True):
            (view,) = [i for i in range(6) if torch.equal(arrived.viewmats[i], viewmat)]
            assert torch.equal(arrived.images[view], image) and torch.equal(arrived.alphas[view], alpha)

    def test_every_byte_survives_packing(self) -> None:
        image = (torch.arange(256, dtype=torch.float32) / 255).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
        views = Views(image.contiguous(), image[..., 0].contiguous(), torch.eye(4)[None], torch.eye(3)[None])
        back = unpack_views(pack_views(views))
        assert torch.equal(back.images, views.images) and torch.equal(back.alphas, views.alphas)

    def test_views_can_be_shrunk_and_come_with_depth(self, prepared: Path) -> None:
        small = LoaderConfig(split=None, views={"input": 6}, view_size=16, num_workers=0)
        (batch,) = take(TrainLoader(prepared, small, seed=0), 1)
        full = LoaderConfig(split=None, views={"input": 6}, depths=True, num_workers=0)
        (other,) = take(TrainLoader(prepared, full, seed=0), 1)
        assert batch.views["input"].depths is None and other.views["input"].depths is not None
        want = shrink(other.views["input"], 16)
        torch.testing.assert_close(batch.views["input"].images, want.images)
        assert other.views["input"].depths.amax() > 1

    def test_splits_and_size_limits(self, prepared: Path) -> None:
        loader = TrainLoader(prepared, LoaderConfig(split="val", occupancy=[16], num_workers=0), seed=0)
        assert {a.id for a in loader.assets} == {"pack/box-3", "pack/box-7"}
        rest = TrainLoader(prepared, LoaderConfig(split=None, exclude="*-[0-5]", num_workers=0), seed=0)
        assert {a.id for a in rest.assets} == {"pack/box-6", "pack/box-7"}
        sizes = {a.id: AssetStore(prepared).info(a, "voxels_32")["num_voxels"] for a in loader.store.plan}
        limit = sorted(sizes.values())[3]
        few = TrainLoader(
            prepared, LoaderConfig(split=None, max_voxels_per_asset=limit, num_workers=0), seed=0
        )
        assert {a.id for a in few.assets} == {i for i, n in sizes.items() if n <= limit}
        assert few.num_left_out == 4

    def test_views_differ_between_epochs_and_never_repeat_within_a_draw(self, prepared: Path) -> None:
        config = LoaderConfig(split=None, views={"input": 3}, max_assets_per_batch=1, num_workers=0)
        drawn: dict[str, list[tuple[int, ...]]] = {}
        store = AssetStore(prepared)
        cameras = {a.id: store.views(a, "input").viewmats for a in store.plan}
        for batch in take(TrainLoader(prepared, config, seed=0), 8 * 6):
            viewmats = batch.views["input"].viewmats
            index = tuple(int((cameras[batch.ids[0]] == m).all((1, 2)).nonzero()) for m in viewmats)
            assert len(set(index)) == 3
            drawn.setdefault(batch.ids[0], []).append(index)
        assert all(len(set(draws)) > 1 for draws in drawn.values()) and len(drawn) == 8


class TestDeterminism:
    def test_same_seed_same_batches_also_with_workers(self, prepared: Path) -> None:
        plain = take(TrainLoader(prepared, EVERYTHING, seed=5), 4)
        ahead = take(TrainLoader(prepared, replace(EVERYTHING, num_workers=2), seed=5), 4)
        for a, b in zip(plain, ahead, strict=True):
            assert_same(a, b)
        other = take(TrainLoader(prepared, EVERYTHING, seed=6), 4)
        assert [b.ids for b in other] != [b.ids for b in plain]

    @pytest.mark.parametrize("stop", [1, 3, 5])
    def test_resuming_in_the_middle_of_an_epoch(self, prepared: Path, stop: int) -> None:
        straight = take(TrainLoader(prepared, EVERYTHING, seed=1), 7)
        loader = TrainLoader(prepared, EVERYTHING, seed=1)
        begun = take(loader, stop)
        state = loader.state_dict()
        assert state == begun[-1].state
        resumed = TrainLoader(prepared, EVERYTHING, seed=1)
        resumed.load_state_dict(state)
        for a, b in zip(straight, begun + take(resumed, 7 - stop), strict=True):
            assert_same(a, b)

    def test_the_state_counts_batches_taken_not_read_ahead(self, prepared: Path) -> None:
        loader = TrainLoader(prepared, replace(EVERYTHING, num_workers=1, prefetch=3), seed=1)
        for count, batch in enumerate(loader, 1):
            assert loader.state_dict() == batch.state and batch.state["step"] == count
            if count == 2:
                break

    def test_ranks_share_an_epoch_and_see_each_asset_once(self, prepared: Path) -> None:
        config = LoaderConfig(split=None, max_assets_per_batch=2, num_workers=0)
        loaders = [TrainLoader(prepared, config, seed=2, rank=r, world_size=2) for r in range(2)]
        steps = [take(loader, 2) for loader in loaders]
        seen = [i for batches in steps for batch in batches for i in batch.ids]
        assert sorted(seen) == sorted(f"pack/box-{i}" for i in range(8))
        assert [b.state for b in steps[0]] == [b.state for b in steps[1]]

    def test_resuming_with_other_ranks_goes_on_with_the_unseen_assets(self, prepared: Path) -> None:
        config = LoaderConfig(split=None, max_assets_per_batch=1, num_workers=0)
        first = TrainLoader(prepared, config, seed=2)
        seen = [i for batch in take(first, 4) for i in batch.ids]
        rest = []
        for rank in range(4):
            loader = TrainLoader(prepared, config, seed=2, rank=rank, world_size=4)
            loader.load_state_dict(first.state_dict())
            rest += [i for batch in take(loader, 1) for i in batch.ids]
        assert sorted(seen + rest) == sorted(f"pack/box-{i}" for i in range(8))

    def test_global_generators_are_left_alone(self, prepared: Path) -> None:
        import numpy as np

        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        take(TrainLoader(prepared, EVERYTHING, seed=1), 2)
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert (np.random.get_state()[1] == numpy_state[1]).all()  # noqa: NPY002


class TestRefusals:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"split": "test"}, r"no asset of split 'test' is complete; splits are \['train', 'val'\]"),
            ({"exclude": "pack/*"}, r"no asset is left without those like 'pack/\*'"),
            ({"features": ["flux"]}, "no stage features_flux; prepared are features_rgb, features_stats, "),
            ({"tensors": ["latents/z.safetensors"]}, "no stage latents; "),
            ({"max_voxels_per_batch": 5}, "every asset has more than 5 voxels"),
        ],
    )
    def test_what_the_dataset_lacks_is_named_at_once(
        self, prepared: Path, changes: dict[str, object], said: str
    ) -> None:
        config = replace(LoaderConfig(split=None, num_workers=0), **changes)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=said):
            TrainLoader(prepared, config, seed=0)

    def test_too_many_views_and_unknown_sets(self, prepared: Path) -> None:
        for views, said in (
            ({"input": 7}, "7 were asked for, 6 are stored"),
            ({"top": 1}, "no stage views_top"),
        ):
            with pytest.raises(InputError, match=said):
                take(TrainLoader(prepared, LoaderConfig(split=None, views=views, num_workers=0), seed=0), 1)

    def test_states_of_other_runs(self, prepared: Path) -> None:
        state = TrainLoader(prepared, EVERYTHING, seed=1).state_dict()
        with pytest.raises(InputError, match="seed was 1, is 2"):
            TrainLoader(prepared, EVERYTHING, seed=2).load_state_dict(state)
        with pytest.raises(ValueError, match="rank"):
            TrainLoader(prepared, EVERYTHING, seed=1, rank=2, world_size=2)
        with pytest.raises(InputError, match="no stage features_rgb; prepared are none"):
            TrainLoader(prepared / "logs", EVERYTHING, seed=1)
