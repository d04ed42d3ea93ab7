"""Fixtures of the training engine's tests; ``training_runs`` and ``tiny`` beside this file are imported by
name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training_runs import train


@pytest.fixture(autouse=True)
def quiet_threads() -> Iterator[None]:
    """Runs set the number of threads of their process, which here is the tests'."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps without an interruption on one process."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train(out, "train.validate_every=10", "train.sample_every=10", "train.keep=4") == 0
    return out
