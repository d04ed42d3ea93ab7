"""The rasteriser against a brute-force renderer in float64 numpy, against its own reference, and by gradcheck."""

import importlib.machinery
import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diff2to3.kernels import library, rasterize_gsplat
from diff2to3.kernels import rasterize as module
from diff2to3.kernels.rasterize import blending_weights, rasterize
from diff2to3.kernels.rasterize_reference import sh_basis

NAMES = ("means", "quats", "scales", "opacities")


def make_scene(
    g: int, *, seed: int = 0, terms: int = 4, dtype: torch.dtype = torch.float64, scale: float = 0.06
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "means": (torch.rand(g, 3, generator=rng, dtype=dtype) - 0.5),
        "quats": torch.randn(g, 4, generator=rng, dtype=dtype),
        "scales": scale * torch.exp(0.5 * torch.randn(g, 3, generator=rng, dtype=dtype)),
        "opacities": 0.05 + 0.9 * torch.rand(g, generator=rng, dtype=dtype),
        "sh": 0.4 * torch.randn(g, terms, 3, generator=rng, dtype=dtype),
    }


def make_cameras(
    v: int, width: int, height: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Views from around the object, each turned a little off centre; different focal lengths in x and y."""
    viewmats, Ks = [], []
    for i in range(v):
        angle = 0.7 + 2.1 * i
        forward = torch.tensor([math.cos(angle), math.sin(angle), -0.3 + 0.2 * i], dtype=dtype)
        forward = forward / forward.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.1, 1.0], dtype=dtype))
        right = right / right.norm()
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        viewmat = torch.eye(4, dtype=dtype)
        viewmat[:3, :3] = rotation
        viewmat[:3, 3] = rotation @ (1.9 * forward) + torch.tensor([0.05, -0.03, 0.0], dtype=dtype)
        f = 1.4 * width
        viewmats.append(viewmat)
        Ks.append(torch.tensor([[f, 0, 0.52 * width], [0, 1.1 * f, 0.45 * height], [0, 0, 1]], dtype=dtype))
    return torch.stack(viewmats), torch.stack(Ks)


def brute_force(
    scene: dict[str, Tensor], viewmat: Tensor, K: Tensor, width: int, height: int, colors: Tensor, eps2d: float,
    antialiased: bool, max_alpha: float = 0.999, near: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One view, pixel by pixel and Gaussian by Gaussian, with scipy's rotations and full 3x3 covariances."""
    from scipy.spatial.transform import Rotation

    means, quats, scales, opacities = (scene[n].double().numpy() for n in NAMES)
    R, t = viewmat[:3, :3].double().numpy(), viewmat[:3, 3].double().numpy()
    k, c = K.double().numpy(), colors.double().numpy()
    picture, alphas = np.zeros((height, width, c.shape[1])), np.zeros((height, width))
    cam = means @ R.T + t
    rotations = Rotation.from_quat(quats[:, [1, 2, 3, 0]]).as_matrix()
    splats = []
    for i in np.argsort(cam[:, 2], kind="stable"):
        x, y, z = cam[i]
        if z <= near:
            continue
        cov = R @ rotations[i] @ np.diag(scales[i] ** 2) @ rotations[i].T @ R.T
        lim = [
            ((width - k[0, 2]) / k[0, 0], k[0, 2] / k[0, 0], 0.15 * width / k[0, 0]),
            ((height - k[1, 2]) / k[1, 1], k[1, 2] / k[1, 1], 0.15 * height / k[1, 1]),
        ]
        u = np.clip(x / z, -lim[0][1] - lim[0][2], lim[0][0] + lim[0][2])
        v = np.clip(y / z, -lim[1][1] - lim[1][2], lim[1][0] + lim[1][2])
        J = np.array([[k[0, 0] / z, 0, -k[0, 0] * u / z], [0, k[1, 1] / z, -k[1, 1] * v / z]])
        cov2d = J @ cov @ J.T
        filtered = cov2d + eps2d * np.eye(2)
        opacity = opacities[i]
        if antialiased:
            opacity *= math.sqrt(max(0.0, np.linalg.det(cov2d) / np.linalg.det(filtered)))
        mean2d = np.array([k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]])
        splats.append((mean2d, np.linalg.inv(filtered), opacity, c[i]))
    for row in range(height):
        for col in range(width):
            transmittance = 1.0
            for mean2d, inverse, opacity, color in splats:
                d = np.array([col + 0.5, row + 0.5]) - mean2d
                alpha = min(max_alpha, opacity * math.exp(-0.5 * d @ inverse @ d))
                if alpha < 1 / 255:
                    continue
                if transmittance * (1 - alpha) <= 1e-4:
                    break
                picture[row, col] += transmittance * alpha * color
                transmittance *= 1 - alpha
            alphas[row, col] = 1 - transmittance
    return picture, alphas


