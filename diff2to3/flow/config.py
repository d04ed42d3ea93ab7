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


#: Where tokens know their position from: nowhere, an absolute embedding, or rotary positions shared by voxels
#: and image (P3.2).
POSITIONS = ("none", "ape", "marope")
IO_KERNELS = ("cube", "cross")


@dataclass(frozen=True)
class SMDiTConfig:
    """SMDiT (P3.2) on a dense grid (stage 1). The defaults are ``large``.

    patch_size        cells a voxel token spans on each axis
    image_channels    of the condition image's latents
    image_patch_size  latent pixels an image token spans on each axis
    lifted_channels   of what the condition image says about each voxel (diff2to3.voxels.lift_photo), added to the
                      voxels at the input layer; 0 for none. Not in the paper
    num_double        blocks with separate weights for voxels and image
    num_single        blocks on both as one sequence
    position          none, ape or marope
    rope_theta        base of the rotary frequencies
    share_modulation  one modulation for all blocks, with an offset of each block's own
    precondition      the network gives what the best linear guess at the velocity lacks (see
                      diff2to3.flow.matching.precondition); not in the paper
    absolute          add an absolute position embedding to the tokens whatever ``position`` says: rotary positions
                      are relative, so that noise cannot tell where in the volume it is. Voxels below the tokens
                      learn where in their token they are. Not in the paper
    pool_image        the mean of the image tokens modulates the blocks together with the time, as the pooled prompt
                      does in SD3 and FLUX; not in the paper
    """

    resolution: int = 16
    in_channels: int = 8
    out_channels: int = 8
    width: int = 1024
    image_channels: int = 16
    image_patch_size: int = 2
    lifted_channels: int = 0
    num_double: int = 8
    num_single: int = 16
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 1
    position: str = "marope"
    rope_theta: float = 10000.0
    share_modulation: bool = False
    precondition: bool = False
    absolute: bool = False
    pool_image: bool = False
    qk_rms_norm: bool = True
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        positive = ("resolution", "in_channels", "out_channels", "width", "image_channels", "num_heads")
        for name in (*positive, "image_patch_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("num_double", "num_single", "lifted_channels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected no negative number, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide width {self.width}")
        if self.resolution % self.patch_size:
            raise ValueError(f"patch_size: {self.patch_size} does not divide resolution {self.resolution}")
        if self.position not in POSITIONS:
            raise ValueError(f"position: expected one of {', '.join(POSITIONS)}, got {self.position!r}")
        if self.position == "marope" and (self.width // self.num_heads) % 2:
            raise ValueError(f"num_heads: rotary positions need an even width a head, got {self.num_heads}")

    @property
    def embeds_positions(self) -> bool:
        """Whether tokens get an absolute embedding."""
        return self.position == "ape" or self.absolute

    @property
    def grid(self) -> int:
        """Voxel tokens on each axis."""
        return self.resolution // self.patch_size

    @property
    def image_width(self) -> int:
        """Channels of an image token before the network: 16 × 2² = 64 at ``large``."""
        return self.image_channels * self.image_patch_size**2


@dataclass(frozen=True)
class LatentSMDiTConfig(SMDiTConfig):
    """SMDiT on sparse voxels (stage 2): residual convolutions take them to tokens and back.

    io_channels, num_io_blocks, skip_connection  as in :class:`LatentDiTConfig`
    reduce     how voxels become a token: mean, sum or mean_with_zero
    io_kernel  of the convolutions: "cube" (27 taps) or "cross" (7)
    """

    resolution: int = 64
    patch_size: int = 2
    io_channels: list[int] = field(default_factory=lambda: [128])
    num_io_blocks: int = 2
    skip_connection: bool = True
    reduce: str = "mean"
    io_kernel: str = "cube"

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 ** len(self.io_channels) != self.patch_size:
            raise ValueError(
                f"io_channels: patch_size {self.patch_size} needs log2 of it as many levels, "
                f"got {list(self.io_channels)}"
            )
        if self.io_channels and self.num_io_blocks < 1:
            raise ValueError(f"num_io_blocks: expected at least 1, got {self.num_io_blocks}")
        if self.io_kernel not in IO_KERNELS:
            raise ValueError(f"io_kernel: expected one of {', '.join(IO_KERNELS)}, got {self.io_kernel!r}")
