"""Turn published ``.pth`` weights of metrics into safetensors, once. Only tensors are read from them.

    python eval/convert_weights.py inception pt_inception-2015-12-05-6726825d.pth inception.safetensors
    python eval/convert_weights.py lpips --net vgg vgg16-397923af.pth lpips/weights/v0.1/vgg.pth lpips_vgg.safetensors

The first file is FID's Inception-v3 (published with pytorch-fid; torch-fidelity's copy has the same names). LPIPS needs
torchvision's backbone (VGG-16 or AlexNet) and the linear layers that the ``lpips`` package carries in its wheel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.files import write_atomic
from diff2to3.metrics.inception import InceptionV3
from diff2to3.metrics.lpips import LAYERS, Lpips


def read_pth(path: str) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` state dict; nothing in it is executed (``weights_only``)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors of many types
        lines = str(error).strip().splitlines()
        raise InputError(f"{path}: cannot be read as a state dict: {lines[0] if lines else error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: expected a state dict of tensors")
    return state


def convert_inception(path: str) -> dict[str, Tensor]:
    weights = {
        name: value.contiguous()
        for name, value in read_pth(path).items()
        if name.startswith(("Conv2d", "Mixed")) and value.is_floating_point()
    }
    InceptionV3(weights)  # complains about a wrong file
    return weights


def convert_lpips(backbone: str, linear: str, net: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, value in read_pth(backbone).items():
        if name.startswith("features."):
            weights[name.replace("features.", "net.", 1)] = value.contiguous()
    for name, value in read_pth(linear).items():  # lin0.model.1.weight
        weights[f"lin.{name.split('.')[0].removeprefix('lin')}.weight"] = value.contiguous()
    Lpips(weights, net)
    return weights


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    inception = kinds.add_parser("inception", help="FID's Inception-v3")
    inception.add_argument("weights")
    lpips = kinds.add_parser("lpips", help="LPIPS 0.1")
    lpips.add_argument("--net", choices=sorted(LAYERS), default="vgg")
    lpips.add_argument("backbone")
    lpips.add_argument("linear")
    for sub in (inception, lpips):
        sub.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.kind == "inception":
            weights = convert_inception(args.weights)
        else:
            weights = convert_lpips(args.backbone, args.linear, args.net)
        write_atomic(args.output, save(weights))
    except (InputError, OSError) as error:
        print(f"convert_weights: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
