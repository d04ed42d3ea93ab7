"""The baseline that a generator has to beat: the training asset whose conditioning view looks most like the photo.

Descriptor of a picture: the object cropped to its box exactly as the generator's condition is
(diff2to3.flow.framing), SIDE pixels a side, colour premultiplied, with alpha as a fourth channel. Distance: that of
the pixels, alpha counting ALPHA_WEIGHT times. The nearest view of any training asset wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diff2to3.assets import AssetRecord, load_asset
from diff2to3.errors import InputError
from diff2to3.evaluation.parallel import run_items
from diff2to3.evaluation.protocol import Protocol
from diff2to3.files import write_atomic
from diff2to3.flow.framing import Framing, frame
from diff2to3.views import generator_for, make_renderer, sample_cameras

#: Pixels a side of a descriptor, weight of alpha's difference, and pixels a side of the training views.
SIDE, ALPHA_WEIGHT, VIEW_SIZE = 16, 1.0, 64
#: Conditioning views of a training asset that are looked at.
NUM_VIEWS = 12


@dataclass(frozen=True)
class IndexSetup:
    """What all training assets are seen with. Picklable."""

    rules: Protocol
    num_views: int = NUM_VIEWS


def describe(images: Tensor, alphas: Tensor) -> Tensor:
    """Views [V, H, W, 3] with straight alpha [V, H, W] → descriptors [V, 4, SIDE, SIDE]."""
    framing = Framing(size=SIDE, background=0.0)
    found = []
    for image, alpha in zip(images, alphas, strict=True):
        coverage = frame(torch.ones_like(image), alpha, framing)[:1]
        found.append(torch.cat([frame(image, alpha, framing), ALPHA_WEIGHT * coverage]))
    return torch.stack(found)


def describe_asset(setup: IndexSetup, item: tuple[AssetRecord, str]) -> dict[str, Any]:
    """Write the descriptors of one training asset's views to the file ``item[1]``. For ``run_items``."""
    record, path = item
    rules = setup.rules
    config = rules.photo.__class__(**{**vars(rules.photo), "num_views": setup.num_views})
    generator = generator_for(rules.seed, "training photos", record.id)
    viewmats, Ks = sample_cameras(config, VIEW_SIZE, VIEW_SIZE, generator)
    views = make_renderer(load_asset(record), rules.render).render(viewmats, Ks, VIEW_SIZE, VIEW_SIZE)
    found = describe(views.images, views.alphas)
    write_atomic(Path(path), save({"descriptors": (found * 255).round().to(torch.uint8)}))
    return {}


@dataclass(frozen=True)
class Index:
    """All training views: descriptors uint8 [A, V, 4, SIDE, SIDE] of assets ``ids``."""

    ids: tuple[str, ...]
    descriptors: Tensor

    def nearest(self, image: Tensor, alpha: Tensor, exclude: str = "") -> str:
        """The asset with the view nearest to a picture [H, W, 3] with alpha [H, W]."""
        query = describe(image[None], alpha[None]).flatten()
        best = torch.full((len(self.ids),), torch.inf)
        for start in range(0, len(self.ids), 256):
            held = self.descriptors[start : start + 256].float().flatten(2) / 255
            best[start : start + 256] = (held - query).square().mean(-1).amin(1)
        if exclude in self.ids:
            best[self.ids.index(exclude)] = torch.inf
        return self.ids[int(best.argmin())]


def build_index(
    folder: Path, setup: IndexSetup, records: Sequence[AssetRecord], workers: int
) -> tuple[Path, list[str]]:
    """The file of the index of ``records`` under ``folder``, and what could not be read. Made once; continued if it was
    interrupted.
    """
    digest = setup.rules.digest()[:16]
    path = folder / f"index-{fingerprint(records)[:16]}-{digest}-{setup.num_views}.safetensors"
    if path.is_file():
        return path, []
    parts = folder / f"views-{digest}-{setup.num_views}"
    parts.mkdir(parents=True, exist_ok=True)
    files = {record.id: parts / f"{fingerprint([record])[:32]}.safetensors" for record in records}
    items = [(r.id, (r, str(files[r.id]))) for r in records if not files[r.id].is_file()]
    outcomes = run_items(None, describe_asset, setup, items, workers=workers, label="training views")
    failed = [f"{name}: {row['error']}" for name, row in outcomes.items() if "error" in row]
    known = [record.id for record in records if files[record.id].is_file()]
    if not known:
        raise InputError("--train-assets: no asset could be read")
    tensors = {name: load_file(files[name])["descriptors"] for name in known}
    stacked = torch.stack([tensors[name] for name in known])
    names = torch.frombuffer(bytearray("\n".join(known).encode()), dtype=torch.uint8)
    write_atomic(path, save({"descriptors": stacked, "ids": names}))
    return path, failed


@lru_cache(maxsize=1)
def load_index(path: str) -> Index:
    """An index file, once a process."""
    held = load_file(path)
    ids = bytes(held["ids"].tolist()).decode().split("\n")
    return Index(tuple(ids), held["descriptors"])


def fingerprint(records: Sequence[AssetRecord]) -> str:
    """A hash of ids and content."""
    from diff2to3.evaluation.assets import AssetList

    return AssetList(list(records), []).fingerprint()
