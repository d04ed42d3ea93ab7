"""Objects in other axes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diff2to3.kernels.rasterize_reference import sh_basis
from diff2to3.types import Gaussians

#: Ours (z up) to what most programs for 3DGS files show upright (y down): (x, y, z) becomes (x, −z, y).
Y_DOWN = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))


def turned(gaussians: Gaussians, rotation: Tensor) -> Gaussians:
    """The object turned by a rotation matrix [3, 3]: x becomes R x."""
    R = rotation.to(gaussians.means)
    quats = quat_product(quat_of(R), gaussians.quats)
    return replace(gaussians, means=gaussians.means @ R.T, quats=quats, sh=turned_sh(gaussians.sh, R))


def turned_sh(sh: Tensor, rotation: Tensor) -> Tensor:
    """Spherical harmonics [G, K, 3] of what is turned by R [3, 3]: seen from R d they are what they were from d.

    Each degree turns within itself; its matrix follows from the harmonics at more directions than it has of them.
    """
    degree = {1: 0, 4: 1, 9: 2, 16: 3}[int(sh.shape[1])]
    if degree == 0:
        return sh
    d = torch.nn.functional.normalize(
        torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    before, after = sh_basis(degree, d), sh_basis(degree, d @ rotation.double().cpu().T)
    parts = [sh[:, :1]]
    for n in range(1, degree + 1):
        band = slice(n * n, (n + 1) ** 2)
        matrix = torch.linalg.lstsq(after[:, band], before[:, band]).solution
        parts.append(torch.einsum("jk,gkc->gjc", matrix.to(sh), sh[:, band]))
    return torch.cat(parts, 1)


def quat_of(rotation: Tensor) -> Tensor:
    """wxyz [4] of a rotation matrix [3, 3], by the eigenvector that belongs to its quaternion's outer product."""
    m = rotation.double().cpu()
    (a, b, c), (d, e, f), (g, h, i) = m.unbind(0)
    K = torch.stack(
        [
            torch.stack([a + e + i, h - f, c - g, d - b]),
            torch.stack([h - f, a - e - i, b + d, c + g]),
            torch.stack([c - g, b + d, e - a - i, f + h]),
            torch.stack([d - b, c + g, f + h, i - a - e]),
        ]
    )
    q = torch.linalg.eigh(K).eigenvectors[:, -1]
    return (q * (-1.0 if q[0] < 0 else 1.0)).to(rotation)


def quat_product(p: Tensor, q: Tensor) -> Tensor:
    """p q for wxyz quaternions [..., 4]: first q's rotation, then p's."""
    a, b, c, d = p.unbind(-1)
    w, x, y, z = q.unbind(-1)
    parts = [
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    ]
    return torch.stack(parts, -1)