def render(scene: dict[str, Tensor], v: int, width: int, height: int, **options: object) -> module.Rendering:
    viewmats, Ks = make_cameras(v, width, height, scene["means"].dtype)
    options = {"sh": scene["sh"]} | options if "colors" not in options else options
    return rasterize(*(scene[n] for n in NAMES), viewmats, Ks, width, height, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("eps2d", "antialiased"), [(0.3, False), (0.1, True)])
def test_matches_brute_force(backend: str, eps2d: float, antialiased: bool) -> None:
    scene = make_scene(40, terms=1)
    width, height = 37, 21
    viewmats, Ks = make_cameras(1, width, height)
    colors = torch.rand(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, expected_alphas = brute_force(
        scene, viewmats[0], Ks[0], width, height, colors, eps2d, antialiased
    )
    out = render(
        scene,
        1,
        width,
        height,
        colors=colors,
        eps2d=eps2d,
        antialiased=antialiased,
        backend=backend,
        depth=True,
    )
    assert expected_alphas.max() > 0.9
    np.testing.assert_allclose(out.colors[0].numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(out.alphas[0].numpy(), expected_alphas, atol=1e-9)
    z = (scene["means"] @ viewmats[0, :3, :3].T + viewmats[0, :3, 3])[:, 2:]
    depth, _ = brute_force(scene, viewmats[0], Ks[0], width, height, z, eps2d, antialiased)
    np.testing.assert_allclose(out.depths[0].numpy(), depth[..., 0], atol=1e-9)


def test_spherical_harmonics_match_scipy() -> None:
    """Each coefficient alone, against real harmonics built from scipy's complex ones (Condon–Shortley signs)."""
    from scipy.special import sph_harm_y

    directions = torch.nn.functional.normalize(
        torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1
    )
    basis = sh_basis(3, directions)
    theta, phi = torch.acos(directions[:, 2]).numpy(), torch.atan2(directions[:, 1], directions[:, 0]).numpy()
    k = 0
    for degree in range(4):
        for m in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(m), theta, phi)
            expected = value.real if m >= 0 else value.imag
            expected = expected * (1 if m == 0 else math.sqrt(2))
            np.testing.assert_allclose(basis[:, k].numpy(), expected, atol=1e-12)
            k += 1


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("antialiased", [False, True])
def test_gradients_match_reference(degree: int, antialiased: bool) -> None:
    """Native float64 against autograd through the reference: equal to rounding, every input, two views."""
    results = []
    for backend in ("native", "reference"):
        scene = {k: v.requires_grad_() for k, v in make_scene(60, terms=(degree + 1) ** 2).items()}
        viewmats, Ks = make_cameras(2, 40, 33)
        viewmats = viewmats.requires_grad_()
        backgrounds = torch.rand(
            2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        ).requires_grad_()
        out = rasterize(
            *(scene[n] for n in NAMES), viewmats, Ks, 40, 33, sh=scene["sh"], backgrounds=backgrounds, depth=True,
            eps2d=0.1, antialiased=antialiased, backend=backend,
        )  # fmt: skip
        rng = torch.Generator().manual_seed(3)
        loss = sum((t * torch.randn(t.shape, generator=rng, dtype=t.dtype)).sum() for t in out)
        inputs = [*scene.values(), viewmats, backgrounds]
        results.append((out, torch.autograd.grad(loss, inputs)))
    (ours, our_grads), (theirs, their_grads) = results
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 32])
@pytest.mark.parametrize("per_view", [False, True])
def test_float32_stays_near_float64(channels: int, per_view: bool) -> None:
    """The float32 kernel may err at most twice as much as the float32 reference, plus a floor."""
    errors = {}
    shape = (2, 300, channels) if per_view else (300, channels)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact: list[Tensor] = []
    for backend, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("native", torch.float32),
    ):
        scene = {k: v.to(dtype).requires_grad_() for k, v in make_scene(300, terms=1).items()}
        colors = values.to(dtype).requires_grad_()
        out = render(scene, 2, 50, 40, colors=colors, backend=backend)
        grads = torch.autograd.grad(
            (out.colors * out.alphas[..., None]).sum(), [*(scene[n] for n in NAMES), colors]
        )
        tensors = [t.detach().double() for t in (out.colors, out.alphas, *grads)]
        if dtype == torch.float64:
            exact = tensors
        else:
            errors[backend] = [float((a - b).norm() / b.norm()) for a, b in zip(tensors, exact, strict=True)]
    for ours, theirs in zip(errors["native"], errors["reference"], strict=True):
        assert ours <= 2 * theirs + 1e-5


