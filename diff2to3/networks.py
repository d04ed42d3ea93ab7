"""What networks are called in ``model.json``: type → schema of its configuration, and module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from diff2to3.checkpoint import MODEL_FILE, NetworkEntry, load_strictly, read_tensors
from diff2to3.config import config_from_dict
from diff2to3.errors import InputError
from diff2to3.flow.config import DiTConfig, LatentDiTConfig, LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.flow.efficientnet import EfficientNetConfig, EfficientNetLite
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT
from diff2to3.photo.encoder import PhotoEncoder, PhotoEncoderConfig
from diff2to3.photo.occupancy import OccupancyFlow, OccupancyFlowConfig
from diff2to3.vae.config import DecoderConfig, EncoderConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder
from diff2to3.voxels.mini_encoder import MiniEncoder, MiniEncoderConfig

NETWORK_TYPES: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "Encoder": (EncoderConfig, Encoder),
    "Decoder": (DecoderConfig, Decoder),
    "StructureEncoder": (StructureConfig, StructureEncoder),
    "StructureDecoder": (StructureConfig, StructureDecoder),
    "StructureDiT": (DiTConfig, StructureDiT),
    "LatentDiT": (LatentDiTConfig, LatentDiT),
    "StructureSMDiT": (SMDiTConfig, StructureSMDiT),
    "LatentSMDiT": (LatentSMDiTConfig, LatentSMDiT),
    "MiniEncoder": (MiniEncoderConfig, MiniEncoder),
    "PhotoEncoder": (PhotoEncoderConfig, PhotoEncoder),
    "OccupancyFlow": (OccupancyFlowConfig, OccupancyFlow),
    "EfficientNetLite": (EfficientNetConfig, EfficientNetLite),
}
#: Those that a training set's stages are made with.
ENCODER_TYPES = ("Encoder", "StructureEncoder", "MiniEncoder", "EfficientNetLite")


def network_builder(
    entry: NetworkEntry, origin: str, types: Sequence[str] = tuple(NETWORK_TYPES)
) -> Callable[[], nn.Module]:
    """What builds a bundle's network, its weights new: to be called on the meta device where they are to be read.

    Raises:
        InputError: its type is none of ``types``, or its configuration does not fit it; begins with ``origin``.
    """
    if entry.type not in types:
        raise InputError(f"{origin}: unknown type {entry.type!r}; known here are {', '.join(types)}")
    schema, module = NETWORK_TYPES[entry.type]
    config: Any = config_from_dict(schema, entry.config, origin)
    return lambda: module(config)


def frozen_network(folder: Path, name: str, entry: NetworkEntry, types: Sequence[str]) -> nn.Module:
    """A network of a local bundle with its weights, in float32 on the CPU, not to be trained. InputError as above, and
    where the weights do not fit.
    """
    network = network_builder(entry, f"{folder / MODEL_FILE}: {name}", types)()
    path = folder / entry.file
    load_strictly(network, read_tensors(path), path)
    return network.eval().requires_grad_(False)
