"""The gradio app: what its button does. Skips where the extra "demo" is not installed."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from diff2to3.formats.ply import read_ply
from diff2to3.pipeline import ImageTo3D

gradio = pytest.importorskip("gradio", reason='needs gradio: pip install "diff2to3[demo]"')
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def app(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    return load_source(ROOT / "integrations" / "gradio" / "app.py")


@pytest.fixture(scope="module")
def tiny(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    return load_source(ROOT / "tests" / "tiny_generator.py")


@pytest.fixture(scope="module")
def model(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ImageTo3D:
    return ImageTo3D.from_pretrained(str(tiny.write_generator(tmp_path_factory.mktemp("bundle") / "tiny")))


def test_button(app: ModuleType, tiny: ModuleType, model: ImageTo3D) -> None:
    told: list[Any] = []
    shown, files, notes = app.generate(
        model, tiny.photo(0), 4, 0, lambda share, desc: told.append((share, desc))
    )
    assert shown.startswith("<iframe") and "&lt;!doctype html&gt;" in shown and notes == ""
    page = html.unescape(shown.split('srcdoc="')[1].split('" width')[0])
    assert page == Path(files[-1]).read_text(encoding="utf-8")
    want = model(tiny.photo(0), seed=4).gaussians
    assert len(read_ply(files[0])[0]) == len(want) and read_ply(files[0])[1]["seed"] == 4
    assert {desc for _, desc in told} == {"Shape", "Surface and colour"}


@pytest.mark.parametrize("photo", [None, Image.new("RGBA", (40, 40))])
def test_what_cannot_be_used(app: ModuleType, model: ImageTo3D, photo: Any) -> None:
    with pytest.raises(gradio.Error):
        app.generate(model, photo, 0, 0, lambda share, desc: None)


def test_page_is_built(app: ModuleType, model: ImageTo3D) -> None:
    page = app.build(model)
    assert [
        block.label
        for block in page.blocks.values()
        if getattr(block, "label", None) == "Photo of one object"
    ]
