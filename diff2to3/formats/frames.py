"""Which way is up in a file. Our objects are z up; most viewers of splats expect y down, glTF expects y up.

The three frames share x and handedness, so that each is a quarter or half turn around x of the others:

    native   (x, y, z)     z up, as everywhere in this package
    y-down   (x, −z, y)    3DGS files: x right, y down, z forward, seen from −y of ours
    y-up     (x, z, −y)    glTF and .spz: x right, y up, z backward
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.gaussians.turn import Y_DOWN, turned
from diff2to3.types import Gaussians


@dataclass(frozen=True)
class Frame:
    """``text``: what a file says of it. ``rows``: the rotation [3, 3] from ours into it."""

    text: str
    rows: tuple[tuple[float, float, float], ...]

    @property
    def rotation(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.float64)


#: By the name that ``--frame`` takes.
FRAMES = {
    "native": Frame("right-handed, z up", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    "y-down": Frame("right-handed, y down", Y_DOWN),
    "y-up": Frame("right-handed, y up", ((1, 0, 0), (0, 0, 1), (0, -1, 0))),
}


def frame_in(metadata: Mapping[str, Any]) -> str | None:
    """The name of the frame that a file's metadata states; None where it states none that we know."""
    said = metadata.get("frame")
    return next((name for name, frame in FRAMES.items() if frame.text == said), None)


def check_frame(name: str) -> str:
    """``name`` again; InputError where there is no such frame."""
    if name not in FRAMES:
        raise InputError(f"frame: expected one of {', '.join(FRAMES)}, got {name!r}")
    return name


def into_frame(gaussians: Gaussians, frame: str) -> Gaussians:
    """Gaussians of our frame in another."""
    return gaussians if frame == "native" else turned(gaussians, FRAMES[check_frame(frame)].rotation)


def out_of_frame(gaussians: Gaussians, frame: str) -> Gaussians:
    """The inverse of ``into_frame``."""
    return gaussians if frame == "native" else turned(gaussians, FRAMES[check_frame(frame)].rotation.T)
