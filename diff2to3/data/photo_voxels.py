"""What the 2to3-VAE and stage 2 are trained on in the photo frame: an asset's features and latents on the voxels of its
photographs' frames.

    photovoxels_<name>   photographs, views -> NNN.safetensors: coords uint8 [N, 3], feats float16 [N, C],
                         transform float64 [4, 4] (object frame -> photo frame)
    photolatents_<name>  photovoxels, photographs, maps -> NNN.safetensors: coords, mean float16 [N, C] of the latents,
                         image float16 [C', h, w] (the photo through the bundle's image_encoder), elevation, focal [1],
                         and the maps' fine, coarse, rgba

NNN is the photograph's number in its own stage. The features are lifted from the asset's views, moved to the frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from diff2to3.checkpoint import IMAGE_ENCODER, MODEL_FILE, read_bundle
from diff2to3.config import config_to_dict
from diff2to3.data.encodings import BundleStage, moments, pack
from diff2to3.data.pictures import decode_image
from diff2to3.data.shards import Part
from diff2to3.errors import InputError
from diff2to3.files import file_sha256
from diff2to3.types import SparseVoxels, Views
from diff2to3.voxels.providers import SURFACE

if TYPE_CHECKING:
    from diff2to3.data.plan import PlannedAsset
    from diff2to3.data.schema import DataConfig
    from diff2to3.data.store import StoredAsset

#: Photographs of which fewer voxels are left inside the cube are not taken.
LEAST_VOXELS = 30


class PhotoVoxelStage:
    """The feature sets of an asset on the voxels of some of its photographs."""

    def __init__(self, config: DataConfig, item: str) -> None:
        self.config, self.name, self.chosen = config, f"photovoxels_{item}", config.photovoxels[item]
        where = f"photovoxels.{item}"
        if self.chosen.photographs not in config.photographs:
            raise InputError(f"{where}.photographs: no set {self.chosen.photographs!r}")
        unknown = [name for name in self.chosen.features if name not in config.features]
        if unknown or not self.chosen.features:
            raise InputError(f"{where}.features: expected names of feature sets, got {self.chosen.features}")
        self.sets = [config.features[name] for name in self.chosen.features]
        views = {chosen.views for chosen in self.sets}
        if len(views) != 1:
            raise InputError(f"{where}.features: expected sets of the same views, got {sorted(views)}")
        self.resolution = config.photographs[self.chosen.photographs].resolution
        self.inputs: tuple[str, ...] = (f"photographs_{self.chosen.photographs}", f"views_{views.pop()}")
        self.providers: list[Any] = []

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.photovoxels)

    def settings(self) -> dict[str, Any]:
        from diff2to3.voxels.providers import weights_fingerprint

        sets = []
        for name, chosen in zip(self.chosen.features, self.sets, strict=True):
            plain = config_to_dict(chosen)
            weights = weights_fingerprint(self.config.weights_of(name), chosen.provider)
            kept = ("provider", "dtype", "stride", "views", "modes", "depth_tolerance", "background")
            sets.append(
                {**{key: plain[key] for key in kept}, "weights": weights, "resolution": self.resolution}
            )
        return {"version": 1, **config_to_dict(self.chosen), "features": sets}

    def setup(self, slot: int) -> None:
        from diff2to3.voxels.providers import build_provider

        self.providers = [
            None
            if chosen.provider == SURFACE
            else build_provider(
                chosen.provider,
                self.config.weights_of(name),
                device="cpu",
                dtype=getattr(torch, chosen.dtype),
                offline=chosen.offline,
                stride=chosen.stride,
            )
            for name, chosen in zip(self.chosen.features, self.sets, strict=True)
        ]

    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        photographs, stored_views = (inputs[name] for name in self.inputs)
        with clock("read"):
            views = stored_views.views(depths=True)
        members: dict[str, bytes] = {}
        counts: list[int] = []
        for number in range(int(photographs.info["num_views"])):
            if len(counts) == self.chosen.num_photographs:
                break
            if photographs.info["lost"][number] > self.chosen.most_lost:
                continue
            photo = photographs.tensors(f"{number:03d}.safetensors")
            coords = occupied(photo["occupancy"])
            if len(coords) < LEAST_VOXELS:
                continue
            with clock("lift"):
                feats = self.lifted(views, coords, photo["transform"])
            if not bool(torch.isfinite(feats).all()):
                raise InputError("features are not finite")
            tensors = {
                "coords": coords.to(torch.uint8).contiguous(),
                "feats": feats.half().contiguous(),
                "transform": photo["transform"],
            }
            members[f"{number:03d}.safetensors"] = save_tensors(tensors)
            counts.append(len(coords))
        if not counts:
            raise InputError("no photograph of which enough lies inside the cube")
        return Part(
            members, {"num_voxels": counts, "channels": int(feats.shape[1]), "resolution": self.resolution}
        )

    def lifted(self, views: Views, coords: Tensor, transform: Tensor) -> Tensor:
        """The feature sets side by side [N, C], in the frame that ``transform`` leads to."""
        from diff2to3.views.photo_frame import moved_viewmats
        from diff2to3.voxels.lift import lift_features

        assert views.depths is not None
        viewmats, scale = moved_viewmats(views.viewmats, transform.numpy())
        moved = Views(views.images, views.alphas, viewmats, views.Ks, views.depths * scale)
        parts = []
        for chosen, provider in zip(self.sets, self.providers, strict=True):
            (found,) = lift_features(
                moved,
                coords,
                self.resolution,
                provider,
                chosen.modes[:1],
                depth_tolerance=chosen.depth_tolerance,
                background=chosen.background,
                view_chunk=chosen.view_chunk,
            )
            parts.append(found.feats)
        return torch.cat(parts, 1)


class PhotoLatentStage(BundleStage):
    """Latents of the features, and all that stage 2 sees of the photograph."""

    network_name = "encoder"

    def __init__(self, config: DataConfig, item: str) -> None:
        self.name, self.chosen = f"photolatents_{item}", config.photolatents[item]
        super().__init__(self.chosen.bundle)
        where = f"photolatents.{item}"
        for kind in ("photovoxels", "maps"):
            if getattr(self.chosen, kind) not in getattr(config, kind):
                raise InputError(f"{where}.{kind}: no set {getattr(self.chosen, kind)!r}")
        photographs = config.photovoxels[self.chosen.photovoxels].photographs
        if config.maps[self.chosen.maps].photographs != photographs:
            raise InputError(f"{where}.maps: expected maps of the photographs {photographs!r}")
        self.background = config.maps[self.chosen.maps].background
        self.inputs = (
            f"photovoxels_{self.chosen.photovoxels}",
            f"photographs_{photographs}",
            f"maps_{self.chosen.maps}",
        )
        self.image_encoder: Any = None

    @staticmethod
    def items(config: DataConfig) -> list[str]:
        return list(config.photolatents)

    def settings(self) -> dict[str, Any]:
        info = read_bundle(self.folder)
        if IMAGE_ENCODER not in info.networks:
            raise InputError(f"{self.folder / MODEL_FILE}: no network {IMAGE_ENCODER!r}")
        entry = info.networks[IMAGE_ENCODER]
        return {
            "version": 1,
            "photovoxels": self.chosen.photovoxels,
            "maps": self.chosen.maps,
            "background": self.background,
            "encoder": self.fingerprint(),
            "image_encoder": entry.sha256 or file_sha256(self.folder / entry.file),
        }

    def setup(self, slot: int) -> None:
        from diff2to3.networks import ENCODER_TYPES, frozen_network

        super().setup(slot)
        entry = read_bundle(self.folder).networks[IMAGE_ENCODER]
        self.image_encoder = frozen_network(self.folder, IMAGE_ENCODER, entry, ENCODER_TYPES)

    @torch.no_grad()
    def process(self, asset: PlannedAsset, inputs: Mapping[str, StoredAsset], clock: Any) -> Part:
        voxels, photographs, maps = (inputs[name] for name in self.inputs)
        resolution = int(voxels.info["resolution"])
        members: dict[str, bytes] = {}
        rows: dict[str, list[Tensor]] = {"mean": [], "image": [], "fine": [], "coarse": []}
        counts = []
        for name in sorted(voxels.entry.members):
            with clock("read"):
                own, photo, seen = voxels.tensors(name), photographs.tensors(name), maps.tensors(name)
                image, alpha = decode_image(photographs.read(name.replace(".safetensors", ".webp")))
            with clock("encode"):
                coords = torch.nn.functional.pad(own["coords"].to(torch.int32), (1, 0))
                sparse = SparseVoxels.from_coords(coords, own["feats"].float(), resolution, 1)
                mean = self.network(sparse).mean
                composed = image * alpha[..., None] + (1 - alpha[..., None]) * self.background
                latents = self.image_encoder(composed.permute(2, 0, 1)[None])[0]
            tensors = {"mean": mean, "image": latents, "fine": seen["fine"], "coarse": seen["coarse"]}
            for key, value in tensors.items():
                rows[key].append(value.float() if key == "mean" else value.float().flatten(1).T)
            pack(**{key: value.float() for key, value in tensors.items()})  # raises where one is not finite
            stored = {key: value.half().contiguous() for key, value in tensors.items()}
            exact = {"coords": own["coords"], "rgba": seen["rgba"]}
            camera = {key: photo[key] for key in ("elevation", "focal")}
            members[name] = save_tensors({**stored, **exact, **camera})
            counts.append(len(mean))
        noted = {key: moments(torch.cat(parts)) for key, parts in rows.items()}
        return Part(members, {"num_voxels": counts, "resolution": resolution, **noted})


def occupied(packed: Tensor) -> Tensor:
    """An occupancy grid, eight cells a byte [R, R, R / 8] → its cells int32 [N, 3]."""
    grid = np.unpackbits(packed.numpy(), axis=-1)
    return torch.from_numpy(np.argwhere(grid).astype(np.int32))
