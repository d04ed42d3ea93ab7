"""Compare the rasteriser with numbers from gsplat's reference: colours, alphas and every gradient.

    python tests/parity/rasterizer.py FOLDER

Loads every ``gsplat_*.safetensors`` in FOLDER (scene, camera, picture, gradients; settings in the metadata
key ``config``), runs the whole path with the compiled kernel and with the PyTorch reference, and prints a
table. The limits come from how far the public reference itself is from float64. Exit code 1 if any is
exceeded.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from diff2to3.kernels.rasterize import rasterize

PARAMETERS = ("means", "quats", "scales", "opacities", "sh", "colors_in")
MAX_P9999, MAX_OUTLIERS, OUTLIER, MAX_ERROR, MIN_PSNR = 1e-4, 2e-4, 1e-4, 5e-3, 95.0
MAX_GRADIENT, MAX_OPACITY_GRADIENT, MIN_COSINE = 2e-3, 5e-3, 0.99999


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        return config, {key: file.get_tensor(key) for key in file.keys()}


def render(
    config: dict, data: dict[str, Tensor], backend: str, device: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Colours, alphas and the gradients of Σ v_colors·colors + Σ v_alphas·alphas that the file has an
    answer for.
    """
    data = {key: tensor.to(device) for key, tensor in data.items()}
    leaves = {k: data[k].clone().requires_grad_() for k in PARAMETERS if k in data}
    viewmats = data["viewmat"].reshape(-1, 4, 4).clone().requires_grad_()
    if "sh" in leaves:  # a file may hold more coefficients than the degree it was rendered with
        degree = config.get("sh_degree", {1: 0, 4: 1, 9: 2, 16: 3}[data["sh"].shape[1]])
        appearance = {"sh": leaves["sh"][:, : (degree + 1) ** 2].contiguous()}
    else:
        appearance = {"colors": leaves["colors_in"]}
    names = ("eps2d", "antialiased", "near_plane", "max_alpha", "alpha_threshold", "transmittance_stop")
    out = rasterize(
        *(leaves[k] for k in ("means", "quats", "scales", "opacities")),
        viewmats,
        data["K"].reshape(-1, 3, 3),
        config["width"],
        config["height"],
        backgrounds=data.get("background"),
        backend=backend,
        **appearance,
        **{name: config[name] for name in names if name in config},
    )
    colors, alphas = out.colors.reshape(data["colors"].shape), out.alphas.reshape(data["alphas"].shape)
    loss = (colors * data["v_colors"]).sum() + (alphas * data["v_alphas"].reshape(alphas.shape)).sum()
    loss.backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items()}
    grads["grad_viewmat"] = viewmats.grad.reshape(data["viewmat"].shape)
    return colors.detach().cpu(), alphas.detach().cpu(), {k: g.cpu() for k, g in grads.items() if k in data}


def check_picture(name: str, ours: Tensor, theirs: Tensor) -> tuple[str, bool]:
    error = (ours.double() - theirs.double()).abs().flatten()
    p9999 = float(error.kthvalue(max(1, round(0.9999 * error.numel()))).values)
    per_pixel = (ours.double() - theirs.double()).abs().reshape(-1, ours.shape[-1] if name == "colors" else 1)
    outliers = float((per_pixel.amax(-1) > OUTLIER).double().mean())
    largest, psnr = float(error.max()), float(-10 * (error.square().mean() + 1e-30).log10())
    good = p9999 <= MAX_P9999 and outliers <= MAX_OUTLIERS and largest <= MAX_ERROR and psnr >= MIN_PSNR
    line = f"{name:16} p99.99 {p9999:.1e}  max {largest:.1e}  over 1e-4 {outliers:.1e}  PSNR {psnr:6.1f} dB"
    return line, good


def check_gradient(name: str, ours: Tensor, theirs: Tensor) -> tuple[str, bool]:
    ours, theirs = ours.double().flatten(), theirs.double().flatten()
    norm = float(theirs.norm())
    relative = float((ours - theirs).norm()) / max(norm, 1e-30)
    cosine = float(ours @ theirs) / max(float(ours.norm()) * norm, 1e-30)
    if norm == 0:  # nothing to compare a direction with: both must vanish
        relative = cosine = float(ours.norm() == 0)
        relative = 1 - relative
    limit = MAX_OPACITY_GRADIENT if name == "grad_opacities" else MAX_GRADIENT
    return (
        f"{name:16} relative {relative:.1e}  cosine {cosine:.8f}",
        relative <= limit and cosine >= MIN_COSINE,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with gsplat_*.safetensors")
    parser.add_argument(
        "--backends", default="native,reference", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    files = sorted(args.folder.glob("gsplat_*.safetensors"))
    if not files:
        print(f"{args.folder}: no gsplat_*.safetensors there", file=sys.stderr)
        return 2
    failures = 0
    for path in files:
        config, data = load(path)
        print(f"{path.name}  {config['width']}x{config['height']}  {len(data['means'])} Gaussians  {config}")
        for backend in args.backends.split(","):
            colors, alphas, grads = render(config, data, backend, args.device)
            rows = [
                check_picture("colors", colors, data["colors"]),
                check_picture("alphas", alphas, data["alphas"]),
            ]
            rows += [check_gradient(name, grad, data[name]) for name, grad in grads.items()]
            for line, good in rows:
                failures += not good
                print(f"  {backend:10} {line}  {'ok' if good else 'FAILED'}")
    print(f"{len(files)} files, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
