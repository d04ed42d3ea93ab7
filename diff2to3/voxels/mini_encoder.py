"""The mini preset's image encoder: a small convolutional network that stands in for FLUX.2's on a CPU.

It is distilled from TAEF2's encoder (diff2to3/training/tasks/image_encoder.py) and so has the same latents:
32 channels at 1/8 resolution with about unit variance. TAEF2 spends nearly all of its work at full and half
resolution; here pixels are folded into channels first, and nothing runs above 1/4.

    [V, 3, H, W] ─ unfold 4² ─▶ [V, 48, H/4, W/4] ─ conv, blocks ─▶ unfold 2², conv, blocks ─▶ [V, 32, H/8, W/8]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.tensors import read_tensors

#: The weights that come with the package.
WEIGHTS = Path(__file__).resolve().parents[1] / "bundles" / "mini" / "image_encoder.safetensors"
STRIDE = 8
LATENT_CHANNELS = 32


@dataclass(frozen=True)
class MiniEncoderConfig:
    """Sizes of :class:`MiniEncoder`.

    fine_width, num_fine      channels and residual blocks at 1/4 of the image's resolution
    coarse_width, num_coarse  likewise at 1/8
    latent_channels           of the output
    """

    fine_width: int = 40
    num_fine: int = 1
    coarse_width: int = 64
    num_coarse: int = 2
    latent_channels: int = LATENT_CHANNELS

    def __post_init__(self) -> None:
        for name in ("fine_width", "coarse_width", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("num_fine", "num_coarse"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


class ResBlock(nn.Module):
    """x + conv(relu(conv(relu x))), the second convolution starting at zero. No norm: colours are absolute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


class Context(nn.Module):
    """Adds to every pixel a function of the whole image: mean and deviation of 1x1 features.

    TAEF2 does so with a GroupNorm; about a twentieth of its latents' variance follows from the rest of the image.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(width, width, 1)
        first, last = nn.Linear(2 * width, width), nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        self.mix = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.features(x)).flatten(2).float()
        statistics = torch.cat([h.mean(-1), h.var(-1, unbiased=False).add(1e-4).sqrt()], 1)
        return x + self.mix(statistics.to(x.dtype))[:, :, None, None]


class MiniEncoder(nn.Module):
    """sRGB images [V, 3, H, W] in [0, 1], H and W multiples of 8 -> latents [V, 32, H/8, W/8]."""

    def __init__(self, config: MiniEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MiniEncoderConfig()
        fine, coarse = config.fine_width, config.coarse_width
        self.stem = nn.Conv2d(3 * 16, fine, 3, padding=1)
        self.fine = nn.Sequential(*(ResBlock(fine) for _ in range(config.num_fine)))
        self.down = nn.Conv2d(fine, coarse, 4, stride=2, padding=1)
        self.context = Context(coarse)
        self.coarse = nn.Sequential(*(ResBlock(coarse) for _ in range(config.num_coarse)))
        self.out = nn.Conv2d(coarse, config.latent_channels, 3, padding=1)
        for conv in self.modules():
            if not isinstance(conv, nn.Conv2d) or conv.weight.is_meta:  # meta: weights are loaded right after
                continue
            if bool(conv.weight.any()):  # PyTorch's start shrinks a signal by 6
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        x = self.fine(self.stem(F.pixel_unshuffle(2 * images - 1, 4)))
        x = self.coarse(self.context(self.down(torch.relu(x))))
        return self.out(torch.relu(x))


def load_mini_encoder(path: Path | None = None) -> MiniEncoder:
    """The encoder stored in a safetensors file (the package's own by default); its sizes are told from the
    tensors.

    Raises:
        InputError: the file is missing, unreadable, or holds another network.
    """
    path = path or WEIGHTS
    state = read_tensors(path)
    try:
        config = MiniEncoderConfig(
            fine_width=len(state["stem.weight"]),
            num_fine=sum(name.startswith("fine.") for name in state) // 4,
            coarse_width=len(state["down.weight"]),
            num_coarse=sum(name.startswith("coarse.") for name in state) // 4,
            latent_channels=len(state["out.weight"]),
        )
        encoder = MiniEncoder(config)
        encoder.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: not a MiniEncoder: {error}") from error
    return encoder.eval().requires_grad_(False)
