"""What networks are called in ``model.json``: type → schema of its configuration, and module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diff2to3.checkpoint import MODEL_FILE, NetworkEntry, load_strictly
from diff2to3.config import config_from_dict
from diff2to3.errors import InputError
from diff2to3.flow.config import DiTConfig, LatentDiTConfig, LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.flow.efficientnet import EfficientNetConfig, EfficientNetLite
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT
from diff2to3.photo.encoder import PhotoEncoder, PhotoEncoderConfig
from diff2to3.photo.occupancy import OccupancyFlow, OccupancyFlowConfig
from diff2to3.tensors import read_tensors
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
#: Those that are sampled.
FLOWS = (StructureDiT, LatentDiT, StructureSMDiT, LatentSMDiT)
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


class WithoutNormalStart(TorchFunctionMode):
    """Leaves out ``normal_``. On the meta device, where it changes nothing, it is run by torch's references in Python,
    which import torch._dynamo: a second of every command's start.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = kwargs or {}
        if getattr(function, "__name__", "") == "normal_":
            return args[0] if args else values["tensor"]
        return function(*args, **values)


def filled(
    build: Callable[[], nn.Module],
    path: Path,
    half: bool,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build a network without initialising it, and load its weights; it stays on the CPU.

    Random number generators are left alone.

    Args:
        half: its torso was released in float16.
        device: where it will run, which decides the torso's dtype where ``dtype`` is None.

    Raises:
        InputError: the weights are missing or do not fit.
    """
    with torch.device("meta"), WithoutNormalStart():
        network = build()
    if hasattr(network, "cast_torso"):  # small encoders stay in float32
        network.cast_torso(dtype or usual_dtype(isinstance(network, FLOWS), half, device))  # type: ignore[operator]
    load_strictly(network, read_tensors(path), path)
    return network


def usual_dtype(flow: bool, half: bool, device: torch.device) -> torch.dtype:
    """Of a torso; ``half``: it was released in float16. Flows are trained under bfloat16's autocast and sampled in
    it; decoders, whose parameters become an asset, stay in float32.
    """
    if half and device.type != "cpu":
        return torch.float16
    if flow and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32
