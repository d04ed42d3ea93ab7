"""The tiny distilled autoencoders of the FLUX family (TAEF1, TAEF2), as modules of our own.

The network is madebyollin/taesd's (MIT), fixed by its published weights: 3x3 convolutions of width 64,
residual blocks, three strided convolutions. TAEF2 adds a global branch to the blocks at the lowest
resolution. Tensor names are those of the reference's plain sequences ("3.conv.0.weight"); :func:`load_taesd`
also reads the diffusers layout ("encoder.layers.3.conv.0.weight"), in which the decoder is numbered without
its parameter-free first layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.tensors import read_tensors

WIDTH = 64


class Block(nn.Module):
    """ReLU(convs(x) + x); with ``pool``, x first receives 1x1 convs around a GroupNorm, which sees all
    pixels."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool = None
        if pool:
            wide = 4 * WIDTH
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, wide, 1, bias=False),
                nn.GroupNorm(4, wide),
                nn.ReLU(),
                nn.Conv2d(wide, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """3 tanh(x / 3): keeps latents within three standard deviations."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def taesd_encoder(latent_channels: int, pool: bool) -> nn.Sequential:
    """[V, 3, H, W] in [0, 1] -> latents [V, C, H/8, W/8]."""
    return nn.Sequential(
        _conv(3),
        Block(),
        *(_conv(stride=2, bias=False), Block(), Block(), Block()),
        *(_conv(stride=2, bias=False), Block(), Block(), Block()),
        *(_conv(stride=2, bias=False), Block(pool), Block(pool), Block(pool)),
        _conv(WIDTH, latent_channels),
    )


def taesd_decoder(latent_channels: int, pool: bool) -> nn.Sequential:
    """Latents [V, C, h, w] -> [V, 3, 8h, 8w], nominally in [0, 1]."""
    return nn.Sequential(
        SoftClamp(),
        _conv(latent_channels),
        nn.ReLU(),
        *(Block(pool), Block(pool), Block(pool), nn.Upsample(scale_factor=2), _conv(bias=False)),
        *(Block(), Block(), Block(), nn.Upsample(scale_factor=2), _conv(bias=False)),
        *(Block(), Block(), Block(), nn.Upsample(scale_factor=2), _conv(bias=False)),
        Block(),
        _conv(WIDTH, 3),
    )


def load_taesd(path: Path, part: str = "encoder") -> nn.Sequential:
    """The ``part`` ("encoder" or "decoder") stored in a safetensors file; the kind is told from its tensors.

    Raises:
        InputError: the file is missing, unreadable, or holds another network.
    """
    state = read_tensors(path)
    if any(".layers." in name for name in state):
        state = {_plain_name(n): t for n, t in state.items() if n.startswith(f"{part}.layers.")}
    elif any(name.startswith(("encoder.", "decoder.")) for name in state):
        state = {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
    ends = {"encoder": ("14.weight", 0), "decoder": ("1.weight", 1)}
    name, axis = ends[part]
    if name not in state:
        raise InputError(f"{path}: holds no TAESD {part} (no tensor {name!r})")
    build = {"encoder": taesd_encoder, "decoder": taesd_decoder}[part]
    with torch.device("meta"):
        module = build(state[name].shape[axis], pool=any(".pool." in n for n in state))
    try:
        module.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: not a TAESD {part}: {error}") from error
    return module.eval().requires_grad_(False)


def _plain_name(name: str) -> str:
    """ "decoder.layers.0.weight" -> "1.weight": diffusers clamps outside its list of decoder layers."""
    part, _, index, rest = name.split(".", 3)
    return f"{int(index) + (part == 'decoder')}.{rest}"