def test_gradcheck_of_the_kernel() -> None:
    """Finite differences on the compiled float64 kernel itself. No threshold, so that the picture is smooth."""
    scene = make_scene(6, terms=4)
    viewmats, Ks = make_cameras(2, 9, 7)
    inputs = [scene[n] for n in NAMES] + [scene["sh"], viewmats]

    def run(means, quats, scales, opacities, sh, viewmats):  # type: ignore[no-untyped-def]
        out = rasterize(
            means, quats, scales, 0.9 * opacities, viewmats, Ks, 9, 7, sh=sh, depth=True, eps2d=0.1, antialiased=True,
            alpha_threshold=0.0, transmittance_stop=0.0, backend="native",
        )  # fmt: skip
        return out.colors, out.alphas, out.depths

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(plain: bool) -> None:
    scene = make_scene(20, terms=4, dtype=torch.float32)
    viewmats, Ks = make_cameras(2, 20, 17, torch.float32)
    features = scene["sh"][:, 0].contiguous() if plain else scene["sh"]
    inputs = [scene[n] for n in NAMES] + [features, viewmats, module.camera_positions(viewmats).contiguous()]
    inputs = [t.requires_grad_() for t in inputs]
    settings_ = (20, 17, -1 if plain else 1, not plain, 0.3, True, 0.01, 0.999, 1 / 255, 1e-4)
    args = (*inputs, Ks, torch.rand(2, 3 if plain else 4, requires_grad=True), *settings_)
    torch.library.opcheck(torch.ops.diff2to3.rasterize_forward.default, args)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    outputs = module.rasterize_forward(*detached)
    v_picture, v_alphas = torch.rand_like(outputs[0]), torch.rand_like(outputs[1])
    torch.library.opcheck(
        torch.ops.diff2to3.rasterize_backward.default,
        (v_picture, v_alphas, *detached[:9], *outputs[2:], *settings_),
    )


def test_compiles() -> None:
    """torch.compile traces through the op: its fake implementation knows every output's shape."""
    scene = make_scene(50, dtype=torch.float32)

    def step(means: Tensor) -> Tensor:
        return render(scene | {"means": means * 1.0}, 1, 32, 24, backend="native").colors.square().mean()

    means = scene["means"].requires_grad_()
    (expected,) = torch.autograd.grad(step(means), means)
    (compiled,) = torch.autograd.grad(torch.compile(step, backend="aot_eager")(means), means)
    torch.testing.assert_close(compiled, expected)


def test_independent_of_threads() -> None:
    """Pictures and gradients are bit-identical for any number of threads."""
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            scene = {
                k: v.requires_grad_() for k, v in make_scene(3000, dtype=torch.float32, terms=16).items()
            }
            out = render(scene, 2, 100, 90)
            grads = torch.autograd.grad((out.colors * out.alphas[..., None]).sum(), list(scene.values()))
            seen.append([out.colors, out.alphas, *grads])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def runnable_variants() -> list[str]:
    file = library.cpu_library_file()
    return library.runnable_variants(file.parent) if file else []


