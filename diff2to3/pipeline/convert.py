"""From TRELLIS's folder to a bundle of ours: the same tensors under our configuration, with hashes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from diff2to3.checkpoint import BundleInfo, NetworkEntry, check_fit, check_hashes, save_bundle
from diff2to3.config import config_to_dict
from diff2to3.errors import InputError
from diff2to3.files import file_sha256
from diff2to3.flow.denoise import StageSettings
from diff2to3.hub import Source
from diff2to3.pipeline.load import (
    PIPELINE_FILE,
    UPSTREAM_KEYS,
    TrellisPipeline,
    read_network_config,
    read_pipeline,
    trellis_files,
)
from diff2to3.pipeline.upstream import NETWORKS, build_network, wants_half
from diff2to3.tensors import read_tensors

#: Networks that pipeline.json does not name, by class: they come along where their files lie in ckpts/.
EXTRA_CLASSES = {"SLatEncoder": "encoder", "SparseStructureEncoder": "structure_encoder"}


def convert_trellis(source: str, folder: Path, *, offline: bool = False) -> BundleInfo:
    """Write a bundle into ``folder`` (which must not hold anything yet); returns what was written.

    Tensors keep their dtype. What was written is read back and compared with what was read, bit by bit;
    files from the hub's cache are first checked against the hash that the cache names them by.

    Raises:
        InputError: something is missing, damaged or unknown, or ``folder`` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already exists; give a new folder")
    place = Source(source, offline)
    pipeline = read_pipeline(place.file(PIPELINE_FILE))
    files = network_files(place, pipeline)
    entries, tensors, hashes = {}, {}, {}
    for name, (config_path, weights_path) in files.items():
        class_name, args = read_network_config(config_path)
        hashes[weights_path.name] = checked_sha256(weights_path)
        with torch.device("meta"):
            network: Any = build_network(class_name, args)
        tensors[name] = read_tensors(weights_path)
        check_fit(network, tensors[name], weights_path)
        config = config_to_dict(network.config)
        entries[name] = NetworkEntry(
            type(network).__name__, config, f"{name}.safetensors", half=wants_half(args)
        )
    settings = bundle_settings(pipeline) | {"source_sha256": hashes}
    info = BundleInfo(f"{pipeline.kind}-to-3d", entries, settings, "MIT", source)
    written = save_bundle(folder, info, tensors)
    check_hashes(folder, written)
    for name, entry in written.networks.items():
        compare(tensors[name], read_tensors(folder / entry.file), folder / entry.file)
    return written


def network_files(place: Source, pipeline: TrellisPipeline) -> dict[str, tuple[Path, Path]]:
    """Our name → JSON and safetensors: those that generation needs, and the encoders if they lie beside
    them.
    """
    files = {}
    for name, key in UPSTREAM_KEYS.items():
        if key not in pipeline.models:
            raise InputError(f"{place.name}/{PIPELINE_FILE}: no model {key!r}")
        files[name] = trellis_files(place, pipeline.models[key])
    if place.folder is not None:
        for path in sorted((place.folder / "ckpts").glob("*.json")):
            class_name = read_network_config(path)[0].removeprefix("Elastic")
            weights = path.with_suffix(".safetensors")
            if class_name in EXTRA_CLASSES and class_name in NETWORKS and weights.is_file():
                files.setdefault(EXTRA_CLASSES[class_name], (path, weights))
    return files


def bundle_settings(pipeline: TrellisPipeline) -> dict[str, Any]:
    """The free part of model.json, as :func:`diff2to3.pipeline.load.load_bundle` reads it."""

    def stage(settings: StageSettings) -> dict[str, Any]:
        return {**dataclasses.asdict(settings), "guidance_interval": list(settings.guidance_interval)}

    return {
        "samplers": {"structure": stage(pipeline.structure), "latent": stage(pipeline.latent)},
        "normalization": {"mean": pipeline.mean, "std": pipeline.std},
        "conditioner": {"name": pipeline.conditioner, "image_size": 518},
    }


def checked_sha256(path: Path) -> str:
    """SHA-256 of a file; the hub's cache stores large files under theirs, so there it is checked."""
    digest = file_sha256(path)
    stored = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", stored) and stored != digest:
        raise InputError(
            f"{path}: damaged: its SHA-256 is not the published one; delete it and download again"
        )
    return digest


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], path: Path) -> None:
    if before.keys() != after.keys() or any(
        not torch.equal(before[k], after[k]) or before[k].dtype != after[k].dtype for k in before
    ):
        raise InputError(f"{path}: what was written differs from what was read; is the disk sound?")
