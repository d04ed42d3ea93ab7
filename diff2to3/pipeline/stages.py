"""What the two stages of every model do, whatever frame it works in: the interface of ObjectStages and PhotoStages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diff2to3.flow.denoise import Progress, StageSettings
from diff2to3.pipeline.photos import Photo
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.views.photo_frame import PhotoCamera


class Stages(Protocol):
    """The networks of a model, and how they are used on a batch of B objects. ``frame``: what results stand in.

    ``seen``, what :meth:`see` returns, is each kind's own; only its own methods look into it.
    """

    frame: str
    device: torch.device

    def see(self, prompts: Sequence[Any], photos: Sequence[tuple[Photo, ...]], multi_image: str) -> Any:
        """Encode what the B objects are generated from: a text each, or their photos.

        Raises:
            InputError: a number of photos that the model does not take.
        """
        ...

    def occupancy(
        self,
        seen: Any,
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> Tensor:
        """Stage 1: active voxels int32 [N, 4] = (object, x, y, z), from noise that each object's generator gives.

        Raises:
            InputError: an object without any.
        """
        ...

    def latents(
        self,
        coords: Tensor,
        seen: Any,
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> SparseVoxels:
        """Stage 2: latents on voxels [N, 4], as the decoder takes them."""
        ...

    def decode(self, latents: SparseVoxels) -> list[Gaussians]:
        """Gaussians of every object."""
        ...

    def cameras(self, seen: Any) -> list[PhotoCamera | None]:
        """Of each object's photo; None in a frame where it is not known."""
        ...

    def refined(
        self, gaussians: Sequence[Gaussians], seen: Any, steps: int
    ) -> tuple[list[Gaussians], list[PhotoCamera | None]]:
        """Each object fitted to its photo in ``steps`` steps, and the cameras that were found.

        Raises:
            InputError: a frame where the photo's camera is not known.
        """
        ...

    def all_networks(self) -> list[nn.Module]:
        """Those that are moved to the device."""
        ...
