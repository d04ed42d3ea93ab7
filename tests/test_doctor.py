"""``diff2to3 doctor``: what it says when things are missing or broken."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from diff2to3 import doctor
from diff2to3.cli import main
from diff2to3.kernels import build, cache, library


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def lines_of(name: str, checks: list[doctor.Check]) -> list[doctor.Check]:
    return [check for check in checks if check.name == name]


def test_json_has_every_line_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    text, checks = report(capsys), json.loads(report(capsys, "--json"))
    assert {check["section"] for check in checks} == {"system", "kernels", "devices", "packages", "backends"}
    for check in checks:
        assert check["name"] in text and check["value"] in text
        assert check["status"] in doctor.STATUSES
        assert check["fix"] is None or check["fix"] in text


def test_everything_missing_has_a_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_nvcc", lambda: (_ for _ in ()).throw(build.BuildError("no nvcc")))
    monkeypatch.setattr(library, "cpu_library", lambda: None)
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: None)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    checks = doctor.collect()
    missing = {check.name for check in checks if check.status == doctor.MISSING}
    expected = {"C++ compiler", "CPU kernels", "nvcc", "CUDA GPU"}
    assert missing >= expected | {package.module for package in doctor.PACKAGES}
    assert all(check.fix for check in checks if check.status == doctor.MISSING)
    assert all("cpu: reference" in check.value for check in checks if check.name in doctor.KERNEL_OPS)
    (conv,) = lines_of("sparse convolution", checks)
    assert "no compiled kernels" in conv.value and "(train.conv_backend)" in conv.value
    assert "spconv (not installed)" in conv.value
    (attention,) = lines_of("attention", checks)
    assert "(train.attention_backend)" in attention.value and "xformers (not installed)" in attention.value
    (raster,) = lines_of("rasterize", checks)
    assert "(diff2to3 render --backend)" in raster.value and "gsplat (not installed)" in raster.value
    text = report(capsys)
    assert 'pip install "diff2to3[flux]"' in text and 'pip install "diff2to3[nvcc]"' in text


def test_every_optional_import_of_the_package_is_listed() -> None:
    folder = Path(doctor.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    lazy = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"__future__"}
    required = {"torch", "numpy", "omegaconf", "PIL", "safetensors", "tqdm", "yaml", "diff2to3"}
    part_of_others = {"mathutils", "pillow_heif"}  # Blender's; pi_heif's twin
    part_of_others |= {"typing_extensions"}  # for type checkers only; torch requires it
    assert lazy - required - part_of_others <= {package.module for package in doctor.PACKAGES}


def make_package(folder: Path, name: str, version: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_placeholder_kaolin_is_told_from_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, "kaolin", "0.1", "raise ImportError('placeholder')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (check,) = lines_of("kaolin", list(doctor.packages()))
    assert check.status == doctor.BROKEN and "placeholder" in check.value
    assert check.fix is not None and "nvidia-kaolin" in check.fix


def test_packages_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "kaolin", "0.18.0", f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    (check,) = lines_of("kaolin", list(doctor.packages()))
    assert check.status == doctor.OK and "0.18.0" in check.value
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("code", ["raise ImportError('needs libfoo')", "import os; os.abort()"])
def test_imports_option_survives_broken_packages(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, "broken_package", "1.0", code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PACKAGES", (doctor.Package("broken_package", "testing", "pip install it"),))
    (quick,), (thorough,) = list(doctor.packages()), list(doctor.packages(imports=True))
    assert quick.status == doctor.OK
    assert thorough.status == doctor.BROKEN and "does not import" in thorough.value


def test_old_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(
        build, "version_of", lambda compiler: "Cuda compilation tools, release 13.0, V13.0.88"
    )
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: (12, 4))
    (check,) = lines_of("nvcc", list(doctor.kernels()))
    assert check.status == doctor.BROKEN and "12.4" in check.value
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: (13, 1))
    (check,) = lines_of("nvcc", list(doctor.kernels()))
    assert check.status == doctor.OK


def test_cached_cuda_kernels_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "cache_roots", lambda: [tmp_path])
    monkeypatch.setattr(cache, "BESIDE", tmp_path / "_lib")
    tmp_path.chmod(0o700)
    folder = cache.cached_folder(tmp_path, "cuda_sm90")
    folder.mkdir()
    (folder / "cuda.so").write_bytes(b"1234")
    manifest = {
        "sources": build.source_hash("cuda_sm90"),
        "compiler": "release 13.0",
        "files": {"cuda.so": 4},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (check,) = lines_of("CUDA kernels", list(doctor.kernels()))
    assert "sm90" in check.value and "release 13.0" in check.value
    (folder / "cuda.so").write_bytes(b"12")
    (check,) = lines_of("CUDA kernels", list(doctor.kernels()))
    assert "none yet" in check.value
