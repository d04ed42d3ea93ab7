"""Compiles the kernels while the package is built: the CPU part always, the CUDA part where it has a use.

All project metadata is in pyproject.toml. This file only adds what that format cannot say: the folder
``kernels/`` is installed as ``diff2to3.kernels``, and its C++ sources are compiled into plain shared
libraries (no PyTorch and no Python header, so one build serves every version of both).

The CUDA part is compiled here if nvcc is there and either a GPU is, or DIFF2TO3_CUDA_ARCHS names the compute
capabilities to compile for ("80 90", for images built on a machine without a GPU). Otherwise it is compiled
at first use.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_builder():
    """Import kernels/build.py by path: the package around it needs torch, which is not here at build time."""
    spec = importlib.util.spec_from_file_location("diff2to3_kernel_build", ROOT / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cuda_capabilities():
    """Compute capabilities to compile for now, as numbers such as 90."""
    if names := os.environ.get("DIFF2TO3_CUDA_ARCHS"):
        return sorted(
            {int(name.replace(".", "")) for name in names.replace(";", " ").replace(",", " ").split()}
        )
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        return sorted({int(line.replace(".", "")) for line in printed.split()})
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


class FreshBuild(build):
    """Build outside the checkout: files left there by an earlier build would end up in the wheel."""

    def initialize_options(self):
        super().initialize_options()
        self.folder = tempfile.TemporaryDirectory(prefix="diff2to3-build-")
        self.build_base = self.folder.name


class BuildWithKernels(build_py):
    """build_py, then the compiled kernels beside the Python files (in the checkout if editable)."""

    def run(self):
        super().run()
        builder = load_builder()
        package = ROOT / "kernels" if self.editable_mode else Path(self.build_lib) / "diff2to3" / "kernels"
        try:
            builder.build_cpu(package / "_lib" / "cpu", os.environ.get("CXX"))
        except (builder.BuildError, OSError) as error:
            # The PyTorch reference still runs, so a missing compiler must not stop the installation.
            print(f"diff2to3: CPU kernels not built: {error}", file=sys.stderr)
        try:
            for capability in cuda_capabilities():
                builder.build_cuda(package / "_lib" / f"cuda_sm{capability}", capability)
        except (builder.BuildError, OSError) as error:
            print(f"diff2to3: CUDA kernels not built: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform, but on no Python version: tag py3-none-<platform>."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


packages = find_packages(str(ROOT), include=["diff2to3", "diff2to3.*"])
setup(
    packages=[*packages, "diff2to3.kernels"],
    package_dir={"diff2to3": "diff2to3", "diff2to3.kernels": "kernels"},
    package_data={
        "diff2to3.kernels": ["csrc/*.h", "csrc/*/*"],
        "diff2to3": [
            "py.typed",
            "*.pyi",
            "**/*.yaml",
            "**/*.json",
            "**/*.safetensors",
            "bundles/*/README.md",
            "bundles/*/LICENSE*",
            "web/static/*",
        ],
    },
    include_package_data=False,
    cmdclass={"build": FreshBuild, "build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
