"""TRELLIS's own names for things: network classes, configuration keys, sampler parameters, tensor names.

Everything that says how a released folder is written is in this file; the rest of the package does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diff2to3.errors import InputError
from diff2to3.flow.config import DiTConfig, LatentDiTConfig
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.vae.config import DecoderConfig, EncoderConfig, GaussianConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder

#: Keys without influence on the result: what they chose is an argument here.
IGNORED = {"use_checkpoint"}


@dataclass(frozen=True)
class Network:
    """One of TRELLIS's classes: our module, and how its arguments become our configuration."""

    module: Callable[[Any], nn.Module]
    config: Callable[[dict[str, Any]], Any]


def build_network(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The module for a TRELLIS class name and its constructor arguments, in float32.

    Raises:
        InputError: a class or an argument that is not supported; the message names it.
    """
    known = name.removeprefix("Elastic")
    if known in NOT_SUPPORTED:
        raise InputError(f"{name}: {NOT_SUPPORTED[known]}")
    if known not in NETWORKS:
        raise InputError(f"{name}: unknown network; known are {', '.join(NETWORKS)}")
    network = NETWORKS[known]
    left = {k: v for k, v in args.items() if k not in IGNORED}
    try:
        config = network.config(left)
    except KeyError as error:
        raise InputError(f"{name}: no value for {error.args[0]!r} in its configuration") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error
    left.pop("use_fp16", None)
    if left:
        raise InputError(f"{name}: unknown configuration key {sorted(left)[0]!r}")
    return network.module(config)


def wants_half(args: Mapping[str, Any]) -> bool:
    """Whether the network was released with its torso in float16."""
    return bool(args.get("use_fp16", False))


def num_heads(args: dict[str, Any]) -> int:
    head_channels = args.pop("num_head_channels", 64)
    heads = args.pop("num_heads", None)
    return int(heads or args["model_channels"] // head_channels)


def only(args: dict[str, Any], key: str, default: str, supported: str) -> None:
    """Refuse a choice that no released model makes."""
    value = args.pop(key, default)
    if value != supported:
        raise ValueError(f"{key} {value!r} is not supported; the released models use {supported!r}")


def torso_arguments(args: dict[str, Any], default_attention: str) -> dict[str, Any]:
    only(args, "pe_mode", "ape", "ape")
    attention = args.pop("attn_mode", default_attention)
    if attention not in ("swin", "full"):
        raise ValueError(f"attn_mode {attention!r} is not supported; the released models use 'swin'")
    window = args.pop("window_size", 8)
    return {
        "num_heads": num_heads(args),
        "width": args.pop("model_channels"),
        "resolution": args.pop("resolution"),
        "num_blocks": args.pop("num_blocks"),
        "mlp_ratio": float(args.pop("mlp_ratio", 4)),
        "attention": attention,
        "window": 8 if window is None else window,
        "qk_rms_norm": args.pop("qk_rms_norm", False),
    }


def encoder_config(args: dict[str, Any]) -> EncoderConfig:
    torso = torso_arguments(args, "swin")
    return EncoderConfig(
        **torso, in_channels=args.pop("in_channels"), latent_channels=args.pop("latent_channels")
    )


def decoder_config(args: dict[str, Any]) -> DecoderConfig:
    torso = torso_arguments(args, "swin")
    gaussians = gaussian_config(dict(args.pop("representation_config")))
    return DecoderConfig(**torso, latent_channels=args.pop("latent_channels"), gaussians=gaussians)


def gaussian_config(args: dict[str, Any]) -> GaussianConfig:
    gains = dict(args.pop("lr"))
    config = GaussianConfig(
        per_voxel=args.pop("num_gaussians"),
        reach=float(args.pop("voxel_size")),
        spread_offsets=bool(args.pop("perturb_offset")),
        min_scale=float(args.pop("3d_filter_kernel_size")),
        scale_bias=float(args.pop("scaling_bias")),
        opacity_bias=float(args.pop("opacity_bias")),
        scale_activation=args.pop("scaling_activation"),
        screen_filter=float(args.pop("2d_filter_kernel_size", 0.1)),
        means_gain=float(gains.pop("_xyz")),
        colors_gain=float(gains.pop("_features_dc")),
        scales_gain=float(gains.pop("_scaling")),
        quats_gain=float(gains.pop("_rotation")),
        opacities_gain=float(gains.pop("_opacity")),
    )
    if args or gains:
        raise ValueError(f"unknown key {sorted({**args, **gains})[0]!r} in representation_config")
    return config


def flow_arguments(args: dict[str, Any]) -> dict[str, Any]:
    only(args, "pe_mode", "ape", "ape")
    return {
        "num_heads": num_heads(args),
        "width": args.pop("model_channels"),
        "resolution": args.pop("resolution"),
        "in_channels": args.pop("in_channels"),
        "out_channels": args.pop("out_channels"),
        "cond_channels": args.pop("cond_channels"),
        "num_blocks": args.pop("num_blocks"),
        "mlp_ratio": float(args.pop("mlp_ratio", 4)),
        "patch_size": args.pop("patch_size", 2),
        "share_modulation": args.pop("share_mod", False),
        "qk_rms_norm": args.pop("qk_rms_norm", False),
        "qk_rms_norm_cross": args.pop("qk_rms_norm_cross", False),
    }


def structure_flow_config(args: dict[str, Any]) -> DiTConfig:
    return DiTConfig(**flow_arguments(args))


def latent_flow_config(args: dict[str, Any]) -> LatentDiTConfig:
    common = flow_arguments(args)
    io_channels = args.pop("io_block_channels", None)
    return LatentDiTConfig(
        **common,
        io_channels=list(io_channels or []),
        num_io_blocks=args.pop("num_io_res_blocks", 2),
        skip_connection=args.pop("use_skip_connection", True),
        reduce="mean_with_zero",
    )


def structure_config(data_key: str) -> Callable[[dict[str, Any]], StructureConfig]:
    def convert(args: dict[str, Any]) -> StructureConfig:
        return StructureConfig(
            data_channels=args.pop(data_key),
            latent_channels=args.pop("latent_channels"),
            num_res_blocks=args.pop("num_res_blocks"),
            num_middle_blocks=args.pop("num_res_blocks_middle", 2),
            channels=list(args.pop("channels")),
            norm=args.pop("norm_type", "layer"),
        )

    return convert


NETWORKS = {
    "SparseStructureEncoder": Network(StructureEncoder, structure_config("in_channels")),
    "SparseStructureDecoder": Network(StructureDecoder, structure_config("out_channels")),
    "SparseStructureFlowModel": Network(StructureDiT, structure_flow_config),
    "SLatEncoder": Network(Encoder, encoder_config),
    "SLatGaussianDecoder": Network(Decoder, decoder_config),
    "SLatFlowModel": Network(LatentDiT, latent_flow_config),
}
#: Classes that are left out on purpose, and why.
NOT_SUPPORTED = {
    "SLatMeshDecoder": "the mesh decoder is not part of this package; it decodes to 3D Gaussians",
    "SLatRadianceFieldDecoder": "the radiance-field decoder is not part of this package; it decodes to 3D "
    "Gaussians",
}