@pytest.mark.parametrize("variant", runnable_variants())
@pytest.mark.parametrize("channels", [3, 5])
def test_every_instruction_set(variant: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each compiled variant that runs here, in float32, is as near to the float64 reference as the reference is."""
    file = library.cpu_library_file()
    assert file is not None
    loaded = library.load_cpu(file.parent, variant)
    monkeypatch.setattr(library, "cpu_library", lambda: loaded)
    values = torch.rand(700, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for backend, dtype in (
        ("native", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        scene = {k: v.to(dtype).requires_grad_() for k, v in make_scene(700, terms=1).items()}
        colors = values.to(dtype).requires_grad_()
        out = render(scene, 1, 61, 45, colors=colors, backend=backend)
        grads = torch.autograd.grad(out.colors.square().sum(), [*(scene[n] for n in NAMES), colors])
        results.append([t.detach().double() for t in (out.colors, out.alphas, *grads)])
    for ours, theirs, exact in zip(*results, strict=True):
        assert float((ours - exact).norm()) <= 2 * float((theirs - exact).norm()) + 1e-5 * float(exact.norm())


def test_views_are_independent() -> None:
    scene = make_scene(100, dtype=torch.float32)
    viewmats, Ks = make_cameras(3, 30, 20, torch.float32)
    together = rasterize(*(scene[n] for n in NAMES), viewmats, Ks, 30, 20, sh=scene["sh"])
    for v in range(3):
        alone = rasterize(
            *(scene[n] for n in NAMES), viewmats[v : v + 1], Ks[v : v + 1], 30, 20, sh=scene["sh"]
        )
        assert torch.equal(together.colors[v], alone.colors[0])


def test_blending_weights() -> None:
    """One Gaussian's weights, summed under a mask, are the picture it alone colours, summed under that mask."""
    scene = make_scene(30)
    viewmats, Ks = make_cameras(2, 24, 18)
    masks = torch.rand(2, 18, 24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = blending_weights(*(scene[n] for n in NAMES), viewmats, Ks, masks)
    expected = torch.zeros(30, 3, dtype=torch.float64)
    for g in range(30):
        one_hot = torch.zeros(30, 1, dtype=torch.float64)
        one_hot[g] = 1
        picture = render(scene, 2, 24, 18, colors=one_hot, backend="reference").colors
        expected[g] = (picture * masks).sum((0, 1, 2))
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-12)
    total = blending_weights(
        *(scene[n] for n in NAMES), viewmats, Ks, torch.ones(2, 18, 24, dtype=torch.float64)
    )
    torch.testing.assert_close(total.sum(), render(scene, 2, 24, 18).alphas.sum())


@settings(max_examples=30, deadline=None)
@given(
    g=st.integers(0, 40), v=st.integers(1, 3), width=st.integers(1, 70), height=st.integers(1, 50),
    terms=st.sampled_from([1, 4, 9, 16]), scale=st.sampled_from([1e-6, 0.02, 0.5, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(g: int, v: int, width: int, height: int, terms: int, scale: float, seed: int) -> None:
    """Any number and size of Gaussians, any picture: native equals reference, forward and backward."""
    grads, pictures = [], []
    for backend in ("native", "reference"):
        scene = {k: t.requires_grad_() for k, t in make_scene(g, terms=terms, scale=scale, seed=seed).items()}
        out = render(scene, v, width, height, backend=backend)
        pictures.append(out.colors.detach())
        loss = (out.colors.sin() + out.alphas[..., None]).sum() + 0 * sum(t.sum() for t in scene.values())
        grads.append(torch.autograd.grad(loss, list(scene.values())))
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-10)
    for a, b in zip(*grads, strict=True):
        assert bool(torch.isfinite(a).all())
        torch.testing.assert_close(
            a, b, rtol=1e-6, atol=1e-8 * (1 + float(b.abs().max()) if b.numel() else 1)
        )


def test_gsplat_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's conventions, with a stand-in of gsplat's signature and layouts that runs on a CPU."""
    if importlib.util.find_spec("gsplat") is None:
        with pytest.raises(RuntimeError, match=r"diff2to3\[gsplat\]"):
            render(make_scene(5, dtype=torch.float32), 1, 9, 9, backend="gsplat")
    calls = []

    def rasterization(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=0.01, far_plane=1e10,
        radius_clip=0.0, eps2d=0.3, sh_degree=None, packed=True, tile_size=16, backgrounds=None, render_mode="RGB",
        sparse_grad=False, absgrad=False, rasterize_mode="classic", channel_chunk=32, **_,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        calls.append(render_mode)
        out = rasterize(
            means, quats, scales, opacities, viewmats, Ks, width, height, backgrounds=backgrounds, eps2d=eps2d,
            near_plane=near_plane, antialiased=rasterize_mode == "antialiased", depth="D" in render_mode,
            **({"colors": colors} if sh_degree is None else {"sh": colors}),
        )  # fmt: skip
        picture = out.colors if out.depths is None else torch.cat([out.colors, out.depths[..., None]], -1)
        return picture, out.alphas[..., None], {}

    stand_in = types.ModuleType("gsplat")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("gsplat", None)
    stand_in.__version__ = "1.5.3"  # type: ignore[attr-defined]
    stand_in.rasterization = rasterization  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gsplat", stand_in)
    monkeypatch.setattr(rasterize_gsplat, "runs_on", lambda tensor: True)
    scene = make_scene(60, dtype=torch.float32)
    background = torch.tensor([0.2, 0.5, 0.9])
    for depth in (False, True):
        options = {"backgrounds": background, "depth": depth, "eps2d": 0.1, "antialiased": True}
        ours, theirs = (render(scene, 2, 31, 23, backend=b, **options) for b in ("auto", "gsplat"))
        for a, b in zip(ours, theirs, strict=True):
            assert a is None if b is None else torch.equal(a, b)
    assert calls == ["RGB", "RGB+D"]
    with pytest.raises(ValueError, match="max_alpha"):
        render(scene, 1, 9, 9, backend="gsplat", max_alpha=0.99)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gsplat", stand_in)
    with pytest.raises(RuntimeError, match="CUDA device"):
        render(scene, 1, 9, 9, backend="gsplat")


def test_camera_inside_the_cloud() -> None:
    """Gaussians around and behind the camera: finite, and equal to the reference."""
    scene = {k: v.requires_grad_() for k, v in make_scene(200, seed=5).items()}
    viewmats, Ks = make_cameras(1, 40, 30)
    viewmats[0, :3, 3] = torch.tensor([0.02, 0.0, 0.1])
    outs = [
        rasterize(*(scene[n] for n in NAMES), viewmats, Ks, 40, 30, sh=scene["sh"], backend=b)
        for b in ("native", "reference")
    ]
    torch.testing.assert_close(outs[0].colors, outs[1].colors, rtol=0, atol=1e-10)
    for grad in torch.autograd.grad(outs[0].colors.sum(), list(scene.values())):
        assert bool(torch.isfinite(grad).all())


def test_nothing_to_see() -> None:
    """No Gaussians, or none in front: the background, no alpha, zero gradients."""
    background = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    for g, shift in ((0, 0.0), (5, -50.0)):
        scene = {k: v.requires_grad_() for k, v in make_scene(g).items()}
        viewmats, Ks = make_cameras(1, 18, 16)
        viewmats[0, 2, 3] += shift
        out = rasterize(
            *(scene[n] for n in NAMES),
            viewmats,
            Ks,
            18,
            16,
            sh=scene["sh"],
            backgrounds=background,
            depth=True,
        )
        assert out.depths is not None
        assert (
            bool((out.colors == background).all()) and bool((out.alphas == 0).all()) and not out.depths.any()
        )
        for grad in torch.autograd.grad(out.colors.sum(), list(scene.values()), allow_unused=True):
            assert grad is None or not grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", [*NAMES, "sh", "viewmats", "Ks"])
def test_numbers_that_are_not_finite(name: str, backend: str, value: float) -> None:
    scene = make_scene(40, dtype=torch.float32, scale=0.2)
    viewmats, Ks = make_cameras(1, 20, 20, torch.float32)
    inputs = scene | {"viewmats": viewmats, "Ks": Ks}
    inputs[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=name):
        args = [inputs[n] for n in (*NAMES, "viewmats", "Ks")]
        rasterize(*args, 20, 20, sh=inputs["sh"], backend=backend)


def test_wrong_arguments_are_named() -> None:
    scene = make_scene(8, dtype=torch.float32)
    viewmats, Ks = make_cameras(2, 20, 20, torch.float32)
    good = {n: scene[n] for n in NAMES} | {
        "viewmats": viewmats,
        "Ks": Ks,
        "width": 20,
        "height": 20,
        "sh": scene["sh"],
    }
    wrong: list[tuple[str, dict[str, object]]] = [
        ("means", {"means": scene["means"][:, :2]}),
        ("means", {"means": scene["means"].half()}),
        ("quats", {"quats": scene["quats"][:7]}),
        ("scales", {"scales": scene["scales"].double()}),
        ("opacities", {"opacities": scene["opacities"][:, None]}),
        ("sh", {"sh": scene["sh"][:, :3]}),
        ("colors", {"colors": torch.rand(8, 3)}),
        ("colors", {"sh": None, "colors": torch.rand(8, 33)}),
        ("colors", {"sh": None, "colors": torch.rand(3, 8, 3)}),
        ("viewmats", {"viewmats": viewmats[:, :3]}),
        ("viewmats", {"viewmats": torch.zeros(2, 4, 4)}),
        ("Ks", {"Ks": Ks[:1]}),
        ("Ks", {"Ks": -Ks}),
        ("backgrounds", {"backgrounds": torch.rand(4)}),
        ("width", {"width": 0}),
        ("height", {"height": 40000}),
        ("eps2d", {"eps2d": -1.0}),
        ("max_alpha", {"max_alpha": 1.5}),
        ("backend", {"backend": "spconv"}),
    ]
    for name, change in wrong:
        with pytest.raises(ValueError, match=name):
            rasterize(**(good | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks"):
        blending_weights(*(scene[n] for n in NAMES), viewmats, Ks, torch.rand(1, 20, 20))
