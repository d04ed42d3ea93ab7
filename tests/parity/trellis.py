"""Compare our networks with TRELLIS's, from files of inputs, parameters and outputs.

    python tests/parity/trellis.py FOLDER

Loads every slat_*.safetensors and ss_*.safetensors in the folder (parameters by upstream names, strictly;
sizes from the metadata key "config"), runs our modules in float32 on the CPU, and prints per output the
maximum error relative to the output's maximum. Exit code 1 if any exceeds the limit, or if there is nothing
to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diff2to3.pipeline.upstream import build_network
from diff2to3.types import SparseVoxels
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.gaussian_head import to_gaussians
from diff2to3.vae.posterior import Posterior

LIMIT = 1e-5
#: How a file is called → TRELLIS's class in it. The longest matching start of the name counts.
CLASSES = {
    "slat_encoder": "SLatEncoder",
    "slat_decoder_gs": "SLatGaussianDecoder",
    "slat_flow": "SLatFlowModel",
    "ss_encoder": "SparseStructureEncoder",
    "ss_decoder": "SparseStructureDecoder",
    "ss_flow": "SparseStructureFlowModel",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds slat_*.safetensors and ss_*.safetensors")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    paths = sorted([*args.folder.glob("slat_*.safetensors"), *args.folder.glob("ss_*.safetensors")])
    if not paths:
        print(f"{args.folder}: no slat_*.safetensors or ss_*.safetensors", file=sys.stderr)
        return 1
    failed = False
    for path in paths:
        for name, error in compare(path, args.device):
            passed = error <= LIMIT
            failed |= not passed
            print(f"{path.stem:24s} {name:24s} {error:9.2e}  {'ok' if passed else 'FAILED'}", flush=True)
    return int(failed)


def compare(path: Path, device: str = "cpu") -> Iterator[tuple[str, float]]:
    """(output, maximum error / maximum of the reference) for every output in the file."""
    tensors, config = read(path)
    start = max((name for name in CLASSES if path.stem.startswith(name)), key=len, default=None)
    if start is None:
        raise SystemExit(f"{path}: expected a name that starts with one of {', '.join(CLASSES)}")
    network = build_network(CLASSES[start], config).eval()
    parameters = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    network.load_state_dict(parameters, strict=True)
    network.to(device)
    with torch.no_grad():
        outputs = OUTPUTS[start](network, {key: value.to(device) for key, value in tensors.items()})
    missing = set(expected_outputs(tensors)) - set(outputs)
    if missing:
        raise SystemExit(f"{path}: nothing computed for {sorted(missing)}")
    for name, ours in outputs.items():
        yield name, relative_error(ours.cpu(), tensors[name])


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {key: file.get_tensor(key) for key in file.keys()}, config


def expected_outputs(tensors: dict[str, Tensor]) -> list[str]:
    inputs = {"coords", "feats", "latents", "x_t", "t", "cond", "occupancy"}
    return [name for name in tensors if not name.startswith("param.") and name not in inputs]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    if ours.shape != reference.shape:
        return float("inf")
    error = (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def voxels_of(tensors: dict[str, Tensor], feats: Tensor, resolution: int) -> SparseVoxels:
    return SparseVoxels.from_coords(tensors["coords"], feats, resolution)


def encoder_outputs(network: Encoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    voxels = voxels_of(tensors, tensors["feats"], network.config.resolution)
    return posterior_outputs(network(voxels))


def posterior_outputs(posterior: Posterior) -> dict[str, Tensor]:
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decoder_outputs(network: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    voxels = voxels_of(tensors, tensors["latents"], network.config.resolution)
    raw = network.raw(voxels)
    items = to_gaussians(raw, voxels, network.offset_perturbation, network.config.gaussians)
    outputs = {}
    bounds = voxels.cu_seqlens.tolist()
    for i, g in enumerate(items):
        rows = slice(bounds[i], bounds[i + 1])
        outputs |= {
            f"rep{i}.means": g.means,
            f"rep{i}.xyz01": g.means + 0.5,
            f"rep{i}.scales": g.scales,
            f"rep{i}.opacities": g.opacities[:, None],
            f"rep{i}.quats_wxyz": g.quats,
            f"rep{i}.features_dc": g.sh,
            f"rep{i}.scaling_raw": raw.scales[rows].flatten(0, 1),
            f"rep{i}.rotation_raw": raw.quats[rows].flatten(0, 1),
            f"rep{i}.opacity_raw": raw.opacities[rows].flatten(0, 1),
        }
    return {name: value for name, value in outputs.items() if name in tensors}


def time_of(tensors: dict[str, Tensor]) -> Tensor:
    """The files hold t · 1000; our networks take t."""
    return tensors["t"].double() / 1000


def latent_flow_outputs(network: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    voxels = voxels_of(tensors, tensors["x_t"], network.config.resolution)
    return {"velocity": network(voxels, time_of(tensors), tensors["cond"])}


def structure_flow_outputs(network: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"velocity": network(tensors["x_t"], time_of(tensors), tensors["cond"])}


OUTPUTS = {
    "slat_encoder": encoder_outputs,
    "slat_decoder_gs": decoder_outputs,
    "slat_flow": latent_flow_outputs,
    "ss_encoder": lambda network, tensors: posterior_outputs(network(tensors["occupancy"])),
    "ss_decoder": lambda network, tensors: {"logits": network(tensors["latents"])},
    "ss_flow": structure_flow_outputs,
}


if __name__ == "__main__":
    sys.exit(main())
