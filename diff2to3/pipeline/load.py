"""Loading a whole model: our bundles, and TRELLIS's folders and repositories as they are published.

TRELLIS                            ours
pipeline.json                      model.json
ckpts/NAME.json + .safetensors     NAME.safetensors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import (
    IMAGE_ENCODER,
    MODEL_FILE,
    BundleInfo,
    read_bundle,
    read_json,
)
from diff2to3.config import config_from_dict
from diff2to3.errors import InputError
from diff2to3.flow.conditioners import load_image_conditioner, load_text_conditioner
from diff2to3.flow.denoise import StageSettings, image_patch_size, image_width
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.flow.efficientnet import EfficientNetLite
from diff2to3.flow.framing import Framing
from diff2to3.flow.normalization import Normalization
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT
from diff2to3.hub import Source, embedded_models
from diff2to3.networks import filled, network_builder
from diff2to3.photo.encoder import PhotoEncoder
from diff2to3.photo.occupancy import OccupancyFlow
from diff2to3.pipeline.parts import Networks, Parts, PhotoNetworks, PhotoParts, PhotoStatistics
from diff2to3.pipeline.upstream import NOT_SUPPORTED, build_network, wants_half
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.sparse_structure import StructureDecoder
from diff2to3.voxels.mini_encoder import MiniEncoder
from diff2to3.voxels.providers import build_provider

PIPELINE_FILE = "pipeline.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Our names of the networks that generation needs → TRELLIS's keys in pipeline.json.
UPSTREAM_KEYS = {
    "structure_flow": "sparse_structure_flow_model",
    "structure_decoder": "sparse_structure_decoder",
    "latent_flow": "slat_flow_model",
    "decoder": "slat_decoder_gs",
}
#: TRELLIS's keys that are left out → the class that says why.
LEFT_OUT = {"slat_decoder_mesh": "SLatMeshDecoder", "slat_decoder_rf": "SLatRadianceFieldDecoder"}
PIPELINES = {"TrellisImageTo3DPipeline": "image", "TrellisTextTo3DPipeline": "text"}
SAMPLERS = ("FlowEulerGuidanceIntervalSampler", "FlowEulerCfgSampler", "FlowEulerSampler")

#: What the networks of a model may be, by our names.
ROLES: dict[str, tuple[type, ...]] = {
    "structure_flow": (StructureDiT, StructureSMDiT),
    "structure_decoder": (StructureDecoder,),
    "latent_flow": (LatentDiT, LatentSMDiT),
    "decoder": (Decoder,),
}
#: What is sampled.
#: TRELLIS's condition picture.
TRELLIS_FRAMING = Framing(size=518, margin=1.2, background=0.0)


@dataclass(frozen=True)
class Options:
    """Where and how a model runs."""

    device: torch.device
    dtype: torch.dtype | None
    offline: bool
    image_encoder: str | None
    low_memory: bool


def load_parts(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    offline: bool = False,
    image_encoder: str | None = None,
    low_memory: bool = False,
) -> Parts | PhotoParts:
    """Load what a model for generation is made of.

    Args:
        source: an embedded model ("mini-photo"), a folder with ``model.json`` (ours) or ``pipeline.json``
            (TRELLIS's), or a hub repository.
        dtype: of the networks' torsos; None: float32 on a CPU; on a GPU as released where that is float16, bfloat16
            for flows of our own (from compute capability 8.0), else float32.
        offline: never open a connection.
        image_encoder: a local folder or hub repository of the condition encoder (DINOv2 or CLIP), in place of the
            published one. Without it, a folder of the encoder's name within ``source`` is preferred.
        low_memory: keep networks on the CPU and move each to the device for its stage.

    Raises:
        InputError: something is missing or does not fit; the message names the file.
        MissingDependencyError: transformers (or huggingface_hub) is needed and not installed.
    """
    options = Options(torch.device(device), dtype, offline, image_encoder, low_memory)
    place = Source(source, offline)
    if place.has(MODEL_FILE):
        info = read_bundle(place.file(MODEL_FILE).parent)
        if info.settings.get("frame") == "photo":
            return load_photo_bundle(place, info, options)
        return load_bundle(place, options)
    return load_trellis(place, options)


# ---- our bundles ----


def load_bundle(place: Source, options: Options) -> Parts:
    """From ``model.json``. ``settings`` says how to generate:

    samplers           {structure: {…}, latent: {…}} of StageSettings' fields
    latents            {mean, std} that the latent flow's latents are normalised by ("normalization" in bundles of
                       TRELLIS's weights); structure_latents likewise for the other flow
    image_latents      {mean, std} that the condition's latents are normalised by
    condition          {size, margin, background} of the condition picture (diff2to3.flow.framing), its encoder:
                       {provider, weights} of diff2to3.voxels.providers, else the bundle's network ``image_encoder``
    conditioner        in place of condition: {name, image_size} of TRELLIS's condition encoder
    """
    path = place.file(MODEL_FILE)
    folder, info = path.parent, read_bundle(path.parent)
    kind = {"image-to-3d": "image", "text-to-3d": "text"}.get(info.kind)
    missing = [name for name in UPSTREAM_KEYS if name not in info.networks]
    if kind is None and not missing:
        raise InputError(f"{path}: kind {info.kind!r} is not one that generates")
    if missing:
        what = f"{place.name} (embedded)" if place.name in embedded_models() else str(path)
        raise InputError(
            f"{what}: this model cannot generate: it has no {', '.join(missing)}; it has "
            f"{', '.join(info.networks) or 'no network'}. The embedded generator is mini-photo"
        )
    loaded = {name: load_bundle_network(folder, info, name, options, place) for name in UPSTREAM_KEYS}
    settings = info.settings
    try:
        samplers = settings.get("samplers", {})
        stages = [
            config_from_dict(StageSettings, samplers.get(name, {}), f"{path}: samplers: {name}")
            for name in ("structure", "latent")
        ]
        latents = settings.get("latents", settings.get("normalization"))
        statistics = {
            "structure_latents": settings.get("structure_latents"),
            "latents": latents,
            "image_latents": settings.get("image_latents"),
        }
        if "conditioner" in settings:
            size = int(settings["conditioner"].get("image_size", TRELLIS_FRAMING.size))
            framing, trellis = replace(TRELLIS_FRAMING, size=size), True
            conditioner = load_conditioner(kind or "", settings["conditioner"]["name"], place, options)
        else:
            condition = dict(settings.get("condition", {}))
            provider, weights = condition.pop("provider", "mini"), condition.pop("weights", None)
            framing, trellis = Framing(**condition), False
            if provider != "mini":
                conditioner = ProviderConditioner(provider, weights, options)
            elif IMAGE_ENCODER in info.networks:
                conditioner = load_bundle_network(folder, info, IMAGE_ENCODER, options, place)
            else:
                raise InputError(f"{path}: no network 'image_encoder', and settings name no provider")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: settings are damaged: {reason}") from error
    return assemble(
        loaded,
        conditioner,
        kind or "",
        stages,
        options,
        statistics=statistics,
        framing=framing,
        trellis=trellis,
    )


#: The networks of a bundle whose frame is the photo's, by name → what they must be.
PHOTO_ROLES: dict[str, type] = {
    "photo_maps": EfficientNetLite,
    "photo_encoder": PhotoEncoder,
    "occupancy_flow": OccupancyFlow,
    "image_encoder": MiniEncoder,
    "latent_flow": LatentSMDiT,
    "decoder": Decoder,
}


def load_photo_bundle(place: Source, info: BundleInfo, options: Options) -> PhotoParts:
    """A bundle that generates in the photo frame. ``settings``:

    samplers        {structure: {…}, latent: {…}} of StageSettings' fields
    map_deviations  [2]: what stage 1's maps are divided by
    latents, image_latents, fine_maps, coarse_maps   {mean, std} of stage 2's latents and of what it sees
    refine          steps that fit a result to its photo
    """
    path = place.file(MODEL_FILE)
    missing = [name for name in PHOTO_ROLES if name not in info.networks]
    if missing:
        raise InputError(f"{path}: this model cannot generate: it has no {', '.join(missing)}")
    loaded: dict[str, Any] = {
        name: load_bundle_network(path.parent, info, name, options, place) for name in PHOTO_ROLES
    }
    for name, wanted in PHOTO_ROLES.items():
        if not isinstance(loaded[name], wanted):
            raise InputError(
                f"{path}: {name}: expected a {wanted.__name__}, got a {type(loaded[name]).__name__}"
            )
    settings, encoder = info.settings, loaded["photo_encoder"].config
    channels = {
        "latents": loaded["latent_flow"].config.in_channels,
        "image_latents": loaded["image_encoder"].config.latent_channels,
        "fine_maps": encoder.fine_channels,
        "coarse_maps": encoder.coarse_channels,
    }
    try:
        stages = [
            config_from_dict(StageSettings, settings["samplers"][name], f"{path}: samplers: {name}")
            for name in ("structure", "latent")
        ]
        normalizations = [Normalization.of(settings[name], count, name) for name, count in channels.items()]
        statistics = PhotoStatistics(torch.tensor(settings["map_deviations"]), *normalizations)
        steps = int(settings.get("refine", 0))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: settings are damaged: {reason}") from error
    grids = [loaded[name].config.resolution for name in ("occupancy_flow", "latent_flow", "decoder")]
    if len(set(grids)) != 1:
        raise InputError(f"{path}: the networks' grids differ: {', '.join(f'{r}³' for r in grids)}")
    return PhotoParts(
        PhotoNetworks(*loaded.values()),
        statistics,
        stages[0],
        stages[1],
        steps,
        options.device,
        options.low_memory,
        options.offline,
    )


def load_bundle_network(
    folder: Path, info: BundleInfo, name: str, options: Options, place: Source | None = None
) -> nn.Module:
    """One network of a bundle; ``place``: where its file is fetched from if the bundle is on the hub."""
    entry = info.networks[name]
    build = network_builder(entry, f"{folder / MODEL_FILE}: {name}")
    path = folder / entry.file if place is None else place.file(entry.file)
    return fill(build, path, entry.half, options)


# ---- TRELLIS ----


def load_trellis(place: Source, options: Options) -> Parts:
    """From ``pipeline.json``."""
    path = place.file(PIPELINE_FILE)
    pipeline = read_pipeline(path)
    loaded = {}
    for name, key in UPSTREAM_KEYS.items():
        stem = pipeline.models.get(key)
        if stem is None:
            raise InputError(f"{path}: no model {key!r}")
        loaded[name] = load_trellis_network(place, stem, options)
    notes = [
        f"{key} is skipped: {NOT_SUPPORTED[LEFT_OUT[key]]}" for key in pipeline.models if key in LEFT_OUT
    ]
    conditioner = load_conditioner(pipeline.kind, pipeline.conditioner, place, options)
    stages = [pipeline.structure, pipeline.latent]
    statistics = {"latents": {"mean": pipeline.mean, "std": pipeline.std}}
    return assemble(
        loaded,
        conditioner,
        pipeline.kind,
        stages,
        options,
        statistics=statistics,
        framing=TRELLIS_FRAMING,
        trellis=True,
        notes=notes,
    )


@dataclass(frozen=True)
class TrellisPipeline:
    """The content of ``pipeline.json``."""

    kind: str
    models: dict[str, str]
    structure: StageSettings
    latent: StageSettings
    mean: list[float]
    std: list[float]
    conditioner: str


def read_pipeline(path: Path) -> TrellisPipeline:
    """``pipeline.json``, checked; InputError says what is missing or unknown."""
    values = read_json(path)
    try:
        name, args = values.get("name", "TrellisImageTo3DPipeline"), values["args"]
        if name not in PIPELINES:
            raise InputError(f"{path}: unknown pipeline {name!r}; known are {', '.join(PIPELINES)}")
        kind = PIPELINES[name]
        normalization = args["slat_normalization"]
        return TrellisPipeline(
            kind,
            {str(key): str(stem) for key, stem in args["models"].items()},
            stage_from_sampler(args["sparse_structure_sampler"]),
            stage_from_sampler(args["slat_sampler"]),
            [float(x) for x in normalization["mean"]],
            [float(x) for x in normalization["std"]],
            str(args[f"{kind}_cond_model"]),
        )
    except KeyError as error:
        raise InputError(f"{path}: no value for {error.args[0]!r}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def stage_from_sampler(sampler: Mapping[str, Any]) -> StageSettings:
    """TRELLIS's sampler and its parameters; ``cfg_strength`` is our guidance scale − 1."""
    name, params = sampler["name"], dict(sampler["params"])
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known are {', '.join(SAMPLERS)}")
    steps, shift = int(params.pop("steps", 50)), float(params.pop("rescale_t", 1.0))
    scale = 1.0 if name == "FlowEulerSampler" else float(params.pop("cfg_strength", 3.0)) + 1
    interval = (0.0, 1.0)
    if name == "FlowEulerGuidanceIntervalSampler":
        low, high = params.pop("cfg_interval", interval)
        interval = (float(low), float(high))
    if params:
        raise ValueError(f"unknown parameter {sorted(params)[0]!r} of {name}")
    return StageSettings(steps, scale, interval, shift)


def trellis_files(place: Source, stem: str) -> tuple[Path, Path]:
    """The JSON and safetensors of a network. ``stem`` is relative, or names another repository first."""
    names = (f"{stem}.json", f"{stem}.safetensors")
    parts = stem.split("/")
    if all(place.has(name) for name in names) or parts[0] == "ckpts" or len(parts) < 3:
        return place.file(names[0]), place.file(names[1])
    other = Source("/".join(parts[:2]), place.offline)
    inner = "/".join(parts[2:])
    try:
        return other.file(f"{inner}.json"), other.file(f"{inner}.safetensors")
    except InputError as error:
        if place.folder is None:
            raise
        raise InputError(f"{error}; or put it at {place.folder / stem}.json and .safetensors") from error


def load_trellis_network(place: Source, stem: str, options: Options) -> nn.Module:
    config_path, weights_path = trellis_files(place, stem)
    name, args = read_network_config(config_path)
    try:
        return fill(lambda: build_network(name, args), weights_path, wants_half(args), options)
    except InputError as error:
        raise InputError(f"{config_path}: {error}") from error


def read_network_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The class name and arguments in a network's JSON."""
    values = read_json(path)
    name, args = values.get("name"), values.get("args")
    if not isinstance(name, str) or not isinstance(args, dict):
        raise InputError(f'{path}: expected "name" and "args"')
    return name, args


# ---- both ----


def fill(build: Callable[[], nn.Module], path: Path, half: bool, options: Options) -> nn.Module:
    """A network with its weights, its torso in the dtype that ``options`` ask for."""
    return filled(build, path, half, options.device, options.dtype)


def load_conditioner(kind: str, name: str, place: Source, options: Options) -> nn.Module:
    """The encoder that was asked for, else one that lies in the model's folder, else the published one."""
    local = options.image_encoder
    if local is None and place.folder is not None and (place.folder / name / "config.json").is_file():
        local = str(place.folder / name)
    load = load_image_conditioner if kind == "image" else load_text_conditioner
    return load(name, local_path=local, offline=options.offline)


class ProviderConditioner(nn.Module):
    """A feature provider as condition encoder: pictures [B, 3, S, S] in [0, 1] → latents [B, C, S/stride, S/stride]."""

    def __init__(self, name: str, weights: str | None, options: Options) -> None:
        super().__init__()
        dtype = options.dtype or torch.float32
        self.provider = build_provider(
            name, options.image_encoder or weights, device="cpu", dtype=dtype, offline=options.offline
        )
        self.channels = self.provider.channels

    def forward(self, pictures: Tensor) -> Tensor:
        return self.provider.encode(pictures.permute(0, 2, 3, 1)).float()


def assemble(
    loaded: Mapping[str, Any],
    conditioner: Any,
    kind: str,
    stages: list[StageSettings],
    options: Options,
    *,
    statistics: Mapping[str, Mapping[str, list[float]] | None],
    framing: Framing,
    trellis: bool,
    notes: list[str] | None = None,
) -> Parts:
    """Check that the parts fit each other. ``stages`` are of structure and latents; ``statistics`` are those of
    structure_latents, latents and image_latents; None, or missing, for none.
    """
    networks = Networks(**loaded)
    for name, classes in ROLES.items():
        if not isinstance(loaded[name], classes):
            known = " or ".join(cls.__name__ for cls in classes)
            raise InputError(f"{name}: expected a {known}, got a {type(loaded[name]).__name__}")
    flows = (loaded["structure_flow"], loaded["latent_flow"])
    channels = condition_channels(conditioner)
    for flow in flows:
        if not trellis:
            image_patch_size(flow, channels)
        elif image_width(flow) != channels:
            raise InputError(
                f"the condition encoder has {channels} channels, but the flow models were trained for "
                f"{image_width(flow)}"
            )
    check_grids(loaded)
    label = "normalization" if trellis else "latents"

    def normalization(name: str, width: int, shown: str) -> Normalization | None:
        values = statistics.get(name)
        return None if values is None else Normalization.of(values, width, shown)

    return Parts(
        networks=networks,
        conditioner=conditioner,
        kind=kind,
        structure_settings=stages[0],
        latent_settings=stages[1],
        structure_normalization=normalization(
            "structure_latents", flows[0].config.in_channels, "structure_latents"
        ),
        latent_normalization=normalization("latents", flows[1].config.in_channels, label),
        image_normalization=normalization("image_latents", channels, "image_latents"),
        framing=framing,
        trellis=trellis,
        device=options.device,
        low_memory=options.low_memory,
        offline=options.offline,
        notes=tuple(notes or ()),
    )


def condition_channels(conditioner: Any) -> int:
    """Of what an encoder of pictures or texts gives."""
    if isinstance(conditioner, MiniEncoder):
        return conditioner.config.latent_channels
    return int(conditioner.channels)


def check_grids(loaded: Mapping[str, Any]) -> None:
    """InputError where the stages work on different grids."""
    structure, decoder = loaded["structure_flow"].config, loaded["structure_decoder"].config
    grid = structure.resolution * 2 ** (len(decoder.channels) - 1) * decoder.fold
    sizes = {"the structure stage": grid}
    sizes |= {name: loaded[name].config.resolution for name in ("latent_flow", "decoder")}
    if len(set(sizes.values())) != 1:
        raise InputError("the networks' grids differ: " + ", ".join(f"{k} {v}³" for k, v in sizes.items()))
