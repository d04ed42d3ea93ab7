"""Options and fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diff2to3.kernels import cache

#: The checkout.
ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--device", default="cuda", help="what tests/gpu runs on: cuda, or cpu for a rehearsal")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="takes minutes; run with --slow")
    skip_cuda = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        rehearsed = config.getoption("--device") == "cpu" and {"device", "gpu"} & set(item.fixturenames)  # type: ignore[attr-defined]
        if "cuda" in item.keywords and not torch.cuda.is_available() and not rehearsed:
            item.add_marker(skip_cuda)


def pytest_report_header() -> str:
    built = next(cache.existing("cpu"), None)
    return f"torch {torch.__version__}, CPU kernels: {built or 'to be compiled at first use'}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures beside the checkout; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder with fixtures")
    return folder


@pytest.fixture(scope="session")
def load_source() -> Callable[[Path], ModuleType]:
    """Imports a Python file that is in no package: a program, or what tests share."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny_models(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    """tests/tiny_models.py."""
    return load_source(ROOT / "tests" / "tiny_models.py")


@pytest.fixture(scope="session")
def vae(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that reconstructs."""
    return Path(tiny_models.write_vae(tmp_path_factory.mktemp("vae") / "model"))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator on the CPU."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run a test with one thread: for many small operations, waiting for others costs more than they help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run a test with two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
