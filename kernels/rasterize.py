"""Gaussian rasterisation: projection, spherical harmonics, depth order, tiles, front-to-back blending; and
back.

    rasterize(means, ..., sh=...)   -> Rendering(colors, alphas, depths)    differentiable
    blending_weights(..., masks)    -> [G, M] each Gaussian's share of the masked pixels

The arithmetic is that of 3D Gaussian Splatting (Kerbl et al. 2023) with gsplat's conventions; the
antialiased mode is mip-splatting's 2D filter (Yu et al. 2024), which the paper's renderer uses with eps2d =
0.1 (DESIGN P3.3). Plain PyTorch version: rasterize_reference.py. C++: csrc/cpu/rasterize*.cpp. CUDA:
csrc/cuda/rasterize.cu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import BACKENDS, call, define_op, resolve_backend, scratch, target
from .rasterize_gsplat import rasterize_gsplat
from .rasterize_reference import RasterSettings, rasterize_reference

TILE = 16
MAX_CHANNELS = 32
MAX_IMAGE_SIDE = 32767
MAX_GAUSSIANS = 1 << 24  # indices within a tile's list are kept in float lanes, exact up to here
SH_TERMS = (1, 4, 9, 16)

#: Bits of the kernels' report of numbers that are not finite.
BAD_ARGUMENTS = {1: "means", 2: "quats", 4: "scales", 8: "opacities", 16: "sh or colors"}


class Rendering(NamedTuple):
    """What a camera sees.

    colors  [V, H, W, C]  blended over the background (black where none is given)
    alphas  [V, H, W]     coverage
    depths  [V, H, W]     Σ weight · z in object units, not divided by alpha; None unless asked for
    """

    colors: Tensor
    alphas: Tensor
    depths: Tensor | None


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    sh: Tensor | None = None,
    colors: Tensor | None = None,
    backgrounds: Tensor | None = None,
    depth: bool = False,
    eps2d: float = 0.3,
    antialiased: bool = False,
    near_plane: float = 0.01,
    max_alpha: float = 0.999,
    alpha_threshold: float = 1 / 255,
    transmittance_stop: float = 1e-4,
    backend: str = "auto",
) -> Rendering:
    """Render G Gaussians into V views. Differentiable in every float tensor but ``Ks``.

    Args:
        means: [G, 3] in world units.
        quats: [G, 4] wxyz, of any length but 0.
        scales: [G, 3] standard deviations in world units.
        opacities: [G] in [0, 1].
        viewmats: [V, 4, 4] world -> camera, OpenCV axes.
        Ks: [V, 3, 3] in pixels, no skew; the centre of the top-left pixel is (0.5, 0.5).
        sh: [G, K, 3] with K = 1, 4, 9 or 16; colour = max(0, 0.5 + Σ Y_k sh_k). Give either this or
        ``colors``. colors: [G, C] or, for each view its own, [V, G, C]; C <= 32.
        backgrounds: [C] or [V, C].
        depth: also return Σ weight · z.
        eps2d: variance in px² added to every Gaussian on the screen.
        antialiased: scale opacities so that the added variance adds no light (mip-splatting).
        near_plane: Gaussians whose centre is nearer than this are not drawn.
        max_alpha: clamp on one Gaussian's alpha (0.999 in gsplat 1.5, 0.99 in gsplat 1.6 and 3DGS).
        alpha_threshold: smaller alphas do not count.
        transmittance_stop: a pixel is finished before the Gaussian that would leave this little light.
        backend: ``auto``, ``native`` or ``reference`` (kernels/library.py), or ``gsplat`` for that package's CUDA
            kernels (rasterize_gsplat.py).

    Raises:
        ValueError: a wrong shape, dtype or device, or a number that is not finite; the message names the
        argument.
    """
    if backend not in (*BACKENDS, "gsplat"):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, gsplat; got {backend!r}")
    features, sh_degree = check_scene(means, quats, scales, opacities, viewmats, Ks, sh, colors)
    channels = 3 if sh_degree is not None else features.shape[-1]
    check_number("width", width, 1, MAX_IMAGE_SIDE)
    check_number("height", height, 1, MAX_IMAGE_SIDE)
    for name, value in (("eps2d", eps2d), ("near_plane", near_plane), ("alpha_threshold", alpha_threshold)):
        check_number(name, value, 0, float("inf"))
    check_number("max_alpha", max_alpha, 0, 1)
    check_number("transmittance_stop", transmittance_stop, 0, 1)
    if backgrounds is not None:
        backgrounds = check_backgrounds(backgrounds, viewmats, channels, depth)
    campos = camera_positions(viewmats)
    settings = RasterSettings(
        width,
        height,
        sh_degree,
        depth,
        eps2d,
        antialiased,
        near_plane,
        max_alpha,
        alpha_threshold,
        transmittance_stop,
    )
    args = (means, quats, scales, opacities, features, viewmats, campos, Ks, backgrounds)
    if backend == "gsplat":
        picture, alphas = rasterize_gsplat(*args, settings)
    elif resolve_backend(backend, means.device, means.dtype) == "native":
        picture, alphas = rasterize_forward(
            *(None if a is None else a.contiguous() for a in args), *flat(settings)
        )[:2]
    else:
        for name, tensor in zip(
            BAD_ARGUMENTS.values(), (means, quats, scales, opacities, features), strict=True
        ):
            check_finite(name, tensor)
        picture, alphas = rasterize_reference(*args, settings)
    if not depth:
        return Rendering(picture, alphas, None)
    return Rendering(picture[..., :channels], alphas, picture[..., channels])


def blending_weights(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    masks: Tensor,
    **settings: float | bool | str,
) -> Tensor:
    """Σ over views and pixels of mask · blending weight: [G, M].

    The back-projection of 2D masks to Gaussians (CAST3D) and, with an all-ones mask, their importance for
    pruning. A picture is linear in the Gaussians' colours with the blending weights as factors, so these
    sums are the gradient with respect to the colours of ⟨mask, picture⟩.

    Args:
        masks: [V, H, W] or [V, H, W, M] with M <= 32, any real weights.
        settings: ``eps2d`` … ``backend`` of :func:`rasterize`.
    """
    if masks.ndim not in (3, 4) or masks.shape[0] != viewmats.shape[0]:
        raise ValueError(
            f"masks: expected [V, H, W] or [V, H, W, M] with V = {viewmats.shape[0]}, got {list(masks.shape)}"
        )
    stacked = masks[..., None] if masks.ndim == 3 else masks
    ones = torch.ones(
        len(means), stacked.shape[-1], dtype=means.dtype, device=means.device, requires_grad=True
    )
    height, width = masks.shape[1:3]
    with torch.enable_grad():
        fixed = [t.detach() for t in (means, quats, scales, opacities, viewmats, Ks)]
        size: list[Any] = [width, height]
        picture = rasterize(*fixed, *size, colors=ones, **settings).colors  # type: ignore[arg-type]
        (weights,) = torch.autograd.grad(picture, ones, stacked.to(picture))
    return weights


# ---------------------------------------------------------------- checks
def check_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    fits = tensor.ndim == len(shape) and all(w in (None, s) for s, w in zip(tensor.shape, shape, strict=True))
    if not fits:
        want = ", ".join("?" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape [{want}], got {list(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected {like.dtype} on {like.device} like means, got {tensor.dtype} on {tensor.device}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Compiled graphs leave this out: a branch on values would cut them in two. (The kernels check for themselves.)"""
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: contains NaN or infinite numbers")


