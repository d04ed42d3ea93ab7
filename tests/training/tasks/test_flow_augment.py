"""Augmentation of image latents against shifts, turns and statistics by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.training.tasks.flow_augment import (
    AugmentConfig,
    augmented,
    draw_kept,
    draw_matrix,
    draw_offsets,
    moved,
)

ALL = AugmentConfig(share=0.7, turn=10, zoom=0.2, shift=0.1, tint=0.3, noise=0.5, erase=0.4)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(100 * seed + k) for k in range(count)]


def test_nothing_changes_unless_asked_for():
    x = torch.randn(3, 4, 8, 8)
    assert augmented(x, AugmentConfig(), generators(3)) is x
    assert augmented(x, AugmentConfig(share=0, noise=1), generators(3)) is x


def test_an_item_is_changed_by_its_own_generator_alone():
    x = torch.randn(40, 4, 8, 8)
    together = augmented(x, ALL, generators(40))
    torch.testing.assert_close(together, augmented(x, ALL, generators(40)), rtol=0, atol=0)
    alone = torch.cat([augmented(x[k : k + 1], ALL, [g]) for k, g in enumerate(generators(40))])
    torch.testing.assert_close(together, alone)
    same = (together == x).flatten(1).all(1).float().mean()
    assert 0.1 < float(same) < 0.5  # 0.3 of them are left alone


def test_moving_is_shifting_turning_and_zooming():
    x = torch.randn(1, 2, 8, 8)
    shift = torch.tensor([[[1.0, 0, 2 * 3 / 8], [0, 1, 0]]])  # three columns of eight
    torch.testing.assert_close(moved(x, shift)[..., :5], x[..., 3:])
    torch.testing.assert_close(moved(x, shift)[..., 5:], x[..., 7:].expand(-1, -1, -1, 3))  # the edge goes on
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    torch.testing.assert_close(moved(x, quarter), torch.rot90(x, 1, (2, 3)), rtol=1e-4, atol=1e-4)
    half = torch.tensor([[[2.0, 0, 0], [0, 2, 0]]])  # smaller by two: means of four
    small = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(moved(x, half)[..., 2:6, 2:6], small, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6), st.floats(0, 90), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1), st.integers(4, 40)
)  # fmt: skip
def test_changes_stay_within_their_bounds(seed, turn, zoom, shift, erase, size):
    config = AugmentConfig(turn=turn, zoom=zoom, shift=shift, erase=erase)
    matrix = draw_matrix(config, torch.Generator().manual_seed(seed)).double()
    scale = float(torch.linalg.det(matrix[:, :2])) ** 0.5
    assert abs(math.log(scale)) <= zoom + 1e-5
    assert abs(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))) <= turn + 1e-4
    assert float(matrix[:, 2].abs().max()) <= 2 * shift + 1e-6
    kept = draw_kept(config, torch.Size([size, size + 3]), torch.Generator().manual_seed(seed))
    erased = (kept == 0).nonzero()
    assert len(erased) <= erase * kept.numel() + size + 3  # sides are rounded
    if len(erased):
        height, width = (erased.amax(0) - erased.amin(0) + 1).tolist()
        assert height * width == len(erased)  # one rectangle


def test_tint_is_one_offset_a_channel_and_noise_is_in_between():
    drawn = torch.stack(
        [draw_offsets(AugmentConfig(tint=0.3), torch.Size([64, 8, 8]), g) for g in generators(64)]
    )
    assert float(drawn.flatten(2).std(2).max()) < 1e-6
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.05)
    strengths = torch.stack(
        [draw_offsets(AugmentConfig(noise=0.5), torch.Size([64, 8, 8]), g).std() for g in generators(200)]
    )
    assert float(strengths.max()) < 0.52 and float(strengths.mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("changes", [{"turn": -1}, {"share": 1.5}, {"erase": 2}, {"noise": float("nan")}])
def test_bad_amounts_are_named(changes):
    with pytest.raises(ValueError, match=r"augment"):
        AugmentConfig(**changes)
