"""A tiny generator, as a folder for the command and as a model for the functions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from diff2to3.pipeline import ImageTo3D


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny_generator.py."""
    path = Path(__file__).resolve().parents[1] / "tiny_generator.py"
    spec = importlib.util.spec_from_file_location("tiny_generator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bundles(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbone → bundle."""
    root = tmp_path_factory.mktemp("bundles")
    return {backbone: tiny.write_generator(root / backbone, backbone) for backbone in ("smdit", "dit")}


@pytest.fixture(scope="session")
def model(bundles: dict[str, Path]) -> ImageTo3D:
    return ImageTo3D.from_pretrained(str(bundles["smdit"]))


@pytest.fixture(scope="session")
def photos(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four photo files."""
    root = tmp_path_factory.mktemp("photos")
    paths = [root / f"photo{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        tiny.photo(i).save(path)
    return paths
