"""Stages put together: from a photo or a text to 3D Gaussians.

photo ─prepare─▶ image ─conditioner─▶ tokens ─structure flow─▶ occupancy ─▶ voxels ─latent flow─▶ latents
      ─decoder─▶ Gaussians
"""

from diff2to3.pipeline.image_to_3d import ImageTo3D, Result, StageSettings

__all__ = ["ImageTo3D", "Result", "StageSettings"]
