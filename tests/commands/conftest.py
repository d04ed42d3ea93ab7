"""A tiny model and tiny assets for whole commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """tests/tiny_models.py."""
    path = Path(__file__).resolve().parents[1] / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def vae(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that reconstructs."""
    return tiny_models.write_vae(tmp_path_factory.mktemp("vae") / "model")


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
