"""What ``pip install`` builds. Most tests use a stand-in for the compiler; those with --slow the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in compiler is a shell script")

#: Accepts any compiler command line and writes something where -o says.
STAND_IN = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo "compiled" > "$2"; fi
  shift
done
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command outside this test's environment variables for pip and Python; returns what it printed."""
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    if done.returncode and "No matching distribution found for setuptools" in output:
        pytest.skip("no package index to fetch setuptools from")
    assert done.returncode == 0, output
    return output


def copy_checkout(folder: Path) -> Path:
    """The files that a build needs, so that builds neither see nor touch the real checkout."""
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("diff2to3", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    return folder


def pip_wheel(checkout: Path, out: Path, **environment: str) -> tuple[Path, str]:
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, ".")
    output = run(*command, cwd=checkout, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel, output


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "c++"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout") / "diff2to3")


@pytest.fixture(scope="module")
def wheel(checkout: Path, stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from a checkout that has the remains of an earlier build, which must not get into it."""
    stale = checkout / "build" / "lib" / "diff2to3"
    stale.mkdir(parents=True)
    (stale / "removed_long_ago.py").write_text("")
    return pip_wheel(checkout, tmp_path_factory.mktemp("wheel"), CXX=str(stand_in))[0]


def test_wheel_serves_every_python_on_this_platform(wheel: Path) -> None:
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("diff2to3", "py3", "none")
    assert platform != "any"


def test_wheel_has_sources_and_libraries_and_nothing_else(wheel: Path, checkout: Path) -> None:
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    inside = {path.relative_to("diff2to3") for path in files if path.parts[0] == "diff2to3"}
    sources = {
        p.relative_to(checkout / "diff2to3") for p in (checkout / "diff2to3").rglob("*") if p.is_file()
    }
    for path in (checkout / "kernels").rglob("*"):
        if path.suffix in (".py", ".h", ".cpp", ".cu"):
            sources.add("kernels" / path.relative_to(checkout / "kernels"))
    assert sources <= inside
    libraries = {path.name for path in inside - sources if path.parts[:3] == ("kernels", "_lib", "cpu")}
    assert "manifest.json" in libraries and any(name.startswith("cpu_baseline") for name in libraries)
    others = {path for path in inside - sources if "_lib" not in path.parts}
    assert {path.suffix for path in others} <= {".typed", ".yaml", ".json", ".safetensors"} | {""}
    assert {path.parts[0] for path in files} == {
        "diff2to3",
        next(p.parts[0] for p in files if "dist-info" in str(p)),
    }


def test_installed_sources_have_the_fingerprint_of_the_build(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    package = tmp_path / "diff2to3" / "kernels"
    code = "import build; print(build.source_hash('cpu'))"
    printed = run(sys.executable, "-c", code, cwd=package)
    assert json.loads((package / "_lib/cpu/manifest.json").read_text())["sources"] == printed.strip()


def test_build_needs_setuptools_only() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires = ["setuptools>=77"]' in text.split("[project]")[0]
    used = {
        line.split()[1].split(".")[0]
        for line in (ROOT / "setup.py").read_text().splitlines()
        if is_import(line)
    }
    assert used - set(sys.stdlib_module_names) == {"setuptools"}


def is_import(line: str) -> bool:
    return line.startswith(("import ", "from "))


def test_no_compiler_still_installs(checkout: Path, tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    wheel, output = pip_wheel(checkout, tmp_path / "out", PATH=str(bin_folder), CXX="")
    assert "CPU kernels not built" in output and "no C++ compiler found" in output
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_lib/" in name]


def test_failing_compiler_still_installs(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'cc1plus: fatal error: out of disk'; exit 1\n")
    broken.chmod(0o755)
    wheel, output = pip_wheel(checkout, tmp_path / "out", CXX=str(broken))
    assert "out of disk" in output
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_lib/" in name]


def test_named_cuda_architectures_are_built(checkout: Path, stand_in: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        STAND_IN.replace("#!/bin/sh", "#!/bin/sh\n[ $1 = --list-gpu-code ] && printf 'sm_80\\nsm_90\\n'")
    )
    nvcc.chmod(0o755)
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    wheel, _ = pip_wheel(
        checkout, tmp_path / "out", CXX=str(stand_in), PATH=path, DIFF2TO3_CUDA_ARCHS="8.0;90"
    )
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("manifest.json")]
    assert sorted(Path(name).parent.name for name in names) == ["cpu", "cuda_sm80", "cuda_sm90"]


def loaded_from(python: str | Path, cwd: Path, **environment: str) -> tuple[Path, Path]:
    """The compiled library that the package loads when it runs in ``cwd``, and the file of its loader."""
    code = (
        "from diff2to3.kernels import library; print('FOUND', library.cpu_library_file(), library.__file__)"
    )
    (line,) = [
        line for line in run(python, "-c", code, cwd=cwd, **environment).splitlines() if "FOUND" in line
    ]
    _, compiled, loader = line.split()
    return Path(compiled), Path(loader)


def new_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's torch; returns its python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    outer = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(outer) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_real_installation_runs_compiled_kernels(how: str, tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = new_environment(tmp_path / "venv")
    if how == "sdist":
        run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path / "dist", ".", cwd=checkout)
        (archive,) = (tmp_path / "dist").glob("*.tar.gz")
        run(python, "-m", "pip", "install", "--no-deps", archive, cwd=tmp_path)
    else:
        option = ["-e"] if how == "editable" else []
        run(python, "-m", "pip", "install", "--no-deps", *option, checkout, cwd=tmp_path)
    compiled, loader = loaded_from(python, tmp_path)
    assert loader.is_relative_to(checkout if how == "editable" else tmp_path / "venv")
    assert compiled.is_relative_to(loader.parent / "_lib" / "cpu")


@pytest.mark.slow
def test_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    (tmp_path / "home").mkdir()
    compiled, loader = loaded_from(sys.executable, checkout, HOME=str(tmp_path / "home"))
    assert loader == checkout / "kernels" / "library.py"
    assert compiled.is_relative_to(tmp_path / "home")
