"""What type checkers and editors know of the package, whose names are imported when they are first used."""

from diff2to3.assets import load_mesh as load_mesh
from diff2to3.errors import Diff2to3Error as Diff2to3Error
from diff2to3.errors import InputError as InputError
from diff2to3.kernels.rasterize import rasterize as rasterize
from diff2to3.pipeline.image_to_3d import ImageTo3D as ImageTo3D
from diff2to3.pipeline.reconstruct import Reconstructor as Reconstructor
from diff2to3.pipeline.result import Result as Result
from diff2to3.types import Gaussians as Gaussians
from diff2to3.types import Mesh as Mesh

__version__: str
