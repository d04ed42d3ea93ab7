"""Cameras around an asset, and what they see."""

from diff2to3.views.cameras import (
    CAMERA_SETS,
    CameraConfig,
    generator_for,
    intrinsics,
    look_at,
    sample_cameras,
)
from diff2to3.views.config import BlenderConfig, LightingConfig, RenderConfig
from diff2to3.views.render import make_renderer, render_views
from diff2to3.views.rendered import MeshRenderer, RenderedViews

__all__ = [
    "CAMERA_SETS",
    "BlenderConfig",
    "CameraConfig",
    "LightingConfig",
    "MeshRenderer",
    "RenderConfig",
    "RenderedViews",
    "generator_for",
    "intrinsics",
    "look_at",
    "make_renderer",
    "render_views",
    "sample_cameras",
]
