"""Objects in other axes: they look from a turned camera as they did before."""

from __future__ import annotations

import math

import pytest
import torch

from diff2to3.gaussians.render import render
from diff2to3.gaussians.turn import Y_DOWN, quat_of, turned
from diff2to3.kernels.rasterize_reference import rotation_from_quat
from diff2to3.types import Gaussians
from diff2to3.views.cameras import intrinsics, look_at


def rotations() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    random = rotation_from_quat(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    return [*random, half_turn, torch.tensor(Y_DOWN, dtype=torch.float64), torch.eye(3, dtype=torch.float64)]


@pytest.mark.parametrize("number", range(6))
def test_quaternion_of_a_matrix(number: int) -> None:
    R = rotations()[number]
    torch.testing.assert_close(rotation_from_quat(quat_of(R)[None])[0], R)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("number", [0, 3, 4])
def test_looks_the_same_from_a_turned_camera(degree: int, number: int) -> None:
    generator, R = torch.Generator().manual_seed(degree), rotations()[number].float()
    sh = 0.5 * torch.randn(60, (degree + 1) ** 2, 3, generator=generator)
    g = Gaussians(
        torch.rand(60, 3, generator=generator) - 0.5,
        torch.randn(60, 4, generator=generator),
        torch.rand(60, 3, generator=generator) * 0.1 + 0.01,
        torch.rand(60, generator=generator),
        sh,
    )
    viewmats, Ks = look_at([[0.5, -2.0, 0.7]]), intrinsics(math.radians(40), 48, 48)
    back = torch.eye(4)
    back[:3, :3] = R.T
    a = render(g, viewmats, Ks, 48, 48).colors
    b = render(turned(g, R), viewmats @ back, Ks, 48, 48).colors
    torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
