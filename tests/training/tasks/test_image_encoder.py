"""Distilling the mini image encoder: the order of pictures, the loss by hand, and the scores."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diff2to3.checkpoint import read_bundle
from diff2to3.config import load_config
from diff2to3.errors import InputError
from diff2to3.training.tasks import image_encoder
from diff2to3.training.tasks.image_encoder import (
    DistillBatch,
    DistillDataConfig,
    EncoderLossConfig,
    ImageEncoderObjective,
    ImageEncoderRunConfig,
    ImageEncoderTask,
    Pool,
    PoolLoader,
    agreement,
    background,
)
from diff2to3.voxels.mini_encoder import MiniEncoder, MiniEncoderConfig, load_mini_encoder

ROOT = Path(__file__).resolve().parents[3]
DATA = DistillDataConfig(root="none", num_train=10, num_val=3, batch_size=4)
SMALL = MiniEncoderConfig(fine_width=4, num_fine=1, coarse_width=6, num_coarse=1, latent_channels=3)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Ten pictures of 16 x 16 in the place of a dataset's; the first pixel is a picture's number."""
    images = (random((10, 3, 16, 16), 0) * 255).to(torch.uint8)
    images[:, 0, 0, 0] = torch.arange(10)
    made = Pool(images, random((10, 3, 2, 2), 1).half(), random((10, 2, 2), 2) > 0.5)
    monkeypatch.setattr(image_encoder, "cached_pool", lambda config, split, count, seed: made)
    return made


def numbers(batch: DistillBatch) -> list[int]:
    return (batch.images[:, 0, 0, 0] * 255).round().int().tolist()


def test_an_epoch_shows_no_picture_twice_and_parts_share_a_step(pool: Pool) -> None:
    whole = list(islice(PoolLoader(DATA, seed=3), 5))
    assert [batch.step for batch in whole] == [0, 1, 2, 3, 4]
    assert len(set(numbers(whole[0]) + numbers(whole[1]))) == 8  # two steps an epoch; two pictures sit out
    assert numbers(whole[0]) != numbers(whole[2])
    halves = [list(islice(PoolLoader(DATA, 3, rank, 2), 5)) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert sorted(numbers(batch)) == sorted(numbers(first) + numbers(second))


def test_the_loader_goes_on_where_it_stood(pool: Pool) -> None:
    whole = list(islice(PoolLoader(DATA, seed=3), 5))
    resumed = PoolLoader(DATA, seed=3)
    resumed.load_state_dict(whole[2].state)
    assert numbers(next(iter(resumed))) == numbers(whole[3])
    with pytest.raises(InputError, match="seed was 3, is 4"):
        PoolLoader(DATA, seed=4).load_state_dict(whole[2].state)
    with pytest.raises(InputError, match="3 equal parts"):
        PoolLoader(DATA, 3, 0, 3)


def test_the_loss_weighs_cells_without_the_object_less(pool: Pool) -> None:
    batch = next(iter(PoolLoader(DATA, seed=3)))
    objective = ImageEncoderObjective(MiniEncoder(SMALL), EncoderLossConfig(background=0.25))
    out = objective(batch, None)
    found = objective.encoder(batch.images)
    for b in range(4):
        total = weights = 0.0
        for i in range(2):
            for j in range(2):
                weight = 1.0 if batch.seen[b, i, j] else 0.25
                gap = found[b, :, i, j].double() - batch.latents[b, :, i, j].double()
                total, weights = total + weight * float(gap.square().mean()), weights + weight
        assert float(out["loss"][b]) == pytest.approx(total / weights, rel=1e-5)


def test_scores_are_shares_of_each_channel_s_variance() -> None:
    teacher, student = random((4, 3, 2, 2), 0), random((4, 3, 2, 2), 1)
    seen = random((4, 2, 2), 2) > 0.4
    scores = agreement(student, teacher, seen)
    parts = []
    for c in range(3):
        wanted, found = (x[:, c][seen].double().numpy() for x in (teacher, student))
        parts.append(1 - ((found - wanted) ** 2).mean() / wanted.var(ddof=1))
    assert scores["r2_object"] == pytest.approx(np.mean(parts), rel=1e-4)
    assert scores["r2_object_worst_channel"] == pytest.approx(min(parts), rel=1e-4)
    assert agreement(teacher, teacher, seen)["r2"] == 1


def test_half_of_the_backgrounds_are_mid_grey() -> None:
    draw = np.random.default_rng(0)
    colors = torch.stack([background(draw) for _ in range(2000)])
    for grey, share in ((0.5, 0.5), (1.0, 0.15), (0.0, 0.1)):
        assert float((colors == grey).all(1).float().mean()) == pytest.approx(share, abs=0.04)


def test_the_exported_bundle_loads_as_the_encoder_it_was(tmp_path: Path, pool: Pool) -> None:
    config = load_config(ImageEncoderRunConfig, ROOT / "configs/image_encoder/mini.yaml")
    task = ImageEncoderTask(replace(config, model=SMALL))
    objective = task.objective()
    task.export(objective, tmp_path)
    assert read_bundle(tmp_path).networks["image_encoder"].config == vars(SMALL)
    loaded = load_mini_encoder(tmp_path / "image_encoder.safetensors")
    images = random((1, 3, 16, 24), 5)
    torch.testing.assert_close(loaded(images), objective.encoder(images), rtol=1e-2, atol=1e-2)  # type: ignore
    assert set(task.validate(objective)) == {"r2", "r2_object", "r2_object_worst_channel"}
