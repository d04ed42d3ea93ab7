"""diff2to3 as a gradio app, for Hugging Face Spaces: python app.py, or put this folder into a Space."""

from __future__ import annotations

import dataclasses
import html
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.formats import write
from diff2to3.gaussians.render import EPS2D
from diff2to3.pipeline import ImageTo3D
from diff2to3.web.viewer import home_of, seen_picture, viewer_page

MAX_STEPS = 100
#: Files to download, beside the page.
KINDS = ("ply", "spz", "glb")


def generate(
    model: ImageTo3D, photo: Image.Image | None, seed: float, steps: float, progress: Any
) -> tuple[str, list[str], str]:
    """The viewer (HTML), files to download, and what looks wrong with the photo. gr.Error for what cannot be used."""
    if photo is None:
        raise gr.Error("Give a photo first.")
    changes = {"num_steps": int(steps)} if steps else {}

    def report(stage: str, step: int, total: int) -> None:
        progress(
            (step, total), desc={"structure": "Shape", "latents": "Surface and colour"}.get(stage, stage)
        )

    try:
        result = model(
            photo,
            seed=int(seed),
            structure=dataclasses.replace(model.structure_settings, **changes),
            latent=dataclasses.replace(model.latent_settings, **changes),
            progress=report,
        )
    except InputError as error:
        raise gr.Error(str(error)) from error
    name = f"seed{int(seed)}"
    page = viewer_page(result.gaussians, name, photo=seen_picture(result), home=home_of(result))
    folder = Path(tempfile.mkdtemp(prefix="diff2to3-"))  # gradio serves downloads from the disk
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    files = [folder / f"{name}.{kind}" for kind in KINDS]
    for path in files:
        write(path, result.gaussians, {"seed": int(seed), "screen_filter": EPS2D})
    inside = html.escape(page)
    frame = (
        f'<iframe title="The result" srcdoc="{inside}" width="100%" height="520" style="border:0"></iframe>'
    )
    return frame, [str(path) for path in (*files, folder / f"{name}.html")], "; ".join(result.notes)


def build(model: ImageTo3D) -> gr.Blocks:
    """The page."""

    def run(photo: Image.Image | None, seed: float, steps: float, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return generate(model, photo, seed, steps, progress)

    with gr.Blocks(title="diff2to3") as page:
        gr.Markdown("# diff2to3\nOne photo in, a 3D Gaussian splat out.")
        with gr.Row():
            with gr.Column(scale=1):
                photo = gr.Image(type="pil", image_mode="RGBA", label="Photo of one object")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
                steps = gr.Slider(0, MAX_STEPS, 0, step=1, label="Steps (0: as the model says)")
                button = gr.Button("Make 3D", variant="primary")
                notes = gr.Markdown()
            with gr.Column(scale=2):
                viewer = gr.HTML()
                files = gr.File(label="Files", file_count="multiple")
        button.click(run, [photo, seed, steps], [viewer, files, notes], concurrency_limit=1)
    return page


if __name__ == "__main__":
    build(ImageTo3D.from_pretrained("mini-photo")).queue(max_size=16).launch()
