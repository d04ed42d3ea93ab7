"""Runs that are interrupted end where uninterrupted ones do; damaged checkpoints are noticed."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diff2to3.checkpoint import read_bundle
from diff2to3.training import checkpoints
from diff2to3.training.checkpoints import Checkpoints

import tiny  # isort: skip
from training_runs import assert_identical, checkpoint, records, start, stored, train, wait_for  # isort: skip


def test_a_run_leaves_what_it_should(straight: Path) -> None:
    assert [r["step"] for r in records(straight, "train")] == [5, 10, 15, 20]
    assert [r["step"] for r in records(straight, "validate")] == [10, 20]
    losses = [r["loss"] for r in records(straight, "train")]
    assert losses[-1] < 0.5 * losses[0]
    pictures = sorted(p.name for p in (straight / "samples").iterdir())
    assert pictures == ["step-00000010-ramp.png", "step-00000020-ramp.png"]
    assert (straight / "config.yaml").is_file()


def test_the_bundle_has_the_averaged_weights(straight: Path) -> None:
    assert list(read_bundle(straight / "bundle").networks) == ["denoiser"]
    weights, tensors = load_file(straight / "bundle" / "denoiser.safetensors"), stored(straight, 20)
    for name, value in weights.items():
        if name != "center":
            assert torch.equal(value, tensors[f"ema.denoiser.{name}"])
    assert not torch.equal(weights["last.weight"], tensors["model.denoiser.last.weight"])


def test_killed_and_resumed_is_bit_identical(straight: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "run", "sleep=0.2")
    wait_for(checkpoint(tmp_path / "run", 10), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert train(tmp_path / "run", "--allow-changes") == 0
    assert_identical(stored(tmp_path / "run", 20), stored(straight, 20))
    keys = ("step", "loss", "lr", "grad_norm")
    again = [{k: r[k] for k in keys} for r in records(tmp_path / "run", "train")]
    assert again == [{k: r[k] for k in keys} for r in records(straight, "train")]


def test_sigterm_saves_ends_well_and_resumes(straight: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "run", "sleep=0.2", "train.save_every=1000", "train.log_every=1")
    wait_for(tmp_path / "run" / "log.jsonl", process)
    while len(records(tmp_path / "run", "train")) < 3:
        assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM" in errors
    (saved,) = Checkpoints(tmp_path / "run" / "checkpoints", None).steps()  # type: ignore[arg-type]
    assert 3 <= saved < 20
    assert train(tmp_path / "run", "--allow-changes") == 0
    assert_identical(stored(tmp_path / "run", 20), stored(straight, 20))


@pytest.mark.parametrize("how", ["truncated", "flipped", "index", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    how: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = checkpoint(run, 20)
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if how == "truncated":
        data.write_bytes(content[:-100])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "index":
        (newest / ".metadata").write_bytes(b"")
    else:
        data.unlink()
    assert train(run) == 0
    errors = capsys.readouterr().err
    assert "warning" in errors and str(newest) in errors
    assert_identical(stored(run, 20), stored(straight, 20))
    assert (run / "checkpoints" / "damaged-step-00000020").is_dir()
    assert [r["step"] for r in records(run, "train")] == [5, 10, 15, 20]


def test_only_damaged_checkpoints_are_an_error(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for info in (run / "checkpoints").glob("*/checkpoint.json"):
        info.write_text(info.read_text()[:-20])
    assert train(run) == 2
    assert "all checkpoints are damaged" in capsys.readouterr().err


def test_a_changed_configuration_is_refused(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert train(run, "train.lr=0.5", "width=32") == 2
    errors = capsys.readouterr().err
    assert "train.lr was 0.01, is 0.5" in errors and "width was 16, is 32" in errors
    assert train(run, "width=32", "--allow-changes") == 2  # weights of other shapes never fit
    assert "does not fit this run" in capsys.readouterr().err
    assert records(run) == records(straight)
    assert train(run, "train.steps=22", "train.save_every=7", "train.loggers=[]") == 0
    assert records(run, "train")[-1]["step"] == 22
    assert train(run, "train.steps=24", "train.lr=0.5", "--allow-changes") == 0
    assert "going on with a changed configuration: train.lr was 0.01" in capsys.readouterr().err


def test_a_finished_run_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert train(run) == 0
    assert_identical(stored(run, 20), stored(straight, 20))


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writes beyond a limit fail in the middle of a file, as on a full disk."""
    write = Checkpoints._write
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: Checkpoints, step: int, *rest: object) -> None:
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        try:
            write(self, step, *rest)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Checkpoints, "_write", limited)
    assert train(tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "checkpoint not written" in errors and str(checkpoint(tmp_path / "run", 5)) in errors
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    checkpoints.verified(checkpoint(tmp_path / "run", 5))


def test_too_little_space_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train(tmp_path / "run") == 1
    assert "no space left on the disk" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    assert train(tmp_path, "train.save_every=3", "train.keep=2", "train.keep_every=6") == 0
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}" for s in (6, 12, 18, 20)]


