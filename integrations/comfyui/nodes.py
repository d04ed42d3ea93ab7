"""Nodes for ComfyUI's V3 interface: load a model, turn photos into Gaussian splats, look at the result.

ComfyUI's conventions: IMAGE is float [B, H, W, 3 or 4] in [0, 1], MASK float [B, H, W]; SPLAT holds activated
Gaussians, y down, as 3DGS files do.
"""

from __future__ import annotations

import dataclasses
import io as bytesio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import ComfyExtension, Types, io
from PIL import Image

if TYPE_CHECKING:
    from diff2to3.pipeline import ImageTo3D, Result
    from diff2to3.types import Gaussians

CATEGORY = "3d/diff2to3"
Model = io.Custom("DIFF2TO3_MODEL")
Asset = io.Custom("DIFF2TO3_ASSET")


class LoadModel(io.ComfyNode):
    """A diff2to3 model; the embedded one needs no download."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Diff2to3LoadModel",
            display_name="Load diff2to3 model",
            category=CATEGORY,
            description="The embedded model, a folder, or a hub repository such as microsoft/TRELLIS-image-large.",
            inputs=[
                io.String.Input(
                    "model",
                    default="mini-photo",
                    tooltip="mini-photo (embedded), a folder, or a hub repository",
                ),
                io.Combo.Input("device", options=["auto", "cpu", "cuda", "mps"], default="auto"),
                io.Boolean.Input(
                    "low_memory",
                    default=False,
                    tooltip="Networks wait on the CPU and visit the device in turn",
                ),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, device: str, low_memory: bool) -> Any:
        from diff2to3.pipeline import ImageTo3D

        chosen = comfy_device() if device == "auto" else torch.device(device)
        return io.NodeOutput(ImageTo3D.from_pretrained(model.strip(), device=chosen, low_memory=low_memory))


class ImageTo3DNode(io.ComfyNode):
    """Photos to Gaussian splats."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Diff2to3ImageTo3D",
            display_name="Image to 3D (diff2to3)",
            category=CATEGORY,
            description="One photo in, a 3D Gaussian splat out.",
            inputs=[
                Model.Input("model"),
                io.Image.Input("image"),
                io.Mask.Input(
                    "mask", optional=True, tooltip="What the object is. Without one the background is removed first"
                ),
                io.Combo.Input(
                    "mask_marks", options=["object", "background"], default="object",
                    tooltip="Load Image's mask marks what is transparent: background",
                ),
                io.Combo.Input(
                    "batch", options=["an object each", "one object"], default="an object each",
                    tooltip="Several images are several objects, or one object from several sides",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Int.Input("steps", default=0, min=0, max=200, tooltip="Of each stage; 0: as the model says"),
                io.Float.Input(
                    "guidance_scale", default=0.0, min=0.0, max=30.0, step=0.1,
                    tooltip="1 is off; 0: as the model says",
                ),
            ],
            outputs=[
                io.Splat.Output(display_name="splat"),
                io.File3DPLY.Output(display_name="file (first object)"),
                Asset.Output(display_name="asset"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: ImageTo3D,
        image: torch.Tensor,
        mask_marks: str,
        batch: str,
        seed: int,
        steps: int,
        guidance_scale: float,
        mask: torch.Tensor | None = None,
    ) -> Any:
        pictures = pictures_of(image, mask, mask_marks)
        prompts = [pictures] if batch == "one object" else [[picture] for picture in pictures]
        changes = {"num_steps": steps or None, "guidance_scale": guidance_scale or None}
        changes = {key: value for key, value in changes.items() if value is not None}
        results = []
        for number, prompt in enumerate(prompts):
            results.append(
                model(
                    prompt,
                    seed=seed + number,
                    structure=dataclasses.replace(model.structure_settings, **changes),
                    latent=dataclasses.replace(model.latent_settings, **changes),
                    # a mask says all; transparency is looked at first where there is none
                    background_removal="auto" if mask is None else "none",
                    progress=progress_bar(number, len(prompts)),
                )
            )
        return io.NodeOutput(splat_of([r.gaussians for r in results]), ply_of(results[0]), results)


class Turntable(io.ComfyNode):
    """Pictures of a result from all around, as an image batch."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Diff2to3Turntable",
            display_name="Turntable (diff2to3)",
            category=CATEGORY,
            inputs=[
                Asset.Input("asset"),
                io.Int.Input("frames", default=24, min=1, max=360),
                io.Int.Input("resolution", default=384, min=16, max=2048),
                io.Float.Input("elevation", default=15.0, min=-89.0, max=89.0, tooltip="Degrees"),
                io.Float.Input("background", default=1.0, min=0.0, max=1.0, tooltip="Grey level"),
            ],
            outputs=[io.Image.Output(display_name="frames")],
        )

    @classmethod
    def execute(
        cls, asset: Sequence[Result], frames: int, resolution: int, elevation: float, background: float
    ) -> Any:
        from diff2to3.pipeline.turntable import turntable

        turns = [
            turntable(result.gaussians, frames, resolution, elevation=elevation, background=background)
            for result in asset
        ]
        return io.NodeOutput(torch.cat([torch.from_numpy(turn).float() / 255 for turn in turns]))


class Diff2to3Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, ImageTo3DNode, Turntable]


async def comfy_entrypoint() -> Diff2to3Extension:
    """What ComfyUI calls."""
    return Diff2to3Extension()


# ---- between ComfyUI's types and ours ----


def pictures_of(image: torch.Tensor, mask: torch.Tensor | None, mask_marks: str) -> list[Image.Image]:
    """RGB or, with a mask or an alpha channel, RGBA. One mask serves all images; it is resized to them."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise ValueError(f"image: expected [B, H, W, 3 or 4], got {list(image.shape)}")
    if mask is not None and len(mask) not in (1, len(image)):
        raise ValueError(f"mask: expected 1 or {len(image)}, as there are images, got {len(mask)}")
    pictures = []
    for number, pixels in enumerate(to_bytes(image)):
        picture = Image.fromarray(pixels.numpy())
        if mask is not None:
            marks = mask[min(number, len(mask) - 1)]
            alpha = Image.fromarray(to_bytes(marks if mask_marks == "object" else 1 - marks).numpy())
            picture = picture.convert("RGB")
            picture.putalpha(alpha.resize(picture.size, Image.Resampling.BILINEAR))
        pictures.append(picture)
    return pictures


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    return (values.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def splat_of(objects: Sequence[Gaussians]) -> Any:
    """ComfyUI's batch, filled up with zeros to the largest, with the counts beside where they differ."""
    from diff2to3.gaussians.turn import Y_DOWN, turned

    ready = [turned(g.to("cpu"), torch.tensor(Y_DOWN)) for g in objects]
    counts = [len(g) for g in ready]

    def batch(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        out = tensors[0].new_zeros(len(tensors), max(counts), *tensors[0].shape[1:])
        for row, values in zip(out, tensors, strict=True):
            row[: len(values)] = values
        return out

    return Types.SPLAT(
        batch([g.means for g in ready]),
        batch([g.scales for g in ready]),
        batch([torch.nn.functional.normalize(g.quats, dim=-1) for g in ready]),
        batch([g.opacities[:, None] for g in ready]),
        batch([g.sh for g in ready]),
        torch.tensor(counts) if len(set(counts)) > 1 else None,
    )


def ply_of(result: Result) -> Any:
    """A .ply in memory, y down as other programs expect."""
    from diff2to3.formats import FORMATS, encode
    from diff2to3.gaussians.render import EPS2D

    data = encode(result.gaussians, FORMATS["ply"], {"seed": result.seed, "screen_filter": EPS2D})
    return Types.File3D(bytesio.BytesIO(data), "ply")


# ---- ComfyUI around us ----


def comfy_device() -> torch.device:
    import comfy.model_management

    return torch.device(comfy.model_management.get_torch_device())


def progress_bar(number: int, count: int) -> Callable[[str, int, int], None]:
    """ComfyUI's bar over all objects; its Cancel button stops at the next step."""
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(100 * count)

    def report(stage: str, step: int, steps: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        share = step / max(steps, 1)
        bar.update_absolute(100 * number + int(50 * share) + (0 if stage == "structure" else 50))

    return report