def check_scene(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    sh: Tensor | None,
    colors: Tensor | None,
) -> tuple[Tensor, int | None]:
    """Features and the SH degree (None for plain colours), or ValueError naming the argument at fault."""
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means: expected float32 or float64, got {means.dtype}")
    check_tensor("means", means, (None, 3), means)
    g, v = means.shape[0], viewmats.shape[0]
    if g > MAX_GAUSSIANS:
        raise ValueError(f"means: at most {MAX_GAUSSIANS} Gaussians, got {g}")
    check_tensor("quats", quats, (g, 4), means)
    check_tensor("scales", scales, (g, 3), means)
    check_tensor("opacities", opacities, (g,), means)
    check_tensor("viewmats", viewmats, (None, 4, 4), means)
    check_tensor("Ks", Ks, (v, 3, 3), means)
    check_finite("viewmats", viewmats)
    check_finite("Ks", Ks)
    if not torch.compiler.is_compiling() and not bool((Ks[:, [0, 1], [0, 1]] > 0).all()):
        raise ValueError("Ks: focal lengths must be positive")
    if (sh is None) == (colors is None):
        raise ValueError("sh, colors: give exactly one of them")
    if sh is not None:
        check_tensor("sh", sh, (g, None, 3), means)
        if sh.shape[1] not in SH_TERMS:
            raise ValueError(f"sh: expected 1, 4, 9 or 16 coefficients, got {sh.shape[1]}")
        return sh, SH_TERMS.index(sh.shape[1])
    assert colors is not None
    check_tensor("colors", colors, (g, None) if colors.ndim == 2 else (v, g, None), means)
    if not 1 <= colors.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"colors: expected 1 to {MAX_CHANNELS} channels, got {colors.shape[-1]}")
    return colors, None


