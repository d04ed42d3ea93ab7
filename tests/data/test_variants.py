"""Variants of assets: what changes, what stays, and that their ids alone say which they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diff2to3.data.variants import MAX_STRETCH, derive, derived, is_variant, original, recoloured, stretched
from diff2to3.types import Material, Mesh, Texture
from diff2to3.views.cameras import intrinsics, look_at
from diff2to3.views.config import RenderConfig
from diff2to3.views.render import render_views


@pytest.fixture(scope="module")
def ball() -> Mesh:
    """An ellipsoid with shading normals, half textured and half plain, with vertex colours."""
    trimesh = pytest.importorskip("trimesh")
    sphere = trimesh.creation.icosphere(3)
    unit = sphere.vertices / np.linalg.norm(sphere.vertices, axis=1, keepdims=True)
    scales = np.array([0.5, 0.3, 0.4])
    normals = unit / scales
    rng = np.random.default_rng(0)
    texture = Texture(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))
    count = len(sphere.faces)
    return Mesh(
        vertices=(unit * scales).astype(np.float32),
        faces=sphere.faces.astype(np.int32),
        material_ids=(np.arange(count) % 2).astype(np.int32),
        materials=(
            Material(base_color_factor=(0.9, 0.5, 0.2, 1.0), emissive_factor=(0.1, 0.0, 0.3)),
            Material(
                base_color_factor=(0.8, 1.0, 0.6, 1.0), base_color_texture=texture, emissive_texture=texture
            ),
        ),
        normals=(normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32),
        uvs=rng.random((len(unit), 2), dtype=np.float32),
        colors=np.concatenate([rng.random((len(unit), 3)), np.ones((len(unit), 1))], 1).astype(np.float32),
    )


@given(st.text("ab/-~", max_size=8), st.booleans(), st.integers(0, 12))
def test_ids_lead_back_to_their_asset(name: str, mirrored: bool, count: int) -> None:
    ids = derived(name, mirrored, count)
    assert len(set(ids)) == len(ids) == mirrored + count
    assert {original(i) for i in ids} <= {name}
    assert [is_variant(i) for i in ids] == [False] * mirrored + [True] * count
    assert not is_variant(name) and original(name) == name


@given(st.lists(st.floats(0.3, 3), min_size=3, max_size=3))
def test_a_stretched_ellipsoid_is_another_ellipsoid(ball: Mesh, factors: list[float]) -> None:
    """Points and normals against the ellipsoid's own equation, in float64."""
    mesh = stretched(ball, np.array(factors))
    scales = np.array([0.5, 0.3, 0.4]) * factors
    scales = scales / (2 * scales.max())
    points = mesh.vertices.astype(np.float64)
    np.testing.assert_allclose(((points / scales) ** 2).sum(1), 1, atol=1e-5)
    normals = points / scales**2
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    np.testing.assert_allclose(mesh.normals, normals, atol=1e-5)
    assert np.ptp(points, axis=0).max() == pytest.approx(1, abs=1e-5)
    moved = np.concatenate([ball.vertices, np.ones((len(points), 1))], 1) @ mesh.transform.T
    np.testing.assert_allclose(moved[:, :3], points, atol=1e-6)


@pytest.mark.parametrize("order", [[1, 2, 0], [0, 2, 1], [2, 1, 0]], ids=str)
def test_recoloured_pictures_are_pictures_recoloured(ball: Mesh, order: list[int]) -> None:
    views = look_at(np.array([[0.0, -3.0, 0.5], [2.0, 2.0, 1.0]]))
    ks = intrinsics(np.array([0.5, 0.5]), 48, 48)
    config = RenderConfig(outputs=())
    before, after = (
        render_views(mesh, views, ks, 48, 48, config) for mesh in (ball, recoloured(ball, order))
    )
    assert float(before.images.std()) > 0.05
    assert float((after.images - before.images[..., order]).abs().max()) < 1e-5
    assert float((after.alphas - before.alphas).abs().max()) == 0


def test_variants_are_set_by_their_ids(ball: Mesh) -> None:
    assert derive(ball, "pack/ball") is ball
    mirrored = derive(ball, "pack/ball~mirrored")
    np.testing.assert_array_equal(mirrored.vertices, ball.vertices * np.float32([-1, 1, 1]))
    sides, volumes = [], []
    for id in derived("pack/ball", False, 24):
        mesh, again = derive(ball, id), derive(ball, id)
        np.testing.assert_array_equal(mesh.vertices, again.vertices)
        assert mesh.materials[0].base_color_factor == again.materials[0].base_color_factor
        factors = np.ptp(mesh.vertices, axis=0) / np.ptp(ball.vertices, axis=0)
        assert 1 < factors.max() / factors.min() <= MAX_STRETCH
        sides.append(mesh.vertices[0, 0] * ball.vertices[0, 0] < 0)
        corners = mesh.vertices[mesh.faces].astype(np.float64)
        volumes.append(np.linalg.det(corners).sum())
    assert 4 < sum(sides) < 20  # about half are mirrored
    assert min(volumes) > 0  # and all are seen from outside
    assert len({derive(ball, i).materials[0].base_color_factor for i in derived("x", False, 24)}) == 6


def test_flat_and_plain_meshes(ball: Mesh) -> None:
    plain = dataclasses.replace(ball, normals=None, colors=None, materials=(Material(), Material()))
    mesh = derive(plain, "x~variant1")
    assert mesh.normals is None and mesh.colors is None
    flat = dataclasses.replace(plain, vertices=plain.vertices * np.float32([1, 1, 0]))
    assert np.isfinite(derive(flat, "x~variant1").vertices).all()
