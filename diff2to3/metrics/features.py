"""Features of images by published networks, for distances between sets (FD, KD) and between images (CLIP).

    name       features                              default weights                size
    inception  2048, pooled, Inception-v3 of FID     none: a local file             299, bicubic, antialiased
    dinov2     1024, class token after its norm      facebook/dinov2-large          224, bicubic, antialiased
    clip       768, projected image embedding        openai/clip-vit-large-patch14  224, bicubic, antialiased

Resizing is that of clean-fid (Parmar et al. 2022), without rounding to 8 bits. DINOv2 as the extractor of FD
follows Stein et al. (2023).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.metrics.image import check_images
from diff2to3.metrics.inception import SIDE, InceptionV3
from diff2to3.metrics.weights import WeightsRecord, read_safetensors, record, transformers_folder

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: name → default weights; None where there is no safe published file to fetch.
EXTRACTORS: dict[str, str | None] = {
    "inception": None,
    "dinov2": "facebook/dinov2-large",
    "clip": "openai/clip-vit-large-patch14",
}
INCEPTION_ADVICE = (
    "download pt_inception-2015-12-05-6726825d.pth, make it with: "
    "python eval/convert_weights.py inception IN.pth OUT.safetensors, and give inception=OUT.safetensors"
)


class FeatureExtractor:
    """Images [V, H, W, 3] in [0, 1] → features [V, C], float32 on the extractor's device.

    name    of the extractor
    record  which weights, for the result
    """

    def __init__(
        self,
        name: str,
        network: Callable[[Tensor], Tensor],
        side: int,
        normalise: tuple[tuple[float, ...], tuple[float, ...]],
        weights: WeightsRecord,
        device: torch.device | str,
        batch_size: int = 32,
    ) -> None:
        self.name, self.record = name, weights
        self._network, self._side, self._batch_size = network, side, batch_size
        self._mean, self._std = (torch.tensor(values, device=device) for values in normalise)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images("images", images)
        batches = images.split(self._batch_size)
        return torch.cat([self._network(self.prepare(batch)).float() for batch in batches])

    def prepare(self, images: Tensor) -> Tensor:
        """What the network sees: [V, 3, S, S], resized (a view that is not square is squeezed) and normalised."""
        x = images.to(self._mean.device, torch.float32).permute(0, 3, 1, 2)
        size = (self._side, self._side)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return (x - self._mean.view(3, 1, 1)) / self._std.view(3, 1, 1)


def build_extractor(
    name: str,
    weights: str | None = None,
    *,
    device: torch.device | str = "cpu",
    offline: bool = False,
) -> FeatureExtractor:
    """An extractor by name.

    Args:
        name: one of :data:`EXTRACTORS`.
        weights: a local file (``inception``), or a folder or hub repository in transformers' layout; None for
            the default.
        device: where it runs.
        offline: never open a connection.

    Raises:
        InputError: an unknown name; weights that are missing (one line that says how to get them) or do not fit.
        MissingDependencyError: transformers or huggingface_hub is needed.
    """
    if name not in EXTRACTORS:
        raise InputError(f"extractor: unknown name {name!r}; known are {', '.join(EXTRACTORS)}")
    source = weights or EXTRACTORS[name]
    if name == "inception":
        return _inception(source, device)
    assert source is not None
    folder = transformers_folder(name, source, offline)
    network, side = (_dinov2 if name == "dinov2" else _clip)(_from_folder(name, folder, device))
    described = record(name, source, folder / "model.safetensors", "transformers")
    return FeatureExtractor(name, network, side, CLIP if name == "clip" else IMAGENET, described, device)


def cosine_scores(features: Tensor, reference: Tensor) -> Tensor:
    """100 · cosine between rows of [N, C] and [N, C] or [1, C]: [N]. The CLIP score, image to image.

    ValueError for rows of zeros, whose direction is not defined.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features: {list(features.shape)} and {list(reference.shape)} cannot be compared")
    x, y = features.double(), reference.double()
    lengths = x.norm(dim=1) * y.norm(dim=1)
    if not bool((lengths > 0).all()):
        raise ValueError("features: a row is zero or NaN; its direction is not defined")
    return 100 * (x * y).sum(1) / lengths


def _inception(source: str | None, device: torch.device | str) -> FeatureExtractor:
    if source is None:
        raise InputError(f"inception: no weights given; {INCEPTION_ADVICE}")
    network = InceptionV3(read_safetensors(source, "inception", INCEPTION_ADVICE)).to(device).eval()
    described = record("inception", source, Path(source).expanduser(), "torch")
    # (x · 255 − 128) / 128, as the graph had it.
    scale = (128 / 255,) * 3
    return FeatureExtractor("inception", network, SIDE, (scale, scale), described, device)


def _from_folder(name: str, folder: Path, device: torch.device | str) -> Any:
    try:
        from transformers import AutoModel, CLIPVisionModelWithProjection
    except ImportError as error:
        raise MissingDependencyError("transformers", "eval") from error
    kind: Any = CLIPVisionModelWithProjection if name == "clip" else AutoModel
    try:
        model = kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # the library's errors have no common base
        lines = str(error).strip().splitlines()
        raise InputError(f"{name}: {folder} cannot be loaded: {lines[0] if lines else error}") from error
    return model.to(device).eval()


def _dinov2(model: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    # The position embedding is interpolated from 518; 224 is 16 x 16 patches of 14.
    return lambda x: model(pixel_values=x).last_hidden_state[:, 0], 16 * int(model.config.patch_size)


def _clip(model: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    return lambda x: model(pixel_values=x).image_embeds, int(model.config.image_size)
