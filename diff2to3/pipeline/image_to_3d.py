"""From photos (or texts) to 3D Gaussians, in two flow-matching stages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.flow.denoise import (
    MULTI_IMAGE_MODES,
    Progress,
    StageSettings,
    check_one_step,
)
from diff2to3.hub import Source
from diff2to3.pipeline.object_frame import ObjectStages
from diff2to3.pipeline.parts import Parts, PhotoParts
from diff2to3.pipeline.photo_files import open_photo
from diff2to3.pipeline.photo_frame import PhotoStages
from diff2to3.pipeline.photos import Photo, as_it_is, frame_cut_out, frame_like_trellis, prepare
from diff2to3.pipeline.prune import without_hidden
from diff2to3.pipeline.result import Result
from diff2to3.pipeline.share import Shareable
from diff2to3.pipeline.stages import Stages

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
        self.stages: Stages = PhotoStages(parts) if isinstance(parts, PhotoParts) else ObjectStages(parts)
        self.networks: Any = parts.networks
        self.kind, self.framing, self.trellis = parts.kind, parts.framing, parts.trellis
        self.structure_settings, self.latent_settings = parts.structure_settings, parts.latent_settings
        self.refine_steps, self.notes = parts.refine, parts.notes
        self.device, self.low_memory, self.offline = parts.device, parts.low_memory, parts.offline
        for network in self.stages.all_networks():
            network.eval().requires_grad_(False)
        self.to(self.device)

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
        networks: list[Any] = self.stages.all_networks()
        if dtype is not None:
            for network in networks:
                if hasattr(network, "cast_torso"):
                    network.cast_torso(dtype)
        if device is not None:
            self.device = self.stages.device = torch.device(device)
            if not self.low_memory:
                for network in networks:
                    network.to(self.device)
        return self

    @property
    def frame(self) -> str:
        """What results stand in; see :class:`Result`."""
        return self.stages.frame

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
            seed: of the noise, sampled on the CPU in float32, so that it is the same for any device.
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
        if refine and self.frame != "photo":
            raise InputError("refine: this model does not say where the photo was taken from; give 0")
        steps = self.refine_steps if refine is None else refine
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        clock = Clock()
        with torch.inference_mode():
            photos = [self.photos(prompt, prepare, background_removal) for prompt in prompts]
            clock.lap("photos")
            seen = self.stages.see(prompts, photos, multi_image)
            clock.lap("condition")
            coords = self.stages.occupancy(seen, first, generators, progress)
            clock.lap("structure")
            latents = self.stages.latents(coords, seen, second, generators, progress)
            clock.lap("latents")
            gaussians = self.stages.decode(latents)
            if second.prune:
                gaussians = [without_hidden(g, second.prune) for g in gaussians]
            clock.lap("decode")
        # clones are ordinary tensors: what inference mode made cannot take part in autograd
        gaussians = [clone(g) for g in gaussians]
        cameras = self.stages.cameras(seen)
        if steps:
            gaussians, cameras = self.stages.refined(gaussians, seen, steps)
            clock.lap("refine")
        active = coords[:, 1:].split(torch.bincount(coords[:, 0], minlength=len(seeds)).tolist())
        made = zip(gaussians, latents.unbind(), active, seeds, photos, cameras, strict=True)
        return [
            Result(g, clone(z), c.clone(), seed, dict(clock.seconds), p, self.frame, camera)
            for g, z, c, seed, p, camera in made
        ]

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
