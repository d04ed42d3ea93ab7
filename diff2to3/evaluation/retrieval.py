"""Baselines that a generator has to beat, as sources: the training asset whose conditioning view looks most like the
photo, and random training assets.

Descriptor of a picture: the object cropped to its box as the generator's condition is (diff2to3.flow.framing), through
the package's image encoder, its latents pooled to POOLED x POOLED cells and normalised. The greatest cosine over all
views of all training assets wins. On the mini data set, with 4 views a training asset, the voxels so found have an IoU
of 0.278 with the photographed asset's (mean over the 117 of val; 0.057 at random; 0.224 by the crops' pixels).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from diff2to3.assets import AssetRecord, FileSource, load_asset
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import AssetList
from diff2to3.evaluation.parallel import run_items
from diff2to3.evaluation.protocol import Cameras, PhotoProtocol, Protocol
from diff2to3.evaluation.shapes import shape_of_mesh
from diff2to3.evaluation.subjects import Pictures, Source, Subject, Words
from diff2to3.files import write_atomic
from diff2to3.flow.framing import Framing, frame_views
from diff2to3.tensors import read_tensors
from diff2to3.views import generator_for, make_renderer, sample_cameras
from diff2to3.voxels.providers import FeatureProvider, build_provider

#: Pixels a side of the views that are compared and of their crops, and cells a side of a descriptor.
VIEW_SIZE, CROP_SIZE, POOLED = 128, 96, 4
#: Counts changes of the descriptor, so that an older index is not taken for a new one.
VERSION = 2
#: Conditioning views of a training asset that are looked at.
NUM_VIEWS = 12


@dataclass(frozen=True)
class IndexSetup:
    """What all training assets are seen with. Picklable."""

    rules: Protocol
    num_views: int = NUM_VIEWS


def describe(images: Tensor, alphas: Tensor) -> Tensor:
    """Views [V, H, W, 3] with straight alpha [V, H, W] → unit vectors [V, C]. Larger views are first made as small as
    those of the index, so that the same detail is left.
    """
    if images.shape[1] > VIEW_SIZE:
        premultiplied = torch.cat([images * alphas[..., None], alphas[..., None]], -1).permute(0, 3, 1, 2)
        small = F.interpolate(premultiplied, (VIEW_SIZE, VIEW_SIZE), mode="bilinear", antialias=True)
        alphas = small[:, 3]
        images = (small[:, :3] / alphas[:, None].clamp(min=1e-6)).clamp(0, 1).permute(0, 2, 3, 1)
    framed = frame_views(images, alphas, Framing(size=CROP_SIZE))
    found = encoder().encode(framed.permute(0, 2, 3, 1)).float()
    return F.normalize(F.adaptive_avg_pool2d(found, POOLED).flatten(1), dim=1)


@lru_cache(maxsize=1)
def encoder() -> FeatureProvider:
    """The package's own image encoder."""
    return build_provider("mini", dtype=torch.float32)


def describe_asset(setup: IndexSetup, item: tuple[AssetRecord, str]) -> dict[str, Any]:
    """Write the descriptors of one training asset's views to the file ``item[1]``. For ``run_items``."""
    record, path = item
    rules = setup.rules
    config = replace(rules.photo, num_views=setup.num_views)
    generator = generator_for(rules.seed, "training photos", record.id)
    viewmats, Ks = sample_cameras(config, VIEW_SIZE, VIEW_SIZE, generator)
    views = make_renderer(load_asset(record), rules.render).render(viewmats, Ks, VIEW_SIZE, VIEW_SIZE)
    found = describe(views.images, views.alphas)
    write_atomic(Path(path), save({"descriptors": found.half()}))
    return {}


@dataclass(frozen=True)
class Index:
    """All training views: descriptors float16 [A, V, C] of assets ``ids``."""

    ids: tuple[str, ...]
    descriptors: Tensor

    def nearest(self, image: Tensor, alpha: Tensor, exclude: str = "") -> str:
        """The asset with the view nearest to a picture [H, W, 3] with alpha [H, W]."""
        (query,) = describe(image[None], alpha[None])
        best = (self.descriptors.float() @ query).amax(1)
        if exclude in self.ids:
            best[self.ids.index(exclude)] = -torch.inf
        return self.ids[int(best.argmax())]


