"""From a photo (or a text) to 3D Gaussians, in two flow-matching stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow.dit import LatentDiT, StructureDiT
from diff2to3.flow.samplers import Step, Velocity, alternating, averaged, euler, guided, timesteps
from diff2to3.pipeline.photos import prepare_photo, to_tensor
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.sparse_structure import StructureDecoder, active_voxels

#: How several images of one object are combined: a condition a step in turn, or the mean of all velocities.
MULTI_IMAGE_MODES = ("stochastic", "multidiffusion")

#: progress(stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StageSettings:
    """How a stage is sampled. guidance_interval is in t: 1 is noise, 0 is data."""

    num_steps: int = 25
    guidance_scale: float = 6.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"steps: expected at least 1, got {self.num_steps}")
        low, high = self.guidance_interval
        if not (self.shift > 0 and low <= high):
            raise InputError(f"shift must be positive and the guidance interval (low, high), got {self}")


@dataclass(frozen=True)
class Networks:
    """The four networks of generation."""

    structure_flow: StructureDiT
    structure_decoder: StructureDecoder
    latent_flow: LatentDiT
    decoder: Decoder


@dataclass(frozen=True)
class Conditions:
    """Tokens [1, L, C] of each image (or of the text), and of its absence."""

    tokens: tuple[Tensor, ...]
    absent: Tensor


@dataclass(frozen=True)
class Result:
    """One generated object. ``latents`` are as the decoder takes them; ``seconds`` by stage."""

    gaussians: Gaussians
    latents: SparseVoxels
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)


class ImageTo3D:
    """A loaded model. ``ImageTo3D.from_pretrained(folder_or_repository)(image, seed=1)`` gives a
    :class:`Result`.

    kind       what it is conditioned on: "image" or "text"
    conditioner  images [B, 3, H, W] → tokens, or a list of texts → tokens
    notes      what the loader left out, a line each
    low_memory networks wait on the CPU and visit the device in turn
    """

    def __init__(
        self,
        networks: Networks,
        conditioner: nn.Module,
        kind: str,
        latent_mean: Sequence[float],
        latent_std: Sequence[float],
        structure_settings: StageSettings,
        latent_settings: StageSettings,
        *,
        image_size: int = 518,
        device: torch.device | str = "cpu",
        low_memory: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        channels = networks.latent_flow.config.in_channels
        if len(latent_mean) != channels or len(latent_std) != channels:
            raise InputError(
                f"normalization: expected {channels} means and deviations, got {len(latent_mean)} and "
                f"{len(latent_std)}"
            )
        self.networks, self.conditioner, self.kind = networks, conditioner, kind
        self.latent_mean, self.latent_std = torch.tensor(latent_mean), torch.tensor(latent_std)
        self.structure_settings, self.latent_settings = structure_settings, latent_settings
        self.image_size, self.low_memory, self.notes = image_size, low_memory, tuple(notes)
        self.device = torch.device(device)
        for network in (*vars(networks).values(), conditioner):
            network.eval().requires_grad_(False)
            if not low_memory:
                network.to(self.device)

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> ImageTo3D:
        """Load a bundle of ours or a TRELLIS folder or repository; see
        :func:`diff2to3.pipeline.load.load_model`.
        """
        from diff2to3.pipeline.load import load_model

        return load_model(source, **options)

    def __call__(
        self,
        prompt: Image.Image | Sequence[Image.Image] | str,
        *,
        seed: int = 0,
        structure: StageSettings | None = None,
        latent: StageSettings | None = None,
        multi_image: str = "stochastic",
        prepare: bool = True,
        progress: Progress | None = None,
    ) -> Result:
        """Generate one object.

        Args:
            prompt: a photo, several photos of one object, or a text for models that take text.
            seed: of the noise, drawn on the CPU in float32, so that it is the same for any device.
            structure, latent: how to sample each stage; as published unless given.
            multi_image: one of :data:`MULTI_IMAGE_MODES`.
            prepare: cut out, centre and resize the photos; False if they already are.

        Raises:
            InputError: a prompt of the wrong kind, no object in a photo, or no voxel generated.
        """
        if multi_image not in MULTI_IMAGE_MODES:
            raise InputError(
                f"multi_image: expected one of {', '.join(MULTI_IMAGE_MODES)}, got {multi_image!r}"
            )
        generator = torch.Generator().manual_seed(seed)
        report: Progress = progress or (lambda stage, done, total: None)
        clock = Clock()
        with torch.inference_mode():
            conditions = self.conditions(prompt, prepare)
            clock.lap("condition")
            settings = structure or self.structure_settings
            coords = self.sample_structure(conditions, settings, generator, multi_image, report)
            clock.lap("structure")
            settings = latent or self.latent_settings
            latents = self.sample_latents(coords, conditions, settings, generator, multi_image, report)
            clock.lap("latents")
            with self.on_device(self.networks.decoder) as decoder:
                (gaussians,) = decoder(latents)
            clock.lap("decode")
        # clones are ordinary tensors: what inference mode made cannot take part in autograd
        return Result(clone(gaussians), clone(latents), seed, clock.seconds)

    def conditions(
        self, prompt: Image.Image | Sequence[Image.Image] | str, prepare: bool = True
    ) -> Conditions:
        """Encode the prompt. The absence of an image is zeros; of a text, the empty text."""
        if isinstance(prompt, str):
            if self.kind != "text":
                raise InputError("prompt: this model takes images, not text")
            with self.on_device(self.conditioner) as conditioner:
                tokens, absent = conditioner([prompt, ""]).to(self.device).split(1)
            return Conditions((tokens,), absent)
        if self.kind != "image":
            raise InputError("prompt: this model takes text, not images")
        images = [prompt] if isinstance(prompt, Image.Image) else list(prompt)
        if not images:
            raise InputError("prompt: expected at least one image")
        if prepare:
            images = [prepare_photo(image, self.image_size) for image in images]
        with self.on_device(self.conditioner) as conditioner:
            tokens = conditioner(to_tensor(images, self.image_size).to(self.device)).to(self.device)
        # Attention to equal tokens returns their value whatever their number, so one zero token stands for
        # all.
        return Conditions(tokens.split(1), torch.zeros_like(tokens[:1, :1]))

    def sample_structure(
        self,
        conditions: Conditions,
        settings: StageSettings,
        generator: torch.Generator,
        multi_image: str = "stochastic",
        progress: Progress | None = None,
    ) -> Tensor:
        """Stage 1: active voxels [N, 4]. InputError if there is none."""
        with self.on_device(self.networks.structure_flow) as flow:
            c = flow.config
            noise = torch.randn(1, c.in_channels, *(c.resolution,) * 3, generator=generator).to(self.device)

            def velocity_of(cond: Tensor) -> Velocity:
                plan = flow.plan(1, cond.shape[1], self.device)
                return lambda z, t: flow(z, time_tensor(t), cond, plan)

            z = sample(velocity_of, noise, conditions, settings, multi_image, "structure", progress)
        with self.on_device(self.networks.structure_decoder) as decoder:
            coords = active_voxels(decoder(z))
        if not len(coords):
            raise InputError("the structure stage generated no voxel for this input; try another seed")
        return coords

    def sample_latents(
        self,
        coords: Tensor,
        conditions: Conditions,
        settings: StageSettings,
        generator: torch.Generator,
        multi_image: str = "stochastic",
        progress: Progress | None = None,
    ) -> SparseVoxels:
        """Stage 2: latents on these voxels, as the decoder takes them."""
        with self.on_device(self.networks.latent_flow) as flow:
            c = flow.config
            noise = torch.randn(len(coords), c.in_channels, generator=generator).to(self.device)
            voxels = SparseVoxels.from_coords(coords, noise, c.resolution)
            shared = flow.plan(voxels, conditions.absent.shape[1])

            def velocity_of(cond: Tensor) -> Velocity:
                plan = shared.with_context(cond.shape[1])
                return lambda z, t: flow(voxels.with_feats(z), time_tensor(t), cond, plan)

            z = sample(velocity_of, noise, conditions, settings, multi_image, "latents", progress)
        return voxels.with_feats(z * self.latent_std.to(z) + self.latent_mean.to(z))

    @contextmanager
    def on_device(self, network: nn.Module) -> Iterator[Any]:
        """The network, on the device; with ``low_memory`` it goes back to the CPU afterwards."""
        if not self.low_memory:
            yield network
            return
        network.to(self.device)
        try:
            yield network
        finally:
            network.to("cpu")


def sample(
    velocity_of: Callable[[Tensor], Velocity],
    noise: Tensor,
    conditions: Conditions,
    settings: StageSettings,
    multi_image: str,
    stage: str,
    progress: Progress | None,
) -> Tensor:
    """Euler steps with guidance over one or several conditions."""
    present = [velocity_of(tokens) for tokens in conditions.tokens]
    combine = averaged if multi_image == "multidiffusion" else alternating
    velocity = guided(
        present[0] if len(present) == 1 else combine(present),
        velocity_of(conditions.absent),
        settings.guidance_scale,
        settings.guidance_interval,
    )

    def on_step(step: Step) -> None:
        if progress is not None:
            progress(stage, step.index + 1, step.num_steps)

    return euler(velocity, noise, timesteps(settings.num_steps, settings.shift), on_step)


def time_tensor(t: float) -> Tensor:
    """[1], in float64 on the CPU: networks round it once, after scaling."""
    return torch.tensor([t], dtype=torch.float64)


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
