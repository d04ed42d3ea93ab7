"""The first blocks of EfficientNet-Lite0, which was trained to tell ImageNet's classes apart: what is in a photo.

    [V, 3, H, W] ─stem, stride 2─▶ ─inverted residual blocks─▶ [V, 112, H/16, W/16] ─mean of 2²─▶ [V, 112, H/32, W/32]

The latents of FLUX-like encoders say what is where, not what it is; stage 1 has to guess whole objects, and TRELLIS
gives it DINOv2 for that, a thousand times the size. Lite (Tan, 2020) is EfficientNet (arXiv 1905.11946) without squeeze
and excitation and with ReLU6. Batch norm is folded into the convolutions here. Of the published weights' sixteen
blocks (Apache-2.0) eleven suffice: later ones, with more than twice the weights, say no more of the shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError

STEM_WIDTH = 32
#: Groups of blocks: how many, kernel, stride of the first, expansion, channels.
GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: Of the published batch norms.
EPSILON = 1e-3


@dataclass(frozen=True)
class EfficientNetConfig:
    """Sizes of :class:`EfficientNetLite`.

    num_blocks  number of blocks to keep, counted from the first of the sixteen
    pool        side of the squares of the last block's map that are averaged
    """

    num_blocks: int = 11
    pool: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.num_blocks <= len(BLOCKS):
            raise ValueError(f"num_blocks: expected 1 to {len(BLOCKS)}, got {self.num_blocks}")
        if self.pool < 1:
            raise ValueError(f"pool: expected a positive number, got {self.pool}")


@dataclass(frozen=True)
class BlockShape:
    """One inverted residual block."""

    in_channels: int
    channels: int
    kernel: int
    stride: int
    expansion: int


def block_shapes() -> list[BlockShape]:
    shapes, width = [], STEM_WIDTH
    for count, kernel, stride, expansion, channels in GROUPS:
        for k in range(count):
            shapes.append(BlockShape(width, channels, kernel, stride if k == 0 else 1, expansion))
            width = channels
    return shapes


BLOCKS = tuple(block_shapes())
#: The image's resolution over that of each block's map.
STRIDES = tuple(accumulate((shape.stride for shape in BLOCKS), lambda a, b: a * b, initial=2))[1:]


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's padding "same": at stride 2 the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.kernel_size[0] - self.stride[0]
        if total > 0:
            before, after = total // 2, total - total // 2
            x = F.pad(x, (before, after, before, after))
        return super().forward(x)


class Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; added to the input where the shapes agree."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        width = shape.in_channels * shape.expansion
        self.expand = Conv(shape.in_channels, width, 1) if shape.expansion > 1 else None
        self.depthwise = Conv(width, width, shape.kernel, shape.stride, groups=width)
        self.project = Conv(width, shape.channels, 1)
        self.adds = shape.stride == 1 and shape.in_channels == shape.channels

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow = self.project(F.relu6(self.depthwise(wide)))
        return x + narrow if self.adds else narrow


class EfficientNetLite(nn.Module):
    """sRGB images [V, 3, H, W] in [0, 1], H and W multiples of ``stride`` → features [V, channels, H / stride,
    W / stride].
    """

    def __init__(self, config: EfficientNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EfficientNetConfig()
        self.channels = BLOCKS[config.num_blocks - 1].channels
        self.stride = STRIDES[config.num_blocks - 1] * config.pool
        self.stem = Conv(3, STEM_WIDTH, 3, 2)
        self.blocks = nn.ModuleList(Block(shape) for shape in BLOCKS[: config.num_blocks])

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or any(n % self.stride for n in images.shape[2:]):
            raise ValueError(
                f"images: expected [V, 3, H, W], H and W multiples of {self.stride}, got {list(images.shape)}"
            )
        x = self.stem_of(images)
        for block in self.blocks:
            x = block(x)
        return F.avg_pool2d(x, self.config.pool)

    def stem_of(self, images: Tensor) -> Tensor:
        """The first convolution, on images in [0, 1]: [V, 32, H / 2, W / 2]."""
        return F.relu6(self.stem(images * (255 / 128) - 127 / 128))

    def outputs_of(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The outputs of the blocks with these numbers, in that order, without pooling."""
        x, outputs = self.stem_of(images), {}
        for number, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = outputs[number] = block(x)
        return [outputs[number] for number in blocks]


def from_published(published: Mapping[str, Tensor], config: EfficientNetConfig) -> dict[str, Tensor]:
    """The state of :class:`EfficientNetLite` from that of efficientnet_lite_pytorch, batch norms folded in.

    Raises:
        InputError: a tensor is missing, or has another shape.
    """
    parts = [("stem", "_conv_stem", "_bn0")]
    for k in range(config.num_blocks):
        own, theirs = f"blocks.{k}", f"_blocks.{k}"
        if BLOCKS[k].expansion > 1:
            parts.append((f"{own}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
        parts.append((f"{own}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
        parts.append((f"{own}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
    state: dict[str, Tensor] = {}
    try:
        for own, conv, norm in parts:
            mean, variance = (published[f"{norm}.running_{name}"].double() for name in ("mean", "var"))
            gain = published[f"{norm}.weight"].double() / (variance + EPSILON).sqrt()
            state[f"{own}.weight"] = (published[f"{conv}.weight"] * gain[:, None, None, None]).float()
            state[f"{own}.bias"] = (published[f"{norm}.bias"] - mean * gain).float()
    except KeyError as error:
        raise InputError(f"not the weights of EfficientNet-Lite0: no tensor {error}") from error
    with torch.device("meta"):
        wanted = EfficientNetLite(config).state_dict()
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"not the weights of EfficientNet-Lite0: {name} has shape {list(state[name].shape)}, "
                f"expected {list(tensor.shape)}"
            )
    return state
