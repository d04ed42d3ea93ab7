"""The Gaussian rasteriser in plain PyTorch: readable, differentiable by autograd, any device and float dtype.

The reading version of kernels/rasterize.py and the oracle of its tests. One tile at a time, all of the tile's
pixels against all of the Gaussians that reach it, so it is slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16


@dataclass(frozen=True)
class RasterSettings:
    """What both versions need besides tensors; see :func:`kernels.rasterize.rasterize`."""

    width: int
    height: int
    sh_degree: int | None
    with_depth: bool
    eps2d: float
    antialiased: bool
    near_plane: float
    max_alpha: float
    alpha_threshold: float
    transmittance_stop: float


@dataclass(frozen=True)
class Splats:
    """Gaussians on the screen of one view: means2d [G, 2], conics [G, 3] (a, b, c), opacities [G], depths
    [G].

    ``rects`` [G, 4] holds the first and last pixel column and row that each can reach (empty if first >
    last).
    """

    means2d: Tensor
    conics: Tensor
    opacities: Tensor
    depths: Tensor
    rects: Tensor


def rotation_from_quat(quats: Tensor) -> Tensor:
    """Rotation matrices [G, 3, 3] of the normalised quaternions [G, 4] (wxyz)."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmat: Tensor,
    K: Tensor,
    s: RasterSettings,
) -> Splats:
    """EWA projection into one view with the screen filter eps2d (px²) and, if asked, mip-splatting's
    compensation.
    """
    cam = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    in_front = cam[:, 2] > s.near_plane
    z = torch.where(in_front, cam[:, 2], torch.ones_like(cam[:, 2]))
    u, v = cam[:, 0] / z, cam[:, 1] / z
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]

    # The linearisation is held at 15 % beyond the image's borders, as 3DGS and gsplat do.
    margin_x, margin_y = 0.15 * s.width / fx, 0.15 * s.height / fy
    ju = torch.minimum(torch.maximum(u, -(cx / fx + margin_x)), (s.width - cx) / fx + margin_x)
    jv = torch.minimum(torch.maximum(v, -(cy / fy + margin_y)), (s.height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * ju / z, zero, fy / z, -fy * jv / z], -1).reshape(-1, 2, 3)

    root = jacobian @ viewmat[:3, :3] @ (rotation_from_quat(quats) * scales[:, None, :])  # [G, 2, 3]
    cov = root @ root.transpose(-1, -2)
    xx, xy, yy = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
    det0 = torch.linalg.cross(root[:, 0], root[:, 1]).square().sum(-1)
    det = (det0 + s.eps2d * (xx + yy + s.eps2d)).clamp_min(1e-10)
    conics = torch.stack([(yy + s.eps2d) / det, -xy / det, (xx + s.eps2d) / det], -1)
    if s.antialiased:
        seen_edge_on = det0 <= 1e-20  # there the square root has no slope
        ratio = torch.where(seen_edge_on, torch.ones_like(det0), det0) / det
        opacities = opacities * torch.where(seen_edge_on, zero, ratio.sqrt())

    with torch.no_grad():
        reach = (
            2 * (opacities.clamp_min(1e-30) / s.alpha_threshold).log()
            if s.alpha_threshold
            else zero + torch.inf
        )
        seen = in_front & (reach > 0)
        extent = (
            reach.clamp_min(0)[:, None] * torch.stack([xx + s.eps2d, yy + s.eps2d], -1)
        ).sqrt() * 1.0001 + 0.01
        center, size = torch.stack([fx * u + cx, fy * v + cy], -1), center_limits(s, means)
        first = (center - extent - 0.5).ceil().maximum(torch.zeros_like(size)).minimum(size)
        last = (center + extent - 0.5).floor().minimum(size - 1).maximum(-torch.ones_like(size))
        last = torch.where(seen[:, None], last, -torch.ones_like(last))
        rects = torch.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], -1).long()
    means2d = torch.stack([fx * u + cx, fy * v + cy], -1)
    return Splats(means2d, conics, opacities, cam[:, 2], rects)


def center_limits(s: RasterSettings, like: Tensor) -> Tensor:
    return torch.tensor([s.width, s.height], dtype=like.dtype, device=like.device)


def sh_basis(degree: int, dirs: Tensor) -> Tensor:
    """Real spherical harmonics in the order and with the signs of 3DGS files: [G, 3] unit -> [G, (degree +
    1)²].
    """
    x, y, z = dirs.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    basis = [torch.full_like(x, 0.28209479177387814)]
    if degree >= 1:
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        c = 1.0925484305920792
        basis += [c * x * y, -c * y * z, 0.31539156525252005 * (2 * zz - xx - yy), -c * x * z]
        basis += [0.5462742152960396 * (xx - yy)]
    if degree >= 3:
        basis += [-0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * x * y * z]
        basis += [-0.4570457994644658 * y * (4 * zz - xx - yy)]
        basis += [0.3731763325901154 * z * (2 * zz - 3 * (xx + yy))]
        basis += [-0.4570457994644658 * x * (4 * zz - xx - yy)]
        basis += [1.445305721320277 * z * (xx - yy), -0.5900435899266435 * x * (xx - 3 * yy)]
    return torch.stack(basis, -1)


