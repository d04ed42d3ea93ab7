"""Which library a network's attention and sparse convolutions run on: a choice of the run, not of the model.

use_backends(network, convolution="spconv", attention="xformers")

Weights and configuration stay as they are. What each name means: :mod:`diff2to3.nn.attention` and
:class:`diff2to3.nn.sparse_conv.SubmanifoldConv3d`.
"""

from __future__ import annotations

import importlib.util

from torch import nn

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.kernels.library import BACKENDS as KERNEL_BACKENDS
from diff2to3.nn.attention import BACKENDS as ATTENTION_BACKENDS
from diff2to3.nn.attention import Attends
from diff2to3.nn.sparse_conv import SubmanifoldConv3d, check_backend

CONVOLUTION_BACKENDS = (*KERNEL_BACKENDS, "spconv")
#: Attention backends that are packages, with what adds each.
ATTENTION_PACKAGES = {
    "xformers": 'pip install "diff2to3[xformers]"',
    "flash_attn": "pip install flash-attn --no-build-isolation",
}


def use_backends(module: nn.Module, *, convolution: str | None = None, attention: str | None = None) -> None:
    """Set the backend of every submanifold convolution and every attention in ``module``, in place.

    None leaves the layers' own choice, which for convolutions is ``auto`` and for attention is the network's
    ``attention_backend``.

    Raises:
        InputError: an unknown name, no layer of that kind, or a kernel that the backend does not have.
        MissingDependencyError: a package that is not installed.
    """
    if convolution is not None:
        set_convolution(module, convolution)
    if attention is not None:
        set_attention(module, attention)


def set_convolution(module: nn.Module, backend: str) -> None:
    layers = [layer for layer in module.modules() if isinstance(layer, SubmanifoldConv3d)]
    if not layers:
        raise InputError(f"conv_backend: the network has no sparse convolution to run on {backend!r}")
    try:
        for kernel in {layer.kernel for layer in layers}:
            check_backend(backend, kernel)
    except ValueError as error:
        raise InputError(f"conv_backend: {error}") from error
    for layer in layers:
        layer.backend = backend


def set_attention(module: nn.Module, backend: str) -> None:
    if backend not in ATTENTION_BACKENDS:
        known = ", ".join(ATTENTION_BACKENDS)
        raise InputError(f"attention_backend: expected one of {known}, got {backend!r}")
    if backend in ATTENTION_PACKAGES and importlib.util.find_spec(backend) is None:
        raise MissingDependencyError(backend, hint=ATTENTION_PACKAGES[backend])
    layers = [layer for layer in module.modules() if isinstance(layer, Attends)]
    if not layers:
        raise InputError(f"attention_backend: the network has no attention to run on {backend!r}")
    for layer in layers:
        layer.backend = backend
