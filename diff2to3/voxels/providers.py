"""Image encoders whose feature maps are lifted onto voxels: one protocol, chosen by name.

    name               channels  stride  network                         published weights (default)
    flux               16        8       FLUX.1's autoencoder            black-forest-labs/FLUX.1-schnell
    taef1              16        8       its tiny distillation           madebyollin/taef1
    flux2              32        8       FLUX.2's autoencoder            black-forest-labs/FLUX.2-klein-4B
    taef2              32        8       its tiny distillation           madebyollin/taef2
    dinov2_vitl14_reg  1024      14      DINOv2 ViT-L/14 with registers  facebook/dinov2-with-registers-large
    mini               32        8       MiniEncoder, distilled from TAEF2    in this package
    rgb                3         1       none: the colours, box-filtered when a stride is given
    rgb_stats          6         8       none: mean and standard deviation of the colours in each cell

The tiny ones run on modules of ours, the other networks through diffusers and transformers.
The FLUX family's features are the latents as its denoisers see them: the posterior's mode, shifted and scaled
(FLUX.1) or normalised by the stored channel statistics (FLUX.2), so that they have about unit variance; the
tiny autoencoders are trained to output exactly those. DINOv2's are the patch tokens before the last
LayerNorm, as TRELLIS uses them for its voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.files import file_sha256
from diff2to3.hub import download, is_local, not_found
from diff2to3.voxels.mini_encoder import WEIGHTS as MINI_WEIGHTS
from diff2to3.voxels.mini_encoder import MiniEncoder, load_mini_encoder
from diff2to3.voxels.taesd import load_taesd


class FeatureProvider(Protocol):
    """Encodes images to feature maps that cover the same extent: map cell (i, j) spans stride² pixels."""

    @property
    def channels(self) -> int: ...

    @property
    def stride(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor:
        """sRGB images [V, H, W, 3] in [0, 1] -> features [V, C, H/stride, W/stride]."""
        ...


def build_provider(
    name: str,
    weights: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    offline: bool = False,
    stride: int | None = None,
) -> FeatureProvider:
    """A provider by name.

    Args:
        name: one of :data:`PROVIDERS`.
        weights: a local file or folder, or a hub name; None for the published ones.
        device: where ``encode`` runs.
        dtype: its arithmetic.
        offline: never open a connection; what is not in the local cache is an error.
        stride: cell size of ``rgb`` and ``rgb_stats``; the networks fix their own.

    Raises:
        InputError: an unknown name, or weights that are missing or do not fit.
        MissingDependencyError: the network needs diffusers, transformers or huggingface_hub.
    """
    if name not in PROVIDERS:
        raise InputError(f"provider: unknown name {name!r}; known are {', '.join(PROVIDERS)}")
    if stride is not None and not name.startswith("rgb"):
        raise InputError(f"stride: the stride of {name} is fixed; leave it out")
    if stride is not None and stride < 1:
        raise InputError(f"stride: expected a positive number, got {stride}")
    if name in ("rgb", "rgb_stats"):
        return RgbFeatures(stride or (1 if name == "rgb" else 8), statistics=name == "rgb_stats")
    network = PROVIDERS[name](weights, offline)
    network.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    return network


class RgbFeatures:
    """Colours averaged over stride² pixels, and with ``statistics`` their standard deviations as well."""

    def __init__(self, stride: int = 1, statistics: bool = False) -> None:
        self.stride, self.statistics = stride, statistics
        self.channels = 6 if statistics else 3

    def encode(self, images: Tensor) -> Tensor:
        _check_size(images, self.stride)
        x = images.permute(0, 3, 1, 2).float()
        mean = F.avg_pool2d(x, self.stride)
        if not self.statistics:
            return mean
        spread = x - F.interpolate(mean, scale_factor=self.stride, mode="nearest")
        return torch.cat([mean, F.avg_pool2d(spread.square(), self.stride).sqrt()], 1)


class _Network(nn.Module):
    """A frozen network that takes images [V, 3, H, W] in its own range; ``encode`` brings them there."""

    stride = 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def features(self, x: Tensor) -> Tensor:
        """Images [V, 3, H, W] in [0, 1], already in the network's device and dtype -> [V, C, h, w]."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :class:`FeatureProvider`."""
        _check_size(images, self.stride)
        parameter = next(self.parameters())
        x = images.permute(0, 3, 1, 2).to(parameter.device, parameter.dtype)
        return self.features(x.contiguous(memory_format=torch.channels_last))


