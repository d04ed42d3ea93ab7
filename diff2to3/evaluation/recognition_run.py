"""What eval/recognition.py works through: photos made into assets, or read with assets that were made before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diff2to3 import formats
from diff2to3.checkpoint import read_bundle
from diff2to3.errors import InputError
from diff2to3.evaluation.recognition import Recognisable
from diff2to3.hub import EMBEDDED
from diff2to3.networks import frozen_network
from diff2to3.pipeline import ImageTo3D
from diff2to3.pipeline.camera_file import camera_entry, read_camera
from diff2to3.pipeline.cutout import cut_out
from diff2to3.pipeline.parts import SIZE
from diff2to3.pipeline.photo_files import check_photo, open_photo
from diff2to3.pipeline.photo_frame import crop_of, straight
from diff2to3.pipeline.photos import Photo, made_solid

#: The embedded bundle that holds the first blocks of EfficientNet-Lite0.
FEATURES = "mini-photo"


def map_network() -> Any:
    """The frozen image network that pictures are compared by."""
    folder = EMBEDDED / FEATURES
    return frozen_network(
        folder, "photo_maps", read_bundle(folder).networks["photo_maps"], ("EfficientNetLite",)
    )


def photos_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name. InputError where there are fewer than two."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of pictures")
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            try:
                check_photo(path)
            except InputError:
                continue  # a README, say
            found.append(path)
    if len(found) < 2:
        raise InputError(f"{folder}: expected at least two pictures, found {len(found)}")
    if len({path.stem for path in found}) < len(found):
        raise InputError(f"{folder}: two pictures have the same name but for their endings")
    return found


def crop_with_alpha(photo: Photo) -> Tensor:
    """The square crop of a cut-out that a model of the photo frame sees: straight colour and alpha [S, S, 4]."""
    crop = crop_of(photo, SIZE)
    return torch.cat([straight(crop), crop[3][..., None]], -1)


def generated(
    folder: Path, model: str, kept: Path, seed: int, device: str, background_removal: str
) -> list[Recognisable]:
    """An asset for every photo. They are kept in ``kept``, and taken from there where they were made before by the
    same model with the same seed; InputError where those in it are of another run.
    """
    paths = photos_in(folder)
    check_run(kept, {"model": model, "seed": seed, "background_removal": background_removal})
    made = None
    items = []
    for path in tqdm(paths, desc="assets", unit="photo", disable=None):
        asset, record = kept / f"{path.stem}.ply", kept / f"{path.stem}.json"
        if not record.is_file():
            made = made or ImageTo3D.from_pretrained(model, device=device)
            result = made(open_photo(path), seed=seed, background_removal=background_removal)
            result.save(asset)
            camera = {} if result.camera is None else {"camera": camera_entry(result.camera)}
            record.write_text(
                json.dumps({**camera, "method": result.photos[0].method}) + "\n", encoding="utf-8"
            )
        items.append(item_of(path, asset, record, background_removal))
    return items


def check_run(kept: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of a run in its folder."""
    kept.mkdir(parents=True, exist_ok=True)
    note = kept / "settings.txt"
    text = json.dumps(dict(settings), sort_keys=True)
    before = note.read_text(encoding="utf-8") if note.is_file() else text
    if before != text:
        raise InputError(f"{kept}: holds assets of another run ({before}); name another --out")
    note.write_text(text, encoding="utf-8")


def collected(folder: Path, assets: Path, background_removal: str) -> list[Recognisable]:
    """Assets that ``diff2to3 generate`` has written for the photos. InputError where one is missing."""
    items = []
    for path in photos_in(folder):
        place = assets / path.stem
        found = [p for p in files_of(place) if p.is_file()]
        if not found:
            raise InputError(
                f"{place}: no asset of {path.name}: expected {path.stem}.ply or another format in it"
            )
        items.append(item_of(path, found[0], place / "metadata.json", background_removal))
    return items


def files_of(place: Path) -> Iterator[Path]:
    for entry in formats.FORMATS.values():
        yield place / f"{place.name}{entry.ending}"


def item_of(path: Path, asset: Path, record: Path, background_removal: str) -> Recognisable:
    image = made_solid(cut_out(open_photo(path), background_removal).image)
    crop = crop_with_alpha(Photo(torch.empty(0), cut_out=image))
    gaussians, _ = formats.read(asset)
    camera = None
    if record.is_file() and "camera" in json.loads(record.read_text(encoding="utf-8")):
        camera = read_camera(record)
    return Recognisable(path.stem, crop, gaussians, camera)


def recognition_table(found: Mapping[str, Any]) -> str:
    """Markdown: the summary, and each photo's own row."""
    lines = [
        f"# Recognition: {found['model']}, {found['photos']} photos",
        "",
        "| score | mean | median | 95 % interval of the mean |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, held in found["summary"].items():
        lines.append(
            f"| {name} | {held['mean']:.3f} | {held['median']:.3f} | {held['low']:.3f} to {held['high']:.3f} |"
        )
    names = list(found["summary"])
    lines += ["", f"| photo | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for photo, row in found["assets"].items():
        numbers = ("-" if row[name] is None else f"{row[name]:.3f}" for name in names)
        lines.append(f"| {photo} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"
