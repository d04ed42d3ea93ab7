"""Schedules, averages, loss scale, loggers, estimates and curves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from diff2to3.training import activations, curve, estimate
from diff2to3.training.batches import tensors_in, to_device
from diff2to3.training.config import TrainConfig
from diff2to3.training.ema import Averager, decay_at
from diff2to3.training.loggers import JsonLines
from diff2to3.training.precision import LossScale
from diff2to3.training.schedules import rate_factor
from diff2to3.training.task import Randomness, seeded

from training_runs import assert_close, records, stored, train  # isort: skip


def test_schedules_against_their_formulas() -> None:
    def factors(name: str, **named: float) -> list[float]:
        return [rate_factor(name, s, 110, warmup=10, **named) for s in range(111)]  # type: ignore[arg-type]

    for name in ("constant", "linear", "cosine", "wsd"):
        assert factors(name)[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
        assert factors(name)[10] == 1
    assert set(factors("constant")[10:]) == {1.0}
    assert factors("linear", floor=0.1)[10:] == pytest.approx(np.linspace(1, 0.1, 101))
    cosine = [0.02 + 0.98 * (1 + math.cos(math.pi * k / 100)) / 2 for k in range(101)]
    assert factors("cosine", floor=0.02)[10:] == pytest.approx(cosine)
    trapezoid = [1.0] * 71 + list(np.linspace(1, 0, 31))[1:]
    assert factors("wsd", decay=0.3)[10:] == pytest.approx(trapezoid, abs=1e-12)
    assert set(factors("wsd", decay=0.0)[10:]) == {1.0}


@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.integers(1, 500),
    st.integers(0, 600),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_schedules_stay_between_floor_and_peak(
    name: str, steps: int, warmup: int, decay: float, floor: float
) -> None:
    found = [rate_factor(name, s, steps, warmup=warmup, decay=decay, floor=floor) for s in range(steps)]
    assert all(0 < f <= 1 + 1e-12 for f in found[:warmup])
    after = found[warmup:]
    assert all(floor - 1e-12 <= f <= 1 + 1e-12 for f in after)
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_against_the_closed_form(warmup: bool) -> None:
    """After n updates: the start times all decays, plus each weight times its share and the later decays."""
    weight = torch.zeros(3, dtype=torch.float64)
    values = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    averager = Averager({"w": weight}, 0.9, warmup)
    for step, value in enumerate(values):
        weight.copy_(value)
        averager.update(step)
    decays = [min(0.9, (1 + s) / (10 + s)) if warmup else 0.9 for s in range(30)]
    assert [decay_at(s, 0.9, warmup) for s in range(30)] == decays
    expected = sum((1 - decays[s]) * math.prod(decays[s + 1 :]) * values[s] for s in range(30))
    assert torch.allclose(averager.tensors["w"], torch.as_tensor(expected), atol=1e-12)
    with averager.applied():
        assert torch.allclose(weight, torch.as_tensor(expected), atol=1e-12)
    assert torch.equal(weight, values[-1])


def test_the_loss_scale_adapts() -> None:
    scale = LossScale(True, interval=3)
    assert not scale.accepts(math.inf) and scale.value == 2.0**15
    assert [scale.accepts(1.0) for _ in range(3)] == [True] * 3 and scale.value == 2.0**16
    for _ in range(16):
        assert not scale.accepts(math.nan)
    with pytest.raises(FloatingPointError, match="bf16"):
        scale.accepts(math.nan)
    assert LossScale(False).accepts(math.inf)


def test_randomness_depends_on_all_it_is_given_and_nothing_else() -> None:
    def draw(seed: int, step: int, asset: str, salt: str = "") -> float:
        return float(torch.randn((), generator=Randomness(seed, step).generator(asset, salt)))

    all_of_them = {draw(*a) for a in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a", "x"))}
    assert len(all_of_them) == 5
    before = torch.get_rng_state()
    assert draw(0, 0, "a") == draw(0, 0, "a")
    with seeded(5):
        first = torch.rand(3)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class Nested:
    name: str
    images: Tensor
    more: dict[str, list[Tensor]]
    nothing: Tensor | None = None


def test_batches_of_any_shape_move_and_list_their_tensors() -> None:
    batch = Nested("a", torch.ones(2), {"x": [torch.zeros(1), torch.zeros(2)]})
    assert list(tensors_in(batch)) == ["images", "more.x.0", "more.x.1"]
    moved = to_device(batch, torch.device("meta"))
    assert moved.name == "a" and moved.nothing is None
    assert {t.device.type for t in tensors_in(moved).values()} == {"meta"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_come_close(precision: str, straight: Path, tmp_path: Path) -> None:
    assert train(tmp_path, f"train.precision={precision}") == 0
    losses = [[r["loss"] for r in records(run, "train")] for run in (tmp_path, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1]
    assert {t.dtype for t in stored(tmp_path, 20).values()} == {torch.float32}


def test_recomputed_activations_give_the_same_weights(tmp_path: Path) -> None:
    """With dropout, whose numbers must be the same in both forward passes."""
    for name, value in (("kept", "false"), ("recomputed", "true")):
        assert train(tmp_path / name, "dropout=0.3", f"train.checkpoint_blocks={value}") == 0
    assert_close(stored(tmp_path / "kept", 20), stored(tmp_path / "recomputed", 20))


def test_recomputation_keeps_only_inputs() -> None:
    def saved(model: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
            model(torch.ones(8, 16, requires_grad=True))
        return sum(sizes)

    plain, less = (nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2))
    activations.recompute([less])
    assert saved(less) < saved(plain)
    assert less.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(recompute: bool) -> None:
    """With a backend that needs no compiler; it sees every block's graph, whole."""
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2))
    x = torch.ones(3, 4, requires_grad=True)
    expected = torch.autograd.grad(model[1](model[0](x)).sum(), x)[0]
    names = list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    activations.compile_blocks(model, backend="aot_eager")
    if recompute:
        activations.recompute(model)
    found = torch.autograd.grad(model[1](model[0](x)).sum(), x)[0]
    assert torch.allclose(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == names


def test_the_log_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, 0)
    for step in (5, 10, 15):
        log.write("train", step, {"loss": 1.0})
    log.close()
    path.write_text(path.read_text() + '{"step": 16, "ki')
    JsonLines(path, 10).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train(tmp_path, "train.loggers=[tensorboard]", "train.sample_every=10") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [5, 10, 15, 20]
    logged = [r["loss"] for r in records(tmp_path, "train")]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [e.step for e in events.Images("ramp")] == [10, 20]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = ("train.loggers=[wandb]", "train.wandb_mode=offline", "train.sample_every=10")
    assert train(tmp_path, *arguments) == 0
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "wandb-id.txt").read_text().strip() in str(
        next((tmp_path / "wandb").glob("offline-*"))
    )


