"""A tiny generator, as a folder for the command and as a model for the functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from diff2to3.pipeline import ImageTo3D

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pipeline_helpers


@pytest.fixture(scope="session")
def tiny(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    """tests/tiny_generator.py."""
    return load_source(Path(__file__).resolve().parents[1] / "tiny_generator.py")


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
