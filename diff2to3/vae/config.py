"""What the autoencoders are built from. Plain values only, so that a YAML or JSON file holds them.

The defaults are the paper's: TRELLIS's sparse VAE with 16 input channels (FLUX latents on voxels) in place of
1024 (DINOv2 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCKS = ("attention", "convolution", "alternating")
ATTENTIONS = ("swin", "full")
CONV_KERNELS = ("cube", "cross")


@dataclass(frozen=True)
class TorsoConfig:
    """The blocks that encoder and decoder are made of.

    block        "attention" (as published), "convolution" (submanifold residual blocks), or "alternating"
                 (attention, convolution, attention, …)
    attention    "swin": 3D windows of ``window`` voxels, every other block shifted by half; "full": all
                 voxels
    conv_kernel  "cube" (27 taps) or "cross" (7)
    """

    resolution: int = 64
    width: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    block: str = "attention"
    attention: str = "swin"
    window: int = 8
    conv_kernel: str = "cube"
    qk_rms_norm: bool = False
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        choices = (("block", BLOCKS), ("attention", ATTENTIONS), ("conv_kernel", CONV_KERNELS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("resolution", "width", "num_blocks", "num_heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide width {self.width}")


@dataclass(frozen=True)
class EncoderConfig(TorsoConfig):
    """``linear_path`` adds a linear map from the input features to the posterior, beside the blocks."""

    in_channels: int = 16
    latent_channels: int = 8
    linear_path: bool = False


@dataclass(frozen=True)
class GaussianConfig:
    """How raw outputs become Gaussians (P3.3 and TRELLIS; the formulas are in gaussian_head.py).

    per_voxel        Gaussians a voxel
    reach            side of the box around the voxel's centre that their means stay in, in voxels
    spread_offsets   start them spread over that box (Hammersley points), not all at its centre
    min_scale        smallest standard deviation, in object units
    scale_bias, opacity_bias  scale and opacity where the raw output is 0
    scale_activation "softplus" or "exp"
    screen_filter    variance in px² that renderers must add (mip-splatting, with opacity compensation)
    means_gain, … , quats_gain  what raw outputs are multiplied with
    """

    per_voxel: int = 32
    reach: float = 1.5
    spread_offsets: bool = True
    min_scale: float = 9e-4
    scale_bias: float = 4e-3
    opacity_bias: float = 0.1
    scale_activation: str = "softplus"
    screen_filter: float = 0.1
    means_gain: float = 1.0
    colors_gain: float = 1.0
    scales_gain: float = 1.0
    quats_gain: float = 0.1
    opacities_gain: float = 1.0

    def __post_init__(self) -> None:
        if self.scale_activation not in ("softplus", "exp"):
            raise ValueError(f"scale_activation: expected 'softplus' or 'exp', got {self.scale_activation!r}")
        if self.per_voxel < 1:
            raise ValueError(f"per_voxel: expected a positive number, got {self.per_voxel}")
        if self.spread_offsets and self.reach <= 1:
            raise ValueError(f"reach: spread_offsets needs more than 1 voxel, got {self.reach}")
        if not 0 < self.opacity_bias < 1 or self.scale_bias <= 0 or self.reach <= 0 or self.min_scale < 0:
            raise ValueError("opacity_bias must be in (0, 1), scale_bias and reach > 0, min_scale >= 0")


@dataclass(frozen=True)
class DecoderConfig(TorsoConfig):
    """``linear_path`` adds a linear map from the latents to the raw Gaussians, beside the blocks."""

    latent_channels: int = 8
    linear_path: bool = False
    gaussians: GaussianConfig = field(default_factory=GaussianConfig)


@dataclass(frozen=True)
class StructureConfig:
    """One half of the sparse-structure VAE.

    data_channels    of the dense grid (1: occupancy)
    channels         widths from the first level to the last, each at half (decoder: twice) the resolution
    fold             cells of the data grid along each axis that one cell of the finest level holds; 2 spares all
                     convolutions at full resolution
    norm             of the output layer: "layer" or "group" (TRELLIS's residual blocks always use "layer")
    """

    data_channels: int = 1
    latent_channels: int = 8
    num_res_blocks: int = 2
    num_middle_blocks: int = 2
    channels: list[int] = field(default_factory=lambda: [32, 128, 512])
    norm: str = "layer"
    fold: int = 1

    def __post_init__(self) -> None:
        if self.fold < 1:
            raise ValueError(f"fold: expected a positive number, got {self.fold}")
        if self.norm not in ("layer", "group"):
            raise ValueError(f"norm: expected 'layer' or 'group', got {self.norm!r}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels: expected positive widths, got {self.channels}")
