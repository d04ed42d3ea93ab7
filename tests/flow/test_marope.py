"""Image tokens and shared rotary positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.flow.marope import axis_dims, image_ids, marope_tables, voxel_ids
from diff2to3.flow.tokens import ImageTokens
from diff2to3.nn.attention import apply_rotary

pytestmark = pytest.mark.usefixtures("one_thread")


def test_patches_are_cut_row_by_row_channel_slowest(generator):
    latents = torch.randn(2, 3, 4, 6, generator=generator)
    image = ImageTokens.from_latents(latents, 2)
    assert image.feats.shape == (12, 12) and image.cu_seqlens.tolist() == [0, 6, 12]
    for token in range(12):
        item, place = divmod(token, 6)
        i, j = divmod(place, 3)
        assert image.indices[token].tolist() == [i, j] and image.grids[token].tolist() == [2, 3]
        patch = latents[item, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert torch.equal(image.feats[token], patch.flatten())


def test_different_sizes_are_packed_and_items_dropped(generator):
    images = [torch.randn(3, h, w, generator=generator) for h, w in ((2, 2), (4, 6), (6, 2))]
    image = ImageTokens.from_latents(images, 2)
    assert image.lengths() == [1, 6, 3]
    left = image.drop(torch.tensor([False, True, False]))
    assert left.lengths() == [1, 0, 3]
    assert torch.equal(left.feats, torch.cat([image.feats[:1], image.feats[7:]]))
    assert torch.equal(left.indices, torch.cat([image.indices[:1], image.indices[7:]]))
    nothing = image.drop(torch.ones(3, dtype=torch.bool))
    assert nothing.lengths() == [0, 0, 0] and nothing.channels == 12
    both = ImageTokens.cat([left, image])
    assert both.lengths() == [1, 0, 3, 1, 6, 3]
    with pytest.raises(ValueError, match="multiples of 2"):
        ImageTokens.from_latents([torch.zeros(3, 3, 4)], 2)
    with pytest.raises(ValueError, match="items"):
        image.drop(torch.tensor([True]))


@pytest.mark.parametrize("grid", [3, 16, 21, 32])
def test_patch_i_j_sits_at_i_j_z_max_plus_1(grid):
    """As the paper writes it, exactly, where both grids are as wide."""
    image = ImageTokens.from_latents(torch.zeros(1, 1, 2 * grid, 2 * grid), 2)
    z_max = grid - 1
    expected = [[float(i), float(j), float(z_max + 1)] for i in range(grid) for j in range(grid)]
    assert image_ids(image, grid).tolist() == expected


def test_other_patch_grids_are_scaled_to_span_the_volume():
    image = ImageTokens.from_latents(torch.zeros(1, 1, 8, 16), 2)  # 4 x 8 patches beside 16³ tokens
    ids = image_ids(image, 16)
    assert ids[:, 0].unique().tolist() == [1.5, 5.5, 9.5, 13.5]
    assert ids[:, 1].unique().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]
    assert ids[:, 2].unique().tolist() == [16.0]


def test_voxels_keep_their_coordinates():
    coords = torch.tensor([[0, 3, 1, 2], [1, 0, 15, 7]], dtype=torch.int32)
    assert voxel_ids(coords).tolist() == [[3.0, 1.0, 2.0], [0.0, 15.0, 7.0]]


def test_head_dimensions_are_split_as_stated():
    assert axis_dims(64) == (22, 22, 20)
    for head_dim in (2, 8, 32, 48, 96, 128):
        assert sum(axis_dims(head_dim)) == head_dim and all(d % 2 == 0 for d in axis_dims(head_dim))
    with pytest.raises(ValueError, match="even"):
        axis_dims(7)


POSITION = st.tuples(*[st.integers(-40, 40)] * 3)


@settings(max_examples=40, deadline=None)
@given(POSITION, POSITION, POSITION, st.sampled_from([8, 24, 64]), st.sampled_from([100.0, 10000.0]))
def test_scores_depend_on_relative_positions_only(a, b, shift, head_dim, theta):
    """q at a and k at b score as q at a + s and k at b + s, for any shift of both."""
    generator = torch.Generator().manual_seed(head_dim)
    q, k = (torch.randn(1, 1, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(first, second):
        ids = torch.tensor([first, second], dtype=torch.float32)
        cos, sin = (x.double() for x in marope_tables(ids, head_dim, theta))
        return float((apply_rotary(q, cos[:1], sin[:1]) * apply_rotary(k, cos[1:], sin[1:])).sum())

    moved = [tuple(x + s for x, s in zip(p, shift, strict=True)) for p in (a, b)]
    assert score(a, b) == pytest.approx(score(*moved), abs=2e-4)


def test_scores_tell_every_axis_and_direction_apart(generator):
    """Moving the key by one along x, y, z, or back, gives six different scores."""
    q, k = (torch.randn(1, 1, 64, generator=generator) for _ in range(2))
    steps = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)]
    scores = []
    for step in steps:
        cos, sin = marope_tables(torch.tensor([(0, 0, 0), step], dtype=torch.float32), 64)
        scores.append(float((apply_rotary(q, cos[:1], sin[:1]) * apply_rotary(k, cos[1:], sin[1:])).sum()))
    gaps = [abs(a - b) for i, a in enumerate(scores) for b in scores[:i]]
    assert min(gaps) > 1e-3
