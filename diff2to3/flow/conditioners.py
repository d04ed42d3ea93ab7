"""Frozen encoders whose tokens condition the flow models: DINOv2 for images, CLIP for text.

Both come from transformers, by the name of a hub repository or a local folder. Images are prepared by the
caller.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import InputError, MissingDependencyError

#: torch.hub's names of DINOv2, as pipeline.json has them → the same weights in transformers' layout.
DINOV2_REPOSITORIES = {
    "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
    "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
    "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
    "dinov2_vitg14_reg": "facebook/dinov2-with-registers-giant",
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_TEXT_TOKENS = 77


class ImageConditioner(nn.Module):
    """DINOv2 with registers: all tokens (class, registers, patches) before the last norm, then normalised."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.channels = int(network.config.hidden_size)
        self.patch_size = int(network.config.patch_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """sRGB images [B, 3, H, W] in [0, 1] → tokens [B, 1 + registers + patches, channels] in float32."""
        parameter = next(self.network.parameters())
        size = self.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % size or images.shape[3] % size:
            raise ValueError(
                f"images: expected [B, 3, H, W], H and W multiples of {size}, got {list(images.shape)}"
            )
        mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
        std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
        x = ((images.float() - mean) / std).to(parameter.device, parameter.dtype)
        hidden = self.network(x, output_hidden_states=True).hidden_states[-1].float()
        return F.layer_norm(hidden, hidden.shape[-1:])


class TextConditioner(nn.Module):
    """CLIP's text encoder: the last hidden states of 77 tokens."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.channels = int(network.config.hidden_size)

    @torch.no_grad()
    def forward(self, texts: list[str]) -> Tensor:
        """B texts → tokens [B, 77, channels] in float32. The empty text is the unconditional input."""
        encoded = self.tokenizer(
            texts, max_length=MAX_TEXT_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        )
        device = next(self.network.parameters()).device
        hidden: Tensor = self.network(input_ids=encoded["input_ids"].to(device)).last_hidden_state
        return hidden.float()


def load_image_conditioner(
    name: str, *, local_path: str | Path | None = None, offline: bool = False
) -> ImageConditioner:
    """DINOv2 by torch.hub's name (as in TRELLIS's pipeline.json), a hub repository, or a local folder.

    Raises:
        InputError: weights that cannot be read or reached; the message says which and where they may be put.
        MissingDependencyError: transformers is not installed.
    """
    source = str(local_path or DINOV2_REPOSITORIES.get(name, name))
    transformers = import_transformers()
    options = {"local_files_only": offline, "use_safetensors": True}
    network = load(lambda: transformers.Dinov2WithRegistersModel.from_pretrained(source, **options), source)
    return ImageConditioner(network)


def load_text_conditioner(
    name: str, *, local_path: str | Path | None = None, offline: bool = False
) -> TextConditioner:
    """CLIP's text encoder and tokenizer by hub repository or local folder; errors as for images."""
    source = str(local_path or name)
    transformers = import_transformers()
    options = {"local_files_only": offline}
    network = load(
        lambda: transformers.CLIPTextModel.from_pretrained(source, use_safetensors=True, **options), source
    )
    tokenizer = load(lambda: transformers.AutoTokenizer.from_pretrained(source, **options), source)
    return TextConditioner(network, tokenizer)


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "flux") from error
    return transformers


def load(build: Callable[[], Any], source: str) -> Any:
    """Run ``build``, quietly; whatever the library raises becomes one line that names the weights."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return build()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{source}: cannot load this encoder ({first}); give its folder (config.json, model.safetensors)"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