def build_index(
    folder: Path, setup: IndexSetup, records: Sequence[AssetRecord], workers: int
) -> tuple[Path, list[str]]:
    """The file of the index of ``records`` under ``folder``, and what could not be read. Made once; continued if it was
    interrupted.
    """
    digest = f"{setup.rules.digest()[:16]}-{VERSION}"
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
    tensors = {name: read_tensors(files[name])["descriptors"] for name in known}
    stacked = torch.stack([tensors[name] for name in known])
    names = torch.frombuffer(bytearray("\n".join(known).encode()), dtype=torch.uint8)
    write_atomic(path, save({"descriptors": stacked, "ids": names}))
    return path, failed


@lru_cache(maxsize=1)
def load_index(path: str) -> Index:
    """An index file, once a process."""
    held = read_tensors(Path(path))
    ids = bytes(held["ids"].tolist()).decode().split("\n")
    return Index(tuple(ids), held["descriptors"])


def fingerprint(records: Sequence[AssetRecord]) -> str:
    """A hash of ids and content."""
    return AssetList(list(records), []).fingerprint()


# ---- sources ----


@dataclass(frozen=True)
class Library(Words):
    """Training assets, as they are compared: pictures from the protocol's cameras, which are the same for all assets,
    and shapes. The last 80 are kept.

    path  of the file that :func:`write_library` wrote
    """

    path: str
    rules: PhotoProtocol

    @cached_property
    def records(self) -> dict[str, AssetRecord]:
        rows = [json.loads(line) for line in Path(self.path).read_text("utf-8").splitlines()]
        return {r["id"]: AssetRecord(r["id"], FileSource(*r["source"]), sha256=r["sha256"]) for r in rows}

    @cached_property
    def _kept(self) -> Callable[[str], Pictures]:
        return lru_cache(maxsize=80)(self._show)

    def show(self, name: str) -> Pictures:
        """A training asset; InputError where its file cannot be read."""
        kept = self._kept(name)
        return replace(kept, images=kept.images.float() / 255)

    def _show(self, name: str) -> Pictures:
        """With images as bytes, so that many can be kept."""
        rules, mesh = self.rules, load_asset(self.records[name])
        cameras = rules.views_of(name)
        size = cameras.resolution
        views = make_renderer(mesh, rules.render).render(cameras.viewmats, cameras.Ks, size, size)
        images = views.composite(views.images.new_tensor(rules.background))
        return Pictures((images * 255).round().to(torch.uint8), shape=shape_of_mesh(rules, mesh, name))


@dataclass(frozen=True)
class Retrieval(Source):
    """The training asset with the view that is nearest to the photo, shown as it is."""

    library: Library
    index: str

    @property
    def name(self) -> str:
        return "retrieval"

    def fingerprint(self) -> str:
        return hashlib.sha256(Path(self.index).name.encode()).hexdigest()

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        if photo:
            raise InputError(f"{self.name}: is not seen from the photo's camera")
        colors, alpha = subject.straight_photo()
        nearest = load_index(self.index).nearest(colors.cpu(), alpha.cpu(), subject.id)
        return replace(self.library.show(nearest), remarks={"retrieved": nearest})


@dataclass(frozen=True)
class RandomAssets(Source):
    """``count`` assets of ``pool``, another choice for every subject. Shown is the first; numbers are means over all,
    from two of the cameras: two views of each of ten say as much of their mean as all would, in a quarter of the time.
    """

    library: Library
    pool: tuple[str, ...]
    count: int = 10

    @property
    def name(self) -> str:
        return "random"

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join([str(self.count), *self.pool]).encode()).hexdigest()

    def chosen(self, subject: Subject) -> list[str]:
        """Their ids."""
        others = [name for name in self.pool if name != subject.id]
        generator = generator_for(subject.rules.seed, "random assets", subject.id)
        rows = generator.choice(len(others), min(self.count, len(others)), replace=False)
        return [others[int(i)] for i in sorted(rows)]

    def pictures(self, subject: Subject, cameras: Cameras, photo: bool = False) -> Pictures:
        if photo:
            raise InputError(f"{self.name}: is not seen from the photo's camera")
        chosen = self.chosen(subject)
        few = tuple(sorted({0, len(cameras.viewmats) // 2}))
        draws = tuple(self.library.show(name).only(few) for name in chosen)
        return replace(self.library.show(chosen[0]), draws=draws, remarks={"drawn": chosen})


def write_library(folder: Path, train: AssetList) -> Path:
    """The records of training assets for :class:`Library`, in a file that is named by its content."""
    rows = [
        {"id": r.id, "source": [r.source.container, r.source.member], "sha256": r.sha256}
        for r in train.records
        if r.source is not None
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"records-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    write_atomic(path, text)
    return path