class TaesdFeatures(_Network):
    """TAEF1 or TAEF2; which one is told from the weights."""

    def __init__(self, encoder: nn.Sequential) -> None:
        super().__init__(encoder[-1].out_channels)  # type: ignore[arg-type]
        self.encoder = encoder

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class MiniFeatures(_Network):
    """The mini preset's own encoder, distilled from TAEF2."""

    def __init__(self, encoder: MiniEncoder) -> None:
        super().__init__(encoder.config.latent_channels)
        self.encoder = encoder

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class FluxFeatures(_Network):
    """diffusers' ``AutoencoderKL``: (mode - shift_factor) * scaling_factor."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.config.latent_channels)
        self.vae = vae
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    def features(self, x: Tensor) -> Tensor:
        latents = self.vae.encode(2 * x - 1).latent_dist.mode()
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor


class Flux2Features(_Network):
    """diffusers' ``AutoencoderKLFlux2``: the mode, normalised by the running statistics of its 2x2 packed
    latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.config.latent_channels)
        self.vae = vae
        # Latents are packed 2x2 for normalisation, so an image needs an even number of cells each way.
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    def features(self, x: Tensor) -> Tensor:
        latents = self.vae.encode(2 * x - 1).latent_dist.mode()
        bn = self.vae.bn
        mean = F.pixel_shuffle(bn.running_mean.view(1, -1, 1, 1), 2)
        std = F.pixel_shuffle((bn.running_var + self.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1), 2)
        h, w = latents.shape[-2:]
        if h % 2 or w % 2:
            raise ValueError(f"images: flux2 needs multiples of {2 * self.stride} pixels")
        return (latents - mean.repeat(1, 1, h // 2, w // 2)) / std.repeat(1, 1, h // 2, w // 2)


class Dinov2Features(_Network):
    """transformers' ``Dinov2WithRegistersModel``: patch tokens before the last LayerNorm.

    Images are resized to the nearest multiple of the patch size (512 -> 518), so the map still covers the
    image.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.config.hidden_size)
        self.model = model
        self.patch_size = int(model.config.patch_size)
        self.stride = self.patch_size
        self.num_prefix = 1 + int(model.config.num_register_tokens)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :class:`FeatureProvider`; any image size."""
        p = self.patch_size
        h, w = (max(round(s / p), 1) for s in images.shape[1:3])
        parameter = next(self.parameters())
        x = images.permute(0, 3, 1, 2).to(parameter.device, torch.float32)
        x = F.interpolate(x, (h * p, w * p), mode="bilinear", antialias=True).to(parameter.dtype)
        return self.features(x).unflatten(-1, (h, w))

    def features(self, x: Tensor) -> Tensor:
        out = self.model((x - self.mean) / self.std, output_hidden_states=True)
        return out.hidden_states[-1][:, self.num_prefix :].transpose(1, 2)


def _check_size(images: Tensor, stride: int) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected shape [V, H, W, 3], got {list(images.shape)}")
    h, w = images.shape[1:3]
    if h % stride or w % stride:
        raise ValueError(f"images: expected height and width that are multiples of {stride}, got {h} x {w}")


def _load_flux(weights: str | None, offline: bool) -> _Network:
    diffusers = _import("diffusers")
    source = weights or "black-forest-labs/FLUX.1-schnell"
    return FluxFeatures(_from_pretrained(diffusers.AutoencoderKL, source, offline, subfolder="vae"))


def _load_flux2(weights: str | None, offline: bool) -> _Network:
    diffusers = _import("diffusers")
    if not hasattr(diffusers, "AutoencoderKLFlux2"):
        raise MissingDependencyError("diffusers >= 0.36 (AutoencoderKLFlux2)", "flux")
    source = weights or "black-forest-labs/FLUX.2-klein-4B"
    return Flux2Features(_from_pretrained(diffusers.AutoencoderKLFlux2, source, offline, subfolder="vae"))


def _load_dinov2(weights: str | None, offline: bool) -> _Network:
    transformers = _import("transformers")
    source = weights or "facebook/dinov2-with-registers-large"
    return Dinov2Features(_from_pretrained(transformers.Dinov2WithRegistersModel, source, offline))


def _load_taef1(weights: str | None, offline: bool) -> _Network:
    return _load_tiny(weights or "madebyollin/taef1", "diffusion_pytorch_model.safetensors", 16, offline)


def _load_taef2(weights: str | None, offline: bool) -> _Network:
    return _load_tiny(weights or "madebyollin/taef2", "taef2.safetensors", 32, offline)


def _load_tiny(source: str, filename: str, channels: int, offline: bool) -> _Network:
    network = TaesdFeatures(load_taesd(_find_file(source, filename, offline)))
    if network.channels != channels:
        raise InputError(f"{source}: expected {channels} latent channels, found {network.channels}")
    return network


def _load_mini(weights: str | None, offline: bool) -> _Network:
    path = None if weights is None else _find_file(weights, "image_encoder.safetensors", offline)
    return MiniFeatures(load_mini_encoder(path))


#: name -> loader of (weights, offline)
#: The feature set that is no image encoder: statistics of the pixels in each voxel (diff2to3.voxels.surface).
SURFACE = "surface"

PROVIDERS: dict[str, Callable[[str | None, bool], Any]] = {
    "flux": _load_flux,
    "taef1": _load_taef1,
    "flux2": _load_flux2,
    "taef2": _load_taef2,
    "mini": _load_mini,
    "dinov2_vitl14_reg": _load_dinov2,
    "rgb": lambda weights, offline: RgbFeatures(1),
    "rgb_stats": lambda weights, offline: RgbFeatures(8, statistics=True),
}


def _import(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(package, "flux") from error


def _find_file(source: str, filename: str, offline: bool) -> Path:
    """The local file for a path, a folder that holds ``filename``, or a hub name."""
    if is_local(source):
        path = Path(source).expanduser()
        path = path / filename if path.is_dir() else path
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; give the weights' file or folder, or a hub name (owner/name)"
            )
        return path
    return download(source, filename, offline, _hint(source, filename))


def _from_pretrained(cls: Any, source: str, offline: bool, subfolder: str = "") -> Any:
    """``cls.from_pretrained`` of safetensors only, from a local folder (with or without ``subfolder``) or the
    hub."""
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": offline}
    if is_local(source):
        folder = Path(source).expanduser()
        folder = folder / subfolder if (folder / subfolder / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder / 'config.json'}: no such file; give the folder of a saved {cls.__name__}"
            )
        if not list(folder.glob("*.safetensors")):
            raise InputError(f"{folder}: no .safetensors file beside config.json")
        source, options["local_files_only"] = str(folder), True
    elif subfolder:
        options["subfolder"] = subfolder
    try:
        return cls.from_pretrained(source, **options).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        missing = f"{subfolder}/*.safetensors" if subfolder else "*.safetensors"
        raise InputError(not_found(source, missing, offline, error, _hint(source, missing))) from error


def _hint(source: str, filename: str) -> str:
    folder, _, pattern = filename.rpartition("/")
    fetch = f"--include '{folder}/*'" if folder else "" if "*" in pattern else pattern
    return (
        "give a local path as weights, or fetch it on a machine with a connection: "
        + f"hf download {source} {fetch}".rstrip()
    )


def weights_fingerprint(weights: str | None, provider: str | None = None) -> str:
    """What identifies weights: a hub name itself, or a SHA-256 over a local file or folder's safetensors.

    ``provider``: whose weights they are; those that come with the package (mini) are a local file too.
    """
    if weights is None and provider == "mini":
        weights = str(MINI_WEIGHTS)
    if weights is None or not is_local(weights):
        return weights or "published"
    path = Path(weights).expanduser()
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
    return f"sha256:{file_sha256(*files)}"
