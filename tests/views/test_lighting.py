"""Light: closed forms, shadows, and the cache of the dome."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from diff2to3.types import Material
from diff2to3.views import LightingConfig, RenderConfig, intrinsics, look_at, render_views
from diff2to3.views.lighting import Lights
from diff2to3.views.raycast import RayScene
from diff2to3.views.surface import Surface

pytest.importorskip("embreex")

_spec = importlib.util.spec_from_file_location("view_meshes", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
meshes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(meshes)
make_mesh, quad, make_cube = meshes.make_mesh, meshes.quad, meshes.make_cube

UP = ((1, 0, 0), (0, 1, 0))  # a quad over these faces +z


def radiance(mesh, point, eye, lighting, **config) -> float:
    """Linear green of what is seen at ``point``."""
    views = render_views(
        mesh,
        look_at([eye], target=point),
        intrinsics(0.2, 17, 17),
        17,
        17,
        RenderConfig(lighting=lighting, **config),
    )
    encoded = float(views.images[0, 8, 8, 1])
    return encoded / 12.92 if encoded <= 0.04045 else ((encoded + 0.055) / 1.055) ** 2.4


def test_a_free_white_floor_gets_the_intensities():
    floor = make_mesh(quad((0, 0, 0), *UP))
    dome = LightingConfig(dome_intensity=0.6, key_intensity=0, dome_samples=3)
    assert abs(radiance(floor, (0, 0, 0), (1, 0, 2), dome) - 0.6) < 2e-3
    key = LightingConfig(
        dome_intensity=0, key_intensity=0.8, key_direction=(0, 3, 4), key_angle=0, key_samples=1
    )
    assert abs(radiance(floor, (0, 0, 0), (1, 0, 2), key) - 0.8 * 0.8) < 2e-3
    # from below the key does not shine through
    assert radiance(floor, (0, 0, 0), (1, 0, -2), key) < 1e-3


@pytest.mark.parametrize("normal", [(0, 0, 1), (0, 0, -1), (1, 0, 0), (0.6, 0, 0.8)])
def test_dome_is_the_integral_of_its_gradient(normal):
    """The closed form against 200,000 random directions."""
    config = LightingConfig(dome_intensity=1.0, dome_ground=0.3)
    floor = make_mesh(quad((0, 0, 0), *UP))
    lights = Lights(config, Surface(floor), RayScene(floor.vertices, floor.faces), 8)
    directions = np.random.default_rng(0).normal(size=(200_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sky = 0.65 + 0.35 * directions[:, 2]

    def reflected(n) -> float:
        return float(4 * (sky * np.maximum(directions @ np.array(n), 0)).mean())

    found = float(lights._dome_light(np.array([normal], np.float32))[0])
    assert abs(found - reflected(normal) / reflected((0, 0, 1))) < 6e-3


def test_key_light_casts_a_shadow():
    scene = make_mesh(
        np.concatenate([quad((0, 0, 0), (2, 0, 0), (0, 2, 0)), quad((0, 0, 0.5), (0.1, 0, 0), (0, 0.1, 0))])
    )
    key = LightingConfig(
        dome_intensity=0, key_intensity=1, key_direction=(1, 0, 1), key_angle=0, key_samples=1
    )
    cosine = np.sqrt(0.5)
    assert radiance(scene, (-0.5, 0, 0), (-0.5, -3, 1), key) < 1e-3  # where the light passes the square
    assert (
        abs(radiance(scene, (0, 0, 0), (0.0, -3, 1), key) - cosine) < 5e-3
    )  # under it, but lit from the side
    free = LightingConfig(**{**vars(key), "shadows": False})
    assert abs(radiance(scene, (-0.5, 0, 0), (-0.5, -3, 1), free) - cosine) < 5e-3


def test_soft_key_has_a_penumbra():
    scene = make_mesh(
        np.concatenate([quad((0, 0, 0), (2, 0, 0), (0, 2, 0)), quad((-1, 0, 0.5), (1, 0, 0), (0, 2, 0))])
    )
    key = LightingConfig(
        dome_intensity=0, key_intensity=1, key_direction=(0, 0, 1), key_angle=20, key_samples=64
    )
    values = [radiance(scene, (x, 0, 0), (x + 0.01, -0.7, 0.4), key) for x in (-0.4, -0.05, 0.0, 0.05, 0.4)]
    assert values[0] < 0.02 and values[-1] > 0.9 and abs(values[2] - 0.5) < 0.1
    assert all(a <= b + 1e-3 for a, b in pairwise(values))


def test_glass_lets_light_through_by_its_opacity():
    for alpha, mode, wanted in (
        (0.25, "BLEND", 0.75),
        (0.25, "OPAQUE", 0.0),
        (0.25, "MASK", 1.0),
        (0.9, "MASK", 0.0),
    ):
        pane = Material(base_color_factor=(1, 1, 1, alpha), alpha_mode=mode)
        corners = np.concatenate([quad((0, 0, 0), *UP), quad((0, 0, 0.5), *UP)])
        scene = make_mesh(corners, (Material(), pane), [0, 0, 1, 1])
        key = LightingConfig(
            dome_intensity=0, key_intensity=1, key_direction=(0, 0, 1), key_angle=0, key_samples=1
        )
        assert abs(radiance(scene, (0, 0, 0), (0, -1.5, 0.3), key) - wanted) < 5e-3, (alpha, mode)


def test_closed_box_is_dark_inside_and_open_floor_is_not():
    box = make_cube(1.0)
    white = make_mesh(np.concatenate([box.triangles, quad((0, 0, 0), (0.1, 0, 0), (0, 0.1, 0))]))
    assert radiance(white, (0, 0, 0), (0.1, -0.2, 0.3), LightingConfig()) < 2e-3


def test_wall_darkens_the_floor_beside_it():
    """The dome over a floor beside a very tall wall is half hidden: closed form with a uniform sky."""
    corners = np.concatenate(
        [quad((0, 0, 0), (3, 0, 0), (0, 3, 0)), quad((-0.003, 0, 0), (0, 60, 0), (0, 0, 60))]
    )
    sky = LightingConfig(
        dome_intensity=1, dome_ground=1, key_intensity=0, dome_samples=2000, dome_resolution=8
    )
    found = radiance(make_mesh(corners), (0.5, 0.1, 0), (1.0, 0.2, 1), sky)
    assert abs(found - 0.5) < 0.02


def test_dome_cache_agrees_with_tracing_at_the_points():
    """Interpolated visibility against rays from the very points, on a scene with contacts and openings."""
    rng = np.random.default_rng(0)
    corners = [
        quad((0, 0, -0.5), (0.5, 0, 0), (0, 0.5, 0)),
        *(quad(rng.uniform(-0.3, 0.3, 3), *UP) * 0.5 for _ in range(3)),
    ]
    corners.append(make_cube(0.2).triangles)
    mesh = make_mesh(np.concatenate(corners))
    surface = Surface(mesh)
    config = LightingConfig(dome_samples=64, dome_resolution=128)
    lights = Lights(config, surface, RayScene(mesh.vertices, mesh.faces), 8)
    faces = rng.integers(0, mesh.num_faces, 4000)
    u, v = np.sort(rng.uniform(0, 1, (2, 4000)), axis=0).astype(np.float32)
    u, v = u, v - u
    sides = rng.integers(0, 2, 4000)
    turn = np.where(sides == 1, -1.0, 1.0).astype(np.float32)[:, None]
    flat = surface.normals[faces] * turn
    direct = lights._dome_visibility(surface.positions(faces, u, v), flat, flat)
    cached = lights._seen.read(faces, sides, u, v)
    error = np.abs(cached - direct)
    assert error.mean() < 0.01 and np.quantile(error, 0.99) < 0.08
    assert cached.min() >= 0 and cached.max() <= 1 + 1e-6


def test_dome_grids_are_small_where_faces_are():
    from diff2to3.views.dome import DomeCache

    needle = np.array([[[0, 0, 0], [1, 0, 0], [0.5, 0.001, 0]]])
    dot = np.array([[[0, 0, 1], [0.001, 0, 1], [0, 0.001, 1]]])
    cache = DomeCache(Surface(make_mesh(np.concatenate([needle, dot]))), 0.01, lambda p, f, s: p[:, 0])
    values = cache.read(np.array([0, 0, 1]), np.zeros(3, int), np.array([0.0, 1.0, 0.2]), np.zeros(3))
    assert cache._num_points.tolist() == [2 * 101, 1]
    np.testing.assert_allclose(values, [0, 1, 0.0003], atol=2e-3)  # the x of the points themselves


def test_smooth_shading_follows_the_files_normals():
    tilted = np.tile(np.array([0.6, 0, 0.8], np.float32), (6, 1))
    mesh = make_mesh(quad((0, 0, 0), *UP), normals=tilted)
    key = LightingConfig(
        dome_intensity=0, key_intensity=1, key_direction=(0.6, 0, 0.8), key_angle=0, key_samples=1
    )
    assert abs(radiance(mesh, (0, 0, 0), (1, 0, 2), key) - 1.0) < 5e-3
    assert abs(radiance(mesh, (0, 0, 0), (1, 0, 2), key, smooth=False) - 0.8) < 5e-3


@pytest.mark.parametrize(
    "bad", [{"mode": "disco"}, {"dome_samples": 0}, {"key_direction": (0, 0, 0)}, {"dome_ground": 1.5}]
)
def test_bad_settings_name_the_field(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LightingConfig(**bad)
