"""Half-precision torsos: linear and convolution layers of the large middle part of a network in another
dtype.

Norms, their parameters, the embedding of time, and the input and output layers stay in float32, as in TRELLIS's
released checkpoints; also in training, where autocast would take layers to half precision that are called without
:func:`precisely`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from diff2to3.nn.sparse_conv import SubmanifoldConv3d

#: Layers that take part.
TORSO_LAYERS = (nn.Linear, nn.Conv3d, SubmanifoldConv3d)


def torso_layers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """All linear and convolution layers in or below ``modules``."""
    return (layer for module in modules for layer in module.modules() if isinstance(layer, TORSO_LAYERS))


def precisely(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` in the dtype of the layer's weights, whatever autocast says."""
    if x.device.type == "meta":  # of which autocast knows nothing
        return typing.cast(Tensor, layer(x))
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return result


def cast_torso(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the parameters of these layers, in place."""
    for layer in torso_layers(modules):
        layer.to(dtype)


def torso_dtype(modules: Iterable[nn.Module]) -> torch.dtype:
    """The dtype that the torso computes in; float32 where it has no such layer."""
    for layer in torso_layers(modules):
        return next(layer.parameters()).dtype
    return torch.float32
