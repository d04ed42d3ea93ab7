"""Weights on disk: safetensors beside a JSON file that says what they are. Nothing is ever unpickled.

A *bundle* is a folder of ``model.json`` and one safetensors file a network:

    {"format": "diff2to3-bundle", "version": 1, "kind": "image-to-3d", "license": "MIT", "source": …,
     "networks": {"decoder": {"type": "Decoder", "config": {…}, "file": "decoder.safetensors",
                              "sha256": "…", "half": true}, …},
     "settings": {…}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.files import file_sha256, write_atomic
from diff2to3.tensors import read_tensors, save_tensors

MODEL_FILE = "model.json"
#: The name of the network that encodes condition pictures.
IMAGE_ENCODER = "image_encoder"
FORMAT = "diff2to3-bundle"
VERSION = 1


@dataclass(frozen=True)
class NetworkEntry:
    """One network of a bundle. ``file`` is relative to the folder; ``half`` says that its torso was trained
    for, or released in, float16.
    """

    type: str
    config: dict[str, Any]
    file: str
    sha256: str = ""
    half: bool = False


@dataclass(frozen=True)
class BundleInfo:
    """The content of ``model.json``. ``settings`` is free for the pipeline: samplers, normalisation,
    conditioner.
    """

    kind: str
    networks: dict[str, NetworkEntry]
    settings: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    source: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError that names the file and says what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """Copy ``tensors`` into ``network``: every name and shape must fit; dtypes become the network's.

    A network built on the meta device is filled without first being initialised.
    InputError as :func:`check_fit`.
    """
    check_fit(network, tensors, origin)
    state = network.state_dict()
    cast = {name: tensors[name].to(state[name].dtype) for name in state}
    network.load_state_dict(cast, assign=any(value.is_meta for value in state.values()))


def check_fit(network: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """InputError that names the first missing, unexpected or misshapen tensor, and counts the others."""
    state = network.state_dict()
    problems = [f"no tensor {name!r}" for name in state if name not in tensors]
    problems += [f"unexpected tensor {name!r}" for name in tensors if name not in state]
    problems += [
        f"{name!r} is {list(tensors[name].shape)}, not {list(state[name].shape)}"
        for name in state
        if name in tensors and tensors[name].shape != state[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{origin}: does not fit the network: {problems[0]}{more}")


def save_bundle(folder: Path, info: BundleInfo, tensors: Mapping[str, Mapping[str, Tensor]]) -> BundleInfo:
    """Write every network's tensors, then ``model.json`` with their hashes; returns what was written.

    ``model.json`` is written last: a folder with one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, entry in info.networks.items():
        digest = save_tensors(folder / entry.file, tensors[name])
        entries[name] = NetworkEntry(entry.type, entry.config, entry.file, digest, entry.half)
    values = {
        "format": FORMAT,
        "version": VERSION,
        "kind": info.kind,
        "license": info.license,
        "source": info.source,
        "networks": {name: vars(entry) for name, entry in entries.items()},
        "settings": info.settings,
    }
    write_atomic(folder / MODEL_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")
    return BundleInfo(info.kind, entries, info.settings, info.license, info.source)


def read_bundle(folder: Path) -> BundleInfo:
    """``model.json`` of a bundle, checked. Does not read the weights."""
    path = folder / MODEL_FILE
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise InputError(f'{path}: expected "format": "{FORMAT}", got {values.get("format")!r}')
    if values.get("version") != VERSION:
        raise InputError(
            f"{path}: version {values.get('version')!r} is not {VERSION}; install a diff2to3 that reads it"
        )
    try:
        entries = {name: NetworkEntry(**entry) for name, entry in values["networks"].items()}
        info = BundleInfo(
            values["kind"], entries, values["settings"], values.get("license", ""), values.get("source", "")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    for entry in entries.values():
        if Path(entry.file).name != entry.file:
            raise InputError(f"{path}: file {entry.file!r} is not in the folder")
    return info


def merge_bundles(
    sources: Sequence[Path], *, kind: str | None = None, replace: bool = False
) -> tuple[BundleInfo, dict[str, dict[str, Tensor]]]:
    """The networks and settings of several bundles as one, ready for :func:`save_bundle`.

    Args:
        sources: folders.
        kind: of the result; None: "image-to-3d" where all networks of generation are there, else that of the sources.
        replace: where two have a network or a setting of one name and it differs, the later one counts.

    Raises:
        InputError: a folder that is no bundle or is damaged; without ``replace``, two different networks or settings
            of one name; different kinds.
    """
    if not sources:
        raise InputError("bundles: expected at least one folder")
    entries: dict[str, NetworkEntry] = {}
    origins: dict[str, Path] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    settings: dict[str, Any] = {}
    infos = []
    for folder in sources:
        info = read_checked_bundle(folder)
        infos.append(info)
        for name, entry in info.networks.items():
            same = name in entries and entry == entries[name]
            if name in entries and not same and not replace:
                raise InputError(
                    f"{folder / MODEL_FILE}: network {name!r} differs from that of {origins[name]}; "
                    "leave one out, or let the later one replace it"
                )
            entries[name], origins[name] = entry, folder
            tensors[name] = read_tensors(folder / entry.file)
        settings = _merge_settings(settings, info.settings, replace, str(folder / MODEL_FILE))
    files = [entry.file for entry in entries.values()]
    for name, entry in entries.items():
        if files.count(entry.file) > 1:
            raise InputError(
                f"{origins[name] / MODEL_FILE}: file {entry.file!r} is also that of another network"
            )
    chosen = kind or _merged_kind([info.kind for info in infos], set(entries))
    return _of_all(infos, chosen, entries, settings), tensors


def average_bundles(
    sources: Sequence[Path], weights: Sequence[float]
) -> tuple[BundleInfo, dict[str, dict[str, Tensor]]]:
    """The networks that all bundles have, each the weighted mean of theirs, ready for :func:`save_bundle`.

    Runs that began with the same weights often have a mean that generalises better than any of them (model soups,
    Wortsman et al. 2022).

    Args:
        sources: folders.
        weights: one each; they are divided by their sum.

    Raises:
        InputError: a folder that is no bundle or is damaged; networks of different shapes; settings that differ; no
            network in common; weights that do not fit.
    """
    if len(sources) < 2 or len(weights) != len(sources):
        raise InputError(
            f"bundles: expected at least two and a weight for each, got {len(sources)} and {len(weights)}"
        )
    total = math.fsum(weights)
    if not (math.isfinite(total) and total > 0):
        raise InputError(f"weights: expected numbers with a positive sum, got {list(weights)}")
    infos = []
    settings: dict[str, Any] = {}
    for folder in sources:
        info = read_checked_bundle(folder)
        infos.append(info)
        settings = _merge_settings(settings, info.settings, False, str(folder / MODEL_FILE))
    entries = {n: e for n, e in infos[0].networks.items() if all(n in info.networks for info in infos)}
    if not entries:
        raise InputError(f"bundles: no network is in all of {', '.join(map(str, sources))}")
    tensors = {}
    for name, entry in entries.items():
        stored = []
        for folder, info in zip(sources, infos, strict=True):
            other = info.networks[name]
            stored.append(read_tensors(folder / other.file))
            if (other.type, other.config) != (entry.type, entry.config) or stored[-1].keys() != stored[
                0
            ].keys():
                raise InputError(f"{folder / MODEL_FILE}: {name!r} is another network than in {sources[0]}")
        tensors[name] = {key: _mean([part[key] for part in stored], weights) for key in stored[0]}
    kind = min(infos, key=lambda info: len(info.networks)).kind
    return _of_all(infos, kind, entries, settings), tensors


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted, summed in float64, in the dtype of the first."""
    total = math.fsum(weights)
    parts = [weight / total * value.double() for value, weight in zip(values, weights, strict=True)]
    return torch.stack(parts).sum(0).to(values[0].dtype)


def _of_all(
    infos: Sequence[BundleInfo], kind: str, entries: dict[str, NetworkEntry], settings: dict[str, Any]
) -> BundleInfo:
    """What is made of several bundles: with the licences and sources of all."""
    licenses = _joined(" AND ", [info.license for info in infos])
    origin = _joined("; ", [info.source for info in infos])
    return BundleInfo(kind, entries, settings, licenses, origin)


def read_checked_bundle(folder: Path) -> BundleInfo:
    """InputError for a folder that is no bundle, or a damaged one."""
    info = read_bundle(folder)
    check_hashes(folder, info)
    return info


def _joined(separator: str, texts: Sequence[str]) -> str:
    """As one text, with what several of them name (merged bundles are merged again) only once."""
    return separator.join(dict.fromkeys(part for text in texts for part in text.split(separator) if part))


def _same(value: Any, other: Any) -> bool:
    """Equal, numbers to rounding: statistics that several trainings computed differ in their last digits."""
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(_same(a, b) for a, b in zip(value, other, strict=True))
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-5, abs_tol=1e-6)
    return bool(value == other)


def _merged_kind(kinds: list[str], names: set[str]) -> str:
    if {"structure_flow", "structure_decoder", "latent_flow", "decoder"} <= names:
        return next((kind for kind in kinds if kind.endswith("-to-3d")), "image-to-3d")
    if len(set(kinds)) == 1:
        return kinds[0]
    # Parts of a model: what it is so far is said by the one that makes 3D from something.
    return "vae" if "vae" in kinds else "parts"


def _merge_settings(
    first: Mapping[str, Any], other: Mapping[str, Any], replace: bool, origin: str
) -> dict[str, Any]:
    """Keys of both; dicts are merged within."""
    merged = dict(first)
    for key, value in other.items():
        held = merged.get(key)
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge_settings(held, value, replace, origin)
        elif key in merged and not _same(held, value) and not replace:
            raise InputError(
                f"{origin}: settings: {key!r} is {value!r}, and {held!r} in the bundle before it"
            )
        else:
            merged[key] = value
    return merged


def check_hashes(folder: Path, info: BundleInfo) -> None:
    """InputError that names the first file whose content is not what ``model.json`` says."""
    for entry in info.networks.values():
        path = folder / entry.file
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if entry.sha256 and file_sha256(path) != entry.sha256:
            raise InputError(f"{path}: damaged: its SHA-256 is not the one in {MODEL_FILE}")
