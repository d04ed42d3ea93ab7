"""Any of the four velocity networks, by configuration, behind one way to call it.

          structure (dense grid)   latents (active voxels)
smdit     StructureSMDiT           LatentSMDiT               image tokens attended jointly
dit       StructureDiT             LatentDiT                 image tokens cross-attended

network = build_network(FlowConfig(stage="latents", backbone="smdit", position="marope"))
velocity = velocity_of(network, noise, image)          for samplers
v = predict(network, latents, timestep, image)         for training
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.flow.config import POSITIONS, DiTConfig, LatentDiTConfig, LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.flow.marope import image_ids
from diff2to3.flow.samplers import Velocity
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.nn.embeddings import absolute_position_embedding
from diff2to3.types import SparseVoxels

STAGES = ("structure", "latents")
BACKBONES = ("smdit", "dit")
#: What smdit has beyond the paper, by settings that are off by default.
SMDIT_ONLY = ("precondition", "absolute", "pool_image")
#: Type names in model.json → schema and module.
NETWORKS: dict[str, tuple[type, Any]] = {
    "StructureSMDiT": (SMDiTConfig, StructureSMDiT),
    "LatentSMDiT": (LatentSMDiTConfig, LatentSMDiT),
    "StructureDiT": (DiTConfig, StructureDiT),
    "LatentDiT": (LatentDiTConfig, LatentDiT),
}


@dataclass(frozen=True)
class FlowConfig:
    """One velocity network; table 3's rows differ in ``backbone`` and ``position``. Defaults: stage 2, ``large``.

    stage       structure or latents
    backbone    smdit or dit; dit has as many blocks as smdit's two kinds together
    position    none, ape or marope; dit has ape only
    io_*, reduce, skip_connection  of stage latents only
    The others are those of :class:`LatentSMDiTConfig`.
    """

    stage: str = "latents"
    backbone: str = "smdit"
    position: str = "marope"
    resolution: int = 64
    channels: int = 8
    width: int = 1024
    num_double: int = 8
    num_single: int = 16
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 2
    image_channels: int = 16
    image_patch_size: int = 2
    rope_theta: float = 10000.0
    share_modulation: bool = False
    precondition: bool = False
    absolute: bool = False
    pool_image: bool = False
    io_channels: list[int] = field(default_factory=lambda: [128])
    num_io_blocks: int = 2
    io_kernel: str = "cube"
    reduce: str = "mean"
    skip_connection: bool = True
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        choices = (("stage", STAGES), ("backbone", BACKBONES), ("position", POSITIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in SMDIT_ONLY:
            if self.backbone == "dit" and getattr(self, name):
                raise ValueError(f"{name}: smdit only; dit is the published baseline")
        if self.backbone == "dit" and (self.position != "ape" or self.io_kernel != "cube"):
            raise ValueError("backbone: dit has position 'ape' and io_kernel 'cube' only")
        self.network_config()

    def network_config(self) -> DiTConfig | SMDiTConfig:
        """The network's own configuration, as ``model.json`` keeps it."""
        same = ("resolution", "width", "num_heads", "mlp_ratio", "patch_size", "share_modulation")
        values: dict[str, Any] = {name: getattr(self, name) for name in (*same, "attention_backend")}
        values |= {"in_channels": self.channels, "out_channels": self.channels}
        if self.stage == "latents":
            for name in ("io_channels", "num_io_blocks", "reduce", "skip_connection"):
                values[name] = getattr(self, name)
        if self.backbone == "dit":
            values["cond_channels"] = self.image_channels * self.image_patch_size**2
            values["num_blocks"] = self.num_double + self.num_single
            return LatentDiTConfig(**values) if self.stage == "latents" else DiTConfig(**values)
        tokens = ("num_double", "num_single", "image_channels", "image_patch_size", "position", "rope_theta")
        for name in (*tokens, *SMDIT_ONLY):
            values[name] = getattr(self, name)
        if self.stage == "latents":
            return LatentSMDiTConfig(**values, io_kernel=self.io_kernel)
        return SMDiTConfig(**values)


def build_network(config: FlowConfig) -> nn.Module:
    """The network, initialised from the global generator."""
    kind = ("Latent" if config.stage == "latents" else "Structure") + (
        "SMDiT" if config.backbone == "smdit" else "DiT"
    )
    network: nn.Module = NETWORKS[kind][1](config.network_config())
    return network


def make_plan(network: nn.Module, latents: Tensor | SparseVoxels, image: ImageTokens) -> Any:
    """What depends on positions only: for all steps on these voxels (or grids) with these images."""
    if isinstance(network, LatentSMDiT) and isinstance(latents, SparseVoxels):
        return network.plan(latents, image)
    if isinstance(network, StructureSMDiT):
        return network.plan(image)
    length = max([1, *image.lengths()])
    if isinstance(network, LatentDiT) and isinstance(latents, SparseVoxels):
        return network.plan(latents, length)
    if isinstance(network, StructureDiT):
        return network.plan(image.batch_size, length, image.feats.device)
    raise ValueError(f"network: {type(network).__name__} does not take {type(latents).__name__}")


def predict(
    network: nn.Module,
    latents: Tensor | SparseVoxels,
    timestep: Tensor,
    image: ImageTokens,
    plan: Any = None,
    seen: Tensor | None = None,
) -> Tensor:
    """The velocity, shaped as the latents (or their features). timestep [B] in [0, 1]; ``seen`` from :func:`see`."""
    plan = make_plan(network, latents, image) if plan is None else plan
    if isinstance(network, (StructureDiT, LatentDiT)):
        return network(latents, timestep, dense_condition(image), plan)
    return network(latents, timestep, image, plan, seen=seen)


def see(network: nn.Module, image: ImageTokens) -> Tensor | None:
    """What the network makes of the image at any time; None for networks that begin anew at each."""
    return network.see(image) if isinstance(network, (StructureSMDiT, LatentSMDiT)) else None


def velocity_of(network: nn.Module, latents: Tensor | SparseVoxels, image: ImageTokens) -> Velocity:
    """The network as a sampler takes it. ``latents``: the noise (its shape and voxels are what counts)."""
    plan, seen = make_plan(network, latents, image), see(network, image)
    batch_size = image.batch_size

    def velocity(z: Tensor, t: float) -> Tensor:
        now = latents.with_feats(z) if isinstance(latents, SparseVoxels) else z
        return predict(network, now, torch.full((batch_size,), t, dtype=torch.float64), image, plan, seen)

    return velocity


def dense_condition(image: ImageTokens) -> Tensor:
    """[B, L, C] for cross-attention: zeros where an item has no tokens (TRELLIS's absent condition).

    Latents of an image do not know where they are in it, so their absolute embedding is added. Raises ValueError
    when items with tokens have different numbers of them.
    """
    lengths = image.lengths()
    length = max([1, *lengths])
    if any(n not in (0, length) for n in lengths):
        raise ValueError(f"image: cross-attention takes conditions of one length, got {sorted(set(lengths))}")
    ids = image_ids(image, int(image.grids.max()) if len(image.grids) else 1)[:, :2]
    feats = image.feats + absolute_position_embedding(ids, image.channels).to(image.feats)
    if all(lengths):
        return feats.unflatten(0, (len(lengths), length))
    present = torch.tensor([n > 0 for n in lengths], device=feats.device)
    dense = feats.new_zeros(len(lengths), length, image.channels)
    dense[present] = feats.unflatten(0, (-1, length)) if any(lengths) else dense[present]
    return dense
