"""What a model for generation is made of, as the loader gives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow.denoise import StageSettings
from diff2to3.flow.framing import Framing
from diff2to3.flow.normalization import Normalization
from diff2to3.flow.smdit import LatentSMDiT
from diff2to3.photo.encoder import PhotoEncoder
from diff2to3.photo.occupancy import OccupancyFlow
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.sparse_structure import StructureDecoder, active_voxels
from diff2to3.views.photo_frame import SILHOUETTE

#: In the photo frame: side of the crop over the longer side of the object's box.
MARGIN = 1 / SILHOUETTE
#: Side of the crop that the networks see there, and the grey level behind the object.
SIZE, BACKGROUND = 256, 0.5


@dataclass(frozen=True)
class Networks:
    """The four networks of generation; the flows are those of diff2to3.flow.dit or of diff2to3.flow.smdit."""

    structure_flow: nn.Module
    structure_decoder: StructureDecoder
    latent_flow: nn.Module
    decoder: Decoder


@dataclass(frozen=True)
class Parts:
    """The parts of a loaded model.

    kind         what it is conditioned on: "image" or "text"
    conditioner  pictures [B, 3, S, S] → tokens [B, L, C] or latents [B, C, h, w], or a list of texts → tokens
    structure_settings, latent_settings  how each stage is sampled unless a call says otherwise
    structure_normalization, latent_normalization  of the latents of each stage; None for none
    image_normalization  of what the conditioner gives
    framing      of the condition picture; ``trellis`` prepares it as TRELLIS does, on black and byte by byte
    low_memory   networks wait on the CPU and visit the device in turn
    offline      no connection is opened, by the background removal either
    notes        what the loader left out: one line for each
    refine       steps that fit a result to its photo; none in the object's frame
    """

    networks: Networks
    conditioner: nn.Module
    kind: str
    structure_settings: StageSettings
    latent_settings: StageSettings
    structure_normalization: Normalization | None = None
    latent_normalization: Normalization | None = None
    image_normalization: Normalization | None = None
    framing: Framing = field(default_factory=Framing)
    trellis: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    low_memory: bool = False
    offline: bool = False
    notes: tuple[str, ...] = ()
    refine: int = 0


@dataclass(frozen=True)
class PhotoNetworks:
    """maps: the frozen image network; encoder, flow: of stage 1; image_encoder, latent_flow: of stage 2."""

    maps: nn.Module
    encoder: PhotoEncoder
    flow: OccupancyFlow
    image_encoder: nn.Module
    latent_flow: LatentSMDiT
    decoder: Decoder


@dataclass(frozen=True)
class PhotoStatistics:
    """deviations [2]: what the maps are divided by in stage 1; the rest: of stage 2's latents and maps."""

    deviations: Tensor
    latents: Normalization
    image: Normalization
    fine: Normalization
    coarse: Normalization


@dataclass(frozen=True)
class PhotoParts:
    """The parts of a model that generates in the photo frame; ``refine`` steps fit a result to its photo. The rest is
    as in :class:`Parts`.
    """

    networks: PhotoNetworks
    statistics: PhotoStatistics
    structure_settings: StageSettings
    latent_settings: StageSettings
    refine: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    low_memory: bool = False
    offline: bool = False
    kind: str = "image"
    framing: Framing = field(default_factory=lambda: Framing(SIZE, MARGIN, BACKGROUND))
    trellis: bool = False
    notes: tuple[str, ...] = ()


def some_voxels(logits: Tensor, threshold: float) -> Tensor:
    """Active voxels [N, 4] of logits [B, 1, R, R, R]. InputError where an item has none."""
    coords = active_voxels(logits, threshold)
    counts = torch.bincount(coords[:, 0], minlength=len(logits))
    if int(counts.min()) == 0:
        raise InputError("the structure stage generated no voxel for this input; try another seed")
    return coords


@contextmanager
def visiting(network: nn.Module, device: torch.device, low_memory: bool) -> Iterator[Any]:
    """The network, on the device; with ``low_memory`` it goes back to the CPU afterwards."""
    if not low_memory:
        yield network
        return
    network.to(device)
    try:
        yield network
    finally:
        network.to("cpu")
