"""What tests of the pipeline compare results with."""

from __future__ import annotations

from diff2to3.pipeline import Result

NAMES = ("means", "quats", "scales", "opacities", "sh")


def difference(a: Result, b: Result) -> float:
    """Largest difference of two objects' Gaussians; infinite where they are on other voxels."""
    if a.latents.coords.tolist() != b.latents.coords.tolist():
        return float("inf")
    return max(float((getattr(a.gaussians, n) - getattr(b.gaussians, n)).abs().max()) for n in NAMES)
