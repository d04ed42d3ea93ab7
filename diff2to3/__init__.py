"""diff2to3: one photo in, a 3D Gaussian Splatting asset out.

    import diff2to3

    model = diff2to3.ImageTo3D.from_pretrained("mini-photo")
    model("chair.jpg", seed=1).save("chair.glb")

Importing this package is fast: what it offers is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

# In a checkout that is run without being installed, the kernels lie beside this folder instead of inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

#: What this package offers → the module that has it. Type checkers read __init__.pyi.
_HOMES = {
    "Diff2to3Error": "diff2to3.errors",
    "Gaussians": "diff2to3.types",
    "ImageTo3D": "diff2to3.pipeline.image_to_3d",
    "InputError": "diff2to3.errors",
    "Mesh": "diff2to3.types",
    "Reconstructor": "diff2to3.pipeline.reconstruct",
    "Result": "diff2to3.pipeline.result",
    "load_mesh": "diff2to3.assets",
    "rasterize": "diff2to3.kernels.rasterize",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
