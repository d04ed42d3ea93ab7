"""The ray caster against geometry worked out by hand and against brute force in float64."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.types import Material, Texture
from diff2to3.views import LightingConfig, RenderConfig, intrinsics, look_at, make_renderer, render_views
from diff2to3.views.config import OUTPUTS

pytest.importorskip("embreex")

_spec = importlib.util.spec_from_file_location("view_meshes", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
meshes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(meshes)
make_mesh, quad, make_cube = meshes.make_mesh, meshes.quad, meshes.make_cube

UNLIT = LightingConfig(mode="unlit")


def shot(mesh, eye, size=64, fov=40.0, **config):
    """One view of ``mesh`` from ``eye``, with everything."""
    options = {"lighting": UNLIT, "outputs": OUTPUTS, **config}
    Ks = intrinsics(np.radians(fov), size, size)
    return render_views(mesh, look_at([eye]), Ks, size, size, RenderConfig(**options))


def project(views, points) -> np.ndarray:
    """Pixel coordinates of world points in view 0."""
    camera = views.viewmats[0].double().numpy() @ np.c_[points, np.ones(len(points))].T
    image = views.Ks[0].double().numpy() @ camera[:3]
    return (image[:2] / image[2]).T


def encode(x):
    x = np.asarray(x, float)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)


# -- colour and orientation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", range(6))
def test_each_side_of_the_cube_from_its_own_direction(cube, side):
    views = shot(cube, 2 * meshes.SIDES[side])
    middle = views.images[0, 28:36, 28:36]
    np.testing.assert_allclose(middle, np.broadcast_to(meshes.COLORS[side], (8, 8, 3)), atol=2 / 255)
    assert float(views.alphas[0, 32, 32]) == 1
    np.testing.assert_allclose(views.depths[0, 32, 32], 1.5, atol=1e-5)
    np.testing.assert_allclose(views.normals[0, 32, 32], meshes.SIDES[side], atol=1e-6)


def test_a_corner_shows_three_sides_in_their_places(cube):
    views = shot(cube, (1.3, -1.5, 1.1), size=128)
    visible = [0, 3, 4]  # +x, -y, +z
    for side, (x, y) in zip(visible, project(views, meshes.SIDES[visible] / 2), strict=True):
        found = views.images[0, int(y), int(x)]
        np.testing.assert_allclose(found, meshes.COLORS[side], atol=2 / 255)
        assert int(views.triangle_ids[0, int(y), int(x)]) // 2 == side
    top, right = (project(views, [meshes.SIDES[k] / 2])[0] for k in (4, 0))
    assert top[1] < 64  # z is up in the image
    assert right[0] > 64  # and from the front, x points right: not mirrored


def test_linear_factors_are_encoded():
    grey = Material(base_color_factor=(0.2, 0.5, 0.7, 1))
    views = shot(make_mesh(quad((0, 0, 0), (1, 0, 0), (0, 0, 1)), (grey,)), (0, -2, 0))
    np.testing.assert_allclose(views.images[0, 32, 32], encode([0.2, 0.5, 0.7]), atol=2 / 255)


def test_texture_is_upright_and_straight():
    """A 2 x 2 texture on a quad that fills the view: the image is the texture."""
    pixels = np.array(
        [[[255, 0, 0, 255], [0, 255, 0, 255]], [[0, 0, 255, 255], [255, 255, 255, 255]]], np.uint8
    )
    texture = Texture(pixels, ("clamp", "clamp"), "nearest")
    corners = quad((0, 0, 0), (1, 0, 0), (0, 0, 1))  # seen from -y: x right, z up
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 1], [1, 0], [0, 0]], np.float32)
    mesh = make_mesh(corners, (Material(base_color_texture=texture),), uvs=uvs)
    views = shot(mesh, (0, -2, 0), size=32, fov=2 * np.degrees(np.arctan(0.5)))
    quarters = views.images[0, [8, 8, 24, 24], [8, 24, 8, 24]]
    np.testing.assert_allclose(quarters, pixels.reshape(4, 4)[:, :3] / 255, atol=1e-3)


def test_minified_texture_is_antialiased_in_linear_light():
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, ::2, :3] = 255
    corners = quad((0, 0, 0), (1, 0, 0), (0, 0, 1))
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 1], [1, 0], [0, 0]], np.float32)
    mesh = make_mesh(corners, (Material(base_color_texture=Texture(pixels)),), uvs=uvs)
    views = shot(mesh, (0, -2, 0), size=32, fov=40)
    inside = views.images[0, 8:24, 8:24]
    np.testing.assert_allclose(inside, float(encode(0.5)), atol=0.02)


def test_vertex_colours_interpolate():
    colors = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], np.float32)
    mesh = make_mesh(np.array([[[-0.5, 0, -0.5], [0.5, 0, -0.5], [0, 0, 0.5]]]), colors=colors)
    views = shot(mesh, (0, -2, 0), size=65)
    (x, y) = project(views, [mesh.vertices.mean(0)])[0]
    np.testing.assert_allclose(views.images[0, int(y), int(x)], encode([1 / 3] * 3), atol=0.02)


def test_emission_and_unlit_materials():
    lamp = Material(base_color_factor=(0, 0, 0, 1), emissive_factor=(0.25, 0.5, 4))
    plain = Material(base_color_factor=(0.3, 0.3, 0.3, 1), unlit=True)
    corners = np.concatenate(
        [quad((0, 0, 0), (0.2, 0, 0), (0, 0, 0.2)), quad((0.5, 0, 0), (0.2, 0, 0), (0, 0, 0.2))]
    )
    mesh = make_mesh(corners, (lamp, plain), [0, 0, 1, 1])
    views = shot(mesh, (0, -2, 0), lighting=LightingConfig())
    (x0, y0), (x1, y1) = project(views, [[0, 0, 0], [0.5, 0, 0]]).astype(int)
    np.testing.assert_allclose(views.images[0, y0, x0], encode([0.25, 0.5, 1]), atol=2 / 255)
    np.testing.assert_allclose(views.images[0, y1, x1], encode([0.3] * 3), atol=2 / 255)


# -- geometry --------------------------------------------------------------------------------------------------


def brute_force(mesh, views, view=0):
    """Nearest hits of pixel-centre rays by Moeller-Trumbore in float64: (face [H, W], depth [H, W])."""
    m, K = views.viewmats[view].double().numpy(), views.Ks[view].double().numpy()
    height, width = views.images.shape[1:3]
    ys, xs = np.mgrid[0:height, 0:width] + 0.5
    camera = np.stack([(xs - K[0, 2]) / K[0, 0], (ys - K[1, 2]) / K[1, 1], np.ones_like(xs)], -1)
    rays, eye = camera @ m[:3, :3], -m[:3, :3].T @ m[:3, 3]
    best, face = np.full((height, width), np.inf), np.full((height, width), -1)
    for index, (a, b, c) in enumerate(mesh.triangles.astype(np.float64)):
        across = np.cross(rays, c - a)
        determinant = across @ (b - a)
        other = np.cross(eye - a, b - a)
        with np.errstate(all="ignore"):
            u, v, t = (
                across @ (eye - a) / determinant,
                rays @ other / determinant,
                (c - a) @ other / determinant,
            )
            hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0) & (t < best)
        best[hit], face[hit] = t[hit], index
    return face, np.where(face >= 0, best, 0)


@pytest.mark.parametrize("supersample", [1, 2, 3])
def test_geometry_agrees_with_brute_force(soup, supersample):
    mesh = soup(60, supersample)
    views = shot(mesh, (1.1, -1.0, 0.7), size=64, supersample=supersample)
    face, depth = brute_force(mesh, views)
    found = views.triangle_ids[0].numpy()
    covered = views.alphas[0].numpy() > 0
    same = (found == face) | ((found == -1) & ~covered)  # a sliver between all samples is not seen at all
    assert same.mean() > 0.999
    hit = same & (found >= 0)
    np.testing.assert_allclose(views.depths[0].numpy()[hit], depth[hit], atol=2e-5)
    assert (views.depths[0].numpy()[found < 0] == 0).all()


def test_points_normals_and_depths_are_one_story(soup):
    mesh = soup(40, 9)
    views = shot(mesh, (0.9, 1.2, -0.8), size=96)
    face = views.triangle_ids[0].numpy()
    ys, xs = np.nonzero(face >= 0)
    points = views.points[0].numpy()[ys, xs].astype(np.float64)
    np.testing.assert_allclose(project(views, points), np.c_[xs, ys] + 0.5, atol=2e-3)
    camera = np.c_[points, np.ones(len(points))] @ views.viewmats[0].double().numpy().T
    np.testing.assert_allclose(camera[:, 2], views.depths[0].numpy()[ys, xs], atol=1e-5)
    corners = mesh.triangles[face[ys, xs]].astype(np.float64)
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(((points - corners[:, 0]) * flat).sum(1), 0, atol=1e-5)
    normals = views.normals[0].numpy()[ys, xs]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert (views.normals[0].numpy()[face < 0] == 0).all() and (views.points[0].numpy()[face < 0] == 0).all()


def test_flat_normals_face_the_camera_and_smooth_ones_interpolate():
    normals = np.array([[0.6, -0.8, 0], [-0.6, -0.8, 0], [0, -0.8, 0.6]], np.float32)
    mesh = make_mesh(np.array([[[-0.5, 0, -0.5], [0.5, 0, -0.5], [0, 0, 0.5]]]), normals=normals)
    views = shot(mesh, (0, -2, 0), size=65, smooth=False)
    np.testing.assert_allclose(views.normals[0, 32, 32], [0, -1, 0], atol=1e-6)
    behind = shot(mesh, (0, 2, 0), size=65, smooth=False)
    np.testing.assert_allclose(behind.normals[0, 32, 32], [0, 1, 0], atol=1e-6)
    smooth = shot(mesh, (0, -2, 0), size=65)
    (x, y) = project(smooth, [mesh.vertices.mean(0)])[0]
    np.testing.assert_allclose(smooth.normals[0, int(y), int(x)], [0, -0.97, 0.24], atol=0.02)


def test_alpha_is_the_covered_share():
    """A vertical edge that sweeps over a pixel: alpha follows in steps of the samples."""
    for offset, wanted in ((0.0, 0.5), (0.2, 0.5), (0.3, 1.0), (-0.3, 0.0), (-0.2, 0.5)):
        size, focal = 8, 8 / 2 / np.tan(np.radians(20))
        edge = offset * 2 / focal  # where the edge crosses column 4, in pixels from its middle
        middle = 0.5 * 2 / focal
        corners = quad((middle + edge - 1, 0, 0), (1, 0, 0), (0, 0, 1))
        views = shot(make_mesh(corners), (0, -2, 0), size=size)
        np.testing.assert_allclose(views.alphas[0, 4, 4], wanted, atol=1e-6)
        np.testing.assert_allclose(
            views.images[0, 4, 4], float(wanted > 0), atol=1e-3
        )  # straight, not darkened


def test_camera_inside_and_pixels_off_centre(cube):
    Ks = intrinsics(np.radians(90), 33, 33).clone()
    Ks[0, 0, 2] += 5
    views = render_views(
        cube, look_at([[0.01, 0, 0]]), Ks, 33, 33, RenderConfig(lighting=UNLIT, outputs=OUTPUTS)
    )
    face, depth = brute_force(cube, views)
    assert float(views.alphas.min()) == 1
    same = views.triangle_ids[0].numpy() // 2 == face // 2
    assert same.mean() > 0.98
    np.testing.assert_allclose(views.depths[0].numpy()[same], depth[same], atol=1e-5)


# -- transparency ----------------------------------------------------------------------------------------------


def stack(*materials) -> object:
    """Squares behind each other along +y, the first in front."""
    corners = [quad((0, 0.1 * k, 0), (0.5, 0, 0), (0, 0, 0.5)) for k in range(len(materials))]
    return make_mesh(np.concatenate(corners), materials, np.repeat(np.arange(len(materials)), 2))


def test_blended_layers_composite_in_linear_light():
    red = Material(base_color_factor=(1, 0, 0, 0.25), alpha_mode="BLEND")
    green = Material(base_color_factor=(0, 1, 0, 0.5), alpha_mode="BLEND")
    blue = Material(base_color_factor=(0, 0, 1, 0.1))  # opaque: its alpha is ignored
    two = shot(stack(red, green), (0, -2, 0))
    alpha = 0.25 + 0.75 * 0.5
    np.testing.assert_allclose(two.alphas[0, 32, 32], alpha, atol=1e-6)
    wanted = encode(np.array([0.25, 0.375, 0]) / alpha)
    np.testing.assert_allclose(two.images[0, 32, 32], wanted, atol=2 / 255)
    np.testing.assert_allclose(
        two.depths[0, 32, 32], 2.1, atol=1e-4
    )  # the first that is at least half opaque
    three = shot(stack(red, green, blue), (0, -2, 0))
    assert float(three.alphas[0, 32, 32]) == 1
    np.testing.assert_allclose(three.images[0, 32, 32], encode([0.25, 0.375, 0.375]), atol=2 / 255)
    one = shot(stack(red), (0, -2, 0))
    assert int(one.triangle_ids[0, 32, 32]) == -1 and float(one.alphas[0, 32, 32]) == 0.25


def test_masked_texture_has_holes():
    pixels = np.full((2, 2, 4), 255, np.uint8)
    pixels[0, :, 3] = 100  # the upper half is below the cutoff
    texture = Texture(pixels, ("clamp", "clamp"), "nearest", mip_filter="none")
    uvs = np.tile(np.array([[0, 1], [1, 1], [1, 0], [0, 1], [1, 0], [0, 0]], np.float32), (2, 1))
    mask = Material(base_color_texture=texture, alpha_mode="MASK", alpha_cutoff=0.5)
    back = Material(base_color_factor=(0, 0, 1, 1))
    corners = np.concatenate([quad((0, y, 0), (0.5, 0, 0), (0, 0, 0.5)) for y in (0, 0.2)])
    views = shot(make_mesh(corners, (mask, back), [0, 0, 1, 1], uvs=uvs), (0, -2, 0))
    np.testing.assert_allclose(views.images[0, 24, 32], [0, 0, 1], atol=2 / 255)
    np.testing.assert_allclose(views.images[0, 40, 32], [1, 1, 1], atol=2 / 255)
    np.testing.assert_allclose(views.depths[0, [24, 40], 32], [2.2, 2.0], atol=1e-4)


def test_back_faces():
    single = make_mesh(quad((0, 0, 0), (0.5, 0, 0), (0, 0, 0.5)), (Material(double_sided=False),))
    both = make_mesh(quad((0, 0, 0), (0.5, 0, 0), (0, 0, 0.5)), (Material(double_sided=True),))
    for mesh, eye, mode, seen in (
        (single, -2, "cull", True),
        (single, 2, "cull", False),
        (both, 2, "cull", True),
        (single, 2, "show", True),
    ):
        views = shot(mesh, (0, eye, 0), back_faces=mode)
        assert bool(views.alphas[0, 32, 32] > 0) == seen and bool(views.triangle_ids[0, 32, 32] >= 0) == seen


def test_no_more_layers_than_allowed():
    glass = Material(base_color_factor=(1, 1, 1, 0.5), alpha_mode="BLEND")
    views = shot(stack(*[glass] * 6), (0, -2, 0), max_layers=2)
    np.testing.assert_allclose(views.alphas[0, 32, 32], 0.75)


# -- the call --------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for(cube):
    plain = render_views(
        cube, look_at([[0, -2, 0]]), intrinsics(0.7, 16, 16), 16, 16, RenderConfig(outputs=())
    )
    assert plain.depths is plain.normals is plain.points is plain.triangle_ids is None
    assert plain.renderer.startswith("raycast (embreex")
    some = shot(cube, (0, -2, 0), size=16, outputs=("normals",))
    assert some.normals is not None and some.depths is None
    picked = shot(cube, (0, -2, 0), size=16).select([0])
    assert picked.triangle_ids is not None and picked.renderer == plain.renderer


def test_views_do_not_depend_on_what_was_rendered_before(soup):
    mesh = soup(80, 3)
    Ks = intrinsics(np.full(3, 0.7), 48, 48)
    viewmats = look_at([[0, -2, 0.5], [2, 0, -0.5], [-1, 1, 1.5]])
    config = RenderConfig(outputs=OUTPUTS)
    together = make_renderer(mesh, config).render(viewmats, Ks, 48, 48)
    renderer = make_renderer(mesh, config)
    for view in (2, 0, 1):
        alone = renderer.render(viewmats[[view]], Ks[[view]], 48, 48)
        for key in ("images", "alphas", *OUTPUTS):
            assert torch.equal(getattr(alone, key)[0], getattr(together, key)[view]), key


def test_tiles_do_not_show(soup, monkeypatch):
    from diff2to3.views import tracer

    mesh = soup(50, 4)
    whole = shot(mesh, (1, 1, 1), size=50, lighting=LightingConfig())
    monkeypatch.setattr(tracer, "_TILE_SAMPLES", 700)
    tiled = shot(mesh, (1, 1, 1), size=50, lighting=LightingConfig())
    for key in ("images", "alphas", *OUTPUTS):
        assert torch.equal(getattr(whole, key), getattr(tiled, key)), key


def test_looser_bounds_do_not_show(soup, monkeypatch):
    from diff2to3.views import tracer

    mesh = soup(30, 5)
    tight = shot(mesh, (1, -1, 1), size=50)
    monkeypatch.setattr(tracer, "_MAX_OUTLINE", 0)
    loose = shot(mesh, (1, -1, 1), size=50)
    for key in ("images", "alphas", *OUTPUTS):
        assert torch.equal(getattr(tight, key), getattr(loose, key)), key


def test_global_generators_are_left_alone(cube):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    shot(cube, (1, 1, 1), size=16, lighting=LightingConfig())
    after = np.random.get_state()[1]  # noqa: NPY002
    assert (after == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"viewmats": torch.zeros(0, 4, 4)}, "viewmats: expected"),
        ({"Ks": torch.eye(3)[None].repeat(2, 1, 1)}, "Ks: expected"),
        ({"width": 0}, "width, height"),
        ({"viewmats": torch.full((1, 4, 4), float("nan"))}, "finite"),
        ({"viewmats": 2 * torch.eye(4)[None]}, "rotations and translations"),
        ({"Ks": torch.tensor([[[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]]])}, "no skew"),
    ],
)
def test_bad_cameras(cube, change, reason):
    call = {"viewmats": look_at([[0, -2, 0]]), "Ks": intrinsics(0.7, 8, 8), "width": 8, "height": 8, **change}
    with pytest.raises(ValueError, match=reason):
        render_views(cube, **call)


def test_missing_ray_caster_is_named(cube, monkeypatch):
    from diff2to3.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    with pytest.raises(MissingDependencyError, match=r'embreex .*pip install "diff2to3\[data\]"'):
        make_renderer(cube)


@pytest.mark.parametrize(
    "bad",
    [
        {"renderer": "povray"},
        {"supersample": 0},
        {"outputs": ("colour",)},
        {"back_faces": "hide"},
        {"max_layers": 0},
    ],
)
def test_bad_settings_name_the_field(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RenderConfig(**bad)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=40))
def test_group_samples(pairs):
    from diff2to3.views.tracer import group_samples

    pairs = sorted(pairs, key=lambda p: p[0])
    pixels, faces = (np.array([p[k] for p in pairs], int) for k in (0, 1))
    first, members = group_samples(pixels, faces)
    assert len(first) == len(set(pairs))
    for sample, group in enumerate(members):
        assert pairs[first[group]] == pairs[sample] and first[group] <= sample
