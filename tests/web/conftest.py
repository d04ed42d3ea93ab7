"""A real browser without a screen, for the tests of pages. They skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diff2to3.types import Gaussians

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Playwright's browser over the system's Chromium, drawing in software."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A fresh page; the test fails if a script on it did."""
    context = chromium.new_context(viewport={"width": 480, "height": 360}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    context.close()
    assert faults == []


@pytest.fixture
def cloud() -> Gaussians:
    """900 Gaussians in the unit box, from needles to discs, faint and solid, with harmonics of degree 3."""
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    return Gaussians(
        uniform(900, 3) - 0.5,
        torch.randn(900, 4, generator=generator),
        torch.exp(-6.5 + 3.5 * uniform(900, 3)),
        uniform(900).clamp(0.01, 0.99),
        torch.cat([3 * uniform(900, 1, 3) - 1.5, 0.4 * torch.randn(900, 15, 3, generator=generator)], 1),
    )
