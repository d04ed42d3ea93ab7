"""Tests of what runs on a GPU: ``pytest tests/gpu``; ``--device cpu`` rehearses them where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """What is tested."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same, for tests that a CPU cannot stand in for."""
    if device.type != "cuda":
        pytest.skip("streams and graphs are a GPU's")
    return device
