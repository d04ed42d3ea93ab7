"""Stages put together: from a photo or a text to 3D Gaussians.

photo ─prepare─▶ picture ─conditioner─▶ tokens ─structure flow─▶ occupancy ─▶ voxels ─latent flow─▶ latents
      ─decoder─▶ Gaussians
"""

from diff2to3.flow.denoise import StageSettings
from diff2to3.pipeline.image_to_3d import ImageTo3D
from diff2to3.pipeline.result import Result

__all__ = ["ImageTo3D", "Result", "StageSettings"]