def test_a_loss_that_is_not_finite_stops_with_its_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "bad_asset=asset-3", "train.save_every=1", "train.accumulate=2") == 1
    errors = capsys.readouterr().err
    (folder,) = (tmp_path / "nonfinite").iterdir()
    step = int(folder.name[5:])
    assert f"step {step}: the loss of asset-3 is not finite" in errors and str(folder) in errors
    (report,) = (r for p in folder.glob("*.json") if "asset-3" in (r := json.loads(p.read_text()))["ids"])
    assert report["losses"]["loss"][report["ids"].index("asset-3")] == "nan"
    saved = [load_file(path)["points"] for path in sorted(folder.glob("*.safetensors"))]
    assert [points.shape for points in saved] == [(4, 12), (4, 12)]
    if step:
        tensors = stored(tmp_path, step)  # the newest checkpoint is of the steps before
        assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_full_gpu_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(self: object, *inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny.Objective, "forward", forward)
    assert train(tmp_path / "run", "train.accumulate=2") == 1
    errors = capsys.readouterr().err
    assert "step 0: out of GPU memory with parts of 4, 4 items" in errors and "train.accumulate" in errors


def test_values_that_are_not_an_item_s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.Objective, "forward", lambda self, *inputs: {"loss": torch.zeros(())})
    with pytest.raises(ValueError, match=r"loss: expected shape \[4\], got \[\]"):
        train(tmp_path / "run")


def test_two_programs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(tmp_path / "run", "sleep=0.2")
    wait_for(tmp_path / "run" / "config.yaml", process)
    assert train(tmp_path / "run") == 2
    assert "another process is training here" in capsys.readouterr().err
    process.kill()
    process.communicate()


def test_training_begins_with_the_weights_of_a_run_or_bundle(straight: Path, tmp_path: Path) -> None:
    frozen = ("train.steps=1", "train.lr=1e-30")
    assert train(tmp_path / "a", f"train.init_from={straight}", *frozen) == 0
    assert train(tmp_path / "b", f"train.init_from={straight}/bundle", *frozen) == 0
    wanted = stored(straight, 20)["ema.denoiser.first.weight"]
    for name in "ab":
        tensors = stored(tmp_path / name, 1)
        assert torch.equal(tensors["model.denoiser.first.weight"], wanted)
        assert torch.equal(tensors["ema.denoiser.first.weight"], wanted)
    assert train(tmp_path / "c", f"train.init_from={tmp_path}") == 2


def test_a_checkpoint_is_exported(straight: Path, tmp_path: Path) -> None:
    assert train(straight, "--export", str(tmp_path / "bundle")) == 0
    a, b = (load_file(f / "denoiser.safetensors") for f in (tmp_path / "bundle", straight / "bundle"))
    assert all(torch.equal(a[name], b[name]) for name in b)
