"""A tiny model and tiny assets for whole commands."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def asset(tiny_models: ModuleType, tmp_path: Path) -> Path:
    """A red box."""
    pytest.importorskip("embreex", reason="needs the data extra")
    path = tmp_path / "box.glb"
    path.write_bytes(tiny_models.box((1.0, 0.5, 0.8), (0.8, 0.1, 0.1)))
    return path


@pytest.fixture(autouse=True)
def tiny_networks(one_thread: None) -> None:
    """Networks this small are several times slower on two threads than on one, where the machine is busy."""
