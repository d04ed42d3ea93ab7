"""Views of a mesh: RGBA, depth, normals, points and triangle ids from one pass, by a choice of renderers."""

from __future__ import annotations

from torch import Tensor

from diff2to3.types import Mesh
from diff2to3.views.config import RenderConfig
from diff2to3.views.rendered import MeshRenderer, RaycastRenderer, RenderedViews


def make_renderer(mesh: Mesh, config: RenderConfig | None = None) -> MeshRenderer:
    """The renderer that ``config`` names, ready for ``mesh``. Use it for several calls on one mesh."""
    config = config or RenderConfig()
    if config.renderer == "raycast":
        return RaycastRenderer(mesh, config)
    if config.renderer == "kaolin":
        from diff2to3.views.kaolin import KaolinRenderer

        return KaolinRenderer(mesh, config)
    from diff2to3.views.blender import BlenderRenderer

    return BlenderRenderer(mesh, config)


def render_views(
    mesh: Mesh,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    config: RenderConfig | None = None,
) -> RenderedViews:
    """``mesh`` from V cameras: viewmats [V, 4, 4] world -> camera, Ks [V, 3, 3] in pixels. On the CPU."""
    return make_renderer(mesh, config).render(viewmats, Ks, width, height)
