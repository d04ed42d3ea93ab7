"""What precision things are computed in, whatever the device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import diff2to3

ROOT = Path(diff2to3.__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("diff2to3/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("kernels/*.py")])
SWITCHES = re.compile(
    r"matmul\.allow_tf32\s*=|cudnn\.allow_tf32\s*=|set_float32_matmul_precision|fp32_precision\s*="
)


def test_nothing_turns_tf32_on() -> None:
    """SSIM subtracts products of float32 matrices that nearly cancel; a global switch would reach it too."""
    assert len(SOURCES) > 100
    assert [str(path) for path in SOURCES if SWITCHES.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "line", ["torch.backends.cuda.matmul.allow_tf32 = True", "set_float32_matmul_precision('high')"]
)
def test_the_switches_are_recognised(line: str) -> None:
    assert SWITCHES.search(line)
