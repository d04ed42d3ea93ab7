"""Trading memory and start-up time for speed, block by block."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again there (in place).

    The blocks keep their names and parameters, so checkpoints fit with and without this. Dropout draws the
    same numbers again.
    """
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """``torch.compile`` each block (in place), for any number of tokens or voxels. To be done before
    :func:`recompute`.

    Compiling blocks rather than the whole keeps what cannot be compiled (the rasteriser's lists, the search for
    neighbours) outside, and blocks of one class share the work. The project's own operations stay calls within
    the compiled code.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)
