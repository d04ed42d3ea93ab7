"""Texture sampling against torch, brute force and arithmetic in linear light."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.types import Texture
from diff2to3.views.textures import DECODE, TexturePack, encode_srgb


def random_texture(rng, height=5, width=7, **options) -> Texture:
    return Texture(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), **options)


def linear(texture: Texture) -> np.ndarray:
    pixels = texture.pixels.astype(np.float64) / 255
    rgb = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    return np.concatenate([rgb[..., :3], pixels[..., 3:]], -1)


def read(texture: Texture, uvs: np.ndarray, lod: float = 0.0) -> np.ndarray:
    n = len(uvs)
    return TexturePack([texture]).sample(np.zeros(n, int), uvs.astype(np.float32), np.full(n, lod))


def test_encode_and_decode_are_inverse():
    np.testing.assert_allclose(encode_srgb(DECODE), np.arange(256) / 255, atol=1e-4)
    np.testing.assert_array_equal(encode_srgb(np.array([-1.0, 0.0, 1.0, 7.0])), [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("wrap", "padding"), [("clamp", "border"), ("mirror", "reflection"), ("repeat", "repeat")]
)
def test_bilinear_agrees_with_torch(wrap, padding):
    rng = np.random.default_rng(0)
    texture = random_texture(rng, wrap=(wrap, wrap))
    uvs = rng.uniform(-1.4, 2.4, (500, 2))
    image = torch.from_numpy(linear(texture)).permute(2, 0, 1)[None]
    grid = uvs.copy()
    if padding == "repeat":  # torch cannot: repeat the image and shift the coordinates instead
        image, grid, padding = image.tile(1, 1, 7, 7), (np.mod(grid, 1) + 3) / 7, "border"
    at = torch.from_numpy(grid * 2 - 1)[None, None]
    wanted = torch.nn.functional.grid_sample(image, at, padding_mode=padding, align_corners=False)
    np.testing.assert_allclose(read(texture, uvs), wanted[0, :, 0].T, atol=2e-5)


def test_each_axis_wraps_by_itself_and_textures_do_not_mix():
    rng = np.random.default_rng(1)
    textures = [random_texture(rng, 3, 4, wrap=("repeat", "clamp")), random_texture(rng, 6, 2)]
    uvs = rng.uniform(-2, 3, (200, 2)).astype(np.float32)
    index = rng.integers(0, 2, 200)
    together = TexturePack(textures).sample(index, uvs, np.zeros(200))
    for k in (0, 1):
        np.testing.assert_array_equal(together[index == k], read(textures[k], uvs[index == k]))
    clamped = read(textures[0], np.array([[0.3, 9.0]]))
    np.testing.assert_allclose(clamped, read(textures[0], np.array([[1.3, 1.0]])), atol=1e-6)


def test_nearest_gives_texels():
    rng = np.random.default_rng(2)
    texture = random_texture(rng, mag_filter="nearest")
    uvs = rng.uniform(0, 1, (300, 2))
    rows, columns = (uvs[:, 1] * 5).astype(int), (uvs[:, 0] * 7).astype(int)
    np.testing.assert_allclose(read(texture, uvs), linear(texture)[rows, columns], atol=1e-6)


def test_minified_checkerboard_is_the_mean_of_light():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[(np.add.outer(np.arange(64), np.arange(64)) % 2).astype(bool), :3] = 255
    uvs = np.random.default_rng(3).uniform(0, 1, (50, 2))
    for lod in (1.0, 2.5, 6.0, 20.0):
        found = read(Texture(pixels), uvs, lod)
        np.testing.assert_allclose(found[:, :3], 0.5, atol=3e-3)  # and not the 0.21 of averaged codes
        np.testing.assert_allclose(found[:, 3], 1)
    sharp = read(Texture(pixels, mip_filter="none"), uvs, 6.0)
    assert sharp[:, 0].std() > 0.1


def test_levels_blend_continuously():
    texture = random_texture(np.random.default_rng(4), 32, 32)
    uvs = np.random.default_rng(5).uniform(0, 1, (40, 2))
    lods = np.linspace(0.0, 5, 101)
    values = np.stack([read(texture, uvs, lod) for lod in lods])
    assert np.abs(np.diff(values, axis=0)).max() < 0.08
    whole = linear(texture).mean((0, 1))
    np.testing.assert_allclose(values[-1], np.tile(whole, (40, 1)), atol=6e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(-1e4, 1e4), st.floats(-3, 8))
def test_any_size_and_place(height, width, u, lod):
    texture = random_texture(np.random.default_rng(0), height, width)
    found = read(texture, np.array([[u, -u / 3]]), lod)
    low, high = linear(texture).min((0, 1)), linear(texture).max((0, 1))
    assert (found >= low - 4e-3).all() and (found <= high + 4e-3).all()
