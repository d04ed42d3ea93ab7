"""diff2to3: one photo in, a 3D Gaussian Splatting asset out."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout that is run without being installed, the kernels lie beside this folder instead of inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
