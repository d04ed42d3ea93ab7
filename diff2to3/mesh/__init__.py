"""Triangle meshes of 3D Gaussians: opacity on a grid, its surface, simplified, unwrapped and textured."""

from diff2to3.mesh.convert import MeshSettings, to_mesh
from diff2to3.mesh.surface import TexturedMesh
from diff2to3.mesh.write import MESH_FORMATS, write_mesh

__all__ = ["MESH_FORMATS", "MeshSettings", "TexturedMesh", "to_mesh", "write_mesh"]
