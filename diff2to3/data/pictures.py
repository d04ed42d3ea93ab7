"""Views as bytes: colour with straight alpha as lossless WebP, 8 bits a channel; depth as PNG, 16 bits.

Lossless WebP because on renderings at 256² it takes 0.65 of PNG's space at its best level and decodes faster.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.types import Views

#: Every asset lies in the sphere of this radius around the origin, which bounds the depths to be stored.
_BOUNDING_RADIUS = 3**0.5 / 2 + 1e-3
_STEPS = 65534  # code 0 means that nothing is seen; 1 to 65535 are depths
_WEBP_METHOD = 2  # 0 is fastest and twice the size, 6 slowest


def encode_image(image: Tensor, alpha: Tensor) -> bytes:
    """sRGB [H, W, 3] and alpha [H, W] in [0, 1] -> WebP with straight alpha; colour is 0 where alpha is."""
    rgba = torch.cat([image, alpha[..., None]], -1).mul(255).round().clamp(0, 255).to(torch.uint8)
    rgba = torch.where(rgba[..., 3:] > 0, rgba, 0)
    stream = io.BytesIO()
    Image.fromarray(rgba.numpy()).save(
        stream, "WEBP", lossless=True, quality=20, method=_WEBP_METHOD, exact=True
    )
    return stream.getvalue()


def decode_image(data: bytes) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`encode_image`: float32 [H, W, 3] and [H, W]."""
    rgba = _pixels(data, "WEBP").astype(np.float32)
    if rgba.shape[2] == 3:  # an image without any transparency is stored without alpha
        rgba = np.concatenate([rgba, np.full_like(rgba[..., :1], 255)], 2)
    values = torch.from_numpy(rgba / 255)
    return values[..., :3].contiguous(), values[..., 3].contiguous()


def depth_range(viewmat: Tensor) -> tuple[float, float]:
    """Nearest and farthest depth of anything in the unit box, from a camera given as world -> camera [4,
    4]."""
    center = float(viewmat[2, 3].double())  # depth of the origin
    return max(center - _BOUNDING_RADIUS, 1e-3), center + _BOUNDING_RADIUS


def encode_depth(depth: Tensor, viewmat: Tensor) -> bytes:
    """Depth [H, W] (0 where nothing is seen) -> 16-bit PNG over the view's :func:`depth_range`."""
    near, far = depth_range(viewmat)
    codes = 1 + ((depth.double() - near) / (far - near) * _STEPS).round().clamp(0, _STEPS)
    codes = torch.where(depth > 0, codes, 0)
    stream = io.BytesIO()
    Image.fromarray(codes.numpy().astype(np.uint16)).save(stream, "PNG")
    return stream.getvalue()


def decode_depth(data: bytes, viewmat: Tensor) -> Tensor:
    """The inverse of :func:`encode_depth`: float32 [H, W]."""
    near, far = depth_range(viewmat)
    codes = torch.from_numpy(_pixels(data, "PNG").astype(np.float64))
    return torch.where(codes > 0, near + (codes - 1) / _STEPS * (far - near), 0).float()


@dataclass(frozen=True)
class PackedViews:
    """Views at 8 bits a channel, as they are stored: ``rgba`` uint8 [V, H, W, 4]; the rest as in Views."""

    rgba: Tensor
    viewmats: Tensor
    Ks: Tensor
    depths: Tensor | None


def pack_views(views: Views) -> PackedViews:
    """Views whose pictures are from :func:`decode_image`, in a quarter of the bytes."""
    rgba = torch.cat([views.images, views.alphas[..., None]], -1).mul_(255).round_().to(torch.uint8)
    return PackedViews(rgba, views.viewmats, views.Ks, views.depths)


def unpack_views(views: Views | PackedViews) -> Views:
    """The inverse of :func:`pack_views`, to the last bit; other views as they are."""
    if isinstance(views, Views):
        return views
    values = views.rgba.float().div_(255)
    return Views(
        values[..., :3].contiguous(), values[..., 3].contiguous(), views.viewmats, views.Ks, views.depths
    )


def shrink(views: Views, size: int) -> Views:
    """Square views at a size that divides theirs, box-filtered with premultiplied alpha; cameras follow.

    Depths are dropped: they have no mean across an edge.
    """
    if views.height % size or views.width != views.height:
        raise ValueError(f"size: {size} does not divide square views of {views.width} x {views.height}")
    factor = views.height // size
    if factor == 1:
        return views

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)

    alphas = pool(views.alphas[..., None])
    images = pool(views.images * views.alphas[..., None]) / alphas.clamp(min=1e-6)
    scale = views.Ks.new_tensor([1 / factor, 1 / factor, 1.0])[:, None]
    return Views(images, alphas[..., 0], views.viewmats, views.Ks * scale)


def _pixels(data: bytes, kind: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(data), formats=[kind]))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"stored image: damaged: {error}") from error
