"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: a short run here, long ones with --slow."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from diff2to3.kernels import build

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize_run", HERE / "sanitize" / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if sys.platform != "linux":
        pytest.skip("loading the sanitizer's runtime first is written for Linux")
    try:
        module.runtime_libraries("address")
    except build.BuildError as error:
        pytest.skip(str(error))
    return module


def test_random_and_hostile_input(
    program: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = program.compile_sanitized(tmp_path, program.runnable_variants()[0])
    code, last = program.call_randomly(file, program.modules(), rounds=15)
    assert code == 0, f"{last}\n{capfd.readouterr().err}"
    code, last = program.call_randomly(file, ["broken"], rounds=1)
    assert code != 0 and "too_short" in last
    assert "AddressSanitizer: heap-buffer-overflow" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["avx512", "avx2", "baseline", "cuda"])
def test_every_variant(
    variant: str, program: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if variant not in (*program.runnable_variants(), "cuda"):
        pytest.skip(f"this machine does not run {variant}")
    file = program.compile_sanitized(tmp_path, variant)
    rounds = 60 if variant == "cuda" else 200  # a fiber a thread takes its time
    code, last = program.call_randomly(file, program.modules(), rounds, seed=1)
    assert code == 0, f"{last}\n{capfd.readouterr().err}"
