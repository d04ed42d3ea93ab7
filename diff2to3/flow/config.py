"""What the baseline flow models are built from. Plain values only. The defaults are TRELLIS-image-large's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with cross-attention to the condition; as it is: on a dense grid (structure).

    patch_size        cells a token spans on each axis
    share_modulation  one modulation for all blocks
    qk_rms_norm, qk_rms_norm_cross  normalise queries and keys of self- and cross-attention
    """

    resolution: int = 16
    in_channels: int = 8
    out_channels: int = 8
    width: int = 1024
    cond_channels: int = 1024
    num_blocks: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 1
    share_modulation: bool = False
    qk_rms_norm: bool = True
    qk_rms_norm_cross: bool = False
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("resolution", "in_channels", "out_channels", "width", "cond_channels", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide width {self.width}")
        if self.patch_size < 1 or self.resolution % self.patch_size:
            raise ValueError(f"patch_size: {self.patch_size} does not divide resolution {self.resolution}")


@dataclass(frozen=True)
class LatentDiTConfig(DiTConfig):
    """The same on sparse voxels (latents): residual convolutions take them to tokens and back.

    io_channels     widths of the levels above the tokens, finest first; each halves the resolution, so there
                    are log2(patch_size). Empty: every voxel is a token, whatever patch_size says
    num_io_blocks   residual blocks a level, the last of which changes the resolution
    skip_connection concatenate each input block's output to the input of its mirror
    reduce          how voxels become a token: TRELLIS's weights need "mean_with_zero" (sum / (count + 1))
    """

    resolution: int = 64
    patch_size: int = 2
    io_channels: list[int] = field(default_factory=lambda: [128])
    num_io_blocks: int = 2
    skip_connection: bool = True
    reduce: str = "mean_with_zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.io_channels and 2 ** len(self.io_channels) != self.patch_size:
            raise ValueError(
                f"io_channels: patch_size {self.patch_size} needs log2 of it as many levels, "
                f"got {list(self.io_channels)}"
            )
        if self.io_channels and self.num_io_blocks < 1:
            raise ValueError(f"num_io_blocks: expected at least 1, got {self.num_io_blocks}")
