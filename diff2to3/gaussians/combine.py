"""Objects made of others: mirrored, or laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from diff2to3.types import Gaussians

#: Real spherical harmonics of degrees 0 to 3, in the order of the files, that change sign with x.
ODD_IN_X = (3, 4, 7, 10, 13, 15)
#: An opacity of 1 has no density; files keep logits anyway.
OPAQUE = 1 - 1e-6


def mirrored(gaussians: Gaussians) -> Gaussians:
    """The same object as a mirror at x = 0 shows it."""
    across = gaussians.means.new_tensor([-1.0, 1.0, 1.0])
    # a rotation by θ about (x, y, z) becomes one by -θ about (-x, y, z)
    turned = gaussians.quats.new_tensor([1.0, 1.0, -1.0, -1.0])
    count = gaussians.sh.shape[1]
    signs = torch.tensor([-1.0 if k in ODD_IN_X else 1.0 for k in range(count)]).to(gaussians.sh)
    return replace(
        gaussians,
        means=gaussians.means * across,
        quats=gaussians.quats * turned,
        sh=gaussians.sh * signs[:, None],
    )


def chosen(gaussians: Gaussians, which: Tensor) -> Gaussians:
    """Those that ``which`` (bool or indices) picks."""
    return Gaussians(**{f.name: getattr(gaussians, f.name)[which] for f in fields(Gaussians)})


def superposed(objects: Sequence[Gaussians]) -> Gaussians:
    """Several guesses at one object as one: all their Gaussians, each with an n-th of its density, so that n equal
    guesses are as opaque as one: 1 - (1 - opacity)^(1/n).
    """
    both = Gaussians.cat(objects)
    return replace(both, opacities=1 - (1 - both.opacities.clamp(max=OPAQUE)) ** (1 / len(objects)))