def check_backgrounds(backgrounds: Tensor, viewmats: Tensor, channels: int, depth: bool) -> Tensor:
    """Backgrounds as [V, C], with a zero for depth."""
    v = viewmats.shape[0]
    check_tensor(
        "backgrounds", backgrounds, (channels,) if backgrounds.ndim == 1 else (v, channels), viewmats
    )
    check_finite("backgrounds", backgrounds)
    backgrounds = backgrounds.expand(v, channels)
    return torch.nn.functional.pad(backgrounds, (0, 1)) if depth else backgrounds


def camera_positions(viewmats: Tensor) -> Tensor:
    """Camera centres in the world: [V, 3]."""
    inverse, singular = torch.linalg.inv_ex(viewmats)
    if not torch.compiler.is_compiling() and bool(singular.any()):
        raise ValueError("viewmats: a matrix cannot be inverted")
    return inverse[:, :3, 3]


# ---------------------------------------------------------------- the ops
SCENE_SCHEMA = (
    "Tensor means, Tensor quats, Tensor scales, Tensor opacities, Tensor features, Tensor viewmats, Tensor campos, "
    "Tensor Ks, Tensor? backgrounds"
)
SETTINGS_SCHEMA = (
    "int width, int height, int sh_degree, bool with_depth, float eps2d, bool antialiased, float near_plane, "
    "float max_alpha, float alpha_threshold, float transmittance_stop"
)
STATE_NAMES = ("transmittance", "last_ids", "splats", "view_colors", "offsets", "ids", "tile_offsets")
STATE_SCHEMA = ", ".join(f"Tensor {name}" for name in STATE_NAMES)


def flat(s: RasterSettings) -> tuple[int, int, int, bool, float, bool, float, float, float, float]:
    """Settings in the order of SETTINGS_SCHEMA; -1 stands for plain colours."""
    degree = -1 if s.sh_degree is None else s.sh_degree
    return (
        s.width, s.height, degree, s.with_depth, float(s.eps2d), s.antialiased,
        float(s.near_plane), float(s.max_alpha), float(s.alpha_threshold), float(s.transmittance_stop),
    )  # fmt: skip


def suffix(tensor: Tensor) -> str:
    return {torch.float32: "f32", torch.float64: "f64"}[tensor.dtype]