def colors_from_features(features: Tensor, means: Tensor, campos: Tensor, sh_degree: int | None) -> Tensor:
    """Colours [G, C] seen from ``campos`` [3]: max(0, ½ + Σ_k Y_k sh_k), or the plain colours themselves."""
    if sh_degree is None:
        return features
    basis = sh_basis(sh_degree, torch.nn.functional.normalize(means - campos, dim=-1))
    terms = (sh_degree + 1) ** 2
    return (torch.einsum("gk,gkc->gc", basis, features[:, :terms]) + 0.5).clamp_min(0)


def blend_tile(
    pixels: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor, s: RasterSettings
) -> tuple[Tensor, Tensor]:
    """Blend Gaussians, near to far, over pixel centres [P, 2]: colours [P, C] and remaining transmittance
    [P].
    """
    dx, dy = (pixels[:, None, :] - means2d[None]).unbind(-1)  # [P, G]
    a, b, c = conics.unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alphas = (opacities * torch.exp(-sigma)).clamp_max(s.max_alpha)
    alphas = torch.where((sigma >= 0) & (alphas >= s.alpha_threshold), alphas, torch.zeros_like(alphas))
    after = torch.cumprod(1 - alphas, dim=-1)
    # The Gaussian that would take the transmittance to the stop, and everything behind it, does not count.
    # (Once at or below the stop the product stays there, so the pixels' counted Gaussians are exactly those
    # above it.)
    alphas = torch.where(after > s.transmittance_stop, alphas, torch.zeros_like(alphas))
    after = torch.cumprod(1 - alphas, dim=-1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], -1)
    return (alphas * before) @ colors, after[:, -1]


def rasterize_view(
    splats: Splats, colors: Tensor, background: Tensor | None, s: RasterSettings
) -> tuple[Tensor, Tensor]:
    """One view from projected Gaussians and their colours [G, C]: picture [H, W, C] and alphas [H, W]."""
    order = torch.argsort(splats.depths, stable=True)
    x0, x1, y0, y1 = splats.rects[order].unbind(-1)
    base = (
        torch.zeros(colors.shape[-1], dtype=colors.dtype, device=colors.device)
        if background is None
        else background
    )
    rows, row_alphas = [], []
    for top in range(0, s.height, TILE):
        tiles, tile_alphas = [], []
        for left in range(0, s.width, TILE):
            bottom, right = min(top + TILE, s.height), min(left + TILE, s.width)
            ys = torch.arange(top, bottom, dtype=colors.dtype, device=colors.device) + 0.5
            xs = torch.arange(left, right, dtype=colors.dtype, device=colors.device) + 0.5
            pixels = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
            inside = (x0 < right) & (x1 >= left) & (y0 < bottom) & (y1 >= top) & (x0 <= x1) & (y0 <= y1)
            ids = order[inside]
            if len(ids):
                args = (splats.means2d[ids], splats.conics[ids], splats.opacities[ids], colors[ids])
                color, transmittance = blend_tile(pixels, *args, s)
            else:
                color, transmittance = (
                    pixels.new_zeros(len(pixels), colors.shape[-1]),
                    pixels.new_ones(len(pixels)),
                )
            color = color + transmittance[:, None] * base
            tiles.append(color.reshape(bottom - top, right - left, -1))
            tile_alphas.append(1 - transmittance.reshape(bottom - top, right - left))
        rows.append(torch.cat(tiles, 1))
        row_alphas.append(torch.cat(tile_alphas, 1))
    return torch.cat(rows, 0), torch.cat(row_alphas, 0)


def rasterize_reference(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor,
    viewmats: Tensor,
    campos: Tensor,
    Ks: Tensor,
    backgrounds: Tensor | None,
    s: RasterSettings,
) -> tuple[Tensor, Tensor]:
    """Pictures [V, H, W, C (+ 1 with depth)] and alphas [V, H, W]. Shapes as in kernels/rasterize.py."""
    pictures, alphas = [], []
    for v in range(viewmats.shape[0]):
        splats = project(means, quats, scales, opacities, viewmats[v], Ks[v], s)
        view_features = features[v] if s.sh_degree is None and features.ndim == 3 else features
        colors = colors_from_features(view_features, means, campos[v], s.sh_degree)
        if s.with_depth:
            colors = torch.cat([colors, splats.depths[:, None]], -1)
        picture, alpha = rasterize_view(splats, colors, None if backgrounds is None else backgrounds[v], s)
        pictures.append(picture)
        alphas.append(alpha)
    if not pictures:
        channels = (3 if s.sh_degree is not None else features.shape[-1]) + int(s.with_depth)
        return means.new_zeros(0, s.height, s.width, channels), means.new_zeros(0, s.height, s.width)
    return torch.stack(pictures), torch.stack(alphas)