def test_the_dry_run_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--dry-run", "--gpu", "4090", "--num-gpus", "2") == 0
    printed = capsys.readouterr().out
    parameters = 12 * 16 + 16 + 3 * (32 + 16 * 32 + 32 + 32 * 16 + 16) + 16 * 12 + 12
    assert f"{parameters:,}" in printed and "4090" in printed and "items/s" in printed
    assert not (tmp_path / "run").exists()


def test_the_estimate_against_counting_by_hand() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, batch: object, randomness: Randomness) -> dict[str, Tensor]:
            x = torch.ones(10, 64)
            for layer in self.layers:
                x = torch.sigmoid(layer(x))
            return {"loss": x.mean(1)}

    @dataclass
    class Batch:
        ids: tuple[str, ...]

    objective = Squares()
    probe = estimate.measure(objective, list(objective.layers), Batch(("a",) * 10), TrainConfig(out="x"))
    assert probe.operations == 3 * 2 * 10 * 64 * 64
    activation = 10 * 64 * 4  # x before the first layer, and each sigmoid's output, which is the next's input
    assert probe.saved == 4 * activation
    assert probe.blocks_saved == [activation, 0, 0]
    assert probe.blocks_inputs == [0, activation, activation]
    assert probe.kept(False) == 4 * activation


def test_curves_are_drawn(straight: Path, tmp_path: Path) -> None:
    drawn = curve.plot([straight], tmp_path / "c.png")
    assert {"loss", "lr", "grad_norm", "validate/norm"} <= set(drawn)
    image = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert (image == np.array([0x1F, 0x5F, 0xA8])).all(-1).sum() > 500
    with pytest.raises(ValueError, match="no value 'lsos'"):
        curve.plot([straight], tmp_path / "d.png", ["lsos"])


@given(st.integers(-1000, 1000).map(lambda n: n * 0.37), st.just(0.0) | st.floats(1e-3, 1e6))
def test_ticks_span_the_values(low: float, span: float) -> None:
    high = low + span
    found = curve.ticks(low, high)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision=fp8", "precision"),
        ("keep=1", "keep"),
        ("ema=1.0", "ema"),
        ("loggers=[paper]", "loggers"),
        ("save_every=0", "save_every"),
        ("savee_every=5", "save_every"),
    ],
)
def test_bad_settings_are_named(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", f"train.{setting}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_profile_is_written(tmp_path: Path) -> None:
    assert train(tmp_path, "--profile", "train.steps=8") == 0
    assert (tmp_path / "profile" / "trace.json.gz").stat().st_size > 1000
    assert "aten::" in (tmp_path / "profile" / "top.txt").read_text()
    assert len(list((tmp_path / "profile").iterdir())) == 2