def num_tiles(width: int, height: int) -> int:
    return -(-width // TILE) * -(-height // TILE)


def num_channels(features: Tensor, sh_degree: int) -> int:
    return 3 if sh_degree >= 0 else features.shape[-1]


def feature_strides(features: Tensor, sh_degree: int) -> tuple[int, int]:
    """Numbers a Gaussian, and numbers from one view's features to the next (0 where views share them)."""
    if sh_degree >= 0:
        return features.shape[1] * 3, 0
    return features.shape[-1], features.shape[1] * features.shape[2] if features.ndim == 3 else 0


def scene_args(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, features: Tensor, viewmats: Tensor,
    campos: Tensor, Ks: Tensor, width: int, height: int, sh_degree: int, with_depth: bool, eps2d: float,
    antialiased: bool, near_plane: float, alpha_threshold: float,
) -> tuple[Tensor | int | float, ...]:  # fmt: skip
    """The leading arguments of every C function (D23_SCENE_ARGS)."""
    size, view_stride = feature_strides(features, sh_degree)
    return (
        means, quats, scales, opacities, features, viewmats, campos, Ks, means.shape[0], viewmats.shape[0], size,
        view_stride, sh_degree, num_channels(features, sh_degree), with_depth, antialiased, width, height,
        eps2d, near_plane, alpha_threshold,
    )  # fmt: skip


def color_source(features: Tensor, view_colors: Tensor, num_gaussians: int) -> tuple[Tensor, int]:
    """Where blending reads colours, and its stride from view to view: features themselves if they are
    colours.
    """
    if view_colors.numel():
        return view_colors, num_gaussians * view_colors.shape[-1]
    return features, num_gaussians * features.shape[-1] if features.ndim == 3 else 0


def raise_bad(flags: int) -> None:
    for bit, name in BAD_ARGUMENTS.items():
        if flags & bit:
            raise ValueError(f"{name}: contains NaN or infinite numbers")


@define_op(
    "rasterize_forward",
    f"({SCENE_SCHEMA}, {SETTINGS_SCHEMA}) -> (Tensor picture, Tensor alphas, {STATE_SCHEMA})",
    device_types=("cpu", "cuda"),
)
def rasterize_forward(  # type: ignore[no-untyped-def]
    means, quats, scales, opacities, features, viewmats, campos, Ks, backgrounds, width, height, sh_degree,
    with_depth, eps2d, antialiased, near_plane, max_alpha, alpha_threshold, transmittance_stop,
):  # fmt: skip
    """Picture [V, H, W, C], alphas [V, H, W], and what the backward pass needs (STATE_NAMES)."""
    g, v, device = means.shape[0], viewmats.shape[0], means.device
    channels = num_channels(features, sh_degree) + int(with_depth)
    scene = scene_args(
        means, quats, scales, opacities, features, viewmats, campos, Ks, width, height, sh_degree, with_depth, eps2d,
        antialiased, near_plane, alpha_threshold,
    )  # fmt: skip
    splat_bytes = 6 * means.element_size() + 8
    splats = torch.empty(v, g, splat_bytes, dtype=torch.uint8, device=device)
    depths = means.new_empty(v, g)
    copied = sh_degree >= 0 or with_depth
    view_colors = means.new_empty((v, g, channels) if copied else (0, 0, channels))
    offsets = torch.empty(v * g + 1, dtype=torch.int32, device=device)
    bad = torch.zeros(1, dtype=torch.int64, device=device)
    name, on_gpu = suffix(means), target(device) == "cuda"
    pairs = call(
        f"raster_project_{name}", *scene, splats, depths, view_colors if copied else None, offsets, bad,
        *([scratch("raster_project_f32", v * g, device=device)] if on_gpu else []), device=device,
    )  # fmt: skip
    raise_bad(int(bad))
    if not copied and not bool(torch.isfinite(features).all()):
        raise_bad(16)
    ids = torch.empty(pairs, dtype=torch.int32, device=device)
    tile_offsets = torch.empty(v, num_tiles(width, height) + 1, dtype=torch.int32, device=device)
    picture = means.new_empty(v, height, width, channels)
    alphas, transmittance = means.new_empty(v, height, width), means.new_empty(v, height, width)
    last_ids = torch.empty(v, height, width, dtype=torch.int32, device=device)
    source, stride = color_source(features, view_colors, g)
    lists = v * num_tiles(width, height)
    for_gpu: tuple[int | Tensor, ...] = ()
    if on_gpu:
        for_gpu = (pairs, scratch("raster_blend_f32", pairs, lists, device=device))
    call(
        f"raster_blend_{name}", *scene, splats, depths, source, stride, offsets, backgrounds, max_alpha,
        transmittance_stop, ids, tile_offsets, picture, alphas, transmittance, last_ids,
        *for_gpu, device=device,
    )  # fmt: skip
    return picture, alphas, transmittance, last_ids, splats, view_colors, offsets, ids, tile_offsets


@torch.library.register_fake("diff2to3::rasterize_forward")
def _(  # type: ignore[no-untyped-def]
    means, quats, scales, opacities, features, viewmats, campos, Ks, backgrounds, width, height, sh_degree,
    with_depth, eps2d, antialiased, near_plane, max_alpha, alpha_threshold, transmittance_stop,
):  # fmt: skip
    g, v = means.shape[0], viewmats.shape[0]
    channels = num_channels(features, sh_degree) + int(with_depth)
    pairs = torch.library.get_ctx().new_dynamic_size()
    copied = sh_degree >= 0 or with_depth
    plane = (v, height, width)
    return (
        means.new_empty(*plane, channels),
        means.new_empty(plane),
        means.new_empty(plane),
        means.new_empty(plane, dtype=torch.int32),
        means.new_empty((v, g, 6 * means.element_size() + 8), dtype=torch.uint8),
        means.new_empty((v, g, channels) if copied else (0, 0, channels)),
        means.new_empty(v * g + 1, dtype=torch.int32),
        means.new_empty(pairs, dtype=torch.int32),
        means.new_empty((v, num_tiles(width, height) + 1), dtype=torch.int32),
    )


@define_op(
    "rasterize_backward",
    f"(Tensor v_picture, Tensor? v_alphas, {SCENE_SCHEMA}, {STATE_SCHEMA}, {SETTINGS_SCHEMA}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_types=("cpu", "cuda"),
)
def rasterize_backward(  # type: ignore[no-untyped-def]
    v_picture, v_alphas, means, quats, scales, opacities, features, viewmats, campos, Ks, backgrounds, transmittance,
    last_ids, splats, view_colors, offsets, ids, tile_offsets, width, height, sh_degree, with_depth, eps2d,
    antialiased, near_plane, max_alpha, alpha_threshold, transmittance_stop,
):  # fmt: skip
    """Gradients of means, quats, scales, opacities, features, viewmats and campos, in their shapes."""
    g, v = means.shape[0], viewmats.shape[0]
    scene = scene_args(
        means, quats, scales, opacities, features, viewmats, campos, Ks, width, height, sh_degree, with_depth, eps2d,
        antialiased, near_plane, alpha_threshold,
    )  # fmt: skip
    grads = [torch.empty_like(t) for t in (means, quats, scales, opacities, features)]
    grads += [torch.zeros_like(viewmats), torch.zeros_like(campos)]
    if g == 0 or v == 0:
        return tuple(torch.zeros_like(t) for t in grads)
    bounds = offsets[:: max(g, 1)]
    fullest = int((bounds[1:] - bounds[:-1]).max())
    slots = means.new_empty(fullest, 6 + v_picture.shape[-1])
    source, stride = color_source(features, view_colors, g)
    on_gpu = target(means.device) == "cuda"
    call(
        f"raster_backward_{suffix(means)}", *scene, splats, source, stride, offsets, backgrounds, max_alpha,
        transmittance_stop, ids, tile_offsets, transmittance, last_ids, v_picture, v_alphas, slots, *grads,
        *([scratch("raster_backward_f32", g, device=means.device)] if on_gpu else []), device=means.device,
    )  # fmt: skip
    return tuple(grads)


@torch.library.register_fake("diff2to3::rasterize_backward")
def _(v_picture, v_alphas, means, quats, scales, opacities, features, viewmats, campos, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (means, quats, scales, opacities, features, viewmats, campos))


NUM_SCENE = 9


def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:NUM_SCENE], *output[2:])
    ctx.settings = inputs[NUM_SCENE:]
    ctx.set_materialize_grads(False)


def backward(ctx, v_picture, v_alphas, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    scene, backgrounds, transmittance = saved[: NUM_SCENE - 1], saved[NUM_SCENE - 1], saved[NUM_SCENE]
    nothing = (None,) * len(ctx.settings)
    if v_picture is None and v_alphas is None:
        return (None,) * NUM_SCENE + nothing
    if v_picture is None:
        channels = num_channels(scene[4], ctx.settings[2]) + int(ctx.settings[3])
        v_picture = transmittance.new_zeros(*transmittance.shape, channels)
    grads = rasterize_backward(
        v_picture.contiguous(), None if v_alphas is None else v_alphas.contiguous(), *saved, *ctx.settings
    )
    v_backgrounds = None
    if backgrounds is not None and ctx.needs_input_grad[NUM_SCENE - 1]:
        v_backgrounds = torch.einsum("vhwc,vhw->vc", v_picture, transmittance)
    return (*grads, None, v_backgrounds, *nothing)


torch.library.register_autograd("diff2to3::rasterize_forward", backward, setup_context=setup_context)
