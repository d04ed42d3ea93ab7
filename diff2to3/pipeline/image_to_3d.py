"""From photos (or texts) to 3D Gaussians, in two flow-matching stages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow.denoise import (
    MULTI_IMAGE_MODES,
    Conditions,
    Progress,
    StageSettings,
    check_one_step,
    sample,
    sample_structure,
    share_of,
    velocities,
)
from diff2to3.flow.framing import Framing
from diff2to3.hub import Source
from diff2to3.pipeline.parts import Parts, PhotoParts, some_voxels, visiting
from diff2to3.pipeline.photo_files import open_photo
from diff2to3.pipeline.photo_frame import BACKGROUND, MARGIN, SIZE, PhotoStages, fitted
from diff2to3.pipeline.photos import Photo, as_it_is, frame_cut_out, frame_like_trellis, prepare
from diff2to3.pipeline.prune import without_hidden
from diff2to3.pipeline.result import Result
from diff2to3.pipeline.share import Shareable
from diff2to3.types import SparseVoxels

if TYPE_CHECKING:
    from typing_extensions import Self

#: One photo: an image, the path of one (a str, too), or one that is ready for the model.
OnePhoto = Image.Image | Photo | str | Path
#: A photo, several photos of one object, or a text for models that take text.
Prompt = OnePhoto | Sequence[OnePhoto]


class ImageTo3D(Shareable):
    """A loaded model. ``ImageTo3D.from_pretrained("mini-photo")(image, seed=1)`` gives a :class:`Result`.

    ``parts``: see :class:`Parts`, whose fields are attributes here; or :class:`PhotoParts`, for a model of the photo
    frame.
    """

    def __init__(self, parts: Parts | PhotoParts) -> None:
        self.photo_stages: PhotoStages | None = None
        self.refine_steps = 0
        if isinstance(parts, PhotoParts):
            self.networks: Any = parts.networks
            self.photo_stages, self.refine_steps = PhotoStages(parts), parts.refine
            self.kind, self.trellis, self.framing = "image", False, Framing(SIZE, MARGIN, BACKGROUND)
            self.structure_settings, self.latent_settings = parts.structure_settings, parts.latent_settings
            self.device, self.low_memory, self.offline = parts.device, parts.low_memory, parts.offline
            self.notes: tuple[str, ...] = ()
            return
        self.networks, self.conditioner, self.kind = parts.networks, parts.conditioner, parts.kind
        self.structure_normalization = parts.structure_normalization
        self.latent_normalization = parts.latent_normalization
        self.image_normalization = parts.image_normalization
        self.structure_settings, self.latent_settings = parts.structure_settings, parts.latent_settings
        self.framing = parts.framing
        self.trellis, self.offline = parts.trellis, parts.offline
        self.low_memory, self.notes = parts.low_memory, parts.notes
        self.device = parts.device
        for network in (*vars(parts.networks).values(), parts.conditioner):
            network.eval().requires_grad_(False)
            if not self.low_memory:
                network.to(self.device)

    @classmethod
    def from_pretrained(cls, source: str = "mini-photo", **options: Any) -> Self:
        """Load an embedded model, a bundle of ours, or a TRELLIS folder or repository; see
        :func:`diff2to3.pipeline.load.load_parts`.
        """
        from diff2to3.pipeline.load import load_parts

        model = cls(load_parts(source, **options))
        model.source = Source(source, bool(options.get("offline", False)))
        return model

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device, and the torsos of its networks to a dtype; returns the model."""
        if dtype is not None:
            for network in self.all_networks():
                if hasattr(network, "cast_torso"):
                    network.cast_torso(dtype)
        if device is not None:
            self.device = torch.device(device)
            if self.photo_stages is not None:
                self.photo_stages.device = self.device
            if not self.low_memory:
                for network in self.all_networks():
                    network.to(self.device)
        return self

    def all_networks(self) -> list[Any]:
        """Every network of the model, those that encode conditions as well."""
        return [*vars(self.networks).values(), *(() if self.photo_stages else (self.conditioner,))]

    @property
    def frame(self) -> str:
        """What results stand in; see :class:`Result`."""
        return "object" if self.photo_stages is None else "photo"

    def __call__(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        structure: StageSettings | None = None,
        latent: StageSettings | None = None,
        multi_image: str = MULTI_IMAGE_MODES[0],
        prepare: bool = True,
        background_removal: str = "auto",
        progress: Progress | None = None,
        refine: int | None = None,
    ) -> Result:
        """Generate one object.

        Args:
            prompt: a photo or its path, several photos of one object, or a text for models that take text.
            seed: of the noise, drawn on the CPU in float32, so that it is the same for any device.
            structure, latent: how to sample each stage; as the model says unless given. A stage that the model makes
                in one step can be made in no other way.
            multi_image: one of :data:`MULTI_IMAGE_MODES`.
            prepare: cut out, centre and resize the photos; False if they already are.
            background_removal: one of :data:`diff2to3.pipeline.cutout.METHODS`.
            refine: steps that fit the result to its photo, for models of the photo frame; 0 for none, None for the
                model's own number.

        Raises:
            InputError: a prompt of the wrong kind, no object in a photo, or no voxel generated.
        """
        options: Mapping[str, Any] = {
            "structure": structure, "latent": latent, "multi_image": multi_image, "prepare": prepare,
            "background_removal": background_removal, "progress": progress, "refine": refine,
        }  # fmt: skip
        return self.batch([prompt], [seed], **options)[0]

    def batch(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        structure: StageSettings | None = None,
        latent: StageSettings | None = None,
        multi_image: str = MULTI_IMAGE_MODES[0],
        prepare: bool = True,
        background_removal: str = "auto",
        progress: Progress | None = None,
        refine: int | None = None,
    ) -> list[Result]:
        """Generate several objects at once, packed; each is what it would be alone (to rounding).

        Args:
            prompts: as of :meth:`__call__`, each with the same number of photos.
            seeds: one each.

        Raises:
            InputError: as :meth:`__call__`.
        """
        if multi_image not in MULTI_IMAGE_MODES:
            raise InputError(
                f"multi_image: expected one of {', '.join(MULTI_IMAGE_MODES)}, got {multi_image!r}"
            )
        if len(prompts) != len(seeds) or not prompts:
            raise InputError(f"seeds: expected {len(prompts)}, one a prompt, got {len(seeds)}")
        first, second = structure or self.structure_settings, latent or self.latent_settings
        check_one_step(self.structure_settings, first, "structure")
        check_one_step(self.latent_settings, second, "latent")
        if self.photo_stages is not None:
            steps = self.refine_steps if refine is None else refine
            ready = [self.photos(prompt, prepare, background_removal) for prompt in prompts]
            return [
                self.in_photo_frame(own, seed, first, second, steps, share_of(progress, number, len(seeds)))
                for number, (own, seed) in enumerate(zip(ready, seeds, strict=True))
            ]
        if refine:
            raise InputError("refine: this model does not say where the photo was taken from; give 0")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        clock = Clock()
        with torch.inference_mode():
            photos = [self.photos(prompt, prepare, background_removal) for prompt in prompts]
            clock.lap("photos")
            conditions = self.conditions(prompts, photos)
            clock.lap("condition")
            logits = self.structure_logits(
                conditions, first, generators, multi_image, progress, one_by_one=True
            )
            coords = some_voxels(logits, first.threshold)
            clock.lap("structure")
            latents = self.sample_latents(coords, conditions, second, generators, multi_image, progress)
            clock.lap("latents")
            with self.on_device(self.networks.decoder) as decoder:
                gaussians = decoder(latents)
            if second.prune:
                gaussians = [without_hidden(g, second.prune) for g in gaussians]
            clock.lap("decode")
        # clones are ordinary tensors: what inference mode made cannot take part in autograd
        active = coords[:, 1:].split(torch.bincount(coords[:, 0], minlength=len(seeds)).tolist())
        made = zip(gaussians, latents.unbind(), active, seeds, photos, strict=True)
        return [
            Result(clone(g), clone(z), c.clone(), seed, dict(clock.seconds), p) for g, z, c, seed, p in made
        ]

    def in_photo_frame(
        self,
        photos: tuple[Photo, ...],
        seed: int,
        first: StageSettings,
        second: StageSettings,
        steps: int,
        progress: Progress | None,
    ) -> Result:
        """One object, by a model of the photo frame."""
        if len(photos) != 1:
            raise InputError(f"prompt: this model takes one photo of an object, got {len(photos)}")
        stages, (photo,) = self.photo_stages, photos
        assert stages is not None
        generator, clock = torch.Generator().manual_seed(seed), Clock()
        with torch.inference_mode():
            seen = stages.see(photo)
            clock.lap("condition")
            logits = stages.occupancy(seen, first, generator, progress)
            coords = stages.voxels(seen, logits, first.threshold)
            clock.lap("structure")
            latents = stages.latents(coords, seen, second, generator, progress)
            clock.lap("latents")
            gaussians = stages.decode(latents)
            if second.prune:
                gaussians = without_hidden(gaussians, second.prune)
            clock.lap("decode")
        gaussians, camera = clone(gaussians), seen.camera
        if steps:
            fit = fitted(gaussians, photo, camera, steps)
            gaussians, camera = fit.gaussians, fit.camera
            clock.lap("refine")
        coords = coords[:, 1:].clone()
        return Result(gaussians, clone(latents), coords, seed, clock.seconds, photos, "photo", camera)

    # ---- conditions ----

    def photo(self, image: Image.Image, background_removal: str = "auto") -> Photo:
        """A photo made ready: the object cut out, and framed as this model was trained. InputError if there is none."""
        framer = partial(frame_cut_out, framing=self.framing)
        if self.trellis:
            framer = partial(frame_like_trellis, size=self.framing.size)
        return prepare(image, framer, background_removal, offline=self.offline)

    def photos(self, prompt: Prompt, prepare: bool, background_removal: str) -> tuple[Photo, ...]:
        """The photos of one object, made ready; none for a text."""
        if self.kind == "text":
            if not isinstance(prompt, str):
                raise InputError("prompt: this model takes text, not images")
            return ()
        if isinstance(prompt, str) and not Path(prompt).is_file():
            raise InputError(f"prompt: this model takes images, not text; {prompt}: no such file")
        one = isinstance(prompt, Image.Image | Photo | str | Path)
        given: list[Any] = [prompt] if one else list(prompt)  # type: ignore[arg-type]
        given = [open_photo(item) if isinstance(item, str | Path) else item for item in given]
        if not given:
            raise InputError("prompt: expected at least one image")
        size, background = self.framing.size, self.framing.background
        ready = []
        for image in given:
            if isinstance(image, Photo):
                ready.append(image)
            elif prepare:
                ready.append(self.photo(image, background_removal))
            else:
                ready.append(Photo(as_it_is(image, size, background), cut_out=image.convert("RGBA")))
        return tuple(ready)

    def conditions(self, prompts: Sequence[Prompt], photos: Sequence[tuple[Photo, ...]]) -> Conditions:
        """Encode the prompts, each with the same number of photos, one after another: in a batch sums are rounded
        otherwise. The absence of a text is the empty text; of an image, zeros or nothing.
        """
        counts = {len(own) for own in photos}
        if len(counts) != 1:
            raise InputError(f"prompts: expected the same number of photos for each, got {sorted(counts)}")
        with self.on_device(self.conditioner) as conditioner:
            if self.kind == "text":
                tokens = torch.cat([conditioner([text]) for text in (*prompts, "")]).to(self.device)
                return Conditions((tokens[:-1],), tokens[-1:].expand(len(prompts), -1, -1))
            present = [
                torch.cat([conditioner(photo.picture[None].to(self.device)) for photo in same_place])
                for same_place in zip(*photos, strict=True)
            ]
        present = [latents.to(self.device) for latents in present]
        if self.image_normalization is not None:
            present = [self.image_normalization(latents) for latents in present]
        if present[0].ndim == 4:
            return Conditions(tuple(present))
        # Attention to equal tokens returns their value whatever their number, so one zero token stands for
        # all.
        return Conditions(tuple(present), torch.zeros_like(present[0][:, :1]))

    # ---- stages ----

    def structure_logits(
        self,
        conditions: Conditions,
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        multi_image: str = MULTI_IMAGE_MODES[0],
        progress: Progress | None = None,
        one_by_one: bool = False,
    ) -> Tensor:
        """Stage 1: logits [B, 1, R, R, R] of active voxels, from noise that each item's generator gives.

        ``one_by_one``: an item at a time: in a batch sums
        are rounded otherwise, a logit beside the threshold changes sides, and the object is not the one it is alone.
        """
        with self.on_device(self.networks.structure_flow) as flow:
            made = sample_structure(
                flow,
                conditions,
                settings,
                generators,
                self.device,
                multi_image,
                progress,
                one_by_one,
            )
        if self.structure_normalization is not None:
            made = [self.structure_normalization.invert(z) for z in made]
        with self.on_device(self.networks.structure_decoder) as decoder:
            return torch.cat([decoder(z) for z in made])

    def sample_latents(
        self,
        coords: Tensor,
        conditions: Conditions,
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        multi_image: str = MULTI_IMAGE_MODES[0],
        progress: Progress | None = None,
    ) -> SparseVoxels:
        """Stage 2: latents on these voxels, as the decoder takes them."""
        with self.on_device(self.networks.latent_flow) as flow:
            c = flow.config
            counts = torch.bincount(coords[:, 0], minlength=len(generators)).tolist()
            parts = [
                torch.randn(n, c.in_channels, generator=g) for n, g in zip(counts, generators, strict=True)
            ]
            noise = torch.cat(parts).to(self.device)
            voxels = SparseVoxels.from_coords(coords, noise, c.resolution, len(generators))
            z = sample(
                velocities(flow, voxels), noise, conditions, settings, multi_image, "latents", progress
            )
        if self.latent_normalization is not None:
            z = self.latent_normalization.invert(z)
        return voxels.with_feats(z)

    def on_device(self, network: nn.Module) -> AbstractContextManager[Any]:
        """The network, on the device; with ``low_memory`` it goes back to the CPU afterwards."""
        return visiting(network, self.device, self.low_memory)


def clone(container: Any) -> Any:
    """A copy of a container of tensors."""
    return replace(container, **{k: v.clone() for k, v in vars(container).items() if isinstance(v, Tensor)})


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
